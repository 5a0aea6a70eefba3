"""The path of block_codes.py for the CPU: chunks that stay in the second-level cache, worked on in vectorised sweeps.

Chunks in which something is unusual (not finite, or so small that a scale is denormal) go to the reference.

Legend: N elements, S elements of a block, C blocks of a chunk, B blocks, R ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistil.kernels.block_codes_reference import quantize_int8_reference
from fastdistil.kernels.cpu import buffer

# Elements of a chunk for each thread: up to four such buffers (512 KiB in float32) are in use at a time.
CHUNK = 2**17


def _chunk_blocks(block: int) -> int:
    return max(1, CHUNK * torch.get_num_threads() // block)


def chunks(block: int, tensors: list[tuple[Tensor | None, int]]) -> Iterator[list[Any]]:
    """Cut tensors into chunks of blocks, [C, elements for a block] each; None stays None. A part of a block comes last.

    tensors: (tensor, its elements for a block).
    """
    full = min(tensor.numel() // width for tensor, width in tensors if tensor is not None)
    rows = _chunk_blocks(block)
    columns: list[Any] = [
        [None] * -(-full // rows) if tensor is None else torch.split(tensor[: full * width].view(full, width), rows)
        for tensor, width in tensors
    ]
    if full:
        yield from (list(chunk) for chunk in zip(*columns, strict=True))
    rests = [None if tensor is None else tensor[full * width :] for tensor, width in tensors]
    if any(remainder is not None and remainder.numel() for remainder in rests):
        yield [None if remainder is None else remainder.view(1, -1) for remainder in rests]


def chunk_buffer(like_N: Tensor, block: int) -> Tensor:
    """Return memory for the largest chunk of a tensor; `view_like` shapes it."""
    return like_N.new_empty(min(like_N.numel(), _chunk_blocks(block) * block))


def view_like(spare: Tensor, chunk_CS: Tensor) -> Tensor:
    """Return the beginning of a buffer, in the shape of a chunk."""
    return spare[: chunk_CS.numel()].view(chunk_CS.shape)


# Scales between these are ordinary: normal numbers, whose codes stand for numbers far from float32's largest.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).smallest_normal, 1e36


def quantize_int8_torch(gradient_N: Tensor, residual_N: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    dtype, numel = gradient_N.dtype, gradient_N.numel()
    codes_N = buffer((numel,), torch.int8, gradient_N.device)
    scales_B = torch.empty(-(-numel // block))
    spare_v, spare_x = chunk_buffer(gradient_N, block), chunk_buffer(gradient_N, block)
    parts: list[tuple[Tensor | None, int]] = [(gradient_N, block), (residual_N, block), (codes_N, block), (scales_B, 1)]
    for g_CS, r_CS, codes_CS, scales_C1 in chunks(block, parts):
        v_CS = g_CS if r_CS is None else torch.add(g_CS, r_CS, out=view_like(spare_v, g_CS))
        # max|v| / 127 of each block, without a tensor of |v|.
        scales_C1.copy_(torch.maximum(v_CS.amax(1, True), v_CS.amin(1, True).neg_()).div_(127))
        scales = scales_C1.numpy()
        if not ((scales == 0) | ((scales >= _SMALLEST) & (scales < _LARGEST))).all():
            _by_reference(g_CS, r_CS, codes_CS, scales_C1)
            continue
        # Where the scale is 0 so is every v / smallest, once rounded. Codes need no clamp: v / scale rounds to 127 at most.
        x_CS = torch.div(v_CS, scales_C1.clamp(min=_SMALLEST).to(dtype), out=view_like(spare_x, g_CS)).round_()
        codes_CS.copy_(x_CS)
        if r_CS is not None:
            # Not in one addcmul, which may round only once: the decoder rounds the product.
            torch.sub(v_CS, x_CS.mul_(scales_C1.to(dtype)), out=r_CS)
    return codes_N, scales_B


def _by_reference(g_CS: Tensor, r_CS: Tensor | None, codes_CS: Tensor, scales_C1: Tensor) -> None:
    rest_N = None if r_CS is None else r_CS.flatten()
    codes_N, scales_C, left_N = quantize_int8_reference(g_CS.flatten(), rest_N, block=g_CS.shape[1])
    codes_CS.copy_(codes_N.view(codes_CS.shape))
    scales_C1.copy_(scales_C[:, None])
    if r_CS is not None:
        r_CS.copy_(left_N.view(r_CS.shape))


def dequantize_sum_int8_torch(codes_RN: Tensor, scales_RB: Tensor, block: int, out_N: Tensor) -> None:
    # A chunk is the result's, then codes and scales of rank 0, of rank 1, ...
    ranks, spare, dtype = len(codes_RN), chunk_buffer(out_N, block), out_N.dtype
    parts: list[tuple[Tensor | None, int]] = [(out_N, block)]
    parts += [part for codes_N, scales_B in zip(codes_RN, scales_RB, strict=True) for part in ((codes_N, block), (scales_B, 1))]
    for total_CS, *coded in chunks(block, parts):
        total_CS.copy_(coded[0]).mul_(coded[1].to(dtype))
        for rank in range(1, ranks):
            x_CS = view_like(spare, total_CS).copy_(coded[2 * rank])
            total_CS.add_(x_CS.mul_(coded[2 * rank + 1].to(dtype)))
