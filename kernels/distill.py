"""Distillation losses from logits: a temperature-scaled divergence to the teacher, and the labels' cross-entropy.

    soft = T^2 sum_n w_n D(p_n, q_n)           p = softmax(teacher / T), q = softmax(student / T)
    hard = sum_{n labelled} lse_n - student_n[label_n]          lse = log sum exp(student), at temperature 1
    total = c_soft soft + c_hard hard

    forward KL   D = sum_v p (log p - log q)            gradient, times T^2, in the student's logits:  T (q - p)
    reverse KL   D = sum_v q (log q - log p)                                                           T q (log q/p - D)
    JSD(beta)    D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
                                                                                T (1 - beta) q (log q/m - KL(q || m))
    hard: q_1 - onehot(label)           q_1 = softmax(student)

    Hinton, Vinyals, Dean 2015, section 2 (T^2); Gu et al. 2024, MiniLLM (reverse KL); Agarwal et al. 2024, GKD (JSD).

Value and gradient come from one pass over the logits, so the pass must know how the terms are weighed: the
coefficients c are arguments, `total` is what to differentiate, and soft, hard are for the log (they carry no
gradient). All are sums over rows: whoever calls puts the denominators, which one batch does not know, into
the coefficients.

Paths: `reference` (here: eager, any float dtype, differentiable twice: the specification), `triton`
(distill_triton.py: a GPU, or the CPU under TRITON_INTERPRET=1), `torch` (distill_torch.py: any device, made
for the CPU). The fast paths are deterministic and never wait for the device.

What has no finite value: a row with a +inf or nan logit, or with -inf in all columns of a side, has nan terms
and gradients. Where q = 0 < p the forward KL is +inf and its gradient finite; where p = 0 < q the reverse KL
is +inf and its gradient not finite. A label whose student logit is -inf has a hard term of +inf and a finite
gradient. A column that is -inf on both sides contributes nothing. Rows of weight 0 and rows without label
contribute exactly 0, whatever they hold.

Legend: N rows (tokens), V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistil.kernels.autograd import register_handover
from fastdistil.kernels.backend import Backend, chosen_backend
from fastdistil.kernels.cpu import buffer
from fastdistil.kernels.distill_options import (
    OPTIONS_SCHEMA,
    DistillOptions,
    DistillTerms,
    Divergence,
    SparseTeacher,
    Targets,
    low_precision_unit,
    pack,
    times,
    unpack,
)
from fastdistil.kernels.distill_torch import distill_rows_torch


def capped(logits_NV: Tensor, scale: float, softcap: float | None) -> Tensor:
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
            rows_N = times(log_p_NV.exp(), log_p_NV - log_q_NV).sum(-1)
        case "reverse-kl":
            rows_N = times(log_q_NV.exp(), log_q_NV - log_p_NV).sum(-1)
        case "jsd":
            p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
            # From the logarithms: where p and q both underflow, log(m) would be -inf and its gradient nan.
            # Where both are exactly 0 that holds for logaddexp too.
            neither_NV = torch.isneginf(log_p_NV) & torch.isneginf(log_q_NV)
            log_m_NV = torch.logaddexp(
                log_p_NV.masked_fill(neither_NV, 0.0) + math.log(beta),
                log_q_NV.masked_fill(neither_NV, 0.0) + math.log1p(-beta),
            )
            rows_N = (beta * times(p_NV, log_p_NV - log_m_NV) + (1 - beta) * times(q_NV, log_q_NV - log_m_NV)).sum(-1)
    return temperature**2 * rows_N


def _sparse_divergence_reference(student_NV: Tensor, teacher: SparseTeacher, *, temperature: float = 1.0) -> Tensor:
    """Return sparse_distill.py's bracket times temperature squared, [N], float32 or wider; differentiable in the student."""
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    # Normalised first: differences of log_softmax keep the digits that a common offset of the logits takes.
    log_q_NV = (student_NV.to(wide) / temperature).log_softmax(-1)
    log_p_NK, tail_N = teacher.normalised(wide)
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


