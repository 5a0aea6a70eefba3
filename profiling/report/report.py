"""`fastdistil report`: what one run or several recorded, as one HTML file, as Markdown or as JSON.

The file needs nothing else: no script, no request, no font of its own. It follows the reader's light or dark setting, and
prints. The first run is the baseline of the differences. Equal runs give equal bytes.

Of what surrounds a run only versions and devices are shown, and no secrets (redaction.py).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from fastdistil import __version__
from fastdistil.errors import UserError, printable, translated
from fastdistil.events import Environment
from fastdistil.profiling.quantities import duration, quantity
from fastdistil.profiling.report import svg
from fastdistil.profiling.report.bootstrap import MAX_SAMPLES, ratio_of
from fastdistil.profiling.report.history import History, flat, load_history
from fastdistil.profiling.report.key_figures import NOT_RECORDED, OUTCOMES, Figure, FigureGroup, groups, setting
from fastdistil.profiling.report.plots import PlotSection, sections
from fastdistil.profiling.report.summary import PHASES, SAME_WORK, slowed_down, summarise
from fastdistil.untrusted import at

_NOTES_SHOWN = 100
_SAME = 0.0005
"""A relative difference below this is none."""
_TILES = {
    "speed.tokens_per_s": "throughput",
    "speed.step_p50_s": "step, median",
    "speed.mfu_student": "MFU, student",
    "memory.peak_allocated_bytes": "peak memory",
    "learning.final_perplexity": "held-out perplexity",
    "device.j_per_million_tokens": "energy a million tokens",
}
"""Figures at the head of the page of one run."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A run and its figures."""

    history: History
    summary: Mapping[str, Any]
    groups: Sequence[FigureGroup]

    @property
    def name(self) -> str:
        return self.history.name

    @property
    def figures(self) -> dict[str, Figure]:
        return {figure.key: figure for group in self.groups for figure in group.figures}


class Judgement(NamedTuple):
    """A figure against the baseline's: the relative difference, and what a spread says of it.

    The spread is that of the samples (bootstrap.py), 95%, or two standard errors of the difference. It is of the last samples:
    where the difference, which is of all, is not what they say, nothing is judged.
    """

    difference: float | None = None
    """None where one of the two is no number."""
    verdict: str = ""
    """'better' or 'worse' where the spread says so, 'within noise' where it says neither; else ''."""
    interval: tuple[float, float] | None = None
    """Of the relative difference."""
    n: tuple[int | None, int | None] | None = None
    """How many of the baseline's and of its own it is of."""


class ComparisonRow(NamedTuple):
    """One figure of every run, and each against the first."""

    figures: Sequence[Figure]
    judgements: Sequence[Judgement]

    @property
    def label(self) -> str:
        return self.figures[0].label

    @property
    def detail(self) -> str:
        details = {figure.detail for figure in self.figures if figure.value is not None and figure.detail}
        return details.pop() if len(details) == 1 else ""


def judge(figure: Figure, baseline: Figure) -> Judgement:
    """Compare a figure with the baseline's."""
    if isinstance(figure.value, str) or isinstance(baseline.value, str) or not figure.value or not baseline.value:
        return Judgement()
    difference = figure.value / baseline.value - 1
    unjudged = Judgement(difference)
    if figure.better is None or abs(difference) < _SAME:
        return unjudged
    n: tuple[int | None, int | None]
    if figure.samples and baseline.samples:
        ratio = ratio_of(baseline.samples, figure.samples, figure.statistic)
        if ratio is None or ratio.interval is None:
            return unjudged
        low, high = (bound - 1 for bound in ratio.interval)
        n = min(len(baseline.samples), MAX_SAMPLES), min(len(figure.samples), MAX_SAMPLES)
    elif figure.spread_kind == baseline.spread_kind == "se" and figure.spread is not None and baseline.spread is not None:
        error = 2 * math.hypot(figure.spread, baseline.spread) / abs(baseline.value)
        low, high, n = difference - error, difference + error, (baseline.n, figure.n)
    else:
        return unjudged
    if low <= 0 <= high:
        return Judgement(difference, "within noise", (low, high), n) if low <= difference <= high else unjudged
    if (low > 0) != (difference > 0):
        return unjudged
    return Judgement(difference, "better" if (low > 0) == (figure.better == "higher") else "worse", (low, high), n)


