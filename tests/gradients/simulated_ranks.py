"""Ranks simulated in one process, which exchange a bucket by their compressors.

`simulate` carries the collectives and counts their bytes as the ring algorithms send them, from the sizes of what it was
given.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil.gradients.compressor import CompressionState, CompressionSteps, Compressor
from fastdistil.gradients.compressors import make_compressor
from fastdistil.recipe import Compression

SMALL: dict[str, Any] = {"block": 16, "density": 0.05, "rank": 2}


def compressors(kind: str, ranks: int, **more: Any) -> list[Compressor]:
    config = Compression(kind=kind, **{**SMALL, **more})  # type: ignore[arg-type]
    return [make_compressor(config, ranks=ranks, rank=rank, engine="torch", seed=7) for rank in range(ranks)]


def simulate(exchanges: Sequence[CompressionSteps]) -> tuple[list[Tensor], list[CompressionState], int, int]:
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
                answers = [torch.cat([part[rank] for part in parts]) for rank in range(ranks)]
                sent += (ranks - 1) * (nbytes // ranks)
            case "all_gather":
                answers = [torch.cat(tensors) for _ in range(ranks)]
                sent += (ranks - 1) * nbytes
