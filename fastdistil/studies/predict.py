"""What a calibrated model says of updates that were not measured: their seconds with a band, and where compression pays."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastdistil.gradients.cost_model import WORTH, PredictedKind, allreduce_s, exposed_s, update_s
from fastdistil.studies.cost_fit import HIDES, MEANING, Fit, Floats, Point, Workload, seconds
from fastdistil.studies.networks import Constant, Network, Side


@dataclass(frozen=True, kw_only=True)
class ScalingPrediction:
    """Not measured."""

    point: Point
    network: str | None
    """None: as if the measured network went on."""
    step_s: float
    low_s: float
    high_s: float
    band: str
    """What the two ends hold."""
    work_s: float
    imbalance_s: float
    exposed_s: float
    assumed: tuple[str, ...]


def predict(model: Fit, point: Point, network: Network | None = None, assumed: Sequence[str] = ()) -> ScalingPrediction:
    """Seconds of an update that was not measured, on the measured network or on another one."""

    def parts_of(values: Floats, side: Side = "value") -> tuple[float, float, float]:
        return _predicted(model, point, dict(zip(model.names, values, strict=True)), network, side)

    centre = model.vertices.mean(axis=0)
    parts = np.array([parts_of(values) for values in model.vertices])
    work, imbalance, exposed = (float(value) for value in parts.mean(axis=0))
    step = update_s(work, 1, exposed, imbalance)
    low = min(sum(parts_of(values, "low")) for values in model.vertices)
    high = max(sum(parts_of(values, "high")) for values in model.vertices)
    if model.covariance is None or model.residual is None:
        band = "what the points leave open and the network's own range; no residuals: as many numbers fitted as measured"
    else:
        nudges = 1e-6 * np.maximum(np.maximum(centre, np.sqrt(np.diag(model.covariance))), 1e-18)
        base = sum(parts_of(centre))
        slopes = np.array([(sum(parts_of(centre + nudge)) - base) / nudge.sum() for nudge in np.diag(nudges)])
        variance = float(slopes @ model.covariance @ slopes) + model.numbers(point) * (model.residual * step) ** 2
        margin = student_t(model.freedom) * math.sqrt(max(0.0, variance))
        low, high = max(0.0, low - margin), high + margin
        band = "95%, by residuals and the parameters' covariance, and what the points leave open and the network's own range"
    return ScalingPrediction(
        point=point,
        network=network.title if network else None,
        step_s=step,
        low_s=low,
        high_s=high,
        band=band,
        work_s=work,
        imbalance_s=imbalance,
        exposed_s=exposed,
        assumed=(*assumed, *_assumptions(model, point)),
    )


def _assumptions(model: Fit, point: Point) -> list[str]:
    assumptions = []
    if point.ranks > 1 and "straggler_s" not in model.names:
        assumptions.append("no point had several ranks: the engine's own time and stragglers are taken as none")
    elif point.ranks > 1 and f"byte_s@{point.rings}" not in model.names:
        assumptions.append(
            f"{point.rings} rings were not measured: a byte costs the engine what it does with the nearest number that was"
        )
    if point.touched_bytes and "memory_byte_s" not in model.names:
        assumptions.append("no point was compressed: compressing is taken to cost nothing")
    return assumptions


def _predicted(
    model: Fit, point: Point, values: Mapping[str, float], network: Network | None, side: Side
) -> tuple[float, float, float]:
    """Seconds of (own work, imbalance, waits). `low`: the fast end of what the network may be."""
    parameters = {**dict.fromkeys(MEANING, 0.0), **values}
    if point.ranks == 1:
        return seconds(point, parameters, model.on_cpu)
    key = f"byte_s@{point.rings}"
    if key not in parameters:  # a ring count that was not measured: the nearest that was
        rings = [int(name.partition("@")[2]) for name in model.names if name.startswith("byte_s@")]
        parameters[key] = parameters[f"byte_s@{min(rings, key=lambda other: abs(other - point.rings))}"] if rings else 0.0
    if network is None:
        return seconds(point, parameters, model.on_cpu)
    quick: Side = {"low": "high", "value": "value", "high": "low"}[side]  # type: ignore[assignment]
    bandwidth = network.bandwidth(point.rings, point.nodes, quick)
    local = (network.local_latency_s or network.latency_s).at(side)
    # Latencies alone, of one ring's steps; then all steps of all buckets.
    latency = allreduce_s(point.ranks, point.nodes, 0.0, bandwidth, network.latency_s.at(side), local_latency_s=local)
    latency *= point.hops / (2 * (point.ranks - 1))
    engine_s, link = parameters[key] * point.sent_bytes, point.sent_bytes / bandwidth
    if "link_share" in values:
        carried = engine_s + values["link_share"] * link
    else:  # whether the engine's own time for a byte overlaps with the link's is not known
        carried = engine_s + link if side == "high" else max(engine_s, link)
    compress = parameters["memory_byte_s"] * point.touched_bytes
    exchange = point.collectives * parameters["collective_s"] + latency + carried
    hides = HIDES * parameters["micro_batch_s"] * point.slowdown
    waited = exposed_s(exchange + (0.0 if model.on_cpu else compress), hides, exchange / point.collectives)
    work, imbalance, _ = seconds(replace(point, link_bytes_per_s=None), parameters, model.on_cpu)
    return work, imbalance, point.exchanges * waited


def student_t(freedom: int) -> float:
    """Two-sided 95% quantile, to 1%."""
    table = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
    return table[freedom] if freedom in table else 1.96 + 2.37 / freedom + 2.82 / freedom**2 + 2.6 / freedom**3


# --- where compression pays


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Predicted: where `kind` saves more than cost_model.WORTH of an update."""

    kind: PredictedKind
    most_accumulation: int | None
    """Micro-batches up to which it pays; None: not even with one; FOREVER: as far as was looked."""
    most_bytes_per_s: float | None
    """Bandwidth below which it pays; None: at none; FASTEST: as far as was looked."""
    free: bool
    """Whether compressing is taken to cost nothing, as no point measured it: both numbers are then upper limits."""


