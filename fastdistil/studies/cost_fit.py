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
from fastdistil.gradients.cost_model import HIDES, PredictedKind, exchange_cost
from fastdistil.untrusted import Text

Floats = NDArray[np.float64]
# Bounds of a study that somebody hands over: sums and products of such numbers neither overflow nor vanish.
Count = Annotated[int, Field(strict=True, ge=1, le=10**6)]
Seconds = Annotated[float, Field(strict=True, ge=0, le=1e9)]
Bytes = Annotated[float, Field(strict=True, ge=0, le=1e18)]
_MOST_RINGS = 8
"""Different numbers of rings in one fit: each is a parameter, and solutions are sought among all subsets of the parameters."""
OPEN = 1e-6
"""Singular values below this share of the largest are 0, and parts of a unit vector below it."""

_MEANING = {
    "micro_batch_s": "a micro-batch (s)",
    "fixed_s": "once an update (s)",
    "straggler_s": "standard deviation of a micro-batch between ranks (s)",
    "collective_s": "a collective (s)",
    "hop_s": "a step of a ring (s)",
    "byte_s": "a byte sent (s)",
    "link_share": "time of a byte on the link over 1 / its bandwidth",
    "memory_byte_s": "a byte of memory touched by compression (s)",
}
_REMEDY = {
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
    """What the slowest rank works beyond the mean."""
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
    """Exchanges of an update: 1, or one a micro-batch."""
    sent_bytes: Bytes
    """Bytes that a rank sends in an exchange."""
    collectives: Annotated[int, Field(strict=True, ge=0, le=10**9)]
    """Collectives of an exchange."""
    hops: Annotated[int, Field(strict=True, ge=0, le=10**12)]
    """Steps of its rings, one after another."""
    touched_bytes: Bytes = 0.0
    """Bytes of memory that compressing an exchange touches."""
    slowdown: Annotated[float, Field(strict=True, ge=1e-3, le=1e6)] = 1.0
    link_bytes_per_s: Annotated[float, Field(strict=True, ge=1, le=1e18)] | None = None
    """Bandwidth of the rings together between nodes, where it is known."""
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
        """Return an update over other ranks or with another compression."""
        cost = exchange_cost(kind, ranks, self.gradient_bytes, self.engine)
        return Point(
            ranks=ranks,
            nodes=nodes,
            rings=rings,
            accumulation=self.accumulation,
            exchanges=self.exchanges,
            sent_bytes=cost.sent_bytes,
            collectives=self.buckets * cost.collectives,
            hops=self.buckets * 2 * (ranks - 1),  # an all-to-all and an all-gather have half as many each
            touched_bytes=cost.touched_bytes if ranks > 1 else 0.0,
            slowdown=slowdown,
        )


@cache
def expected_max(count: int) -> float:
    """Return the expected largest of `count` independent standard normals: 0 for one, 1.42 for 8."""
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
        return _MEANING[base] + (f", {rings} ring{'s' if rings != '1' else ''}" if rings else "")

    @property
    def remedy(self) -> str:
        return _REMEDY[self.name.partition("@")[0]]


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
    """Singular values of the Jacobian with columns of length 1, largest first."""
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
    if (rings := len({point.rings for point in points if point.ranks > 1})) > _MOST_RINGS:
        raise UserError(f"the points have {rings} numbers of rings, one fit takes {_MOST_RINGS}; give fewer studies")
    names = _names(points)
    # [points, parts, parameters], the parts as _terms returns them.
    terms = np.array([[[part.get(name, 0.0) for name in names] for part in _terms(point, on_cpu)] for point in points])
    first_s = np.array([point.samples[0].step_s for point in points])
    beyond = (terms[:, 2] - terms[:, 3]) / first_s[:, None]  # times the parameters: at least 0 where a point is exposed
    sides = last = (True,) * len(points)
    solutions: dict[tuple[bool, ...], tuple[Floats, float]] = {}
    while sides not in solutions:
        vertices, rss = _solve(*_system(points, terms, sides))
        vertices = _on_side(beyond * np.where(sides, 1.0, -1.0)[:, None], vertices)
        solutions[sides], last = (vertices, rss), sides
        sides = tuple((beyond @ vertices.mean(axis=0) >= 0).tolist())
    if sides != last:  # going round in circles: the best of them
        sides = min(solutions, key=lambda trial: solutions[trial][1])
    vertices, rss = solutions[sides]
    jacobian, observed = _system(points, terms, sides)
    lengths = np.linalg.norm(jacobian, axis=0)
    assert (lengths > 0).all(), names
    _, singular, rows = np.linalg.svd(jacobian / lengths, full_matrices=True)
    rank = int((singular > OPEN * singular[0]).sum())
    determined: list[bool] = (np.linalg.norm(rows[rank:], axis=0) <= OPEN).tolist()
    freedom = len(observed) - rank
    residual = math.sqrt(rss / freedom) if freedom > 0 else None
    covariance = None
    if residual is not None:
        inverse = (rows[:rank].T / singular[:rank] ** 2) @ rows[:rank]
        covariance = residual**2 * inverse / np.outer(lengths, lengths)
    centre = vertices.mean(axis=0)
    values = dict(zip(names, centre, strict=True))
    return Fit(
        points=tuple(points),
        on_cpu=on_cpu,
        names=names,
        parameters=tuple(
            Parameter(
                name=name,
                value=float(centre[index]) if determined[index] else None,
                sd=None if covariance is None or not determined[index] else math.sqrt(covariance[index, index]),
                low=float(vertices[:, index].min()),
                high=float(vertices[:, index].max()),
            )
            for index, name in enumerate(names)
        ),
        vertices=vertices,
        covariance=covariance,
        residual=residual,
        freedom=freedom,
        singular_values=tuple(singular.tolist()),
        rank=rank,
        predicted_s=tuple(sum(seconds(point, values, on_cpu)) for point in points),
    )


def _on_side(slopes: Floats, vertices: Floats) -> Floats:
    """Return the vertices, those beyond a point's side of the max moved to its border; as they are, if all are beyond.

    `slopes` [points, parameters]: times the parameters at least 0 on a point's side.
    """
    slack = vertices @ slopes.T  # [v, points]
    inside = slack.min(axis=1) >= -1e-9
    if not inside.any():
        return vertices
    centre, room = vertices[inside].mean(axis=0), slack[inside].mean(axis=0)
    # Slack falls evenly on the way from the centre to a vertex; this share of the way it is not below 0.
    shares = np.divide(room, room - slack, out=np.ones_like(slack), where=slack < -1e-9).clip(0).min(axis=1)
    return np.where(inside[:, None], vertices, centre + shares[:, None] * (vertices - centre))


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


def _terms(point: Point, on_cpu: bool) -> tuple[dict[str, float], ...]:
    """Return the parameters' coefficients in own work, imbalance, and the slowest's waits: exposed, and for the last bucket."""
    work = {"micro_batch_s": point.accumulation * point.slowdown, "fixed_s": point.slowdown}
    if point.ranks == 1:
        return work, {}, {}, {}
    imbalance = {"straggler_s": math.sqrt(point.accumulation) * expected_max(point.ranks) * point.slowdown}
    exchange = {
        "collective_s": float(point.collectives),
        "hop_s": float(point.hops),
        f"byte_s@{point.rings}": point.sent_bytes,
        "link_share": point.sent_bytes / point.link_bytes_per_s if point.link_bytes_per_s else 0.0,
    }
    last_bucket = {name: point.exchanges * value / point.collectives for name, value in exchange.items()}
    if on_cpu:
        work["memory_byte_s"] = point.exchanges * point.touched_bytes
    else:
        exchange["memory_byte_s"] = point.touched_bytes
    exchange["micro_batch_s"] = -HIDES * point.slowdown
    return work, imbalance, {name: point.exchanges * value for name, value in exchange.items()}, last_bucket


def seconds(point: Point, values: Mapping[str, float], on_cpu: bool) -> tuple[float, float, float]:
    """Return the seconds of own work, of imbalance, and of waits of the slowest. Parameters that `values` lacks are 0."""
    work, imbalance, exposed, last_bucket = (
        sum(weight * values.get(name, 0.0) for name, weight in part.items()) for part in _terms(point, on_cpu)
    )
    return work, imbalance, max(exposed, last_bucket)


def _system(points: Sequence[Point], terms: Floats, sides: Sequence[bool]) -> tuple[Floats, Floats]:
    """(Jacobian [rows, parameters], observed [rows]); every row over its update's seconds."""
    rows: list[Floats] = []
    observed: list[float] = []
    for point, (work, imbalance, exposed, last_bucket), side in zip(points, terms, sides, strict=True):
        parts = np.stack([work, imbalance, exposed if side else last_bucket])
        for sample in point.samples:
            recorded = sample.recorded if point.ranks > 1 else None
            rows += list((parts if recorded else parts.sum(axis=0, keepdims=True)) / sample.step_s)
            observed += [value / sample.step_s for value in recorded or (sample.step_s,)]
    return np.array(rows), np.array(observed)


def _solve(jacobian: Floats, observed: Floats) -> tuple[Floats, float]:
    """(vertices [v, p] of the non-negative least squares' solutions, residual sum of squares).

    A vertex's support has independent columns, so each is found among the subsets of the parameters.
    """
    count = jacobian.shape[1]
    lengths = np.where((norms := np.linalg.norm(jacobian, axis=0)) > 0, norms, 1.0)
    basis, upper = np.linalg.qr(jacobian / lengths)
    projected = basis.T @ observed
    total = float(observed @ observed)
    outside = max(0.0, total - float(projected @ projected))
    solutions: list[tuple[float, Floats]] = [(float(projected @ projected), np.zeros(count))]
    for size in range(1, int(np.linalg.matrix_rank(upper, tol=OPEN)) + 1):
        for support in itertools.combinations(range(count), size):
            part = upper[:, support]
            solution, _, rank, _ = np.linalg.lstsq(part, projected, rcond=OPEN)
            if rank < size or (solution < -1e-12).any():
                continue
            missing = projected - part @ solution
            values = np.zeros(count)
            values[list(support)] = np.maximum(solution, 0.0)
            solutions.append((float(missing @ missing), values))
    least = min(rss for rss, _ in solutions)
    close = [values for rss, values in solutions if rss <= least * (1 + 1e-9) + 1e-16 * total]
    return np.unique(np.round(np.array(close), 14), axis=0) / lengths, least + outside
