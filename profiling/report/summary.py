"""A run's history as one JSON object: percentiles, shares, rates, memory, energy, and the bottleneck they point to.

Measured are the updates behind the warm-up (`warmup` of each log line) of the lines that ran as the last start says. Rates,
MFU, energy and stragglers are known by the log line: lines with a warm-up update are left out of them. Percentiles
interpolate linearly between order statistics (Hyndman and Fan 1996, type 7; numpy's default); `n` says of how many samples.
A phase's share is its time over the time of the same updates; the shares, `other` among them, add up to 1.

What rank 0's device was doing is told of the lines in whose time no evaluation or checkpoint fell. Energy is its mean power
over them, times their mean step. Counters are read every 20 to 100 ms at best: less than 5 s of them say nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from fastdistil import __version__
from fastdistil.events import (
    Checkpoint,
    DeviceFacts,
    DeviceReading,
    Evaluation,
    Event,
    MemoryReading,
    Train,
    Utilisation,
    as_fields,
)
from fastdistil.profiling.report.bottleneck import causes_of, name_bottleneck
from fastdistil.profiling.report.history import History
from fastdistil.profiling.spans import NAMES
from fastdistil.untrusted import at

_PERCENTILES = "linear interpolation between order statistics (Hyndman and Fan 1996, type 7)"
PHASES = (*NAMES, "other")
"""In a step's order; `other` is what is left of it."""
SAME_WORK = (
    "device", "dtype", "ranks", "micro_batch_tokens", "accumulation", "student_parameters", "teacher_parameters",
)  # fmt: skip
"""Fields of a summary that agree in runs that did the same work."""
MFU = ("student", "with_teacher", "hfu")
_THROTTLED = 0.01
"""Share of the samples in which a GPU slowed itself down from which its times are not the code's."""
_ENERGY_MIN_S = 5.0
_NOT_AVERAGED = ("samples", "seconds", "energy_j", "throttled")


class Updates(NamedTuple):
    """The measured updates; lists have an entry each."""

    numbers: list[int]
    step_s: list[float]
    phases: dict[str, list[float]]
    """0 where the line does not name a phase: it was never entered."""
    warmup: int
    """Updates left out."""


def summarise(history: History) -> dict[str, Any]:
    """What the run measured; seconds, bytes, joules; None: not recorded."""
    start, recipe = history.start, history.recipe
    lines = history.comparable_lines
    settled = [line for line in lines if not line.warmup]
    asides: list[Evaluation | Checkpoint] = [*history.evaluations, *history.checkpoints]
    updates, phased = measured_updates(lines), phased_updates(lines)
    summary: dict[str, Any] = {
        "fastdistil": __version__,
        "name": history.name,
        "directory": str(history.directory),
        "outcome": history.outcome,
        "device": history.device,
        "device_type": start.device,
        "dtype": start.precision,
        **{
            name: getattr(start, name)
            for name in ("ranks", "nodes", "engine", "compression", "sync", "rings", "threads", "kernels")
        },
        "micro_batch_tokens": at(recipe, "data", "micro_batch_tokens"),
        "accumulation": at(recipe, "loop", "accumulation"),
        "student_parameters": start.student_parameters,
        "teacher_parameters": start.teacher_parameters,
        "updates": len(updates.step_s),
        "warmup": updates.warmup,
        "percentiles": _PERCENTILES,
        "step_s": statistics_of(updates.step_s),
        "phases": _phases(phased),
        "communication": _communication(phased),
        "evaluation": statistics_of(_seconds_of(history.evaluations)),
        "checkpoint": statistics_of(_seconds_of(history.checkpoints)),
        "trace": history.trace and as_fields(replace(history.trace, time=None, update=None)),
        "tokens_per_update": _per_update(settled, attrgetter("tokens")),
        "gradient_bytes_per_update": _per_update(settled, attrgetter("gradient_bytes")),
        "tokens_per_s": _quotient((line.tokens, _seconds(line)) for line in settled),
        "data_wait_share": _mean((line.data_wait_share, _seconds(line)) for line in settled),
        "flops": _flops(settled),
        "mfu": (mfu := _mfu(settled, attrgetter("mfu"))) and {**mfu, "measured": _mfu(settled, _of_measured_peak)},
        "memory": _memory(history, lines),
        "energy": _energy(settled, asides),
        "readings": _readings(settled, asides),
        "straggler": _straggler(settled, history.environment.devices),
        "losses": [_losses(line) for line in history.lines],
        "environment": as_fields(replace(history.environment, time=None, update=None)),
        "recipe": recipe,
    }
    causes = causes_of(summary)
    return {**summary, "causes": causes, "bottleneck": name_bottleneck(summary, causes)}


