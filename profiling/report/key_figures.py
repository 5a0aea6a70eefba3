"""The figures of a report: one run's history -> groups of named numbers with unit, spread and count.

The keys are stable: `fastdistil report --json` prints them. What a run did not record has value None; nothing is guessed. What
no run of a report recorded is one line, "not recorded". A figure's numbers are of the updates behind the warm-up, as
summary.py measures them, unless `detail` says otherwise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fastdistil.events import DeviceFacts, Evaluation, Train
from fastdistil.profiling.quantities import parameters, quantity
from fastdistil.profiling.report.bootstrap import Statistic
from fastdistil.profiling.report.history import History
from fastdistil.profiling.report.summary import MFU, PHASES
from fastdistil.untrusted import at, real

Better = Literal["higher", "lower"]
NOT_RECORDED = "not recorded"
_TIMES = "\N{MULTIPLICATION SIGN}"
OUTCOMES = {
    "done": "done",
    "stopped": "stopped and saved",
    "nonfinite": "stopped: a value was not finite",
    "open": "open: running, or it died",
}


@dataclass(frozen=True)
class Figure:
    key: str
    label: str
    value: float | str | None
    """SI units; None: not recorded."""
    unit: str = ""
    """As quantities.quantity knows it."""
    spread: float | None = None
    """Of one value, same unit; `spread_kind` says which."""
    spread_kind: Literal["sd", "se"] = "sd"
    n: int | None = None
    """How many values it is of; `of` says which."""
    of: str = "updates"
    detail: str = ""
    better: Better | None = None
    """None: neither direction is."""
    samples: Sequence[float] = ()
    """Of which the value is the `statistic`: what a difference is judged by."""
    statistic: Statistic = "mean"

    @property
    def text(self) -> str:
        if self.value is None:
            return NOT_RECORDED
        return self.value if isinstance(self.value, str) else quantity(self.value, self.unit)

    @property
    def spread_text(self) -> str:
        return "" if self.spread is None else f"± {quantity(self.spread, self.unit, digits=2)} {self.spread_kind}"

    @property
    def count_text(self) -> str:
        return "" if self.n is None else f"{self.n:,} {self.of}"

    def as_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "value": self.value,
            "unit": self.unit,
            "spread": self.spread,
            "spread_kind": self.spread_kind if self.spread is not None else None,
            "n": self.n,
            "of": self.of if self.n is not None else None,
            "detail": self.detail,
        }


class FigureGroup(NamedTuple):
    key: str
    title: str
    figures: Sequence[Figure]


def groups(history: History, summary: Mapping[str, Any]) -> list[FigureGroup]:
    """`summary`: summarise(history)."""
    return [
        FigureGroup("run", "Run", _run(history, summary)),
        FigureGroup("learning", "Learning", _learning(history)),
        FigureGroup("speed", "Speed", _speed(history, summary)),
        FigureGroup("step", "Where a step goes", _step(summary)),
        FigureGroup("memory", "Memory", _memory(summary)),
        FigureGroup("device", "Device", _device(summary)),
        FigureGroup("communication", "Communication and ranks", _communication(history, summary)),
        FigureGroup("environment", "Environment", _environment(history)),
    ]


def setting(summary: Mapping[str, Any]) -> str:
    """Say on what the numbers were measured: device, dtype, ranks, shape."""
    ranks = summary["ranks"]
    parts = [str(summary["device"] or "device not recorded"), str(summary["dtype"] or "dtype not recorded")]
    if ranks is not None:
        parts.append(f"{ranks} rank{'s' * (ranks != 1)}")
    if summary["micro_batch_tokens"] is not None and summary["accumulation"] is not None:
        parts.append(
            f"{summary['micro_batch_tokens']:,} tokens {_TIMES} {summary['accumulation']} micro-batches an update and rank"
        )
    if summary["student_parameters"]:
        parts.append(f"student of {parameters(summary['student_parameters'])}")
    if summary["teacher_parameters"]:
        parts.append(f"teacher of {parameters(summary['teacher_parameters'])}")
    return ", ".join(parts)


class _Row(NamedTuple):
    """One figure of a table: what is the same in every run."""

    key: str
    label: str
    unit: str = ""
    better: Better | None = None
    detail: str = ""


_TEXT = "text"
"""The unit of a row whose value is shown as it is, not as a number."""
_LEFT_OUT = "lines that hold warm-up left out"
_RUN = (
    _Row("outcome", "outcome", _TEXT),
    _Row("updates", "updates"),
    _Row("tokens", "tokens", detail="all ranks and log lines, padding left out"),
    _Row(
        "wall_s", "wall clock", "s", "lower",
        "first to last event; evaluations and checkpoints included, interruptions left out",
    ),
    _Row("evaluation_s", "evaluations, in all", "s"),
    _Row("checkpoint_s", "checkpoints, in all", "s"),
    _Row("teacher", "teacher", _TEXT),
    _Row("student", "student", _TEXT),
    _Row("teacher_parameters", "teacher parameters"),
    _Row("student_parameters", "student parameters"),
    _Row("device", "device", _TEXT),
    _Row("dtype", "precision", _TEXT),
    *(_Row(name, name, _TEXT) for name in ("ranks", "nodes", "engine", "rings", "sync", "compression", "threads", "kernels")),
    _Row("micro_batch_tokens", "tokens of a micro-batch", detail="at most"),
    _Row("accumulation", "micro-batches an update", detail="of each rank"),
    _Row("tokens_per_update", "tokens an update", detail=f"all ranks; {_LEFT_OUT}"),
)  # fmt: skip
_LEARNING = (
    _Row("total", "total loss", "", "lower"),
    _Row("soft", "soft loss", "nats", "lower"),
    _Row("hard", "hard loss", "nats", "lower"),
    _Row("cosine", "cosine loss", "", "lower"),
    _Row("mse", "mse loss", "", "lower"),
    _Row("skipped", "skipped updates", detail="not finite"),
    _Row("final_heldout_loss", "held-out loss, final", "nats", "lower"),
    _Row("final_perplexity", "held-out perplexity, final", "", "lower"),
    _Row("best_heldout_loss", "held-out loss, best", "nats", "lower"),
    _Row("best_perplexity", "held-out perplexity, best", "", "lower"),
    _Row("final_kl", "held-out KL to the teacher, final", "nats", "lower"),
)
_SPEED = (
    _Row("tokens_per_s", "throughput", "tokens/s", "higher", "all ranks; all tokens over all time"),
    _Row("step_p50_s", "step, p50", "s", "lower"),
    _Row("step_p95_s", "step, p95", "s", "lower"),
    _Row("step_p99_s", "step, p99", "s", "lower"),
    _Row("step_mean_s", "step, mean", "s", "lower"),
    _Row("mfu_student", "MFU, student", "share", "higher"),
    _Row("mfu_with_teacher", "MFU, with the teacher", "share", "higher"),
    _Row("mfu_hfu", "hardware FLOP utilisation", "share"),
    _Row("mfu_student_of_measured", "MFU, student, of the measured peak", "share", "higher"),
    _Row("data_wait_share", "waiting for data", "share", "lower"),
    _Row("bottleneck", "bottleneck", _TEXT),
)
_MEMORY = (
    _Row("peak_allocated_bytes", "peak allocated", "bytes", "lower", "torch's allocator, rank 0"),
    _Row("peak_reserved_bytes", "peak reserved", "bytes", "lower", "torch's allocator, rank 0"),
    # Of one instant: no direction is better.
    _Row("fragmented_bytes", "reserved beyond what was allocated", "bytes", None, "of the peaks, last log line"),
    _Row("used_bytes", "used on the device", "bytes", None, "by all processes, last log line"),
    _Row("outside_bytes", "used outside torch's allocator", "bytes", None, "last log line"),
    _Row("peak_rss_bytes", "host, peak resident", "bytes", "lower", "rank 0"),
    _Row("retries", "allocations retried", "", "lower"),
    _Row("ooms", "out of memory", "", "lower"),
)
_READINGS = (
    _Row("utilisation", "utilisation", "share", None, "mean"),
    _Row("sm_clock_mhz", "SM clock", "MHz", None, "median"),
    _Row("sm_clock_min_mhz", "SM clock, lowest", "MHz", None, "lowest of the lines"),
    _Row("memory_clock_mhz", "memory clock", "MHz", None, "median"),
    _Row("clock_mhz", "processor clock", "MHz", None, "median"),
    _Row("power_w", "power", "W", None, "mean"),
    _Row("temperature_c", "temperature", "°C", None, "highest"),
)
_COMMUNICATION = (
    _Row("control_bytes", "control bytes an update", "bytes/update", "lower", "rank 0"),
    _Row("control_messages", "control messages an update", "", "lower", "rank 0"),
    _Row("gradient_collectives", "gradient collectives an update", "", "lower", "rank 0"),
    _Row("wait_s", "waiting for communication an update", "s", "lower", "rank 0"),
    _Row(
        "seconds", "communication, until it was waited for", "s", "lower",
        "from the first departure; overlaps backward; rank 0",
    ),
    _Row("hidden_share", "of it, hidden, at least", "share", "higher", "behind the rest of the step"),
    _Row("imbalance_time", "imbalance of own work", "share", "lower", "largest rank over the mean, less 1"),
    _Row("imbalance_tokens", "imbalance of tokens", "share", "lower", "largest rank over the mean, less 1"),
    _Row("straggler_share", "straggler's own work over the mean", "share", "lower"),
)  # fmt: skip
_ENVIRONMENT = (
    _Row("processor", "processor", _TEXT),
    _Row("cores", "cores", _TEXT),
    _Row("memory_bytes", "host memory", "bytes"),
)


def _table(group: str, rows: Iterable[_Row], values: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of the rows that `values` has: a value alone, or with it whatever else a Figure has."""
    figures = []
    for row in rows:
        if row.key not in values:
            continue
        value = values[row.key]
        fields: dict[str, Any] = {"unit": row.unit, "better": row.better, "detail": row.detail}
        fields |= value if isinstance(value, dict) else {"value": value}
        if fields["unit"] == _TEXT:
            fields |= {"unit": "", "value": None if fields["value"] is None else str(fields["value"])}
        elif not isinstance(fields["value"], str):
            fields["value"] = _value(fields["value"])
        figures.append(Figure(f"{group}.{row.key}", row.label, **fields))
    return figures


