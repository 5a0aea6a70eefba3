"""The cost model of an update over several ranks, calibrated on measured points and asked about others.

    T = A s f + o f  +  sigma sqrt(A) E_N f  +  X max(t / K, t + g - h s f)  [+ X g on a CPU, whose cores compress and compute]
    t = K a0 + hops a + b_k sent + c sent / B

A micro-batches of s seconds; o: what an update costs once (optimizer); f: how much slower ranks compute that share a machine
(measured by unconnected runs side by side, 1 without); sigma: standard deviation of a micro-batch's time between ranks, E_N the
expected largest of N normals; X exchanges an update of K collectives; a0 and a: seconds of a collective and of each step of its
ring (2 (N-1) a bucket); b_k: seconds a byte of k rings; c: seconds a byte on a link of known bandwidth B over 1/B; g: what
compressing takes, by the bytes of memory that it touches; h: share of a micro-batch that hides an exchange (cost_model.py).
What one rank sends is `sent`.

All parameters are at least 0 and enter linearly, but for the max: least squares of relative residuals, repeated until no point
changes sides. Few points leave parameters open. Which ones is read from the singular values of the Jacobian, and what they may
be from the vertices of the set of all parameters that fit equally well (one support each; at most 2^parameters).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fastdistil.errors import UserError
from fastdistil.gradients.cost_model import BACKWARD_SHARE, HIDING_SHARE, PredictedKind, exposed_s, touched_bytes, wire
from fastdistil.untrusted import Text

Floats = NDArray[np.float64]
# Bounds of a study that somebody hands over: sums and products of such numbers neither overflow nor vanish.
Count = Annotated[int, Field(strict=True, ge=1, le=10**6)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=1e9)]
Bytes = Annotated[float, Field(strict=True, ge=0, le=1e18)]
MOST_RINGS = 8
"""Different numbers of rings in one fit: each is a parameter, and solutions are sought among all subsets of the parameters."""
HIDES = BACKWARD_SHARE * HIDING_SHARE
OPEN = 1e-6
"""Singular values below this share of the largest are 0, and parts of a unit vector below it."""

MEANING = {
    "micro_batch_s": "a micro-batch (s)",
    "fixed_s": "once an update (s)",
    "straggler_s": "standard deviation of a micro-batch between ranks (s)",
    "collective_s": "a collective (s)",
    "hop_s": "a step of a ring (s)",
    "byte_s": "a byte sent (s)",
    "link_share": "time of a byte on the link over 1 / its bandwidth",
    "memory_byte_s": "a byte of memory touched by compression (s)",
}
REMEDY = {
    "micro_batch_s": "another accumulation (--mode both)",
    "fixed_s": "another accumulation (--mode both)",
    "straggler_s": "more rank counts",
    "collective_s": "more rank counts",
    "hop_s": "more rank counts",
    "byte_s": "another size of messages (--compression none,int8)",
    "link_share": "links of different bandwidths (--on)",
    "memory_byte_s": "points with --compression",
}


@dataclass(frozen=True, kw_only=True)
class TimingSample:
    """One round of a point: seconds of an update, and of what it is made where ranks recorded their own work."""

    step_s: Annotated[float, Field(strict=True, ge=1e-9, le=1e9)]
    worked_s: Seconds | None = None
    """Mean over ranks."""
    imbalance_s: Seconds | None = None
    """Of the slowest rank over the mean."""
    waited_s: Seconds | None = None
    """What even the slowest rank waited."""

    @property
    def recorded(self) -> tuple[float, float, float] | None:
        parts = (self.worked_s, self.imbalance_s, self.waited_s)
        return None if None in parts else parts  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Point:
    """An update, as the model sees it."""

    ranks: Count
    nodes: Count
    rings: Count
    accumulation: Count
    """Micro-batches of a rank."""
    exchanges: Count
    """Of an update: 1, or one a micro-batch."""
    sent_bytes: Bytes
    """By a rank in an exchange."""
    collectives: Annotated[int, Field(strict=True, ge=0, le=10**9)]
    """Of an exchange."""
    hops: Annotated[int, Field(strict=True, ge=0, le=10**12)]
    """Steps of its rings, one after another."""
    touched_bytes: Bytes = 0.0
    """Of memory, by compressing an exchange."""
    slowdown: Annotated[float, Field(strict=True, ge=1e-3, le=1e6)] = 1.0
    link_bytes_per_s: Annotated[float, Field(strict=True, ge=1, le=1e18)] | None = None
    """Of the rings together between nodes, where it is known."""
    name: Text = ""
    samples: tuple[TimingSample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What an update exchanges, whatever the ranks."""

    gradient_bytes: Annotated[int, Field(strict=True, ge=4, le=10**18)]
    """float32"""
    buckets: Annotated[int, Field(strict=True, ge=1, le=10**6)]
    engine: Annotated[str, Field(pattern=r"^(alone|torch|horovod)$")]
    accumulation: Count
    exchanges: Count

    def point(self, ranks: int, nodes: int, *, rings: int = 1, kind: PredictedKind = "none", slowdown: float = 1.0) -> Point:
        """Of an update over other ranks or with another compression."""
        sent, requests = wire(kind, ranks, self.gradient_bytes, self.engine)
        return Point(
            ranks=ranks,
            nodes=nodes,
            rings=rings,
            accumulation=self.accumulation,
            exchanges=self.exchanges,
            sent_bytes=sent,
            collectives=self.buckets * requests,
            hops=self.buckets * 2 * (ranks - 1),  # an all-to-all and an all-gather have half as many each
            touched_bytes=touched_bytes(kind, self.gradient_bytes) if ranks > 1 else 0.0,
            slowdown=slowdown,
        )


