"""The path of top_k.py for the CPU: the k-th magnitude is guessed from a sample, and few candidates are sorted."""

import math

import numpy as np
import torch
from torch import Tensor

from fastdistil.kernels.block_codes_torch import chunk_buffer, chunks, view_like

# Elements looked at for a first guess of the threshold, where there are many more.
SAMPLE = 2**15


# Ints of a dtype's width, and infinity's bits.
_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def _keys(v_N: Tensor) -> Tensor:
    """Ints in the order of |v|; all that is not finite is the same, above the rest."""
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
    bits, infinite = _BITS[v_N.dtype]
    candidates, start, spare = [], 0, chunk_buffer(v_N, 1)
    for chunk, added in chunks(1, [(v_N, 1), (added_N, 1)]):
        if added is not None:
            chunk.add_(added)
        magnitudes = torch.abs(chunk, out=view_like(spare, chunk)).view(bits).numpy().ravel()
        at = np.flatnonzero(magnitudes >= floor)
        candidates.append((at + start, magnitudes[at]))
        start += len(chunk)
    return np.concatenate([at for at, _ in candidates]), np.minimum(np.concatenate([keys for _, keys in candidates]), infinite)


def top_k_select_torch(gradient_N: Tensor, residual_N: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    # v is written over the residual, where there is one, as candidates are looked for.
    floor = int(guessed_key(gradient_N, residual_N, k))
    v_N, added_N = (gradient_N, None) if residual_N is None else (residual_N, gradient_N)
    numbers, keys = _candidates(v_N, added_N, floor)
    if len(numbers) < k:  # the guess was too high, or almost all are 0
        numbers, keys = _candidates(v_N, None, 0)
    # All above the k-th key; of those equal to it the first, until there are k.
    threshold = np.partition(keys, len(keys) - k)[len(keys) - k]
    chosen = keys > threshold
    chosen[np.flatnonzero(keys == threshold)[: k - int(chosen.sum())]] = True
    indices_K = torch.from_numpy(numbers[chosen])
    values_K = v_N[indices_K]
    if residual_N is not None:
        residual_N[indices_K] = 0.0
    return indices_K.int(), values_K
