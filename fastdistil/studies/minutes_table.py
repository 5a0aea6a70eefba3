"""Somebody's table of GPUs and minutes: its efficiency, and the bandwidth that would explain it.

    minutes(N) = base (N_0 / N) (1 + rho),    rho A s = 2 (N-1)/N S/B    =>    B = 2 (N-1)/N S / (rho A s)

with A micro-batches of s seconds an update, S bytes of gradients, B bytes a second of a rank's allreduce that nothing hides,
and an exchange that costs nothing at the base. Minutes were rounded: every number has the band of what they may have been.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastdistil.errors import UserError
from fastdistil.gradients.cost_model import allreduce_s
from fastdistil.studies.networks import load_named
from fastdistil.studies.scale_plot import Grid, ScaleCurve, ScalePlot, figure

TABLES = Path(__file__).parent / "tables"


class MinutesRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    gpus: Annotated[int, Field(ge=1, le=10**6)]
    minutes: Annotated[float, Field(gt=0, le=1e9)]
    rings: int | str = 1
    what: str = ""


class MinutesTable(BaseModel):
    """A YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    title: str = "a table"
    rows: tuple[MinutesRow, ...] = Field(min_length=2, max_length=1000)
    rounding: Annotated[float, Field(ge=1e-9, le=1e9)] = 0.5
    """Minutes that a number may be off by."""
    accumulation: Annotated[int, Field(ge=1, le=10**6)] | None = None
    gradient_bytes: Annotated[int, Field(ge=1, le=10**18)] | None = None
    micro_batch_s: Annotated[tuple[Annotated[float, Field(ge=1e-9, le=1e9)], ...], Field(max_length=1000)] = ()
    """Readings of the time of a micro-batch; without it, and the two before, no bandwidth is worked out."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if len({row.gpus for row in self.rows}) < 2:
            raise ValueError("all rows have the same number of GPUs; wanted at least two numbers")
        if min(row.minutes for row in self.rows) <= self.rounding:
            raise ValueError(f"a row's minutes may be none at all: wanted more than rounding, {self.rounding:g}")
        return self


def load_table(name_or_path: str) -> MinutesTable:
    """Load a table by name or path. Raises UserError."""
    return load_named(name_or_path, TABLES, MinutesTable, "table", "wanted rows: [{gpus: 8, minutes: 204}, ...]")


@dataclass(frozen=True)
class Band:
    value: float
    low: float
    high: float

    def text(self, form: str = ".1f", times: float = 1.0) -> str:
        ends = (self.low * times, self.high * times)
        return f"{self.value * times:{form}} ({min(ends):{form}} to {max(ends):{form}})"


def efficiency(table: MinutesTable, row: MinutesRow, base: MinutesRow) -> Band:
    """T_base N_base / (T N)."""
    ideal, off = base.gpus / row.gpus, table.rounding
    if row is base:
        return Band(1.0, 1.0, 1.0)
    return Band(
        ideal * base.minutes / row.minutes,
        ideal * (base.minutes - off) / (row.minutes + off),
        ideal * (base.minutes + off) / (row.minutes - off),
    )


def explaining_bandwidth(table: MinutesTable, row: MinutesRow, base: MinutesRow, micro_batch_s: float) -> Band | None:
    """Bytes a second; None where there is no overhead to explain. `high` may be infinite: the row may have none."""
    assert table.accumulation is not None and table.gradient_bytes is not None
    # All bytes at one byte a second, no latency: what an exchange takes times the bandwidth.
    sent = allreduce_s(row.gpus, row.gpus, table.gradient_bytes, 1.0, 0.0)
    reached = efficiency(table, row, base)

    def bandwidth(share: float) -> float:
        overhead = 1 / share - 1
        return sent / (overhead * table.accumulation * micro_batch_s) if overhead > 0 else float("inf")  # type: ignore[operator]

    return Band(*(bandwidth(share) for share in (reached.value, reached.low, reached.high))) if reached.value < 1 else None


def default_base(table: MinutesTable) -> MinutesRow:
    """The fastest of those with the fewest GPUs: the same software as the rows above it."""
    fewest = min(row.gpus for row in table.rows)
    return min((row for row in table.rows if row.gpus == fewest), key=lambda row: row.minutes)


def study(table: MinutesTable, ideal_from: int | None) -> tuple[Grid, ScalePlot, dict[str, object]]:
    """(the table with what follows from it, plot, values). Raises UserError.

    `ideal_from`: number of the row, from 1, where the plot's second ideal line starts; None: at the slower row of as many GPUs
    as the default's, if there is one.
    """
    base = default_base(table)
    if ideal_from is not None and not 1 <= ideal_from <= len(table.rows):
        raise UserError(f"--baseline {ideal_from}: the table has rows 1 to {len(table.rows)}")
    slower = [row for row in table.rows if row.gpus == base.gpus and row.minutes > base.minutes]
    start = table.rows[ideal_from - 1] if ideal_from is not None else min(slower, key=lambda row: row.minutes, default=base)
    number = {id(row): index for index, row in enumerate(table.rows, 1)}
    bases = list({id(row): row for row in (start, base)}.values())
    readings = table.micro_batch_s if table.accumulation and table.gradient_bytes else ()
    rows, values = [], []
    for row in table.rows:
        above = row.gpus > base.gpus
        cells = {"row": f"{number[id(row)]}", "GPUs": f"{row.gpus}", "minutes": f"{row.minutes:g}", "rings": f"{row.rings}"}
        for reference in bases:
            text = efficiency(table, row, reference).text(times=100)
            compared = row.gpus > reference.gpus or row is reference
            cells[f"% of linear from row {number[id(reference)]}"] = text if compared else ""
        cells["overhead over ideal"] = f"{1 / efficiency(table, row, base).value - 1:.3f}" if above else ""
        bands = [explaining_bandwidth(table, row, base, s) if above else None for s in readings]
        for s, band in zip(readings, bands, strict=True):
            cells[f"GB/s if a micro-batch takes {s * 1e3:g} ms"] = band.text(".2f", 1e-9) if band else ""
        rows.append(cells)
        values.append(
            {
                **row.model_dump(),
                "efficiency": {number[id(reference)]: efficiency(table, row, reference).__dict__ for reference in bases},
                "explaining_bytes_per_s": {s: band.__dict__ for s, band in zip(readings, bands, strict=True) if band},
            }
        )
    grid = Grid(title=table.title, rows=rows, notes=_notes(table, base, bases, readings))
    by_rings: dict[str, list[MinutesRow]] = {}
    for row in table.rows:
        if row.gpus > base.gpus:
            by_rings.setdefault(f"the table, rings: {row.rings}", [base]).append(row)
    curves = [
        ScaleCurve(name=name, points=tuple(_speed(row, start, table.rounding) for row in ring_rows))
        for name, ring_rows in by_rings.items()
    ]
    ideals = {
        f"linear from row {number[id(reference)]}": (reference.gpus, start.minutes / reference.minutes) for reference in bases
    }
    plot = figure(curves, ideals, "GPUs", f"speed over row {number[id(start)]}")
    return grid, plot, {"table": table.title, "rounding_minutes": table.rounding, "rows": values}


def _speed(row: MinutesRow, start: MinutesRow, off: float) -> tuple[float, float, float, float]:
    return (row.gpus, start.minutes / row.minutes, start.minutes / (row.minutes + off), start.minutes / (row.minutes - off))


def _notes(table: MinutesTable, base: MinutesRow, bases: list[MinutesRow], readings: tuple[float, ...]) -> list[str]:
    off = table.rounding
    notes = [f"In brackets: what minutes rounded by up to {off:g} leave open. Nothing here was measured by fastdistil."]
    number = {id(row): index for index, row in enumerate(table.rows, 1)}
    for reference in bases:
        best = max(table.rows, key=lambda row: (row.gpus, -row.minutes))
        share = efficiency(table, best, reference).value
        if share > 1:
            notes.append(
                f"From row {number[id(reference)]} the {best.gpus} GPUs reach {share:.0%} of linear: more than linear is "
                f"another program, not a better network; row {number[id(base)]} is the same program on {base.gpus} GPUs."
            )
    if readings:
        notes.append(
            "Micro-batch time and bandwidth are not both identifiable: the Jacobian of the overheads has rank 1 of 2, as only "
            "their product enters. Each bandwidth holds for its own reading of the micro-batch; a measured step time would "
            "decide."
        )
    for rings in dict.fromkeys(str(row.rings) for row in table.rows):
        mine = sorted((row for row in table.rows if str(row.rings) == rings and row.gpus > base.gpus), key=lambda row: row.gpus)
        for few, many in pairwise(mine):
            if many.gpus > few.gpus and efficiency(table, many, base).low > efficiency(table, few, base).high:
                notes.append(
                    f"Rings {rings}: the overhead falls from {few.gpus} to {many.gpus} GPUs by more than rounding, which no "
                    "latency or bandwidth explains: noise, placement or costs that an update does not have are in it."
                )
    return notes
