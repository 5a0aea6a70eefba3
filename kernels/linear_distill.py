"""Distillation losses from hidden states: both vocabulary heads and the losses of `distill.py`, logits never whole.

    student logits = student_hidden_ND @ student_weight_VD.T + student_bias_V          (the teacher likewise, width E)

Rows are taken in chunks. Of each chunk both sides' logits are made, the loss writes its gradient over the student's, and two
products turn that into the gradients of the hidden states and of the head, before the next chunk uses the same buffers:

    2 N V (3 D + E) floating-point operations (products for gradients nobody wants are left out), the least there is unless
    logits are computed twice; 7 elements moved per logit.

How many rows a chunk has: every chunk reads both heads (V (D + E) elements) and reads and writes the head's gradient (2 V D in
float32), against products that grow with its rows. On an H200 that overhead is about 255/rows of the products' time: 4096
rows cost 6%, 32 rows eight times the products. So a chunk has 4096 rows (GPU) or 1024 (CPU), or fewer where two buffers of
logits would not fit the budget below.

Autocast: the student's hidden states decide the dtype of its products (under autocast: autocast's), the teacher keeps its own.
The head's gradient is summed over chunks in float32.

Legend: N rows, C rows of a chunk, D student width, E teacher width, V vocabulary, K tokens of a sparse teacher.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastdistil.kernels.autograd import register_handover
from fastdistil.kernels.backend import Backend, chosen_backend
from fastdistil.kernels.cpu import buffer, product
from fastdistil.kernels.distill import check_rows, distill_loss_reference, rows_function, sum_terms
from fastdistil.kernels.distill_options import (
    OPTIONS_SCHEMA,
    DistillOptions,
    DistillTerms,
    SparseTeacher,
    low_precision_unit,
    pack,
    unpack,
)
from fastdistil.kernels.distill_torch import BLOCK
from fastdistil.kernels.sparse_distill import sparse_distill_reference, sparse_rows_function

# Bytes of both sides' logits of one chunk.
_BUDGET = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}
_ROWS = {"cpu": 1024, "cuda": 4096}
# Rows of the head whose gradient is made at a time on a CPU in low precision: they stay in the cache until they are summed.
_PIECE = 1024


def rows_per_chunk(rows: int, columns: int, itemsizes: int, device: torch.device) -> int:
    """The law above. `itemsizes`: bytes of a student's and a teacher's logit together.

    Chunks of one loss are equally long, up to a multiple of 64 rows: a short last one would waste its share of the heads.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    largest = max(64, min(_ROWS[kind], _BUDGET[kind] // (columns * itemsizes)))
    chunks = -(-rows // largest)
    return rows if chunks <= 1 else min(largest, 64 * -(-rows // (chunks * 64)))


class _Teacher:
    """The teacher's side of a chunk: logits from its head into one buffer, or a slice of what was cached."""

    def __init__(self, hidden_NE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, width: int, largest: int) -> None:
        self._hidden_NE, self._weight_VE = hidden_NE, weight_VE[:width]
        self._bias_V = None if bias_V is None else bias_V[:width]
        self._logits_CV = buffer((largest, width), hidden_NE.dtype, hidden_NE.device)

    def logits(self, first: int, end: int) -> Tensor:
        return product(self._hidden_NE[first:end], self._weight_VE.t(), self._logits_CV[: end - first], bias_N=self._bias_V)


class _Head:
    """The student's side: logits of a chunk, and the gradients that were asked for."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, width: int, largest: int, need: tuple[bool, ...]
    ) -> None:
        rows, device = hidden_ND.shape[0], hidden_ND.device
        # float16 gradients are scaled before they are rounded: in backward.
        self._half = hidden_ND.dtype == torch.float16
        if self._half and device.type == "cpu":  # whose half-precision products would give half precision, and overflow
            hidden_ND = hidden_ND.float()
        dtype = hidden_ND.dtype
        wide = torch.promote_types(dtype, torch.float32)
        stored = wide if self._half else dtype
        self.hidden_ND = hidden_ND
        self.weight_VD = weight_VD[:width]
        if weight_VD.dtype != dtype:
            self.weight_VD = buffer((width, weight_VD.shape[1]), dtype, device).copy_(self.weight_VD)
        self.bias_V = None if bias_V is None else bias_V[:width].to(dtype)
        self.logits_CV = buffer((largest, width), dtype, device)
        self.grad_hidden_ND = buffer(hidden_ND.shape if need[0] else (0,), stored, device)
        # Of one or two chunks only the first is rounded before the sum is: no wider buffer is needed.
        narrow = device.type == "cpu" and dtype == weight_VD.dtype == stored and rows <= 2 * largest
        self.grad_weight_VD = buffer(weight_VD.shape if need[1] else (0,), dtype if narrow else wide, device)
        self.grad_bias_V = buffer(weight_VD.shape[:1] if need[2] else (0,), wide, device)
        self._need, self._width, self._begun = need, width, False

    def logits(self, first: int, end: int) -> Tensor:
        return product(self.hidden_ND[first:end], self.weight_VD.t(), self.logits_CV[: end - first], bias_N=self.bias_V)

    def add(self, first: int, end: int, grad_CV: Tensor) -> None:
        """The gradient of a chunk's logits into those of the hidden states, the weight and the bias."""
        need_hidden, need_weight, need_bias = self._need
        if need_hidden:
            out_CD = self.grad_hidden_ND[first:end]
            if out_CD.dtype == grad_CV.dtype:
                product(grad_CV, self.weight_VD, out_CD)
            else:
                torch.ops.aten.mm.dtype_out(grad_CV, self.weight_VD, out_CD.dtype, out=out_CD)
        if need_weight:
            self._add_weight(grad_CV.t(), self.hidden_ND[first:end])
        if need_bias:
            part_V = grad_CV.sum(0, dtype=self.grad_bias_V.dtype if grad_CV.is_cuda else None)
            self.grad_bias_V[: self._width] = self.grad_bias_V[: self._width] + part_V if self._begun else part_V
        self._begun = True

    def _add_weight(self, grad_VC: Tensor, hidden_CD: Tensor) -> None:
        """Summed over the chunks in the dtype of grad_weight_VD."""
        out_VD = self.grad_weight_VD[: self._width]
        if grad_VC.dtype == out_VD.dtype:
            product(grad_VC, hidden_CD, out_VD, keep=self._begun)
        elif grad_VC.is_cuda:
            torch.ops.aten.addmm.dtype_out(out_VD, grad_VC, hidden_CD, out_VD.dtype, beta=int(self._begun), out=out_VD)
        else:
            # The processor's half-precision products give half precision: each chunk's is rounded once, their sum is not.
            wide = torch.promote_types(grad_VC.dtype, torch.float32)
            part_PD = grad_VC.new_empty(_PIECE, hidden_CD.shape[1])
            for first in range(0, len(out_VD), _PIECE):
                piece_PD = out_VD[first : first + _PIECE]
                part_PD = torch.mm(grad_VC[first : first + _PIECE], hidden_CD, out=part_PD[: len(piece_PD)])
                piece_PD.copy_(piece_PD.to(wide).add_(part_PD.to(wide)) if self._begun else part_PD)

    def gradients(self, weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if not self._begun:  # no rows
            self.grad_weight_VD.zero_()
            self.grad_bias_V.zero_()
        self.grad_weight_VD[self._width :].zero_()
        self.grad_bias_V[self._width :].zero_()
        weight_VD = self.grad_weight_VD if self._half else self.grad_weight_VD.to(weight_dtype)
        return self.grad_hidden_ND, weight_VD, self.grad_bias_V if self._half else self.grad_bias_V.to(bias_dtype)


@torch.library.custom_op(
    "fastdistil::linear_distill",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? indices, Tensor? log_probabilities, Tensor? tail, Tensor? labels, Tensor? weights, "
    "bool need_hidden, bool need_weight, bool need_bias, str backend, int chunk_rows, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_distill(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    teacher_hidden_NE: Tensor | None,
    teacher_weight_VE: Tensor | None,
    teacher_bias_V: Tensor | None,
    indices_NK: Tensor | None,
    log_probabilities_NK: Tensor | None,
    tail_N: Tensor | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    chunk_rows: int,
    *packed: Any,
) -> tuple[Tensor, ...]:
    options = unpack(packed)
    order_N = _labelled_first(labels_N, options.ignore_index) if backend == "torch" and options.hard else None
    if order_N is not None:
        hidden_ND = hidden_ND.index_select(0, order_N)
        others = (teacher_hidden_NE, indices_NK, log_probabilities_NK, tail_N, labels_N, weights_N)
        teacher_hidden_NE, indices_NK, log_probabilities_NK, tail_N, labels_N, weights_N = (
            None if tensor is None else tensor.index_select(0, order_N) for tensor in others
        )
    scaled, _ = low_precision_unit(options, hidden_ND.dtype)
    need = (need_hidden, need_weight, need_bias)
    rows, wide = hidden_ND.shape[0], torch.promote_types(hidden_ND.dtype, torch.float32)
    terms_N2 = hidden_ND.new_empty(rows, 2, dtype=wide)
    width = options.columns or weight_VD.shape[0]
    largest = min(chunk_rows, rows)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        head = _Head(hidden_ND, weight_VD, bias_V, width, largest, need)
        teacher = None
        if teacher_hidden_NE is not None:
            assert teacher_weight_VE is not None
            teacher = _Teacher(teacher_hidden_NE, teacher_weight_VE, teacher_bias_V, width, largest)
        dense, sparse = rows_function(backend), sparse_rows_function(backend)
        for first in range(0, rows, chunk_rows):
            end = min(first + chunk_rows, rows)
            logits_CV, labels_C, weights_C = head.logits(first, end), _part(labels_N, first, end), _part(weights_N, first, end)
            grad_CV = logits_CV if any(need) else None
            row_arguments = (labels_C, weights_C, scaled, terms_N2[first:end], grad_CV)
            if teacher is not None:
                dense(logits_CV, teacher.logits(first, end), *row_arguments)
            elif indices_NK is None:
                dense(logits_CV, None, *row_arguments)
            else:
                assert log_probabilities_NK is not None
                cached = SparseTeacher(indices_NK[first:end], log_probabilities_NK[first:end], _part(tail_N, first, end))
                sparse(logits_CV, cached, *row_arguments)
            if grad_CV is not None:
                head.add(first, end, grad_CV)
        hidden, weight, bias = head.gradients(weight_VD.dtype, weight_VD.dtype if bias_V is None else bias_V.dtype)
    if order_N is not None and need_hidden:
        hidden = torch.empty_like(hidden).index_copy_(0, order_N, hidden)
    return *sum_terms(terms_N2, options), hidden, weight, bias


def _labelled_first(labels_N: Tensor | None, ignore_index: int) -> Tensor | None:
    """Rows in an order in which blocks on a CPU have labels or not, without copies of their logits; None: as they are."""
    if labels_N is None or labels_N.device.type != "cpu":
        return None
    none_N = labels_N == ignore_index
    return none_N.sort(stable=True).indices if 0 < int(none_N.sum()) < len(none_N) else None


def _part(rows_N: Tensor | None, first: int, end: int) -> Tensor | None:
    return None if rows_N is None else rows_N[first:end]


@_linear_distill.register_fake
def _(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    need_hidden, need_weight, need_bias = arguments[8:11]
    half, wide = hidden_ND.dtype == torch.float16, torch.promote_types(hidden_ND.dtype, torch.float32)
    bias_dtype = weight_VD.dtype if bias_V is None else bias_V.dtype
    return (
        *(hidden_ND.new_empty((), dtype=wide) for _ in range(3)),
        hidden_ND.new_empty(hidden_ND.shape if need_hidden else 0, dtype=wide if half else hidden_ND.dtype),
        hidden_ND.new_empty(weight_VD.shape if need_weight else 0, dtype=wide if half else weight_VD.dtype),
        hidden_ND.new_empty(weight_VD.shape[:1] if need_bias else 0, dtype=wide if half else bias_dtype),
    )


register_handover(_linear_distill, leaves=3)


def linear_distill_loss(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    teacher_bias_V: Tensor | None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
) -> DistillTerms:
    """`distill_loss` of the two heads' logits, which never exist whole.

    student_hidden_ND, teacher_hidden_NE: float, one row a token; weights [V, D] and [V, E] as nn.Linear has them, biases [V] or
    None. labels_N (int64), weights_N (float): as in `distill_loss`.
    chunk_rows: rows of logits at a time; None: by the law above.
    Gradients of hidden states, weight and bias: each only if it requires one. Raises ValueError as `distill_loss` does.
    """
    _check_head("teacher", teacher_hidden_NE, teacher_weight_VE, teacher_bias_V)
    dtypes = [tensor.dtype for tensor in (teacher_hidden_NE, teacher_weight_VE, teacher_bias_V) if tensor is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"the teacher's hidden states, weight and bias must have one dtype, got {dtypes}")
    teacher = (teacher_hidden_NE, teacher_weight_VE, teacher_bias_V)
    student = (student_hidden_ND, student_weight_VD, student_bias_V)
    return _loss(student, teacher, labels_N, weights_N, options, backend, chunk_rows)


def linear_sparse_distill_loss(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher: SparseTeacher,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
) -> DistillTerms:
    """`linear_distill_loss` with a teacher known by its likeliest tokens (see sparse_distill.py): forward KL only."""
    student = (student_hidden_ND, student_weight_VD, student_bias_V)
    return _loss(student, teacher, labels_N, weights_N, options, backend, chunk_rows)


def linear_cross_entropy_loss(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_M: Tensor,
    *,
    options: DistillOptions,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
) -> DistillTerms:
    """The hard term alone, without a teacher (pre-training): `options.soft` has no effect."""
    return _loss((hidden_MD, weight_VD, bias_V), None, labels_M, None, options, backend, chunk_rows)


_Dense = tuple[Tensor, Tensor, Tensor | None]
_NONE = (None, None, None)


def _loss(
    student: _Dense,
    teacher: _Dense | SparseTeacher | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    options: DistillOptions,
    backend: Backend,
    chunk_rows: int | None,
) -> DistillTerms:
    hidden_ND, weight_VD, bias_V = student
    device = hidden_ND.device
    _check_head("student", hidden_ND, weight_VD, bias_V)
    check_rows(
        hidden_ND, None if teacher is None else teacher[1 if isinstance(teacher, SparseTeacher) else 0], labels_N, weights_N
    )
    out_N = _rows_out(teacher is not None, labels_N, weights_N, options.ignore_index)
    if out_N is not None:
        hidden_ND = hidden_ND.masked_fill(out_N[:, None], 0.0)
    if backend == "reference":
        return _reference((hidden_ND, weight_VD, bias_V), teacher, labels_N, weights_N, options)
    if torch.is_autocast_enabled(device.type) and hidden_ND.dtype != torch.float64:
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device.type))
    grad = torch.is_grad_enabled()
    need = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias_V)]
    dense = _NONE if teacher is None or isinstance(teacher, SparseTeacher) else teacher
    sparse = teacher if isinstance(teacher, SparseTeacher) else _NONE
    width = options.width(weight_VD.shape[0], weight_VD.shape[0] if dense[1] is None else dense[1].shape[0])
    others = (*dense, *sparse, weights_N)
    if grad and any(tensor is not None and tensor.requires_grad for tensor in others):
        raise ValueError(
            "the teacher and the weights get no gradient: compute the teacher's hidden states under torch.no_grad() and detach "
            "its head, or use backend='reference'"
        )
    if chunk_rows is None:
        itemsizes = hidden_ND.element_size() + (0 if dense[0] is None else dense[0].element_size())
        chunk_rows = rows_per_chunk(hidden_ND.shape[0], width, itemsizes, device)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None for the default; got {chunk_rows}")
    *terms, _, _, _ = _linear_distill(
        hidden_ND,
        weight_VD,
        bias_V,
        *dense,
        *sparse,
        labels_N,
        weights_N,
        *need,
        chosen_backend(backend, hidden_ND.device),
        max(1, chunk_rows),
        *pack(options),
    )
    return DistillTerms(*terms)


def _rows_out(has_teacher: bool, labels_N: Tensor | None, weights_N: Tensor | None, ignore_index: int) -> Tensor | None:
    """Where a row enters no term, [N] bool; None where every row enters one.

    Such a row's logits get the gradient 0, and the weight's gradient multiplies that by the row's hidden state: 0 * nan.
    """
    if has_teacher and weights_N is None:
        return None
    unlabelled_N = None if labels_N is None else labels_N == ignore_index
    if not has_teacher:
        return unlabelled_N
    assert weights_N is not None
    weightless_N = weights_N == 0
    return weightless_N if unlabelled_N is None else weightless_N & unlabelled_N


def _reference(
    student: _Dense,
    teacher: _Dense | SparseTeacher | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    options: DistillOptions,
) -> DistillTerms:
    """The specification: whole logits. The student's follow autocast, the teacher's keep the dtype of its hidden states."""
    hidden_ND, weight_VD, bias_V = student
    dtype = hidden_ND.dtype
    student_NV = linear(hidden_ND, weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
    with torch.autocast(student_NV.device.type, enabled=False):
        if isinstance(teacher, SparseTeacher):
            return sparse_distill_reference(student_NV, teacher, labels_N, weights_N, options=options)
        return distill_loss_reference(
            student_NV, None if teacher is None else linear(*teacher), labels_N, weights_N, options=options
        )


def _check_head(name: str, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"the {name}'s hidden states [N, D] and weight [V, D] do not fit: {list(hidden_ND.shape)}, {list(weight_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"the {name}'s bias must have {weight_VD.shape[0]} elements, got {list(bias_V.shape)}")


# ---- what it costs ----


def bytes_moved(
    rows: int, columns: int, student_width: int, teacher_width: int, itemsize: int, *, chunk_rows: int, weight_itemsize: int = 4
) -> int:
    """Bytes that cross the memory bus at least: logits and their gradient (7 elements each), heads, the head's gradient."""
    chunks = -(-rows // chunk_rows)
    heads = chunks * columns * (2 * student_width + teacher_width) * itemsize
    head_gradient = (2 * chunks - 1) * columns * student_width * weight_itemsize
    hidden = rows * (3 * student_width + teacher_width) * itemsize
    return 7 * rows * columns * itemsize + heads + head_gradient + hidden


def workspace_bytes(rows: int, columns: int, student_width: int, itemsizes: int, device: torch.device) -> int:
    """What the op holds at its worst instant: logits of a chunk, the head's gradient in float32 and, on a CPU, the blocks of
    the loss; not the hidden states' gradient nor copies of the inputs. `itemsizes` as in `rows_per_chunk`."""
    chunk = min(rows, rows_per_chunk(rows, columns, itemsizes, device))
    blocks = 6 * 4 * min(max(BLOCK, columns), chunk * columns) if device.type == "cpu" else 0
    return chunk * columns * itemsizes + 4 * columns * student_width + blocks


def flops(rows: int, columns: int, student_width: int, teacher_width: int, *, hidden: bool = True, weight: bool = True) -> int:
    """Floating-point operations of the products; `hidden`, `weight`: whether those gradients are asked for."""
    return 2 * rows * columns * (student_width * (1 + hidden + weight) + teacher_width)
