"""The path of compress.py for the CPU: chunks that stay in the cache, worked on in vectorised sweeps.

What torch does slowly there (comparisons into booleans, packing of bits, the numbers of the set elements) numpy does, on the
same memory. Chunks in which something is unusual (not finite, or so small that a scale is denormal) go to the reference.

Legend: N elements, S elements of a block, C blocks of a chunk, B blocks, R ranks, K elements selected, W bytes of bits.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastdistil.kernels.buffers import buffer
from fastdistil.kernels.compress_reference import quantize_int8_reference, sign_compress_reference

# Elements: 1 MiB in float32, of which two or three are in use at a time.
CHUNK = 2**18


def _chunks(numel: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """(elements, their blocks, the blocks' size): whole blocks, and at last the part of one that remains."""
    whole, step = numel // block * block, _step(block)
    for first in range(0, whole, step):
        end = min(first + step, whole)
        yield slice(first, end), slice(first // block, end // block), block
    if whole < numel:
        yield slice(whole, numel), slice(whole // block, whole // block + 1), numel - whole


def _step(block: int) -> int:
    return max(1, CHUNK // block) * block


def _spares(count: int, like_N: Tensor, block: int) -> list[Tensor]:
    size = min(like_N.numel(), _step(block))
    return [torch.empty(size, dtype=like_N.dtype) for _ in range(count)]


def _sum_with(gradient_N: Tensor, residual_N: Tensor | None, here: slice, spare: Tensor) -> Tensor:
    if residual_N is None:
        return gradient_N[here]
    return torch.add(gradient_N[here], residual_N[here], out=spare[: here.stop - here.start])


def quantize_int8_torch(gradient_N: Tensor, residual_N: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    dtype, numel = gradient_N.dtype, gradient_N.numel()
    codes_N = buffer((numel,), torch.int8, gradient_N.device)
    scales_B = torch.empty(-(-numel // block))
    spare_v, spare_x = _spares(2, gradient_N, block)
    smallest = torch.finfo(torch.float32).smallest_normal
    for here, blocks, size in _chunks(numel, block):
        v_CS = _sum_with(gradient_N, residual_N, here, spare_v).view(-1, size)
        x_CS = spare_x[: here.stop - here.start].view(-1, size)
        scales_B[blocks] = torch.abs(v_CS, out=x_CS).amax(1).div_(127)
        scales_C = scales_B[blocks]
        usual_C = (scales_C == 0) | ((scales_C >= smallest) & (scales_C < math.inf))
        if not bool(usual_C.all()):
            rest_N = None if residual_N is None else residual_N[here]
            codes_N[here], scales_B[blocks], left_N = quantize_int8_reference(gradient_N[here], rest_N, block=size)
            if rest_N is not None:
                rest_N.copy_(left_N)
            continue
        # Where the scale is 0 so is every v / smallest, once rounded. Codes need no clamp: v / scale rounds to 127 at most.
        torch.div(v_CS, scales_C.clamp(min=smallest).to(dtype)[:, None], out=x_CS).round_()
        codes_N[here].view(-1, size).copy_(x_CS)
        if residual_N is not None:
            # Not in one addcmul, which may round only once: the decoder rounds the product.
            torch.sub(v_CS, x_CS.mul_(scales_C.to(dtype)[:, None]), out=residual_N[here].view(-1, size))
    return codes_N, scales_B


def dequantize_sum_int8_torch(codes_RN: Tensor, scales_RB: Tensor, block: int, out_N: Tensor) -> None:
    (spare,) = _spares(1, out_N, block)
    for here, blocks, size in _chunks(out_N.numel(), block):
        total_CS = out_N[here].view(-1, size)
        x_CS = spare[: here.stop - here.start].view(-1, size)
        for rank, (codes_N, scales_B) in enumerate(zip(codes_RN, scales_RB, strict=True)):
            decoded_CS = x_CS if rank else total_CS
            decoded_CS.copy_(codes_N[here].view(-1, size)).mul_(scales_B[blocks].to(out_N.dtype)[:, None])
            if rank:
                total_CS.add_(decoded_CS)


def sign_compress_torch(gradient_N: Tensor, residual_N: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    dtype, numel = gradient_N.dtype, gradient_N.numel()
    bits_W = torch.empty(-(-numel // 8), dtype=torch.uint8)
    scales_B = torch.empty(-(-numel // block))
    spare_v, spare_x = _spares(2, gradient_N, block)
    for here, blocks, size in _chunks(numel, block):
        v_CS = _sum_with(gradient_N, residual_N, here, spare_v).view(-1, size)
        x_CS = spare_x[: here.stop - here.start].view(-1, size)
        scales_B[blocks] = torch.abs(v_CS, out=x_CS).sum(1).div_(size)
        scales_C, bytes_W = scales_B[blocks], slice(here.start // 8, -(-here.stop // 8))
        if not bool(scales_C.isfinite().all()):
            rest_N = None if residual_N is None else residual_N[here]
            bits_W[bytes_W], scales_B[blocks], left_N = sign_compress_reference(gradient_N[here], rest_N, block=size)
            if rest_N is not None:
                rest_N.copy_(left_N)
            continue
        bits_W[bytes_W] = torch.from_numpy(np.packbits(v_CS.numpy().ravel() >= 0, bitorder="little"))
        if residual_N is not None:
            # +-1/2; the product with 2 and the scale is exact, so that rounding once or twice is the same.
            torch.ge(v_CS, 0.0, out=x_CS).sub_(0.5)
            left_CS = residual_N[here].view(-1, size)
            torch.addcmul(v_CS, x_CS, scales_C.to(dtype)[:, None], value=-2, out=left_CS)
    return bits_W, scales_B


def sign_decompress_sum_torch(bits_RW: Tensor, scales_RB: Tensor, block: int, out_N: Tensor) -> None:
    (spare,) = _spares(1, out_N, block)
    for here, blocks, size in _chunks(out_N.numel(), block):
        total_CS = out_N[here].view(-1, size)
        x_CS, bytes_W = spare[: here.stop - here.start].view(-1, size), slice(here.start // 8, -(-here.stop // 8))
        for rank, (bits_W, scales_B) in enumerate(zip(bits_RW, scales_RB, strict=True)):
            set_N = np.unpackbits(bits_W[bytes_W].numpy(), count=here.stop - here.start, bitorder="little")
            signs_CS = torch.from_numpy(set_N).view(torch.int8).mul_(2).sub_(1).view(-1, size)
            scales_C1 = scales_B[blocks].to(out_N.dtype)[:, None]
            if rank:
                total_CS.addcmul_(x_CS.copy_(signs_CS), scales_C1)  # the product is exact
            else:
                total_CS.copy_(signs_CS).mul_(scales_C1)


# ---- the k largest ----

# Elements looked at for a first guess of the threshold, where there are many more.
SAMPLE = 2**15
# Integers of a dtype's width, and infinity's bits.
_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def _keys(v_N: Tensor) -> Tensor:
    """Integers in the order of |v|; all that is not finite is the same, above the rest."""
    bits, infinite = _BITS[v_N.dtype]
    return v_N.abs().view(bits).clamp_(max=infinite)


def guessed_key(gradient_N: Tensor, residual_N: Tensor | None, k: int) -> Tensor:
    """0-dimensional: a key that, but for one time in 30,000, at least k elements reach; above 0 where a sample could tell.

    The sample is spread evenly, in step with no row width: multiples of about the golden section of N, modulo N.
    """
    numel, expected = gradient_N.numel(), k * SAMPLE / gradient_N.numel()
    rank = math.ceil(expected + 4 * math.sqrt(expected)) + 4  # four standard deviations
    if numel < 8 * SAMPLE or rank > SAMPLE:
        return torch.zeros((), dtype=_BITS[gradient_N.dtype][0], device=gradient_N.device)
    stride = int(numel * 0.6180339887498949)
    while math.gcd(stride, numel) != 1:
        stride += 1
    at = torch.arange(SAMPLE, device=gradient_N.device).mul_(stride).remainder_(numel)
    sample = gradient_N[at] if residual_N is None else gradient_N[at] + residual_N[at]
    return _keys(sample).topk(rank).values[-1].clamp_(min=1)


def _candidates(v_N: Tensor, added_N: Tensor | None, floor: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, keys) of the elements of v whose key is `floor` or more. `added_N`, if given, is added to v_N first."""
    found, (spare,) = [], _spares(1, v_N, 1)
    bits, infinite = _BITS[v_N.dtype]
    for here, _, _ in _chunks(v_N.numel(), 1):
        chunk = v_N[here] if added_N is None else v_N[here].add_(added_N[here])
        magnitudes = torch.abs(chunk, out=spare[: len(chunk)]).view(bits).numpy()
        at = np.flatnonzero(magnitudes >= floor)
        found.append((at + here.start, magnitudes[at]))
    return np.concatenate([at for at, _ in found]), np.minimum(np.concatenate([keys for _, keys in found]), infinite)


def top_k_select_torch(gradient_N: Tensor, residual_N: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    floor = int(guessed_key(gradient_N, residual_N, k))
    v_N, added_N = (gradient_N, None) if residual_N is None else (residual_N, gradient_N)
    numbers, keys = _candidates(v_N, added_N, floor)
    if len(numbers) < k:  # the guess was too high, or almost all are 0
        numbers, keys = _candidates(v_N, None, 0)
    threshold = np.partition(keys, len(keys) - k)[len(keys) - k]
    chosen = keys > threshold
    chosen[np.flatnonzero(keys == threshold)[: k - int(chosen.sum())]] = True
    indices_K = torch.from_numpy(numbers[chosen])
    values_K = v_N[indices_K]
    if residual_N is not None:
        residual_N[indices_K] = 0.0
    return indices_K.int(), values_K