def distill_loss_reference(
    student_NV: Tensor,
    teacher: Tensor | SparseTeacher | None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
) -> DistillTerms:
    """Specify `distill_loss` and `sparse_distill_loss`; differentiable in logits and weights, twice.

    Without a teacher the soft term is 0.
    """
    width = options.width(student_NV.shape[1], teacher.shape[1] if isinstance(teacher, Tensor) else None)
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    student_NV = student_NV[:, :width].to(wide)
    zero = student_NV.new_zeros(())
    soft, hard = zero, zero

    # Rows that do not enter a term are replaced before its arithmetic: 0 times the gradient of a nan would be nan.
    def weighed(tensor: Tensor) -> Tensor:
        if weights_N is None:
            return tensor
        out_N = weights_N == 0
        return tensor.masked_fill(out_N if tensor.ndim == 1 else out_N[:, None], 0.0)

    if teacher is not None:
        soft_NV = capped(weighed(student_NV), options.student_scale, options.student_softcap)
        if isinstance(teacher, SparseTeacher):
            tail_N = None if teacher.tail_N is None else weighed(teacher.tail_N)
            listed = SparseTeacher(teacher.indices_NK, weighed(teacher.log_probabilities_NK), tail_N)
            rows_N = _sparse_divergence_reference(soft_NV, listed, temperature=options.temperature)
        else:
            teacher_NV = capped(weighed(teacher[:, :width].to(wide)), options.teacher_scale, options.teacher_softcap)
            rows_N = divergence_reference(
                soft_NV, teacher_NV, temperature=options.temperature, divergence=options.divergence, beta=options.beta
            )
        soft = rows_N.sum() if weights_N is None else (weights_N * rows_N).sum()
    if labels_N is not None:
        labelled_N = labels_N != options.ignore_index
        hard_NV = student_NV.masked_fill(~labelled_N[:, None], 0.0)
        hard_NV = capped(hard_NV, options.student_scale, options.student_softcap)
        hard = F.cross_entropy(hard_NV, labels_N, ignore_index=options.ignore_index, reduction="sum")
    return _terms(soft, hard, options)


def _terms(soft: Tensor, hard: Tensor, options: DistillOptions) -> DistillTerms:
    """A term of coefficient 0 is left out of the total, even where it is infinite."""
    weighed = ((options.soft, soft), (options.hard, hard))
    total = sum((coefficient * term for coefficient, term in weighed if coefficient), torch.zeros_like(soft))
    return DistillTerms(total, soft.detach(), hard.detach())


# ---- the op ----


def rows_function(backend: str, teacher: object) -> Any:
    """Return distill_rows_torch, or its Triton counterpart for this kind of teacher, with the same arguments."""
    if backend == "torch":
        return distill_rows_torch
    if isinstance(teacher, SparseTeacher):
        from fastdistil.kernels.sparse_distill_triton import sparse_distill_rows_triton

        return sparse_distill_rows_triton
    from fastdistil.kernels.distill_triton import distill_rows_triton

    return distill_rows_triton


@torch.library.custom_op(
    "fastdistil::distill",
    mutates_args=(),
    schema="(Tensor student, Tensor? teacher, Tensor? indices, Tensor? log_probabilities, Tensor? tail, Tensor? labels, "
    f"Tensor? weights, bool need_grad, str backend, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _distill(
    student_NV: Tensor,
    logits_NV: Tensor | None,
    indices_NK: Tensor | None,
    log_probabilities_NK: Tensor | None,
    tail_N: Tensor | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    need_grad: bool,
    backend: str,
    *packed: Any,
) -> tuple[Tensor, ...]:
    options = unpack(packed)
    teacher: Any = logits_NV if logits_NV is not None else SparseTeacher(indices_NK, log_probabilities_NK, tail_N)  # type: ignore[arg-type]
    terms_N2 = student_NV.new_empty(student_NV.shape[0], 2, dtype=torch.promote_types(student_NV.dtype, torch.float32))
    grad_NV = buffer(student_NV.shape, student_NV.dtype, student_NV.device) if need_grad else None
    scaled, _ = low_precision_unit(options, student_NV.dtype)
    write_rows = rows_function(backend, teacher)
    write_rows(student_NV, teacher, Targets(labels_N, weights_N), scaled, terms_N2=terms_N2, grad_NV=grad_NV)
    return *sum_terms(terms_N2, options), student_NV.new_empty(0) if grad_NV is None else grad_NV


