"""Students against the weights, layers, tokenizers and sizes they come from, and as transformers loads them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistil import models, students
from fastdistil.models import LanguageModel
from fastdistil.recipe import Student
from tests.test_models import (
    DEPTH,
    VOCABULARY,
    auto,
    batch_of,
    build,
    every_family,
    logits,
    own_logits,
    sequences,
)

ALL = tuple(range(DEPTH))


def of_layers(teacher: PreTrainedModel, *layers: int, **options: Any) -> LanguageModel:
    return students.make_student(Student(layers=layers, **options), LanguageModel(teacher), VOCABULARY)


def with_layers(teacher: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """The teacher itself, all but some of its layers skipped: what a student of those layers has to compute."""
    path, _, name = models.family_of(teacher.config).layers.rpartition(".")
    blocks = getattr(teacher.get_submodule(path), name)
    setattr(teacher.get_submodule(path), name, nn.ModuleList(blocks[layer] for layer in layers))
    return teacher


@torch.no_grad()
def assert_computes(student: LanguageModel, truth: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(student.eval(), batch_of(sequences())), truth, rtol=0, atol=atol)


# Tied or not


def untied(kind: str, folder: Path) -> Tensor:
    """Save a model whose configuration ties what its files hold apart, as published ones do; return its logits."""
    model = build(kind, tie_word_embeddings=True)
    model.save_pretrained(folder)
    output = models.family_of(model.config).output
    head = model.get_submodule(output)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    head.weight = nn.Parameter(head.weight + 0.5 * torch.randn_like(head.weight))
    weights[f"{output}.weight"] = head.weight.detach()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
    with torch.no_grad():
        return own_logits(model, sequences())


@every_family
def test_weights_that_differ_are_not_tied(kind: str, tmp_path: Path) -> None:
    truth = untied(kind, tmp_path / "untied")
    path = str(tmp_path / "untied")
    assert_computes(models.load_model(path), truth)
    made = {
        "layers": students.make_student(Student(layers=ALL), models.load_model(path), VOCABULARY),
        "path": students.make_student(Student(path=path), None, VOCABULARY),
    }
    if kind == "bert":
        recipe = Student(layers=ALL, architecture="distilbert")
        made["distilbert"] = students.make_student(recipe, models.load_model(path), VOCABULARY)
    for name, student in made.items():
        assert_computes(student, truth)
        models.save_pretrained(student, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        plain = auto(str(student.module.config.model_type)).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("says", [True, False])
@torch.no_grad()
def test_a_model_given_from_python_is_tied_as_its_weights_are(says: bool) -> None:
    model = build("llama", tie_word_embeddings=says)
    if says:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + torch.randn_like(model.lm_head.weight))
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    truth = own_logits(model, sequences())
    student = of_layers(model, *ALL)
    assert_computes(student, truth)
    assert student.module.config.tie_word_embeddings is not says
    assert (student.weight is student.module.get_input_embeddings().weight) is not says


# Small vocabularies


@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_a_causal_model_of_few_tokens_is_evaluated(size: int) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = models.AnyModel(transformers.GPTNeoXForCausalLM(config), causal=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not models._sees_later_tokens(model)
    encoder = copy.deepcopy(model)
    real = encoder.module.forward
    # What an encoder does: the first tokens' logits depend on the last one.
    encoder.module.forward = lambda input_ids, **keywords: real(input_ids=input_ids.flip(1), **keywords)
    assert models._sees_later_tokens(encoder)
