"""The figures of a report: one run's history -> groups of named numbers with unit, spread and count.

The keys are stable: `fastdistil report --json` prints them. What a run did not record has value None; nothing is guessed. What
no run of a report recorded is one line, "not recorded". A figure's numbers are of the updates behind the warm-up, as
summary.py measures them, unless `detail` says otherwise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastdistil.events import DeviceFacts, Evaluation, Train
from fastdistil.profiling.quantities import quantity
from fastdistil.profiling.report.bootstrap import Statistic
from fastdistil.profiling.report.history import History
from fastdistil.profiling.report.summary import PHASES
from fastdistil.untrusted import at, real

Better = Literal["higher", "lower"]
NOT_RECORDED = "not recorded"
TIMES = "\N{MULTIPLICATION SIGN}"
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

    def against(self, baseline: "Figure") -> float | None:
        """Relative difference of two numbers; None where there is none."""
        if isinstance(self.value, str) or isinstance(baseline.value, str) or not self.value or not baseline.value:
            return None
        return self.value / baseline.value - 1

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


@dataclass(frozen=True, kw_only=True)
class FigureGroup:
    key: str
    title: str
    figures: Sequence[Figure]


def groups(history: History, summary: Mapping[str, Any]) -> list[FigureGroup]:
    """`summary`: summarise(history)."""
    return [
        FigureGroup(key="run", title="Run", figures=_run(history, summary)),
        FigureGroup(key="learning", title="Learning", figures=_learning(history)),
        FigureGroup(key="speed", title="Speed", figures=_speed(history, summary)),
        FigureGroup(key="step", title="Where a step goes", figures=_step(summary)),
        FigureGroup(key="memory", title="Memory", figures=_memory(summary)),
        FigureGroup(key="device", title="Device", figures=_device(summary)),
        FigureGroup(key="communication", title="Communication and ranks", figures=_communication(history, summary)),
        FigureGroup(key="environment", title="Environment", figures=_environment(history)),
    ]


def setting(summary: Mapping[str, Any]) -> str:
    """On what the numbers were measured: device, dtype, ranks, shape."""
    ranks = summary["ranks"]
    parts = [str(summary["device"] or "device not recorded"), str(summary["dtype"] or "dtype not recorded")]
    if ranks is not None:
        parts.append(f"{ranks} rank{'s' * (ranks != 1)}")
    if summary["micro_batch_tokens"] is not None and summary["accumulation"] is not None:
        parts.append(
            f"{summary['micro_batch_tokens']:,} tokens {TIMES} {summary['accumulation']} micro-batches an update and rank"
        )
    if summary["student_parameters"]:
        parts.append(f"student of {parameters(summary['student_parameters'])}")
    if summary["teacher_parameters"]:
        parts.append(f"teacher of {parameters(summary['teacher_parameters'])}")
    return ", ".join(parts)


def parameters(count: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g}{name} parameters"
    return f"{count:,} parameters"


def duration(seconds: float) -> str:
    """'2 h 03 min', '4 min 05 s', '12.3 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _text(key: str, label: str, value: object, detail: str = "") -> Figure:
    return Figure(key, label, None if value is None else str(value), detail=detail)


def _run(history: History, summary: Mapping[str, Any]) -> list[Figure]:
    start, recipe = history.start, history.recipe
    done = history.lines[-1].update if history.lines else start.update
    planned = start.updates
    student = at(recipe, "student", "path") or at(recipe, "student", "architecture")
    counted = "lines that hold warm-up left out"
    return [
        _text("run.outcome", "outcome", OUTCOMES[history.outcome]),
        Figure("run.updates", "updates", done, detail=f"of {planned:,} planned" if planned else ""),
        Figure("run.tokens", "tokens", history.tokens, detail="all ranks and log lines, padding left out"),
        Figure(
            "run.wall_s",
            "wall clock",
            history.wall_s,
            "s",
            better="lower",
            detail="first to last event; evaluations and checkpoints included, interruptions left out",
        ),
        _aside(summary, "evaluation"),
        _aside(summary, "checkpoint"),
        _text("run.teacher", "teacher", at(recipe, "teacher", "path")),
        _text("run.student", "student", student),
        Figure("run.teacher_parameters", "teacher parameters", summary["teacher_parameters"]),
        Figure("run.student_parameters", "student parameters", summary["student_parameters"]),
        _text("run.device", "device", summary["device"]),
        _text("run.dtype", "precision", summary["dtype"]),
        *(_text(f"run.{name}", name, summary[name]) for name in ("ranks", "nodes", "engine", "rings", "sync", "compression")),
        *(_text(f"run.{name}", name, summary[name]) for name in ("threads", "kernels")),
        Figure("run.micro_batch_tokens", "tokens of a micro-batch", summary["micro_batch_tokens"], detail="at most"),
        Figure("run.accumulation", "micro-batches an update", summary["accumulation"], detail="of each rank"),
        Figure("run.tokens_per_update", "tokens an update", summary["tokens_per_update"], detail=f"all ranks; {counted}"),
    ]


