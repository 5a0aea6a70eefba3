"""PowerSGD: low-rank factors of the gradient matrices in a bucket, one batched product for each shape.

    P = M Q       summed over ranks, its columns made orthonormal
    Q = M' P      summed over ranks, the next update's start
    M ~ P Q'      of the sum over ranks

Source: Vogels, Karimireddy, Jaggi 2019, algorithm 1: one step of power iteration an update, started where the
last one ended. Each matrix is made orthonormal by itself, also where several of one shape lie in a bucket and
where the rank is 1.

Legend: B matrices of one shape [M, N] in a bucket, R columns of the factors.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
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
    poison,
    ring_allreduce_bytes,
)

Pieces = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class FactorGroup:
    """The matrices of one shape."""

    rows: int
    columns: int
    rank: int
    firsts: tuple[int, ...]
    """The first element of each matrix in the bucket."""

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each matrix [M, N] in a bucket's elements."""
        return [flat[first : first + self.rows * self.columns].view(self.rows, self.columns) for first in self.firsts]

    def stacked(self, flat: Tensor) -> Tensor:
        """[B, M, N]; a view where there is one matrix."""
        views = self.views(flat)
        return views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)


@dataclass(frozen=True)
class FactorPlan:
    """What of a bucket is sent as factors, and what as it is."""

    groups: tuple[FactorGroup, ...]
    rest: tuple[tuple[int, int], ...]
    """(first, end) of the elements in no group."""

    @property
    def left_numel(self) -> int:
        return sum(len(group.firsts) * group.rows * group.rank for group in self.groups)

    @property
    def right_numel(self) -> int:
        return sum(len(group.firsts) * group.columns * group.rank for group in self.groups)

    @property
    def rest_numel(self) -> int:
        return sum(end - first for first, end in self.rest)

    def lefts(self, flat: Tensor) -> list[Tensor]:
        """[B, M, R] of each group, views of [left_numel]."""
        shapes = [(len(group.firsts), group.rows, group.rank) for group in self.groups]
        return list(_cut(flat, shapes))

    def rights(self, flat: Tensor) -> list[Tensor]:
        """[B, N, R] of each group, views of [right_numel]."""
        shapes = [(len(group.firsts), group.columns, group.rank) for group in self.groups]
        return list(_cut(flat, shapes))


def _cut(flat: Tensor, shapes: list[tuple[int, int, int]]) -> Iterator[Tensor]:
    first = 0
    for shape in shapes:
        yield flat[first : first + math.prod(shape)].view(shape)
        first += math.prod(shape)


@lru_cache(maxsize=4096)
def make_plan(numel: int, pieces: Pieces, rank: int, min_rate: float) -> FactorPlan:
    """Matrices are the parameters with at least two dimensions, as [first, rest]; those whose factors would
    not be smaller by `min_rate` are sent as they are, like vectors and whatever lies between parameters."""
    # First elements of the matrices of each shape.
    shapes: dict[tuple[int, int], list[int]] = {}
    for first, shape in pieces:
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (math.prod(shape), 1)
        columns_of_factors = min(rank, rows, columns)
        if len(shape) >= 2 and rows * columns >= min_rate * columns_of_factors * (rows + columns):
            shapes.setdefault((rows, columns), []).append(first)
    groups = tuple(
        FactorGroup(rows, columns, min(rank, rows, columns), tuple(sorted(firsts)))
        for (rows, columns), firsts in shapes.items()
    )
    # What no matrix takes: from 0 to the first one, between them, and to the end.
    taken = sorted((first, first + group.rows * group.columns) for group in groups for first in group.firsts)
    edges = [0, *(edge for span in taken for edge in span), numel]
    spans = tuple((first, end) for first, end in zip(edges[::2], edges[1::2], strict=True) if end > first)
    return FactorPlan(groups, spans)


def orthonormal(columns_BMR: Tensor) -> Tensor:
    """Gram-Schmidt, each column twice (Giraud et al. 2005: then orthogonal to the last bits); its own matrix's columns only.

    A column that the ones before it span, up to rounding, becomes 0: its direction would be noise, and not
    orthogonal to them. What is not finite stays so.
    """
    made_BMR = torch.zeros_like(columns_BMR)
    negligible = 100 * torch.finfo(columns_BMR.dtype).eps
    for number in range(columns_BMR.shape[2]):
        # One column of every matrix.
        column_BM1 = columns_BMR[:, :, number : number + 1]
        size_B11 = torch.linalg.vector_norm(column_BM1, dim=1, keepdim=True)
        # Before the products: the squares of tiny gradients would be 0.
        column_BM1 = column_BM1 / torch.where(size_B11 > 0, size_B11, 1.0)
        before_BMK = made_BMR[:, :, :number]
        for _ in range(2 if number else 0):
            column_BM1 = column_BM1 - before_BMK @ (before_BMK.mT @ column_BM1)
        left_B11 = torch.linalg.vector_norm(column_BM1, dim=1, keepdim=True)
        made_BMR[:, :, number : number + 1] = torch.where(left_B11 <= negligible, 0.0, column_BM1 / left_B11)
    return made_BMR


