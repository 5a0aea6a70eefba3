"""The path of distill.py and sparse_distill.py for the CPU: blocks of rows that stay in the cache, in vectorised sweeps.

Nothing of size [N, V] is made but the gradient. It runs on a GPU too, in large blocks, where it never waits
for the device: what it looks at on a CPU (which rows have labels, whether something is infinite) it works out
for all rows there.

Legend: N rows (tokens), V vocabulary, K listed tokens, R rows of a block, M of them labelled.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistil.kernels.cpu import buffer
from fastdistil.kernels.distill_options import DistillOptions, SparseTeacher, Targets, take_rows, times

# Elements of one block's buffer: in float32 six of 2 MiB, which the third-level cache holds.
BLOCK = 2**19
# On a GPU blocks only bound the memory.
_BLOCK_GPU = 2**27


def blocks(rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    size = max(1, (BLOCK if device.type == "cpu" else _BLOCK_GPU) // width)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def load(out_RV: Tensor, logits_RV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits as the loss sees them at temperature 1, in out_RV."""
    out_RV.copy_(logits_RV)
    if softcap is not None:
        torch.tanh(out_RV.mul_(scale / softcap), out=out_RV)
        return out_RV.mul_(softcap)
    return out_RV if scale == 1.0 else out_RV.mul_(scale)