def _aside(summary: Mapping[str, Any], name: str) -> Figure:
    """Seconds beside the updates, in all."""
    durations = summary[name]
    key, label = f"run.{name}_s", f"{name}s, in all"
    if durations is None:
        return Figure(key, label, None, "s")
    times = f"p50 {quantity(durations['p50'], 's')}, p95 {quantity(durations['p95'], 's')}"
    detail = f"{durations['n']:,}: {times}; in no step, rate or phase"
    return Figure(key, label, math.fsum(durations["samples"]), "s", n=durations["n"], of=f"{name}s", detail=detail)


def _learning(history: History) -> list[Figure]:
    last = history.lines[-1] if history.lines else Train(update=0)
    where = f"mean of the last log line, update {last.update:,}" if history.lines else ""
    figures = [
        Figure(
            f"learning.{name}",
            f"{label} loss",
            _value(getattr(last, name)),
            "nats" if name in ("soft", "hard") else "",
            n=last.updates,
            detail=where,
            better="lower",
        )
        for name, label in (("total", "total"), ("soft", "soft"), ("hard", "hard"), ("cosine", "cosine"), ("mse", "mse"))
        if name == "total" or getattr(last, name) is not None
    ]
    figures.append(Figure("learning.skipped", "skipped updates", history.skipped, detail="not finite"))
    nothing = Evaluation(update=0)
    final = history.evaluations[-1] if history.evaluations else nothing
    best = min(history.evaluations, key=lambda event: real(event.loss), default=nothing)
    for name, event in (("final", final), ("best", best)):
        at_update = f"{name}, update {event.update:,}" if history.evaluations else ""
        figures += [
            Figure(
                f"learning.{name}_heldout_loss",
                f"held-out loss, {name}",
                _value(event.loss),
                "nats",
                spread=_value(event.loss_se),
                spread_kind="se",
                n=event.labels,
                of="labels",
                detail=at_update,
                better="lower",
            ),
            Figure(
                f"learning.{name}_perplexity",
                f"held-out perplexity, {name}",
                _value(event.perplexity),
                spread=_perplexity_se(event),
                spread_kind="se",
                n=event.labels,
                of="labels",
                detail=at_update,
                better="lower",
            ),
        ]
    if final.kl is not None:
        figures.append(
            Figure(
                "learning.final_kl",
                "held-out KL to the teacher, final",
                _value(final.kl),
                "nats",
                spread=_value(final.kl_se),
                spread_kind="se",
                n=final.kl_tokens,
                of="tokens",
                detail=f"final, update {final.update:,}",
                better="lower",
            )
        )
    return figures


def _perplexity_se(event: Evaluation) -> float | None:
    """To first order: the standard error of e^loss is e^loss times that of the loss."""
    perplexity, error = _value(event.perplexity), _value(event.loss_se)
    return None if perplexity is None or error is None else perplexity * error


def _value(value: object) -> float | None:
    """An int stays one: it is a count, and shown whole."""
    number = value if isinstance(value, int) else real(value)
    return number if value is not None and not math.isnan(number) else None


