"""Compressors whose payloads are summed on the way, by an allreduce: none, 16 bits.

Legend: as in compressor.py.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdistil.gradients.compressor import (
    BucketLayout,
    CompressionState,
    CompressionSteps,
    Compressor,
    Feedback,
    Request,
    StateKind,
    poison,
    ring_allreduce_bytes,
)


@dataclass(frozen=True)
class Uncompressed(Compressor):
    ranks: int

    def exchange(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionSteps:
        summed_N = yield Request("allreduce", gradient_N)
        return summed_N, state

    def wire_bytes(self, layout: BucketLayout) -> int:
        return ring_allreduce_bytes(self.ranks, 4 * layout.numel)


# Elements that stay in a core's cache through a chain of elementwise operations.
_CACHED = 2**16


def _blocks(tensor_N: Tensor) -> Iterator[slice]:
    size = _CACHED if tensor_N.device.type == "cpu" else max(1, tensor_N.numel())
    return (slice(first, first + size) for first in range(0, tensor_N.numel(), size))


@dataclass(frozen=True)
class Cast(Feedback):
    """Rounded to 16 bits.

    float16 ends at 65504 and loses digits below 6e-5, and gradients lie anywhere. So they are scaled by a
    power of two, the same on all ranks without asking: from the largest element of the last sum, `peak`, with
    room to grow by 2^HEADROOM_BITS before the next one. Each rank keeps to its share of the range, so that no
    sum of finite gradients overflows: what is above is cut off and waits in the residual.
    """

    dtype: torch.dtype

    HEADROOM_BITS: ClassVar[int] = 4

    @property
    def state_kinds(self) -> Mapping[str, StateKind]:
        peak: dict[str, StateKind] = {"peak": "shared"} if self.dtype == torch.float16 else {}
        return {**super().state_kinds, **peak}

    def start(self, layout: BucketLayout, like: Tensor) -> CompressionState:
        peak = {"peak": like.new_zeros(1, dtype=torch.float32)} if self.dtype == torch.float16 else {}
        return {**super().start(layout, like), **peak}

    def compress(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> tuple[Tensor, CompressionState]:
        """(payload [N] of `dtype`, state)"""
        # Where an element is not finite, the factor is nan and so is all that is sent: every rank sees it.
        scale, bound = self._scale_and_bound(state, gradient_N)
        bad = poison(gradient_N)
        finite = bad == 0
        factor, inverse = scale + bad, 1.0 / scale
        residual_N, payload_N = state.get("residual"), torch.empty_like(gradient_N, dtype=self.dtype)
        for block in _blocks(gradient_N):
            value = gradient_N[block]
            if residual_N is not None:
                value.add_(residual_N[block])
            payload_N[block] = value.clamp(-bound, bound).mul_(factor)
            if residual_N is not None:
                remainder = value.sub_(payload_N[block].to(value.dtype).mul_(inverse))
                residual_N[block] = torch.where(finite, remainder, residual_N[block])
        return payload_N, state

    def decompress(self, payload_N: Tensor, state: CompressionState, out_N: Tensor) -> Tensor:
        """`state`: as it was for `compress`."""
        scale, _ = self._scale_and_bound(state, out_N)
        return out_N.copy_(payload_N).mul_(1.0 / scale)

    def exchange(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionSteps:
        payload_N, state = self.compress(gradient_N, state, layout)
        summed_N = yield Request("allreduce", payload_N)
        result_N = self.decompress(summed_N, state, gradient_N)
        return result_N, self.observe(result_N, state, layout)

    def observe(self, summed_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionState:
        if self.dtype != torch.float16:
            return state
        now, before = torch.linalg.vector_norm(summed_N, math.inf).to(torch.float32).reshape(1), state["peak"]
        # Sinking slowly: one small gradient says little about the next.
        peak = torch.where((now > 0) & now.isfinite(), torch.maximum(now, before / 2), before)
        return {**state, "peak": peak}

    def _scale_and_bound(self, state: CompressionState, like: Tensor) -> tuple[Tensor, Tensor]:
        """(power of two, largest value that may be multiplied by it), of like's dtype, without dimensions."""
        if self.dtype != torch.float16:
            return like.new_ones(()), like.new_full((), math.inf)
        # Half the range for sums that are rounded upwards on their way.
        share_bits = 15 - (self.ranks - 1).bit_length()
        exponent = torch.frexp(torch.where(state["peak"] > 0, state["peak"], 1.0)).exponent
        bits = (share_bits - self.HEADROOM_BITS - exponent).clamp(-100, 100)
        scale = _power_of_two(bits).to(like.dtype).reshape(())
        return scale, 2.0**share_bits / scale

    def wire_bytes(self, layout: BucketLayout) -> int:
        return ring_allreduce_bytes(self.ranks, 2 * layout.numel)

    def touched_bytes(self, layout: BucketLayout) -> int:
        # A look at all for `poison`; gradient, residual in and out, payload; payload, gradient.
        compress = 4 + (3 if self.error_feedback else 1) * 4 + 2
        return super().touched_bytes(layout) + (compress + 2 + 4) * layout.numel


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 from its bits: pow is not exact everywhere, and all ranks must agree."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
