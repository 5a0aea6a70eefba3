"""Which charts a report has: run histories -> sections of panels.

One run: a panel has a line for each of its measures. Several: a panel for each measure with a line for each run, always in the
same colour and dash. A measure that no run recorded has no panel; its title goes into the section's `missing`.

Curves show every effective update; those of ranks only the lines that ran as the last start says.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastdistil.events import MemoryParts, Train
from fastdistil.profiling.quantities import quantity
from fastdistil.profiling.report import svg as charts
from fastdistil.profiling.report.history import History
from fastdistil.profiling.report.summary import MFU, PHASES, measured_updates, phased_updates
from fastdistil.profiling.report.svg import Axis, ChartSeries, Floats, Layer
from fastdistil.profiling.spans import NAMES
from fastdistil.untrusted import at, real

Get = Callable[[Train], object]
WIDE, NARROW = 740.0, 360.0
UPDATE = Axis(label="update")
_LOG_FROM = 20.0
"""Largest over smallest value from which an axis is logarithmic, where all values are positive."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    svg: str
    narrow: str = ""
    """The same for a small screen, where `svg` is wide."""
    tall: bool = False
    """As high as two others."""
    legend: Sequence[tuple[str, str]] = ()
    """(swatch, name)."""
    caption: str = ""


class Points(NamedTuple):
    """x, y: [n]; low, high: [n], ends of error bars."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


class Measure(NamedTuple):
    name: str
    get: Callable[[History], Points]


@dataclass
class PlotSection:
    key: str
    title: str
    histories: Sequence[History]
    panels: list[Panel] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Titles of what no run recorded."""

    @property
    def several(self) -> bool:
        return len(self.histories) > 1

    def title_of(self, title: str, history: History) -> str:
        """Return the title of a panel that shows one run."""
        return f"{title}: {history.name}" if self.several else title

    def add(
        self, title: str, measures: Sequence[Measure], y: Axis,
        *, wide: bool = False, tall: bool = False, log: bool = False, caption: str = "",
    ) -> None:  # fmt: skip
        """Draw the measures into panels, the first as `wide` and `tall` say. `log`: if the values ask for it."""
        by_measure = [(measure.name, [measure.get(history) for history in self.histories]) for measure in measures]
        by_measure = [(name, points) for name, points in by_measure if any(np.isfinite(curve.y).any() for curve in points)]
        if not by_measure:
            self.missing.append(title)
        elif not self.several:
            lines = [(name, points[0]) for name, points in by_measure]
            self.panels.append(_line_panel(title, lines, y, wide, tall, log, [caption]))
        else:
            for index, (name, points) in enumerate(by_measure):
                panel_title = title if len(measures) == 1 else f"{title}: {name}"
                lines = [(history.name, curve) for history, curve in zip(self.histories, points, strict=True)]
                absent = [run for run, curve in lines if not np.isfinite(curve.y).any()]
                captions = [caption, f"Not recorded in {', '.join(absent)}." if absent else ""]
                first = index == 0
                self.panels.append(_line_panel(panel_title, lines, y, wide and first, tall and first, log, captions))


def sections(histories: Sequence[History]) -> list[PlotSection]:
    return [draw(histories) for draw in (_learning, _speed, _step, _memory, _device, _communication)]


def _of_lines(get: Get, per_update: bool = False) -> Callable[[History], Points]:
    """Take a value from each log line; lines without it are left out, so that curves have no holes."""

    def points(history: History) -> Points:
        rows = [(line.update, value, line.updates) for line in history.curve_lines if (value := get(line)) is not None]
        y = [real(value) / (real(count) if per_update else 1.0) for _, value, count in rows]
        return Points(_floats(update for update, _, _ in rows), _floats(y))

    return points


def _floats(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)


def _field(name: str, *path: str, per_update: bool = False) -> Measure:
    return Measure(name, _of_lines(lambda line: at(line, *path), per_update))


def _wide(title: str, draw: Callable[[float, float], str], heights: tuple[float, float], **more: Any) -> Panel:
    """Return a panel of two columns, and of one on a small screen; `heights` of the two."""
    return Panel(title=title, svg=draw(WIDE, heights[0]), narrow=draw(NARROW, heights[1]), **more)