class ComparisonTable(NamedTuple):
    key: str
    title: str
    rows: Sequence[ComparisonRow]
    missing: Sequence[str]
    """Labels of what no run recorded."""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the HTML file. Raises UserError for what is no run, CorruptData for a bad line, DiskFull."""
    write_text(as_html(read_runs(runs)), out)


def run_report(runs: Sequence[Path], out: Path | None, *, markdown: bool, as_json: bool) -> None:
    """The command: write to `out`, to its default, or to standard output."""
    if markdown and as_json:
        raise UserError("--markdown and --json are two reports; give one of them")
    reported = read_runs(runs)
    if not markdown and not as_json:
        out = out or (Path(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html"))
        write_text(as_html(reported), out)
    else:
        text = as_markdown(reported) if markdown else json_text(reported)
        if out is None:
            print(text, end="")
            return
        write_text(text, out)
    print(f"{out}: {' against '.join(run.name for run in reported)}")


def write_text(text: str, out: Path) -> None:
    with translated("writing the report", out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(printable(text), encoding="utf-8")
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"{out} cannot be written: {error.strerror}; name a file with --out") from error


def read_runs(runs: Sequence[Path]) -> list[Reported]:
    """Raises UserError without a run, for one given twice, and for what is none."""
    if not runs:
        raise UserError("no run to report; give the directory of one, e.g. runs/NAME")
    twice = [path for path, count in Counter(Path(run).resolve() for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give each run once")
    histories = [load_history(run) for run in runs]
    same = {name for name, count in Counter(history.name for history in histories).items() if count > 1}
    if same:  # runs/a/student and runs/b/student: as they were given
        histories = [
            replace(history, name=str(path)) if history.name in same else history
            for history, path in zip(histories, runs, strict=True)
        ]
    return [sum_up(history) for history in histories]


def sum_up(history: History) -> Reported:
    history = replace(history, name=svg.without_controls(history.name), environment=_without_hosts(history.environment))
    summary = summarise(history)
    return Reported(history=history, summary=summary, groups=groups(history, summary))


def _without_hosts(environment: Environment) -> Environment:
    return replace(environment, devices=tuple(replace(device, host=None) for device in environment.devices))


def tables(runs: Sequence[Reported]) -> list[ComparisonTable]:
    """Put the figures of the runs side by side, a table for each group."""
    comparisons = []
    for same_groups in zip(*(run.groups for run in runs), strict=True):
        by_run = [{figure.key: figure for figure in group.figures} for group in same_groups]
        by_key: dict[str, Figure] = {}
        for figures in by_run:
            by_key = by_key | {key: figure for key, figure in figures.items() if key not in by_key}
        rows, missing = [], []
        for key, first in by_key.items():
            # What one run's events do not even name: as little recorded as what they name without a value.
            absent = replace(first, value=None, spread=None, n=None, detail="")
            row = [figures.get(key, absent) for figures in by_run]
            if any(figure.value is not None for figure in row):
                rows.append(ComparisonRow(row, [judge(figure, row[0]) for figure in row]))
            else:
                missing.append(first.label)
        key, title, _ = same_groups[0]
        comparisons.append(ComparisonTable(key, title, rows, list(dict.fromkeys(missing))))
    return comparisons


def figures_json(runs: Sequence[Reported]) -> dict[str, Any]:
    """Keys stay as they are from version to version of `format`; values are in SI units.

    `judged`: what a spread says of a relative difference (`Judgement`): figures without an entry have none.
    """
    return {
        "format": 1,
        "fastdistil": __version__,
        "runs": [
            {
                "name": run.name,
                "outcome": run.history.outcome,
                "setting": setting(run.summary),
                "figures": {key: figure.as_json() for key, figure in run.figures.items()},
                "bottleneck": run.summary["bottleneck"],
                "cautions": cautions(run),
                "trace": run.summary["trace"],
                "recipe": run.history.recipe,
            }
            for run in runs
        ],
        "uneven": uneven(runs),
        "differences": [_differences_json(run, runs[0]) for run in runs[1:]],
    }


def _differences_json(run: Reported, baseline: Reported) -> dict[str, Any]:
    judgements = {key: judge(figure, baseline.figures[key]) for key, figure in run.figures.items() if key in baseline.figures}
    return {
        "run": run.name,
        "baseline": baseline.name,
        "relative": {key: one.difference for key, one in judgements.items() if one.difference is not None},
        "judged": {
            key: {"verdict": one.verdict, "interval": one.interval, "n": one.n}
            for key, one in judgements.items()
            if one.verdict
        },
    }


def as_markdown(runs: Sequence[Reported]) -> str:
    parts = [f"# {_cell(' against '.join(run.name for run in runs))}"]
    parts += ["", *(f"- {_cell(run.name)}: {_cell(setting(run.summary))}" for run in runs)]
    parts += [f"- {_cell(run.name)}: {_cell(caution)}" for run in runs for caution in cautions(run)]
    parts += [f"- {_cell(caution)}" for caution in uneven(runs)]
    for table in tables(runs):
        parts += ["", f"## {table.title}", ""]
        if table.rows and len(runs) == 1:
            parts += ["| figure | value | spread | of | how |", "|---|---:|---:|---:|---|"]
            for row in table.rows:
                figure = row.figures[0]
                line = (figure.label, figure.text, figure.spread_text, figure.count_text, figure.detail)
                parts.append(f"| {' | '.join(_cell(cell) for cell in line)} |")
        elif table.rows:
            heads = [f"{_cell(run.name)} | " + "change" * (index > 0) for index, run in enumerate(runs)]
            heads[0] = _cell(runs[0].name)
            parts += [f"| figure | {' | '.join(heads)} |", f"|---|---:{'|---:|---:' * (len(runs) - 1)}|"]
            for row in table.rows:
                values = [f"{figure.text} {figure.spread_text}".strip() for figure in row.figures]
                counts = [figure.count_text if figure.value is not None else "" for figure in row.figures]
                cells = [", ".join(filter(None, pair)) for pair in zip(values, counts, strict=True)]
                changes = [_judged_text(judgement) for judgement in row.judgements]
                pairs = [cells[0], *(part for pair in zip(cells[1:], changes[1:], strict=True) for part in pair)]
                parts.append(f"| {' | '.join(_cell(cell) for cell in (row.label, *pairs))} |")
        if table.missing:
            parts += ["", f"Not recorded: {_cell(', '.join(table.missing))}."]
    for run in runs:
        if kernel_rows := kernels(run):
            parts += ["", f"## {traced(run)}" + f" ({_cell(run.name)})" * (len(runs) > 1), ""]
            parts += ["| kernel or operator | calls | in all | share |", "|---|---:|---:|---:|"]
            parts += [
                f"| {_cell(name)} | {calls:,} | {quantity(s, 's')} | {share:.1%} |" for name, calls, s, share in kernel_rows
            ]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """One line that Markdown takes as it is, HTML and links included."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(svg.without_controls(text).split()))