def _text(key: str, label: str, value: object, detail: str = "") -> Figure:
    return Figure(key, label, None if value is None else str(value), detail=detail)


def _value(value: object) -> float | None:
    """Return a number, None for nan; an int stays one: it is a count, and shown whole."""
    number = value if isinstance(value, int) else real(value)
    return None if math.isnan(number) else number


def _mean_of(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the figure that is the mean of what `summary.statistics_of` describes."""
    return {
        "value": statistics.get("mean"),
        "spread": statistics.get("sd"),
        "n": statistics.get("n"),
        "samples": statistics.get("samples", ()),
    }


def _run(history: History, summary: Mapping[str, Any]) -> list[Figure]:
    planned, recipe = history.start.updates, history.recipe
    done = history.lines[-1].update if history.lines else history.start.update
    values = {
        **summary,
        "outcome": OUTCOMES[history.outcome],
        "updates": {"value": done, "detail": f"of {planned:,} planned" if planned else ""},
        "tokens": history.tokens,
        "wall_s": history.wall_s,
        "evaluation_s": _aside(summary, "evaluation"),
        "checkpoint_s": _aside(summary, "checkpoint"),
        "teacher": at(recipe, "teacher", "path"),
        "student": at(recipe, "student", "path") or at(recipe, "student", "architecture"),
    }
    return _table("run", _RUN, values)


def _aside(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the seconds beside the updates, in all."""
    durations = summary[name]
    if durations is None:
        return {"value": None}
    times = f"p50 {quantity(durations['p50'], 's')}, p95 {quantity(durations['p95'], 's')}"
    detail = f"{durations['n']:,}: {times}; in no step, rate or phase"
    return {"value": math.fsum(durations["samples"]), "n": durations["n"], "of": f"{name}s", "detail": detail}


def _learning(history: History) -> list[Figure]:
    last = history.lines[-1] if history.lines else Train(update=0)
    where = f"mean of the last log line, update {last.update:,}" if history.lines else ""
    values: dict[str, Any] = {
        name: {"value": loss, "n": last.updates, "detail": where}
        for name in ("total", "soft", "hard", "cosine", "mse")
        if (loss := getattr(last, name)) is not None or name == "total"
    }
    values["skipped"] = history.skipped
    nothing = Evaluation(update=0)
    final = history.evaluations[-1] if history.evaluations else nothing
    best = min(history.evaluations, key=lambda event: real(event.loss), default=nothing)
    for name, event in (("final", final), ("best", best)):
        error, perplexity = _value(event.loss_se), _value(event.perplexity)
        of_labels = {
            "spread_kind": "se",
            "n": event.labels,
            "of": "labels",
            "detail": f"{name}, update {event.update:,}" if history.evaluations else "",
        }
        values[f"{name}_heldout_loss"] = {"value": event.loss, "spread": error, **of_labels}
        # To first order: the standard error of e^loss is e^loss times that of the loss.
        spread = None if perplexity is None or error is None else perplexity * error
        values[f"{name}_perplexity"] = {"value": perplexity, "spread": spread, **of_labels}
    if final.kl is not None:
        values["final_kl"] = {
            "value": final.kl,
            "spread": _value(final.kl_se),
            "spread_kind": "se",
            "n": final.kl_tokens,
            "of": "tokens",
            "detail": f"final, update {final.update:,}",
        }
    return _table("learning", _LEARNING, values)


def _speed(history: History, summary: Mapping[str, Any]) -> list[Figure]:
    rates = [rate for line in history.comparable_lines if not line.warmup and math.isfinite(rate := real(line.tokens_per_s))]
    step, mfu, bottleneck = summary["step_s"] or {}, summary["mfu"] or {}, summary["bottleneck"]
    warm = {"n": step.get("n"), "detail": f"{summary['warmup']} warm-up updates left out; rank 0"}
    values = {
        "tokens_per_s": {**_over_lines(rates), "value": summary["tokens_per_s"]},
        "step_p50_s": {"value": step.get("p50"), **warm, "samples": step.get("samples", ()), "statistic": "median"},
        "step_p95_s": {"value": step.get("p95"), **warm},
        "step_p99_s": {"value": step.get("p99"), **warm},
        "step_mean_s": {**_mean_of(step), **warm},
        **{f"mfu_{name}": _mfu(mfu, name) for name in MFU},
        "data_wait_share": summary["data_wait_share"],
        "bottleneck": {
            "value": bottleneck["name"] + (f" -> {bottleneck['key']}" if bottleneck["key"] else ""),
            "detail": bottleneck["why"],
        },
    }
    if mfu.get("measured"):
        values["mfu_student_of_measured"] = _mfu(mfu["measured"], "student")
    return _table("speed", _SPEED, values)


def _mfu(mfu: Mapping[str, Any], name: str) -> dict[str, Any]:
    if mfu.get("refused"):
        return {"value": "refused", "unit": "", "better": None, "detail": mfu["refused"][0]}
    peak = f"of {quantity(mfu['peak_flops'], 'flop/s')} ({mfu['peak_source']})" if mfu.get("peak_flops") else ""
    return {"value": mfu.get(name), "detail": peak}


def _over_lines(values: Sequence[float]) -> dict[str, Any]:
    """Return the fields of the figure that is the mean of one value of each log line."""
    return {
        "value": float(np.mean(values)) if values else None,
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values) or None,
        "of": "log lines",
        "samples": values,
    }


