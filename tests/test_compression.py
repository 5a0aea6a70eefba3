"""Compressors, run by ranks simulated in one process: what arrives, what is left, what is refused.

The truth is the plain sum of the ranks' gradients in float64. `simulate` carries the collectives and counts their bytes as
the ring algorithms send them, from the sizes of what it was given.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.compression import make_compressor, redistribute, starts_at
from fastdistil.compressor import Compressor, Exchange, Layout, State
from fastdistil.errors import UserError
from fastdistil.powersgd import PowerSGD, orthonormal
from fastdistil.recipe import Compression

KINDS = ("none", "fp16", "bf16", "int8", "top-k", "random-k", "powersgd", "sign")
SMALL: dict[str, Any] = {"block": 16, "density": 0.05, "rank": 2, "frozen_variance_after": 5}
PIECES = ((0, (12, 20)), (240, (20,)), (264, (12, 20)), (504, (8, 5, 6)), (744, (3,)))
ODD = Layout(747, PIECES, 3)  # with a gap of 4 between two parameters
LAYOUTS = [ODD, Layout(1, ((0, (1,)),), 0), Layout(17, ((0, (17,)),), 1), Layout(256, ((0, (16, 16)),), 2)]


def compressors(kind: str, ranks: int, **more: Any) -> list[Compressor]:
    config = Compression(kind=kind, **{**SMALL, **more})  # type: ignore[arg-type]
    return [make_compressor(config, ranks=ranks, rank=rank, engine="torch", seed=7) for rank in range(ranks)]


def simulate(exchanges: Sequence[Exchange]) -> tuple[list[Tensor], list[State], int, int]:
    """Run all ranks' exchanges of a bucket side by side: (sums by rank, states by rank, bytes a rank sent, collectives)."""
    ranks, sent, collectives = len(exchanges), 0, 0
    answers: list[Any] = [None] * ranks
    while True:
        requests, results, states = [], [], []
        for exchange, answer in zip(exchanges, answers, strict=True):
            try:
                requests.append(exchange.send(answer))
            except StopIteration as ended:
                results.append(ended.value[0])
                states.append(ended.value[1])
        if results:
            assert not requests, "some ranks wait for a collective, others have ended"
            return results, states, sent, collectives
        kinds, tensors = {request.kind for request in requests}, [request.tensor for request in requests]
        assert len(kinds) == 1
        assert len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1
        assert all(tensor.ndim == 1 and tensor.is_contiguous() for tensor in tensors)
        nbytes, collectives = tensors[0].nbytes, collectives + 1
        match kinds.pop():
            case "allreduce":
                summed = tensors[0].clone()
                for tensor in tensors[1:]:
                    summed += tensor
                for tensor in tensors:
                    tensor.copy_(summed)
                answers = list(tensors)
                sent += math.ceil(2 * (ranks - 1) * nbytes / ranks)
            case "all_to_all":
                parts = [tensor.view(ranks, -1) for tensor in tensors]
                answers = [torch.cat([each[rank] for each in parts]) for rank in range(ranks)]
                sent += (ranks - 1) * (nbytes // ranks)
            case "all_gather":
                answers = [torch.cat(tensors) for _ in range(ranks)]
                sent += (ranks - 1) * nbytes


def gradients(ranks: int, layout: Layout, update: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of a typical size for this trainer, with something in common, and some exact zeros."""
    draws = torch.Generator().manual_seed(1000 * update + layout.index)
    common = torch.randn(layout.numel, generator=draws, dtype=torch.float64)
    found = []
    for _ in range(ranks):
        own = common + torch.randn(layout.numel, generator=draws, dtype=torch.float64)
        own[layout.numel // 2 :: 5] = 0.0
        covered = torch.zeros(layout.numel, dtype=torch.bool)
        for first, shape in layout.pieces:
            covered[first : first + math.prod(shape)] = True
        found.append((1e-4 * own * covered).to(dtype))
    return found


def run(
    kind: str, ranks: int, layout: Layout, updates: int, dtype: torch.dtype = torch.float64, **more: Any
) -> tuple[Tensor, list[State], Tensor]:
    """(everything received, the last states, the true sum)"""
    members = compressors(kind, ranks, **more)
    states = [member.start(layout, torch.zeros(0, dtype=dtype)) for member in members]
    received = truth = torch.zeros(layout.numel, dtype=dtype)
    for update in range(updates):
        given = gradients(ranks, layout, update, dtype)
        truth = truth + torch.stack(given).sum(0)
        exchanges = [m.exchange(g.clone(), s, layout, update) for m, g, s in zip(members, given, states, strict=True)]
        results, states, sent, collectives = simulate(exchanges)
        for result in results[1:]:
            assert torch.equal(result, results[0])
        assert results[0].dtype == dtype
        assert results[0].shape == (layout.numel,)
        assert collectives == members[0].requests(layout)
        if dtype == torch.float32:
            assert sent == members[0].wire_bytes(layout)
        received = received + results[0]
    return received, states, truth


def left(members: Sequence[Compressor], states: Sequence[State], layout: Layout) -> Tensor:
    """What is still owed, over all ranks."""
    total = torch.zeros(layout.numel, dtype=torch.float64)
    for name, kind in members[0].state_kinds.items():
        if kind == "rank":
            total += torch.stack([state[name].double() for state in states]).sum(0)
        if kind == "chunk":
            total += torch.cat([state[name].double().view(-1) for state in states])[: layout.numel]
    return total


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.numel))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(kind: str, ranks: int, layout: Layout) -> None:
    """Received + residuals = the true sum. Only sums in 16 bits on the way are rounded where nobody keeps the rest."""
    received, states, truth = run(kind, ranks, layout, 6)
    owed = left(compressors(kind, ranks), states, layout)
    rounding = {"fp16": 2**-11, "bf16": 2**-8}.get(kind, 0.0) if ranks > 1 else 0.0
    bound = 1e-12 + 6 * ranks * rounding
    assert float((received + owed - truth).abs().max()) <= bound * float(truth.abs().max() + owed.abs().max())
    if layout is ODD:
        assert kind == "none" or float(owed.abs().max()) > 1e-3 * 1e-4 * (0.01 if kind == "fp16" else 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_wire_bytes_and_collectives_are_as_declared(kind: str, ranks: int) -> None:
    """In float32, over odd sizes (asserted in `run`)."""
    for layout in LAYOUTS:
        run(kind, ranks, layout, 2, torch.float32)
        run(kind, ranks, layout, 2, torch.float32, error_feedback=False)
