"""Forward KL to a teacher known by its likeliest tokens: the cached, or transmitted, top K of each row.

    soft = T^2 sum_n w_n [ sum_k p_k (log p_k - log q_k) + p_r (log p_r - log q_r) ]           q = softmax(student / T)

k runs over the K tokens listed for the row, r is one bucket for all others: p_r is the teacher's mass there
(its `tail`), q_r the student's. p is renormalised so that sum p_k + p_r = 1. It is the divergence of the two
distributions after the others have been merged, hence at most the dense forward KL (data processing), and
equal to it where all V tokens are listed.

    gradient, times T^2, in the student's logits:       listed  T (q_i - p_i)       others  T (q_i / q_r) (q_r - p_r)

Without a tail p_r = 0: the listed part, renormalised, is the whole teacher, and the others get T q_i. That is
a bias towards the listed tokens, which a tail does not have (Anshumann et al. 2025, Sparse Logit Sampling,
section 3).

q_r is a sum over the unlisted columns, not 1 - sum q_k, which cancels where the list holds nearly all of the student's mass.

Hard term, `total`, options and paths: as in distill.py. Only forward KL exists here: the other divergences
need p of every token that q reaches. `teacher_scale` and `teacher_softcap` are for `top_k`, as
log-probabilities come after them.

What has no finite value, beyond distill.py: where q_r = 0 < p_r the soft term is +inf and its gradient finite
(0 for the others). A row whose teacher has no mass at all has a nan soft term and gradient, unless its weight
is 0.

Legend: N rows (tokens), V vocabulary, K listed tokens, R rows of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastdistil.kernels.autograd import register_handover
from fastdistil.kernels.backend import Backend, chosen_backend
from fastdistil.kernels.cpu import buffer
from fastdistil.kernels.distill import capped, check_rows, distill_loss_reference, sum_terms, times
from fastdistil.kernels.distill_options import (
    OPTIONS_SCHEMA,
    DistillOptions,
    DistillTerms,
    SparseTeacher,
    Targets,
    low_precision_unit,
    pack,
    unpack,
)
from fastdistil.kernels.distill_torch import blocks, cap_gradient, hard_rows, load, softmax


def top_k(
    teacher_NV: Tensor,
    k: int,
    *,
    temperature: float,
    min_probability: float | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    columns: int | None = None,
) -> SparseTeacher:
    """The k likeliest tokens of each row of logits, in float32 (float64 for float64), and the mass of the others.

    min_probability: slots of less are unused, except for the likeliest token, and there is no tail: the part
    above the cut is what is learnt from. scale, softcap, columns: as DistillOptions has them for the teacher.
    No gradient.
    """
    checked = DistillOptions(temperature=temperature, teacher_scale=scale, teacher_softcap=softcap, columns=columns)
    if teacher_NV.ndim != 2 or not teacher_NV.is_floating_point():
        raise ValueError(f"the teacher's logits must be floating-point [N, V], got {teacher_NV.dtype} {list(teacher_NV.shape)}")
    width = checked.width(teacher_NV.shape[1], teacher_NV.shape[1])
    if not 1 <= k <= width:
        raise ValueError(f"k must lie in 1 ... {width}, the teacher's columns; got {k}")
    if min_probability is not None and not 0 < min_probability < 1:
        raise ValueError(f"min_probability must lie between 0 and 1, or be None to keep all k; got {min_probability}")
    rows, wide = teacher_NV.shape[0], torch.promote_types(teacher_NV.dtype, torch.float32)
    indices_NK = teacher_NV.new_empty(rows, k, dtype=torch.int64)
    log_probabilities_NK = teacher_NV.new_empty(rows, k, dtype=wide)
    tail_N = teacher_NV.new_empty(rows, dtype=wide)
    # The listed logits leave the block for the sum of the others: 1 - sum p_k would cancel.
    with torch.no_grad():
        for first, end in blocks(rows, width, teacher_NV.device):
            x_RV = teacher_NV.new_empty(end - first, width, dtype=wide)
            x_RV = load(x_RV, teacher_NV[first:end, :width], scale, softcap).div_(temperature)
            x_RK, indices_NK[first:end] = x_RV.topk(k)
            rest_R = x_RV.scatter_(1, indices_NK[first:end], -math.inf).logsumexp(-1)
            lse_R = torch.logaddexp(rest_R, x_RK.logsumexp(-1))
            log_probabilities_NK[first:end] = x_RK - lse_R[:, None]
            tail_N[first:end] = (rest_R - lse_R).exp()
    if min_probability is None:
        return SparseTeacher(indices_NK, log_probabilities_NK, tail_N)
    # Slots below the cut, but never the likeliest token's.
    others_NK = log_probabilities_NK[:, 1:]
    others_NK.masked_fill_(others_NK < math.log(min_probability), -math.inf)
    return SparseTeacher(indices_NK, log_probabilities_NK, None)


# ---- the specification ----


def normalised(teacher: SparseTeacher, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log p_NK, p_r [N]) that sum to 1 in each row; nan where there is no mass."""
    log_p_NK = teacher.log_probabilities_NK.to(wide)
    log_total_N = log_p_NK.logsumexp(-1)
    if teacher.tail_N is None:
        return log_p_NK - log_total_N[:, None], torch.zeros_like(log_total_N)
    log_tail_N = teacher.tail_N.to(wide).log()
    log_total_N = torch.logaddexp(log_total_N, log_tail_N)
    return log_p_NK - log_total_N[:, None], (log_tail_N - log_total_N).exp()


