"""Measured points of a scaling study: short runs read back, efficiency against the linear ideal, and where the rest went.

Efficiency at N ranks is tokens/s over N times the tokens/s a rank of the baseline: at equal work T_1/T_N (weak) and T_1/(N T_N)
(strong). The seconds that an update takes beyond the ideal ones are split, each update by itself and then by medians:

    exposed     what even the slowest rank waited for gradients
    control     what it waited elsewhere: the words between ranks before gradients leave. On a GPU, whose host does not wait for
                gradients itself, it is within exposed
    imbalance   the slowest rank's own work less the mean
    compression where the run recorded it
    shared      what unconnected runs side by side lose too: caches, memory and clock (the ceiling)
    compute     the rest

Without the ranks' own work (rank_worked_s) exposed is the whole of rank 0's wait, whoever it waited for, and control and
imbalance are not recorded.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fastdistil.errors import UserError
from fastdistil.events import Environment, Start, Train
from fastdistil.gradients.cost_model import SIMPLEST_FIRST, exchange_cost
from fastdistil.profiling.report.history import History
from fastdistil.studies.cost_fit import Point, TimingSample
from fastdistil.untrusted import real

Mode = Literal["weak", "strong"]
LOSSES = {
    "exposed": "exposed communication",
    "control": "control messages",
    "imbalance": "imbalance",
    "compression": "compression",
    "shared": "sharing the machine",
    "compute": "slower compute",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a point runs with. `mode`: None with one rank, which is the same in both."""

    ranks: int
    rings: int = 1
    compression: str = "none"
    sync: str = "delayed"
    accumulation: int = 1
    """Micro-batches of each rank."""
    mode: Mode | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.ranks} rank{'s' if self.ranks > 1 else ''}", self.mode or ""]
        parts.append(f"{self.rings} rings" if self.rings > 1 else "")
        parts += [self.compression if self.compression != "none" else "", self.sync if self.sync != "delayed" else ""]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Seconds of one measured update; None: not recorded."""

    step_s: float
    tokens: int
    """Tokens of all ranks."""
    exposed_s: float
    """What rank 0 waited for others, slower ranks included."""
    gradients_s: float | None = None
    """What of it its host waited for gradients; None on a GPU."""
    compression_s: float | None = None
    worked_s: tuple[float, ...] | None = None
    """By rank."""

    @property
    def parts(self) -> dict[str, float | None]:
        """Those of LOSSES that an update tells by itself, and `worked`, the mean of the ranks'."""
        parts: dict[str, float | None] = {"compression": self.compression_s}
        if self.worked_s is None:
            return parts | {"exposed": self.exposed_s, "control": None, "imbalance": None, "worked": None}
        slowest, mean = max(self.worked_s), statistics.fmean(self.worked_s)
        parts |= {"exposed": (waited := max(0.0, self.step_s - slowest)), "control": None}
        if self.gradients_s is not None:
            parts |= {"exposed": (exposed := min(self.gradients_s, waited)), "control": waited - exposed}
        return parts | {"imbalance": slowest - mean, "worked": mean}


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of a point."""

    updates: tuple[Update, ...]
    start: Start
    """The run's start event."""
    environment: Environment
    """Rank 0's machine."""
    device: str | None
    """Its name."""
    last_line: Train
    """Its last log line: buckets, gradient bytes and collectives of an update."""
    startup_s: float | None
    """From the launch to the first update."""

    @property
    def step_s(self) -> float:
        return statistics.median(update.step_s for update in self.updates)

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(update.tokens / update.step_s for update in self.updates)

    def part(self, name: str) -> float | None:
        values = [update.parts[name] for update in self.updates]
        return None if None in values else statistics.median(value for value in values if value is not None)