def next_start(right_BNR: Tensor, before_BNR: Tensor) -> Tensor:
    """Q for the next update, columns of length 1; where one has none left, or is not finite, the one before stays."""
    size_B1R = torch.linalg.vector_norm(right_BNR, dim=1, keepdim=True)
    usable = (size_B1R > 0) & size_B1R.isfinite()
    return torch.where(usable, right_BNR / torch.where(usable, size_B1R, 1.0), before_BNR)


@dataclass(frozen=True)
class PowerSGD(Feedback):
    """Vectors, and matrices that would shrink too little, travel as they are, together with P."""

    rank: int
    min_rate: float
    seed: int

    whole_parameters: ClassVar[bool] = True

    @property
    def state_kinds(self) -> Mapping[str, StateKind]:
        return {**super().state_kinds, "q": "shared"}

    def plan(self, layout: BucketLayout) -> FactorPlan:
        return make_plan(layout.numel, layout.pieces, self.rank, self.min_rate)

    def start(self, layout: BucketLayout, like: Tensor) -> CompressionState:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 % 2**63 + layout.index)
        q = torch.randn(self.plan(layout).right_numel, generator=draws).to(like)
        return {**super().start(layout, like), "q": q}

    def compress(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> tuple[Tensor, CompressionState]:
        """(payload: P of all matrices and the rest, state). Afterwards `gradient_N` has the residual in it."""
        plan = self.plan(layout)
        if self.error_feedback:
            gradient_N.add_(state["residual"])
        payload = gradient_N.new_empty(plan.left_numel + plan.rest_numel)
        lefts, rights = plan.lefts(payload), plan.rights(state["q"])
        for group, left_BMR, right_BNR in zip(plan.groups, lefts, rights, strict=True):
            torch.bmm(group.stacked(gradient_N), right_BNR, out=left_BMR)
        at = plan.left_numel
        for first, end in plan.rest:
            payload[at : at + end - first] = gradient_N[first:end]
            at += end - first
        return payload, state

    def compress_right(
        self, value_N: Tensor, summed: Tensor, state: CompressionState, layout: BucketLayout
    ) -> tuple[Tensor, list[Tensor], CompressionState]:
        """Return (payload: Q of all matrices, P made orthonormal, state), computed from the first payload's sum.

        What this rank sends altogether is P Q' with its own Q; the residual is known before the sum of Q is.
        """
        plan = self.plan(layout)
        lefts = [orthonormal(left_BMR) for left_BMR in plan.lefts(summed)]
        payload = value_N.new_empty(plan.right_numel)
        rights = plan.rights(payload)
        for group, left_BMR, right_BNR in zip(plan.groups, lefts, rights, strict=True):
            torch.bmm(group.stacked(value_N).mT, left_BMR, out=right_BNR)
        if not self.error_feedback:
            return payload, lefts, state
        # The residual is the gradient less P Q'; where the sum is not finite, the one before.
        finite, before_N = poison(summed) == 0, state["residual"]
        residual_N = torch.where(finite, value_N, before_N)
        for group, left_BMR, right_BNR in zip(plan.groups, lefts, rights, strict=True):
            sent_BMN = torch.where(finite, left_BMR @ right_BNR.mT, 0.0)
            for rest_MN, sent_MN in zip(group.views(residual_N), sent_BMN, strict=True):
                rest_MN.sub_(sent_MN)
        # What was sent as it is leaves none.
        for first, end in plan.rest:
            residual_N[first:end] = torch.where(finite, 0.0, before_N[first:end])
        return payload, lefts, {**state, "residual": residual_N}

    def decompress(self, summed: Tensor, lefts: list[Tensor], q: Tensor, layout: BucketLayout, out_N: Tensor) -> Tensor:
        """Write the sum that both payloads' sums stand for to `out_N`, and return it."""
        plan = self.plan(layout)
        for group, left_BMR, right_BNR in zip(plan.groups, lefts, plan.rights(q), strict=True):
            for out_MN, sum_MN in zip(group.views(out_N), left_BMR @ right_BNR.mT, strict=True):
                out_MN.copy_(sum_MN)
        at = plan.left_numel
        for first, end in plan.rest:
            out_N[first:end] = summed[at : at + end - first]
            at += end - first
        return out_N

    def exchange(self, gradient_N: Tensor, state: CompressionState, layout: BucketLayout) -> CompressionSteps:
        plan = self.plan(layout)
        payload, state = self.compress(gradient_N, state, layout)
        summed = yield Request("allreduce", payload)
        payload, lefts, state = self.compress_right(gradient_N, summed, state, layout)
        if not plan.groups:
            return self.decompress(summed, lefts, payload, layout, gradient_N), state
        q = yield Request("allreduce", payload)
        result_N = self.decompress(summed, lefts, q, layout, gradient_N)
        for right_BNR, before_BNR in zip(plan.rights(q), plan.rights(state["q"]), strict=True):
            right_BNR.copy_(next_start(right_BNR, before_BNR))
        return result_N, {**state, "q": q}

    def wire_bytes(self, layout: BucketLayout) -> int:
        plan = self.plan(layout)
        first, second = plan.left_numel + plan.rest_numel, plan.right_numel
        return ring_allreduce_bytes(self.ranks, 4 * first) + ring_allreduce_bytes(self.ranks, 4 * second)

    def requests(self, layout: BucketLayout) -> int:
        return 2 if self.plan(layout).groups else 1