def _line_panel(
    title: str, lines: list[tuple[str, Points]], y: Axis, wide: bool, tall: bool, log: bool, captions: list[str]
) -> Panel:
    series = [
        ChartSeries(name=name, x=points.x, y=points.y, style=style, low=points.low, high=points.high)
        for style, (name, points) in enumerate(lines)
        if np.isfinite(points.y).any()
    ]
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
    if log and values.min() > 0 and values.max() >= _LOG_FROM * values.min():
        y = Axis(label=y.label, unit=y.unit, log=True)
        captions.append("Logarithmic axis.")
    most, columns = max(len(one.x) for one in series), int(((WIDE if wide else NARROW) - 60) / charts.COLUMN_WIDTH)
    if most > columns:
        captions.append(
            f"{most:,} values in some {columns} columns: the line is a column's mean, the band its smallest to its largest."
        )
    gaps = sum(int((~np.isfinite(one.y)).sum()) for one in series)
    if gaps:
        captions.append(f"Values that are not finite or not recorded: {gaps:,}, left blank.")

    def draw(width: float, height: float) -> str:
        return charts.line_chart(series, x=UPDATE, y=y, title=title, width=width, height=height)

    legend = [(charts.swatch(one.style), one.name) for one in series] if len(lines) > 1 else []
    caption = " ".join(filter(None, captions))
    if wide:
        return _wide(title, draw, (505 if tall else 228, 230), tall=tall, legend=legend, caption=caption)
    return Panel(title=title, svg=draw(NARROW, 210), tall=tall, legend=legend, caption=caption)


def _learning(histories: Sequence[History]) -> PlotSection:
    section = PlotSection("learning", "Learning", histories)
    terms = [_field(name, name) for name in ("total", "soft", "hard", "cosine", "mse")]
    caption = "Means of a log line's updates; total is the weighted sum."
    section.add("Loss", terms, Axis(label="loss"), wide=True, tall=True, log=True, caption=caption)
    norms = [_field("mean", "grad_norm"), _field("largest", "grad_norm_max")]
    section.add("Gradient norm", norms, Axis(label="norm"), log=True, caption="Before clipping.")
    section.add("Learning rate", [_field("rate", "lr")], Axis(label="rate", zero=True))
    bars = "Bars: one standard error."
    section.add("Held-out loss", [Measure("loss", _evaluated("loss"))], Axis(label="loss, nats"), caption=bars)
    perplexity, caption = [Measure("perplexity", _perplexity)], "Bars: e to the loss ± one standard error."
    section.add("Held-out perplexity", perplexity, Axis(label="perplexity"), log=True, caption=caption)
    kl = [Measure("KL", _evaluated("kl"))]
    section.add("Held-out KL to the teacher", kl, Axis(label="KL, nats", zero=True), caption=bars)
    return section


def _evaluated(name: str) -> Callable[[History], Points]:
    def points(history: History) -> Points:
        events = [event for event in history.evaluations if getattr(event, name) is not None]
        y = _floats(getattr(event, name) for event in events)
        error = _floats(real(getattr(event, f"{name}_se", None)) for event in events)
        return Points(_floats(event.update for event in events), y, y - error, y + error)

    return points


def _perplexity(history: History) -> Points:
    loss, perplexity = _evaluated("loss")(history), _evaluated("perplexity")(history)
    if loss.low is None or loss.high is None or len(loss.x) != len(perplexity.x):
        return perplexity
    with np.errstate(over="ignore"):
        return perplexity._replace(low=np.exp(loss.low), high=np.exp(loss.high))