def softmax(a_RV: Tensor, out_RV: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(a) in out_RV; returns max a and log max softmax(a), [R] each: log sum exp(a) is their difference.

    Apart, because a difference of two rows' log sums loses the digits that a common offset of the logits takes.
    """
    torch.softmax(a_RV, -1, out=out_RV)
    return a_RV.amax(-1), out_RV.amax(-1).log()


# Rows whose largest logits differ by less lose less than a digit when they are subtracted as they are.
_OFFSET = 8.0


def _difference(x_RV: Tensor, largest_x_R: Tensor, y_RV: Tensor, largest_y_R: Tensor, out_RV: Tensor) -> tuple[Tensor, Tensor]:
    """x - y in out_RV, and what of their largest logits' difference is still to be taken off it, [R].

    Where that difference is large, each side gives up its largest logit first (x and y are overwritten): x -
    y would round away the digits that the offset takes. Elsewhere two sweeps are saved.
    """
    offset_R = largest_x_R - largest_y_R
    if x_RV.device.type == "cpu" and not bool((offset_R.abs() > _OFFSET).any()):
        return torch.sub(x_RV, y_RV, out=out_RV), offset_R
    torch.sub(x_RV.sub_(largest_x_R[:, None]), y_RV.sub_(largest_y_R[:, None]), out=out_RV)
    return out_RV, torch.zeros_like(offset_R)


def _weighted_mean(p_RV: Tensor, x_RV: Tensor, spare_RV: Tensor) -> Tensor:
    """sum_v p x, [R], with 0 where p = 0 and x is not finite: those x are set to 0 in place."""
    mean_R = torch.mul(p_RV, x_RV, out=spare_RV).sum(-1)
    if x_RV.device.type != "cpu" or not bool(mean_R.isfinite().all()):
        x_RV.masked_fill_(p_RV == 0, 0.0)
        mean_R = torch.mul(p_RV, x_RV, out=spare_RV).sum(-1)
    return mean_R


def _soft_block(block: list[Tensor], options: DistillOptions) -> tuple[Tensor, Tensor]:
    """(D of each row [R], its gradient in student / T [R, V]) from student / T and teacher / T in block[0] and block[1]."""
    a, b, q, p, m, _ = block
    (largest_a_R, log_q_R), (largest_b_R, log_p_R) = softmax(a, q), softmax(b, p)
    match options.divergence:
        case "forward-kl":
            m, rest_R = _difference(b, largest_b_R, a, largest_a_R, m)
            return _weighted_mean(p, m, b) - rest_R + (log_p_R - log_q_R), torch.sub(q, p, out=q)
        case "reverse-kl":
            m, rest_R = _difference(a, largest_a_R, b, largest_b_R, m)
            mean_R = _weighted_mean(q, m, b)
            return mean_R - rest_R + (log_q_R - log_p_R), q.mul_(m.sub_(mean_R[:, None]))
        case "jsd":
            beta = options.beta
            torch.mul(q, 1 - beta, out=m).add_(p, alpha=beta).log_()
            b.sub_(largest_b_R[:, None]).add_(log_p_R[:, None]).sub_(m)
            a.sub_(largest_a_R[:, None]).add_(log_q_R[:, None]).sub_(m)
            teacher_R, student_R = _weighted_mean(p, b, m), _weighted_mean(q, a, m)
            return beta * teacher_R + (1 - beta) * student_R, q.mul_(a.sub_(student_R[:, None])).mul_(1 - beta)


def _sparse_soft_block(a_RV: Tensor, out_RV: Tensor, teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
    """Return (D of each row [R], its gradient in student / T [R, V], in out_RV) from student / T in a_RV (overwritten)."""
    log_p_RK, tail_R = teacher.normalised(a_RV.dtype)
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
    rest_R = log_q_rest_R.exp() - tail_R
    out_RV.mul_(rest_R[:, None])
    if a_RV.device.type != "cpu" or bool(empty_R.any()):
        out_RV.masked_fill_((empty_R & ~torch.isnan(rest_R))[:, None], 0.0)
    g_RK = (log_q_RK.exp() - p_RK).masked_fill_(unused_RK, 0.0)
    return soft_R, out_RV.scatter_add_(1, indices_RK, g_RK)


def _weighed_soft_block(
    block: list[Tensor], listed: SparseTeacher | None, weights_R: Tensor | None, options: DistillOptions, terms_R2: Tensor
) -> Tensor:
    """Write a block's soft term into terms_R2 and return its gradient in the student's logits at temperature 1.

    Those are in block[0], and the teacher's in block[1] unless it is a list.
    """
    temperature = options.temperature
    if temperature != 1.0:
        for logits_RV in block[: 2 if listed is None else 1]:
            logits_RV.mul_(1 / temperature)
    soft_R, g_RV = _soft_block(block, options) if listed is None else _sparse_soft_block(block[0], block[1], listed)
    soft_R = soft_R * temperature**2
    if weights_R is not None:
        soft_R = torch.where(weights_R == 0, 0, weights_R * soft_R)
    terms_R2[:, 0] = soft_R
    if options.soft == 0:
        return g_RV.zero_()
    if weights_R is None:
        return g_RV.mul_(options.soft * temperature)
    factor_R1 = (weights_R * (options.soft * temperature))[:, None]
    return g_RV.mul_(factor_R1).masked_fill_(factor_R1 == 0, 0.0)


def distill_rows_torch(
    student_NV: Tensor,
    teacher: Tensor | SparseTeacher | None,
    targets: Targets,
    options: DistillOptions,
    *,
    terms_N2: Tensor,
    grad_NV: Tensor | None,
) -> None:
    """Write each row's (soft, hard) into terms_N2 and the gradient of its part of `total` into grad_NV.

    teacher: logits [N, V], a list, or None, and then the soft term is 0. grad_NV may be student_NV itself, whose
    logits are then gone. terms_N2 has the wide dtype. Raises ValueError for labels and tokens of a list that are
    outside of the vocabulary (on the CPU; looking at them on a GPU would be a wait).
    """
    rows, device, wide = student_NV.shape[0], student_NV.device, terms_N2.dtype
    width = options.width(student_NV.shape[1], teacher.shape[1] if isinstance(teacher, Tensor) else None)
    if rows == 0:
        return
    if isinstance(teacher, SparseTeacher) and device.type == "cpu":
        advice = "; make the list with top_k(..., columns=...) where the teacher's vocabulary is wider"
        _check_range("the teacher's tokens must lie in 0 ... {last}, got {wrong}" + advice, teacher.indices_NK, width)
    # Buffers of a block, which every block uses anew: the sides' logits, what the soft block makes, last the hard gradient.
    largest = next(blocks(rows, width, device))[1]
    buffers = [buffer((largest, width), wide, device) for _ in range(6 if isinstance(teacher, Tensor) else 3)]
    for at_R, labels_R in _selections(targets.labels_N, options.ignore_index, rows, width, device):
        student_RV, terms_R2 = take_rows(student_NV[:, :width], at_R), terms_N2[at_R]
        block = [spare[: len(student_RV)] for spare in buffers]
        hard = _hard_rows(student_RV, labels_R, options, terms_R2, block[0], block[-1])
        # The soft term, and its gradient in the student's capped logits.
        if teacher is None:
            terms_R2[:, 0] = 0.0
            g_RV = block[1].zero_()
        else:
            load(block[0], student_RV, options.student_scale, options.student_softcap)
            listed = teacher.rows(at_R) if isinstance(teacher, SparseTeacher) else None
            if isinstance(teacher, Tensor):
                load(block[1], take_rows(teacher[:, :width], at_R), options.teacher_scale, options.teacher_softcap)
            weights_R = None if targets.weights_N is None else targets.weights_N[at_R].to(wide)
            g_RV = _weighed_soft_block(block, listed, weights_R, options, terms_R2)
        # Numbered rows were copied: back to their places.
        if not isinstance(at_R, slice):
            terms_N2[at_R] = terms_R2
        if grad_NV is None:
            continue
        # Both terms' gradients, back through cap and scale to the logits that came in.
        if hard is not None:
            g_RV.index_add_(0, *hard)
        if options.student_softcap is not None:
            _cap_gradient(g_RV, load(block[0], student_RV, options.student_scale, options.student_softcap), options)
        if options.student_scale != 1.0:
            g_RV.mul_(options.student_scale)
        if isinstance(at_R, slice):
            grad_NV[at_R, :width].copy_(g_RV)
        else:
            grad_NV[:, :width].index_copy_(0, at_R, g_RV.to(grad_NV.dtype))
    if grad_NV is not None:
        grad_NV[:, width:].zero_()


def _cap_gradient(g_RV: Tensor, x_RV: Tensor, options: DistillOptions) -> None:
    """The gradient in capped logits x (overwritten) into that in the logits before: d cap tanh(x / cap) = 1 - tanh^2."""
    assert options.student_softcap is not None
    none_RV = g_RV == 0
    g_RV.mul_(x_RV.mul_(1 / options.student_softcap).square_().neg_().add_(1.0))
    # Rows that are out stay out: x may be nan there.
    g_RV.masked_fill_(none_RV, 0.0)


def _selections(
    labels_N: Tensor | None, ignore_index: int, rows: int, width: int, device: torch.device
) -> Iterator[tuple[Any, Tensor | None]]:
    """Rows of each block, and their labels (None: they have none).

    On the CPU labelled rows share blocks: one here and there would be worked on by one core.
    """
    if labels_N is None or device.type != "cpu":
        for first, end in blocks(rows, width, device):
            yield slice(first, end), None if labels_N is None else labels_N[first:end]
        return
    labelled_N = labels_N != ignore_index
    count = int(labelled_N.sum())
    if bool(labelled_N[:count].all()):
        for first, end in blocks(count, width, device):
            yield slice(first, end), labels_N[first:end]
        for first, end in blocks(rows - count, width, device):
            yield slice(count + first, count + end), None
        return
    for numbers_M, has in ((labelled_N.nonzero().squeeze(1), True), ((~labelled_N).nonzero().squeeze(1), False)):
        for first, end in blocks(len(numbers_M), width, device):
            at_R = numbers_M[first:end]
            yield at_R, labels_N[at_R] if has else None


def _hard_rows(
    student_RV: Tensor, labels_R: Tensor | None, options: DistillOptions, terms_R2: Tensor, x_RV: Tensor, q_RV: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The labelled rows' hard terms into terms_R2; (their numbers [M], their gradient [M, V]), None without any.

    x_RV is overwritten; the gradient is in q_RV.
    """
    terms_R2[:, 1] = 0.0
    if labels_R is None:
        return None
    labelled_R = labels_R != options.ignore_index
    if labels_R.device.type == "cpu":
        rows_M = labelled_R.nonzero().squeeze(1)
        if len(rows_M) == 0:
            return None
    else:
        rows_M = torch.arange(len(labels_R), device=labels_R.device)  # all of them: how many have labels is not known here
    every, x_MV, q_MV = len(rows_M) == len(labels_R), x_RV[: len(rows_M)], q_RV[: len(rows_M)]
    logits_MV = student_RV if every else student_RV.index_select(0, rows_M)
    load(x_MV, logits_MV, options.student_scale, options.student_softcap)
    has_M = labelled_R.index_select(0, rows_M)
    target_M1 = labels_R.index_select(0, rows_M).where(has_M, 0)[:, None]
    if labels_R.device.type == "cpu":
        message = "labels must lie in 0 ... {last} or be options.ignore_index, got {wrong}"
        _check_range(message, target_M1, student_RV.shape[1])
    x_M = x_MV.gather(1, target_M1).squeeze(1)
    largest_M, log_q_M = softmax(x_MV, q_MV)
    terms_R2[:, 1].index_copy_(0, rows_M, torch.where(has_M, largest_M - x_M - log_q_M, 0))
    if options.hard == 0:
        return None
    q_MV.mul_(options.hard)
    # In the wide dtype: q - 1 cancels for a label that is nearly certain.
    q_MV.scatter_add_(1, target_M1, q_MV.new_full(target_M1.shape, -options.hard))
    if labels_R.device.type != "cpu":
        q_MV.masked_fill_(~has_M[:, None], 0.0)
    return rows_M, q_MV


def _check_range(message: str, columns: Tensor, width: int) -> None:
    """Refuse numbers of columns out of range; on the CPU only, as looking at them on a GPU would be a wait.

    Raises ValueError. What happens to labels out of range on a GPU is said in `distill_loss`.
    """
    least, largest = int(columns.min()), int(columns.max())
    if least < 0 or largest >= width:
        raise ValueError(message.format(last=width - 1, wrong=least if least < 0 else largest))
