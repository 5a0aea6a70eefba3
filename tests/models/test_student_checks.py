"""Students that compute otherwise than their teacher or than transformers: refused by name, before and after training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.models import loading, student_checks, students
from fastdistil.models.language_model import LanguageModel
from fastdistil.recipe import Student
from fastdistil.training import export
from tests.models.families import ALL, SLIDING, VOCABULARY, build, every_family, of_layers
from tests.small_run import quiet, small


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_students_of_all_families_and_precisions_pass_the_guard(kind: str, dtype: torch.dtype) -> None:
    teacher = build(kind).to(dtype)
    of_layers(teacher, 0, 3)
    of_layers(teacher, *ALL, copy_head=False)
    if kind == "bert":
        of_layers(teacher, 1, 2, architecture="distilbert")


def spoil_config(**values: Any) -> Any:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        real = students.config_with_layers

        def spoilt(*arguments: Any) -> Any:
            config = real(*arguments)
            for name, value in values.items():
                setattr(config, name, value)
            return config

        monkeypatch.setattr(students, "config_with_layers", spoilt)

    return spoil


def spoil_weights(part: str, factor: float = 1.5) -> Any:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        real = students._load

        def spoilt(student: Any, weights: dict[str, Tensor], leave: tuple[str, ...]) -> None:
            real(
                student,
                {name: tensor * (factor if part in name else 1) for name, tensor in weights.items()},
                leave,
            )

        monkeypatch.setattr(students, "_load", spoilt)

    return spoil


def no_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "_keep_attention_scales", lambda *arguments: None)


THETAS = {"full_attention": {"rope_type": "default", "rope_theta": 160000.0}}
FAULTS = [
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        no_scales,
        "layer 0, copied from the teacher's layer 1,",
    ),
    ("gpt2", {}, spoil_config(layer_norm_epsilon=0.5), "layer 0, copied"),
    ("gpt2", {}, spoil_weights("wpe"), "embeddings"),
    ("gpt2", {}, spoil_weights("ln_f"), "last norm"),
    ("gpt2", {}, spoil_weights("ln_f", float("nan")), "last norm"),
    ("gpt2", {}, spoil_weights("h.1.mlp.c_proj"), "layer 1, copied from the teacher's layer 3,"),
    ("bert", {}, spoil_config(hidden_act="relu"), "layer 0, copied"),
    ("bert", {}, spoil_weights("predictions.transform"), "head"),
    ("bert", {}, spoil_weights("predictions.transform", 1.01), "head"),
    ("roberta", {}, spoil_weights("layer.0.attention.self.query"), "layer 0, copied"),
    (
        "llama",
        {},
        spoil_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
        "layer 0, copied",
    ),
    ("qwen2", SLIDING["qwen2"], spoil_config(layer_types=2 * ["full_attention"]), "layer 1, copied"),
    (
        "qwen2",
        {**SLIDING["qwen2"], "sliding_window": 40},
        spoil_config(layer_types=2 * ["full_attention"]),
        r"layer 1, .*window of \[None\] tokens for \[40\]",
    ),
    ("modernbert", {}, spoil_config(layer_types=2 * ["sliding_attention"]), "layer 0, copied|window of"),
]


@pytest.mark.parametrize(("kind", "values", "spoil", "part"), FAULTS)
def test_a_part_that_computes_otherwise_is_refused_by_name(
    kind: str, values: dict[str, Any], spoil: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (0, 3) if kind == "modernbert" else (1, 3)
    teacher = build(kind, **values)
    of_layers(teacher, *layers)
    spoil(monkeypatch)
    with pytest.raises(UserError, match=rf"the student's .*({part}).*start from student\.config") as caught:
        of_layers(teacher, *layers)
    assert "\n" not in str(caught.value)


def test_the_guard_sees_a_scale_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build("gpt2", scale_attn_by_inverse_layer_idx=True).bfloat16()
    of_layers(teacher, 1, 3)
    no_scales(monkeypatch)
    with pytest.raises(UserError, match="copied from the teacher's layer 1"):
        of_layers(teacher, 1, 3)


def test_a_teacher_that_is_not_finite_is_not_the_guards_to_find() -> None:
    teacher = build("bert")
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.bias[3] = float("nan")
    of_layers(teacher, 1, 2)


def test_the_guard_draws_no_numbers_and_leaves_the_models_as_they_were() -> None:
    teacher = LanguageModel(build("bert").bfloat16()).train()
    student = students.fewer_layers(teacher.module, [0, 2]).train()
    student.module.bert.encoder.layer[0].eval()
    modes = [[part.training for part in model.modules()] for model in (teacher, student)]
    before, weights = torch.get_rng_state(), [p.clone() for p in student.parameters()]
    student_checks.check_copied_parts(teacher, student, [0, 2], head=True)
    student_checks.check_transformers_agrees(student)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [[part.training for part in model.modules()] for model in (teacher, student)]
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(weights, student.parameters(), strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in (*teacher.modules(), *student.modules()))


def test_an_error_of_our_own_code_is_not_told_as_the_students(monkeypatch: pytest.MonkeyPatch) -> None:
    student = LanguageModel(build("bert"))
    monkeypatch.setattr(LanguageModel, "hidden", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        student_checks.check_transformers_agrees(student)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 3},
        {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 8},
        {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 32},
    ],
)
def test_sizes_that_transformers_cannot_run_are_refused(values: dict[str, Any]) -> None:
    recipe = Student(config={**values, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1})
    with pytest.raises(
        UserError,
        match=r"student is no \w+ model that transformers runs .*change student\.config",
    ) as caught:
        students.make_student(recipe, None, VOCABULARY)
    assert "\n" not in str(caught.value)


def test_an_exported_student_that_transformers_cannot_run_is_an_error_and_stays(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loading.save_pretrained

    changes: dict[str, Any] = {}

    def spoilt(model: nn.Module, directory: Path) -> None:
        real(model, directory)
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    monkeypatch.setattr(export.loading, "save_pretrained", spoilt)
    for number, (config, complaint) in enumerate(
        [
            ({"hidden_act": "relu"}, "gives other logits than the one that was trained"),
            ({"num_attention_heads": 5}, "cannot be run by transformers"),
            ({"num_hidden_layers": 3}, "cannot be run by transformers .*lacks"),
        ]
    ):
        changes.clear()
        changes.update(config)
        recipe = small(
            material,
            tmp_path,
            "loop.updates=1",
            "evaluation.every=null",
            f"name=run{number}",
            "data.heldout=null",
        )
        with pytest.raises(UserError, match=f"run{number}/student.*{complaint}") as caught:
            quiet(recipe)
        assert "\n" not in str(caught.value)
        assert (tmp_path / f"run{number}" / "student" / "model.safetensors").exists()
        assert '"event": "done"' not in (tmp_path / f"run{number}" / "events.jsonl").read_text()
