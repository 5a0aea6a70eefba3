"""Gradients made in the forward pass and handed over in the backward one.

A fused loss knows its gradient as soon as it knows its value. The op returns both; autograd keeps the
gradient and backward multiplies it, in place, by what arrives from above, which is 1 where the loss is the
end of the graph: a kernel reads that number on the device and then touches nothing, so nobody waits. Since
the buffer itself is handed over, that works once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil.kernels.backend import has_triton
from fastdistil.kernels.distill_options import OPTIONS, low_precision_unit, unpack


@torch.library.custom_op("fastdistil::scale_", mutates_args=("tensor",))
def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-dimensional), in float32 or wider; not touched where the factor is 1."""
    if tensor.is_cuda and has_triton():
        from fastdistil.kernels.distill_triton import scale_triton_

        scale_triton_(tensor, factor)
    elif tensor.is_cuda or float(factor) != 1.0:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if tensor.dtype == wide:
            tensor.mul_(factor)
        else:  # mul_ would round the factor to the tensor's dtype, where it may be 0 or infinite
            tensor.copy_(tensor.to(wide).mul_(factor))


@scale_.register_fake
def _(tensor: Tensor, factor: Tensor) -> None:
    return None


def keep_gradients(
    ctx: Any, gradients: Sequence[Tensor], unit: float, dtypes: Sequence[torch.dtype | None] | None = None
) -> None:
    """Keep an op's gradients, in its setup_context, for its backward.

    `dtypes`: of the gradients as they are handed over, by default their own.
    """
    # Detached, because an output kept as it is would keep itself alive.
    ctx.gradients = [gradient.detach() for gradient in gradients]
    ctx.dtypes = dtypes or [gradient.dtype for gradient in gradients]
    ctx.unit = unit
    ctx.set_materialize_grads(False)


def hand_gradients(ctx: Any, grad_total: Tensor | None) -> list[Tensor | None]:
    """Return, in an op's backward, the gradients of its total, times what arrived; None for those that were not asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError("this loss can be differentiated once (create_graph=True is not supported); use backend='reference'")
    if ctx.gradients is None:
        raise RuntimeError("the gradient of this loss was handed over by an earlier backward; compute the loss again")
    gradients, ctx.gradients = ctx.gradients, None
    if grad_total is None:
        return [None] * len(gradients)
    factor = grad_total * ctx.unit
    handed: list[Tensor | None] = []
    for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
        if gradient.ndim == 1 and not gradient.numel():  # not asked for (asked for, and of no rows, it has two dimensions)
            handed.append(None)
        elif type(gradient) is Tensor:
            scale_(gradient, factor)
            handed.append(gradient.to(dtype))
        else:  # torch.compile traces; it may not write into what the forward graph gave out, and fuses the product anyway
            wide = torch.promote_types(gradient.dtype, torch.float32)
            handed.append((gradient.to(wide) * factor).to(dtype))
    return handed


def register_handover(op: Any, *, leaves: int) -> None:
    """The autograd of an op of distill.py's family: inputs (leaves, ..., options), outputs (total, soft,
    hard, gradients of the leaves)."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        _, unit = low_precision_unit(unpack(inputs[-OPTIONS:]), inputs[0].dtype)
        keep_gradients(ctx, output[3:], unit, [None if tensor is None else tensor.dtype for tensor in inputs[:leaves]])

    def hand(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *hand_gradients(ctx, grad_total), *(None,) * (ctx.inputs - leaves)

    op.register_autograd(hand, setup_context=keep)