def _step(summary: Mapping[str, Any]) -> list[Figure]:
    phases = summary["phases"] or {}
    figures = []
    for name in sorted(phases, key=PHASES.index):
        phase = phases[name]
        percentiles = ", ".join(f"{mark} {quantity(phase[mark], 's')}" for mark in ("p50", "p95", "p99"))
        figures += [
            Figure(f"step.{name}_s", name, unit="s", detail=percentiles, better="lower", **_mean_of(phase)),
            Figure(f"step.{name}_share", f"{name}, of the step", phase["share"], "share", n=phase["n"]),
        ]
    return figures or [Figure("step.phases", "phases", None)]


def _memory(summary: Mapping[str, Any]) -> list[Figure]:
    memory = summary["memory"] or {}
    figures = _table("memory", _MEMORY, {row.key: memory.get(row.key) for row in _MEMORY})
    parts, estimate = memory.get("parts") or {}, memory.get("estimate") or {}
    for name in parts:
        before = _value(estimate.get(name))
        if name == "activations_and_logits" and estimate:  # measured together
            before = real(estimate.get("activations")) + real(estimate.get("logits"))
        label = f"part: {name.replace('_', ' ')}"
        figures.append(Figure(f"memory.parts.{name}", label, _value(parts[name]), "bytes", detail=_estimated(before)))
    peak = _value(memory.get("peak_bytes"))
    if parts or peak is not None:
        predicted = sum(real(value) for value in estimate.values()) if estimate else math.nan
        detail = _estimated(predicted if math.isfinite(predicted) else None)
        if peak and math.isfinite(predicted):
            detail += f" ({predicted / peak - 1:+.1%})"
        figures.append(Figure("memory.peak_bytes", "peak after the first updates", peak, "bytes", detail=detail))
    return figures