def _speed(history: History, summary: Mapping[str, Any]) -> list[Figure]:
    recorded = [line.tokens_per_s for line in history.comparable_lines if not line.warmup]
    rates = [rate for rate in recorded if rate is not None and math.isfinite(rate)]
    step = summary["step_s"] or {}
    n, warm = step.get("n"), f"{summary['warmup']} warm-up updates left out; rank 0"
    bottleneck = summary["bottleneck"]
    key = f" -> {bottleneck['key']}" if bottleneck["key"] else ""
    return [
        Figure(
            "speed.tokens_per_s",
            "throughput",
            summary["tokens_per_s"],
            "tokens/s",
            spread=float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
            n=len(rates) or None,
            of="log lines",
            detail="all ranks; all tokens over all time",
            better="higher",
            samples=rates,
        ),
        Figure(
            "speed.step_p50_s",
            "step, p50",
            step.get("p50"),
            "s",
            n=n,
            detail=warm,
            better="lower",
            samples=step.get("samples", ()),
            statistic="median",
        ),
        *(
            Figure(f"speed.step_{name}_s", f"step, {name}", step.get(name), "s", n=n, detail=warm, better="lower")
            for name in ("p95", "p99")
        ),
        Figure(
            "speed.step_mean_s",
            "step, mean",
            step.get("mean"),
            "s",
            spread=step.get("sd"),
            n=n,
            detail=warm,
            better="lower",
            samples=step.get("samples", ()),
        ),
        _mfu(summary, "student", "MFU, student", "higher"),
        _mfu(summary, "with_teacher", "MFU, with the teacher", "higher"),
        _mfu(summary, "hfu", "hardware FLOP utilisation"),
        *(
            [_mfu(summary, "student", "MFU, student, of the measured peak", "higher", "measured")]
            if (summary["mfu"] or {}).get("measured")
            else []
        ),
        Figure("speed.data_wait_share", "waiting for data", summary["data_wait_share"], "share", better="lower"),
        _text("speed.bottleneck", "bottleneck", bottleneck["name"] + key, bottleneck["why"]),
    ]


def _mfu(summary: Mapping[str, Any], name: str, label: str, better: Better | None = None, against: str | None = None) -> Figure:
    mfu, key = summary["mfu"] or {}, f"speed.mfu_{name}"
    if against is not None:
        mfu, key = mfu[against], f"{key}_of_{against}"
    if mfu.get("refused"):
        return _text(key, label, "refused", mfu["refused"][0])
    peak = f"of {quantity(mfu['peak_flops'], 'flop/s')} ({mfu['peak_source']})" if mfu.get("peak_flops") else ""
    return Figure(key, label, mfu.get(name), "share", detail=peak, better=better)


def _step(summary: Mapping[str, Any]) -> list[Figure]:
    phases = summary["phases"] or {}
    figures = []
    for name in sorted(phases, key=PHASES.index):
        phase = phases[name]
        percentiles = ", ".join(f"{mark} {quantity(phase[mark], 's')}" for mark in ("p50", "p95", "p99"))
        figures += [
            Figure(
                f"step.{name}_s",
                name,
                phase["mean"],
                "s",
                spread=phase["sd"],
                n=phase["n"],
                detail=percentiles,
                better="lower",
                samples=phase["samples"],
            ),
            Figure(f"step.{name}_share", f"{name}, of the step", phase["share"], "share", n=phase["n"]),
        ]
    return figures or [Figure("step.phases", "phases", None)]


