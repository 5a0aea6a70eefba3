"""What a calibrated model says of updates that were not measured: their seconds with a band, and where compression pays."""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastdistil.gradients.cost_model import WORTH, PredictedKind, allreduce_s
from fastdistil.studies.cost_fit import Fit, Floats, Point, Workload, seconds
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
    step = work + imbalance + exposed
    low = min(sum(parts_of(values, "low")) for values in model.vertices)
    high = max(sum(parts_of(values, "high")) for values in model.vertices)
    if model.covariance is None or model.residual is None:
        band = "what the points leave open and the network's own range; no residuals: as many numbers fitted as measured"
    else:
        nudges = 1e-6 * np.maximum(np.maximum(centre, np.sqrt(np.diag(model.covariance))), 1e-18)
        base = sum(parts_of(centre))
        slopes = np.array([(sum(parts_of(centre + nudge)) - base) / nudge.sum() for nudge in np.diag(nudges)])
        variance = float(slopes @ model.covariance @ slopes) + model.numbers(point) * (model.residual * step) ** 2
        margin = _student_t(model.freedom) * math.sqrt(max(0.0, variance))
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


def predict_workload(
    model: Fit, work: Workload, network: Network | None, kind: PredictedKind, rings: int, ranks: int
) -> ScalingPrediction:
    """Predict an update of the workload, its ranks placed as the network's are, or as the measured ones were."""
    several = [point for point in model.points if point.ranks > 1]
    here = max((point.ranks // point.nodes for point in several), default=1)
    nodes = network.nodes(ranks) if network is not None else -(-ranks // here)
    local = -(-ranks // nodes)
    slowdowns = {point.ranks // point.nodes: point.slowdown for point in model.points}
    nearest = local if local in slowdowns else max((count for count in slowdowns if count < local), default=max(slowdowns))
    slowdown, assumed = slowdowns[nearest], []
    if nearest != local > 1:
        assumed.append(f"{local} ranks on a machine compute as {nearest} do on this one ({slowdown:.3f} times one's time)")
    point = work.point(ranks, nodes, rings=rings, kind=kind, slowdown=slowdown)
    if network is None:
        assumed.append("more ranks are connected as the measured ones are")
        link = next((other.link_bytes_per_s for other in several if other.link_bytes_per_s and other.rings == rings), None)
        point = replace(point, link_bytes_per_s=link)
    return predict(model, point, network, assumed)


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
    """Return the seconds of own work, imbalance and waits. `low`: the fast end of what the network may be."""
    parameters = dict(values)
    key = f"byte_s@{point.rings}"
    rings = [int(name.partition("@")[2]) for name in model.names if name.startswith("byte_s@")]
    if rings:  # where as many were not measured, the nearest number that was
        parameters[key] = parameters[f"byte_s@{min(rings, key=lambda other: abs(other - point.rings))}"]
    if network is None or point.ranks == 1:
        return seconds(point, parameters, model.on_cpu)
    # The network's own latency and bandwidth in the place of the measured ones.
    quick: Side = {"low": "high", "value": "value", "high": "low"}[side]  # type: ignore[assignment]
    local_latency_s = (network.local_latency_s or network.latency_s).at(side)
    latency_s = allreduce_s(point.ranks, point.nodes, 0.0, 1.0, network.latency_s.at(side), local_latency_s=local_latency_s)
    parameters["hop_s"] = latency_s / (2 * (point.ranks - 1))
    engine, link = parameters.get(key, 0.0), 1 / network.bandwidth(point.rings, point.nodes, quick)
    if "link_share" in values:
        parameters[key] = engine + values["link_share"] * link
    else:  # whether the engine's own time for a byte overlaps with the link's is not known
        parameters[key] = engine + link if side == "high" else max(engine, link)
    return seconds(replace(point, link_bytes_per_s=None), parameters, model.on_cpu)


def _student_t(freedom: int) -> float:
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
    """True if compressing is taken to cost nothing, as no point measured it: both numbers are then upper limits."""


FOREVER = 10**6
FASTEST = 1e13
"""Bytes a second, the most that is looked at."""
_BANDWIDTH_STEPS = 10**6
"""From 1e5 bytes a second to FASTEST, each 0.002% more than the one before."""


def break_even(
    model: Fit, work: Workload, kind: PredictedKind, ranks: int, nodes: int, network: Network, rings: int = 1
) -> BreakEven:
    """Predict up to how many micro-batches, and below which bandwidth, `kind` pays."""

    def pays(accumulation: int, bytes_per_s: float | None = None) -> bool:
        there = replace(work, accumulation=accumulation, exchanges=accumulation if work.exchanges > 1 else 1)
        link = network
        if bytes_per_s is not None:
            limits = {"flow_bytes_per_s": None, "local_bytes_per_s": None}
            link = network.model_copy(update={"link_bytes_per_s": Constant(value=bytes_per_s, source="asked"), **limits})
        plain, small = (
            predict(model, there.point(ranks, nodes, rings=rings, kind=choice), link).step_s for choice in ("none", kind)
        )
        return small < (1 - WORTH) * plain

    def bandwidth(step: int) -> float:
        return 1e5 * math.pow(FASTEST / 1e5, step / _BANDWIDTH_STEPS)

    most = FOREVER if pays(FOREVER) else bisect(range(1, FOREVER), False, key=lambda count: not pays(count))
    steps = bisect(range(_BANDWIDTH_STEPS + 1), False, key=lambda step: not pays(work.accumulation, bandwidth(step)))
    return BreakEven(
        kind=kind,
        most_accumulation=most or None,
        most_bytes_per_s=bandwidth(steps - 1) if steps else None,
        free=not any(parameter.name == "memory_byte_s" and parameter.value is not None for parameter in model.parameters),
    )
