"""Distillation losses from logits: a temperature-scaled divergence to the teacher, the labels' cross-entropy, a z-loss.

    soft = T^2 sum_n w_n D(p_n, q_n)           p = softmax(teacher / T), q = softmax(student / T)
    hard = sum_{n labelled} lse_n - student_n[label_n]          lse = log sum exp(student), at temperature 1
    z    = sum_{n labelled} lse_n^2                             de Brebisson, Vincent 2016; PaLM (Chowdhery et al. 2022)
    total = c_soft soft + c_hard hard + c_z z

    forward KL   D = sum_v p (log p - log q)            gradient, times T^2, in the student's logits:  T (q - p)
    reverse KL   D = sum_v q (log q - log p)                                                           T q (log q/p - D)
    JSD(beta)    D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
                                                                                T (1 - beta) q (log q/m - KL(q || m))
    hard: q_1 - onehot(label);  z: 2 lse q_1           q_1 = softmax(student)

    Hinton, Vinyals, Dean 2015, section 2 (T^2); Gu et al. 2024, MiniLLM (reverse KL); Agarwal et al. 2024, GKD (JSD).

Value and gradient come from one pass over the logits, so the pass must know how the terms are weighed: the coefficients c are
arguments, `total` is what to differentiate, and soft, hard, z are for the log (they carry no gradient). All are sums over
rows: whoever calls puts the denominators, which one batch does not know, into the coefficients.

Paths: `reference` (eager, any float dtype, differentiable twice: the specification), `triton` (GPU; or the CPU under
TRITON_INTERPRET=1), `torch` (any device; made for the CPU: blocks of rows that stay in the cache, nothing of size [N, V] but
the gradient). The fast paths are deterministic and never wait for the device.

What has no finite value: a row with a +inf or nan logit, or with -inf in all columns of a side, has nan terms and gradients.
Where q = 0 < p the forward KL is +inf and its gradient finite; where p = 0 < q the reverse KL is +inf and its gradient not
finite. A label whose student logit is -inf has a hard term of +inf and a finite gradient. A column that is -inf on both sides
contributes nothing. Rows of weight 0 and rows without label contribute exactly 0, whatever they hold.

Legend: N rows (tokens), V vocabulary, R rows of a block.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistil.kernels.buffers import buffer
from fastdistil.kernels.handover import Path, chosen_path, hand_gradients, keep_gradients
from fastdistil.kernels.options import OPTIONS_SCHEMA, DistillOptions, DistillTerms, Divergence, pack, unpack


def _times(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference with 0 * inf = 0, as the limit has it, in the gradient too."""
    return p * torch.where(p > 0, difference, 0)


def _capped(logits_NV: Tensor, scale: float, softcap: float | None) -> Tensor:
    scaled: Tensor = logits_NV if scale == 1.0 else logits_NV * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def divergence_reference(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward-kl",
    beta: float = 0.5,
) -> Tensor:
    """D(teacher, student) of each row times temperature squared, [N], float32 or wider. Differentiable in both."""
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    log_q_NV = (student_NV.to(wide) / temperature).log_softmax(-1)
    log_p_NV = (teacher_NV.to(wide) / temperature).log_softmax(-1)
    match divergence:
        case "forward-kl":
            rows_N = _times(log_p_NV.exp(), log_p_NV - log_q_NV).sum(-1)
        case "reverse-kl":
            rows_N = _times(log_q_NV.exp(), log_q_NV - log_p_NV).sum(-1)
        case "jsd":
            p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
            # From the logarithms: where p and q both underflow, log(m) would be -inf and its gradient nan. Where both are
            # exactly 0 that holds for logaddexp too.
            neither_NV = torch.isneginf(log_p_NV) & torch.isneginf(log_q_NV)
            log_m_NV = torch.logaddexp(
                log_p_NV.masked_fill(neither_NV, 0.0) + math.log(beta),
                log_q_NV.masked_fill(neither_NV, 0.0) + math.log1p(-beta),
            )
            rows_N = (beta * _times(p_NV, log_p_NV - log_m_NV) + (1 - beta) * _times(q_NV, log_q_NV - log_m_NV)).sum(-1)
    return temperature**2 * rows_N