def _speed(histories: Sequence[History]) -> PlotSection:
    section = PlotSection("speed", "Speed", histories)
    caption = "All ranks together; evaluations and checkpoints left out."
    axis = Axis(label="throughput", unit="tokens/s", zero=True)
    section.add("Throughput", [_field("tokens/s", "tokens_per_s")], axis, wide=True, caption=caption)
    caption = "Every update of rank 0 behind the warm-up."
    section.add("Step time", [Measure("step", _steps)], Axis(label="step", unit="s", zero=True), caption=caption)
    steps = [_steps(history).y for history in histories]
    recorded = [times for times in steps if times.size]
    if recorded:
        # To the slowest run's 99th percentile and a quarter more: one stall must not squeeze all others into a line.
        high = max(min(float(times.max()), 1.25 * float(np.percentile(times, 99))) for times in recorded)
        domain = (min(float(times.min()) for times in recorded), high)
        for style, (history, times) in enumerate(zip(histories, steps, strict=True)):
            if times.size:
                section.panels.append(_distribution(section, history, times, domain, style))
    else:
        section.missing.append("Step-time distribution")
    caption = "Share of the peak's FLOP/s that the models' own FLOP take."
    records = [line.mfu for history in histories for line in history.lines if line.mfu is not None]
    if refused := sum(mfu.refused is not None for mfu in records):
        caption += f" Refused, as more than 100%: {refused:,} log lines."
    if sources := sorted({str(mfu.peak_source) for mfu in records if mfu.peak_source}):
        caption += f" Peak: {'; '.join(sources)}."
    utilisation = [_field(label, "mfu", name) for name, label in zip(MFU, _MFU, strict=True)]
    section.add("MFU", utilisation, Axis(label="of peak", unit="share", zero=True), caption=caption)
    return section


_MFU = ("student", "with the teacher", "hardware (recomputation included)")


def _steps(history: History) -> Points:
    """Return the seconds of every update behind the warm-up."""
    updates = measured_updates(history.lines)
    return Points(_floats(updates.numbers), _floats(updates.step_s))


def _distribution(section: PlotSection, history: History, steps: Floats, domain: tuple[float, float], style: int) -> Panel:
    title = section.title_of("Step-time distribution", history)
    marks = [(f"p{percent}", float(np.percentile(steps, percent))) for percent in (50, 95, 99)]
    marks_text = ", ".join(f"{name} {quantity(value, 's')}" for name, value in marks)
    caption = f"{len(steps):,} updates; {marks_text}."
    beyond = int((steps > domain[1]).sum())
    if beyond:
        caption += f" In the last bar: {beyond:,} beyond the axis, up to {quantity(float(steps.max()), 's')}."

    def draw(width: float, height: float) -> str:
        axis = Axis(label="step", unit="s")
        return charts.histogram(steps, x=axis, marks=marks, style=style, domain=domain, title=title, width=width, height=height)

    if section.several:
        return Panel(title=title, svg=draw(NARROW, 210), caption=caption)
    return _wide(title, draw, (210, 210), caption=caption)


def _step(histories: Sequence[History]) -> PlotSection:
    section = PlotSection("step", "Where a step goes", histories)
    columns = [(history, *_phase_columns(history.lines)) for history in histories]
    columns = [(history, x, phases) for history, x, phases in columns if x.size]
    width = NARROW if section.several else WIDE
    top = max((charts.stack_top(x, list(phases.values()), width) for _, x, phases in columns), default=0.0)
    for history, x, phases in columns:
        section.panels.append(_phase_panel(section.title_of("Phases of a step", history), x, phases, top, not section.several))
    if not columns:
        section.missing.append("Phases of a step")
    spans = [Measure(label, _span(name)) for name, label in _SPANS.items()]
    if not all(history.start.ranks == 1 for history in histories):
        caption = "Exposed: all that the step waited for other ranks; the rest of communication hides behind backward. Rank 0."
        section.add("Communication in a step", spans, Axis(label="seconds", unit="s", zero=True), caption=caption)
    return section


_SPANS = {"communication": "first departure until waited for", "exposed": "exposed"}


def _span(name: str) -> Callable[[History], Points]:
    def points(history: History) -> Points:
        updates = phased_updates(line for line in history.lines if name in line.phases)
        return Points(_floats(updates.numbers), _floats(updates.phases.get(name, [])))

    return points


def _phase_panel(title: str, x: Floats, phases: dict[str, Floats], top: float, wide: bool) -> Panel:
    layers = [Layer(name=name, values=values) for name, values in phases.items() if values.any()]
    layers = layers or [Layer(name="other", values=phases["other"])]  # no update took any time
    axis = Axis(label="step", unit="s", top=top)

    def draw(width: float, height: float) -> str:
        return charts.stacked_chart(x, layers, x_axis=UPDATE, y_axis=axis, title=title, width=width, height=height)

    columns = int(((WIDE if wide else NARROW) - 60) / charts.COLUMN_WIDTH)
    means = f" {len(x):,} updates as the means of some {columns} columns." if len(x) > columns else f" {len(x):,} updates."
    caption = "Seconds of rank 0 in each phase; exposed: communication that the step waited for." + means
    legend = [(charts.patch(layer.name), layer.name) for layer in reversed(layers)]
    if wide:
        return _wide(title, draw, (255, 230), legend=legend, caption=caption)
    return Panel(title=title, svg=draw(NARROW, 230), legend=legend, caption=caption)


