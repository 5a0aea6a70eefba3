"""Gradients made small for the wire: 8-bit codes, signs, or the k largest, with error feedback.

    v = gradient + residual            what is sent this time is a function of v; what is not is the new residual
    int8:   scale = max|v| / 127       code = round_half_even(v / scale)        sent = code * scale
    sign:   scale = mean|v|            bit = v >= 0                             sent = bit ? scale : -scale
    top-k:  the k largest |v|, ties to the lower index, as (index, value)       sent = v there, 0 elsewhere
    residual = v - sent                to the last bit: `sent` is computed as the decoder computes it

int8 and sign have one float32 scale for each block of consecutive elements. Sources: Seide et al. 2014 (1-bit SGD, error
feedback), Alistarh et al. 2017 (QSGD), Karimireddy et al. 2019 (sign with error feedback), Stich et al. 2018 (top-k).

Nothing that is not finite is hidden: a block that holds inf or nan (or whose sum of magnitudes leaves float32, sign) has the
scale nan, decodes to nan, and leaves its residual as it was; top-k takes inf and nan before anything finite. A block whose
scale is 0 sends zeros and stays in the residual.

The ops are plain functions outside of autograd. Gradients are one-dimensional, contiguous, float32, or float64 but for
Triton's path; residual_N, if given, is like the gradient and is overwritten. Sums over ranks go in the order 0, 1, ... R-1
and are the same bits every time.

Legend: N elements, S elements of a block, B = ceil(N / S) blocks, R ranks, K elements selected, W = ceil(N / 8) bytes of bits.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdistil.kernels.handover import Path, chosen_path

# ---- the specification ----


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


def top_k_select_reference(gradient_N: Tensor, residual_N: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indices_K int32, ascending; values_K; the new residual_N)."""
    v_N, _ = _with_residual(gradient_N, residual_N)
    magnitudes_N = v_N.abs().where(v_N.isfinite(), torch.inf)
    indices_K = magnitudes_N.sort(descending=True, stable=True).indices[:k].sort().values
    return indices_K.int(), v_N[indices_K], v_N.index_fill(0, indices_K, 0.0)


def scatter_sum_reference(indices_RK: Tensor, values_RK: Tensor, numel: int) -> Tensor:
    """[N], of the values' dtype."""
    total_N = values_RK.new_zeros(numel)
    for indices_K, values_K in zip(indices_RK, values_RK, strict=True):
        total_N[indices_K.long()] += values_K
    return total_N


# ---- the ops ----


def _check(gradient_N: Tensor, residual_N: Tensor | None, path: str) -> None:
    allowed = (torch.float32,) if path == "triton" else (torch.float32, torch.float64)
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


def _check_block(block: int, multiple: int = 1) -> None:
    if block < 1 or block % multiple:
        raise ValueError(f"block must be a positive multiple of {multiple}, got {block}")


def _path(path: Path, device: torch.device) -> str:
    return path if path == "reference" else chosen_path(path, device)


@torch.no_grad()
def quantize_int8(
    gradient_N: Tensor, residual_N: Tensor | None, *, block: int = 1024, path: Path = "auto"
) -> tuple[Tensor, Tensor]:
    """(codes_N int8 in -127 ... 127, scales_B float32); residual_N becomes what the codes do not say."""
    _check_block(block)
    _check(gradient_N, residual_N, _path(path, gradient_N.device))
    codes_N, scales_B, left_N = quantize_int8_reference(gradient_N, residual_N, block=block)
    if residual_N is not None:
        residual_N.copy_(left_N)
    return codes_N, scales_B


@torch.no_grad()
def dequantize_int8(
    codes_N: Tensor, scales_B: Tensor, *, block: int = 1024, out: Tensor | None = None, path: Path = "auto"
) -> Tensor:
    """codes * scales, [N], float32, or in `out` and its dtype."""
    dtype = torch.float32 if out is None else out.dtype
    decoded_N = dequantize_int8_reference(codes_N, scales_B, block=block, dtype=dtype)
    return decoded_N if out is None else out.copy_(decoded_N)