def distill_loss_reference(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
) -> DistillTerms:
    """The specification of `distill_loss`; differentiable in both logits and the weights, twice.

    Without a teacher the soft term is 0.
    """
    width = options.width(student_NV.shape[1], student_NV.shape[1] if teacher_NV is None else teacher_NV.shape[1])
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    student_NV = student_NV[:, :width].to(wide)
    zero = student_NV.new_zeros(())
    soft, hard, z = zero, zero, zero
    # Rows that do not enter a term are replaced before its arithmetic: 0 times the gradient of a nan would be nan.
    if teacher_NV is not None:
        soft_NV, teacher_NV = student_NV, teacher_NV[:, :width].to(wide)
        if weights_N is not None:
            out_N1 = (weights_N == 0)[:, None]
            soft_NV, teacher_NV = soft_NV.masked_fill(out_N1, 0.0), teacher_NV.masked_fill(out_N1, 0.0)
        soft_NV = _capped(soft_NV, options.student_scale, options.student_softcap)
        teacher_NV = _capped(teacher_NV, options.teacher_scale, options.teacher_softcap)
        rows_N = divergence_reference(
            soft_NV, teacher_NV, temperature=options.temperature, divergence=options.divergence, beta=options.beta
        )
        soft = rows_N.sum() if weights_N is None else (weights_N * rows_N).sum()
    if labels_N is not None:
        labelled_N = labels_N != options.ignore_index
        hard_NV = student_NV.masked_fill(~labelled_N[:, None], 0.0)
        hard_NV = _capped(hard_NV, options.student_scale, options.student_softcap)
        hard = F.cross_entropy(hard_NV, labels_N, ignore_index=options.ignore_index, reduction="sum")
        z = (hard_NV.logsumexp(-1).square() * labelled_N).sum()
    return _terms(soft, hard, z, options)


def _terms(soft: Tensor, hard: Tensor, z: Tensor, options: DistillOptions) -> DistillTerms:
    """A term of coefficient 0 is left out of the total, even where it is infinite."""
    weighed = ((options.soft, soft), (options.hard, hard), (options.z, z))
    total = sum((coefficient * term for coefficient, term in weighed if coefficient), torch.zeros_like(soft))
    return DistillTerms(total, soft.detach(), hard.detach(), z.detach())


# ---- the fast path in torch: blocks of rows that stay in the cache ----

# float32 elements of one block's buffer. Five buffers of 1 MiB are streamed through the second- and third-level caches;
# halving or doubling it costs a tenth on the processors measured (benchmarks/test_kernels.py), dispatching single rows twice.
_BLOCK = 2**18
# On a GPU blocks only bound the memory.
_BLOCK_GPU = 2**27


