"""The losses against what a user would write, and against other libraries, each op's sides in one run.

Eager sides are the natural few lines in the inputs' dtype. T = 2; 15% of the rows have a label. torch.compile's sides run on a
GPU, or where FASTDISTIL_BENCH_COMPILE=1: on a CPU compiling takes longer than everything else here. `python
benchmarks/table.py` prints the tables of a JSON file.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistil.kernels import cosine, distill, linear_distill, sparse_distill
from fastdistil.kernels.cosine import HiddenOptions, cosine_loss
from fastdistil.kernels.distill import distill_loss
from fastdistil.kernels.distill_options import DistillOptions, Head
from fastdistil.kernels.linear_distill import linear_distill_loss
from fastdistil.kernels.sparse_distill import sparse_distill_loss, top_k

from .measure import DEVICE, GPU, mark, measured, median_between_s

OPTIONS = DistillOptions(temperature=2.0, soft=5.0, hard=2.0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# name -> (rows, vocabulary, student width, teacher width)
HEADS = {
    "distilbert": (16384 if GPU else 2048, 30522, 768, 768),
    "gpt2": (16384 if GPU else 256, 50257, 768, 768),
    # On a CPU the heads below take too long: their losses from logits are there.
    "llama": (8192 if GPU else 64, 128256, 2048, 4096),
    "qwen": (8192 if GPU else 64, 151936, 896, 3584),
    "gemma": (4096 if GPU else 32, 262144, 2304, 3584),
}
LOGITS = {name: (rows if GPU else min(rows, 512), columns) for name, (rows, columns, _, _) in HEADS.items()}
LINEAR = HEADS if GPU else {name: HEADS[name] for name in ("distilbert", "gpt2")}
ROUNDS = 5


def labels_of(rows: int, columns: int) -> Tensor:
    labels = torch.full((rows,), -100, device=DEVICE)
    labels[::7] = torch.randint(0, columns, (len(labels[::7]),), device=DEVICE)
    return labels


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if not GPU and os.environ.get("FASTDISTIL_BENCH_COMPILE") != "1":
        pytest.skip("torch.compile on a CPU takes longer than all other sides; FASTDISTIL_BENCH_COMPILE=1 measures it")
    return torch.compile(function)


def liger(name: str) -> Any:
    if not GPU:
        pytest.skip("Liger-Kernel's kernels need a GPU")
    return pytest.importorskip(f"liger_kernel.ops.{name}", reason="needs liger-kernel: pip install -e '.[bench]'")


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="sum") * 4
    return 5 * soft + 2 * F.cross_entropy(student, labels, reduction="sum")


def backward(loss: Callable[[], Tensor], leaves: list[Tensor], marks: list[Any] | None = None) -> None:
    """Forward and backward; `marks` gets when backward began and when it ended."""
    total = loss()
    begun = mark()
    total.backward()
    if marks is not None:
        marks.append((begun, mark()))
    for leaf in leaves:  # after, so that memory counts the gradients
        leaf.grad = None


@pytest.mark.parametrize("side", ["fastdistil", "eager", "torch.compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOGITS)
def test_logits(benchmark: Any, shape: str, dtype: str, side: str) -> None:
    rows, columns = LOGITS[shape]
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(rows, columns, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    student.requires_grad_()
    labels = labels_of(rows, columns)
    sides: dict[str, Callable[[], Tensor]] = {
        "fastdistil": lambda: distill_loss(student, teacher, labels, options=OPTIONS).total,
        "eager": lambda: eager_loss(student, teacher, labels),
    }
    loss = partial(compiled(eager_loss), student, teacher, labels) if side == "torch.compile" else sides[side]
    benchmark.group = f"logits {dtype} N={rows} V={columns}"
    moved = distill.bytes_moved(rows, columns, student.element_size())
    measured(benchmark, lambda: backward(loss, [student]), ROUNDS, side=side, dtype=dtype, bytes=moved)


def eager_linear(student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
    logits = F.linear(*student)
    with torch.no_grad():
        teacher_logits = F.linear(*teacher)
    return eager_loss(logits, teacher_logits, labels)


def liger_jsd(student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
    """Its JSD at beta 0 is the forward KL; no T^2, bias or hard term (its labels only say which rows count)."""
    function = liger("fused_linear_jsd").LigerFusedLinearJSDFunction
    total: Tensor = function.apply(student[0], student[1], teacher[0], teacher[1], None, 0.0, -100, 2.0)
    return total


def liger_kl_div(student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
    """It takes the teacher's probabilities, so the teacher's head is not fused; no T^2, bias or hard term either."""
    function = liger("fused_linear_kl_div").LigerFusedLinearKLDivFunction
    with torch.no_grad():
        probabilities = (F.linear(teacher[0], teacher[1]) / 2).softmax(-1)
    total: Tensor = function.apply(student[0], student[1], probabilities, None, "sum", -100, 2.0)
    return total


LIGER = {"liger fused_linear_jsd": liger_jsd, "liger fused_linear_kl_div": liger_kl_div}


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
@pytest.mark.parametrize("side", ["fastdistil", "eager", "torch.compile", *LIGER])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR)
def test_linear(benchmark: Any, shape: str, dtype: str, side: str, what: str) -> None:
    rows, columns, d, e = HEADS[shape]
    torch.manual_seed(0)

    def head(width: int) -> list[Tensor]:
        parts = (torch.randn(rows, width), 0.05 * torch.randn(columns, width), torch.randn(columns))
        return [part.to(DEVICE, DTYPES[dtype]) for part in parts]

    student, teacher, labels = head(d), head(e), labels_of(rows, columns)
    if what == "forward+backward":
        student = [tensor.requires_grad_() for tensor in student]
    sides: dict[str, Callable[[], Tensor]] = {
        "fastdistil": lambda: linear_distill_loss(Head(*student), Head(*teacher), labels, options=OPTIONS).total,
        "eager": lambda: eager_linear(student, teacher, labels),
        **{name: partial(function, student, teacher, labels) for name, function in LIGER.items()},
    }
    if side in LIGER:
        liger(side.removeprefix("liger "))
        student, teacher = student[:2], teacher[:2]
    loss = partial(compiled(eager_linear), student, teacher, labels) if side == "torch.compile" else sides[side]
    marks: list[Any] = []
    call = loss if what == "forward" else lambda: backward(loss, student, marks)
    benchmark.group = f"linear {what} {dtype} N={rows} V={columns} D={d} E={e}"
    work = linear_distill.flops(rows, columns, d, e, hidden=what != "forward", weight=what != "forward")
    measured(benchmark, call, 3, side=side, dtype=dtype, flops=work, dtype_object=DTYPES[dtype])
    if marks:
        benchmark.extra_info["backward_s"] = median_between_s(marks[1:])


@pytest.mark.parametrize("side", ["fastdistil", "torch linear_cross_entropy", "eager"])
def test_hard_term_alone(benchmark: Any, side: str) -> None:
    rows, columns, d, _ = (8192, 128256, 2048, 0) if GPU else (512, 30522, 768, 0)
    torch.manual_seed(0)
    hidden = torch.randn(rows, d, device=DEVICE).bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(columns, d, device=DEVICE)).bfloat16().requires_grad_()
    labels = torch.randint(0, columns, (rows,), device=DEVICE)
    if side.startswith("torch") and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    options = DistillOptions(hard=1 / rows)
    sides: dict[str, Callable[[], Tensor]] = {
        "fastdistil": lambda: linear_distill_loss(Head(hidden, weight), None, labels, options=options).total,
        "torch linear_cross_entropy": lambda: F.linear_cross_entropy(hidden, weight, labels),  # type: ignore[attr-defined]
        "eager": lambda: F.cross_entropy(F.linear(hidden, weight), labels),
    }
    benchmark.group = f"cross-entropy bf16 N={rows} V={columns} D={d}"
    work = linear_distill.flops(rows, columns, d, 0)
    call = partial(backward, sides[side], [hidden, weight])
    measured(benchmark, call, 3, side=side, dtype="bf16", flops=work, dtype_object=torch.bfloat16)


@pytest.mark.parametrize("side", ["fastdistil", "eager", "torch.compile"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine(benchmark: Any, dtype: str, side: str) -> None:
    rows, layers, width = (16384, 12, 768) if GPU else (2048, 6, 768)
    torch.manual_seed(0)
    student, teacher = ([torch.randn(rows, width, device=DEVICE).to(DTYPES[dtype]) for _ in range(layers)] for _ in range(2))
    student = [tensor.requires_grad_() for tensor in student]
    one = torch.ones(rows, device=DEVICE)

    def eager() -> Tensor:
        return torch.stack(
            [F.cosine_embedding_loss(s, t, one, reduction="sum") for s, t in zip(student, teacher, strict=True)]
        ).sum()

    sides: dict[str, Callable[[], Tensor]] = {
        "fastdistil": lambda: cosine_loss(student, teacher, options=HiddenOptions()).total,
        "eager": eager,
    }
    loss = compiled(eager) if side == "torch.compile" else sides[side]
    benchmark.group = f"cosine {dtype} N={rows} D={width} L={layers}"
    moved = cosine.bytes_moved(rows, width, student[0].element_size(), layers=layers)
    measured(benchmark, lambda: backward(loss, student), ROUNDS, side=side, dtype=dtype, bytes=moved)


@pytest.mark.parametrize("side", ["fastdistil", "eager"])
def test_sparse_teacher(benchmark: Any, side: str) -> None:
    rows, columns, k = (8192, 128256, 32) if GPU else (512, 30522, 32)
    torch.manual_seed(0)
    student = (2 * torch.randn(rows, columns, device=DEVICE)).bfloat16().requires_grad_()
    teacher = top_k(2 * torch.randn(rows, columns, device=DEVICE).bfloat16(), k, temperature=2.0)
    assert teacher.tail_N is not None
    p_NK, tail_N = teacher.log_probabilities_NK.exp(), teacher.tail_N

    def eager() -> Tensor:
        log_q_NK = (student.float() / 2).log_softmax(-1).gather(1, teacher.indices_NK)
        rest_N = (1 - log_q_NK.exp().sum(-1)).clamp_min(1e-9)
        listed_N = (p_NK * (teacher.log_probabilities_NK - log_q_NK)).sum(-1)
        return 4 * (listed_N + tail_N * (tail_N.log() - rest_N.log())).sum()

    options = DistillOptions(temperature=2.0)
    sides: dict[str, Callable[[], Tensor]] = {
        "fastdistil": lambda: sparse_distill_loss(student, teacher, options=options).total,
        "eager": eager,
    }
    benchmark.group = f"sparse bf16 N={rows} V={columns} K={k}"
    moved = sparse_distill.bytes_moved(rows, columns, k, 2)
    measured(benchmark, lambda: backward(sides[side], [student]), ROUNDS, side=side, dtype="bf16", bytes=moved)