def _phase_columns(lines: Iterable[Train]) -> tuple[Floats, dict[str, Floats]]:
    """(update [n], {phase: seconds [n]}) of the updates behind the warm-up whose line recorded phases, `other` last."""
    updates = phased_updates(lines)
    steps = _floats(updates.step_s)
    phases: dict[str, Floats] = {
        name: np.maximum(updates.phases[name], 0.0) if name in updates.phases else np.zeros_like(steps) for name in NAMES
    }
    other = np.maximum(steps - np.sum(list(phases.values()), axis=0), 0.0)
    return _floats(updates.numbers), {**phases, "other": other}


_HELD = {
    "peak_allocated_bytes": "peak allocated",
    "allocated_bytes": "allocated",
    "reserved_bytes": "reserved",
    "used_bytes": "used on the device, by all",
    "rss_bytes": "host, resident",
}


def _memory(histories: Sequence[History]) -> PlotSection:
    section = PlotSection("memory", "Memory", histories)
    held = [_field(label, "memory", name) for name, label in _HELD.items()]
    if not any(line.memory for history in histories for line in history.lines):
        held = [_field("device peak", "device_peak_bytes"), _field("host peak", "host_peak_bytes")]
    peaks = [(history, of_phases) for history in histories if (of_phases := _phase_peaks(history))]
    axis = Axis(label="held", unit="bytes", zero=True)
    tall = bool(peaks)  # two panels or more stand beside it
    section.add("Memory over time", held, axis, wide=True, tall=tall, caption="Of rank 0.")
    split = [(history, history.memory) for history in histories if history.memory is not None and history.memory.parts]
    for history, memory in split:
        section.panels.append(_parts_panel(section.title_of("Parts of the peak", history), memory))
    if not split:
        section.missing.append("Parts of the peak")
    for history, of_phases in peaks:
        title = section.title_of("Peak within each phase", history)
        bars = [charts.Bar(name=name, parts=[(name, value)]) for name, value in of_phases.items()]
        svg = charts.bar_chart(bars, x=Axis(label="allocated at most", unit="bytes"), title=title)
        section.panels.append(Panel(title=title, svg=svg, caption="Largest of all log lines; rank 0."))
    if not peaks:
        section.missing.append("Peak within each phase")
    return section


def _parts_panel(title: str, memory: MemoryParts) -> Panel:
    parts = {name: real(value) for name, value in (memory.parts or {}).items()}
    estimate = {name: real(value) for name, value in (memory.estimate or {}).items()}
    bars = [charts.Bar(name="measured", parts=_finite(parts))]
    if estimate:
        bars.append(charts.Bar(name="estimated before (--dry-run)", parts=_finite(estimate)))
    names = [name for name in {**parts, **estimate} if parts.get(name, 0.0) > 0 or estimate.get(name, 0.0) > 0]
    marks = _finite({"peak": real(memory.peak_bytes)})
    return Panel(
        title=title,
        svg=charts.bar_chart(bars, x=Axis(label="bytes", unit="bytes"), title=title, marks=marks),
        legend=[(charts.patch(name), name.replace("_", " ")) for name in names],
        caption="After the first updates of rank 0. The estimate is a prediction.",
    )


def _finite(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in parts.items() if math.isfinite(value)]


def _phase_peaks(history: History) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for line in history.lines:
        for name, value in (at(line, "memory", "phase_peaks") or {}).items():
            if math.isfinite(real(value)):
                peaks[name] = max(peaks.get(name, 0.0), real(value))
    return {name: peaks[name] for name in sorted(peaks, key=lambda name: PHASES.index(name) if name in PHASES else 99)}