def sparse_divergence_reference(student_NV: Tensor, teacher: SparseTeacher, *, temperature: float = 1.0) -> Tensor:
    """The bracket of the formula times temperature squared, [N], float32 or wider. Differentiable in the student."""
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    # Normalised first: differences of log_softmax keep the digits that a common offset of the logits takes.
    log_q_NV = (student_NV.to(wide) / temperature).log_softmax(-1)
    log_p_NK, tail_N = normalised(teacher, wide)
    indices_NK = teacher.indices_NK.long()
    listed_N = times(log_p_NK.exp(), log_p_NK - log_q_NV.gather(1, indices_NK)).sum(-1)
    # Added up, as an unused slot may name a token that another slot lists.
    used_NK = (~torch.isneginf(log_p_NK)).int()
    others_NV = torch.zeros_like(log_q_NV, dtype=torch.int32).scatter_add(1, indices_NK, used_NK) == 0
    rest_NV = log_q_NV.masked_fill(~others_NV, -math.inf)
    # The gradient of the logarithm of an empty sum would be nan.
    empty_N = torch.isneginf(rest_NV).all(-1)
    log_q_rest_N = rest_NV.masked_fill(empty_N[:, None], 0.0).logsumexp(-1).masked_fill(empty_N, -math.inf)
    return temperature**2 * (listed_N + times(tail_N, tail_N.log() - log_q_rest_N))


def sparse_distill_reference(
    student_NV: Tensor,
    teacher: SparseTeacher,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
) -> DistillTerms:
    """The specification of `sparse_distill_loss`, with its arguments; differentiable in logits and weights, twice."""
    check_teacher(student_NV, teacher, options)
    label_terms = distill_loss_reference(student_NV, None, labels_N, options=options)
    width = options.width(student_NV.shape[1], student_NV.shape[1])
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    student_NV = student_NV[:, :width].to(wide)
    if weights_N is not None:
        # Replaced before the arithmetic: 0 times the gradient of a nan would be nan.
        out_N = weights_N == 0
        log_p_NK, tail_N = teacher.log_probabilities_NK.masked_fill(out_N[:, None], 0.0), teacher.tail_N
        teacher = SparseTeacher(teacher.indices_NK, log_p_NK, None if tail_N is None else tail_N.masked_fill(out_N, 0.0))
        student_NV = student_NV.masked_fill(out_N[:, None], 0.0)
    student_NV = capped(student_NV, options.student_scale, options.student_softcap)
    rows_N = sparse_divergence_reference(student_NV, teacher, temperature=options.temperature)
    soft = rows_N.sum() if weights_N is None else (weights_N * rows_N).sum()
    total = label_terms.total + options.soft * soft if options.soft else label_terms.total
    return DistillTerms(total, soft.detach(), label_terms.hard)