def _blocks(rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    size = max(1, (_BLOCK if device.type == "cpu" else _BLOCK_GPU) // width)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


class _Block:
    """Buffers [R, V] of one block, written in place; the arithmetic of a row in vectorised sweeps over them.

    Softmax is one fused sweep of torch's; the normaliser comes back from the largest probability, which is at least 1/V.
    """

    def __init__(self, rows: int, width: int, wide: torch.dtype, device: torch.device) -> None:
        self._buffers = [buffer((rows, width), wide, device) for _ in range(6)]

    def first(self, rows: int) -> list[Tensor]:
        return [buffer[:rows] for buffer in self._buffers]


def _load(out_RV: Tensor, logits_RV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits as the loss sees them at temperature 1, in out_RV."""
    out_RV.copy_(logits_RV)
    if softcap is not None:
        torch.tanh(out_RV.mul_(scale / softcap), out=out_RV)
        return out_RV.mul_(softcap)
    return out_RV if scale == 1.0 else out_RV.mul_(scale)


def _softmax(a_RV: Tensor, out_RV: Tensor) -> Tensor:
    """softmax(a) in out_RV; returns log sum exp(a), [R]."""
    torch.softmax(a_RV, -1, out=out_RV)
    return a_RV.amax(-1) - out_RV.amax(-1).log()


def _weighted_mean(p_RV: Tensor, x_RV: Tensor) -> Tensor:
    """sum_v p x, [R], with 0 where p = 0 and x is not finite: those x are set to 0 in place."""
    mean_R: Tensor = torch.linalg.vecdot(p_RV, x_RV)
    if x_RV.device.type != "cpu" or not bool(mean_R.isfinite().all()):
        x_RV.masked_fill_(p_RV == 0, 0.0)
        mean_R = torch.linalg.vecdot(p_RV, x_RV)
    return mean_R


def _soft_block(block: list[Tensor], options: DistillOptions) -> tuple[Tensor, Tensor]:
    """(D of each row [R], its gradient in student / T [R, V]) from student / T and teacher / T in block[0] and block[1]."""
    a, b, q, p, m, _ = block
    lse_a_R, lse_b_R = _softmax(a, q), _softmax(b, p)
    match options.divergence:
        case "forward-kl":
            mean_R = _weighted_mean(p, torch.sub(b, a, out=m))
            return mean_R - lse_b_R + lse_a_R, torch.sub(q, p, out=q)
        case "reverse-kl":
            mean_R = _weighted_mean(q, torch.sub(a, b, out=m))
            return mean_R - lse_a_R + lse_b_R, q.mul_(m.sub_(mean_R[:, None]))
        case "jsd":
            beta = options.beta
            torch.mul(q, 1 - beta, out=m).add_(p, alpha=beta).log_()
            teacher_R = _weighted_mean(p, b.sub_(lse_b_R[:, None]).sub_(m))
            student_R = _weighted_mean(q, a.sub_(lse_a_R[:, None]).sub_(m))
            return beta * teacher_R + (1 - beta) * student_R, q.mul_(a.sub_(student_R[:, None])).mul_(1 - beta)


def _weighed_soft_block(block: list[Tensor], weights_R: Tensor | None, options: DistillOptions, terms_R3: Tensor) -> Tensor:
    """The soft term of a block, whose logits at temperature 1 are in block[0] and block[1]; its gradient in the student's."""
    temperature = options.temperature
    if temperature != 1.0:
        block[0].mul_(1 / temperature)
        block[1].mul_(1 / temperature)
    soft_R, g_RV = _soft_block(block, options)
    soft_R = soft_R * temperature**2
    if weights_R is not None:
        soft_R = torch.where(weights_R == 0, 0, weights_R * soft_R)
    terms_R3[:, 0] = soft_R
    if options.soft == 0:
        return g_RV.zero_()
    if weights_R is None:
        return g_RV.mul_(options.soft * temperature)
    factor_R1 = (weights_R * (options.soft * temperature))[:, None]
    return g_RV.mul_(factor_R1).masked_fill_(factor_R1 == 0, 0.0)


def distill_rows_torch(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    options: DistillOptions,
    terms_N3: Tensor,
    grad_NV: Tensor | None,
) -> None:
    """Writes each row's (soft, hard, z) into terms_N3 and the gradient of its part of `total` into grad_NV.

    grad_NV may be student_NV itself, whose logits are then gone. terms_N3 has the wide dtype. Without a teacher the soft
    term is 0.
    """
    rows, device, wide = student_NV.shape[0], student_NV.device, terms_N3.dtype
    width = options.width(student_NV.shape[1], student_NV.shape[1] if teacher_NV is None else teacher_NV.shape[1])
    if rows == 0:
        return
    largest = next(_blocks(rows, width, device))[1]
    buffers = _Block(largest, width, wide, device)
    for at_R, labels_R in _selections(labels_N, options.ignore_index, rows, width, device):
        student_RV, terms_R3 = _rows(student_NV[:, :width], at_R), terms_N3[at_R]
        block = buffers.first(len(student_RV))
        hard = _hard_rows(student_RV, labels_R, options, terms_R3, block[0], block[5])
        if teacher_NV is None:
            terms_R3[:, 0] = 0.0
            g_RV = block[2].zero_()
        else:
            _load(block[0], student_RV, options.student_scale, options.student_softcap)
            _load(block[1], _rows(teacher_NV[:, :width], at_R), options.teacher_scale, options.teacher_softcap)
            g_RV = _weighed_soft_block(block, None if weights_N is None else weights_N[at_R].to(wide), options, terms_R3)
        if not isinstance(at_R, slice):
            terms_N3[at_R] = terms_R3
        if grad_NV is None:
            continue
        if hard is not None:
            g_RV.index_add_(0, *hard)
        if options.student_softcap is not None:
            cap_gradient(g_RV, _load(block[0], student_RV, options.student_scale, options.student_softcap), options)
        if options.student_scale != 1.0:
            g_RV.mul_(options.student_scale)
        if isinstance(at_R, slice):
            grad_NV[at_R, :width].copy_(g_RV)
        else:
            grad_NV[:, :width].index_copy_(0, at_R, g_RV.to(grad_NV.dtype))
    if grad_NV is not None:
        grad_NV[:, width:].zero_()


def cap_gradient(g_RV: Tensor, x_RV: Tensor, options: DistillOptions) -> None:
    """The gradient in capped logits x (overwritten) into that in the logits before: d cap tanh(x / cap) = 1 - tanh^2."""
    assert options.student_softcap is not None
    none_RV = g_RV == 0
    g_RV.mul_(x_RV.mul_(1 / options.student_softcap).square_().neg_().add_(1.0))
    # Rows that are out stay out: x may be nan there.
    g_RV.masked_fill_(none_RV, 0.0)


def _rows(values_NV: Tensor, at_R: slice | Tensor) -> Tensor:
    return values_NV[at_R] if isinstance(at_R, slice) else values_NV.index_select(0, at_R)


def _selections(
    labels_N: Tensor | None, ignore_index: int, rows: int, width: int, device: torch.device
) -> Iterator[tuple[Any, Tensor | None]]:
    """Rows of each block, and their labels (None: they have none).

    On the CPU labelled rows share blocks: one here and there would be worked on by one core.
    """
    labelled_M = None
    if labels_N is not None and device.type == "cpu":
        labelled_N = labels_N != ignore_index
        labelled_M = labelled_N.nonzero().squeeze(1)
    if labels_N is None or labelled_M is None or len(labelled_M) in (0, rows):
        none = labelled_M is not None and len(labelled_M) == 0
        for first, end in _blocks(rows, width, device):
            yield slice(first, end), None if labels_N is None or none else labels_N[first:end]
        return
    for numbers_M, has in ((labelled_M, True), ((~labelled_N).nonzero().squeeze(1), False)):
        for first, end in _blocks(len(numbers_M), width, device):
            at_R = numbers_M[first:end]
            yield at_R, labels_N[at_R] if has else None


def _hard_rows(
    student_RV: Tensor, labels_R: Tensor | None, options: DistillOptions, terms_R3: Tensor, x_RV: Tensor, q_RV: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The labelled rows' hard and z terms into terms_R3; (their numbers [M], their gradient [M, V]), None without any.

    x_RV is overwritten; the gradient is in q_RV.
    """
    terms_R3[:, 1:].zero_()
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
    _load(x_MV, logits_MV, options.student_scale, options.student_softcap)
    has_M = labelled_R.index_select(0, rows_M)
    target_M1 = labels_R.index_select(0, rows_M).where(has_M, 0)[:, None]
    if labels_R.device.type == "cpu":
        check_labels(target_M1, student_RV.shape[1])
    x_M = x_MV.gather(1, target_M1).squeeze(1)
    lse_M = _softmax(x_MV, q_MV)
    terms_R3[:, 1].index_copy_(0, rows_M, torch.where(has_M, lse_M - x_M, 0))
    terms_R3[:, 2].index_copy_(0, rows_M, torch.where(has_M, lse_M.square(), 0))
    if options.hard == options.z == 0:
        return None
    q_MV.mul_((options.hard + 2 * options.z * lse_M)[:, None])
    # In the wide dtype: q - 1 cancels for a label that is nearly certain.
    q_MV.scatter_add_(1, target_M1, q_MV.new_full(target_M1.shape, -options.hard))
    if labels_R.device.type != "cpu":
        q_MV.masked_fill_(~has_M[:, None], 0.0)
    return rows_M, q_MV


def check_labels(labels: Tensor, width: int) -> None:
    """Labels on the CPU, without those to ignore. On a GPU looking at them would be a wait: there the term is nan."""
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or largest >= width:
        raise ValueError(f"labels must lie in 0 ... {width - 1}, got {least if least < 0 else largest}")


# ---- the op ----

# The largest gradient at weight 1: 1/V of a vocabulary of 2^18 is then a normal number, and weights up to 500 do not overflow.
_FLOAT16_HEADROOM = 64.0


def low_precision_unit(options: DistillOptions, dtype: torch.dtype) -> tuple[DistillOptions, float]:
    """(options to compute a gradient in `dtype` with, what to multiply it with afterwards, in float32).

    float16 ends at 6e-8: a gradient of 1/V over 16384 tokens would be 0 before a loss scale reaches it. So there the
    coefficients of the gradient are divided by the largest, and multiplied by a constant that leaves room for weights; the
    quotient is folded into backward.
    """
    unit = max(abs(options.soft) * options.temperature, abs(options.hard), abs(options.z)) / _FLOAT16_HEADROOM
    if dtype != torch.float16 or unit == 0:
        return options, 1.0
    return dataclasses.replace(options, soft=options.soft / unit, hard=options.hard / unit, z=options.z / unit), unit


def rows_function(path: str) -> Any:
    """distill_rows_torch, or its Triton counterpart with the same arguments."""
    if path == "torch":
        return distill_rows_torch
    from fastdistil.kernels.distill_triton import distill_rows_triton

    return distill_rows_triton


@torch.library.custom_op(
    "fastdistil::distill",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor? labels, Tensor? weights, bool need_grad, str path, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _distill(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    need_grad: bool,
    path: str,
    *packed: Any,
) -> tuple[Tensor, ...]:
    options = unpack(packed)
    terms_N3 = student_NV.new_empty(student_NV.shape[0], 3, dtype=torch.promote_types(student_NV.dtype, torch.float32))
    grad_NV = buffer(student_NV.shape, student_NV.dtype, student_NV.device) if need_grad else None
    scaled, _ = low_precision_unit(options, student_NV.dtype)
    rows_function(path)(student_NV, teacher_NV, labels_N, weights_N, scaled, terms_N3, grad_NV)
    return *sum_terms(terms_N3, options), student_NV.new_empty(0) if grad_NV is None else grad_NV


def sum_terms(terms_N3: Tensor, options: DistillOptions) -> DistillTerms:
    """The rows' sums, each in storage of its own."""
    soft, hard, z = (each.clone() for each in terms_N3.sum(0))
    return _terms(soft, hard, z, options)


@_distill.register_fake
def _(student_NV: Tensor, teacher_NV: Tensor, labels_N: Any, weights_N: Any, need_grad: bool, path: str, *packed: Any) -> Any:
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    scalars = tuple(student_NV.new_empty((), dtype=wide) for _ in range(4))
    return *scalars, student_NV.new_empty(student_NV.shape if need_grad else 0)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student_NV, packed = inputs[0], inputs[6:]
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    keep_gradients(ctx, output[4:], low_precision_unit(unpack(packed), student_NV.dtype)[1])


def _hand_gradient(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (grad_NV,) = hand_gradients(ctx, grad_total)
    return grad_NV, *(None,) * (ctx.inputs - 1)


_distill.register_autograd(_hand_gradient, setup_context=_keep_gradient)


def distill_loss(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
    path: Path = "auto",
) -> DistillTerms:
    """Divergence to the teacher, cross-entropy and z-loss of logits, with the gradient from the same pass.

    student_NV, teacher_NV: float, [N, V] (see `options.columns` where V differs); rows may lie apart, columns must be adjacent.
    labels_N: int64, options.ignore_index where there is none; None: no hard and no z term. weights_N: float, of the soft term.
    Only the student's logits get a gradient, once: differentiating twice, or the teacher, needs path="reference".
    Raises ValueError for shapes, dtypes and paths that do not fit.
    """
    check_rows(student_NV, teacher_NV, labels_N, weights_N)
    width = options.width(student_NV.shape[1], teacher_NV.shape[1])
    if path == "reference":
        return distill_loss_reference(student_NV, teacher_NV, labels_N, weights_N, options=options)
    if torch.is_grad_enabled() and (teacher_NV.requires_grad or (weights_N is not None and weights_N.requires_grad)):
        raise ValueError(
            "only the student's logits get a gradient: detach the teacher's and the weights, or use path='reference'"
        )
    for name, logits in (("student", student_NV), ("teacher", teacher_NV)):
        if logits.stride(1) != 1 and width > 1:
            raise ValueError(f"the {name}'s logits have strides {logits.stride()}; adjacent columns are needed: .contiguous()")
    need_grad = torch.is_grad_enabled() and student_NV.requires_grad
    *terms, _ = _distill(
        student_NV, teacher_NV, labels_N, weights_N, need_grad, chosen_path(path, student_NV.device), *pack(options)
    )
    return DistillTerms(*terms)


def check_rows(student: Tensor, teacher: Tensor | None, labels_N: Tensor | None, weights_N: Tensor | None) -> None:
    """Shapes, dtypes and devices of what every op of this family takes. Raises ValueError."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor is not None and (tensor.ndim != 2 or not tensor.is_floating_point()):
            raise ValueError(
                f"the {name}'s tensor must be floating-point [rows, width], got {tensor.dtype} {list(tensor.shape)}"
            )
    rows = student.shape[0]
    others = {"the teacher's tensor": teacher, "labels": labels_N, "weights": weights_N}
    for name, other in others.items():
        if other is None:
            continue
        if other.shape[0] != rows or (name != "the teacher's tensor" and other.ndim != 1):
            raise ValueError(f"{name} must have {rows} rows as the student's tensor has, got {list(other.shape)}")
        if other.device != student.device:
            raise ValueError(f"{name} must be on {student.device} as the student's tensor is, got {other.device}")
    if labels_N is not None and labels_N.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels_N.dtype}")
    if weights_N is not None and not weights_N.is_floating_point():
        raise ValueError(f"weights must be floating-point, got {weights_N.dtype}")


# ---- what it costs ----


def bytes_moved(rows: int, columns: int, itemsize: int, *, gradient: bool = True) -> int:
    """Bytes that must cross the memory bus: both logits read once, the gradient written once."""
    return (3 if gradient else 2) * rows * columns * itemsize


def flops(rows: int, columns: int, *, gradient: bool = True, labelled: int = 0) -> int:
    """Arithmetic of the element-wise part, an exponential counted as one: an order of magnitude; no GPU is bound by it."""
    return rows * columns * (14 if gradient else 10) + labelled * columns * (4 if gradient else 2)