def _device(histories: Sequence[History]) -> PlotSection:
    section = PlotSection("device", "Device", histories)
    busy = Axis(label="busy", unit="share", zero=True, top=1.0)
    caption = "GPU: time in which any kernel ran, which says nothing of how well. CPU: of the process's cores."
    section.add("Utilisation", [_field("utilisation", "device", "utilisation")], busy, caption=caption)
    clocks = (("SM, median", "sm_clock_mhz"), ("SM, lowest", "sm_clock_min_mhz"), ("processor", "clock_mhz"))
    section.add("Clocks", [_field(label, "device", name) for label, name in clocks], Axis(label="clock", unit="MHz"))
    section.add("Power", [_field("power", "device", "power_w")], Axis(label="power", unit="W", zero=True))
    temperature = [_field("temperature", "device", "temperature_c")]
    section.add("Temperature", temperature, Axis(label="temperature", unit="°C"))
    watched = [at(line, "device", "throttled") for history in histories for line in history.lines]
    watched = [shares for shares in watched if shares is not None]
    reasons = Counter(reason for shares in watched for reason in shares)
    if reasons or not watched:
        throttled = [Measure(reason.replace("_", " "), _of_lines(_throttled(reason))) for reason, _ in reasons.most_common()]
        caption = "A software power cap is normal on power-limited parts; a hardware slow-down is an alarm."
        section.add("Throttling", throttled, Axis(label="of samples", unit="share", zero=True, top=1.0), caption=caption)
    traffic = [
        _field(f"{bus}, {label}", "device", f"{bus.lower()}_{way}_bytes_per_s")
        for bus in ("PCIe", "NVLink")
        for way, label in (("tx", "sent"), ("rx", "received"))
    ]
    section.add("Bus traffic", traffic, Axis(label="traffic", unit="bytes/s", zero=True))
    return section


def _throttled(reason: str) -> Get:
    def get(line: Train) -> object:
        shares = at(line, "device", "throttled")
        return None if shares is None else shares.get(reason, 0.0)

    return get


def _communication(histories: Sequence[History]) -> PlotSection:
    section = PlotSection("communication", "Communication and ranks", histories)
    if all(history.start.ranks == 1 for history in histories):
        return section
    sent = [_field("gradients", "gradient_bytes", per_update=True), _field("control", "control_bytes", per_update=True)]
    axis = Axis(label="sent", unit="bytes/update", zero=True)
    caption = "Of one rank, as handed to the engine: after compression."
    section.add("Bytes per update", sent, axis, log=True, caption=caption)
    rings = max((len(line.ring_bytes) for history in histories for line in history.lines), default=0)
    section.add("Gradient bytes per ring", [Measure(f"ring {ring}", _ring(ring)) for ring in range(rings)], axis)
    wait, axis = [_field("wait", "exchange_wait_s", per_update=True)], Axis(label="wait per update", unit="s", zero=True)
    section.add("Waiting for communication", wait, axis, caption="Rank 0.")
    imbalance = [_field("own work", "imbalance_time"), _field("tokens", "imbalance_tokens")]
    axis = Axis(label="over the mean", unit="share", zero=True)
    section.add("Imbalance", imbalance, axis, caption="The largest rank over the mean of all, less 1.")
    drawn = [
        _rank_panel(section.title_of("Own work of each rank", history), worked, style)
        for style, history in enumerate(histories)
        if (worked := _worked_by_rank(history)).size > 1
    ]
    section.panels.extend(drawn)
    if not drawn:
        section.missing.append("Own work of each rank")
    return section


def _ring(ring: int) -> Callable[[History], Points]:
    def get(line: Train) -> object:
        return line.ring_bytes[ring] / real(line.updates) if ring < len(line.ring_bytes) else None

    return _of_lines(get)


def _worked_by_rank(history: History) -> Floats:
    """[ranks] seconds of own work an update, lines with warm-up left out; empty if not recorded."""
    lines = [line for line in history.comparable_lines if line.rank_worked_s and not line.warmup]
    if not lines:
        return np.empty(0)
    total = np.array([line.rank_worked_s for line in lines], dtype=np.float64).sum(axis=0)
    return np.asarray(total / sum(real(line.updates) for line in lines), dtype=np.float64).clip(min=0.0)


def _rank_panel(title: str, worked: Floats, style: int) -> Panel:
    slowest = int(worked.argmax())
    over = worked[slowest] / worked.mean() - 1 if worked.mean() > 0 else 0.0
    svg = charts.rank_chart(worked, y=Axis(label="per update", unit="s", zero=True), style=style, mark=slowest, title=title)
    caption = f"Waits for others left out. Slowest: rank {slowest}, {over:.1%} over the mean of {len(worked)} ranks."
    return Panel(title=title, svg=svg, caption=caption)
