"""Distillation losses from hidden states: both vocabulary heads and the losses of `distill.py`, logits never whole.

    student logits = student_hidden_ND @ student_weight_VD.T + student_bias_V          (the teacher likewise, width E)

Rows are taken in chunks. Of each chunk both sides' logits are made, the loss writes its gradient over the
student's, and two products turn that into the gradients of the hidden states and of the head, before the next
chunk uses the same buffers:

    2 N V (3 D + E) floating-point operations (products for gradients nobody wants are left out), the least there is unless
    logits are computed twice; 7 elements moved per logit.

How many rows a chunk has: every chunk reads both heads (V (D + E) elements) and reads and writes the head's
gradient (2 V D in float32), against products that grow with its rows. On an H200 that overhead is about
255/rows of the products' time: 4096 rows cost 6%, 32 rows eight times the products. So a chunk has 4096 rows
(GPU) or 1024 (CPU), or fewer where two buffers of logits would not fit the budget below.

Autocast: the student's hidden states decide the dtype of its products (under autocast: autocast's), the
teacher keeps its own. The head's gradient is summed over chunks in float32.

Legend: N rows, C rows of a chunk, D student width, E teacher width, V vocabulary, K tokens of a sparse teacher.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastdistil.kernels.autograd import register_handover
from fastdistil.kernels.backend import Backend, chosen_backend
from fastdistil.kernels.cpu import buffer, product
from fastdistil.kernels.distill import check_rows, check_teacher, distill_loss_reference, rows_function, sum_terms
from fastdistil.kernels.distill_options import (
    OPTIONS_SCHEMA,
    DistillOptions,
    DistillTerms,
    Head,
    SparseTeacher,
    Targets,
    low_precision_unit,
    pack,
    take_rows,
    unpack,
)
from fastdistil.kernels.distill_torch import BLOCK

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


class _TeacherSide:
    """The teacher's side: logits of a chunk, in one buffer for all chunks."""

    def __init__(self, head: Head, width: int, largest: int) -> None:
        self._hidden_NE, self._weight_VE = head.hidden, head.weight[:width]
        self._bias_V = None if head.bias is None else head.bias[:width]
        self._logits_CV = buffer((largest, width), head.hidden.dtype, head.hidden.device)

    def rows(self, rows: slice) -> Tensor:
        out_CV = self._logits_CV[: rows.stop - rows.start]
        return product(self._hidden_NE[rows], self._weight_VE.t(), out_CV, bias_N=self._bias_V)


class NeededGradients(NamedTuple):
    """Which gradients autograd asks for."""

    hidden: bool
    weight: bool
    bias: bool