def sum_terms(terms_N2: Tensor, options: DistillOptions) -> DistillTerms:
    """The rows' sums, each in storage of its own."""
    soft, hard = (term.clone() for term in terms_N2.sum(0))
    return _terms(soft, hard, options)


@_distill.register_fake
def _(student_NV: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, need_grad = arguments[:7]
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    scalars = tuple(student_NV.new_empty((), dtype=wide) for _ in range(3))
    return *scalars, student_NV.new_empty(student_NV.shape if need_grad else 0)


register_handover(_distill, leaves=1)


def distill_loss(
    student_NV: Tensor,
    teacher: Tensor | SparseTeacher,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: DistillOptions,
    backend: Backend = "auto",
) -> DistillTerms:
    """Return the divergence to the teacher and the cross-entropy of logits, with the gradient from the same pass.

    student_NV, teacher: float, [N, V] (see `options.columns` where V differs); rows may lie apart, columns
    must be adjacent. A list of the teacher's likeliest tokens: see sparse_distill.py.
    labels_N: int64, 0 to columns - 1, or options.ignore_index where there is none; None: no hard term.
    weights_N: float, of the soft term.
    Labels out of range: the CPU's path raises ValueError and the reference IndexError; the Triton path, which
    never looks at labels on the host, gives a hard term of +inf and the gradient of a label that is none of
    the columns; the torch path on a GPU ends in torch's device-side assertion.
    Only the student's logits get a gradient, once: differentiating twice, or the teacher, needs
    backend="reference". Raises ValueError for shapes, dtypes and paths that do not fit.
    """
    listed = teacher if isinstance(teacher, SparseTeacher) else None
    teacher_NV = teacher if isinstance(teacher, Tensor) else None
    check_rows(student_NV, teacher_NV, Targets(labels_N, weights_N))
    if listed is not None:
        check_teacher(student_NV, listed, options)
    width = options.width(student_NV.shape[1], None if teacher_NV is None else teacher_NV.shape[1])
    if backend == "reference":
        return distill_loss_reference(student_NV, teacher, labels_N, weights_N, options=options)
    constants = (teacher_NV, *(listed or ()), weights_N)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in constants):
        raise ValueError(
            "only the student's logits get a gradient: detach the teacher's and the weights, or use backend='reference'"
        )
    for name, logits in (("student", student_NV), ("teacher", teacher_NV)):
        if logits is not None and logits.stride(1) != 1 and width > 1:
            raise ValueError(f"the {name}'s logits have strides {logits.stride()}; adjacent columns are needed: .contiguous()")
    need_grad, chosen = torch.is_grad_enabled() and student_NV.requires_grad, chosen_backend(backend, student_NV.device)
    teachers = (teacher_NV, *(listed or (None, None, None)))
    *terms, _ = _distill(student_NV, *teachers, labels_N, weights_N, need_grad, chosen, *pack(options))
    return DistillTerms(*terms)


def check_rows(student: Tensor, teacher: Tensor | None, targets: Targets) -> None:
    """Check shapes, dtypes and devices of what every op of this family takes. Raises ValueError."""
    labels_N, weights_N = targets
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


def check_teacher(student: Tensor, teacher: SparseTeacher, options: DistillOptions) -> None:
    """Check what a sparse teacher asks beyond check_rows. Raises ValueError."""
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
    # The list's shapes, dtypes and device.
    indices, log_probabilities, tail = teacher
    rows = student.shape[0]
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
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device} as the student's logits are, got {tensor.device}")


# ---- what it costs ----


def bytes_moved(rows: int, columns: int, itemsize: int, *, gradient: bool = True) -> int:
    """Bytes that must cross the memory bus: both logits read once, the gradient written once."""
    return (3 if gradient else 2) * rows * columns * itemsize
