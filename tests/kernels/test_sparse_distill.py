"""The sparse teacher's loss against the dense definition, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.kernels import distill
from fastdistil.kernels.distill import distill_loss, rows_function
from fastdistil.kernels.distill_options import DistillOptions, DistillTerms, SparseTeacher, Targets, pack
from fastdistil.kernels.sparse_distill import bytes_moved, sparse_distill_loss, top_k

PATHS = ["torch", "triton"]
EVERYTHING: dict[str, Any] = {"temperature": 2.0, "soft": 0.7, "hard": 0.4}


def logits(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows + columns)
    return 3 * torch.randn(rows, columns, dtype=dtype), 3 * torch.randn(rows, columns, dtype=dtype)


def some_labels(rows: int, columns: int) -> Tensor:
    labels = torch.arange(rows) * 7 % columns
    labels[1::3] = -100
    return labels


def gradient(student: Tensor, *arguments: Any, loss: Any = sparse_distill_loss, **keywords: Any) -> tuple[DistillTerms, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    terms = loss(leaf, *arguments, **keywords)
    (grad,) = torch.autograd.grad(3.0 * terms.total, leaf)
    return terms, grad


def by_hand(student: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """Both distributions with everything outside of the teacher's k likeliest merged; the KL of what results."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    listed = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k).indices, True)
    rows = torch.where(listed, p * (p.log() - q.log()), 0).sum(-1)
    p_r, q_r = ((x * ~listed).sum(-1) for x in (p, q))
    return temperature**2 * (rows + torch.where(p_r > 0, p_r * (p_r.log() - q_r.log()), 0))


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_is_the_divergence_of_the_merged_distributions(backend: Any, k: int, temperature: float) -> None:
    student, teacher = logits(6, 50)
    truth = student.clone().requires_grad_()
    rows = by_hand(truth, teacher, k, temperature)
    (expected_grad,) = torch.autograd.grad(3 * rows.sum(), truth)
    options = DistillOptions(temperature=temperature)
    terms, grad = gradient(student, top_k(teacher, k, temperature=temperature), options=options, backend=backend)
    torch.testing.assert_close(terms.soft, rows.sum().detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-6)
    dense = distill_loss(student, teacher, options=options, backend="reference").soft
    assert 0 < float(terms.soft) < float(dense)


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("offset", [1000.0, -3000.0])
def test_a_common_offset_of_the_logits_takes_no_digits(backend: Any, offset: float) -> None:
    teacher, noise = (tensor / 3 for tensor in logits(16, 1000, torch.float32))
    student = teacher + 0.3 * noise + offset
    listed, options = top_k(2 * teacher, 32, temperature=2.0), DistillOptions(temperature=2.0)
    exact = SparseTeacher(listed.indices_NK, *(tensor.double() for tensor in listed[1:] if tensor is not None))
    truth = sparse_distill_loss(student.double(), exact, options=options, backend="reference").soft
    terms, _ = gradient(student, listed, options=options, backend=backend)
    torch.testing.assert_close(terms.soft.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_all_tokens_listed_is_the_dense_loss(backend: Any) -> None:
    student, teacher = logits(6, 50)
    labels, weights = some_labels(6, 50), torch.linspace(0, 1.5, 6, dtype=torch.float64)
    options = DistillOptions(**EVERYTHING, student_softcap=8.0, student_scale=0.7)
    dense = gradient(student, teacher, labels, weights, loss=distill_loss, options=options, backend="reference")
    sparse = gradient(student, top_k(teacher, 50, temperature=2.0), labels, weights, options=options, backend=backend)
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sparse[1], dense[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (4, 255, 30), (3, 3000, 40), (2, 30522, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tail", [True, False])
def test_fast_paths_are_as_specified(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, tail: bool) -> None:
    rows, columns, k = shape
    student, teacher_NV = logits(rows, columns)
    teacher = top_k(teacher_NV, k, temperature=2.0, min_probability=None if tail else 0.02)
    assert (teacher.tail_N is None) != tail
    labels, weights = some_labels(rows, columns), torch.linspace(0.4, 1.5, rows, dtype=torch.float64)
    weights[2:3] = 0
    options = DistillOptions(**EVERYTHING)
    truth, expected_grad = gradient(student.to(dtype).double(), teacher, labels, weights, options=options, backend="reference")
    narrow = SparseTeacher(teacher[0].int(), *(None if tensor is None else tensor.to(dtype) for tensor in teacher[1:]))  # type: ignore[arg-type]
    leaf = student.to(dtype)
    terms, grad = gradient(leaf, narrow, labels, weights.to(dtype), options=options, backend=backend)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    for a, b in zip(terms, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=0, atol=tolerance * max(1.0, float(expected_grad.abs().max()))
    )


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    """The only rounding is that of the gradient to the logits' dtype."""
    student, teacher_NV = logits(6, 500)
    student, teacher = student.to(dtype), top_k(teacher_NV, 20, temperature=2.0)
    options = DistillOptions(temperature=2.0)
    truth, expected_grad = gradient(student.double(), teacher, options=options, backend="reference")
    terms, grad = gradient(student, teacher, options=options, backend=backend)
    rounding = (expected_grad.to(dtype).double() - expected_grad).norm()
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    factor = 2.5 if backend == "triton" and dtype == torch.bfloat16 else 1.5
    assert float((grad.double() - expected_grad).norm()) <= factor * float(rounding) + 1e-6
    assert abs(float(terms.soft) / float(truth.soft) - 1) < 1e-5


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_columns_and_unused_slots(backend: Any) -> None:
    student, teacher_NV = logits(4, 40)
    options = DistillOptions(**EVERYTHING, columns=30)
    teacher = top_k(teacher_NV, 5, temperature=2.0, columns=30)
    truth = gradient(student[:, :30], teacher, options=DistillOptions(**EVERYTHING), backend="reference")
    terms_and_grad = gradient(student, teacher, options=options, backend=backend)
    torch.testing.assert_close(terms_and_grad[0].total, truth[0].total, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms_and_grad[1][:, :30], truth[1], rtol=0, atol=1e-6)
    assert bool((terms_and_grad[1][:, 30:] == 0).all())
    # Slots of -inf change nothing, even where they name a listed token.
    more = SparseTeacher(
        torch.cat([teacher.indices_NK, teacher.indices_NK[:, :2]], 1),
        torch.cat([teacher.log_probabilities_NK, torch.full((4, 2), -math.inf)], 1),
        teacher.tail_N,
    )
    again = gradient(student, more, options=options, backend=backend)
    torch.testing.assert_close(again[1], terms_and_grad[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_rows_that_are_out_contribute_exactly_nothing(backend: Any, cap: float | None) -> None:
    """Whatever they hold, beside a row that counts by its weight and one that counts by its label."""
    student, teacher_NV = logits(4, 40)
    teacher = top_k(teacher_NV, 6, temperature=2.0)
    labels, weights = torch.tensor([-100, -100, 7, -100]), torch.tensor([1.5, 0, 0, 0])
    options = DistillOptions(student_softcap=cap, **EVERYTHING)
    alone = gradient(student, teacher, labels, weights, options=options, backend="reference")
    assert float(alone[1][[0, 2]].abs().max()) > 0
    student[1], student[3] = math.nan, -math.inf
    teacher.log_probabilities_NK[1] = math.nan
    terms_and_grad = gradient(student, teacher, labels, weights, options=options, backend=backend)
    torch.testing.assert_close(terms_and_grad[0].total, alone[0].total, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms_and_grad[1], alone[1], rtol=0, atol=1e-6)
    assert bool((terms_and_grad[1][[1, 3]] == 0).all())


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_a_tail_that_the_student_lacks_is_infinitely_far(backend: Any) -> None:
    student, teacher_NV = logits(3, 20)
    teacher = top_k(teacher_NV, 4, temperature=1.0)
    listed = torch.zeros(20, dtype=torch.bool).scatter(0, teacher.indices_NK[1], True)
    student[1, ~listed] = -math.inf
    terms, grad = gradient(student, teacher, options=DistillOptions(), backend=backend)
    assert float(terms.soft) == math.inf
    assert bool(grad.isfinite().all())
    assert bool((grad[1, ~listed] == 0).all())


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_limits(backend: Any) -> None:
    student, teacher_NV = logits(3, 20)
    teacher = top_k(teacher_NV, 4, temperature=1.0)
    # A column that the student lacks and the teacher lists: infinite, with a finite gradient.
    student[0, teacher.indices_NK[0, 0]] = -math.inf
    terms, grad = gradient(student, teacher, options=DistillOptions(), backend=backend)
    assert float(terms.soft) == math.inf
    assert bool(grad.isfinite().all())
    # Rows of no weight contribute nothing, whatever they hold.
    student[1] = math.nan
    weights = torch.tensor([0.0, 0, 1])
    terms, grad = gradient(student, teacher, None, weights, options=DistillOptions(), backend=backend)
    alone = gradient(student[2:], SparseTeacher(*(part[2:] for part in teacher)), options=DistillOptions(), backend="reference")  # type: ignore[misc, index]
    torch.testing.assert_close(terms.total, alone[0].total, rtol=1e-6, atol=0)
    assert bool((grad[:2] == 0).all())


def test_a_token_outside_of_the_vocabulary_does_no_harm_on_a_gpu() -> None:
    """There it cannot be refused without waiting: the row's term is nan, and nothing outside of the row is written."""
    student, teacher_NV = logits(3, 20)
    teacher = top_k(teacher_NV, 4, temperature=1.0)
    for wrong in (25, -3):
        teacher.indices_NK[1, 2] = wrong
        terms = sparse_distill_loss(student, teacher, options=DistillOptions(), backend="triton")
        assert math.isnan(float(terms.soft))
        storage = torch.full((5, 20), 9.0, dtype=torch.float64)
        terms_N2 = torch.empty(3, 2, dtype=torch.float64)
        rows = rows_function("triton", teacher)
        rows(student, teacher, Targets(), DistillOptions(), terms_N2=terms_N2, grad_NV=storage[1:4])
        assert bool((storage[[0, 4]] == 9.0).all())
        assert bool(terms_N2[[0, 2]].isfinite().all())


def test_top_k_is_the_softmax() -> None:
    _, teacher_NV = logits(5, 60)
    teacher = top_k(teacher_NV, 7, temperature=1.5)
    p = (teacher_NV / 1.5).softmax(-1)
    values, indices = p.topk(7)
    assert torch.equal(teacher.indices_NK, indices)
    torch.testing.assert_close(teacher.log_probabilities_NK.exp(), values)
    assert teacher.tail_N is not None
    torch.testing.assert_close(teacher.tail_N, 1 - values.sum(-1))
    cut = top_k(teacher_NV, 7, temperature=1.5, min_probability=0.05)
    assert cut.tail_N is None
    finite = cut.log_probabilities_NK.isfinite()
    expected = values >= 0.05
    expected[:, 0] = True
    assert torch.equal(finite, expected)
    assert 0 < int(finite.sum()) < finite.numel()


def test_gradcheck_of_the_specification() -> None:
    student, teacher_NV = logits(3, 11)
    teacher = top_k(teacher_NV, 4, temperature=2.0)

    def total(student: Tensor) -> Tensor:
        return sparse_distill_loss(
            student, teacher, some_labels(3, 11), options=DistillOptions(**EVERYTHING), backend="reference"
        ).total

    assert torch.autograd.gradcheck(total, student.clone().requires_grad_())


@pytest.mark.parametrize("backend", PATHS)
def test_the_op_is_registered_as_torch_wants_it(backend: str) -> None:
    student, teacher_NV = logits(4, 30, torch.float32)
    teacher = top_k(teacher_NV, 5, temperature=2.0)
    arguments = (some_labels(4, 30), None, True, backend, *pack(DistillOptions(**EVERYTHING)))
    torch.library.opcheck(distill._distill, (student.requires_grad_(), None, *teacher, *arguments))


@pytest.mark.parametrize("backend", PATHS)
def test_differentiable_once_and_the_same_bits_twice(backend: Any) -> None:
    student, teacher_NV = logits(9, 3000, torch.float32)
    teacher = top_k(teacher_NV, 16, temperature=1.0)
    first, second = (gradient(student, teacher, options=DistillOptions(), backend=backend) for _ in range(2))
    assert torch.equal(first[1], second[1])
    total = sparse_distill_loss(student.requires_grad_(), teacher, options=DistillOptions(), backend=backend).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over by an earlier backward"):
        total.backward()


def test_mistakes_are_told() -> None:
    student, teacher_NV = logits(4, 30)
    teacher = top_k(teacher_NV, 5, temperature=1.0)
    cases: list[tuple[SparseTeacher, dict[str, Any], str]] = [
        (teacher, {"divergence": "jsd"}, "forward KL only"),
        (teacher, {"teacher_scale": 2.0}, "give both to top_k"),
        (teacher._replace(indices_NK=teacher.indices_NK.double()), {}, "indices must be int64 or int32"),
        (teacher._replace(indices_NK=teacher.indices_NK + 20), {}, r"tokens must lie in 0 \.\.\. 29"),
        (teacher._replace(tail_N=torch.ones(3)), {}, r"the tail must be \[4\]"),
        (teacher._replace(log_probabilities_NK=torch.zeros(4, 4)), {}, r"must both be \[4, K\]"),
    ]
    for wrong, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            sparse_distill_loss(student, wrong, options=DistillOptions(**changes))
    for k, keywords, message in ((0, {}, r"k must lie in 1 \.\.\. 30"), (3, {"min_probability": 1.0}, "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            top_k(teacher_NV, k, temperature=1.0, **keywords)  # type: ignore[arg-type]


def test_costs() -> None:
    assert bytes_moved(10, 100, 5, 2) == 2 * 10 * 100 * 2 + 10 * 64
