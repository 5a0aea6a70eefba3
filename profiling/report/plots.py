"""Which charts a report has: run histories -> sections of panels.

One run: a panel has a line for each of its measures. Several: a panel for each measure with a line for each run, always in the
same colour and dash. A measure that no run recorded has no panel; its title goes into the section's `missing`.

Curves show every effective update; those of ranks only the lines that ran as the last start says.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastdistil.events import Train
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
LOG_FROM = 20.0
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


@dataclass(kw_only=True)
class PlotSection:
    key: str
    title: str
    panels: list[Panel] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Titles of what no run recorded."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """x, y: [n]; low, high: [n], ends of error bars."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    name: str
    get: Callable[[History], Points]


def sections(histories: Sequence[History]) -> list[PlotSection]:
    return [
        _learning(histories),
        _speed(histories),
        _step(histories),
        _memory(histories),
        _device(histories),
        _communication(histories),
    ]


def of_lines(*path: str, per_update: bool = False, get: Get | None = None) -> Callable[[History], Points]:
    """A field of the log lines, or what `get` takes from one; lines without it are left out, so that curves have no holes."""

    def points(history: History) -> Points:
        rows = [(line.update, get(line) if get else at(line, *path), line.updates) for line in history.curve_lines]
        rows = [(update, value, count) for update, value, count in rows if value is not None]
        y = np.array([real(value) / (real(count) if per_update else 1.0) for _, value, count in rows], dtype=np.float64)
        return Points(x=np.array([update for update, _, _ in rows], dtype=np.float64), y=y)

    return points


def _field(name: str, *path: str, per_update: bool = False) -> Measure:
    return Measure(name=name, get=of_lines(*path, per_update=per_update))


def add(
    section: PlotSection, title: str, histories: Sequence[History], measures: Sequence[Measure], y: Axis,
    *, wide: bool = False, tall: bool = False, log: bool = False, caption: str = "",
) -> None:  # fmt: skip
    """Draw the measures into panels of `section`, the first as `wide` and `tall` say. `log`: if the values ask for it."""
    by_measure = [(measure.name, [measure.get(history) for history in histories]) for measure in measures]
    by_measure = [(name, points) for name, points in by_measure if any(np.isfinite(curve.y).any() for curve in points)]
    if not by_measure:
        section.missing.append(title)
    elif len(histories) == 1:
        lines = [(name, points[0]) for name, points in by_measure]
        section.panels.append(_line_panel(title, lines, y, wide, tall, log, [caption]))
    else:
        for name, points in by_measure:
            panel_title = title if len(measures) == 1 else f"{title}: {name}"
            lines = [(history.name, curve) for history, curve in zip(histories, points, strict=True)]
            first = name == by_measure[0][0]
            absent = [run for run, curve in lines if not np.isfinite(curve.y).any()]
            absence = f"Not recorded in {', '.join(absent)}." if absent else ""
            section.panels.append(_line_panel(panel_title, lines, y, wide and first, tall and first, log, [caption, absence]))


def _line_panel(
    title: str, lines: list[tuple[str, Points]], y: Axis, wide: bool, tall: bool, log: bool, captions: list[str]
) -> Panel:
    series = [
        ChartSeries(name=name, x=points.x, y=points.y, style=style, low=points.low, high=points.high)
        for style, (name, points) in enumerate(lines)
        if np.isfinite(points.y).any()
    ]
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
    if log and values.min() > 0 and values.max() >= LOG_FROM * values.min():
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

    return Panel(
        title=title,
        svg=draw(WIDE, 505 if tall else 228) if wide else draw(NARROW, 210),
        narrow=draw(NARROW, 230) if wide else "",
        tall=tall,
        legend=[(charts.swatch(one.style), one.name) for one in series] if len(lines) > 1 else [],
        caption=" ".join(part for part in captions if part),
    )