def read_round(history: History, warmup: int, launched_s: float | None = None) -> Round:
    """A finished run, its first `warmup` updates left out. Raises UserError if it does not tell single updates.

    `launched_s`: unix seconds.
    """
    if history.outcome != "done":
        raise UserError(f"{history.directory} did not finish; it cannot be measured")
    updates: list[Update] = []
    for line in history.lines:
        if line.updates != 1:
            raise UserError(f"{history.directory} has {line.updates} updates in a log line; wanted logging.every=1")
        if line.step_s == (0,):
            raise UserError(f"{history.directory}: update {line.update} took no time; measure again")
        updates.append(_update(line, on_gpu=str(history.start.device).startswith("cuda")))
    if len(updates) <= warmup:
        raise UserError(f"{history.directory} has {len(updates)} updates, {warmup} of them warm-up; raise --steps")
    started = history.start.time
    return Round(
        updates=tuple(updates[warmup:]),
        start=history.start,
        environment=history.environment,
        device=history.device,
        last_line=history.lines[-1],
        startup_s=started - launched_s if launched_s is not None and started is not None else None,
    )


def _update(line: Train, on_gpu: bool) -> Update:
    compression, exposed = line.phases.get("compression"), line.phases.get("exposed")
    assert line.tokens is not None
    return Update(
        step_s=line.step_s[0] if line.step_s else line.tokens / real(line.tokens_per_s),  # the same clock, by the line
        tokens=line.tokens,
        exposed_s=exposed[0] if exposed else line.exchange_wait_s or 0.0,
        gradients_s=None if on_gpu else line.exchange_wait_s,
        compression_s=compression[0] if compression else None,
        worked_s=tuple(max(0.0, seconds) for seconds in line.rank_worked_s) or None,
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredPoints:
    """A point and its rounds, in order: round r of every point ran beside the others' round r."""

    setting: Setting
    nodes: int
    rounds: tuple[Round, ...]
    ceiling: tuple[tuple[Round, ...], ...] = ()
    """By round: as many unconnected runs side by side, each with one rank's work."""
    oversubscribed: bool = False
    link_bytes_per_s: float | None = None

    @property
    def tokens_per_s(self) -> list[float]:
        return [run.tokens_per_s for run in self.rounds]

    @property
    def slowest(self) -> tuple[int, int, int] | None:
        """(the rank with the most own work, in how many updates it was the slowest, of how many); None: not recorded."""
        worked = [update.worked_s for run in self.rounds for update in run.updates if update.worked_s is not None]
        if not worked or len(worked[0]) < 2:
            return None
        sums = [sum(of_rank) for of_rank in zip(*worked, strict=True)]
        rank = sums.index(max(sums))
        return rank, sum(seconds.index(max(seconds)) == rank for seconds in worked), len(worked)

    @property
    def modelled(self) -> bool:
        """Return whether the point takes part in the fit."""
        return not self.oversubscribed and self.setting.compression in SIMPLEST_FIRST


def efficiencies(point: MeasuredPoints, baseline: MeasuredPoints) -> list[float]:
    """Return a point's efficiency against the baseline, by round."""
    times = point.setting.ranks / baseline.setting.ranks
    return [speed / (times * base) for speed, base in zip(point.tokens_per_s, baseline.tokens_per_s, strict=True)]


def ceilings(point: MeasuredPoints, baseline: MeasuredPoints) -> list[float]:
    """Efficiency of unconnected runs side by side, by round; empty if there were none."""
    times = point.setting.ranks / baseline.setting.ranks
    return [
        sum(run.tokens_per_s for run in runs) / (times * base)
        for runs, base in zip(point.ceiling, baseline.tokens_per_s, strict=bool(point.ceiling))
    ]


def slowdown(point: MeasuredPoints, baseline: MeasuredPoints) -> float:
    """Return how much slower ranks compute that share the machine; 1 where it was not measured."""
    shares = ceilings(point, baseline)
    return 1 / statistics.median(shares) if shares else 1.0


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Seconds of an update beyond the ideal, medians over rounds; None: not recorded."""

    step_s: float
    ideal_s: float
    seconds: Mapping[str, float | None]
    """By LOSSES; they sum to step_s - ideal_s."""

    @property
    def cause(self) -> str | None:
        """The largest loss; None if there is none."""
        recorded = {name: value for name, value in self.seconds.items() if value is not None}
        largest = max(recorded, key=lambda name: recorded[name])
        return largest if recorded[largest] > 0 else None


def losses(point: MeasuredPoints, baseline: MeasuredPoints) -> Losses:
    by_round = [_losses(point, baseline, number) for number in range(len(point.rounds))]
    step = statistics.median(losses.step_s for losses in by_round)
    ideal = statistics.median(losses.ideal_s for losses in by_round)
    seconds: dict[str, float | None] = {}
    for name in LOSSES:
        values = [losses.seconds[name] for losses in by_round]
        seconds[name] = None if None in values else statistics.median(value for value in values if value is not None)
    seconds["compute"] = step - ideal - sum(value or 0.0 for name, value in seconds.items() if name != "compute")
    return Losses(step_s=step, ideal_s=ideal, seconds=seconds)


def _losses(point: MeasuredPoints, baseline: MeasuredPoints, number: int) -> Losses:
    run, base = point.rounds[number], baseline.rounds[number]
    tokens = statistics.median(update.tokens for update in run.updates)
    ideal = tokens / (base.tokens_per_s / baseline.setting.ranks * point.setting.ranks)
    seconds: dict[str, float | None] = dict.fromkeys(LOSSES, 0.0)
    if point.setting.ranks > 1:
        seconds |= {name: run.part(name) for name in ("exposed", "control", "imbalance", "compression")}
    if point.setting.compression == "none":
        seconds["compression"] = 0.0
    if point.setting.ranks > baseline.setting.ranks:
        shared = ceilings(point, baseline)
        seconds["shared"] = ideal / shared[number] - ideal if shared else None
    seconds["compute"] = run.step_s - ideal - sum(value or 0.0 for name, value in seconds.items() if name != "compute")
    return Losses(step_s=run.step_s, ideal_s=ideal, seconds=seconds)


def model_point(point: MeasuredPoints, baseline: MeasuredPoints) -> Point:
    """Return what the cost model sees of a point that is `modelled`."""
    setting, line, start = point.setting, point.rounds[0].last_line, point.rounds[0].start
    kind = next(kind for kind in SIMPLEST_FIRST if kind == setting.compression)
    cost = exchange_cost(kind, setting.ranks, 4 * (start.student_parameters or 0), start.engine or "alone")
    several = setting.ranks > 1
    exchanges = setting.accumulation if setting.sync == "every-micro-batch" and several else 1
    buckets = line.buckets or 0 if several else 0
    samples = []
    for run in point.rounds:
        worked, imbalance = (run.part("worked"), run.part("imbalance")) if several else (None, None)
        waited = None if worked is None or imbalance is None else max(0.0, run.step_s - worked - imbalance)
        samples.append(TimingSample(step_s=run.step_s, worked_s=worked, imbalance_s=imbalance, waited_s=waited))
    return Point(
        ranks=setting.ranks,
        nodes=point.nodes,
        rings=setting.rings,
        accumulation=setting.accumulation,
        exchanges=exchanges,
        sent_bytes=real(line.gradient_bytes) / exchanges if several else 0.0,
        collectives=round(real(line.gradient_collectives) / exchanges) if several else 0,
        hops=buckets * 2 * (setting.ranks - 1),
        touched_bytes=cost.touched_bytes if several else 0.0,
        slowdown=slowdown(point, baseline),
        link_bytes_per_s=point.link_bytes_per_s if point.nodes > 1 else None,
        name=setting.name,
        samples=tuple(samples),
    )


def choose_baseline(points: Sequence[MeasuredPoints], ranks: int | None) -> MeasuredPoints:
    """The point that the ideal line starts from: the fewest ranks, or those asked for. Raises UserError."""
    plain = [point for point in points if point.setting.compression == "none" and point.setting.sync == "delayed"]
    chosen = [point for point in plain or points if ranks is None or point.setting.ranks == ranks]
    if not chosen:
        raise UserError(f"--baseline {ranks}: no point has so many ranks; measured {sorted({p.setting.ranks for p in points})}")
    return min(chosen, key=lambda point: (point.setting.ranks, point.setting.rings))
