"""The hidden-state losses against torch's cosine_embedding_loss and float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdistil.kernels import cosine as module
from fastdistil.kernels.cosine import HiddenOptions, HiddenTerms, bytes_moved, cosine_loss

PATHS = ["torch", "triton"]
BOTH = HiddenOptions(cosine=0.7, mse=0.3)


def states(rows: int, *widths: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(seed)
    return tuple([torch.randn(rows, width, dtype=dtype) for width in widths] for _ in range(2))  # type: ignore[return-value]


def run(student: list[Tensor], *arguments: Any, **keywords: Any) -> tuple[HiddenTerms, tuple[Tensor, ...]]:
    leaves = [state.detach().clone().requires_grad_() for state in student]
    terms = cosine_loss(leaves, *arguments, **keywords)
    return terms, torch.autograd.grad(3 * terms.total, leaves)


def torch_terms(student: list[Tensor], teacher: list[Tensor], rows: Any, weights: Any, options: HiddenOptions) -> Any:
    """The same from torch's own losses."""
    leaves = [state.detach().double().requires_grad_() for state in student]
    cosine = mse = torch.zeros((), dtype=torch.float64)
    for s, t in zip(leaves, teacher, strict=True):
        at = slice(None) if rows is None else rows
        w = torch.ones(len(s), dtype=torch.float64)[at] if weights is None else weights.double()[at]
        one = torch.ones(len(w), dtype=torch.float64)
        cosine = cosine + (w * F.cosine_embedding_loss(s[at], t.double()[at], one, reduction="none")).sum()
        mse = mse + (w * F.mse_loss(s[at], t.double()[at], reduction="none").mean(-1)).sum()
    total = options.cosine * cosine + options.mse * mse
    return HiddenTerms(total, cosine, mse), torch.autograd.grad(3 * total, leaves)