def _change_text(difference: float | None) -> str:
    if difference is None:
        return ""
    if abs(difference) < _SAME:
        return "same" if difference == 0 else "0.0%"
    return f"{difference:+.1%}" if abs(difference) < 10 else f"{difference + 1:,.3g}-fold"


def _judged_text(judgement: Judgement) -> str:
    interval = "" if judgement.interval is None else f"({' to '.join(map(_change_text, judgement.interval))})"
    return " ".join(filter(None, (_change_text(judgement.difference), judgement.verdict, interval)))


def cautions(run: Reported) -> list[str]:
    """What a reader must know before believing the numbers."""
    history, summary, texts = run.history, run.summary, []
    if history.log_lines > len(history.lines):
        texts.append(
            f"Of {history.log_lines:,} log lines {len(history.lines):,}, evenly spread, are drawn and measured here; "
            "`fastdistil report` takes all."
        )
    if history.outcome != "done":
        texts.append(f"The run did not end: {OUTCOMES[history.outcome]}.")
    if len(history.starts) > 1:
        texts.append(f"{len(history.starts)} attempts: the run was continued {len(history.starts) - 1} times.")
    left_out = len(history.lines) - len(history.comparable_lines)
    if left_out:
        texts.append(
            f"{left_out} of {len(history.lines)} log lines ran otherwise (ranks, device, ...): in the curves, in no figure."
        )
    if summary["warmup"] and not summary["updates"]:
        texts.append("All that was recorded is warm-up: there are curves, but no figures of speed.")
    texts += [f"MFU is refused: {reason}." for reason in (summary["mfu"] or {}).get("refused", [])]
    if history.skipped:
        texts.append(f"{history.skipped:,.0f} updates were skipped: a value was not finite.")
    memory = summary["memory"] or {}
    if memory.get("retries"):
        texts.append(f"The allocator freed its cache and tried again {memory['retries']} times: memory was nearly full.")
    slowed = slowed_down(summary)
    if slowdowns := [f"{reason.replace('_', ' ')} in {share:.1%} of the samples" for reason, share in slowed.items()]:
        texts.append(f"The device slowed itself down: {', '.join(slowdowns)}.")
    return [svg.without_controls(text) for text in texts]


