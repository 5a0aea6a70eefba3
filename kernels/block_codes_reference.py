"""The specification of block_codes.py, whose formulas and legend hold here: eager torch, any float dtype, on any device.

Nothing is written in place: each encoder also returns the new residual.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def _in_blocks(v_N: Tensor, block: int) -> Tensor:
    return pad(v_N, (0, -v_N.numel() % block)).view(-1, block)


def _with_residual(gradient_N: Tensor, residual_N: Tensor | None) -> tuple[Tensor, Tensor]:
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
    v_N, residual_N = _with_residual(gradient_N, residual_N)
    v_BS = _in_blocks(v_N, block)
    scales_B = (v_BS.abs().amax(1) / 127).float()
    scales_B = scales_B.where(scales_B.isfinite(), torch.nan)
    codes_BS = (v_BS / scales_B.to(v_N.dtype)[:, None]).round().clamp(-127, 127)
    codes_N = codes_BS.where(scales_B[:, None] > 0, 0).to(torch.int8).flatten()[: v_N.numel()]
    sent_N = dequantize_int8_reference(codes_N, scales_B, block=block, dtype=v_N.dtype)
    return codes_N, scales_B, _left(v_N, sent_N, residual_N, scales_B, block)


def dequantize_int8_reference(codes_N: Tensor, scales_B: Tensor, *, block: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N], of `dtype`."""
    scales_N = scales_B.to(dtype).repeat_interleave(block)[: codes_N.numel()]
    return codes_N.to(dtype) * scales_N


def sign_compress_reference(
    gradient_N: Tensor, residual_N: Tensor | None = None, *, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(bits_W uint8, scales_B float32, the new residual_N)."""
    v_N, residual_N = _with_residual(gradient_N, residual_N)
    sizes_B = _in_blocks(torch.ones_like(v_N, dtype=torch.float64), block).sum(1)
    sums_B = _in_blocks(v_N.double(), block).abs().sum(1)
    scales_B = torch.where(sums_B.float().isfinite(), sums_B / sizes_B, torch.nan).float()
    powers_8 = 2 ** torch.arange(8, device=v_N.device)
    bits_W = (_in_blocks(v_N >= 0, 8) * powers_8).sum(1).to(torch.uint8)
    sent_N = sign_decompress_reference(bits_W, scales_B, v_N.numel(), block=block, dtype=v_N.dtype)
    return bits_W, scales_B, _left(v_N, sent_N, residual_N, scales_B, block)


def sign_decompress_reference(
    bits_W: Tensor, scales_B: Tensor, numel: int, *, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[N], of `dtype`."""
    set_N = (bits_W[:, None] >> torch.arange(8, device=bits_W.device) & 1).flatten()[:numel].bool()
    scales_N = scales_B.to(dtype).repeat_interleave(block)[:numel]
    return torch.where(set_N, scales_N, -scales_N)
