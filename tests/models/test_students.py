"""Students against the layers of the teacher they were made from."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fastdistil.errors import UserError
from fastdistil.models import language_model, loading, students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student
from tests.models.families import (
    DEPTH,
    SIZES,
    SLIDING,
    VOCABULARY,
    WIDTH,
    assert_computes,
    auto,
    batch_of,
    build,
    config_of,
    every_family,
    logits,
    of_layers,
    own_logits,
    sequences,
)

LAYERS = {
    "bert": "bert.encoder.layer.{}.",
    "roberta": "roberta.encoder.layer.{}.",
    "distilbert": "distilbert.transformer.layer.{}.",
    "modernbert": "model.layers.{}.",
    "gpt2": "transformer.h.{}.",
    "llama": "model.layers.{}.",
    "qwen2": "model.layers.{}.",
    "qwen3": "model.layers.{}.",
}


@every_family
def test_a_student_has_the_layers_it_was_promised(kind: str) -> None:
    teacher = build(kind)
    student = students.fewer_layers(teacher, [0, 3])
    source, copied = teacher.state_dict(), student.module.state_dict()
    first, second = (LAYERS[kind].format(place) for place in (0, 1))
    assert not any(LAYERS[kind].format(2) in name for name in copied)
    for name, tensor in copied.items():
        old = LAYERS[kind].format(3) + name.removeprefix(second) if name.startswith(second) else name
        assert torch.equal(tensor, source[old]), name
    assert any(name.startswith(first) for name in copied)
    assert (
        len(
            {tensor.data_ptr() for tensor in copied.values()} & {tensor.data_ptr() for tensor in source.values()},
        )
        == 0
    )


@every_family
@torch.no_grad()
def test_a_student_of_all_layers_is_the_teacher(kind: str) -> None:
    teacher = build(kind)
    student = students.fewer_layers(teacher, list(range(DEPTH)))
    texts = sequences()
    expected = own_logits(copy.deepcopy(teacher).double(), texts)
    torch.testing.assert_close(logits(student.eval().double(), batch_of(texts)), expected, rtol=0, atol=1e-10)
    assert teacher.config.to_dict() == {**student.module.config.to_dict(), **_dtypes(teacher.config)}


def _dtypes(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name in ("dtype", "torch_dtype")}


@pytest.mark.parametrize("layers", [[0, 1], [0, 3], [0, 2, 3]])
@torch.no_grad()
def test_modernbert_layers_keep_their_windows(layers: list[int]) -> None:
    """Computed by the teacher with its other layers skipped."""
    teacher = build("modernbert").double()
    texts = sequences()
    student = logits(students.fewer_layers(teacher, layers).eval().double(), batch_of(texts))
    teacher.model.layers = nn.ModuleList(teacher.model.layers[layer] for layer in layers)
    torch.testing.assert_close(
        student,
        own_logits(teacher, texts),
        rtol=0,
        atol=1e-6,
    )  # through float32 weights


def test_modernbert_students_start_with_the_first_layer() -> None:
    with pytest.raises(UserError, match="must start with layer 0"):
        students.fewer_layers(build("modernbert"), [1, 3])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_distilbert_with_all_layers_is_its_bert(activation: str) -> None:
    teacher = build("bert", hidden_act=activation)
    embeddings = teacher.bert.embeddings
    # On a grid, where float32 adds positions and segments without rounding.
    for table in (embeddings.position_embeddings.weight, embeddings.token_type_embeddings.weight):
        table.copy_((table * 1024).round() / 1024)
    assert embeddings.token_type_embeddings.weight[0].abs().max() > 0.1
    student = students.distilbert_from_bert(teacher, list(range(DEPTH)))
    texts = sequences()
    truth = own_logits(copy.deepcopy(teacher).double(), texts)
    torch.testing.assert_close(logits(student.eval().double(), batch_of(texts)), truth, rtol=0, atol=1e-10)


def test_distilbert_takes_the_layers_it_was_promised() -> None:
    teacher = build("bert")
    student = students.distilbert_from_bert(teacher, [1, 3]).module
    assert student.config.model_type == "distilbert"
    for place, layer in enumerate((1, 3)):
        new, old = student.distilbert.transformer.layer[place], teacher.bert.encoder.layer[layer]
        assert torch.equal(new.attention.v_lin.weight, old.attention.self.value.weight)
        assert torch.equal(new.ffn.lin2.bias, old.output.dense.bias)
        assert torch.equal(new.sa_layer_norm.weight, old.attention.output.LayerNorm.weight)


def test_distilbert_refuses_what_it_cannot_express() -> None:
    with pytest.raises(UserError, match="needs a BERT teacher, got roberta"):
        students.distilbert_from_bert(build("roberta"), [0])
    with pytest.raises(UserError, match="eps 1e-12, the teacher's 1e-05"):
        students.distilbert_from_bert(build("bert", layer_norm_eps=1e-5), [0])


def test_make_student_follows_the_recipe(tmp_path: Path) -> None:
    teacher = LanguageModel(build("bert"))
    every = students.make_student(Student(every=3), teacher, VOCABULARY)
    assert torch.equal(
        every.module.bert.encoder.layer[1].output.dense.weight,
        teacher.module.bert.encoder.layer[3].output.dense.weight,
    )
    distil = students.make_student(
        Student(layers=(0, 2), architecture="distilbert", dropout=0.25),
        teacher,
        VOCABULARY,
    )
    assert distil.module.config.model_type == "distilbert"
    assert {m.p for m in distil.modules() if isinstance(m, nn.Dropout)} == {0.25}
    config = {"model_type": "bert", **SIZES, "num_hidden_layers": 1}
    fresh = students.make_student(Student(config=config, freeze_positions=True), None, 33)
    assert language_model.shape(fresh) == (33, WIDTH)
    frozen = [name for name, parameter in fresh.named_parameters() if not parameter.requires_grad]
    assert frozen == ["module.bert.embeddings.position_embeddings.weight"]
    loading.save_pretrained(every, tmp_path)
    loaded = students.make_student(Student(path=str(tmp_path)), None, VOCABULARY)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), every.parameters(), strict=True))


def test_layers_need_a_teacher_and_positions_to_freeze() -> None:
    with pytest.raises(UserError, match=r"set teacher\.path"):
        students.make_student(Student(every=2), None, VOCABULARY)
    with pytest.raises(UserError, match="no position embeddings"):
        students.make_student(
            Student(every=2, freeze_positions=True),
            LanguageModel(build("llama")),
            VOCABULARY,
        )


@every_family
@pytest.mark.parametrize("before", [0.3, 0.0, 0])
def test_set_dropout_reaches_every_dropout(kind: str, before: float) -> None:
    names = [name for name, value in config_of(kind).to_dict().items() if "drop" in name and isinstance(value, float | int)]
    model = build(kind, **dict.fromkeys(names, before))
    students.set_dropout(model, 0.125)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.125}
    assert all(getattr(model.config, name) == 0.125 for name in names)
    fresh = auto(kind).from_config(model.config)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)] == [
        n for n, m in fresh.named_modules() if isinstance(m, nn.Dropout)
    ]
    numbers = [m.attention_dropout for m in model.modules() if isinstance(getattr(m, "attention_dropout", None), float | int)]
    assert set(numbers) <= {0.125}
    assert numbers or any(isinstance(module, nn.Dropout) for module in model.modules())


# Layers that take something from their number


def with_layers(teacher: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """The teacher itself, all but some of its layers skipped: what a student of those layers has to compute."""
    path, _, name = language_model.family_of(teacher.config).layers.rpartition(".")
    blocks = getattr(teacher.get_submodule(path), name)
    setattr(teacher.get_submodule(path), name, nn.ModuleList(blocks[layer] for layer in layers))
    return teacher


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (2,), (0, 3)])
@torch.no_grad()
def test_gpt2_layers_keep_the_scale_of_their_number(layers: tuple[int, ...], tmp_path: Path) -> None:
    teacher = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    student = of_layers(teacher, *layers)
    truth = own_logits(with_layers(teacher, *layers), sequences())
    assert_computes(student, truth)
    loading.save_pretrained(student, tmp_path)
    plain = auto("gpt2").from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SLIDING)
@pytest.mark.parametrize("layers", [(0, 2), (0, 1), (0, 2, 3), (0, 1, 3)])
@torch.no_grad()
def test_layers_keep_their_window_and_rotary_base(kind: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    teacher = build(kind, **SLIDING[kind])
    types = [teacher.config.layer_types[layer] for layer in layers]
    student = of_layers(teacher, *layers)
    # The teacher's own code looks at its configuration for a layer's type.
    teacher.config.layer_types = types
    teacher.config.use_cache = False
    truth = own_logits(with_layers(teacher, *layers), sequences())
    assert_computes(student, truth)
    loading.save_pretrained(student, tmp_path)
    plain = auto(kind).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own_logits(plain, sequences()), truth, rtol=0, atol=1e-5)
    # Programs that go by the older words must come to the same types, where these can say them.
    config = json.loads((tmp_path / "config.json").read_text())
    every, first = config.get("global_attn_every_n_layers"), config.get("max_window_layers")
    if every is not None:
        assert types == ["sliding_attention" if place % every else "full_attention" for place in range(len(layers))]
    if kind == "qwen2":
        assert types == ["sliding_attention" if place >= first else "full_attention" for place in range(len(layers))]