def uneven(runs: Sequence[Reported]) -> list[str]:
    """What makes a comparison of the runs unfair."""
    texts = []
    for name in SAME_WORK:
        values = list(dict.fromkeys(run.summary[name] for run in runs))
        if len(values) > 1:
            values_text = ", ".join(
                NOT_RECORDED if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in values
            )
            texts.append(f"The runs differ in {name.replace('_', ' ')}: {values_text}.")
    return [svg.without_controls(text) for text in texts]


def traced(run: Reported) -> str:
    trace = run.summary["trace"] or {}
    return f"What took the most time in updates {trace.get('first')} to {trace.get('last')}"


def kernels(run: Reported) -> list[tuple[str, int, float, float]]:
    """(name, calls, seconds in all, share of all kernels' time) of the trace, the longest first; empty without a trace."""
    kernels_by_time = (run.summary["trace"] or {}).get("kernels") or ()
    return [(svg.without_controls(str(row["name"])), row["calls"], row["ms"] / 1e3, row["share"]) for row in kernels_by_time]


def recipe_differences(runs: Sequence[Reported]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of the recipes' fields that differ."""
    recipes = [flat(run.history.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [svg.without_controls(str(recipe[key])) if key in recipe else "" for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def notes(history: History) -> tuple[list[tuple[str, str]], int]:
    """([(where, message)], how many more there were); equal messages are one."""
    by_message: dict[str, list[int | None]] = {}
    for note in history.notes:
        by_message.setdefault(note.message, []).append(note.update)
    entries = []
    for message, updates in by_message.items():
        numbers = [update for update in updates if update is not None]
        where = f"update {numbers[0]:,}" if numbers else ""
        where += f", and {len(updates) - 1:,} more" if len(updates) > 1 else ""
        entries.append((where, svg.without_controls(message)))
    return entries[:_NOTES_SHOWN], max(0, len(entries) - _NOTES_SHOWN)


@cache
def template(name: str = "report.html.j2") -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "change": _change_text}
    return environment.get_template(name)


def as_html(runs: Sequence[Reported], live: str = "") -> str:
    """`live`: a name of this version of the page, where it is one that goes on (live.py) and no file."""
    histories = [run.history for run in runs]
    by_key = {table.key: table for table in tables(runs)}
    drawn = [(section, by_key[section.key]) for section in sections(histories)]
    return template().render(
        version=__version__,
        live=live,
        runs=[_head(index, run) for index, run in enumerate(runs)],
        several=len(runs) > 1,
        uneven=uneven(runs),
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        bottleneck=runs[0].summary["bottleneck"] if len(runs) == 1 else None,
        head_rows=_head_rows(by_key) if len(runs) > 1 else [],
        sections=[_shown(section, table) for section, table in drawn],
        phases=_phase_rows(runs[0]) if len(runs) == 1 else [],
        phase_names=PHASES,
        facts=[by_key["run"], by_key["environment"]],
        recipe_differences=recipe_differences(runs) if len(runs) > 1 else [],
        not_recorded=NOT_RECORDED,
    )


def _shown(section: PlotSection, table: ComparisonTable) -> dict[str, Any]:
    # A figure may be missing where its curve is not: of warm-up there are no figures.
    curves = {panel.title.lower() for panel in section.panels} | {title.lower() for title in section.missing}
    return {
        "key": section.key,
        "title": section.title,
        "panels": section.panels,
        "table": table,
        "empty": not section.panels and not table.rows,
        "missing": [*section.missing, *(label for label in table.missing if label not in curves)],
    }


def _head(index: int, run: Reported) -> dict[str, Any]:
    history, wall = run.history, run.history.wall_s
    begun = history.starts[0].time if history.starts else None
    shown_notes, more = notes(history)
    done = history.lines[-1].update if history.lines else history.start.update
    planned = history.start.updates
    recipe = yaml.safe_dump(history.recipe, sort_keys=False, allow_unicode=True)
    return {
        "name": run.name,
        "swatch": svg.swatch(index),
        "outcome": history.outcome,
        "outcome_text": OUTCOMES[history.outcome],
        "setting": svg.without_controls(setting(run.summary)),
        "teacher": at(history.recipe, "teacher", "path"),
        "student": at(history.recipe, "student", "path") or at(history.recipe, "student", "architecture"),
        "done": f"{done:,}",
        "planned": f"{planned:,}" if planned else None,
        "wall": duration(wall) if wall is not None else None,
        "begun": f"{datetime.fromtimestamp(begun, UTC):%Y-%m-%d %H:%M} UTC" if begun is not None else None,
        "measured": run.summary["updates"],
        "warmup": run.summary["warmup"],
        "cautions": cautions(run),
        "notes": shown_notes,
        "more_notes": more,
        "traced": traced(run),
        "kernels": [(name, f"{calls:,}", quantity(s, "s"), f"{share:.1%}") for name, calls, s, share in kernels(run)],
        "recipe": svg.without_controls(recipe),
    }


def _tiles(run: Reported) -> list[dict[str, str]]:
    tiles = []
    for key, label in _TILES.items():
        figure = run.figures[key]
        if key == "memory.peak_allocated_bytes" and figure.value is None:
            figure = run.figures["memory.peak_rss_bytes"]
        text, unit, below = figure.text, "", ""
        if figure.value is not None:
            text, _, unit = text.partition(" ")
            below = ", ".join(filter(None, (figure.spread_text, figure.count_text))) or figure.detail
        tiles.append({"label": label, "text": text, "unit": unit, "below": below})
    return tiles


def _head_rows(by_key: Mapping[str, ComparisonTable]) -> list[ComparisonRow]:
    keys = (*_TILES, "speed.bottleneck", "memory.peak_rss_bytes", "run.wall_s")
    rows = [row for table in by_key.values() for row in table.rows if row.figures[0].key in keys]
    return sorted(rows, key=lambda row: keys.index(row.figures[0].key))


def _phase_rows(run: Reported) -> list[dict[str, Any]]:
    phases = run.summary["phases"] or {}
    widest = max((phase["share"] for phase in phases.values()), default=0.0) or 1.0
    return [
        {
            "name": name,
            "patch": svg.patch(name),
            "share": quantity(phases[name]["share"], "share"),
            "width": f"{max(0.0, 100 * phases[name]['share'] / widest):.1f}",
            **{key: quantity(phases[name][key], "s") for key in ("mean", "p50", "p95", "p99")},
            "sd": quantity(phases[name]["sd"], "s") if phases[name]["sd"] is not None else "",
        }
        for name in sorted(phases, key=PHASES.index)
    ]


def json_text(runs: Sequence[Reported]) -> str:
    return json.dumps(_finite(figures_json(runs)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Numbers that are not finite become null, which JSON has."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: _finite(element) for key, element in value.items()}
        case list() | tuple():
            return [_finite(element) for element in value]
        case _:
            return value