def assert_as_torch(student: list[Tensor], teacher: list[Tensor], rows: Any, weights: Any, options: Any, backend: str) -> None:
    truth, expected_grads = torch_terms(student, teacher, rows, weights, options)
    before = [tensor.clone() for tensor in (*student, *teacher)]
    terms, grads = run(student, teacher, rows, weights, options=options, backend=backend)
    tolerance = 1e-6 if student[0].dtype == torch.float64 else 1e-5
    for a, b in zip(terms, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(b.abs().max()) + 1e-9)
    for tensor, copy in zip((*student, *teacher), before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("width", [1, 7, 255, 768, 1000])
@pytest.mark.parametrize("options", [HiddenOptions(), HiddenOptions(cosine=0.0, mse=1.0), BOTH], ids=str)
def test_one_layer(backend: str, width: int, options: HiddenOptions) -> None:
    assert_as_torch(*states(9, width), None, None, options, backend)


@pytest.mark.parametrize("backend", ["reference", *PATHS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [None, torch.tensor([7, 0, 3, 4])], ids=["all", "some"])
@pytest.mark.parametrize("weighed", [False, True])
def test_several_layers(backend: str, dtype: torch.dtype, rows: Any, weighed: bool) -> None:
    student, teacher = states(9, 12, 300, 64, dtype=dtype)
    weights = torch.linspace(0.2, 1.9, 9, dtype=dtype) if weighed else None
    if weights is not None:
        weights[3] = 0
    assert_as_torch(student, teacher, rows, weights, BOTH, backend)
    _, grads = run(student, teacher, rows, weights, options=BOTH, backend=backend)
    if rows is not None:
        assert all(float(grad[[1, 2, 5, 6, 8]].abs().max()) == 0 for grad in grads)


@pytest.mark.parametrize("backend", PATHS)
def test_many_rows_in_blocks(backend: str) -> None:
    assert_as_torch(*states(1000, 300, dtype=torch.float32), None, None, BOTH, backend)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_naive_way(backend: str, dtype: torch.dtype) -> None:
    student, teacher = states(40, 256, dtype=dtype)
    truth, expected_grads = torch_terms(student, teacher, None, None, HiddenOptions())
    terms, grads = run(student, teacher, options=HiddenOptions(), backend=backend)
    leaf = student[0].clone().requires_grad_()
    loss = F.cosine_embedding_loss(leaf, teacher[0], torch.ones(40), reduction="sum")
    (naive,) = torch.autograd.grad(3 * loss, leaf)
    error, limit = (float((grad.double() - expected_grads[0]).norm()) for grad in (grads[0], naive))
    assert error <= 1.5 * limit
    assert abs(float(terms.total.detach()) / float(truth.total.detach()) - 1) < 1e-5


@pytest.mark.parametrize("backend", PATHS)
def test_float16_gradients_survive_the_mean_over_many_tokens(backend: str) -> None:
    student, teacher = states(8, 256, dtype=torch.float16)
    options = HiddenOptions(cosine=1 / 2**22)
    leaf = student[0].clone().requires_grad_()
    (cosine_loss(leaf, teacher[0], options=options, backend=backend).total * 2**20).backward()  # type: ignore[arg-type]
    _, expected_grads = torch_terms(student, teacher, None, None, HiddenOptions(cosine=0.25 / 3))
    assert leaf.grad is not None
    assert float((leaf.grad.double() - expected_grads[0]).norm() / expected_grads[0].norm()) < 2e-3


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_zero_huge_and_absent_rows(backend: Any) -> None:
    student, teacher = states(5, 30)
    student[0][0], teacher[0][1] = 0, 0
    student[0][2] *= 1e9
    student[0][3] = teacher[0][3]
    truth, expected_grads = torch_terms(student, teacher, None, None, HiddenOptions())
    terms, grads = run(student, teacher, options=HiddenOptions(), backend=backend)
    torch.testing.assert_close(terms.total, truth.total, rtol=1e-6, atol=0)
    for row in range(5):  # their sizes differ by 1e15
        torch.testing.assert_close(grads[0][row], expected_grads[0][row], rtol=1e-5, atol=1e-9)
    student[0][4] = math.nan
    weights = torch.tensor([1.0, 1, 1, 1, 0])
    terms, grads = run(student, teacher, None, weights, options=BOTH, backend=backend)
    assert bool(torch.stack(terms).isfinite().all())
    assert bool((grads[0][4] == 0).all())
    terms, grads = run(student, teacher, torch.zeros(0, dtype=torch.long), options=BOTH, backend=backend)
    assert [float(term) for term in terms] == [0, 0, 0]
    assert bool((grads[0] == 0).all())


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_norms_whose_product_overflows(backend: Any) -> None:
    """float32: |s| |t| is 1e22, whose square there is infinite; cosine and direction of the gradient are those of float64."""
    student, teacher = states(4, 30, dtype=torch.float32)
    student, teacher = [1e10 * student[0]], [1e10 * teacher[0]]
    truth, expected_grads = torch_terms(student, teacher, None, None, HiddenOptions())
    terms, grads = run(student, teacher, options=HiddenOptions(), backend=backend)
    torch.testing.assert_close(terms.total.double(), truth.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[0].double(), expected_grads[0], rtol=0, atol=1e-5 * float(expected_grads[0].abs().max()))


@pytest.mark.parametrize("backend", PATHS)
def test_rows_may_lie_apart(backend: str) -> None:
    student, teacher = states(6, 100)
    assert_as_torch([student[0][:, 3:40]], [teacher[0][:, 1:38]], None, None, BOTH, backend)


@pytest.mark.parametrize("backend", ["reference", *PATHS])
def test_projections(backend: Any) -> None:
    student, _ = states(9, 12, 300)
    teacher = [torch.randn(9, 20, dtype=torch.float64), torch.randn(9, 300, dtype=torch.float64)]
    projection = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    leaf = student[0].clone().requires_grad_()
    inputs = ([leaf, student[1]], teacher)
    total = cosine_loss(*inputs, options=BOTH, projections=[projection, None], backend=backend).total
    grads = torch.autograd.grad(total, (leaf, projection))
    mapped = leaf @ projection.T
    (mapped_grad,) = torch_terms([mapped], teacher[:1], None, None, BOTH)[1]
    truth = torch.autograd.grad(mapped, (leaf, projection), mapped_grad / 3)
    for a, b in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradcheck_of_the_specification() -> None:
    student, teacher = states(4, 6)

    def total(s: Tensor) -> Tensor:
        return cosine_loss(s, teacher[0], options=BOTH, backend="reference").total

    assert torch.autograd.gradcheck(total, student[0].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(total, student[0].clone().requires_grad_())


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])], ids=["all", "some"])
def test_the_op_is_registered_as_torch_wants_it(backend: str, rows: Any) -> None:
    student, teacher = states(4, 6, 9, dtype=torch.float32)
    leaves = [state.requires_grad_() for state in student]
    torch.library.opcheck(module._cosine, (leaves, teacher, rows, torch.ones(4), 0.7, 0.3, True, backend))


