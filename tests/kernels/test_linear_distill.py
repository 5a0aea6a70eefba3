"""The losses from hidden states against their specification: whole logits, autograd, float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdistil.kernels import linear_distill
from fastdistil.kernels.distill_options import DistillOptions, DistillTerms, Head, SparseTeacher, Targets
from fastdistil.kernels.linear_distill import (
    NeededGradients,
    OpArguments,
    flops,
    linear_distill_loss,
    rows_per_chunk,
)
from fastdistil.kernels.sparse_distill import top_k

OPTIONS = DistillOptions(temperature=2.0, soft=0.7, hard=0.4)


Found = tuple[DistillTerms, list[Any]]


def teacher_of(kind: str, head: Head, temperature: float) -> Head | SparseTeacher | None:
    """The teacher of a dense, a sparse or a hard loss."""
    if kind == "sparse":
        return top_k(torch.nn.functional.linear(*head).double(), 6, temperature=temperature)
    return head if kind == "dense" else None


class Case:
    """Heads and hidden states of both sides; the first three are the student's and want gradients."""

    def __init__(
        self, rows: int = 21, columns: int = 50, d: int = 8, e: int = 12, dtype: torch.dtype = torch.float64, bias: bool = True
    ) -> None:
        torch.manual_seed(rows)
        self.student = [
            torch.randn(rows, d, dtype=dtype),
            torch.randn(columns, d, dtype=dtype),
            torch.randn(columns, dtype=dtype),
        ]
        self.teacher = [
            torch.randn(rows, e, dtype=dtype),
            torch.randn(columns, e, dtype=dtype),
            torch.randn(columns, dtype=dtype),
        ]
        self.labels = torch.arange(rows) * 7 % columns
        self.labels[1::3] = -100
        self.weights = torch.linspace(0.3, 1.6, rows, dtype=dtype)
        self.weights[::5] = 0
        if not bias:
            self.student.pop()
            self.teacher.pop()

    def clone(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def to(self, dtype: torch.dtype) -> "Case":
        self.student, self.teacher = ([tensor.to(dtype) for tensor in side] for side in (self.student, self.teacher))
        return self

    def run(
        self, kind: str = "dense", grads: tuple[bool, ...] = (True,) * 3, **keywords: Any
    ) -> tuple[DistillTerms, list[Any]]:
        leaves = [self.clone(tensor).requires_grad_(want) for tensor, want in zip(self.student, grads, strict=False)]
        options = keywords.pop("options", OPTIONS)
        head, weights = Head(*self.teacher), None if kind == "hard" else self.weights
        teacher = teacher_of(kind, head, options.temperature)
        terms = linear_distill_loss(Head(*leaves), teacher, self.labels, weights, options=options, **keywords)
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        computed = iter(torch.autograd.grad(3 * terms.total, trained))
        return terms, [next(computed) if leaf.requires_grad else None for leaf in leaves]


def assert_close(terms_and_grads: Found, truth: Found, rtol: float) -> None:
    for name, a, b in zip(DistillTerms._fields, terms_and_grads[0], truth[0], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
    for a, b in zip(terms_and_grads[1], truth[1], strict=True):
        if b is not None:
            assert float((a.double() - b.double()).norm()) <= rtol * float(b.double().norm())


@pytest.mark.parametrize("kind", ["dense", "sparse", "hard"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 8, 21, None])
def test_chunks_make_no_difference(kind: str, bias: bool, chunk_rows: int | None) -> None:
    case = Case(bias=bias)
    truth = case.run(kind, backend="reference")
    assert all(float(grad.abs().max()) > 1e-3 for grad in truth[1])
    assert_close(case.run(kind, chunk_rows=chunk_rows), truth, 1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "hard"])
@pytest.mark.parametrize(
    "changes", [{"columns": 41}, {"temperature": 1.0}, {"student_softcap": 5.0, "student_scale": 0.6}], ids=str
)
def test_options_on_every_path(backend: str, kind: str, changes: dict[str, Any]) -> None:
    case = Case()
    case.labels = case.labels.clamp_max(40)
    options = DistillOptions(**{"temperature": 2.0, "soft": 0.7, "hard": 0.4, **changes})
    if kind == "sparse" and options.columns:
        case.teacher = [case.teacher[0], case.teacher[1][:41], case.teacher[2][:41]]
    truth = case.run(kind, options=options, backend="reference")
    assert_close(case.run(kind, options=options, backend=backend, chunk_rows=8), truth, 1e-12 if backend == "torch" else 1e-6)


@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd"])
def test_divergences(divergence: Any) -> None:
    case, options = Case(), DistillOptions(divergence=divergence, temperature=1.5)
    assert_close(case.run(options=options, chunk_rows=8), case.run(options=options, backend="reference"), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "hard"])