def _memory(summary: Mapping[str, Any]) -> list[Figure]:
    memory = summary["memory"] or {}
    names = {
        "peak_allocated_bytes": ("peak allocated", "torch's allocator, rank 0"),
        "peak_reserved_bytes": ("peak reserved", "torch's allocator, rank 0"),
        "fragmented_bytes": ("reserved beyond what was allocated", "of the peaks, last log line"),
        "used_bytes": ("used on the device", "by all processes, last log line"),
        "outside_bytes": ("used outside torch's allocator", "last log line"),
        "peak_rss_bytes": ("host, peak resident", "rank 0"),
    }
    figures = []
    for name, (label, detail) in names.items():
        better: Better | None = "lower" if name.startswith("peak_") else None  # of one instant: no verdict
        figures.append(Figure(f"memory.{name}", label, _value(memory.get(name)), "bytes", detail=detail, better=better))
    figures += [
        Figure(f"memory.{name}", label, _value(memory.get(name)), better="lower")
        for name, label in (("retries", "allocations retried"), ("ooms", "out of memory"))
    ]
    parts, estimate = memory.get("parts") or {}, memory.get("estimate") or {}
    for name in parts:
        value, before = _value(parts[name]), _value(estimate.get(name))
        if name == "activations_and_logits" and estimate:  # measured together
            before = real(estimate.get("activations")) + real(estimate.get("logits"))
        estimate_text = f"estimated before: {quantity(before, 'bytes')}" if before is not None else "no estimate recorded"
        figures.append(Figure(f"memory.parts.{name}", f"part: {name.replace('_', ' ')}", value, "bytes", detail=estimate_text))
    peak = _value(memory.get("peak_bytes"))
    if parts or peak is not None:
        predicted = sum(real(value) for value in estimate.values()) if estimate else math.nan
        estimate_text = (
            f"estimated before: {quantity(predicted, 'bytes')}" if math.isfinite(predicted) else "no estimate recorded"
        )
        if peak and math.isfinite(predicted):
            estimate_text += f" ({predicted / peak - 1:+.1%})"
        figures.append(Figure("memory.peak_bytes", "peak after the first updates", peak, "bytes", detail=estimate_text))
    return figures


def _device(summary: Mapping[str, Any]) -> list[Figure]:
    readings, energy = summary["readings"] or {}, summary["energy"]
    n = readings.get("samples") or None
    names: list[tuple[str, str, str, str]] = [
        ("utilisation", "utilisation", "share", "mean"),
        ("sm_clock_mhz", "SM clock", "MHz", "median"),
        ("sm_clock_min_mhz", "SM clock, lowest", "MHz", "lowest of the lines"),
        ("memory_clock_mhz", "memory clock", "MHz", "median"),
        ("clock_mhz", "processor clock", "MHz", "median"),
        ("power_w", "power", "W", "mean"),
        ("temperature_c", "temperature", "°C", "highest"),
    ]
    figures = [
        Figure(
            f"device.{name}",
            label,
            _value(readings.get(name)),
            unit,
            n=n,
            of="samples",
            detail=f"{how}; rank 0" if readings.get(name) is not None else readings.get("why", f"{how}; rank 0"),
        )
        for name, label, unit, how in names
        if name in readings or name in ("utilisation", "power_w", "temperature_c")
    ]
    why = energy.get("why") or f"rank 0's device, over {quantity(energy['seconds'], 's')}; the sensor's error is some per cent"
    per_token = energy["j_per_million_tokens"]
    figures += [
        Figure("device.j_per_update", "energy an update", energy["j_per_update"], "J", detail=why, better="lower"),
        Figure("device.j_per_million_tokens", "energy per million tokens", per_token, "J", detail=why, better="lower"),
    ]
    throttled, watched = readings.get("throttled"), readings.get("throttled_samples")
    if throttled is None:  # nobody looked
        return [*figures, Figure("device.throttled", "throttled", None)]
    if not throttled:
        return [*figures, _text("device.throttled", "throttled", "never", f"{watched:,} samples")]
    return figures + [
        Figure(
            f"device.throttled.{reason}",
            f"throttled: {reason.replace('_', ' ')}",
            share,
            "share",
            n=watched,
            of="samples",
            better="lower",
        )
        for reason, share in throttled.items()
    ]


