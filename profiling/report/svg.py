"""Charts as SVG text, for a page that has the styles (templates/report.html.j2): no script, no colours of their own.

A chart is drawn in units of CSS pixels at its natural width and scales with its box. Colours, dashes and fonts are classes
(`s0`..`s7`: series, `p-NAME`: phases), so that light, dark and print are the page's business. Values that are not finite, or
not positive on a logarithmic axis, are gaps. What a pointer rests on says its numbers, through <title>.

More points than columns of pixels are drawn per column: a line through the means, a band from the smallest to the largest, so
that a spike of one update among a million stays visible.
"""

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdistil.profiling.quantities import quantity, readable

Floats = NDArray[np.float64]
STYLES = 8
"""Distinct series: colour and dash; more repeat."""
COLUMN_WIDTH = 2.0
"""Of the columns that many points are gathered in, in pixels."""
_CHARACTER = 6.0  # widest digit of the tick labels, in pixels
_TOP, _BOTTOM, _RIGHT = 22.0, 32.0, 12.0


class Columns(NamedTuple):
    """Points gathered in columns of equal width; arrays of one length, NaN where a column holds no finite value."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def gather(x: Floats, y: Floats, left: float, right: float, count: int) -> Columns:
    """[n] points in at most `count` columns of [left, right]; columns without a point are left out."""
    width = (right - left) / count or 1.0
    index = np.clip(((x - left) / width).astype(np.int64), 0, count - 1)
    order = np.argsort(index, kind="stable")
    index, x, y = index[order], x[order], y[order]
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / counts
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    empty = counts == 0
    points = np.diff(starts, append=len(x))
    return Columns(
        x=np.add.reduceat(x, starts) / points,
        mean=np.where(empty, np.nan, mean),
        low=np.where(empty, np.nan, low),
        high=np.where(empty, np.nan, high),
    )


@dataclass(frozen=True, kw_only=True)
class ChartSeries:
    """One line. `x`, `y`: [n]; `low`, `high`: [n], ends of error bars."""

    name: str
    x: Floats
    y: Floats
    style: int = 0
    low: Floats | None = None
    high: Floats | None = None
    bar: str = "± one standard error"
    """What the error bars hold."""
    predicted: bool = False
    """Not measured: the line and its dots have this class too."""

    @property
    def classes(self) -> str:
        return f"s{self.style % STYLES}{' predicted' * self.predicted}"


@dataclass(frozen=True, kw_only=True)
class Axis:
    label: str
    unit: str = ""
    """As `quantity` knows it: s, bytes, share, tokens/s, ..."""
    log: bool = False
    zero: bool = False
    """The axis starts at zero."""
    top: float | None = None
    """The least that its upper end is."""


@dataclass(frozen=True)
class Plot:
    """The frame of a chart: where its area lies, and the two scales."""

    width: float
    height: float
    left: float
    x_of: Callable[[Floats], Floats]
    y_of: Callable[[Floats], Floats]
    grid: str

    @property
    def right(self) -> float:
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM


def line_chart(series: Sequence[ChartSeries], *, x: Axis, y: Axis, title: str, width: float = 360, height: float = 210) -> str:
    """Lines over a common x, with error bars where a series has them. Raises ValueError if nothing finite is to be drawn."""
    drawn = [_drawable(one, y.log) for one in series]
    drawn = [one for one in drawn if np.isfinite(one.y).any()]
    if not drawn:
        raise ValueError(f"{title}: nothing to draw")
    ends = [value for one in drawn for part in (one.y, one.low, one.high) if part is not None for value in _ends(part)]
    left, right = min(one.x.min() for one in drawn), max(one.x.max() for one in drawn)
    plot = _frame(left, right, min(ends), max(ends), x, y, width, height)
    parts = [plot.grid]
    for one in drawn:
        parts.append(_bars_of_error(one, plot))
        parts.append(_line(one, plot, left, right, y.unit))
    parts.append(_readings(drawn, plot, left, right, x, y))
    named = ", ".join(_description(one, y.unit) for one in drawn)
    return _svg(width, height, f"{title}. {x.label} from {_place(left, x)} to {_place(right, x)}. {named}", parts)


def _drawable(one: ChartSeries, log: bool) -> ChartSeries:
    if not log:
        return one
    y, low, high = (None if part is None else np.where(part > 0, part, np.nan) for part in (one.y, one.low, one.high))
    assert y is not None
    return replace(one, y=y, low=low, high=high)


def _ends(values: Floats) -> list[float]:
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if finite.size else []


def _description(one: ChartSeries, unit: str) -> str:
    finite = one.y[np.isfinite(one.y)]
    if finite.size == 1:
        return f"{one.name}: {quantity(finite[0], unit)}"
    return (
        f"{one.name}: {quantity(finite[0], unit)} at first, {quantity(finite[-1], unit)} at last, "
        f"between {quantity(finite.min(), unit)} and {quantity(finite.max(), unit)}"
    )


def _frame(
    x_low: float, x_high: float, y_low: float, y_high: float, x: Axis, y: Axis, width: float, height: float, tight: bool = False
) -> Plot:
    """The area, its hairlines and their labels. `tight`: the x axis ends at the data, and has no room for it beyond."""
    factor, unit = readable(y.unit, max(abs(y_low), abs(y_high), y.top or 0.0))
    if y.log:
        bounds = y_low / 1.08, y_high * 1.08
        ticks = log_ticks(bounds[0] * factor, bounds[1] * factor, count=int((height - _TOP - _BOTTOM) / 24))
    else:
        low = min(0.0, y_low) if y.zero else y_low
        y_high = 1 / factor if y.zero and low == y_high == 0 else y_high  # nothing but zeros
        ticks = nice_ticks(low * factor, max(y_high, -math.inf if y.top is None else y.top) * factor)
        bounds = ticks[0] / factor, ticks[-1] / factor
    names = [_tick_text(tick, ticks) for tick in ticks]
    left = 12 + _CHARACTER * max(len(name) for name in names)
    right, bottom = width - _RIGHT, height - _BOTTOM
    y_of = _scale(*bounds, bottom, _TOP, y.log)
    if x.log:
        x_low, x_high = x_low / 1.08, x_high * 1.08
    elif x_low == x_high and not tight:
        x_low, x_high = x_low - 1, x_high + 1
    elif 0 < x_low < 0.3 * x_high and not tight:
        x_low = 0.0
    x_of = _scale(x_low, x_high, left, right, x.log)
    x_factor, x_unit = readable(x.unit, x_high)
    room = max(2, int((right - left) / 64))
    enclosing = (log_ticks if x.log else nice_ticks)(x_low * x_factor, x_high * x_factor, room)
    x_ticks = [tick for tick in enclosing if x_low * x_factor - 1e-9 <= tick <= x_high * x_factor + 1e-9]
    if not x.unit:  # updates, ranks: there is none between two
        x_ticks = [float(round(tick)) for tick in x_ticks if abs(tick - round(tick)) < 1e-9]
    parts = []
    for tick, name in zip(ticks, names, strict=True):
        at = float(y_of(np.array([tick / factor]))[0])
        parts.append(f'<path class="grid" d="M{_r(left)} {_r(at)}H{_r(right)}"/>')
        parts.append(_words("tick", left - 6, at + 3.6, name, "end"))
    for tick in x_ticks:
        at = float(x_of(np.array([tick / x_factor]))[0])
        name = _tick_text(tick, x_ticks)
        anchor = "end" if at > right - _CHARACTER * len(name) / 2 else "middle"
        parts.append(f'<path class="notch" d="M{_r(at)} {_r(bottom)}v4"/>')
        parts.append(_words("tick", at, bottom + 15, name, anchor))
    parts.append(f'<path class="axis" d="M{_r(left)} {_r(bottom)}H{_r(right)}"/>')
    parts.append(_words("label", 0, 11, _with_unit(y.label, unit)))
    parts.append(_words("label", right, height - 3, _with_unit(x.label, x_unit), "end"))
    return Plot(width, height, left, x_of, y_of, "".join(parts))


def _words(classes: str, x: float, y: float, text: str, anchor: str = "") -> str:
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{classes}" x="{_r(x)}" y="{_r(y)}"{anchored}>{_text(text)}</text>'


def _with_unit(label: str, unit: str) -> str:
    return f"{label}, {unit}" if unit and unit != label else label


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[Floats], Floats]:
    if log:
        low, high = math.log10(low), math.log10(high)

    def place(values: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            at: Floats = np.log10(values) if log else np.asarray(values, dtype=np.float64)
        return start + (at - low) / ((high - low) or 1.0) * (end - start)

    return place


def _line(one: ChartSeries, plot: Plot, left: float, right: float, unit: str) -> str:
    style = one.classes
    count = max(1, int((plot.right - plot.left) / COLUMN_WIDTH))
    tooltip = f"<title>{_text(_description(one, unit))}</title>"
    if len(one.x) <= count:
        x, y = plot.x_of(one.x), plot.y_of(one.y)
        dots = ""
        if len(one.x) <= 40:
            dots = "".join(f'<circle class="dot {style}" cx="{_r(a)}" cy="{_r(b)}" r="2.2"/>' for a, b in _finite(x, y))
        return f'<path class="line {style}" d="{_path(x, y)}">{tooltip}</path>{dots}'
    columns = gather(one.x, one.y, left, right, count)
    x, low, high = plot.x_of(columns.x), plot.y_of(columns.low), plot.y_of(columns.high)
    band = "".join(_outline(*piece) for piece in _pieces(x, high, low))
    line = _path(x, plot.y_of(columns.mean))
    return f'<path class="band {style}" d="{band}"/><path class="line {style}" d="{line}">{tooltip}</path>'


def _pieces(x: Floats, *ys: Floats) -> list[tuple[Floats, ...]]:
    """Runs without gaps."""
    finite = np.isfinite(ys[0])
    cuts = np.flatnonzero(np.diff(finite.astype(np.int8))) + 1
    spans = zip(np.split(finite, cuts), *(np.split(part, cuts) for part in (x, *ys)), strict=True)
    return [tuple(parts) for has, *parts in spans if has.size and has[0]]


def _path(x: Floats, y: Floats) -> str:
    # A point alone between two gaps is a line of no length, which round caps make a dot.
    return "".join(
        "M" + "L".join(f"{_r(a)} {_r(b)}" for a, b in zip(xs, ys, strict=True)) + ("h0" if len(xs) == 1 else "")
        for xs, ys in _pieces(x, y)
    )


def _finite(x: Floats, y: Floats) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]


def _bars_of_error(one: ChartSeries, plot: Plot) -> str:
    if one.low is None or one.high is None:
        return ""
    ends = zip(plot.x_of(one.x), plot.y_of(one.low), plot.y_of(one.high), strict=True)
    bars = "".join(
        f"M{_r(at)} {_r(low)}V{_r(high)}M{_r(at - 3)} {_r(low)}h6M{_r(at - 3)} {_r(high)}h6"
        for at, low, high in ends
        if math.isfinite(low) and math.isfinite(high)
    )
    return f'<path class="error {one.classes}" d="{bars}"/>'


def _readings(series: Sequence[ChartSeries], plot: Plot, left: float, right: float, x: Axis, y: Axis) -> str:
    """Columns that light up under the pointer and say their numbers."""
    xs = np.unique(np.concatenate([one.x for one in series]))
    count = min(len(xs), int((plot.right - plot.left) / 8))
    edges = (xs[:-1] + xs[1:]) / 2 if len(xs) == count else np.linspace(left, right, count + 1)[1:-1]
    parts = []
    bounds = [plot.left, *plot.x_of(edges), plot.right]
    within = [np.searchsorted(edges, one.x, side="left") for one in series]
    for column in range(len(bounds) - 1):
        lines, places = [], []
        for one, index in zip(series, within, strict=True):
            values = one.y[index == column]
            places.extend(_ends(one.x[index == column]))
            if ends := _ends(values):
                shown = quantity(ends[0], y.unit)
                if ends[1] > ends[0]:
                    shown += f" to {quantity(ends[1], y.unit)}"
                if one.low is not None and one.high is not None and values.size == 1:
                    bar = [quantity(float(part[index == column][0]), y.unit) for part in (one.low, one.high)]
                    shown += f" ({one.bar}: {bar[0]} to {bar[1]})"
                lines.append(f"{one.name}: {shown}")
        if lines:
            where = _place(min(places), x)
            if max(places) > min(places):
                where += f" to {_place(max(places), x)}"
            parts.append(_hover(bounds[column], bounds[column + 1], plot, [f"{x.label} {where}", *lines]))
    return "".join(parts)


def _place(value: float, x: Axis) -> str:
    """Where on the x axis: of updates the number, else a quantity."""
    return quantity(value, x.unit) if x.unit else f"{round(value):,}"


def _outline(x: Floats, upper: Floats, lower: Floats) -> str:
    """Return the path around the area between two lines."""
    points = [*zip(x, upper, strict=True), *zip(x[::-1], lower[::-1], strict=True)]
    return "M" + "L".join(f"{_r(a)} {_r(b)}" for a, b in points) + "Z"


def _hover(start: float, end: float, plot: Plot, lines: Sequence[str]) -> str:
    return _rect("hover", start, _TOP, max(end - start, 0.5), plot.bottom - _TOP, "\n".join(lines))


def _rect(classes: str, x: float, y: float, width: float, height: float, tooltip: str) -> str:
    return (
        f'<rect class="{classes}" x="{_r(x)}" y="{_r(y)}" width="{_r(width)}" height="{_r(height)}">'
        f"<title>{_text(tooltip)}</title></rect>"
    )


class Layer(NamedTuple):
    """One part of a stack: `values` [n]; `name` also picks its class, p-NAME."""

    name: str
    values: Floats


def stacked_chart(
    x: Floats, layers: Sequence[Layer], *, x_axis: Axis, y_axis: Axis, title: str, width: float = 360, height: float = 210
) -> str:
    """Parts of a whole over x [n], the first layer at the bottom, as columns: many points are averaged per column."""
    places, heights = _stack(x, [layer.values for layer in layers], width)
    tops = np.cumsum(heights, axis=0)
    middles = (places[:-1] + places[1:]) / 2
    half = (places[1] - places[0]) / 2 if len(places) > 1 else 0.5
    edges = np.array([places[0] - half, *middles, places[-1] + (places[-1] - middles[-1] if len(middles) else half)])
    plot = _frame(edges[0], edges[-1], 0.0, float(tops[-1].max()), x_axis, y_axis, width, height, tight=True)
    at = np.repeat(plot.x_of(edges), 2)[1:-1]
    parts = [plot.grid]
    bottoms = np.zeros_like(tops[0])
    for layer, top in zip(layers, tops, strict=True):
        upper, lower = plot.y_of(np.repeat(top, 2)), plot.y_of(np.repeat(bottoms, 2))
        tooltip = _text(f"{layer.name}: {quantity(float(np.nanmean(layer.values)), y_axis.unit)} in the mean")
        path = _outline(at, upper, lower)
        parts.append(f'<path class="layer p-{_class(layer.name)}" d="{path}"><title>{tooltip}</title></path>')
        bottoms = top
    stride = max(1, math.ceil(len(places) / 40))
    for start in range(0, len(places), stride):
        end = min(start + stride, len(places))
        until = f" to {_place(places[end - 1], x_axis)}" if end - start > 1 else ""
        lines = [f"{x_axis.label} {_place(places[start], x_axis)}{until}"]
        lines += [
            f"{layer.name}: {quantity(float(part[start:end].mean()), y_axis.unit)}"
            for layer, part in reversed(list(zip(layers, heights, strict=True)))
            if part[start:end].any()
        ]
        ends = plot.x_of(np.array([edges[start], edges[end]]))
        parts.append(_hover(float(ends[0]), float(ends[1]), plot, lines))
    means = ", ".join(f"{layer.name} {quantity(float(np.nanmean(layer.values)), y_axis.unit)}" for layer in layers)
    return _svg(width, height, f"{title}. Means: {means}", parts)


def _stack(x: Floats, values: Sequence[Floats], width: float) -> tuple[Floats, Floats]:
    """(x [k], heights [layers, k]) as a chart of this width draws them: k at most its columns."""
    count = max(1, int((width - 60) / COLUMN_WIDTH))
    if len(x) <= count:
        return x, np.nan_to_num(np.stack(list(values)))
    gathered = [gather(x, column, float(x[0]), float(x[-1]), count) for column in values]
    return gathered[0].x, np.nan_to_num(np.stack([columns.mean for columns in gathered]))


def stack_top(x: Floats, values: Sequence[Floats], width: float) -> float:
    """How high the stack of a chart of this width is: for one axis over several charts."""
    return float(_stack(x, values, width)[1].sum(axis=0).max())


def histogram(
    values: Floats, *, x: Axis, marks: Sequence[tuple[str, float]], style: int = 0, domain: tuple[float, float] | None = None,
    title: str, width: float = 360, height: float = 210,
) -> str:  # fmt: skip
    """How often values [n] occur, in up to 40 bins of `domain`; what lies above it is in the last bin. `marks`: named lines."""
    low, high = domain or (float(values.min()), float(values.max()))
    if high <= low:
        low, high = low * 0.95, high * 1.05 or 1.0
    bins = max(5, min(40, int(math.sqrt(len(values)) * 2)))
    counts, edges = np.histogram(np.clip(values, low, high), bins=bins, range=(low, high))
    plot = _frame(low, high, 0.0, float(counts.max()), x, Axis(label="updates", zero=True), width, height, tight=True)
    parts = [plot.grid]
    at, top = plot.x_of(edges), plot.y_of(counts.astype(np.float64))
    for index, count in enumerate(counts):
        if count:
            span = f"{quantity(edges[index], x.unit)} to {quantity(edges[index + 1], x.unit)}"
            if index == bins - 1 and values.max() > high:
                span = f"{quantity(edges[index], x.unit)} and more, up to {quantity(float(values.max()), x.unit)}"
            tooltip, wide = f"{span}: {count:,} updates", max(at[index + 1] - at[index] - 0.8, 0.6)
            parts.append(_rect(f"bar s{style % STYLES}", at[index] + 0.4, top[index], wide, plot.bottom - top[index], tooltip))
    labels = []
    taken = -math.inf
    for row, (name, value) in enumerate(marks):
        place = float(plot.x_of(np.array([min(value, high)]))[0])
        anchor, shift = ("end", -4) if place > plot.right - 46 else ("start", 4)
        # Labels that would overlap step down a line each.
        line = 0 if place > taken + 34 else row
        taken = place
        parts.append(f'<path class="mark" d="M{_r(place)} {_r(_TOP)}V{_r(plot.bottom)}"/>')
        labels.append(
            f'<text class="note" x="{_r(place + shift)}" y="{_r(_TOP + 8 + 12 * line)}" text-anchor="{anchor}">{_text(name)}'
            f"<title>{_text(f'{name}: {quantity(value, x.unit)}')}</title></text>"
        )
    summary = ", ".join(f"{name} {quantity(value, x.unit)}" for name, value in marks)
    return _svg(width, height, f"{title}. {len(values):,} values, {summary}", [*parts, *labels])


class Bar(NamedTuple):
    name: str
    parts: Sequence[tuple[str, float]]
    """(name, value); the name picks the class p-NAME."""


def bar_chart(bars: Sequence[Bar], *, x: Axis, title: str, width: float = 360, marks: Sequence[tuple[str, float]] = ()) -> str:
    """Horizontal stacked bars, one under the other, on a common axis from zero; `marks`: named vertical lines."""
    height = _TOP + 40 * len(bars) + _BOTTOM + 2
    largest = max([*(sum(value for _, value in bar.parts) for bar in bars), *(value for _, value in marks)])
    factor, unit = readable(x.unit, largest)
    ticks = nice_ticks(0.0, largest * factor, max(3, int(width / 90)))
    left, right, bottom = 2.0, width - _RIGHT - 8, height - _BOTTOM
    place = _scale(0.0, ticks[-1] / factor, left, right, log=False)
    parts = []
    for tick in ticks:
        at = float(place(np.array([tick / factor]))[0])
        anchor = "start" if tick == 0 else "middle"
        parts.append(f'<path class="grid" d="M{_r(at)} {_r(_TOP - 6)}V{_r(bottom)}"/>')
        parts.append(_words("tick", at, bottom + 15, _tick_text(tick, ticks), anchor))
    parts.append(_words("label", right, height - 3, _with_unit(x.label, unit), "end"))
    for row, bar in enumerate(bars):
        top, total, start = _TOP + 40 * row, sum(value for _, value in bar.parts), 0.0
        parts.append(_words("note", left, top + 2, f"{bar.name}: {quantity(total, x.unit)}"))
        for name, value in bar.parts:
            begin, end = place(np.array([start, start + value]))
            if value > 0:
                tooltip = f"{bar.name}, {name}: {quantity(value, x.unit)}, {value / total:.1%}"
                parts.append(_rect(f"area p-{_class(name)}", begin, top + 8, end - begin, 18, tooltip))
            start += value
    for name, value in marks:
        at = float(place(np.array([value]))[0])
        parts.append(f'<path class="mark" d="M{_r(at)} {_r(_TOP - 6)}V{_r(bottom)}"/>')
        parts.append(_words("note", at - 4, 10, f"{name} {quantity(value, x.unit)}", "end"))
    summary = "; ".join(
        f"{bar.name}: " + ", ".join(f"{name} {quantity(value, x.unit)}" for name, value in bar.parts) for bar in bars
    )
    return _svg(width, height, f"{title}. {summary}", parts)


def rank_chart(values: Floats, *, y: Axis, style: int = 0, mark: int | None = None, title: str, width: float = 360) -> str:
    """One upright bar for each rank: values [ranks]; `mark`: the rank to point at."""
    height = 210.0
    plot = _frame(-0.5, len(values) - 0.5, 0.0, float(values.max()), Axis(label="rank"), y, width, height, tight=True)
    parts = [plot.grid]
    edges = plot.x_of(np.arange(len(values) + 1, dtype=np.float64) - 0.5)
    pad = min(4.0, (edges[1] - edges[0]) * 0.15)
    for rank, (value, top) in enumerate(zip(values, plot.y_of(values), strict=True)):
        tooltip = f"rank {rank}: {quantity(float(value), y.unit)}"
        pointed = " slowest" if rank == mark else ""
        width_of = edges[rank + 1] - edges[rank] - 2 * pad
        parts.append(_rect(f"bar s{style % STYLES}{pointed}", edges[rank] + pad, top, width_of, plot.bottom - top, tooltip))
    summary = ", ".join(f"rank {rank} {quantity(float(value), y.unit)}" for rank, value in enumerate(values[:64]))
    return _svg(width, height, f"{title}. {summary}", parts)


def swatch(style: int, predicted: bool = False) -> str:
    """A short piece of a series' line, for a legend."""
    classes = f"line s{style % STYLES}{' predicted' * predicted}"
    return f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><path class="{classes}" d="M1 4H25"/></svg>'