def check_teacher(student_NV: Tensor, teacher: SparseTeacher, options: DistillOptions) -> None:
    """What this op asks beyond check_rows. Raises ValueError."""
    if options.divergence != "forward-kl":
        raise ValueError(
            f"a sparse teacher has a forward KL only, got divergence {options.divergence!r}: the others need the teacher's "
            "probability of every token; use divergence='forward-kl' or whole teacher logits"
        )
    if options.teacher_scale != 1.0 or options.teacher_softcap is not None:
        raise ValueError(
            f"teacher_scale is {options.teacher_scale} and teacher_softcap {options.teacher_softcap}, which act on logits, and "
            "a sparse teacher has log-probabilities: give both to top_k, and leave 1.0 and None here"
        )
    options.width(student_NV.shape[1], student_NV.shape[1])
    # The list's shapes, dtypes and device.
    indices, log_probabilities, tail = teacher
    rows = student_NV.shape[0]
    if indices.ndim != 2 or indices.shape[0] != rows or indices.shape[1] < 1 or indices.shape != log_probabilities.shape:
        raise ValueError(
            f"indices and log-probabilities must both be [{rows}, K] with K at least 1, got {list(indices.shape)} and "
            f"{list(log_probabilities.shape)}"
        )
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices must be int64 or int32, got {indices.dtype}; .long()")
    floats = {"log-probabilities": log_probabilities} | ({} if tail is None else {"the tail": tail})
    for name, tensor in floats.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    if tail is not None and tail.shape != (rows,):
        raise ValueError(f"the tail must be [{rows}], one mass a row, got {list(tail.shape)}")
    for name, tensor in ({"indices": indices} | floats).items():
        if tensor.device != student_NV.device:
            raise ValueError(f"{name} must be on {student_NV.device} as the student's logits are, got {tensor.device}")


# ---- the fast path in torch: blocks of rows that stay in the cache ----


def _soft_block(a_RV: Tensor, out_RV: Tensor, teacher: SparseTeacher, factor_R: Tensor) -> Tensor:
    """The divergence of each row [R] from student / T in a_RV (overwritten); factor times its gradient in that, in out_RV."""
    log_p_RK, tail_R = normalised(teacher, a_RV.dtype)
    indices_RK, unused_RK = teacher.indices_NK.long(), torch.isneginf(log_p_RK)
    a_RK = a_RV.gather(1, indices_RK).masked_fill_(unused_RK, -math.inf)
    # Listed columns leave the sum. Added and not written, as an unused slot may name a token that another slot lists.
    a_RV.scatter_add_(1, indices_RK, torch.where(unused_RK, 0.0, -math.inf).to(a_RV.dtype))
    largest_R, log_largest_R = softmax(a_RV, out_RV)
    empty_R = torch.isneginf(largest_R)
    # Logits and their log sums less the largest of the rest, of which no difference below knows.
    a_RK -= largest_R.masked_fill(empty_R, 0.0)[:, None]
    lse_rest_R = (-log_largest_R).masked_fill(empty_R, -math.inf)
    lse_R = torch.logaddexp(lse_rest_R, a_RK.logsumexp(-1))
    lse_R = lse_R.masked_fill(torch.isinf(lse_R), math.nan)  # a logit of +inf, or -inf in all columns
    log_q_RK, log_q_rest_R = a_RK - lse_R[:, None], lse_rest_R - lse_R
    p_RK = log_p_RK.exp()
    soft_R = times(p_RK, log_p_RK - log_q_RK).sum(-1) + times(tail_R, tail_R.log() - log_q_rest_R)
    # Where p is nan, so is everything: times takes nan for 0.
    soft_R = soft_R + (lse_R + p_RK.sum(-1)) * 0.0
    rest_R = (log_q_rest_R.exp() - tail_R) * factor_R
    out_RV.mul_(rest_R[:, None])
    if a_RV.device.type != "cpu" or bool(empty_R.any()):
        out_RV.masked_fill_((empty_R & ~torch.isnan(rest_R))[:, None], 0.0)
    g_RK = (log_q_RK.exp() - p_RK).mul_(factor_R[:, None]).masked_fill_(unused_RK, 0.0)
    out_RV.scatter_add_(1, indices_RK, g_RK)
    return soft_R


