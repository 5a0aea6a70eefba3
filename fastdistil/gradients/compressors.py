"""Compression of gradients on their way between ranks: (gradient, state) -> (payload, state), and the collectives between.

    kind       collectives of a bucket                       bytes that a rank sends, N ranks, n float32 elements
    none       allreduce                                     2 (N-1)/N 4n
    fp16 bf16  allreduce                                     2 (N-1)/N 2n
    powersgd   allreduce of P, of Q                          2 (N-1)/N 4 (R sum of (rows + columns) + what stays whole)
    int8       all-to-all, sum, all-gather                   2 (N-1)/N (n + 4n/block)
    top-k      all-gather                                    (N-1) 8k, so it is refused where that is more than `none` sends

Every rank gives its gradient of a bucket, every rank gets the same sum, bit for bit. What a payload leaves
out stays on the rank as `residual` and is added to its next gradient (error feedback; Seide et al. 2014,
Karimireddy et al. 2019). int8 rounds a second time, the sum: that rest stays with the rank that made it, as
`server`. So nothing is lost:

    sum over updates of what was received  +  all residuals  =  sum over updates and ranks of the gradients

to the last bits, except that fp16 and bf16 payloads are also rounded while they are summed on the way.

A gradient that is not finite makes the sum not finite on every rank, whatever was selected, and states stay
finite. Such an update is skipped, with its whole gradient, and buckets.py puts the states back as they were
before it: what had been owed and went with it is owed again. Gradients are float32, or float64 in tests;
values that travel unrounded keep their dtype.
"""

from typing import assert_never

import torch

from fastdistil.errors import UserError
from fastdistil.gradients.allreduced import Cast, Uncompressed
from fastdistil.gradients.compressor import (
    Compressor,
    ring_allreduce_bytes,
)
from fastdistil.gradients.gathered import Int8, TopK
from fastdistil.gradients.powersgd import PowerSGD
from fastdistil.recipe import Compression


def make_compressor(config: Compression, *, ranks: int, rank: int, engine: str, seed: int) -> Compressor:
    """Raises UserError for what cannot be had. `auto` must have been decided before."""
    kind = config.kind
    assert kind != "auto", "the cost model decides first"
    match kind:
        case "none":
            return Uncompressed(ranks)
        case "fp16":
            return Cast(ranks, config.error_feedback, torch.float16)
        case "bf16":
            if engine == "horovod":
                raise UserError(
                    "compression.kind=bf16: Horovod cannot sum bf16; set compression.kind=fp16 (as many bytes, and scaled so "
                    "that nothing overflows) or world.engine=torch"
                )
            return Cast(ranks, config.error_feedback, torch.bfloat16)
        case "int8":
            return Int8(ranks, config.error_feedback, rank, config.block)
        case "top-k":
            _check_top_k(config.density, ranks)
            return TopK(ranks, config.error_feedback, config.density)
        case "powersgd":
            return PowerSGD(ranks, config.error_feedback, config.rank, config.min_compression_rate, seed)
        case other:
            assert_never(other)


def _check_top_k(density: float, ranks: int) -> None:
    numel = 1_000_000
    chosen = round(density * numel)
    sent, dense = (ranks - 1) * chosen * 8, ring_allreduce_bytes(ranks, 4 * numel)
    if sent > dense:
        raise UserError(
            f"compression.kind=top-k with density {density:g} does not scale to {ranks} ranks: of a million elements each "
            f"would send ({ranks} - 1) * {chosen:,} * 8 = {sent / 1e6:,.1f} MB, uncompressed 2 * {ranks - 1}/{ranks} * 4 = "
            f"{dense / 1e6:,.1f} MB; set compression.density to at most {1 / ranks:.2g}, or compression.kind=int8"
        )


def starts_at(config: Compression) -> int:
    """The first update, from 0, that is compressed; what is before it goes uncompressed. At least 1: the
    first update shows in which order gradients get ready, and buckets are laid out anew after it."""
    if config.kind == "none":
        return 0
    return max(1, config.warmup_updates)