def _estimated(size: float | None) -> str:
    return "no estimate recorded" if size is None else f"estimated before: {quantity(size, 'bytes')}"


def _device(summary: Mapping[str, Any]) -> list[Figure]:
    readings, energy = summary["readings"] or {}, summary["energy"]
    values = {}
    for row in _READINGS:
        if row.key in readings or row.key in ("utilisation", "power_w", "temperature_c"):
            value, detail = readings.get(row.key), f"{row.detail}; rank 0"
            detail = readings.get("why", detail) if value is None else detail
            values[row.key] = {"value": value, "n": readings.get("samples") or None, "of": "samples", "detail": detail}
    figures = _table("device", _READINGS, values)
    why = energy.get("why") or f"rank 0's device, over {quantity(energy['seconds'], 's')}; the sensor's error is some per cent"
    for name, label in (("j_per_update", "energy an update"), ("j_per_million_tokens", "energy per million tokens")):
        figures.append(Figure(f"device.{name}", label, energy[name], "J", detail=why, better="lower"))
    throttled, watched = readings.get("throttled"), readings.get("throttled_samples")
    if throttled is None:  # nobody looked
        return [*figures, Figure("device.throttled", "throttled", None)]
    if not throttled:
        return [*figures, _text("device.throttled", "throttled", "never", f"{watched:,} samples")]
    for reason, share in throttled.items():
        key, label = f"device.throttled.{reason}", f"throttled: {reason.replace('_', ' ')}"
        figures.append(Figure(key, label, share, "share", n=watched, of="samples", better="lower"))
    return figures


