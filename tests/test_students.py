"""Students against the weights, layers, tokenizers and sizes they come from, and as transformers loads them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastdistil import models, students
from fastdistil.models import LanguageModel
from fastdistil.prepare import PrepareOptions, prepare
from fastdistil.recipe import Student
from tests.small_run import TINY, quiet, small
from tests.test_models import (
    CONFIGS,
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


# Padding and special tokens


def tokenizer_of(tokens: list[str], **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=names.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, **names)
    return made


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"pad_token": "c", "eos_token": "b"}, {"pad_token_id": 2, "eos_token_id": 1}),
        ({"pad_token": "b", "eos_token": "b", "bos_token": "a"}, {"eos_token_id": 1, "bos_token_id": 0}),
        ({"pad_token": "a", "unk_token": "a", "cls_token": "c"}, {"unk_token_id": 0, "cls_token_id": 2}),
        ({"eos_token": "b"}, {"eos_token_id": 1}),
    ],
)
def test_padding_is_a_token_for_padding_alone(names: dict[str, str], expected: dict[str, int]) -> None:
    ids = students.special_ids(tokenizer_of(["a", "b", "c"], **names))
    assert {name: number for name, number in ids.items() if number is not None} == expected


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("way", ["config", "layers", "path"])
def test_a_token_that_also_pads_is_learnt(kind: str, way: str, tmp_path: Path) -> None:
    """Where the checkpoint or the recipe itself says so; untied, so that the embedding's gradient is all there is."""
    values = {**CONFIGS[kind], "pad_token_id": 7, "tie_word_embeddings": False}
    teacher = build(kind, **values)
    recipe = {"config": {"model_type": kind, **values}, "layers": [0, 1], "path": str(tmp_path)}[way]
    teacher.save_pretrained(tmp_path)
    student = students.make_student(Student.model_validate({way: recipe}), LanguageModel(teacher), VOCABULARY)
    texts = sequences()
    texts[3][2] = 7
    logits(student, batch_of(texts)).square().sum().backward()
    gradient = student.module.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[7].abs().sum() > 0


# Sizes that a configuration leaves out


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "bert", "distilbert", "modernbert", "gpt2"])
def test_sizes_left_out_fit_those_given(kind: str) -> None:
    given = {"dim": 48, "n_heads": 4} if kind == "distilbert" else {"hidden_size": 48, "num_attention_heads": 4}
    layers = {"n_layers": 1} if kind == "distilbert" else {"num_hidden_layers": 1}
    values = {"model_type": kind, **given, **layers, "max_position_embeddings": 48}
    config = students.make_student(Student(config=values), None, VOCABULARY).module.config
    inner = {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(kind, "intermediate_size")
    expected = {"llama": 129, "qwen2": 258, "qwen3": 258, "bert": 192, "distilbert": 192, "modernbert": 72, "gpt2": None}
    assert getattr(config, inner) == expected[kind]  # as 11008 to 4096, 22016 to 4096, 3072 to 768, 1152 to 768
    if kind in ("llama", "qwen2", "qwen3"):
        assert config.num_key_value_heads == 4
        assert getattr(config, "head_dim", 12) == 12
    chosen = {**values, inner: 56, **({"num_key_value_heads": 2} if hasattr(config, "num_key_value_heads") else {})}
    config = students.make_student(Student(config=chosen), None, VOCABULARY).module.config
    assert getattr(config, inner) == 56
    assert getattr(config, "num_key_value_heads", 2) == 2


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_configuration_of_no_sizes_is_the_architectures(kind: str) -> None:
    ours = models.config_from({"model_type": kind, "pad_token_id": 1}, VOCABULARY).to_dict()
    plain = transformers.AutoConfig.for_model(kind).to_dict()
    assert {name: value for name, value in ours.items() if "token_id" not in name and name != "vocab_size"} == {
        name: value for name, value in plain.items() if "token_id" not in name and name != "vocab_size"
    }


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


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_dozen_tokens_are_trained_on(kind: str, tmp_path: Path) -> None:
    names = {"unk_token": "<u>", "pad_token": "<p>", "eos_token": "</s>", "mask_token": "<m>"}
    tokenizer_of([*names.values(), *"abcdefgh"], **names).save_pretrained(tmp_path / "tokenizer")
    lines = [" ".join("abcdefgh"[(row * step) % 8] for step in range(3, 12)) for row in range(1, 30)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), max_length=16, workers=1, documents="line")
    prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", options)
    objective = ["objective.a_mlm=0", "objective.a_clm=1"] if kind == "llama" else ["objective.a_mlm=1"]
    config = json.dumps({**TINY, "model_type": kind})
    recipe = [f"student.config={config}", "teacher=null", "objective.a_ce=0", "objective.a_cos=0", *objective]
    folders = [f"data.train={tmp_path / 'corpus'}", f"data.heldout={tmp_path / 'corpus'}", "evaluation.every=null"]
    result = quiet(small(tmp_path, tmp_path, *recipe, *folders, "loop.updates=2"))
    assert result.evaluation is not None