def test_a_hidden_state_of_nan_that_enters_no_term_contributes_exactly_nothing(kind: str, backend: Any) -> None:
    """Gradients of hidden states, weight and bias are those of the other rows alone, and 0 in the row itself."""
    case = Case()
    hidden_ND, weight_VD, bias_V = case.student
    out = 5 if kind != "hard" else 1  # weight 0, and in no row a label; the hard term alone has no weights
    labels = case.labels.clone()
    labels[out] = -100
    others = torch.arange(len(labels)) != out

    def gradients(hidden: Tensor, chosen: Tensor, how: Any) -> tuple[DistillTerms, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight_VD, bias_V)]
        teacher = teacher_of(kind, Head(case.teacher[0][chosen], *case.teacher[1:]), OPTIONS.temperature)
        weights = None if kind == "hard" else case.weights[chosen]
        terms = linear_distill_loss(Head(*leaves), teacher, labels[chosen], weights, options=OPTIONS, backend=how)
        return terms, list(torch.autograd.grad(terms.total, leaves))

    truth, true_gradients = gradients(hidden_ND[others], others, "reference")
    broken = hidden_ND.clone()
    broken[out] = torch.nan
    terms, (grad_hidden, grad_weight, grad_bias) = gradients(broken, torch.ones_like(others), backend)
    torch.testing.assert_close(terms.total, truth.total, rtol=1e-6, atol=0)
    assert torch.equal(grad_hidden[out], torch.zeros_like(grad_hidden[out]))
    for gradient, expected in zip((grad_hidden[others], grad_weight, grad_bias), true_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grads", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)])
def test_only_gradients_that_are_asked_for(grads: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head costs nothing: no product and no buffer."""
    case = Case()
    truth = case.run(backend="reference", grads=grads)
    products = []
    real = linear_distill._StudentSide._add_weight
    monkeypatch.setattr(linear_distill._StudentSide, "_add_weight", lambda *a: (products.append(1), real(*a)))
    terms_and_grads = case.run(grads=grads, chunk_rows=8)
    assert_close(terms_and_grads, truth, 1e-12)
    assert len(products) == (3 if grads[1] else 0)


def naive(case: Case) -> list[Tensor]:
    """A user's few lines, in the tensors' own dtype."""
    leaves = [tensor.clone().requires_grad_() for tensor in case.student]
    student, teacher = torch.nn.functional.linear(*leaves), torch.nn.functional.linear(*case.teacher)
    rows = torch.nn.functional.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
    hard = torch.nn.functional.cross_entropy(student, case.labels, reduction="sum")
    total = 0.7 * 4 * (rows * case.weights.to(rows.dtype)).sum() + 0.4 * hard
    return list(torch.autograd.grad(3 * total, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_naive_way(dtype: torch.dtype) -> None:
    case = Case(rows=64, columns=300, d=32, e=48).to(dtype)
    truth = Case(rows=64, columns=300, d=32, e=48).to(dtype).to(torch.float64).run(backend="reference")
    terms, grads = case.run(chunk_rows=16)
    for ours, theirs, exact in zip(grads, naive(case), truth[1], strict=True):
        assert ours.dtype == dtype
        error, limit = (float((grad.double() - exact).norm()) for grad in (ours, theirs))
        assert error <= 1.5 * limit + 1e-7 * float(exact.norm())
    # Terms are float32 sums; only the logits were rounded.
    assert abs(float(terms.total.detach()) / float(truth[0].total.detach()) - 1) < 0.02


def test_weights_wider_than_the_products_get_their_gradient_in_their_own_dtype() -> None:
    """What autocast does: float32 weights, bfloat16 products, float32 sums over the chunks."""
    case = Case(rows=64, columns=300, d=32, e=48, dtype=torch.float32)
    truth = case.run(backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        terms, grads = case.run(chunk_rows=16)
        eager = case.run(backend="reference")
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    assert terms.total.dtype == torch.float32
    for ours, theirs, exact in zip(grads, eager[1], truth[1], strict=True):
        assert 0 < float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())


def test_the_law_of_chunks() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rows_per_chunk(16384, 30522, 4, gpu) == 4096
    assert rows_per_chunk(5000, 30522, 4, gpu) == 2560  # two equal ones
    assert rows_per_chunk(300, 30522, 4, gpu) == 300
    assert rows_per_chunk(8192, 262144, 8, gpu) <= 4 * 2**30 // (262144 * 8)
    assert rows_per_chunk(2048, 30522, 4, cpu) == 1024
    assert rows_per_chunk(2048, 30522, 8, cpu) <= 128 * 2**20 // (30522 * 8)
    assert rows_per_chunk(10**6, 10**7, 8, cpu) == 64
    assert rows_per_chunk(0, 100, 4, cpu) == 0


def test_logits_never_exist_whole() -> None:
    """The peak of torch's CPU allocations during the op is that of its chunks."""
    case = Case(rows=512, columns=4000, d=16, e=16, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        case.run(chunk_rows=64)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty")
    assert 64 * 4000 * 4 <= largest < 512 * 4000 * 4 // 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_op_is_registered_as_torch_wants_it(backend: str) -> None:
    case = Case(rows=6, dtype=torch.float32)
    student = [tensor.requires_grad_() for tensor in case.student]
    targets, needed = Targets(case.labels, case.weights), NeededGradients(hidden=True, weight=True, bias=True)
    for kind in ("dense", "sparse", "hard"):
        teacher = teacher_of(kind, Head(*case.teacher), OPTIONS.temperature)
        arguments = OpArguments(Head(*student), teacher, targets, needed, backend, 4, OPTIONS)
        torch.library.opcheck(linear_distill._linear_distill, arguments.flat())


@pytest.mark.parametrize("kind", ["dense", "sparse", "hard"])
def test_compiled_without_a_graph_break(kind: str) -> None:
    case = Case(rows=6, dtype=torch.float32)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in case.student)
    teacher = teacher_of(kind, Head(*case.teacher), OPTIONS.temperature)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distill_loss(Head(2 * hidden, weight, bias), teacher, case.labels, options=OPTIONS).total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    grads = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(grads, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_two_runs_give_the_same_bits() -> None:
    case = Case(rows=100, columns=400, dtype=torch.float32)
    first, second = case.run(chunk_rows=32), case.run(chunk_rows=32)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@settings(max_examples=30)
@given(
    rows=st.integers(0, 20),
    columns=st.integers(2, 40),
    d=st.integers(1, 9),
    e=st.integers(1, 9),
    chunk=st.integers(1, 25),
    kind=st.sampled_from(["dense", "hard"]),
)
def test_any_shape(rows: int, columns: int, d: int, e: int, chunk: int, kind: str) -> None:
    case = Case(rows=rows, columns=columns, d=d, e=e)
    assert_close(case.run(kind, chunk_rows=chunk), case.run(kind, backend="reference"), 1e-10)


@pytest.mark.parametrize("kind", ["dense", "hard", "sparse"])
def test_strided_biases(kind: str) -> None:
    case, strided = Case(dtype=torch.float32), Case(dtype=torch.float32)
    for side in (strided.student, strided.teacher):
        side[2] = torch.stack([side[2], torch.full_like(side[2], 1e9)], 1)[:, 0]
    strided.clone = lambda tensor: tensor.detach()  # type: ignore[method-assign]
    assert strided.student[2].stride() == strided.teacher[2].stride() == (2,)
    assert_close(strided.run(kind), case.run(kind), 1e-6)


def test_float16_gradients_of_many_rows_do_not_overflow() -> None:
    torch.manual_seed(0)
    hidden = 4 + torch.randn(1024, 16)
    weight, labels = 0.1 * torch.randn(40, 16), torch.full((1024,), 3)
    grads = []
    for dtype, backend in ((torch.float16, "torch"), (torch.float64, "reference")):
        leaf = weight.to(dtype).requires_grad_()
        options = DistillOptions(soft=0.0, hard=1 / 1024)
        head = Head(hidden.to(dtype), leaf)
        linear_distill_loss(head, None, labels, options=options, backend=backend).total.backward()  # type: ignore[arg-type]
        assert leaf.grad is not None
        grads.append(leaf.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=2e-3)


def test_mistakes_are_told() -> None:
    case = Case()
    weights = torch.ones(len(case.student[0]), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="the weights get no gradient"):
        linear_distill_loss(Head(*case.student), Head(*case.teacher), None, weights, options=DistillOptions())
    with pytest.raises(ValueError, match="columns is 99; the student has 50"):
        linear_distill_loss(Head(*case.student), None, case.labels, options=DistillOptions(columns=99))
    with pytest.raises(ValueError, match="needs a teacher or labels, got neither"):
        linear_distill_loss(Head(*case.student), None, options=DistillOptions())
    case.teacher[1] = case.teacher[1].float()
    with pytest.raises(
        ValueError, match=r"teacher's hidden states, weight and bias must have one dtype, got .*float64.*float32"
    ):
        case.run()
    case = Case()
    case.teacher[1].requires_grad_()
    with pytest.raises(ValueError, match="the teacher and the weights get no gradient"):
        case.run()
    case = Case()
    case.student[1] = case.student[1][:, :5]
    with pytest.raises(ValueError, match=r"student's hidden states .* do not fit"):
        case.run()
    case = Case()
    case.teacher[2] = case.teacher[2][:5]
    with pytest.raises(ValueError, match="teacher's bias must have 50 elements"):
        case.run()
    case = Case()
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        case.run(chunk_rows=0)
    case.teacher[1], case.teacher[2] = case.teacher[1][:44], case.teacher[2][:44]
    with pytest.raises(ValueError, match="say so: columns=44"):
        case.run()


def test_costs() -> None:
    assert flops(10, 100, 4, 6) == 2 * 10 * 100 * (3 * 4 + 6)
    assert flops(10, 100, 4, 6, hidden=False, weight=False) == 2 * 10 * 100 * (4 + 6)
