"""The specification of block_codes.py, whose formulas and legend hold here: eager torch, any float dtype, on any device.

Nothing is written in place: each encoder also returns the new residual.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def _in_blocks(v_N: Tensor, block: int) -> Tensor:
    return pad(v_N, (0, -v_N.numel() % block)).view(-1, block)


def with_residual(gradient_N: Tensor, residual_N: Tensor | None) -> tuple[Tensor, Tensor]:
    residual_N = torch.zeros_like(gradient_N) if residual_N is None else residual_N
    return gradient_N + residual_N, residual_N


def _left(v_N: Tensor, sent_N: Tensor, residual_N: Tensor, scales_B: Tensor, block: int) -> Tensor:
    """v - sent, but in blocks that are not finite, whose residual stays."""
    finite_N = scales_B.isfinite().repeat_interleave(block)[: v_N.numel()]
    return torch.where(finite_N, v_N - sent_N, residual_N)


def quantize_int8_reference(
    gradient_N: Tensor, residual_N: Tensor | None = None, *, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes_N int8, scales_B float32, the new residual_N)."""
    v_N, residual_N = with_residual(gradient_N, residual_N)
    v_BS = _in_blocks(v_N, block)
    scales_B = (v_BS.abs().amax(1) / 127).float()
    # A scale just below float32's largest number over 127 is finite, and what its code 127 stands for is not.
    scales_B = scales_B.where((127 * scales_B).isfinite(), torch.nan)
    codes_BS = (v_BS / scales_B.to(v_N.dtype)[:, None]).round().clamp(-127, 127)
    codes_N = codes_BS.where(scales_B[:, None] > 0, 0).to(torch.int8).flatten()[: v_N.numel()]
    sent_N = dequantize_int8_reference(codes_N, scales_B, block=block, dtype=v_N.dtype)
    return codes_N, scales_B, _left(v_N, sent_N, residual_N, scales_B, block)


def dequantize_int8_reference(codes_N: Tensor, scales_B: Tensor, *, block: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N], of `dtype`."""
    scales_N = scales_B.to(dtype).repeat_interleave(block)[: codes_N.numel()]
    return codes_N.to(dtype) * scales_N