class _StudentSide:
    """The student's side: logits of a chunk, and the gradients that are needed."""

    def __init__(self, head: Head, width: int, largest: int, needed: NeededGradients) -> None:
        hidden_ND, weight_VD, bias_V = head
        rows, device = hidden_ND.shape[0], hidden_ND.device
        # float16 gradients are scaled before they are rounded: in backward.
        self._half = hidden_ND.dtype == torch.float16
        if self._half and device.type == "cpu":  # whose half-precision products would give half precision, and overflow
            hidden_ND = hidden_ND.float()
        dtype = hidden_ND.dtype
        wide = torch.promote_types(dtype, torch.float32)
        stored = wide if self._half else dtype
        self._hidden_ND = hidden_ND
        self._weight_VD = weight_VD[:width]
        if weight_VD.dtype != dtype:
            self._weight_VD = buffer((width, weight_VD.shape[1]), dtype, device).copy_(self._weight_VD)
        self._bias_V = None if bias_V is None else bias_V[:width].to(dtype)
        self._logits_CV = buffer((largest, width), dtype, device)
        self._grad_hidden_ND = buffer(hidden_ND.shape if needed.hidden else (0,), stored, device)
        # Of one or two chunks only the first is rounded before the sum is: no wider buffer is needed.
        narrow = device.type == "cpu" and dtype == weight_VD.dtype == stored and rows <= 2 * largest
        self._grad_weight_VD = buffer(weight_VD.shape if needed.weight else (0,), dtype if narrow else wide, device)
        self._grad_bias_V = buffer(weight_VD.shape[:1] if needed.bias else (0,), wide, device)
        self._weight_dtype, self._bias_dtype = weight_VD.dtype, weight_VD.dtype if bias_V is None else bias_V.dtype
        self._needed, self._width, self._begun = needed, width, False

    def logits(self, rows: slice) -> Tensor:
        out_CV = self._logits_CV[: rows.stop - rows.start]
        return product(self._hidden_ND[rows], self._weight_VD.t(), out_CV, bias_N=self._bias_V)

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        """Turn the gradient of a chunk's logits into those of the hidden states, the weight and the bias."""
        if self._needed.hidden:
            out_CD = self._grad_hidden_ND[rows]
            if out_CD.dtype == grad_CV.dtype:
                product(grad_CV, self._weight_VD, out_CD)
            else:
                torch.ops.aten.mm.dtype_out(grad_CV, self._weight_VD, out_CD.dtype, out=out_CD)
        if self._needed.weight:
            self._add_weight(grad_CV.t(), self._hidden_ND[rows])
        if self._needed.bias:
            part_V = grad_CV.sum(0, dtype=self._grad_bias_V.dtype if grad_CV.is_cuda else None)
            self._grad_bias_V[: self._width] = self._grad_bias_V[: self._width] + part_V if self._begun else part_V
        self._begun = True

    def _add_weight(self, grad_VC: Tensor, hidden_CD: Tensor) -> None:
        """Add a chunk's part of the weight's gradient, in the dtype of that gradient."""
        out_VD = self._grad_weight_VD[: self._width]
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

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return those of the hidden states, the weight and the bias; empty where not needed."""
        if not self._begun:  # no rows
            self._grad_weight_VD.zero_()
            self._grad_bias_V.zero_()
        self._grad_weight_VD[self._width :].zero_()
        self._grad_bias_V[self._width :].zero_()
        if self._half:
            return self._grad_hidden_ND, self._grad_weight_VD, self._grad_bias_V
        return self._grad_hidden_ND, self._grad_weight_VD.to(self._weight_dtype), self._grad_bias_V.to(self._bias_dtype)


class OpArguments(NamedTuple):
    """What the op takes: one by one (`flat`), as torch.library has it, and autograd must see every tensor."""

    student: Head
    teacher: Head | SparseTeacher | None
    targets: Targets
    needed: NeededGradients
    backend: str
    chunk_rows: int
    options: DistillOptions

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the op's schema."""
        head = self.teacher if isinstance(self.teacher, Head) else (None, None, None)
        sparse = self.teacher if isinstance(self.teacher, SparseTeacher) else (None, None, None)
        numbers = (*self.needed, self.backend, self.chunk_rows, *pack(self.options))
        return (*self.student, *head, *sparse, *self.targets, *numbers)

    @classmethod
    def from_flat(cls, arguments: tuple[Any, ...]) -> "OpArguments":
        """Return the inverse of `flat`."""
        student, head, sparse, targets = arguments[:3], arguments[3:6], arguments[6:9], arguments[9:11]
        needed, (backend, chunk_rows), options = arguments[11:14], arguments[14:16], arguments[16:]
        teacher: Head | SparseTeacher | None = None
        if head[0] is not None:
            teacher = Head(*head)
        elif sparse[0] is not None:
            teacher = SparseTeacher(*sparse)
        return cls(Head(*student), teacher, Targets(*targets), NeededGradients(*needed), backend, chunk_rows, unpack(options))


