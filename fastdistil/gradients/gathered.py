"""Compressors whose payloads cannot be summed on the way: top-k, which all ranks gather; int8 and sign, where each rank
decodes and sums its part of the bucket.

Legend: as in compressor.py.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdistil.gradients.compressor import Exchange, Feedback, Kind, Layout, Request, State, chosen_numel, part_numel
from fastdistil.kernels.block_codes import (
    dequantize_int8,
    dequantize_sum_int8,
    quantize_int8,
    sign_compress,
    sign_decompress,
    sign_decompress_sum,
)
from fastdistil.kernels.top_k import scatter_sum, top_k_select


@dataclass(frozen=True)
class TopK(Feedback):
    """The k largest elements of each rank, as indices and values."""

    density: float

    @property
    def linear(self) -> bool:
        return False

    def compress(self, gradient_N: Tensor, state: State, layout: Layout, update: int) -> tuple[Tensor, State]:
        """(payload uint8: int32 indices [K], then values [K]; state)"""
        residual_N = state.get("residual")
        # Takes what is not finite first: the sum shows it.
        indices_K, values_K = top_k_select(gradient_N, residual_N, chosen_numel(self.density, layout))
        if residual_N is not None:
            residual_N.nan_to_num_(0.0, 0.0, 0.0)  # there may be more of them than k
        return torch.cat([indices_K.view(torch.uint8), values_K.view(torch.uint8)]), state

    def decompress(self, payloads: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Of all ranks: their sum, [N]."""
        rows, chosen = payloads.view(self.ranks, -1), chosen_numel(self.density, layout)
        indices_RK, values_RK = _typed(rows[:, : 4 * chosen], torch.int32), _typed(rows[:, 4 * chosen :], dtype)
        return scatter_sum(indices_RK, values_RK, layout.numel)

    def exchange(self, gradient_N: Tensor, state: State, layout: Layout, update: int) -> Exchange:
        payload, state = self.compress(gradient_N, state, layout, update)
        payloads = yield Request("all_gather", payload)
        return self.decompress(payloads, layout, gradient_N.dtype), state

    def wire_bytes(self, layout: Layout) -> int:
        return (self.ranks - 1) * 8 * chosen_numel(self.density, layout)