def measured_updates(lines: Iterable[Train]) -> Updates:
    numbers: list[int] = []
    steps: list[float] = []
    columns: dict[str, list[float]] = {}
    warmup = 0
    for line in lines:
        seconds, first, before = line.step_s, line.warmup, len(steps)
        warmup += min(first, len(seconds))
        numbers += range(line.update - len(seconds) + 1 + first, line.update + 1)
        steps += seconds[first:]
        phases = line.phases if seconds else {}
        for name in phases.keys() | columns.keys():
            if (column := columns.get(name)) is None:
                column = columns[name] = [0.0] * before
            column += phases[name][first:] if name in phases else [0.0] * len(seconds[first:])
    return Updates(numbers, steps, columns, warmup)


def phased_updates(lines: Iterable[Train]) -> Updates:
    """Take the updates of the lines that recorded phases."""
    return measured_updates(line for line in lines if line.phases and line.step_s)


def statistics_of(samples: Sequence[float]) -> dict[str, Any] | None:
    """p50, p95, p99, mean, sd (of a sample: n - 1), n, samples; None without samples."""
    if not samples:
        return None
    p50, p95, p99 = np.percentile(samples, [50, 95, 99]).tolist()
    sd = float(np.std(samples, ddof=1)) if len(samples) > 1 else None
    mean = float(np.mean(samples))
    return {"p50": p50, "p95": p95, "p99": p99, "mean": mean, "sd": sd, "n": len(samples), "samples": list(samples)}


def _phases(updates: Updates) -> dict[str, Any] | None:
    if not updates.step_s:
        return None
    columns: dict[str, list[float]] = {name: updates.phases[name] for name in NAMES if name in updates.phases}
    columns["other"] = (np.asarray(updates.step_s) - np.sum(list(columns.values()), axis=0)).tolist()
    total_s = sum(updates.step_s)
    return {
        name: {**(statistics_of(column) or {}), "share": sum(column) / total_s if total_s else 0.0}
        for name, column in columns.items()
    }


def _communication(updates: Updates) -> dict[str, Any] | None:
    """First departure until the last was waited for; `hidden_share`: of it, what the step did not wait for, at least: what it
    waited for slower ranks before gradients left is in `exposed` too."""
    if sum(column := updates.phases.get("communication", [])) <= 0:
        return None
    exposed = sum(updates.phases.get("exposed", []))
    return {**(statistics_of(column) or {}), "hidden_share": max(0.0, 1 - exposed / sum(column))}


def _seconds(line: Train) -> float | None:
    """A line's time without evaluations and checkpoints."""
    if line.tokens and line.tokens_per_s:
        return line.tokens / line.tokens_per_s
    return sum(line.step_s) or None


def _seconds_of(events: Iterable[Evaluation | Checkpoint]) -> list[float]:
    return [event.seconds for event in events if event.seconds is not None]