def sparse_distill_rows_torch(
    student_NV: Tensor,
    teacher: SparseTeacher,
    targets: Targets,
    options: DistillOptions,
    *,
    terms_N2: Tensor,
    grad_NV: Tensor | None,
) -> None:
    """Write each row's (soft, hard) into terms_N2 and the gradient of its part of `total` into grad_NV.

    grad_NV may be student_NV itself, whose logits are then gone. terms_N2 has the wide dtype. Raises
    ValueError as check_teacher does, and for tokens outside of the vocabulary (on the CPU; looking at them on
    a GPU would be a wait).
    """
    check_teacher(student_NV, teacher, options)
    rows, device, wide = student_NV.shape[0], student_NV.device, terms_N2.dtype
    width, temperature = options.width(student_NV.shape[1], student_NV.shape[1]), options.temperature
    if rows == 0:
        return
    if device.type == "cpu":
        _check_indices(teacher.indices_NK, width)
    # Three buffers that every block uses anew: logits, the gradient, and the hard term's.
    largest = next(blocks(rows, width, device))[1]
    a_LV, g_LV, q_LV = (buffer((largest, width), wide, device) for _ in range(3))
    for first, end in blocks(rows, width, device):
        rows_R = slice(first, end)
        student_RV, (labels_R, weights_R), terms_R2 = student_NV[rows_R, :width], targets.rows(rows_R), terms_N2[rows_R]
        a_RV, g_RV, q_RV = (tensor[: end - first] for tensor in (a_LV, g_LV, q_LV))
        # The hard term at temperature 1, then the soft one at T.
        hard = hard_rows(student_RV, labels_R, options, terms_R2, a_RV, q_RV)
        load(a_RV, student_RV, options.student_scale, options.student_softcap).mul_(1 / temperature)
        weights_R = terms_R2.new_ones(end - first) if weights_R is None else weights_R.to(wide)
        factor_R = weights_R * (options.soft * temperature)
        soft_R = _soft_block(a_RV, g_RV, teacher.rows(rows_R), factor_R)
        terms_R2[:, 0] = torch.where(weights_R == 0, 0, weights_R * temperature**2 * soft_R)
        if grad_NV is None:
            continue
        # g is the soft gradient in student / T times T; the hard one joins, then back through cap and scale.
        if targets.weights_N is not None or options.soft == 0:
            g_RV.masked_fill_((factor_R == 0)[:, None], 0.0)
        if hard is not None:
            g_RV.index_add_(0, *hard)
        if options.student_softcap is not None:
            cap_gradient(g_RV, load(a_RV, student_RV, options.student_scale, options.student_softcap), options)
        if options.student_scale != 1.0:
            g_RV.mul_(options.student_scale)
        grad_NV[first:end, :width].copy_(g_RV)
    if grad_NV is not None:
        grad_NV[:, width:].zero_()


def _check_indices(indices: Tensor, width: int) -> None:
    least, largest = int(indices.min()), int(indices.max())
    if least < 0 or largest >= width:
        raise ValueError(
            f"the teacher's tokens must lie in 0 ... {width - 1}, got {least if least < 0 else largest}; "
            "make the list with top_k(..., columns=...) where the teacher's vocabulary is wider"
        )