@torch.library.custom_op(
    "fastdistil::linear_distill",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? indices, Tensor? log_probabilities, Tensor? tail, Tensor? labels, Tensor? weights, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, str backend, int chunk_rows, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_distill(*arguments: Any) -> tuple[Tensor, ...]:
    student, teacher, targets, needed, backend, chunk_rows, options = OpArguments.from_flat(arguments)
    # On a CPU rows with labels go first, on every side, and come back at the end.
    order_N = _labelled_first(targets.labels_N, options.ignore_index) if backend == "torch" and options.hard else None
    if order_N is not None:
        student, targets = student._replace(hidden=take_rows(student.hidden, order_N)), targets.rows(order_N)
        if isinstance(teacher, Head):
            teacher = teacher._replace(hidden=take_rows(teacher.hidden, order_N))
        elif teacher is not None:
            teacher = teacher.rows(order_N)
    scaled, _ = low_precision_unit(options, student.hidden.dtype)
    rows, wide = student.hidden.shape[0], torch.promote_types(student.hidden.dtype, torch.float32)
    terms_N2 = student.hidden.new_empty(rows, 2, dtype=wide)
    width, largest = options.columns or student.weight.shape[0], min(chunk_rows, rows)
    write_rows = rows_function(backend, teacher)
    with torch.autocast(student.hidden.device.type, enabled=False):
        student_side = _StudentSide(student, width, largest, needed)
        teacher_side = _TeacherSide(teacher, width, largest) if isinstance(teacher, Head) else teacher
        # Logits of a chunk, the gradient written over them, and that into the gradients of hidden states and head.
        for first in range(0, rows, chunk_rows):
            chunk = slice(first, min(first + chunk_rows, rows))
            logits_CV = student_side.logits(chunk)
            teacher_C = None if teacher_side is None else teacher_side.rows(chunk)
            grad_CV = logits_CV if any(needed) else None
            write_rows(logits_CV, teacher_C, targets.rows(chunk), scaled, terms_N2=terms_N2[chunk], grad_NV=grad_CV)
            if grad_CV is not None:
                student_side.add(chunk, grad_CV)
        hidden, weight, bias = student_side.gradients()
    if order_N is not None and needed.hidden:
        hidden = torch.empty_like(hidden).index_copy_(0, order_N, hidden)
    return *sum_terms(terms_N2, options), hidden, weight, bias


def _labelled_first(labels_N: Tensor | None, ignore_index: int) -> Tensor | None:
    """Return the rows' order in which blocks on a CPU have labels or not, without copies of their logits; None: as it is."""
    if labels_N is None or labels_N.device.type != "cpu":
        return None
    none_N = labels_N == ignore_index
    return none_N.sort(stable=True).indices if 0 < int(none_N.sum()) < len(none_N) else None


@_linear_distill.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    (hidden_ND, weight_VD, bias_V), _, _, needed, *_ = OpArguments.from_flat(arguments)
    half, wide = hidden_ND.dtype == torch.float16, torch.promote_types(hidden_ND.dtype, torch.float32)
    bias_dtype = weight_VD.dtype if bias_V is None else bias_V.dtype
    return (
        *(hidden_ND.new_empty((), dtype=wide) for _ in range(3)),
        hidden_ND.new_empty(hidden_ND.shape if needed.hidden else 0, dtype=wide if half else hidden_ND.dtype),
        hidden_ND.new_empty(weight_VD.shape if needed.weight else 0, dtype=wide if half else weight_VD.dtype),
        hidden_ND.new_empty(weight_VD.shape[:1] if needed.bias else 0, dtype=wide if half else bias_dtype),
    )


register_handover(_linear_distill, leaves=3)


def linear_distill_loss(
    student: Head,
    teacher: Head | SparseTeacher | None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
) -> DistillTerms:
    """`distill_loss` of the two heads' logits, which never exist whole.

    teacher: its head; or its likeliest tokens (see sparse_distill.py: forward KL only); or None for the hard
    term alone, as in pre-training, where `options.soft` has no effect. labels_N (int64), weights_N (float):
    as in `distill_loss`.
    chunk_rows: rows of logits at a time; None: by the law above.
    Gradients of the student's hidden states, weight and bias: each only if it requires one. Raises ValueError
    as `distill_loss` does.
    """
    targets = Targets(labels_N, weights_N)
    _check(student, teacher, targets, options)
    device = student.hidden.device
    # Rows that enter no term, and the dtype of the student's products.
    out_N = _rows_out(teacher is not None, targets, options.ignore_index)
    if out_N is not None:
        student = student._replace(hidden=student.hidden.masked_fill(out_N[:, None], 0.0))
    if backend == "reference":
        return _reference(student, teacher, targets, options)
    if torch.is_autocast_enabled(device.type) and student.hidden.dtype != torch.float64:
        student = student._replace(hidden=student.hidden.to(torch.get_autocast_dtype(device.type)))
    grad = torch.is_grad_enabled()
    needed = NeededGradients(*(grad and tensor is not None and tensor.requires_grad for tensor in student))
    width = options.width(student.weight.shape[0], teacher.weight.shape[0] if isinstance(teacher, Head) else None)
    if grad and any(tensor is not None and tensor.requires_grad for tensor in (*(teacher or ()), weights_N)):
        raise ValueError(
            "the teacher and the weights get no gradient: compute the teacher's hidden states under torch.no_grad() and detach "
            "its head, or use backend='reference'"
        )
    if chunk_rows is None:
        teacher_itemsize = teacher.hidden.element_size() if isinstance(teacher, Head) else 0
        itemsizes = student.hidden.element_size() + teacher_itemsize
        chunk_rows = rows_per_chunk(student.hidden.shape[0], width, itemsizes, device)
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None for the default; got {chunk_rows}")
    chosen = chosen_backend(backend, device)
    arguments = OpArguments(student, teacher, targets, needed, chosen, max(1, chunk_rows), options)
    total, soft, hard, *_ = _linear_distill(*arguments.flat())
    return DistillTerms(total, soft, hard)


def _rows_out(has_teacher: bool, targets: Targets, ignore_index: int) -> Tensor | None:
    """Return which rows enter no term, [N] bool; None where every row enters one.

    Such a row's logits get the gradient 0, and the weight's gradient multiplies that by the row's hidden state: 0 * nan.
    """
    labels_N, weights_N = targets
    if has_teacher and weights_N is None:
        return None
    unlabelled_N = None if labels_N is None else labels_N == ignore_index
    if not has_teacher:
        return unlabelled_N
    assert weights_N is not None
    weightless_N = weights_N == 0
    return weightless_N if unlabelled_N is None else weightless_N & unlabelled_N


def _reference(student: Head, teacher: Head | SparseTeacher | None, targets: Targets, options: DistillOptions) -> DistillTerms:
    """The specification: whole logits. The student's follow autocast, the teacher's keep the dtype of its hidden states."""
    hidden_ND, weight_VD, bias_V = student
    student_NV = linear(hidden_ND, weight_VD.to(hidden_ND.dtype), None if bias_V is None else bias_V.to(hidden_ND.dtype))
    with torch.autocast(student_NV.device.type, enabled=False):
        logits_or_list = linear(*teacher) if isinstance(teacher, Head) else teacher
        return distill_loss_reference(student_NV, logits_or_list, *targets, options=options)


def _check(student: Head, teacher: Head | SparseTeacher | None, targets: Targets, options: DistillOptions) -> None:
    """Check shapes, dtypes and devices. Raises ValueError."""
    if teacher is None and targets.labels_N is None:
        raise ValueError("a loss needs a teacher or labels, got neither; give a Head or a SparseTeacher, or labels_N")
    _check_head("student", student)
    if isinstance(teacher, SparseTeacher):
        check_teacher(student.hidden, teacher, options)
    elif teacher is not None:
        _check_head("teacher", teacher)
        dtypes = [tensor.dtype for tensor in teacher if tensor is not None]
        if len(set(dtypes)) > 1:
            raise ValueError(f"the teacher's hidden states, weight and bias must have one dtype, got {dtypes}")
    check_rows(student.hidden, teacher.hidden if isinstance(teacher, Head) else None, targets)


def _check_head(name: str, head: Head) -> None:
    hidden_ND, weight_VD, bias_V = head
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"the {name}'s hidden states [N, D] and weight [V, D] do not fit: {list(hidden_ND.shape)}, {list(weight_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"the {name}'s bias must have {weight_VD.shape[0]} elements, got {list(bias_V.shape)}")


# ---- what it costs ----


def workspace_bytes(rows: int, columns: int, student_width: int, itemsizes: int, device: torch.device) -> int:
    """What the op holds at its worst instant: logits of a chunk, the head's gradient in float32 and, on a
    CPU, the blocks of the loss; not the hidden states' gradient nor copies of the inputs. `itemsizes` as in
    `rows_per_chunk`."""
    chunk = min(rows, rows_per_chunk(rows, columns, itemsizes, device))
    blocks = 6 * 4 * min(max(BLOCK, columns), chunk * columns) if device.type == "cpu" else 0
    return chunk * columns * itemsizes + 4 * columns * student_width + blocks


def flops(rows: int, columns: int, student_width: int, teacher_width: int, *, hidden: bool = True, weight: bool = True) -> int:
    """Floating-point operations of the products; `hidden`, `weight`: whether those gradients are asked for."""
    return 2 * rows * columns * (student_width * (1 + hidden + weight) + teacher_width)