def _communication(history: History, summary: Mapping[str, Any]) -> list[Figure]:
    if summary["ranks"] == 1:
        return [_text("communication.none", "communication", "none: one rank")]
    lines = [line for line in history.comparable_lines if not line.warmup]
    hidden, straggler = summary["communication"] or {}, summary["straggler"] or {}
    worked = ""
    if straggler:
        worked = f"rank {straggler['rank']}, the slowest in {straggler['slowest_in']} of {straggler['lines']} log lines"
    rings = max((len(line.ring_bytes) for line in lines), default=0)
    sent = [_Row("gradient_bytes", "gradient bytes an update", "bytes/update", "lower", "rank 0")]
    sent += [
        _Row(f"ring_{ring}_bytes", f"gradient bytes, ring {ring}", "bytes/update", "lower", "rank 0") for ring in range(rings)
    ]
    values = {
        **{
            name: _per_update((line, getattr(line, name)) for line in lines)
            for name in ("gradient_bytes", "control_bytes", "control_messages", "gradient_collectives")
        },
        **{f"ring_{ring}_bytes": _per_update((line, _ring_bytes(line, ring)) for line in lines) for ring in range(rings)},
        "wait_s": _per_update((line, line.exchange_wait_s) for line in lines),
        "seconds": _mean_of(hidden),
        "hidden_share": hidden.get("hidden_share"),
        **{
            name: _over_lines([value for line in lines if (value := getattr(line, name)) is not None])
            for name in ("imbalance_time", "imbalance_tokens")
        },
        "straggler_share": {"value": straggler.get("share"), "detail": worked},
    }
    return _table("communication", (*sent, *_COMMUNICATION), values)


def _ring_bytes(line: Train, ring: int) -> float | None:
    return line.ring_bytes[ring] if ring < len(line.ring_bytes) else None


def _per_update(values: Iterable[tuple[Train, float | None]]) -> dict[str, Any]:
    """Return all of it over all updates."""
    recorded = [(value, line.updates) for line, value in values if value is not None and line.updates]
    updates = sum(count for _, count in recorded)
    return {"value": sum(value for value, _ in recorded) / updates if updates else None, "n": updates or None}


def _environment(history: History) -> list[Figure]:
    """Versions and devices, nothing else of what surrounds a run: no variables, no addresses, no names of machines or users."""
    environment, versions = history.environment, dict(history.environment.versions or {})
    if history.start.torch is not None:
        versions.setdefault("torch", history.start.torch)
    devices: dict[str, list[DeviceFacts]] = {}
    for device in environment.devices:
        devices.setdefault(str(device.name), []).append(device)
    figures = _table("environment", _ENVIRONMENT, vars(environment))
    for index, (name, same) in enumerate(devices.items()):
        memory = _value(same[0].memory_bytes)
        detail = quantity(memory, "bytes") if memory is not None else "memory not recorded"
        figures.append(_text(f"environment.device_{index}", "device", f"{len(same)} {_TIMES} {name}", detail))
    for kind, unit in (("flops", "flop/s"), ("bytes", "bytes/s")):
        for source, value in (at(environment, "peaks", kind) or {}).items():
            label = "peak arithmetic" if kind == "flops" else "peak memory bandwidth"
            figures.append(Figure(f"environment.peak_{kind}.{source}", label, _value(value), unit, detail=str(source)))
    if not versions:
        figures.append(Figure("environment.versions", "versions", None))
    return [*figures, *(_text(f"environment.versions.{name}", str(name), value) for name, value in versions.items())]