# ---- the op ----


def sparse_rows_function(backend: str) -> Any:
    """sparse_distill_rows_torch, or its Triton counterpart with the same arguments."""
    if backend == "torch":
        return sparse_distill_rows_torch
    from fastdistil.kernels.sparse_distill_triton import sparse_distill_rows_triton

    return sparse_distill_rows_triton


@torch.library.custom_op(
    "fastdistil::sparse_distill",
    mutates_args=(),
    schema="(Tensor student, Tensor indices, Tensor log_probabilities, Tensor? tail, Tensor? labels, Tensor? weights, "
    f"bool need_grad, str backend, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _sparse_distill(
    student_NV: Tensor,
    indices_NK: Tensor,
    log_probabilities_NK: Tensor,
    tail_N: Tensor | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    need_grad: bool,
    backend: str,
    *packed: Any,
) -> tuple[Tensor, ...]:
    options = unpack(packed)
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    terms_N2 = student_NV.new_empty(student_NV.shape[0], 2, dtype=wide)
    grad_NV = buffer(student_NV.shape, student_NV.dtype, student_NV.device) if need_grad else None
    scaled, _ = low_precision_unit(options, student_NV.dtype)
    teacher = SparseTeacher(indices_NK, log_probabilities_NK, tail_N)
    write_rows = sparse_rows_function(backend)
    write_rows(student_NV, teacher, Targets(labels_N, weights_N), scaled, terms_N2=terms_N2, grad_NV=grad_NV)
    return *sum_terms(terms_N2, options), student_NV.new_empty(0) if grad_NV is None else grad_NV


@_sparse_distill.register_fake
def _(student_NV: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    scalars = tuple(student_NV.new_empty((), dtype=wide) for _ in range(3))
    return *scalars, student_NV.new_empty(student_NV.shape if arguments[5] else 0)


register_handover(_sparse_distill, leaves=1)


def sparse_distill_loss(
    student_NV: Tensor,
    teacher: SparseTeacher,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
    backend: Backend = "auto",
) -> DistillTerms:
    """`distill_loss` with a teacher known by its likeliest tokens, at the temperature of the options.

    student_NV: float [N, V], adjacent columns. labels_N, weights_N: as in `distill_loss`, labels out of range
    included. Only the student's logits get a gradient, once, unless backend="reference". Raises ValueError
    for what does not fit.
    """
    check_rows(student_NV, None, Targets(labels_N, weights_N))
    check_teacher(student_NV, teacher, options)
    if backend == "reference":
        return sparse_distill_reference(student_NV, teacher, labels_N, weights_N, options=options)
    if student_NV.stride(1) != 1 and student_NV.shape[1] > 1:
        raise ValueError(f"the student's logits have strides {student_NV.stride()}; adjacent columns are needed: .contiguous()")
    grad = torch.is_grad_enabled()
    others = (teacher.log_probabilities_NK, teacher.tail_N, weights_N)
    if grad and any(tensor is not None and tensor.requires_grad for tensor in others):
        raise ValueError(
            "only the student's logits get a gradient: detach the teacher and the weights, or use backend='reference'"
        )
    need_grad, chosen = grad and student_NV.requires_grad, chosen_backend(backend, student_NV.device)
    *terms, _ = _sparse_distill(student_NV, *teacher, labels_N, weights_N, need_grad, chosen, *pack(options))
    return DistillTerms(*terms)


# ---- what it costs ----


def bytes_moved(rows: int, columns: int, listed: int, itemsize: int, *, gradient: bool = True) -> int:
    """Bytes that must cross the memory bus: the logits read once, the gradient written once, the list (int64, float32) read."""
    return (2 if gradient else 1) * rows * columns * itemsize + rows * (listed * 12 + 4)


def flops(rows: int, columns: int, listed: int, *, gradient: bool = True) -> int:
    """Arithmetic of the element-wise part, an exponential counted as one."""
    return rows * columns * (6 if gradient else 4) + 8 * rows * listed
