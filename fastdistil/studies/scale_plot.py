"""Speed against the linear ideal as SVG, on a page of its own that needs nothing else: no script, no font, no address.

Both axes are logarithms of base 2, so that the ideal is a straight line from its starting point. What was measured is filled
and solid; what was predicted is hollow and dashed, and its name says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
STYLES = 6

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --faint: #d5d9de; --ideal: #767c85;
  --c0: #0b62c4; --c1: #b3400a; --c2: #16794a; --c3: #8a3ab9; --c4: #8a6d00; --c5: #00727d; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --faint: #363c43; --ideal: #9aa1a9;
  --c0: #6cb0ff; --c1: #ff9c66; --c2: #5fd39a; --c3: #cf9bf2; --c4: #e0c14a; --c5: #5accd6; } }
body { background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto;
  padding: 0 1em; }
svg { width: 100%; max-width: 760px; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--faint); } .ideal { stroke: var(--ideal); stroke-width: 1.5; fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2; } .bar { stroke: var(--c); stroke-width: 1.5; }
.dot { fill: var(--c); stroke: var(--c); stroke-width: 2; }
.predicted .line, .predicted .bar { stroke-dasharray: 5 4; } .predicted .dot { fill: var(--page); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; } caption { text-align: left; font-weight: 600; }
th, td { padding: .2em .7em; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } table.predicted { border: 2px dashed var(--ideal); }
"""
COLOURS = "".join(f".s{number} {{ --c: var(--c{number}); }}\n" for number in range(STYLES))


@dataclass(frozen=True, kw_only=True)
class ScaleCurve:
    """One series: (ranks, speed, low, high), in order of ranks."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    predicted: bool = False


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """A line of slope 1 from where `speed` was reached by `ranks`."""

    name: str
    ranks: float
    speed: float


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    predicted: bool = False
    notes: tuple[str, ...] = ()


def figure(curves: Sequence[ScaleCurve], ideals: Sequence[Ideal], x_label: str, y_label: str) -> str:
    """The SVG element."""
    points = [point for curve in curves for point in curve.points]
    right = max(point[0] for point in points)
    xs = [point[0] for point in points] + [ideal.ranks for ideal in ideals]
    ys = [value for point in points for value in point[1:] if value > 0]
    ys += [ideal.speed for ideal in ideals] + [ideal.speed * right / ideal.ranks for ideal in ideals]
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _Scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label} against {x_label}")}">']
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>')
    for ideal in ideals:
        ends = f'x1="{across(ideal.ranks):.1f}" y1="{up(ideal.speed):.1f}" x2="{across(right):.1f}"'
        title = f"<title>{escape(ideal.name)}</title>"
        parts.append(f'<line class="ideal" {ends} y2="{up(ideal.speed * right / ideal.ranks):.1f}">{title}</line>')
    parts += [_drawn(curve, number, across, up) for number, curve in enumerate(curves)]
    parts += _legend(curves, ideals)
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Scale:
    """Logarithmic; a little room around."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        first, last = math.log2(self.low) - 0.15, math.log2(self.high) + 0.15
        return self.start + (math.log2(value) - first) / (last - first) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [
            2.0**power for power in range(math.ceil(math.log2(self.low) - 0.15), math.floor(math.log2(self.high) + 0.15) + 1)
        ]


def _drawn(curve: ScaleCurve, number: int, across: _Scale, up: _Scale) -> str:
    places = [(across(ranks), up(speed)) for ranks, speed, _, _ in curve.points]
    parts = [f'<g class="s{number % STYLES}{" predicted" if curve.predicted else ""}">']
    if len(places) > 1:
        parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), (ranks, speed, low, high) in zip(places, curve.points, strict=True):
        if high > low > 0:
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{up(low):.1f}" y2="{up(high):.1f}"/>')
        tooltip = f"{curve.name}: {ranks:g}, {speed:.3g} ({low:.3g} to {high:.3g})"
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(tooltip)}</title></circle>')
    return "\n".join([*parts, "</g>"])


def _legend(curves: Sequence[ScaleCurve], ideals: Sequence[Ideal]) -> list[str]:
    parts, y = [], TOP + 14
    x = LEFT + 12
    for ideal in ideals:
        parts.append(f'<line class="ideal" x1="{x}" x2="{x + 28}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text x="{x + 36}" y="{y}">{escape(ideal.name)}</text>')
        y += 18
    for number, curve in enumerate(curves):
        parts.append(f'<g class="s{number % STYLES}{" predicted" if curve.predicted else ""}">')
        parts.append(f'<line class="line" x1="{x}" x2="{x + 28}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<circle class="dot" cx="{x + 14}" cy="{y - 4}" r="4"/></g>')
        parts.append(f'<text x="{x + 36}" y="{y}">{escape(curve.name)}</text>')
        y += 18
    return parts


def page(title: str, svg: str, grids: Sequence[Grid], notes: Sequence[str] = ()) -> str:
    """The whole HTML file."""
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">', f"<title>{escape(title)}</title>"]
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts += [f"<style>{STYLE}{COLOURS}</style></head><body>", f"<h1>{escape(title)}</h1>"]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    parts.append(svg)
    for grid in grids:
        kind = ' class="predicted"' if grid.predicted else ""
        parts.append(f'<div class="scroll"><table{kind}><caption>{escape(grid.title)}</caption>')
        parts.append("<tr>" + "".join(f"<th>{escape(name)}</th>" for name in grid.columns) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows]
        parts.append("</table></div>")
        parts += [f"<p>{escape(note)}</p>" for note in grid.notes]
    return "\n".join([*parts, "</body></html>", ""])