def patch(name: str) -> str:
    """A square of a part's fill, for a legend."""
    box = f'<rect class="area p-{_class(name)}" width="10" height="10"/>'
    return f'<svg class="patch" viewBox="0 0 10 10" aria-hidden="true">{box}</svg>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_r(width)} {_r(height)}" role="img" aria-label="{_text(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(text: str) -> str:
    """Escaped, and without what XML has no place for."""
    return escape(without_controls(text))


def without_controls(text: str) -> str:
    """Control characters and lone surrogates (of a file's name, say) become U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cn") else "\ufffd" for c in text)


def _class(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _r(value: float) -> str:
    """A coordinate: a tenth of a pixel is finer than any eye."""
    return f"{value:.1f}".removesuffix(".0")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, ascending; the first and last enclose [low, high].

    low = high gets room around it. Raises ValueError where low > high or one of them is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"wanted finite low <= high, got {low} and {high}")
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 0.5
        low, high = (0.0, 2 * low) if low > 0 else (low - room, high + room)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 7) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high], ascending; only the powers, or some of them, where that is too many.

    Raises ValueError unless 0 < low < high < infinity.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"wanted finite 0 < low < high, got {low} and {high}")
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, stride in (((1, 2, 5), 1), *(((1,), stride) for stride in range(1, len(powers) + 1))):
        ticks = [factor * 10.0**power for power in powers[::stride] for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count:
            break
    return ticks


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A label no longer than its neighbours need: 0.5 and 1.0 on one axis, 200k and 1M on another."""
    largest = max(abs(other) for other in ticks)
    if tick == 0:
        return "0"
    for start, power, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= start:
            return f"{tick / power:.10g}{suffix}"
    if largest < 1e-3:
        mantissa, _, exponent = f"{tick:.6e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    gaps = [abs(b - a) for a, b in itertools.pairwise(ticks)]
    logarithmic = len(gaps) > 1 and max(gaps) > 1.5 * min(gaps)
    if logarithmic or not gaps:
        return f"{tick:,.10g}"
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    return f"{tick:,.{decimals}f}"
