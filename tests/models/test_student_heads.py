"""Heads of students: copied, new, tied as the weights are, or drawn where a checkpoint has none."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.models import language_model, loading, student_checks, students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student, load_recipe
from tests.models.families import (
    ALL,
    MASKED,
    VOCABULARY,
    assert_computes,
    auto,
    build,
    every_family,
    of_layers,
    own_logits,
    sequences,
)
from tests.small_run import quiet, small

HEADS = {
    "bert": "cls.predictions.transform.dense.weight",
    "roberta": "lm_head.dense.weight",
    "distilbert": "vocab_transform.weight",
    "modernbert": "head.dense.weight",
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_not_copied_is_new_but_the_vocabulary_stays(kind: str, tied: bool) -> None:
    teacher = build(kind, tie_word_embeddings=tied)
    with_head = students.fewer_layers(teacher, [0, 2], copy_head=True)
    without_head = students.fewer_layers(teacher, [0, 2], copy_head=False)
    source = teacher.state_dict()
    assert torch.equal(with_head.module.state_dict()[HEADS[kind]], source[HEADS[kind]])
    assert not torch.equal(without_head.module.state_dict()[HEADS[kind]], source[HEADS[kind]])
    assert without_head.bias is not None
    assert float(without_head.bias.detach().abs().max()) == 0
    for student in (with_head, without_head):
        assert torch.equal(student.weight, LanguageModel(copy.deepcopy(teacher)).weight)
        assert (student.module.get_input_embeddings().weight is student.weight) == tied


def test_distilbert_head_that_is_not_copied_is_new_but_tied() -> None:
    teacher = build("bert")
    student = students.distilbert_from_bert(teacher, [0, 2], copy_head=False)
    assert student.module.distilbert.embeddings.word_embeddings.weight is student.weight
    assert torch.equal(student.weight, teacher.cls.predictions.decoder.weight)
    assert not torch.equal(
        student.module.vocab_transform.weight,
        teacher.cls.predictions.transform.dense.weight,
    )
    assert float(student.bias.detach().abs().max()) == 0


# Tied or not


def untied(kind: str, folder: Path) -> Tensor:
    """Save a model whose configuration ties what its files hold apart, as published ones do; return its logits."""
    model = build(kind, tie_word_embeddings=True)
    model.save_pretrained(folder)
    output = language_model.family_of(model.config).output
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
    assert_computes(loading.load_model(path), truth)
    students_by_kind = {
        "layers": students.make_student(Student(layers=ALL), loading.load_model(path), VOCABULARY),
        "path": students.make_student(Student(path=path), None, VOCABULARY),
    }
    if kind == "bert":
        recipe = Student(layers=ALL, architecture="distilbert")
        students_by_kind["distilbert"] = students.make_student(recipe, loading.load_model(path), VOCABULARY)
    for name, student in students_by_kind.items():
        assert_computes(student, truth)
        loading.save_pretrained(student, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        plain = auto(str(student.module.config.model_type)).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_second_bias_of_an_untied_head_is_not_trained_and_saved_as_the_first(
    kind: str,
    tmp_path: Path,
) -> None:
    untied(kind, tmp_path / "untied")
    student = loading.load_model(str(tmp_path / "untied"))
    bias = student.bias
    assert bias is not None
    batch = student_checks._probe(student)
    (student.transform(student.hidden(batch)) @ student.weight.T + bias).square().sum().backward()
    assert all(
        parameter.grad is not None
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and "pooler" not in name and "token_type" not in name
    )
    with torch.no_grad():
        bias += 1.0
    loading.save_pretrained(student, tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    saved = [
        tensor
        for name, tensor in weights.items()
        if name in ("cls.predictions.bias", "lm_head.bias", "cls.predictions.decoder.bias", "lm_head.decoder.bias")
    ]
    assert saved and all(torch.equal(tensor, bias) for tensor in saved)


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


# A checkpoint without a head


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_drawn_where_the_recipe_says_so(kind: str, tied: bool, tmp_path: Path) -> None:
    teacher = build(kind, tie_word_embeddings=tied)
    body = teacher.get_submodule(language_model.family_of(teacher.config).backbone)
    body.save_pretrained(tmp_path)
    path = str(tmp_path)
    if not (kind in ("gpt2", "llama", "qwen2", "qwen3") and tied):  # else the embedding is all of the head
        with pytest.raises(UserError, match="language-model head") as caught:
            loading.load_model(path)
        assert "student.head" not in str(caught.value)  # a teacher's is never drawn
        with pytest.raises(
            UserError,
            match=r"lacks .*, or set student\.head=fresh to have the missing head drawn",
        ):
            students.make_student(Student(path=path), None, VOCABULARY)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(students.make_student(Student(path=path, head="fresh"), None, VOCABULARY).module)
    first, same, other = (model.state_dict() for model in drawn)
    assert (drawn[0].get_input_embeddings().weight is LanguageModel(drawn[0]).weight) == tied
    prefix = language_model.family_of(teacher.config).backbone + "."
    source = teacher.state_dict()
    head = [name for name in source if not name.startswith(prefix)]
    for name, tensor in source.items():
        assert torch.equal(first[name], same[name])
        if name not in head:
            assert torch.equal(first[name], tensor)
    matrices = [name for name in head if tensor_is_drawn(first[name]) and not (tied and name.endswith(OUTPUTS))]
    assert bool(matrices) == (not tied or kind in ("bert", "roberta", "distilbert", "modernbert"))
    for name in matrices:
        assert not torch.equal(first[name], other[name])
        assert 0.005 < float(first[name].std()) < 0.05  # initializer_range is 0.02


OUTPUTS = ("decoder.weight", "vocab_projector.weight", "lm_head.weight")


def tensor_is_drawn(tensor: Tensor) -> bool:
    return tensor.dim() == 2


def test_a_body_without_a_weight_is_refused_all_the_same(tmp_path: Path) -> None:
    build("bert").bert.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights .*layer\.1\.output\.dense\.weight"):
        students.make_student(Student(path=str(tmp_path), head="fresh"), None, VOCABULARY)
    with pytest.raises(UserError, match="lacks") as caught:
        students.make_student(Student(path=str(tmp_path)), None, VOCABULARY)
    assert "student.head" not in str(caught.value)


def test_pretraining_and_distilling_from_a_bare_encoder(material: Path, tmp_path: Path) -> None:
    transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher").bert.save_pretrained(
        tmp_path / "bare",
    )
    overrides = [
        f"student.path={tmp_path / 'bare'}",
        "evaluation.every=null",
        "data.heldout=null",
        "loop.updates=1",
    ]
    with pytest.raises(UserError, match=r"student\.head=fresh"):
        quiet(small(material, tmp_path, *overrides))
    alone = ["teacher=null", "objective.a_ce=0", "objective.a_cos=0", "objective.a_mlm=1"]
    for number, more in enumerate(([], alone)):
        quiet(small(material, tmp_path, *overrides, *more, "student.head=fresh", f"name=fresh{number}"))
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / f"fresh{number}" / "student")


def test_only_a_checkpoint_has_a_head_to_draw() -> None:
    with pytest.raises(UserError, match=r"head: fresh is for a checkpoint without one \(path\), got every"):
        load_recipe("distilbert", ["student.every=2", "student.head=fresh"])