@torch.no_grad()
def dequantize_sum_int8(
    codes_RN: Tensor,
    scales_RB: Tensor,
    *,
    block: int = 1024,
    path: Path = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ranks' decoded gradients, summed in the ranks' order, [N]."""
    total_N = torch.zeros(codes_RN.shape[1], dtype=dtype, device=codes_RN.device)
    for codes_N, scales_B in zip(codes_RN, scales_RB, strict=True):
        total_N += dequantize_int8_reference(codes_N, scales_B, block=block, dtype=dtype)
    return total_N


@torch.no_grad()
def sign_compress(
    gradient_N: Tensor, residual_N: Tensor | None, *, block: int = 1024, path: Path = "auto"
) -> tuple[Tensor, Tensor]:
    """(bits_W uint8, scales_B float32); bit i % 8, least significant first, of byte i // 8. residual_N becomes the rest."""
    _check_block(block, 8)
    _check(gradient_N, residual_N, _path(path, gradient_N.device))
    bits_W, scales_B, left_N = sign_compress_reference(gradient_N, residual_N, block=block)
    if residual_N is not None:
        residual_N.copy_(left_N)
    return bits_W, scales_B


@torch.no_grad()
def sign_decompress(
    bits_W: Tensor, scales_B: Tensor, numel: int, *, block: int = 1024, out: Tensor | None = None, path: Path = "auto"
) -> Tensor:
    """+-scales, [N], float32, or in `out` and its dtype."""
    dtype = torch.float32 if out is None else out.dtype
    decoded_N = sign_decompress_reference(bits_W, scales_B, numel, block=block, dtype=dtype)
    return decoded_N if out is None else out.copy_(decoded_N)


@torch.no_grad()
def sign_decompress_sum(
    bits_RW: Tensor,
    scales_RB: Tensor,
    numel: int,
    *,
    block: int = 1024,
    path: Path = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ranks' decoded gradients, summed in the ranks' order, [N]."""
    total_N = torch.zeros(numel, dtype=dtype, device=bits_RW.device)
    for bits_W, scales_B in zip(bits_RW, scales_RB, strict=True):
        total_N += sign_decompress_reference(bits_W, scales_B, numel, block=block, dtype=dtype)
    return total_N


@torch.no_grad()
def top_k_select(gradient_N: Tensor, residual_N: Tensor | None, k: int, *, path: Path = "auto") -> tuple[Tensor, Tensor]:
    """(indices_K int32, ascending; values_K) of exactly k elements; residual_N becomes v with zeros in their places."""
    _check(gradient_N, residual_N, _path(path, gradient_N.device))
    if not 1 <= k <= gradient_N.numel() < 2**31:
        raise ValueError(f"k must lie in 1 ... {gradient_N.numel()}, the gradient's size (below 2**31); got {k}")
    indices_K, values_K, left_N = top_k_select_reference(gradient_N, residual_N, k)
    if residual_N is not None:
        residual_N.copy_(left_N)
    return indices_K, values_K


@torch.no_grad()
def scatter_sum(indices_RK: Tensor, values_RK: Tensor, numel: int, *, path: Path = "auto") -> Tensor:
    """The ranks' selected elements at their places, summed in the ranks' order, [N]; a rank names no place twice."""
    return scatter_sum_reference(indices_RK, values_RK, numel)


# ---- what it costs ----


def bytes_moved(
    op: str, numel: int, *, block: int = 1024, ranks: int = 1, k: int = 0, residual: bool = True, itemsize: int = 4
) -> int:
    """Bytes that must cross the memory bus: every input read once, every output written once."""
    blocks = -(-numel // block)
    encoded = {"int8": numel + 4 * blocks, "sign": -(-numel // 8) + 4 * blocks, "top_k": (4 + itemsize) * k}
    sources = (3 if residual else 1) * numel * itemsize
    match op:
        case "quantize_int8":
            return sources + encoded["int8"]
        case "sign_compress":
            return sources + encoded["sign"]
        case "top_k_select":
            return sources + encoded["top_k"]
        case "dequantize_int8" | "dequantize_sum_int8":
            return ranks * encoded["int8"] + numel * itemsize
        case "sign_decompress" | "sign_decompress_sum":
            return ranks * encoded["sign"] + numel * itemsize
        case "scatter_sum":
            return ranks * encoded["top_k"] + numel * itemsize
        case _:
            raise ValueError(f"no op is named {op!r}")
