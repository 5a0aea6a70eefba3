"""Losses of hidden states: one minus the cosine to the teacher's, and the mean squared error; one or several layers at once.

    cosine = sum_l sum_n w_n (1 - c_ln)         c = s . t / sqrt((|s|^2 + eps) (|t|^2 + eps)),  eps = 1e-12
    mse    = sum_l sum_n w_n |s_ln - t_ln|^2 / D
    total  = c_cosine cosine + c_mse mse

    gradient of 1 - c in s:  -(t - (s . t) / (|s|^2 + eps) s) / sqrt((|s|^2 + eps) (|t|^2 + eps));  of mse:  2 (s - t) / D

torch's cosine_embedding_loss with target 1, epsilon included; Sanh et al. 2019 (DistilBERT) use it on the
last layer. Moves 3 N D elements a layer: both states are read and the gradient is written in one pass, as a
row fits on the chip. As in distill.py the coefficients are arguments, `total` is what to differentiate, and
cosine and mse are for the log.

A row of zeros has cosine 0 (loss 1) and, with eps, a gradient of -t / (1e-6 |t|): torch's. A row that is not
listed, or has weight 0, contributes exactly 0, whatever it holds. Where a squared norm overflows (|s| >
1.8e19 in float32) nothing comes out that means anything; torch's own formula ends sooner, at |s| |t| >
1.8e19.

Legend: L layers, N rows (tokens), M rows that count, D width (it may differ between layers), R rows of a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

from fastdistil.kernels.autograd import hand_gradients, keep_gradients
from fastdistil.kernels.backend import Backend, chosen_backend
from fastdistil.kernels.cpu import buffer

# torch's cosine_embedding_loss adds it to each squared norm.
_EPSILON = 1e-12


class HiddenTerms(NamedTuple):
    """0-dimensional sums over layers and rows, float32 or wider. `total` is differentiable; the others are for the log."""

    total: Tensor
    cosine: Tensor
    mse: Tensor


@dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """Coefficients of the terms in `total`."""

    cosine: float = 1.0
    mse: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cosine", "mse"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")


def _cosine_loss_reference(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    rows_M: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: HiddenOptions,
) -> HiddenTerms:
    """Specify `cosine_loss`, with its arguments but projections; differentiable in both sides, twice."""
    wide = torch.promote_types(student_states[0].dtype, torch.float32)
    cosine = mse = torch.zeros((), dtype=wide, device=student_states[0].device)
    for s_ND, t_ND in zip(student_states, teacher_states, strict=True):
        w_N, s, t = weights_N, s_ND, t_ND
        if rows_M is not None:
            s, t, w_N = (None if x is None else x.index_select(0, rows_M) for x in (s, t, w_N))  # type: ignore[assignment]
        if w_N is not None:
            # Replaced before the arithmetic: 0 times the gradient of a nan would be nan.
            out_N1 = (w_N == 0)[:, None]
            s, t = s.masked_fill(out_N1, 0.0), t.masked_fill(out_N1, 0.0)
        s, t = s.to(wide), t.to(wide)
        # Root by root: the product of squared norms overflows long before either does.
        norms_N = ((s * s).sum(-1) + _EPSILON).sqrt() * ((t * t).sum(-1) + _EPSILON).sqrt()
        cosine_N, mse_N = 1 - (s * t).sum(-1) / norms_N, (s - t).square().mean(-1)
        cosine = cosine + (cosine_N if w_N is None else w_N * cosine_N).sum()
        mse = mse + (mse_N if w_N is None else w_N * mse_N).sum()
    return _terms(cosine, mse, options)


def _terms(cosine: Tensor, mse: Tensor, options: HiddenOptions) -> HiddenTerms:
    weighed = ((options.cosine, cosine), (options.mse, mse))
    total = sum((coefficient * term for coefficient, term in weighed if coefficient), torch.zeros_like(cosine))
    return HiddenTerms(total, cosine.detach(), mse.detach())


# ---- the fast path in torch: blocks of rows that stay in the cache ----

_BLOCK = {"cpu": 2**19, "cuda": 2**26}  # elements


def _rows_torch(
    student_ND: Tensor,
    teacher_ND: Tensor,
    rows_M: Tensor | None,
    weights_M: Tensor | None,
    options: HiddenOptions,
    *,
    terms_M2: Tensor,
    grad_ND: Tensor | None,
) -> None:
    """Write each row's (1 - cosine, mean square) into terms_M2 and the gradient of its part of the total into grad_ND."""
    rows, width, wide = terms_M2.shape[0], student_ND.shape[1], terms_M2.dtype
    size = max(1, _BLOCK["cpu" if student_ND.device.type == "cpu" else "cuda"] // width)
    spare_RD = terms_M2.new_empty(min(size, rows), width)
    for first in range(0, rows, size):
        end = min(first + size, rows)
        here = slice(first, end) if rows_M is None else rows_M[first:end]
        # This block's rows [R, D] in the wide dtype, and a buffer for what is made of them.
        s, t, x = student_ND[here].to(wide), teacher_ND[here].to(wide), spare_RD[: end - first]
        # From the difference: |s|^2 + |t|^2 - 2 s.t would cancel.
        mse_R = vector_norm(torch.sub(s, t, out=x), dim=1).square() / width
        ss_R = vector_norm(s, dim=1).square() + _EPSILON
        scale_R = ss_R.rsqrt() * (vector_norm(t, dim=1).square() + _EPSILON).rsqrt()
        st_R = torch.mul(s, t, out=x).sum(1)
        # The rows' terms, weighed; where the weight is 0 they are 0 even if a state is nan.
        terms_R2 = torch.stack([1 - st_R * scale_R, mse_R], 1)
        weights_R = None if weights_M is None else weights_M[first:end].to(wide)
        if weights_R is not None:
            terms_R2 = torch.where((weights_R == 0)[:, None], 0, terms_R2 * weights_R[:, None])
        terms_M2[first:end] = terms_R2
        if grad_ND is None:
            continue
        # In (s, t): the cosine's -scale t + scale (s.t) / |s|^2 s, the mean square's 2/D s - 2/D t.
        of_s_R, of_t_R = options.cosine * scale_R * st_R / ss_R, -options.cosine * scale_R
        torch.mul(s, of_s_R[:, None], out=x).addcmul_(t, of_t_R[:, None])
        if options.mse:
            x.add_(s - t, alpha=2 * options.mse / width)
        # x is the gradient now; the weights enter it as they entered the terms.
        if weights_R is not None:
            x.mul_(weights_R[:, None]).masked_fill_((weights_R == 0)[:, None], 0.0)
        grad_ND[here] = x if isinstance(here, slice) else x.to(grad_ND.dtype)


# ---- the op ----


def _unit(options: HiddenOptions, dtype: torch.dtype) -> tuple[HiddenOptions, float]:
    """Return options and their unit, as low_precision_unit in distill_options.py does.

    float16 gradients get their coefficient in backward, in float32.
    """
    unit = max(abs(options.cosine), abs(options.mse))
    if dtype != torch.float16 or unit == 0:
        return options, 1.0
    return HiddenOptions(cosine=options.cosine / unit, mse=options.mse / unit), unit


@torch.library.custom_op(
    "fastdistil::cosine",
    mutates_args=(),
    schema="(Tensor[] student, Tensor[] teacher, Tensor? rows, Tensor? weights, float cosine, float mse, bool need_grad, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def _cosine(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    rows_M: Tensor | None,
    weights_N: Tensor | None,
    cosine: float,
    mse: float,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    options, first = HiddenOptions(cosine=cosine, mse=mse), student_states[0]
    # Where the rows' terms and the layers' gradients go. Rows that are not listed get the gradient 0.
    scaled, _ = _unit(options, first.dtype)
    rows = first.shape[0] if rows_M is None else rows_M.shape[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    terms_LM2 = first.new_empty(len(student_states), rows, 2, dtype=wide)
    grads = [buffer(state.shape, state.dtype, state.device) for state in student_states] if need_grad else []
    if rows_M is not None:
        for grad_ND in grads:
            grad_ND.zero_()
    weights_M = weights_N if weights_N is None or rows_M is None else weights_N.index_select(0, rows_M)
    if backend == "triton":
        from fastdistil.kernels.cosine_triton import cosine_rows_triton

        coefficients = {"cosine": scaled.cosine, "mse": scaled.mse, "epsilon": _EPSILON}
        cosine_rows_triton(student_states, teacher_states, rows_M, weights_M, **coefficients, terms_LM2=terms_LM2, grads=grads)
    else:
        for layer, (s_ND, t_ND) in enumerate(zip(student_states, teacher_states, strict=True)):
            grad_of_layer = grads[layer] if grads else None
            _rows_torch(s_ND, t_ND, rows_M, weights_M, scaled, terms_M2=terms_LM2[layer], grad_ND=grad_of_layer)
    # Sums over layers and rows, each in storage of its own.
    sums_2 = terms_LM2.flatten(0, 1).sum(0)
    return *_terms(sums_2[0].clone(), sums_2[1].clone(), options), grads


@_cosine.register_fake
def _(student_states: Sequence[Tensor], teacher_states: Any, rows_M: Any, weights_N: Any, *arguments: Any) -> Any:
    wide = torch.promote_types(student_states[0].dtype, torch.float32)
    scalars = tuple(student_states[0].new_empty((), dtype=wide) for _ in range(3))
    return *scalars, [state.new_empty(state.shape) for state in student_states] if arguments[2] else []


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output[1], output[2], *output[3])
    options = HiddenOptions(cosine=inputs[4], mse=inputs[5])
    keep_gradients(ctx, output[3], _unit(options, inputs[0][0].dtype)[1])
    ctx.layers = len(inputs[0])


def _hand_gradient(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return hand_gradients(ctx, grad_total), [None] * ctx.layers, None, None, None, None, None, None


_cosine.register_autograd(_hand_gradient, setup_context=_keep_gradient)


def cosine_loss(
    student_states: Sequence[Tensor] | Tensor,
    teacher_states: Sequence[Tensor] | Tensor,
    rows_M: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    options: HiddenOptions,
    projections: Sequence[Tensor | None] | None = None,
    backend: Backend = "auto",
) -> HiddenTerms:
    """Cosine and mean squared error of hidden states, all layers in one launch, with the gradient from the same pass.

    student_states, teacher_states: float, L tensors [N, D] (or one tensor for one layer), one dtype a side;
    rows may lie apart.
    rows_M: int64, without repetitions: the rows that count; None: all. weights_N: float.
    projections: [D_teacher, D_student] a layer, or None, for sides of different widths: a linear map of the
    student's states, with its own gradient.
    Only the student's states (and projections) get a gradient, once: anything else needs
    backend="reference". Raises ValueError for shapes, dtypes and paths that do not fit.
    """
    student = [student_states] if isinstance(student_states, Tensor) else list(student_states)
    teacher = [teacher_states] if isinstance(teacher_states, Tensor) else list(teacher_states)
    if projections is not None:
        if len(projections) != len(student):
            raise ValueError(f"{len(projections)} projections for {len(student)} layers: give one (or None) a layer")
        for layer, (s, t, p) in enumerate(zip(student, teacher, projections, strict=False)):
            if p is not None and p.shape != (t.shape[-1], s.shape[-1]):
                raise ValueError(
                    f"layer {layer}: the projection must be [{t.shape[-1]}, {s.shape[-1]}], the teacher's width and the "
                    f"student's, got {list(p.shape)}"
                )
        student = [s if p is None else linear(s, p) for s, p in zip(student, projections, strict=True)]
    _check(student, teacher, rows_M, weights_N)
    if backend == "reference":
        return _cosine_loss_reference(student, teacher, rows_M, weights_N, options=options)
    grad = torch.is_grad_enabled()
    if grad and any(tensor.requires_grad for tensor in (*teacher, *(() if weights_N is None else (weights_N,)))):
        raise ValueError(
            "only the student's states get a gradient: detach the teacher's and the weights, or use backend='reference'"
        )
    need_grad = grad and any(tensor.requires_grad for tensor in student)
    chosen = chosen_backend(backend, student[0].device)
    total, cosine, mse, _ = _cosine(student, teacher, rows_M, weights_N, options.cosine, options.mse, need_grad, chosen)
    return HiddenTerms(total, cosine, mse)


def _check(student: list[Tensor], teacher: list[Tensor], rows_M: Tensor | None, weights_N: Tensor | None) -> None:
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"the student has {len(student)} layers of states and the teacher {len(teacher)}; give as many, at least 1"
        )
    for layer, (s_ND, t_ND) in enumerate(zip(student, teacher, strict=True)):
        if s_ND.ndim != 2 or s_ND.shape != t_ND.shape or s_ND.shape[0] != student[0].shape[0]:
            raise ValueError(
                f"layer {layer}: states must be [rows, width] and equal on both sides, got {list(s_ND.shape)} and "
                f"{list(t_ND.shape)}; for different widths give projections"
            )
        for name, tensor, like in (("student", s_ND, student[0]), ("teacher", t_ND, teacher[0])):
            if not tensor.is_floating_point() or tensor.dtype != like.dtype or tensor.device != student[0].device:
                raise ValueError(
                    f"layer {layer}: the {name}'s states must be {like.dtype} on {student[0].device} as its first, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
            if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                raise ValueError(
                    f"layer {layer}: the {name}'s states have strides {tensor.stride()}; adjacent columns are needed"
                )
    if rows_M is not None and (rows_M.ndim != 1 or rows_M.dtype != torch.int64):
        raise ValueError(f"rows must be int64 [M], got {rows_M.dtype} {list(rows_M.shape)}")
    if weights_N is not None and (weights_N.shape != student[0].shape[:1] or not weights_N.is_floating_point()):
        raise ValueError(f"weights must be float [{student[0].shape[0]}], got {weights_N.dtype} {list(weights_N.shape)}")


# ---- what it costs ----


def bytes_moved(rows: int, width: int, itemsize: int, *, layers: int = 1, gradient: bool = True) -> int:
    """Bytes that must cross the memory bus: both sides' states read once, the gradient written once."""
    return (3 if gradient else 2) * layers * rows * width * itemsize