def _quotient(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the sum of the first over the sum of the second numbers, of the pairs that have both; None without one."""
    recorded = [(value, weight) for value, weight in pairs if value is not None and weight]
    return sum(value for value, _ in recorded) / sum(weight for _, weight in recorded) if recorded else None


def _per_update(lines: Iterable[Train], get: Callable[[Train], float | None]) -> float | None:
    return _quotient((get(line), line.updates) for line in lines)


def _mean(values: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the mean of values, each with its weight."""
    return _quotient((None if value is None else value * (weight or 0), weight) for value, weight in values)


def _flops(lines: Iterable[Train]) -> dict[str, float | None] | None:
    """Return rank 0's in one update."""
    recorded = [line for line in lines if line.flops and line.updates]
    names = recorded[0].flops or {} if recorded else {}
    return {name: _per_update(recorded, lambda line: (line.flops or {}).get(name) or 0) for name in names} or None  # noqa: B023


def _mfu(lines: Sequence[Train], get: Callable[[Train], Utilisation | None]) -> dict[str, Any] | None:
    """Means over time: all FLOP over all time and the peak. None of them once a line's was refused: `refused` says why."""
    recorded = [(line, mfu) for line in lines if (mfu := get(line)) is not None]
    if not recorded:
        return None
    last = recorded[-1][1]
    same = [(line, mfu) for line, mfu in recorded if mfu.peak_flops == last.peak_flops]
    refused = [mfu.refused for _, mfu in recorded if mfu.refused]
    means = {name: None if refused else _mean((getattr(mfu, name), _seconds(line)) for line, mfu in same) for name in MFU}
    return {
        **means,
        "peak_flops": last.peak_flops,
        "peak_source": last.peak_source,
        "refused": [f"in {len(refused)} of {len(recorded)} log lines: {refused[0]}"] if refused else [],
    }


def _of_measured_peak(line: Train) -> Utilisation | None:
    return line.mfu.measured if line.mfu is not None else None


def _memory(history: History, lines: Sequence[Train]) -> dict[str, Any] | None:
    """Peaks are the highest of all lines, other bytes those of the last one."""
    memory: dict[str, Any] = {}
    for line in lines:
        reading = line.memory or MemoryReading(
            peak_rss_bytes=line.host_peak_bytes,
            allocated_bytes=line.device_allocated_bytes,
            peak_allocated_bytes=line.device_peak_bytes,
        )
        for name, value in as_fields(reading).items():
            if name == "phase_peaks":
                peaks = memory.setdefault(name, {})
                peaks.update({phase: max(size, peaks.get(phase, 0)) for phase, size in value.items()})
            else:
                memory[name] = max(value, memory.get(name, 0)) if name.startswith("peak_") else value
    if history.memory is not None:
        memory |= {name: getattr(history.memory, name) for name in ("parts", "estimate", "peak_bytes")}
    return memory or None


def _updates_alone(lines: Iterable[Train], asides: Iterable[Event]) -> list[Train]:
    """The lines in whose time no evaluation or checkpoint fell: what follows an update's line is in the time of the next."""
    at_updates = [aside.update for aside in asides if aside.update is not None]

    def alone(line: Train) -> bool:
        count = len(line.step_s) or line.updates or 1
        return not any(line.update - count <= update < line.update for update in at_updates)

    return [line for line in lines if alone(line)]


def _energy(lines: Sequence[Train], asides: Sequence[Event]) -> dict[str, Any]:
    """Return that of rank 0's device, and over its own tokens. Samples begin and end within updates: they are no line's."""
    seconds = joules = steps_s = 0.0
    updates = tokens = 0
    timed = [line for line in lines if line.step_s]
    alone = _updates_alone(timed, asides)
    for line in alone:
        steps_s, updates = steps_s + sum(line.step_s), updates + len(line.step_s)
        tokens += line.rank_tokens[0] if line.rank_tokens else line.tokens or 0
        if line.device is not None and line.device.energy_j is not None and line.device.seconds:
            seconds, joules = seconds + line.device.seconds, joules + line.device.energy_j
    nothing = {"j_per_update": None, "j_per_million_tokens": None, "seconds": seconds}
    if not seconds:
        mixed = len(timed) - len(alone)
        return {**nothing, "why": f"all {mixed} log lines held more than updates" if mixed else "not recorded"}
    if seconds < _ENERGY_MIN_S:
        return {**nothing, "why": f"not enough time to tell: {seconds:.1f} s, wanted {_ENERGY_MIN_S:.0f} s"}
    spent = joules / seconds * steps_s
    per_token = spent / tokens if tokens else None
    return {"j_per_update": spent / updates, "j_per_million_tokens": per_token and 1e6 * per_token, "seconds": seconds}


def _readings(lines: Sequence[Train], asides: Sequence[Event]) -> dict[str, Any] | None:
    """Sum up rank 0's device over the lines that held updates alone: means over time, of clocks medians. The highest
    temperature and throttled (share of samples, by reason; None: nobody looked) are of all lines."""
    readings = [line.device for line in lines if line.device is not None]
    if not readings:
        return None
    alone = [line.device for line in _updates_alone(lines, asides) if line.device is not None]
    averages: dict[str, Any] = {"samples": sum(device.samples for device in alone)}
    if not alone:
        averages["why"] = f"all {len(readings)} log lines held more than updates"
    last = as_fields(readings[-1])
    for name in dict.fromkeys(name for device in readings for name in as_fields(device) if name not in _NOT_AVERAGED):
        readable = [device for device in (readings if name == "temperature_c" else alone) if getattr(device, name) is not None]
        values = [getattr(device, name) for device in readable]
        if not values or isinstance(values[0], str):
            averages[name] = last.get(name) if isinstance(last.get(name), str) else None
        elif name == "temperature_c":
            averages[name] = max(values)
        elif name.endswith("_min_mhz"):
            averages[name] = min(values)
        elif name.endswith("_mhz"):
            averages[name] = float(np.median(values))
        else:
            averages[name] = _mean((getattr(device, name), device.seconds) for device in readable)
    return {**averages, **_throttled(readings)}


def _throttled(readings: Sequence[DeviceReading]) -> dict[str, Any]:
    watched = [(device.throttled, device.samples) for device in readings if device.throttled is not None and device.samples]
    samples = sum(count for _, count in watched)
    reasons = dict.fromkeys(reason for throttled, _ in watched for reason in throttled)
    shares = {reason: sum(throttled.get(reason, 0.0) * count for throttled, count in watched) / samples for reason in reasons}
    return {"throttled": shares if watched else None, "throttled_samples": samples}


def slowed_down(summary: Mapping[str, Any]) -> dict[str, float]:
    """{reason: share of the samples} for which the GPU slowed itself down: heat or a power brake. A power cap, which a GPU at
    work runs into, is no such reason."""
    throttled = at(summary, "readings", "throttled") or {}
    return {
        reason: share
        for reason, share in throttled.items()
        if share > _THROTTLED and ("slowdown" in reason.lower() or "thermal" in reason.lower())
    }


def _straggler(lines: Iterable[Train], devices: Sequence[DeviceFacts]) -> dict[str, Any] | None:
    """The rank with the most work of its own; `share`: by how much it is above the mean rank's; rank_0_waited_s: for whoever
    worked longest on an update (in older runs: on a line's updates)."""
    recorded = [line for line in lines if len(line.rank_worked_s) > 1]
    if not recorded:
        return None
    worked = np.asarray([line.rank_worked_s for line in recorded])
    of_rank = worked.sum(axis=0)
    rank = int(of_rank.argmax())

    def summed(by_rank: list[tuple[float, ...]]) -> list[float] | None:
        return np.sum(by_rank, axis=0).tolist() if all(by_rank) else None

    return {
        "rank": rank,
        "host": next((device.host for device in devices if device.rank == rank), None),
        "share": float(of_rank[rank] / of_rank.mean() - 1) if of_rank.mean() > 0 else 0.0,
        "slowest_in": int((worked.argmax(axis=1) == rank).sum()),
        "lines": len(recorded),
        "worked_s": of_rank.tolist(),
        "rank_0_waited_s": float(sum(map(_waited_for_slowest_s, recorded))),
        "seconds": sum(_seconds(line) or 0.0 for line in recorded),
        "tokens": summed([line.rank_tokens for line in recorded]),
        "data_wait_s": summed([line.rank_data_wait_s for line in recorded]),
    }


def _waited_for_slowest_s(line: Train) -> float:
    if line.rank_0_waited_s is not None:
        return line.rank_0_waited_s
    return max(line.rank_worked_s) - line.rank_worked_s[0]


def _losses(line: Train) -> dict[str, Any]:
    losses = {name: getattr(line, name) for name in ("total", "soft", "hard", "cosine", "mse")}
    return {"update": line.update, **{name: as_fields(loss) for name, loss in losses.items() if loss is not None}}