def _learning(histories: Sequence[History]) -> PlotSection:
    section = PlotSection(key="learning", title="Learning")
    terms = [_field(name, name) for name in ("total", "soft", "hard", "cosine", "mse")]
    caption = "Means of a log line's updates; total is the weighted sum."
    add(section, "Loss", histories, terms, Axis(label="loss"), wide=True, tall=True, log=True, caption=caption)
    norms = [_field("mean", "grad_norm"), _field("largest", "grad_norm_max")]
    add(section, "Gradient norm", histories, norms, Axis(label="norm"), log=True, caption="Before clipping.")
    add(section, "Learning rate", histories, [_field("rate", "lr")], Axis(label="rate", zero=True))
    bars = "Bars: one standard error."
    add(
        section,
        "Held-out loss",
        histories,
        [Measure(name="loss", get=_evaluated("loss"))],
        Axis(label="loss, nats"),
        caption=bars,
    )
    perplexity = [Measure(name="perplexity", get=_perplexity)]
    caption = "Bars: e to the loss ± one standard error."
    add(section, "Held-out perplexity", histories, perplexity, Axis(label="perplexity"), log=True, caption=caption)
    kl = [Measure(name="KL", get=_evaluated("kl"))]
    add(section, "Held-out KL to the teacher", histories, kl, Axis(label="KL, nats", zero=True), caption=bars)
    return section


def _evaluated(name: str) -> Callable[[History], Points]:
    def points(history: History) -> Points:
        events = [event for event in history.evaluations if getattr(event, name) is not None]
        x = np.array([event.update for event in events], dtype=np.float64)
        y = np.array([getattr(event, name) for event in events], dtype=np.float64)
        error = np.array([real(getattr(event, f"{name}_se", None)) for event in events], dtype=np.float64)
        return Points(x=x, y=y, low=y - error, high=y + error)

    return points


def _perplexity(history: History) -> Points:
    loss, perplexity = _evaluated("loss")(history), _evaluated("perplexity")(history)
    if loss.low is None or loss.high is None or len(loss.x) != len(perplexity.x):
        return perplexity
    with np.errstate(over="ignore"):
        return Points(x=perplexity.x, y=perplexity.y, low=np.exp(loss.low), high=np.exp(loss.high))


def _speed(histories: Sequence[History]) -> PlotSection:
    section = PlotSection(key="speed", title="Speed")
    rate = [_field("tokens/s", "tokens_per_s")]
    caption = "All ranks together; evaluations and checkpoints left out."
    add(
        section, "Throughput", histories, rate, Axis(label="throughput", unit="tokens/s", zero=True), wide=True, caption=caption
    )
    step = [Measure(name="step", get=_steps)]
    caption = "Every update of rank 0 behind the warm-up."
    add(section, "Step time", histories, step, Axis(label="step", unit="s", zero=True), caption=caption)
    steps = [_steps(history).y for history in histories]
    recorded = [times for times in steps if times.size]
    if recorded:
        # To the slowest run's 99th percentile and a quarter more: one stall must not squeeze all others into a line.
        high = max(min(float(times.max()), 1.25 * float(np.percentile(times, 99))) for times in recorded)
        domain = (min(float(times.min()) for times in recorded), high)
        for style, (history, times) in enumerate(zip(histories, steps, strict=True)):
            if times.size:
                section.panels.append(_distribution(history, times, domain, style, several=len(histories) > 1))
    else:
        section.missing.append("Step-time distribution")
    caption = "Share of the peak's FLOP/s that the models' own FLOP take."
    refused = sum(at(line, "mfu", "refused") is not None for history in histories for line in history.lines)
    if refused:
        caption += f" Refused, as more than 100%: {refused:,} log lines."
    sources = sorted(
        {
            str(at(line, "mfu", "peak_source"))
            for history in histories
            for line in history.lines
            if at(line, "mfu", "peak_source")
        }
    )
    caption += f" Peak: {'; '.join(sources)}." if sources else ""
    utilisation = [_field(label, "mfu", name) for name, label in zip(MFU, _MFU, strict=True)]
    add(section, "MFU", histories, utilisation, Axis(label="of peak", unit="share", zero=True), caption=caption)
    return section