@dataclass(frozen=True)
class TwoPhase(Feedback):
    """Each rank sums one part of the bucket: it gets that part's codes from all (all-to-all), rounds the sum again, with a
    residual of its own, and gives it to all (all-gather). Codes and their scales travel in one buffer of bytes."""

    rank: int
    block: int

    @property
    def linear(self) -> bool:
        return False

    @property
    def state_kinds(self) -> Mapping[str, Kind]:
        return {"residual": "rank", "server": "chunk"} if self.error_feedback else {}

    def start(self, layout: Layout, like: Tensor) -> State:
        if not self.error_feedback:
            return {}
        return {**super().start(layout, like), "server": like.new_zeros(self.part_numel(layout) // self.block, self.block)}

    def part_numel(self, layout: Layout) -> int:
        return part_numel(layout.numel, self.ranks, self.block)

    def part(self, layout: Layout) -> slice:
        """The elements that this rank sums; fewer than `part_numel`, or none, at the end of a bucket."""
        first = self.rank * self.part_numel(layout)
        return slice(min(first, layout.numel), min(first + self.part_numel(layout), layout.numel))

    def compress(self, gradient_N: Tensor, state: State, layout: Layout, update: int) -> tuple[Tensor, State]:
        """(payload uint8 [R * bytes of a part], state)"""
        codes, scales_B = self._encode(gradient_N, state.get("residual"))
        return self._pack(codes, scales_B, self.ranks, layout), state

    def sum_part(self, payloads: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        """From all ranks' codes of this rank's part: their sum, [elements of the part]."""
        part = self.part(layout)
        numel = part.stop - part.start
        if not numel:
            return torch.zeros(0, dtype=dtype, device=payloads.device)
        codes, scales_RB = self._unpack(payloads, layout)
        codes = codes[:, : self._code_bytes(numel)].contiguous()
        return self._decode_sum(codes, scales_RB[:, : -(-numel // self.block)].contiguous(), numel, dtype)

    def compress_part(self, summed_C: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        """(payload uint8 [bytes of a part]: the sum rounded again, state)"""
        if not summed_C.numel():
            return summed_C.new_zeros(self._part_bytes(layout), dtype=torch.uint8), state
        server_C = state["server"].view(-1)[: summed_C.numel()] if self.error_feedback else None
        return self._pack(*self._encode(summed_C, server_C), 1, layout), state

    def decompress(self, payloads: Tensor, state: State, layout: Layout, out_N: Tensor) -> Tensor:
        """From all ranks' sums of their parts."""
        codes, scales_RB = self._unpack(payloads, layout)
        scales_B = scales_RB.reshape(-1)[: -(-layout.numel // self.block)]
        return self._decode(codes.reshape(-1)[: self._code_bytes(layout.numel)], scales_B, out_N)

    def exchange(self, gradient_N: Tensor, state: State, layout: Layout, update: int) -> Exchange:
        payload, state = self.compress(gradient_N, state, layout, update)
        payloads = yield Request("all_to_all", payload)
        payload, state = self.compress_part(self.sum_part(payloads, layout, gradient_N.dtype), state, layout)
        payloads = yield Request("all_gather", payload)
        return self.decompress(payloads, state, layout, gradient_N), state

    def wire_bytes(self, layout: Layout) -> int:
        return 2 * (self.ranks - 1) * self._part_bytes(layout)

    def requests(self, layout: Layout) -> int:
        return 2

    def _part_bytes(self, layout: Layout) -> int:
        numel = self.part_numel(layout)
        return self._code_bytes(numel) + 4 * (numel // self.block)

    def _pack(self, codes: Tensor, scales_B: Tensor, parts: int, layout: Layout) -> Tensor:
        code_bytes = self._code_bytes(self.part_numel(layout))
        rows = codes.new_zeros(parts, self._part_bytes(layout), dtype=torch.uint8)
        _lay(rows[:, :code_bytes], codes.view(torch.uint8))
        _lay(rows[:, code_bytes:], scales_B.view(torch.uint8))
        return rows.view(-1)

    def _unpack(self, payloads: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """(codes uint8 [R, bytes], scales_RB)"""
        rows, code_bytes = payloads.view(self.ranks, -1), self._code_bytes(self.part_numel(layout))
        return rows[:, :code_bytes], _typed(rows[:, code_bytes:], torch.float32)

    @abstractmethod
    def _code_bytes(self, numel: int) -> int: ...

    @abstractmethod
    def _encode(self, gradient_N: Tensor, residual_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """(codes of one byte each, scales_B)"""

    @abstractmethod
    def _decode(self, codes: Tensor, scales_B: Tensor, out_N: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode_sum(self, codes_R: Tensor, scales_RB: Tensor, numel: int, dtype: torch.dtype) -> Tensor: ...


def _typed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes, row by row, as `dtype`; copied, since such a view must begin at a multiple of the dtype's size."""
    return rows.reshape(-1).clone().view(dtype).view(rows.shape[0], -1)


def _lay(rows: Tensor, flat: Tensor) -> None:
    """Fill rows, one after the other, as far as `flat` reaches."""
    width = rows.shape[1]
    whole, rest = divmod(flat.numel(), width)
    rows[:whole] = flat[: whole * width].view(whole, width)
    if rest:
        rows[whole, :rest] = flat[whole * width :]


@dataclass(frozen=True)
class Int8(TwoPhase):
    """8 bits an element, and a scale for each block."""

    def _code_bytes(self, numel: int) -> int:
        return numel

    def _encode(self, gradient_N: Tensor, residual_N: Tensor | None) -> tuple[Tensor, Tensor]:
        return quantize_int8(gradient_N, residual_N, block=self.block)

    def _decode(self, codes: Tensor, scales_B: Tensor, out_N: Tensor) -> Tensor:
        return dequantize_int8(codes.view(torch.int8), scales_B, block=self.block, out=out_N)

    def _decode_sum(self, codes_R: Tensor, scales_RB: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return dequantize_sum_int8(codes_R.view(torch.int8), scales_RB, block=self.block, dtype=dtype)


@dataclass(frozen=True)
class Sign(TwoPhase):
    """One bit an element, and each block's mean magnitude.

    A bit cannot say 0. An element that has no gradient (a position beyond the longest text) would be moved to and fro, and far,
    as its frozen second moment is 0 too. Elements whose sum was exactly 0 in every update before compression started are
    therefore left out: they get 0, and what gradient they are given later stays in the residual (1-bit Adam has a mask for
    the same reason). A block that is all 0 sends 0. Any other element that happens to be 0 gets plus or minus its block's mean
    and, by the residual, the opposite next time.
    """

    UNKNOWN: ClassVar[int] = 0
    ALWAYS_ZERO: ClassVar[int] = 1
    USED: ClassVar[int] = 2

    @property
    def state_kinds(self) -> Mapping[str, Kind]:
        return {**super().state_kinds, "used": "shared"}

    def start(self, layout: Layout, like: Tensor) -> State:
        return {**super().start(layout, like), "used": like.new_zeros(layout.numel, dtype=torch.uint8)}

    def observe(self, summed_N: Tensor, state: State, layout: Layout) -> State:
        now_N = (summed_N != 0).to(torch.uint8).add_(self.ALWAYS_ZERO)
        return {**state, "used": torch.maximum(state["used"], now_N)}

    def compress(self, gradient_N: Tensor, state: State, layout: Layout, update: int) -> tuple[Tensor, State]:
        out_N, residual_N = state["used"] == self.ALWAYS_ZERO, state.get("residual")
        if residual_N is None:
            return super().compress(gradient_N.mul_(~out_N), state, layout, update)
        kept_N = torch.where(out_N & gradient_N.isfinite(), residual_N + gradient_N, residual_N)
        residual_N = residual_N.masked_fill(out_N, 0.0)
        # Multiplied, not overwritten: what is not finite stays so.
        payload, state = super().compress(gradient_N.mul_(~out_N), {**state, "residual": residual_N}, layout, update)
        return payload, {**state, "residual": torch.where(out_N, kept_N, residual_N)}

    def compress_part(self, summed_C: Tensor, state: State, layout: Layout) -> tuple[Tensor, State]:
        out_C = state["used"][self.part(layout)] == self.ALWAYS_ZERO
        payload, state = super().compress_part(summed_C, state, layout)
        if self.error_feedback:
            state["server"].view(-1)[: out_C.numel()].masked_fill_(out_C, 0.0)
        return payload, state

    def decompress(self, payloads: Tensor, state: State, layout: Layout, out_N: Tensor) -> Tensor:
        return super().decompress(payloads, state, layout, out_N).mul_(state["used"] != self.ALWAYS_ZERO)

    def _code_bytes(self, numel: int) -> int:
        return -(-numel // 8)

    def _encode(self, gradient_N: Tensor, residual_N: Tensor | None) -> tuple[Tensor, Tensor]:
        return sign_compress(gradient_N, residual_N, block=self.block)

    def _decode(self, codes: Tensor, scales_B: Tensor, out_N: Tensor) -> Tensor:
        return sign_decompress(codes, scales_B, out_N.numel(), block=self.block, out=out_N)

    def _decode_sum(self, codes_R: Tensor, scales_RB: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        return sign_decompress_sum(codes_R, scales_RB, numel, block=self.block, dtype=dtype)
