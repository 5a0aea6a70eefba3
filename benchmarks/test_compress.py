"""Gradient compression against the same in eager torch: a gradient of one large bucket, with its residual.

The eager sides are the natural few lines; of top-k they are torch.topk and two gathers. Density of top-k: 1%.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.kernels.block_codes import bytes_moved, dequantize_int8, dequantize_sum_int8, quantize_int8
from fastdistil.kernels.top_k import scatter_sum, top_k_select

from .measure import DEVICE, measured

NUMEL = 2**28 if DEVICE.type == "cuda" else 2**24
BLOCK = 1024
RANKS = 4
CHOSEN = NUMEL // 100
ROUNDS = 5
SIDES = ["fastdistil", "eager"]


def eager_quantize_int8(gradient: Tensor, residual: Tensor) -> None:
    v = (gradient + residual).view(-1, BLOCK)
    scale = v.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, v / scale, 0).round().to(torch.int8)
    residual.copy_((v - codes * scale).flatten())


def eager_top_k(gradient: Tensor, residual: Tensor) -> None:
    residual.add_(gradient)
    indices = residual.abs().topk(CHOSEN, sorted=False).indices.sort().values
    residual[indices].clone()
    residual[indices] = 0


ENCODERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Any]]] = {
    "quantize_int8": (lambda gradient, residual: quantize_int8(gradient, residual, block=BLOCK), eager_quantize_int8),
    "top_k_select": (lambda gradient, residual: top_k_select(gradient, residual, CHOSEN), eager_top_k),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("op", ENCODERS)
def test_encode(benchmark: Any, op: str, side: str) -> None:
    torch.manual_seed(0)
    gradient, residual = torch.randn(NUMEL, device=DEVICE), torch.randn(NUMEL, device=DEVICE)
    call = ENCODERS[op][SIDES.index(side)]
    benchmark.group = f"{op} N={NUMEL}"
    moved = bytes_moved(op, NUMEL, block=BLOCK, k=CHOSEN)
    measured(benchmark, lambda: call(gradient, residual), ROUNDS, side=side, bytes=moved)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("ranks", [1, RANKS])
@pytest.mark.parametrize("op", ["int8", "top_k"])
def test_decode(benchmark: Any, op: str, ranks: int, side: str) -> None:
    """One rank's, and the sum of several."""
    torch.manual_seed(0)
    if op == "top_k" and ranks == 1:
        pytest.skip("one op decodes top-k, whatever the number of ranks")
    pairs = []
    for _ in range(ranks):
        gradient = torch.randn(NUMEL, device=DEVICE)
        match op:
            case "int8":
                pairs.append(quantize_int8(gradient, None, block=BLOCK))
            case _:
                pairs.append(top_k_select(gradient, None, CHOSEN))
    del gradient
    coded, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    sides: dict[tuple[str, str], Callable[[], Any]] = {
        ("int8", "fastdistil"): lambda: (
            dequantize_int8(coded[0], values[0], block=BLOCK) if ranks == 1 else dequantize_sum_int8(coded, values, block=BLOCK)
        ),
        ("int8", "eager"): lambda: sum(c.view(-1, BLOCK) * s[:, None] for c, s in zip(coded, values, strict=True)),
        ("top_k", "fastdistil"): lambda: scatter_sum(coded, values, NUMEL),
        ("top_k", "eager"): lambda: torch.zeros(NUMEL, device=DEVICE).index_put_(
            (coded.flatten().long(),), values.flatten(), accumulate=True
        ),
    }
    name = {"int8": "dequantize_sum_int8", "top_k": "scatter_sum"}[op]
    benchmark.group = f"{name} N={NUMEL} R={ranks}"
    moved = bytes_moved(name, NUMEL, block=BLOCK, ranks=ranks, k=CHOSEN)
    measured(benchmark, sides[op, side], ROUNDS, side=side, bytes=moved)