_MFU = ("student", "with the teacher", "hardware (recomputation included)")


def _steps(history: History) -> Points:
    """Seconds of every update behind the warm-up."""
    updates = measured_updates(history.lines)
    return Points(x=np.array(updates.numbers, dtype=np.float64), y=np.array(updates.step_s, dtype=np.float64))


def _distribution(history: History, steps: Floats, domain: tuple[float, float], style: int, several: bool) -> Panel:
    title = f"Step-time distribution: {history.name}" if several else "Step-time distribution"
    marks = [(f"p{percent}", float(np.percentile(steps, percent))) for percent in (50, 95, 99)]
    marks_text = ", ".join(f"{name} {quantity(value, 's')}" for name, value in marks)
    caption = f"{len(steps):,} updates; {marks_text}."
    beyond = int((steps > domain[1]).sum())
    if beyond:
        caption += f" In the last bar: {beyond:,} beyond the axis, up to {quantity(float(steps.max()), 's')}."

    def draw(width: float) -> str:
        axis = Axis(label="step", unit="s")
        return charts.histogram(steps, x=axis, marks=marks, style=style, domain=domain, title=title, width=width)

    wide = not several
    return Panel(title=title, svg=draw(WIDE if wide else NARROW), narrow=draw(NARROW) if wide else "", caption=caption)


def _step(histories: Sequence[History]) -> PlotSection:
    section = PlotSection(key="step", title="Where a step goes")
    columns = [(history, phase_columns(history.lines)) for history in histories]
    wide = len(histories) == 1
    tops = [charts.stack_top(x, list(phases.values()), WIDE if wide else NARROW) for _, (x, phases) in columns if x.size]
    for history, (x, phases) in columns:
        if not x.size:
            continue
        title = "Phases of a step" if wide else f"Phases of a step: {history.name}"
        section.panels.append(_phase_panel(title, x, phases, max(tops), wide))
    if not tops:
        section.missing.append("Phases of a step")
    spans = [Measure(name=label, get=_span(name)) for name, label in _SPANS.items()]
    if not all(history.start.ranks == 1 for history in histories):
        caption = "Exposed: all that the step waited for other ranks; the rest of communication hides behind backward. Rank 0."
        add(section, "Communication in a step", histories, spans, Axis(label="seconds", unit="s", zero=True), caption=caption)
    return section


_SPANS = {"communication": "first departure until waited for", "exposed": "exposed"}


def _span(name: str) -> Callable[[History], Points]:
    def points(history: History) -> Points:
        updates = phased_updates(line for line in history.lines if name in line.phases)
        x, y = updates.numbers, updates.phases.get(name, [])
        return Points(x=np.array(x, dtype=np.float64), y=np.array(y, dtype=np.float64))

    return points


def _phase_panel(title: str, x: Floats, phases: dict[str, Floats], top: float, wide: bool) -> Panel:
    layers = [Layer(name=name, values=values) for name, values in phases.items() if values.any()]
    layers = layers or [Layer(name="other", values=phases["other"])]  # no update took any time
    axis = Axis(label="step", unit="s", top=top)

    def draw(width: float, height: float) -> str:
        return charts.stacked_chart(x, layers, x_axis=UPDATE, y_axis=axis, title=title, width=width, height=height)

    columns = int(((WIDE if wide else NARROW) - 60) / charts.COLUMN_WIDTH)
    means = f" {len(x):,} updates as the means of some {columns} columns." if len(x) > columns else f" {len(x):,} updates."
    return Panel(
        title=title,
        svg=draw(WIDE, 255) if wide else draw(NARROW, 230),
        narrow=draw(NARROW, 230) if wide else "",
        legend=[(charts.patch(layer.name), layer.name) for layer in reversed(layers)],
        caption="Seconds of rank 0 in each phase; exposed: communication that the step waited for." + means,
    )