FOREVER = 10**6
FASTEST = 1e13
"""Bytes a second, the most that is looked at."""


def break_even(
    model: Fit, work: Workload, kind: PredictedKind, ranks: int, nodes: int, network: Network, rings: int = 1
) -> BreakEven:
    def pays(accumulation: int, chosen: Network) -> bool:
        scaled = accumulation if work.exchanges > 1 else 1
        there = replace(work, accumulation=accumulation, exchanges=scaled)
        plain, small = (
            predict(model, there.point(ranks, nodes, rings=rings, kind=choice), chosen).step_s for choice in ("none", kind)
        )
        return small < (1 - WORTH) * plain

    most: int | None = None
    if pays(1, network):
        most, too_many = (FOREVER, FOREVER) if pays(FOREVER, network) else (1, FOREVER)
        while too_many - most > 1:
            middle = (most + too_many) // 2
            most, too_many = (middle, too_many) if pays(middle, network) else (most, middle)

    def at(bandwidth: float) -> Network:
        limits = {"link_bytes_per_s": Constant(value=bandwidth, source="asked"), "flow_bytes_per_s": None}
        return network.model_copy(update={**limits, "local_bytes_per_s": None})

    slow, fast = 1e5, FASTEST
    widest: float | None = None
    if pays(work.accumulation, at(fast)):
        widest = fast
    elif pays(work.accumulation, at(slow)):
        for _ in range(60):
            between = math.sqrt(slow * fast)
            slow, fast = (between, fast) if pays(work.accumulation, at(between)) else (slow, between)
        widest = slow
    free = not any(parameter.name == "memory_byte_s" and parameter.value is not None for parameter in model.parameters)
    return BreakEven(kind=kind, most_accumulation=most, most_bytes_per_s=widest, free=free)
