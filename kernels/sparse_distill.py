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

import torch
from torch import Tensor

from fastdistil.kernels.backend import Backend
from fastdistil.kernels.distill import distill_loss
from fastdistil.kernels.distill_options import DistillOptions, DistillTerms, SparseTeacher
from fastdistil.kernels.distill_torch import blocks, load


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
    width = checked.width(teacher_NV.shape[1])
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
    return distill_loss(student_NV, teacher, labels_N, weights_N, options=options, backend=backend)


# ---- what it costs ----


def bytes_moved(rows: int, columns: int, listed: int, itemsize: int, *, gradient: bool = True) -> int:
    """Bytes that must cross the memory bus: the logits read once, the gradient written once, the list (int64, float32) read."""
    return (2 if gradient else 1) * rows * columns * itemsize + rows * (listed * 12 + 4)