def phase_columns(lines: Iterable[Train]) -> tuple[Floats, dict[str, Floats]]:
    """(update [n], {phase: seconds [n]}) of the updates behind the warm-up whose line recorded phases, `other` last."""
    updates = phased_updates(lines)
    steps = np.array(updates.step_s, dtype=np.float64)
    phases: dict[str, Floats] = {
        name: np.maximum(updates.phases[name], 0.0) if name in updates.phases else np.zeros_like(steps) for name in NAMES
    }
    other = np.maximum(steps - np.sum(list(phases.values()), axis=0), 0.0)
    return np.array(updates.numbers, dtype=np.float64), {**phases, "other": other}


_HELD = {
    "peak_allocated_bytes": "peak allocated",
    "allocated_bytes": "allocated",
    "reserved_bytes": "reserved",
    "used_bytes": "used on the device, by all",
    "rss_bytes": "host, resident",
}


def _memory(histories: Sequence[History]) -> PlotSection:
    section = PlotSection(key="memory", title="Memory")
    held = [_field(label, "memory", name) for name, label in _HELD.items()]
    if not any(line.memory for history in histories for line in history.lines):
        held = [_field("device peak", "device_peak_bytes"), _field("host peak", "host_peak_bytes")]
    tall = any(_phase_peaks(history) for history in histories)  # two panels or more stand beside it
    axis = Axis(label="held", unit="bytes", zero=True)
    add(section, "Memory over time", histories, held, axis, wide=True, tall=tall, caption="Of rank 0.")
    split = [history for history in histories if history.memory is not None and history.memory.parts]
    section.panels.extend(_parts_panel(history, several=len(histories) > 1) for history in split)
    if not split:
        section.missing.append("Parts of the peak")
    for history in histories:
        peaks = _phase_peaks(history)
        if peaks:
            title = "Peak within each phase" + (f": {history.name}" if len(histories) > 1 else "")
            bars = [charts.Bar(name=name, parts=[(name, value)]) for name, value in peaks.items()]
            svg = charts.bar_chart(bars, x=Axis(label="allocated at most", unit="bytes"), title=title)
            section.panels.append(Panel(title=title, svg=svg, caption="Largest of all log lines; rank 0."))
    if not any(_phase_peaks(history) for history in histories):
        section.missing.append("Peak within each phase")
    return section


def _parts_panel(history: History, several: bool) -> Panel:
    assert history.memory is not None
    title = "Parts of the peak" + (f": {history.name}" if several else "")
    parts = {name: real(value) for name, value in (history.memory.parts or {}).items()}
    estimate = {name: real(value) for name, value in (history.memory.estimate or {}).items()}
    bars = [charts.Bar(name="measured", parts=_finite(parts))]
    if estimate:
        bars.append(charts.Bar(name="estimated before (--dry-run)", parts=_finite(estimate)))
    peak = real(history.memory.peak_bytes)
    marks = [("peak", peak)] if math.isfinite(peak) else []
    names = [name for name in {**parts, **estimate} if parts.get(name, 0.0) > 0 or estimate.get(name, 0.0) > 0]
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
    section = PlotSection(key="device", title="Device")
    add(section, "Utilisation", histories, [_field("utilisation", "device", "utilisation")],
        Axis(label="busy", unit="share", zero=True, top=1.0),
        caption="GPU: time in which any kernel ran, which says nothing of how well. CPU: of the process's cores.")  # fmt: skip
    clocks = [
        _field("SM, median", "device", "sm_clock_mhz"),
        _field("SM, lowest", "device", "sm_clock_min_mhz"),
        _field("processor", "device", "clock_mhz"),
    ]
    add(section, "Clocks", histories, clocks, Axis(label="clock", unit="MHz"))
    add(section, "Power", histories, [_field("power", "device", "power_w")], Axis(label="power", unit="W", zero=True))
    add(
        section,
        "Temperature",
        histories,
        [_field("temperature", "device", "temperature_c")],
        Axis(label="temperature", unit="°C"),
    )
    reasons = Counter(
        reason for history in histories for line in history.lines for reason in (at(line, "device", "throttled") or {})
    )
    watched = any(at(line, "device", "throttled") is not None for history in histories for line in history.lines)
    if reasons or not watched:
        throttled = [
            Measure(name=reason.replace("_", " "), get=of_lines(get=_throttled(reason))) for reason, _ in reasons.most_common()
        ]
        add(section, "Throttling", histories, throttled, Axis(label="of samples", unit="share", zero=True, top=1.0),
            caption="A software power cap is normal on power-limited parts; a hardware slow-down is an alarm.")  # fmt: skip
    names = (("tx", "sent"), ("rx", "received"))
    traffic = [
        _field(f"{bus}, {said}", "device", f"{bus.lower()}_{way}_bytes_per_s")
        for bus in ("PCIe", "NVLink")
        for way, said in names
    ]
    add(section, "Bus traffic", histories, traffic, Axis(label="traffic", unit="bytes/s", zero=True))
    return section


