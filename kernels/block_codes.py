"""Gradients made small for the wire: 8-bit codes, with error feedback.

    v = gradient + residual            what is sent this time is a function of v; what is not is the new residual
    scale = max|v| / 127               code = round_half_even(v / scale)        sent = code * scale
    residual = v - sent                to the last bit: `sent` is computed as the decoder computes it

There is one float32 scale for each block of consecutive elements. Sources: Seide et al. 2014 (error
feedback), Alistarh et al. 2017 (QSGD).

Nothing that is not finite is hidden: a block that holds inf or nan has the scale nan, decodes to nan, and
leaves its residual as it was. A block whose scale is 0 sends zeros and stays in the residual.

The ops are plain functions outside of autograd. Gradients are one-dimensional, contiguous, float32, or
float64 but for Triton's path; residual_N, if given, is like the gradient and is overwritten. Sums over ranks
go in the order 0, 1, ... R-1 and are the same bits every time.

Legend: N elements, S elements of a block, B = ceil(N / S) blocks, R ranks.
"""

import torch
from torch import Tensor

from fastdistil.kernels.backend import Backend, chosen_backend
from fastdistil.kernels.block_codes_reference import dequantize_int8_reference, quantize_int8_reference
from fastdistil.kernels.cpu import buffer


def check_gradient(gradient_N: Tensor, residual_N: Tensor | None, backend: str) -> None:
    """Check what every encoder takes. Raises ValueError."""
    allowed = (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)
    if gradient_N.dtype not in allowed or gradient_N.ndim != 1 or not gradient_N.is_contiguous():
        raise ValueError(
            f"the gradient must be contiguous, one-dimensional and {' or '.join(map(str, allowed))}; got {gradient_N.dtype} "
            f"{list(gradient_N.shape)}, strides {list(gradient_N.stride())}"
        )
    if residual_N is not None and (
        residual_N.shape != gradient_N.shape
        or residual_N.dtype != gradient_N.dtype
        or residual_N.device != gradient_N.device
        or not residual_N.is_contiguous()
    ):
        raise ValueError(
            f"the residual must be contiguous and like the gradient, {gradient_N.dtype} {list(gradient_N.shape)} on "
            f"{gradient_N.device}; got {residual_N.dtype} {list(residual_N.shape)} on {residual_N.device}"
        )


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"block must be a positive number, got {block}")


def _check_coded(codes_RN: Tensor, scales_RB: Tensor, block: int) -> None:
    ranks, numel = codes_RN.shape
    for name, tensor, wanted_dtype, shape in (
        ("codes", codes_RN, torch.int8, (ranks, numel)),
        ("scales", scales_RB, torch.float32, (ranks, -(-numel // block))),
    ):
        rows_whole = tensor.ndim == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
        if tensor.dtype != wanted_dtype or tensor.shape != shape or not rows_whole:
            raise ValueError(
                f"the {name} must be {wanted_dtype} {list(shape)} with rows that are contiguous; got {tensor.dtype} "
                f"{list(tensor.shape)}, strides {list(tensor.stride())}"
            )


def _check_out(out_N: Tensor, numel: int, backend: str) -> None:
    allowed = (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)
    if out_N.dtype not in allowed or out_N.shape != (numel,) or not out_N.is_contiguous():
        raise ValueError(
            f"the result must be contiguous, [{numel}] and {' or '.join(map(str, allowed))}; got {out_N.dtype} "
            f"{list(out_N.shape)}"
        )


def chosen_backend_or_reference(backend: Backend, device: torch.device) -> str:
    """On a GPU without Triton there is nothing faster than the reference, which does not wait for the device either."""
    chosen = backend if backend == "reference" else chosen_backend(backend, device)
    return "reference" if chosen == "torch" and device.type != "cpu" else chosen


@torch.no_grad()
def quantize_int8(
    gradient_N: Tensor, residual_N: Tensor | None, *, block: int = 1024, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(codes_N int8 in -127 ... 127, scales_B float32); residual_N becomes what the codes do not say."""
    chosen = chosen_backend_or_reference(backend, gradient_N.device)
    _check_block(block)
    check_gradient(gradient_N, residual_N, chosen)
    if chosen == "triton":
        from fastdistil.kernels.block_codes_triton import quantize_int8_triton

        return quantize_int8_triton(gradient_N, residual_N, block)
    if chosen == "torch":
        from fastdistil.kernels.block_codes_torch import quantize_int8_torch

        return quantize_int8_torch(gradient_N, residual_N, block)
    codes_N, scales_B, left_N = quantize_int8_reference(gradient_N, residual_N, block=block)
    if residual_N is not None:
        residual_N.copy_(left_N)
    return codes_N, scales_B


@torch.no_grad()
def dequantize_int8(
    codes_N: Tensor, scales_B: Tensor, *, block: int = 1024, out: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return codes * scales, [N], float32, or in `out` and its dtype."""
    return dequantize_sum_int8(codes_N[None], scales_B[None], block=block, out=out, backend=backend)


@torch.no_grad()
def dequantize_sum_int8(
    codes_RN: Tensor,
    scales_RB: Tensor,
    *,
    block: int = 1024,
    out: Tensor | None = None,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the ranks' decoded gradients, summed in the ranks' order, [N], in `out` if given. Rows may lie apart."""
    chosen, numel = chosen_backend_or_reference(backend, codes_RN.device), codes_RN.shape[1]
    _check_block(block)
    _check_coded(codes_RN, scales_RB, block)
    out_N = buffer((numel,), dtype, codes_RN.device) if out is None else out
    _check_out(out_N, numel, chosen)
    if chosen == "triton":
        from fastdistil.kernels.block_codes_triton import dequantize_sum_int8_triton

        dequantize_sum_int8_triton(codes_RN, scales_RB, block, out_N)
    elif chosen == "torch":
        from fastdistil.kernels.block_codes_torch import dequantize_sum_int8_torch

        dequantize_sum_int8_torch(codes_RN, scales_RB, block, out_N)
    else:
        out_N.zero_()
        for codes_N, scales_B in zip(codes_RN, scales_RB, strict=True):
            out_N += dequantize_int8_reference(codes_N, scales_B, block=block, dtype=out_N.dtype)
    return out_N


# ---- what it costs ----


def bytes_moved(
    op: str, numel: int, *, block: int = 1024, ranks: int = 1, k: int = 0, residual: bool = True, itemsize: int = 4
) -> int:
    """Bytes that must cross the memory bus: every input read once, every output written once."""
    blocks = -(-numel // block)
    encoded = {"int8": numel + 4 * blocks, "top_k": (4 + itemsize) * k}
    sources = (3 if residual else 1) * numel * itemsize
    match op:
        case "quantize_int8":
            return sources + encoded["int8"]
        case "top_k_select":
            return sources + encoded["top_k"]
        case "dequantize_int8" | "dequantize_sum_int8":
            return ranks * encoded["int8"] + numel * itemsize
        case "scatter_sum":
            return ranks * encoded["top_k"] + numel * itemsize
        case _:
            raise ValueError(f"no op is named {op!r}")