def _communication(history: History, summary: Mapping[str, Any]) -> list[Figure]:
    if summary["ranks"] == 1:
        return [_text("communication.none", "communication", "none: one rank")]
    lines = [line for line in history.comparable_lines if not line.warmup]
    hidden, straggler = summary["communication"] or {}, summary["straggler"] or {}
    rings = max((len(line.ring_bytes) for line in lines), default=0)
    worked = ""
    if straggler:
        worked = f"rank {straggler['rank']}, the slowest in {straggler['slowest_in']} of {straggler['lines']} log lines"
    return [
        _per_update(lines, "communication.gradient_bytes", "gradient bytes an update", "gradient_bytes", "bytes/update"),
        *(
            _per_update(
                lines, f"communication.ring_{ring}_bytes", f"gradient bytes, ring {ring}", "ring_bytes", "bytes/update", ring
            )
            for ring in range(rings)
        ),
        _per_update(lines, "communication.control_bytes", "control bytes an update", "control_bytes", "bytes/update"),
        _per_update(lines, "communication.control_messages", "control messages an update", "control_messages", ""),
        _per_update(lines, "communication.gradient_collectives", "gradient collectives an update", "gradient_collectives", ""),
        _per_update(lines, "communication.wait_s", "waiting for communication an update", "exchange_wait_s", "s"),
        Figure(
            "communication.seconds",
            "communication, until it was waited for",
            hidden.get("mean"),
            "s",
            spread=hidden.get("sd"),
            n=hidden.get("n"),
            detail="from the first departure; overlaps backward; rank 0",
            better="lower",
            samples=hidden.get("samples", ()),
        ),
        Figure(
            "communication.hidden_share",
            "of it, hidden, at least",
            hidden.get("hidden_share"),
            "share",
            detail="behind the rest of the step",
            better="higher",
        ),
        _line_mean(lines, "communication.imbalance_time", "imbalance of own work", "imbalance_time"),
        _line_mean(lines, "communication.imbalance_tokens", "imbalance of tokens", "imbalance_tokens"),
        Figure(
            "communication.straggler_share",
            "straggler's own work over the mean",
            straggler.get("share"),
            "share",
            detail=worked,
            better="lower",
        ),
    ]


def _per_update(lines: Iterable[Train], key: str, label: str, name: str, unit: str, ring: int | None = None) -> Figure:
    """All of it over all updates."""
    total, updates = 0.0, 0
    for line in lines:
        value = getattr(line, name)
        if ring is not None:
            value = value[ring] if ring < len(value) else None
        if value is not None and line.updates:
            total, updates = total + value, updates + line.updates
    mean = total / updates if updates else None
    return Figure(key, label, mean, unit, n=updates or None, detail="rank 0", better="lower")


def _line_mean(lines: Iterable[Train], key: str, label: str, name: str) -> Figure:
    values = [value for line in lines if (value := getattr(line, name)) is not None]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    mean = float(np.mean(values)) if values else None
    detail = "largest rank over the mean, less 1"
    return Figure(
        key,
        label,
        mean,
        "share",
        spread=spread,
        n=len(values) or None,
        of="log lines",
        detail=detail,
        better="lower",
        samples=values,
    )


def _environment(history: History) -> list[Figure]:
    """Versions and devices, nothing else of what surrounds a run: no variables, no addresses, no names of machines or users."""
    environment, versions = history.environment, dict(history.environment.versions or {})
    if history.start.torch is not None:
        versions.setdefault("torch", history.start.torch)
    devices: dict[str, list[DeviceFacts]] = {}
    for device in environment.devices:
        devices.setdefault(str(device.name), []).append(device)
    figures = [
        _text("environment.processor", "processor", environment.processor),
        _text("environment.cores", "cores", environment.cores),
        Figure("environment.memory_bytes", "host memory", _value(environment.memory_bytes), "bytes"),
    ]
    for index, (name, same) in enumerate(devices.items()):
        memory = _value(same[0].memory_bytes)
        detail = quantity(memory, "bytes") if memory is not None else "memory not recorded"
        figures.append(_text(f"environment.device_{index}", "device", f"{len(same)} {TIMES} {name}", detail))
    for kind, unit in (("flops", "flop/s"), ("bytes", "bytes/s")):
        for source, value in (at(environment, "peaks", kind) or {}).items():
            label = "peak arithmetic" if kind == "flops" else "peak memory bandwidth"
            figures.append(Figure(f"environment.peak_{kind}.{source}", label, _value(value), unit, detail=str(source)))
    if not versions:
        figures.append(Figure("environment.versions", "versions", None))
    return [*figures, *(_text(f"environment.versions.{name}", str(name), value) for name, value in versions.items())]