def test_compiled_without_a_graph_break() -> None:
    student, teacher = states(4, 6, dtype=torch.float32)
    leaf = student[0].requires_grad_()

    def loss(leaf: Tensor) -> Tensor:
        return cosine_loss(2 * leaf, teacher[0], options=BOTH).total * 5

    (eager,) = torch.autograd.grad(loss(leaf), leaf)
    (compiled_grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(compiled_grad, eager)


@pytest.mark.parametrize("backend", PATHS)
def test_differentiable_once_and_the_same_bits_twice(backend: Any) -> None:
    student, teacher = states(50, 768, dtype=torch.float32)
    first, second = (run(student, teacher, options=BOTH, backend=backend) for _ in range(2))
    assert torch.equal(first[1][0], second[1][0])
    assert torch.equal(first[0].total, second[0].total)
    leaf = student[0].requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(cosine_loss(leaf, teacher[0], options=BOTH, backend=backend).total, leaf, create_graph=True)
    total = cosine_loss(leaf, teacher[0], options=BOTH, backend=backend).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over by an earlier backward"):
        total.backward()


@settings(max_examples=30)
@given(
    rows=st.integers(1, 20),
    widths=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    cosine=st.floats(0.1, 2.0),
    mse=st.floats(0.1, 2.0),
    backend=st.sampled_from(PATHS),
)
def test_any_shape(rows: int, widths: list[int], cosine: float, mse: float, backend: str) -> None:
    assert_as_torch(*states(rows, *widths, seed=rows), None, None, HiddenOptions(cosine=cosine, mse=mse), backend)


def test_mistakes_are_told() -> None:
    student, teacher = states(4, 6, 9)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((student, teacher[:1]), {}, "2 layers of states and the teacher 1"),
        ((student, teacher[::-1]), {}, "for different widths give projections"),
        ((student, [teacher[0], teacher[1].float()]), {}, "must be torch.float64"),
        ((student, teacher, torch.zeros(2)), {}, "rows must be int64"),
        ((student, teacher, None, torch.ones(3)), {}, r"weights must be float \[4\]"),
        ((student, teacher), {"projections": [None]}, "1 projections for 2 layers"),
        ((student, [state.clone().requires_grad_() for state in teacher]), {}, "only the student's states get a gradient"),
        (([torch.ones(4, 6).t().contiguous().t()], [torch.ones(4, 6)]), {}, "adjacent columns are needed"),
    ]
    for arguments, keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            cosine_loss(*arguments, options=BOTH, **keywords)
    with pytest.raises(ValueError, match=r"projection must be \[5, 4\].* got \[4, 5\]"):
        cosine_loss(torch.ones(2, 4), torch.ones(2, 5), projections=[torch.ones(4, 5)], options=HiddenOptions())
    with pytest.raises(ValueError, match="mse must be finite"):
        HiddenOptions(mse=math.inf)


def test_costs() -> None:
    assert bytes_moved(10, 768, 2, layers=12) == 3 * 12 * 10 * 768 * 2
    assert bytes_moved(10, 768, 2, gradient=False) == 2 * 10 * 768 * 2
