"""The logits loss against its specification in float64, on the path for the CPU and on Triton's through its interpreter."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdistil.kernels.distill import distill_loss
from fastdistil.kernels.distill_options import DistillOptions, DistillTerms, Targets
from fastdistil.kernels.distill_torch import distill_rows_torch
from fastdistil.kernels.distill_triton import distill_rows_triton
from tests.kernels.distill_inputs import EVERYTHING, PATHS, gradient, logits, some_labels, some_weights

DIVERGENCES = ["forward-kl", "reverse-kl", "jsd"]


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double() if tensor.is_floating_point() else tensor


def assert_as_specified(
    student: Tensor, teacher: Tensor, *targets: Tensor | None, backend: Any, options: DistillOptions
) -> None:
    """Values and gradient, in the inputs' dtype, against float64."""
    truth, expected_grad = gradient(
        student.double(), teacher.double(), *map(double, targets), options=options, backend="reference"
    )
    before = [tensor.clone() for tensor in (student, teacher)]
    terms, grad = gradient(student, teacher, *targets, options=options, backend=backend)
    # The kernel's coefficients are float32.
    tolerance = 1e-6 if student.dtype == torch.float64 else 2e-5
    for name, value, term in zip(DistillTerms._fields, terms, truth, strict=True):
        torch.testing.assert_close(value.double(), term, rtol=tolerance, atol=1e-6 * len(student), msg=lambda m: f"{name}: {m}")  # noqa: B023
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=0, atol=tolerance * max(1.0, float(expected_grad.abs().max()))
    )
    for tensor, copy in zip((student, teacher), before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [1, 7, 255, 507, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_divergence(backend: str, divergence: Any, columns: int, dtype: torch.dtype) -> None:
    student, teacher = logits(7, columns, dtype)
    options = DistillOptions(divergence=divergence, **EVERYTHING)
    targets = (some_labels(7, columns), some_weights(7, dtype))
    assert_as_specified(student, teacher, *targets, backend=backend, options=options)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offsets", [(300.0, 300.0), (-1e4, -1e4), (0.0, 30.0)])
def test_offsets_of_the_logits_take_no_digits(
    backend: str,
    divergence: Any,
    offsets: tuple[float, float],
) -> None:
    """A student close to its teacher: the divergence is 1e-5 of what the log sums of either side are."""
    torch.manual_seed(0)
    teacher = torch.randn(16, 1000)
    student, teacher = teacher + 0.05 * torch.randn(16, 1000) + offsets[0], teacher + offsets[1]
    labels = teacher.argmax(-1)
    options = DistillOptions(temperature=2.0, divergence=divergence, soft=1.0, hard=1.0, beta=0.4)
    (terms, grad), (truth, expected_grad) = (
        gradient(pair[0], pair[1], labels, backend=how, options=options)
        for pair, how in (((student, teacher), backend), ((student.double(), teacher.double()), "reference"))
    )
    torch.testing.assert_close(terms.soft.double(), truth.soft, rtol=2e-3, atol=0)
    torch.testing.assert_close(terms.hard.double(), truth.hard, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [1000, 5000])
@pytest.mark.parametrize("offsets", [(0.0, 1000.0), (1000.0, 0.0), (-3000.0, 200.0)])
def test_a_difference_of_offsets_costs_no_more_digits_than_eager_float32(
    backend: str, divergence: Any, columns: int, offsets: tuple[float, float]
) -> None:
    """Value and gradient of rows whose student and teacher differ by a constant, which no divergence sees.

    log_softmax takes the largest logit off each side before it takes the difference; 1000.0 - 0.1 in one step is rounded.
    """
    torch.manual_seed(0)
    teacher = 2 * torch.randn(16, columns)
    student, teacher = teacher + 0.3 * torch.randn(16, columns) + offsets[0], teacher + offsets[1]
    options = DistillOptions(temperature=2.0, divergence=divergence, soft=1.0, beta=0.4)
    (truth, slope), (eager, eager_slope), (fast, fast_slope) = (
        gradient(*sides, backend=how, options=options)
        for sides, how in (
            ((student.double(), teacher.double()), "reference"),
            ((student, teacher), "reference"),
            ((student, teacher), backend),
        )
    )
    value_error, eager_error = (abs(float(terms.soft) / float(truth.soft) - 1) for terms in (fast, eager))
    assert value_error <= 2 * eager_error + 3e-5
    slope_error, eager_slope_error = (float((g.double() - slope).abs().max()) for g in (fast_slope, eager_slope))
    assert slope_error <= 2 * eager_slope_error + 1e-6


@pytest.mark.parametrize("backend", PATHS)
def test_a_real_vocabulary(backend: str) -> None:
    student, teacher = logits(3, 30522, torch.float32)
    assert_as_specified(
        student,
        teacher,
        some_labels(3, 30522),
        backend=backend,
        options=DistillOptions(**EVERYTHING),
    )


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "divergence": "jsd"},
        {"student_softcap": 5.0, "student_scale": 0.8},
        {"teacher_softcap": 4.0, "teacher_scale": 1.3, "divergence": "reverse-kl"},
        {"student_softcap": 5.0, "teacher_softcap": 5.0, "temperature": 1.0, "divergence": "jsd"},
        {"columns": 90},
        {"hard": 0.0},
        {"soft": 0.0},
        {"ignore_index": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", ["labels weights", "labels", "weights", ""])
def test_options(backend: str, changes: dict[str, Any], inputs: str) -> None:
    student, teacher = logits(5, 97)
    options = DistillOptions(**{**EVERYTHING, **changes})
    labels = some_labels(5, 60)
    if options.soft == 0 and "labels" not in inputs:
        assert float(distill_loss(student, teacher, options=options, backend=backend).total) == 0  # type: ignore[arg-type]
        return
    if options.ignore_index != -100:
        labels = labels.where(labels >= 0, 0)
        labels[2] = options.ignore_index
    targets = (labels if "labels" in inputs else None, some_weights(5) if "weights" in inputs else None)
    if options.columns:
        teacher = teacher[:, :93]
    assert_as_specified(student, teacher, *targets, backend=backend, options=options)


def naive(student: Tensor, teacher: Tensor, labels: Tensor, options: DistillOptions) -> Tensor:
    """The gradient as a user's few lines in the logits' own dtype have it."""
    leaf = student.clone().requires_grad_()
    t = options.temperature
    soft = F.kl_div((leaf / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="sum") * t * t
    total = options.soft * soft + options.hard * F.cross_entropy(leaf, labels, reduction="sum")
    (grad,) = torch.autograd.grad(total, leaf)
    return grad


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_worse_than_the_naive_way(backend: str, dtype: torch.dtype) -> None:
    student, teacher = (tensor.to(dtype) for tensor in logits(6, 1000))
    labels, options = some_labels(6, 1000), DistillOptions(temperature=2.0, soft=0.7, hard=0.4)
    truth, expected_grad = gradient(
        student.double(),
        teacher.double(),
        labels,
        options=options,
        backend="reference",
    )
    assert float(expected_grad.abs().max()) > 10 * float(expected_grad.abs().mean()) > 0
    terms, grad = gradient(student, teacher, labels, options=options, backend=backend)
    error = float((grad.double() - expected_grad).norm())
    limit = float((3 * naive(student, teacher, labels, options).double() - expected_grad).norm())
    assert error <= 1.5 * limit + 1e-9
    assert abs(float(terms.total.detach()) / float(truth.total.detach()) - 1) < 1e-5  # sums are float32


@pytest.mark.parametrize("backend", PATHS)
def test_float16_gradients_survive_the_mean_over_many_tokens(backend: str) -> None:
    """Coefficients of 1 / 16384 tokens; the loss scale arrives in backward only."""
    student, teacher = (tensor.half() for tensor in logits(4, 1000))
    student.requires_grad_()
    options = DistillOptions(temperature=2.0, soft=1 / 16384)
    (distill_loss(student, teacher, options=options, backend=backend).total * 65536).backward()  # type: ignore[arg-type]
    assert student.grad is not None
    wide = student.detach().double().requires_grad_()
    (distill_loss(wide, teacher.double(), options=options, backend="reference").total * 65536).backward()
    assert wide.grad is not None
    difference = (student.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert float(difference) < 1e-3
    assert float((student.grad == 0).double().mean()) < 0.01


INF = math.inf


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_on_both_sides_is_a_missing_column(backend: Any, divergence: Any) -> None:
    student, teacher = logits(4, 40)
    labels = torch.tensor([3, -100, 0, 17])
    options = DistillOptions(divergence=divergence, **EVERYTHING)
    truth, expected_grad = gradient(
        student[:, :30],
        teacher[:, :30],
        labels,
        options=options,
        backend="reference",
    )
    student[:, 30:] = teacher[:, 30:] = -INF
    terms, grad = gradient(student, teacher, labels, options=options, backend=backend)
    torch.testing.assert_close(terms.total, truth.total, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad[:, :30], expected_grad, rtol=0, atol=1e-6)
    assert (grad[:, 30:] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_minus_infinity_on_one_side(backend: Any) -> None:
    student, teacher = logits(4, 40)
    teacher[:, 5] = -INF
    finite, grad = gradient(student, teacher, options=DistillOptions(), backend=backend)
    p = teacher.softmax(-1)
    q = student.softmax(-1)
    kl = torch.where(p > 0, p * (p.log() - q.log()), 0).sum()
    torch.testing.assert_close(finite.soft, kl, rtol=1e-9, atol=0)
    torch.testing.assert_close(grad, 3 * (q - p), rtol=0, atol=1e-6)
    # Forward KL where the student has nothing and the teacher something: infinite, with a finite gradient.
    student[0, 7] = -INF
    infinite, grad = gradient(student, teacher, options=DistillOptions(), backend=backend)
    assert float(infinite.soft) == INF
    torch.testing.assert_close(grad, 3 * (student.softmax(-1) - p), rtol=0, atol=1e-6)
    # Reverse KL the other way round: infinite, and so says its gradient.
    infinite, grad = gradient(
        student,
        teacher,
        options=DistillOptions(divergence="reverse-kl"),
        backend=backend,
    )
    assert float(infinite.soft) == INF
    assert not bool(grad[0].isfinite().all())
    # JSD has a value wherever both sides have a distribution.
    options = DistillOptions(divergence="jsd", beta=0.3)
    finite, grad = gradient(student, teacher, options=options, backend=backend)
    m = 0.3 * p + 0.7 * (q := student.softmax(-1))
    parts = [torch.where(x > 0, x * (x.log() - m.log()), 0).sum() for x in (p, q)]
    torch.testing.assert_close(finite.soft, 0.3 * parts[0] + 0.7 * parts[1], rtol=1e-6, atol=0)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_a_label_of_no_probability(backend: Any) -> None:
    student, teacher = logits(2, 40)
    student[1, 4] = teacher[1, 4] = -INF
    terms, grad = gradient(
        student,
        teacher,
        torch.tensor([1, 4]),
        options=DistillOptions(soft=0.0),
        backend=backend,
    )
    assert float(terms.hard) == INF
    onehot = F.one_hot(torch.tensor([1, 4]), 40)
    torch.testing.assert_close(grad, 3 * (student.softmax(-1) - onehot), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_and_equal_logits(backend: str, divergence: Any) -> None:
    student, _ = logits(4, 300, torch.float32)
    options = DistillOptions(divergence=divergence, **EVERYTHING)
    assert_as_specified(1e4 * student, 1e4 * student.flip(0).roll(1, 1), backend=backend, options=options)
    terms, grad = gradient(
        student,
        student.clone(),
        options=DistillOptions(divergence=divergence),
        backend=backend,
    )
    assert abs(float(terms.soft)) < 1e-4
    assert float(grad.abs().max()) < 1e-5


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_rows_that_are_out_contribute_exactly_nothing(
    backend: Any,
    divergence: Any,
    cap: float | None,
) -> None:
    """Whatever they hold; and with all of them out, the loss is 0."""
    student, teacher = logits(3, 40)
    student[1], teacher[2], student[0, 3] = math.nan, math.nan, INF
    labels = torch.full((3,), -100)
    options = DistillOptions(divergence=divergence, student_softcap=cap, teacher_softcap=cap, **EVERYTHING)
    terms, grad = gradient(student, teacher, labels, torch.zeros(3), options=options, backend=backend)
    assert [float(term) for term in terms] == [0, 0, 0]
    assert bool((grad == 0).all())
    # Beside rows that count, which are as if alone: one by its weight, one by its label.
    student, teacher = logits(4, 40)
    labels, weights = torch.tensor([-100, -100, 7, -100]), torch.tensor([1.5, 0, 0, 0])
    alone = gradient(student, teacher, labels, weights, options=options, backend="reference")
    student[1], student[3], teacher[3] = math.nan, -INF, math.nan
    terms_and_grad = gradient(student, teacher, labels, weights, options=options, backend=backend)
    torch.testing.assert_close(terms_and_grad[0].total, alone[0].total, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms_and_grad[1], alone[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_no_rows(backend: Any) -> None:
    terms, grad = gradient(
        torch.zeros(0, 9),
        torch.zeros(0, 9),
        torch.zeros(0, dtype=torch.long),
        options=DistillOptions(),
        backend=backend,
    )
    assert float(terms.total) == 0.0
    assert grad.shape == (0, 9)


@pytest.mark.parametrize("backend", PATHS)
def test_rows_may_lie_apart(backend: str) -> None:
    wide, teacher = logits(5, 128)
    assert_as_specified(
        wide[:, 5:66],
        teacher[:, 3:64],
        some_labels(5, 61),
        backend=backend,
        options=DistillOptions(**EVERYTHING),
    )
    with pytest.raises(ValueError, match=r"adjacent columns are needed: \.contiguous"):
        distill_loss(wide.t(), teacher.t(), options=DistillOptions(), backend=backend)  # type: ignore[arg-type]


def test_offsets_are_64_bit() -> None:
    """A row that begins beyond 2^31 elements: rows 2^31 + 64 apart over one storage, most of which is never touched."""
    stride, columns = 2**31 + 64, 50
    storage = torch.empty(stride + columns, dtype=torch.bfloat16)  # 4 GiB of addresses, two pages of memory
    student = storage.as_strided((2, columns), (stride, 1))
    small, teacher = (tensor.bfloat16() for tensor in logits(2, columns))
    student.copy_(small)
    for backend in PATHS:
        options = DistillOptions(**EVERYTHING)
        terms = distill_loss(student, teacher, torch.tensor([1, 2]), options=options, backend=backend)  # type: ignore[arg-type]
        truth = distill_loss(small, teacher, torch.tensor([1, 2]), options=options, backend="reference")
        torch.testing.assert_close(terms.total, truth.total)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [64, 300])
@pytest.mark.parametrize("offset", [0, 3])
def test_segments_of_a_row_are_put_together(divergence: Any, columns: int, offset: int) -> None:
    """A small block makes many segments; in place; unaligned rows; whole segments of -inf."""
    student, teacher = logits(5, columns + offset)
    student, teacher = student[:, offset:], teacher[:, offset:]
    if columns == 300:
        teacher[2, 100:200] = student[2, 100:200] = teacher[3, :130] = -INF
    labels, weights = some_labels(5, columns), some_weights(5)
    options = DistillOptions(divergence=divergence, **EVERYTHING)
    truth, expected_grad = gradient(student, teacher, labels, weights, options=options, backend="reference")
    terms_N2, grad = torch.empty(5, 2, dtype=torch.float64), student.clone()
    distill_rows_triton(
        grad,
        teacher,
        Targets(labels, weights),
        options,
        terms_N2=terms_N2,
        grad_NV=grad,
        block=64,
    )
    if not (divergence == "reverse-kl" and columns == 300):  # infinite where the teacher alone is -inf
        torch.testing.assert_close(3 * grad, expected_grad, rtol=0, atol=1e-6)
        torch.testing.assert_close(terms_N2.sum(0), torch.stack(truth[1:]), rtol=1e-6, atol=1e-9)


def test_two_runs_give_the_same_bits() -> None:
    student, teacher = logits(9, 3000, torch.float32)
    options = DistillOptions(divergence="jsd", **EVERYTHING)
    for backend in PATHS:
        first, second = (gradient(student, teacher, some_labels(9, 3000), options=options, backend=backend) for _ in range(2))
        assert torch.equal(first[1], second[1])
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_the_values_slopes(divergence: Any) -> None:
    """gradcheck of the specification, twice differentiable; central differences of the fast paths, which hand over once."""
    student, teacher = logits(3, 11)
    labels, weights = some_labels(3, 11), some_weights(3)
    options = DistillOptions(divergence=divergence, student_softcap=6.0, **EVERYTHING)

    def total(student: Tensor, backend: Any = "reference") -> Tensor:
        return distill_loss(student, teacher, labels, weights, options=options, backend=backend).total

    assert torch.autograd.gradcheck(total, student.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(total, student.clone().requires_grad_())
    for backend in PATHS:
        _, grad = gradient(student, teacher, labels, weights, options=options, backend=backend)
        for at in ((0, 0), (1, 4), (2, 3), (2, 10)):
            step = torch.zeros_like(student)
            step[at] = 1e-5
            slope = (total(student + step, backend) - total(student - step, backend)) / 2e-5
            assert abs(3 * float(slope) - float(grad[at])) < 1e-5


@settings(max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.floats(0.5, 4.0),
    beta=st.floats(0.1, 0.9),
    cap=st.none() | st.floats(3.0, 30.0),
    labelled=st.booleans(),
    weighed=st.booleans(),
    backend=st.sampled_from(PATHS),
)
def test_any_shape_and_option(
    rows: int,
    columns: int,
    divergence: Any,
    temperature: float,
    beta: float,
    cap: Any,
    labelled: bool,
    weighed: bool,
    backend: str,
) -> None:
    student, teacher = logits(rows, columns, seed=rows * 100 + columns)
    targets = (some_labels(rows, columns) if labelled else None, some_weights(rows) if weighed else None)
    options = DistillOptions(temperature=temperature, divergence=divergence, beta=beta, student_softcap=cap)
    assert_as_specified(student, teacher, *targets, backend=backend, options=options)


def test_no_waiting_on_a_gpu() -> None:
    """Tensors without data take the path of a GPU, and any look at a value is an error."""
    student, teacher = (torch.empty(5, 40, device="meta") for _ in range(2))
    labels, weights = torch.empty(5, dtype=torch.long, device="meta"), torch.empty(5, device="meta")
    terms_N2 = torch.empty(5, 2, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(weights.sum() > 0)
    for divergence in DIVERGENCES:
        options = DistillOptions(divergence=divergence, **EVERYTHING)  # type: ignore[arg-type]
        distill_rows_torch(
            student,
            teacher,
            Targets(labels, weights),
            options,
            terms_N2=terms_N2,
            grad_NV=student,
        )