def _throttled(reason: str) -> Get:
    def get(line: Train) -> object:
        shares = at(line, "device", "throttled")
        return None if shares is None else shares.get(reason, 0.0)

    return get


def _communication(histories: Sequence[History]) -> PlotSection:
    section = PlotSection(key="communication", title="Communication and ranks")
    if all(history.start.ranks == 1 for history in histories):
        return section
    sent = [_field("gradients", "gradient_bytes", per_update=True), _field("control", "control_bytes", per_update=True)]
    axis = Axis(label="sent", unit="bytes/update", zero=True)
    add(
        section,
        "Bytes per update",
        histories,
        sent,
        axis,
        log=True,
        caption="Of one rank, as handed to the engine: after compression.",
    )
    rings = max((len(line.ring_bytes) for history in histories for line in history.lines), default=0)
    measures = [Measure(name=f"ring {ring}", get=_ring(ring)) for ring in range(rings)]
    add(section, "Gradient bytes per ring", histories, measures, axis)
    wait = [_field("wait", "exchange_wait_s", per_update=True)]
    add(
        section,
        "Waiting for communication",
        histories,
        wait,
        Axis(label="wait per update", unit="s", zero=True),
        caption="Rank 0.",
    )
    imbalance = [_field("own work", "imbalance_time"), _field("tokens", "imbalance_tokens")]
    add(section, "Imbalance", histories, imbalance, Axis(label="over the mean", unit="share", zero=True),
        caption="The largest rank over the mean of all, less 1.")  # fmt: skip
    several = len(histories) > 1
    drawn = [
        _rank_panel(history, style if several else 0, several)
        for style, history in enumerate(histories)
        if worked_by_rank(history).size > 1
    ]
    section.panels.extend(drawn)
    if not drawn:
        section.missing.append("Own work of each rank")
    return section


def _ring(ring: int) -> Callable[[History], Points]:
    def get(line: Train) -> object:
        return line.ring_bytes[ring] / real(line.updates) if ring < len(line.ring_bytes) else None

    return of_lines(get=get)


def worked_by_rank(history: History) -> Floats:
    """[ranks] seconds of own work an update, lines with warm-up left out; empty if not recorded."""
    lines = [line for line in history.comparable_lines if line.rank_worked_s and not line.warmup]
    if not lines:
        return np.empty(0)
    total = np.array([line.rank_worked_s for line in lines], dtype=np.float64).sum(axis=0)
    return np.asarray(total / sum(real(line.updates) for line in lines), dtype=np.float64).clip(min=0.0)


def _rank_panel(history: History, style: int, several: bool) -> Panel:
    title = "Own work of each rank" + (f": {history.name}" if several else "")
    worked = worked_by_rank(history)
    slowest = int(worked.argmax())
    over = worked[slowest] / worked.mean() - 1 if worked.mean() > 0 else 0.0
    svg = charts.rank_chart(worked, y=Axis(label="per update", unit="s", zero=True), style=style, mark=slowest, title=title)
    caption = f"Waits for others left out. Slowest: rank {slowest}, {over:.1%} over the mean of {len(worked)} ranks."
    return Panel(title=title, svg=svg, caption=caption)
