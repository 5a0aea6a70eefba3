"""Compressors whose payloads cannot be summed on the way: top-k, which all ranks gather; int8, where each
rank decodes and sums its part of the bucket.

Legend: as in compressor.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdistil.gradients.compressor import (
    BucketLayout,
    CompressionState,
    CompressionSteps,
    Feedback,
    Request,
    StateKind,
    chosen_numel,
    part_numel,
)
from fastdistil.kernels.block_codes import bytes_moved, dequantize_int8, dequantize_sum_int8, quantize_int8
from fastdistil.kernels.top_k import scatter_sum, top_k_select


@dataclass(frozen=True)
class TopK(Feedback):
    """The k largest elements of each rank, as indices and values."""

    density: float

    linear: ClassVar[bool] = False

    def compress(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> tuple[Tensor, CompressionState]:
        """(payload uint8: int32 indices [K], then values [K]; state)"""
        residual_N = state.get("residual")
        # Takes what is not finite first: the sum shows it.
        indices_K, values_K = top_k_select(gradient_N, residual_N, chosen_numel(self.density, layout))
        if residual_N is not None:
            residual_N.nan_to_num_(0.0, 0.0, 0.0)  # there may be more of them than k
        return torch.cat([indices_K.view(torch.uint8), values_K.view(torch.uint8)]), state

    def decompress(self, payloads: Tensor, layout: BucketLayout, dtype: torch.dtype) -> Tensor:
        """Return the sum of all ranks' payloads, [N]."""
        rows, chosen = payloads.view(self.ranks, -1), chosen_numel(self.density, layout)
        indices_RK, values_RK = _typed(rows[:, : 4 * chosen], torch.int32), _typed(rows[:, 4 * chosen :], dtype)
        return scatter_sum(indices_RK, values_RK, layout.numel)

    def exchange(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionSteps:
        payload, state = self.compress(gradient_N, state, layout)
        payloads = yield Request("all_gather", payload)
        return self.decompress(payloads, layout, gradient_N.dtype), state

    def wire_bytes(self, layout: BucketLayout) -> int:
        return (self.ranks - 1) * 8 * chosen_numel(self.density, layout)


@dataclass(frozen=True)
class Int8(Feedback):
    """8 bits an element, and a scale for each block. Each rank sums one part of the bucket: it gets that
    part's codes from all (all-to-all), rounds the sum again, with a residual of its own, and gives it to all
    (all-gather). Codes and their scales travel in one buffer of bytes."""

    rank: int
    block: int

    linear: ClassVar[bool] = False

    @property
    def state_kinds(self) -> Mapping[str, StateKind]:
        return {"residual": "rank", "server": "chunk"} if self.error_feedback else {}

    def start(self, layout: BucketLayout, like: Tensor) -> CompressionState:
        if not self.error_feedback:
            return {}
        return {**super().start(layout, like), "server": like.new_zeros(self.part_numel(layout) // self.block, self.block)}

    def part_numel(self, layout: BucketLayout) -> int:
        return part_numel(layout.numel, self.ranks, self.block)

    def part(self, layout: BucketLayout) -> slice:
        """The elements that this rank sums; fewer than `part_numel`, or none, at the end of a bucket."""
        first = self.rank * self.part_numel(layout)
        return slice(min(first, layout.numel), min(first + self.part_numel(layout), layout.numel))

    def compress(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> tuple[Tensor, CompressionState]:
        """(payload uint8 [R * bytes of a part], state)"""
        codes_N, scales_B = quantize_int8(gradient_N, state.get("residual"), block=self.block)
        return self._pack(codes_N, scales_B, self.ranks, layout), state

    def sum_part(self, payloads: Tensor, layout: BucketLayout, dtype: torch.dtype) -> Tensor:
        """Return the sum of all ranks' codes of this rank's part, [elements of the part]."""
        part = self.part(layout)
        numel = part.stop - part.start
        if not numel:
            return torch.zeros(0, dtype=dtype, device=payloads.device)
        # Parts are padded to blocks; the last ones are shorter.
        codes, scales_RB = self._unpack(payloads, layout)
        codes = codes[:, :numel].contiguous()
        scales_RB = scales_RB[:, : -(-numel // self.block)].contiguous()
        return dequantize_sum_int8(codes, scales_RB, block=self.block, dtype=dtype)

    def compress_part(self, summed_C: Tensor, state: CompressionState, layout: BucketLayout) -> tuple[Tensor, CompressionState]:
        """(payload uint8 [bytes of a part]: the sum rounded again, state)"""
        if not summed_C.numel():
            return summed_C.new_zeros(self._part_bytes(layout), dtype=torch.uint8), state
        server_C = state["server"].view(-1)[: summed_C.numel()] if self.error_feedback else None
        return self._pack(*quantize_int8(summed_C, server_C, block=self.block), 1, layout), state

    def decompress(self, payloads: Tensor, layout: BucketLayout, out_N: Tensor) -> Tensor:
        """Write all ranks' sums of their parts to `out_N`, decompressed, and return it."""
        codes, scales_RB = self._unpack(payloads, layout)
        scales_B = scales_RB.reshape(-1)[: -(-layout.numel // self.block)]
        return dequantize_int8(codes.reshape(-1)[: layout.numel], scales_B, block=self.block, out=out_N)

    def exchange(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionSteps:
        payload, state = self.compress(gradient_N, state, layout)
        payloads = yield Request("all_to_all", payload)
        payload, state = self.compress_part(self.sum_part(payloads, layout, gradient_N.dtype), state, layout)
        payloads = yield Request("all_gather", payload)
        return self.decompress(payloads, layout, gradient_N), state

    def wire_bytes(self, layout: BucketLayout) -> int:
        return 2 * (self.ranks - 1) * self._part_bytes(layout)

    def requests(self, layout: BucketLayout) -> int:
        return 2

    def touched_bytes(self, layout: BucketLayout) -> int:
        part, feedback = min(self.part_numel(layout), layout.numel), self.error_feedback
        return super().touched_bytes(layout) + sum(
            (
                bytes_moved("quantize_int8", layout.numel, block=self.block, residual=feedback),
                bytes_moved("dequantize_sum_int8", part, block=self.block, ranks=self.ranks),
                bytes_moved("quantize_int8", part, block=self.block, residual=feedback),
                bytes_moved("dequantize_int8", layout.numel, block=self.block),
            )
        )

    def _part_bytes(self, layout: BucketLayout) -> int:
        numel = self.part_numel(layout)
        return numel + 4 * (numel // self.block)

    def _pack(self, codes_N: Tensor, scales_B: Tensor, parts: int, layout: BucketLayout) -> Tensor:
        numel = self.part_numel(layout)
        rows = codes_N.new_zeros(parts, self._part_bytes(layout), dtype=torch.uint8)
        _lay(rows[:, :numel], codes_N.view(torch.uint8))
        _lay(rows[:, numel:], scales_B.view(torch.uint8))
        return rows.view(-1)

    def _unpack(self, payloads: Tensor, layout: BucketLayout) -> tuple[Tensor, Tensor]:
        """(codes int8 [R, C], scales_RB)"""
        rows, numel = payloads.view(self.ranks, -1), self.part_numel(layout)
        return rows[:, :numel].view(torch.int8), _typed(rows[:, numel:], torch.float32)


def _typed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, row by row, as `dtype`; copied, since such a view must begin at a multiple of the dtype's size."""
    return rows.reshape(-1).clone().view(dtype).view(rows.shape[0], -1)


def _lay(rows: Tensor, flat: Tensor) -> None:
    """Fill rows, one after the other, as far as `flat` reaches."""
    width = rows.shape[1]
    full_rows, remainder = divmod(flat.numel(), width)
    rows[:full_rows] = flat[: full_rows * width].view(full_rows, width)
    if remainder:
        rows[full_rows, :remainder] = flat[full_rows * width :]