@cache
def expected_max(count: int) -> float:
    """Of `count` independent standard normals: 0 for one, 1.42 for 8."""
    x = np.linspace(0.0, 12.0, 12001)
    below = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in x])
    # The mean is the integral of 1 - F over x > 0 less that of F over x < 0; F is the N-th power of the normal's.
    return float(np.trapezoid(1 - (1 - below) ** count - below**count, x)) if count > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Parameter:
    name: str
    value: float | None
    """None: the points do not determine it."""
    sd: float | None
    """Standard error; None where it is open, or where as many numbers were fitted as measured."""
    low: float
    high: float
    """Ends of what fits equally well."""

    @property
    def vague(self) -> bool:
        """Determined, and not told from 0."""
        return self.value is not None and self.sd is not None and self.value < 2 * self.sd

    @property
    def meaning(self) -> str:
        base, _, rings = self.name.partition("@")
        return MEANING[base] + (f", {rings} ring{'s' if rings != '1' else ''}" if rings else "")

    @property
    def remedy(self) -> str:
        return REMEDY[self.name.partition("@")[0]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    points: tuple[Point, ...]
    on_cpu: bool
    names: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    vertices: Floats
    """[v, parameters]: each fits as well as the others; their mean is what is computed with."""
    covariance: Floats | None
    """[parameters, parameters], of what is determined; None without a degree of freedom."""
    residual: float | None
    """Standard deviation of one measured number over the update's seconds."""
    freedom: int
    singular_values: tuple[float, ...]
    """Of the Jacobian with columns of length 1, largest first."""
    rank: int
    predicted_s: tuple[float, ...]
    """By point."""

    def numbers(self, point: Point) -> int:
        """Measured numbers that make up such a point's seconds."""
        several = [sample for other in self.points if other.ranks > 1 for sample in other.samples]
        return 3 if point.ranks > 1 and several and all(sample.recorded for sample in several) else 1

    @property
    def undetermined(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.value is None]

    @property
    def centre(self) -> dict[str, float]:
        return dict(zip(self.names, self.vertices.mean(axis=0), strict=True))


def fit(points: Sequence[Point], *, on_cpu: bool) -> Fit:
    """Calibrate on measured points, each with at least one sample. Raises UserError where there is nothing to fit."""
    assert all(point.samples for point in points)
    if not points:
        raise UserError("no points to calibrate the model on: all are marked oversubscribed, or none was measured")
    if (rings := len({point.rings for point in points if point.ranks > 1})) > MOST_RINGS:
        raise UserError(f"the points have {rings} numbers of rings, one fit takes {MOST_RINGS}; give fewer studies")
    names = _names(points)
    exposed = [True] * len(points)
    trials: list[tuple[float, list[bool]]] = []
    while exposed not in [before for _, before in trials]:
        vertices, rss = _solve(*_system(points, exposed, on_cpu))
        trials.append((rss, exposed))
        values = dict(zip(names, _on_side(points, exposed, on_cpu, vertices).mean(axis=0), strict=True))
        exposed = [bool(_is_exposed(point, values, on_cpu)) for point in points]
    if exposed != trials[-1][1]:  # going round in circles: the best of them
        exposed = min(trials, key=lambda trial: trial[0])[1]
    return _judged(points, exposed, on_cpu)


def _on_side(points: Sequence[Point], exposed: Sequence[bool], on_cpu: bool, vertices: Floats) -> Floats:
    """Those where every point is on its side of the max; the others as far as the sides allow. All, if none is."""
    names = _names(points)

    def holds(values: Floats) -> bool:
        named = dict(zip(names, values, strict=True))
        for point, side in zip(points, exposed, strict=True):
            unhidden, tail = (_weighted(_terms(point, is_exposed, on_cpu)[2], named) for is_exposed in (True, False))
            if (unhidden - tail if side else tail - unhidden) < -1e-9 * point.samples[0].step_s:
                return False
        return True

    inside = [values for values in vertices if holds(values)]
    if not inside or len(inside) == len(vertices):
        return vertices
    centre = np.mean(inside, axis=0)
    cut = []
    for values in vertices:
        good, bad = 0.0, 1.0
        for _ in range(0 if holds(values) else 40):
            middle = (good + bad) / 2
            good, bad = (middle, bad) if holds(centre + middle * (values - centre)) else (good, middle)
        if bad < 1.0:
            cut.append(centre + good * (values - centre))
    return np.array([*inside, *cut])


def _judged(points: Sequence[Point], exposed: list[bool], on_cpu: bool) -> Fit:
    names = _names(points)
    jacobian, observed = _system(points, exposed, on_cpu)
    vertices, rss = _solve(jacobian, observed)
    vertices = _on_side(points, exposed, on_cpu, vertices)
    lengths = np.linalg.norm(jacobian, axis=0)
    assert (lengths > 0).all(), names
    _, singular, rows = np.linalg.svd(jacobian / lengths, full_matrices=True)
    rank = int((singular > OPEN * singular[0]).sum())
    open_parts = np.linalg.norm(rows[rank:], axis=0)
    freedom = len(observed) - rank
    residual = math.sqrt(rss / freedom) if freedom > 0 else None
    covariance = None
    if residual is not None:
        inverse = (rows[:rank].T / singular[:rank] ** 2) @ rows[:rank]
        covariance = residual**2 * inverse / np.outer(lengths, lengths)
    centre = vertices.mean(axis=0)
    parameters = []
    for index, name in enumerate(names):
        determined = bool(open_parts[index] <= OPEN)
        sd = None if covariance is None or not determined else math.sqrt(covariance[index, index])
        low, high = float(vertices[:, index].min()), float(vertices[:, index].max())
        parameters.append(Parameter(name=name, value=float(centre[index]) if determined else None, sd=sd, low=low, high=high))
    values = dict(zip(names, centre, strict=True))
    return Fit(
        points=tuple(points),
        on_cpu=on_cpu,
        names=names,
        parameters=tuple(parameters),
        vertices=vertices,
        covariance=covariance,
        residual=residual,
        freedom=freedom,
        singular_values=tuple(float(value) for value in singular),
        rank=rank,
        predicted_s=tuple(sum(seconds(point, values, on_cpu)) for point in points),
    )


def _names(points: Sequence[Point]) -> tuple[str, ...]:
    """Parameters that some point depends on."""
    names = ["micro_batch_s", "fixed_s"]
    several = [point for point in points if point.ranks > 1]
    if several:
        names += ["straggler_s", "collective_s", "hop_s"]
    names += [f"byte_s@{rings}" for rings in sorted({point.rings for point in several})]
    if any(point.link_bytes_per_s for point in several):
        names.append("link_share")
    if any(point.touched_bytes for point in several):
        names.append("memory_byte_s")
    return tuple(names)


def _terms(point: Point, exposed: bool, on_cpu: bool) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Coefficients of the parameters in (own work, imbalance, waits of the slowest)."""
    work = {"micro_batch_s": point.accumulation * point.slowdown, "fixed_s": point.slowdown}
    if point.ranks == 1:
        return work, {}, {}
    compress = {"memory_byte_s": point.touched_bytes} if point.touched_bytes else {}
    imbalance = {"straggler_s": math.sqrt(point.accumulation) * expected_max(point.ranks) * point.slowdown}
    waits: dict[str, float] = {
        "collective_s": point.collectives,
        "hop_s": point.hops,
        f"byte_s@{point.rings}": point.sent_bytes,
    }
    if point.link_bytes_per_s:
        waits["link_share"] = point.sent_bytes / point.link_bytes_per_s
    if exposed:
        waits["micro_batch_s"] = -HIDES * point.slowdown
        if not on_cpu:
            waits |= compress
    else:
        waits = {name: value / point.collectives for name, value in waits.items()}
    if on_cpu:
        work |= {name: point.exchanges * value for name, value in compress.items()}
    return work, imbalance, {name: point.exchanges * value for name, value in waits.items()}


def _is_exposed(point: Point, values: Mapping[str, float], on_cpu: bool) -> bool:
    unhidden, tail = (_weighted(_terms(point, exposed, on_cpu)[2], values) for exposed in (True, False))
    return unhidden >= tail


def seconds(point: Point, values: Mapping[str, float], on_cpu: bool) -> tuple[float, float, float]:
    """Seconds of (own work, imbalance, waits of the slowest)."""
    work, imbalance, waits = _terms(point, True, on_cpu)
    hidden = _terms(point, False, on_cpu)[2]
    # exposed_s(t, hiding, tail), with both sides linear in the parameters
    waited = exposed_s(_weighted(waits, values), 0.0, _weighted(hidden, values))
    return _weighted(work, values), _weighted(imbalance, values), waited


def _weighted(terms: Mapping[str, float], values: Mapping[str, float]) -> float:
    return sum(weight * values[name] for name, weight in terms.items())


def _system(points: Sequence[Point], exposed: Sequence[bool], on_cpu: bool) -> tuple[Floats, Floats]:
    """(Jacobian [rows, parameters], observed [rows]); every row over its update's seconds."""
    names = _names(points)
    column = {name: index for index, name in enumerate(names)}
    rows, observed = [], []
    for point, side in zip(points, exposed, strict=True):
        terms = _terms(point, side, on_cpu)
        for sample in point.samples:
            recorded = sample.recorded if point.ranks > 1 else None
            pairs = (
                [((0, 1, 2), sample.step_s)] if recorded is None else [((part,), value) for part, value in enumerate(recorded)]
            )
            for chosen, value in pairs:
                row = np.zeros(len(names))
                for part in chosen:
                    for name, weight in terms[part].items():
                        row[column[name]] += weight
                rows.append(row / sample.step_s)
                observed.append(value / sample.step_s)
    return np.array(rows), np.array(observed)


def _solve(jacobian: Floats, observed: Floats) -> tuple[Floats, float]:
    """(vertices [v, p] of the non-negative least squares' solutions, residual sum of squares).

    A vertex's support has independent columns, so each is found among the subsets of the parameters.
    """
    count = jacobian.shape[1]
    lengths = np.where((norms := np.linalg.norm(jacobian, axis=0)) > 0, norms, 1.0)
    scaled = jacobian / lengths
    basis, upper = np.linalg.qr(scaled)
    projected = basis.T @ observed
    outside = float(observed @ observed - projected @ projected)
    solutions: list[tuple[float, Floats]] = []
    most = int(np.linalg.matrix_rank(scaled, tol=OPEN))
    for size in range(most + 1):
        for support in itertools.combinations(range(count), size):
            part = upper[:, support]
            if size and np.linalg.svd(part, compute_uv=False)[-1] <= OPEN:
                continue
            solution = np.linalg.lstsq(part, projected, rcond=None)[0] if size else np.zeros(0)
            if (solution < -1e-12).any():
                continue
            missing = projected - part @ solution
            values = np.zeros(count)
            values[list(support)] = np.maximum(solution, 0.0)
            solutions.append((float(missing @ missing), values))
    least = min(rss for rss, _ in solutions)
    scale = float(observed @ observed)
    close = [values for rss, values in solutions if rss <= least * (1 + 1e-9) + 1e-16 * scale]
    distinct = np.unique(np.round(np.array(close), 14), axis=0)
    return distinct / lengths, max(least + max(outside, 0.0), 0.0)
