"""Speed against the linear ideal as a chart, and the page that it stands on with its tables.

Both axes are logarithmic, so that the ideal is a straight line from its starting point. What was measured is filled and
solid; what was predicted is hollow and dashed, and its name says so.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table

from fastdistil import __version__
from fastdistil.profiling.report.report import template
from fastdistil.profiling.report.svg import Axis, ChartSeries, line_chart, swatch


@dataclass(frozen=True, kw_only=True)
class ScaleCurve:
    """One series: (ranks, speed, low, high), in order of ranks."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    predicted: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text: each row is column -> cell, of the same columns."""

    title: str
    rows: Sequence[Mapping[str, str]]
    predicted: bool = False
    notes: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


class ScalePlot(NamedTuple):
    """A chart and its legend as (swatch, name); swatches and chart are SVG."""

    chart: str
    legend: tuple[tuple[str, str], ...]


def figure(curves: Sequence[ScaleCurve], ideals: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> ScalePlot:
    """Draw the curves; `ideals`: name -> (ranks, speed) where a line of slope 1 starts."""
    right = max(point[0] for curve in curves for point in curve.points)
    lines = [
        ScaleCurve(name=name, points=tuple((at, speed * at / ranks, 0.0, 0.0) for at in (ranks, right)))
        for name, (ranks, speed) in ideals.items()
    ]
    series = []
    for style, curve in enumerate([*curves, *lines]):
        x, y, low, high = np.array(curve.points, dtype=np.float64).T
        ends = {"low": low, "high": high} if (high > low).any() else {}
        series.append(ChartSeries(name=curve.name, x=x, y=y, style=style, bar="range", predicted=curve.predicted, **ends))
    axes = {"x": Axis(label=x_label, log=True), "y": Axis(label=y_label, log=True)}
    chart = line_chart(series, **axes, title=f"{y_label} against {x_label}", width=760, height=440)
    return ScalePlot(chart, tuple((swatch(one.style, one.predicted), one.name) for one in series))


def page(title: str, plot: ScalePlot | None, grids: Sequence[Grid]) -> str:
    """Return the whole HTML file: it works offline, and has no script."""
    chart, legend = plot or ("", ())
    values = {"title": title, "chart": chart, "legend": legend, "grids": grids, "version": __version__}
    return template("scale.html.j2").render(**values, live="", phase_names=())


def show(grid: Grid, console: rich.console.Console) -> None:
    """Print a table and its notes."""
    # A file has no width of its own.
    console = console if console.is_terminal else rich.console.Console(width=int(os.environ.get("COLUMNS", "160")))
    table = rich.table.Table(title=grid.title, title_justify="left", title_style="bold")
    for index, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row.values()))
    console.print(table)
    for note in grid.notes:
        console.print(note, markup=False, soft_wrap=True)
