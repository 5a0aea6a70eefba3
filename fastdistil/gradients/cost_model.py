"""What an update costs over several ranks: seconds from bytes, bandwidth and latency; and which compression pays.

The alpha-beta model of collectives (Thakur et al. 2005), with N ranks on n nodes, S bytes after compression, B bytes a second:

    allreduce     (2 (N-1) - 2 (n-1)) a_local + 2 (n-1) a  +  2 (N-1)/N S/B       ring; B of all rings together
    two-phase     the same with (N-1) steps in each phase
    exposed       max(last bucket, exchange + compression - what backward hides)
    update        accumulation * micro-batch + exposed + optimizer

Only the last micro-batch's backward can hide the exchange: at many micro-batches an update, compression has little to win.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastdistil.gradients.compressor import BucketLayout
from fastdistil.gradients.compressors import make_compressor
from fastdistil.profiling.quantities import in_ms, three_digits
from fastdistil.recipe import Compression

PredictedKind = Literal["none", "fp16", "bf16", "int8"]
SIMPLEST_FIRST: tuple[PredictedKind, ...] = ("none", "fp16", "bf16", "int8")

HIDES = 0.4 * 0.9
"""Share of a micro-batch's time that hides an exchange: backward is 0.4 of it for a student of half the teacher's depth
(forward 1, backward 2, the teacher's forward 2), and 0.9 of backward comes after the first bucket is ready."""
WORTH = 0.02
"""A simpler compressor is taken where it costs at most this share of the update more."""

GLOO_FP16_S = 22e-9
"""Seconds in which Horovod's Gloo sums one float16 element: an allreduce of 16.8M between two ranks, which
sum half of them each, took 130 to 245 ms where float32 took 37 to 66."""


def allreduce_s(
    ranks: int,
    nodes: int,
    nbytes: float,
    bytes_per_s: float,
    latency_s: float,
    *,
    local_latency_s: float | None = None,
) -> float:
    """Return the seconds of one ring allreduce of `nbytes`.

    `bytes_per_s`: of all rings together. `latency_s`: of a step between nodes, `local_latency_s` within one (None: the same).
    """
    assert 1 <= nodes <= ranks
    between = 2 * (nodes - 1)
    within = 2 * (ranks - 1) - between
    latency = between * latency_s + within * (latency_s if local_latency_s is None else local_latency_s)
    return latency + 2 * (ranks - 1) / ranks * nbytes / bytes_per_s


class ExchangeCost(NamedTuple):
    """What exchanging a bucket costs one rank."""

    sent_bytes: int
    collectives: int
    touched_bytes: int
    """Bytes of memory that compressing and decompressing reads and writes."""


def exchange_cost(kind: PredictedKind, ranks: int, gradient_bytes: int, engine: str) -> ExchangeCost:
    """Return what float32 gradients cost as one bucket."""
    numel = gradient_bytes // 4
    compressor = make_compressor(Compression(kind=kind), ranks=ranks, rank=0, engine=engine, seed=0)
    layout = BucketLayout(numel, ((0, (numel,)),), 0)
    return ExchangeCost(compressor.wire_bytes(layout), compressor.requests(layout), compressor.touched_bytes(layout))


@dataclass(frozen=True, kw_only=True)
class MeasuredExchange:
    """What uncompressed updates in this run measured."""

    ranks: int
    gradient_bytes: int
    """float32"""
    update_s: float
    accumulation: int
    bandwidth_bytes_per_s: float
    """What a rank sends in a ring allreduce, all rings together: 2 (N-1)/N bytes / seconds."""
    latency_s: float
    """Time of a whole allreduce of a few bytes."""
    engine: str
    device: str
    compress_bytes_per_s: float
    """Memory read and written, per second."""
    buckets: int = 1


@dataclass(frozen=True)
class UpdatePrediction:
    kind: PredictedKind
    exchange_s: float
    compress_s: float
    exposed_s: float
    update_s: float


@dataclass(frozen=True)
class Choice:
    kind: PredictedKind
    reason: str


def predict(measured: MeasuredExchange, kind: PredictedKind) -> UpdatePrediction:
    """Predict an update with `kind` from the measured one without compression."""
    exchange, compress = _exchange_and_compress_s(measured, kind)
    # What is measured has the uncompressed exchange's exposed part in it: with U = c + exposed(c) and c the
    # computing, solved for c where something was exposed, and where nothing was.
    plain, _ = _exchange_and_compress_s(measured, "none")
    hidden_share = HIDES / measured.accumulation
    computing = max((measured.update_s - plain) / (1 - hidden_share), 0.0)
    if hidden_share * computing > plain:
        computing = measured.update_s
    # On a CPU, compressing takes the time of the cores that run backward: nothing hides it.
    unhidden = compress if measured.device == "cpu" else 0.0
    exposed = max(0.0, exchange + compress - unhidden - hidden_share * computing) + unhidden
    return UpdatePrediction(kind, exchange, compress, exposed, computing + exposed)


def _exchange_and_compress_s(measured: MeasuredExchange, kind: PredictedKind) -> tuple[float, float]:
    cost = exchange_cost(kind, measured.ranks, measured.gradient_bytes, measured.engine)
    seconds = cost.sent_bytes / measured.bandwidth_bytes_per_s
    if kind == "fp16" and measured.engine == "horovod" and measured.device == "cpu":
        numel = measured.gradient_bytes // 4
        seconds = max(seconds, GLOO_FP16_S * numel * (measured.ranks - 1) / measured.ranks)
    exchange = seconds + measured.buckets * cost.collectives * measured.latency_s
    return exchange, cost.touched_bytes / measured.compress_bytes_per_s


def candidates_for(engine: str, allreduce_only: bool = False) -> tuple[PredictedKind, ...]:
    """Return the kinds to choose from: bf16, which costs what fp16 does, only where Horovod does not sum."""
    kinds = [kind for kind in SIMPLEST_FIRST if kind != "bf16" or engine == "torch"]
    return tuple(kind for kind in kinds if not allreduce_only or kind != "int8")


def choose(measured: MeasuredExchange, allreduce_only: bool = False) -> Choice:
    """Choose the simplest candidate whose predicted update is within WORTH of the fastest, and say why in one sentence."""
    table = [predict(measured, kind) for kind in candidates_for(measured.engine, allreduce_only)]
    fastest = min(table, key=lambda row: row.update_s)
    chosen = next(row for row in table if row.update_s <= (1 + WORTH) * fastest.update_s)
    plain = table[0]
    summary = (
        f"the exchange takes {in_ms(plain.exchange_s)} of a {in_ms(measured.update_s)} update at "
        f"{three_digits(measured.bandwidth_bytes_per_s / 1e9)} GB/s, {in_ms(plain.exposed_s)} of it not hidden by backward"
    )
    best = fastest if chosen.kind == "none" else chosen
    saved = plain.update_s - best.update_s
    share = f"{in_ms(saved)} ({saved / plain.update_s:.1%} of the update)"
    if best.kind == "none":
        reason = f"{summary}; nothing would be faster"
    elif chosen.kind == "none":
        reason = f"{summary}; {best.kind} would save {share}, too little to round gradients for"
    else:
        reason = f"{summary}; {best.kind} takes {in_ms(best.exchange_s + best.compress_s)} and saves {share}"
    return Choice(chosen.kind, reason)
