"""The logits loss as an operator of torch: its registration, its one backward, the checks of its inputs, its costs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.kernels import distill
from fastdistil.kernels.autograd import scale_
from fastdistil.kernels.distill import bytes_moved, distill_loss
from fastdistil.kernels.distill_options import DistillOptions, pack
from tests.kernels.distill_inputs import EVERYTHING, PATHS, logits, some_labels


@pytest.mark.parametrize("backend", PATHS)
def test_the_op_is_registered_as_torch_wants_it(backend: str) -> None:
    student, teacher = logits(4, 30, torch.float32)
    options = DistillOptions(**EVERYTHING)
    tests = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    arguments = (
        student.requires_grad_(),
        teacher,
        None,
        None,
        None,
        some_labels(4, 30),
        None,
        True,
        backend,
        *pack(options),
    )
    torch.library.opcheck(distill._distill, arguments, test_utils=tests)


def test_compiled_without_a_graph_break() -> None:
    student, teacher = logits(4, 30, torch.float32)
    labels, options = some_labels(4, 30), DistillOptions(**EVERYTHING)

    def loss(student: Tensor) -> Tensor:
        return distill_loss(2 * student, teacher, labels, options=options).total * 5

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (eager,) = torch.autograd.grad(loss(student.requires_grad_()), student)
    (compiled_grad,) = torch.autograd.grad(compiled(student), student)
    torch.testing.assert_close(compiled_grad, eager)


@pytest.mark.parametrize("backend", PATHS)
def test_differentiable_once(backend: Any) -> None:
    student, teacher = logits(4, 30)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(
            distill_loss(student, teacher, options=DistillOptions(), backend=backend).total,
            student,
            create_graph=True,
        )
    total = distill_loss(student, teacher, options=DistillOptions(), backend=backend).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over by an earlier backward"):
        total.backward()
    terms = distill_loss(student, teacher, options=DistillOptions(), backend=backend)
    assert not terms.soft.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"beta": 1.0}, "beta must lie between 0 and 1"),
        ({"student_softcap": 0.0}, "student_softcap must be positive"),
        ({"hard": math.nan}, "hard must be finite"),
        ({"columns": 0}, "columns must be at least 1"),
    ],
)
def test_options_are_checked_at_birth(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions(**change)


def test_inputs_are_checked() -> None:
    student, teacher = logits(4, 30)
    plain = DistillOptions()
    cases: list[tuple[tuple[Any, ...], DistillOptions, str, str]] = [
        ((student, teacher[:, :20]), plain, "auto", "say so: columns=20"),
        ((student, teacher), DistillOptions(columns=31), "auto", "columns is 31"),
        ((student, teacher[:3]), plain, "auto", "must have 4 rows"),
        ((student, teacher, torch.zeros(4)), plain, "auto", "labels must be int64"),
        (
            (student, teacher, torch.full((4,), 30)),
            plain,
            "auto",
            r"labels must lie in 0 \.\.\. 29 or be options.ignore_index, got 30",
        ),
        (
            (student, teacher, None, torch.ones(4, dtype=torch.long)),
            plain,
            "auto",
            "weights must be floating-point",
        ),
        ((student.long(), teacher), plain, "auto", "must be floating-point"),
        (
            (student, teacher.clone().requires_grad_()),
            plain,
            "auto",
            "only the student's logits get a gradient",
        ),
        ((student, teacher), plain, "cuda", "must be one of auto, reference"),
    ]
    for arguments, options, backend, message in cases:
        with pytest.raises(ValueError, match=message):
            distill_loss(*arguments, options=options, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1e5, 1 / 3, 1e-8])
def test_the_factor_of_backward_is_not_rounded(dtype: torch.dtype, factor: float) -> None:
    """1e5 is infinite in float16, 1e-8 is 0, and a third has 8 bits in bfloat16."""
    tensor = torch.tensor([1e-3, -0.5, 2.0] if factor < 1e5 else [1e-3, -1e-4, 0.2]).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (tensor.to(wide) * torch.tensor(factor, dtype=wide)).to(dtype)
    scale_(tensor, torch.tensor(factor, dtype=wide))
    assert torch.equal(tensor, expected)


def test_costs() -> None:
    assert bytes_moved(10, 100, 2) == 10 * 100 * 2 * 3
    assert bytes_moved(10, 100, 2, gradient=False) == 10 * 100 * 2 * 2
