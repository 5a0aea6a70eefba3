"""`fastdistil profile`: some real updates of a recipe, and where their time goes.

The updates are those of `train`, in a run directory of their own, without evaluation and checkpoints; what the run saved at
its end is removed. Compression starts within the warm-up, since a long run is compressed nearly always. A log line, which waits
for the device, comes every WARMUP updates, or as often as the recipe says if that is more often.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table

from fastdistil.console import Console
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.errors import UserError, translated
from fastdistil.launch.launcher import launch_function
from fastdistil.profiling.quantities import quantity
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.report import write_report
from fastdistil.profiling.report.summary import summarise
from fastdistil.recipe import Recipe, load_recipe
from fastdistil.runs import choose_run
from fastdistil.train import train

WARMUP = 5
"""Updates that are not measured: allocators, autotuning and caches settle in them."""
_COMPRESSED = WARMUP - 2
"""Updates before the first compressed one, or (compression=auto) the decision: each settles within the warm-up too."""
_MISSING = "not recorded"


def profiled(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of a short run that does each update as the long one would."""
    return recipe.with_(
        loop={"epochs": None, "updates": WARMUP + steps},
        data={"heldout": None},
        evaluation={"every": None},
        checkpoint={"every": None},
        logging={"every": min(recipe.logging.every, WARMUP), "tensorboard": False, "histograms": None},
        profile={"warmup": WARMUP, "measure_peaks": True},
        compression={"warmup_updates": min(recipe.compression.warmup_updates, _COMPRESSED)},
    )


def run_profile(
    name: str, overrides: Sequence[str], *, steps: int, np: int | None, as_json: bool, console: rich.console.Console
) -> None:
    """The command; of several ranks that somebody else started, rank 0's alone prints. Raises FastdistilError."""
    if name == "demo":
        raise UserError("the demo prepares data of its own; give a recipe on prepared data, e.g. distilbert data.train=corpus/")
    recipe = profiled(load_recipe(name, overrides), steps)
    recipe_name = f"{Path(name).stem if name.endswith(('.yaml', '.yml')) else name}-profile"
    if np in (None, 1):
        place = find_rank_info(os.environ)
        directory = _train(recipe, recipe_name)
        if place is not None and place.rank > 0:
            return
    else:
        choose_run(recipe, recipe_name, None)  # refuses before ranks are started
        arguments = {"recipe": recipe, "recipe_name": recipe_name}
        directory = launch_function(_train, arguments, np=np, hosts=None, timeout_s=recipe.world.timeout_s)
    for saved in ("checkpoints", "student"):
        shutil.rmtree(directory / saved, ignore_errors=True)
    summary = summarise(load_history(directory))
    with translated("writing the profile", directory):
        (directory / "profile.json").write_text(json.dumps(summary), encoding="utf-8")
    write_report([directory], directory / "report.html")
    if as_json:
        print(json.dumps(summary))
        return
    show(summary, console)
    for file in ("profile.json", "report.html"):
        console.print(f"{directory / file}", markup=False, highlight=False, soft_wrap=True)


def _train(recipe: Recipe, recipe_name: str) -> Path:
    """Train in one rank; progress goes to standard error, so that standard output has the result alone."""
    place = find_rank_info(os.environ)
    notes = Console(quiet=place is not None and place.rank > 0, file=sys.stderr)
    return train(recipe, recipe_name=recipe_name, console=notes, place=place).run_dir


def show(summary: Mapping[str, Any], console: rich.console.Console) -> None:
    """One table, the figures below it, and the bottleneck."""
    console.print(_title(summary), markup=False, highlight=False, soft_wrap=True)
    table = Table()
    for column in ("phase", "p50", "p95", "p99", "share of the step", "of"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, statistics, share in _rows(summary):
        times = (quantity(statistics[key], "s") if statistics else _MISSING for key in ("p50", "p95", "p99"))
        table.add_row(name, *times, "" if share is None else f"{share:.1%}", str(statistics["n"]) if statistics else "")
    console.print(table)
    for text in _figures(summary):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    bottleneck = summary["bottleneck"]
    key = f" -> {bottleneck['key']}" if bottleneck["key"] else ""
    console.print(f"bottleneck: {bottleneck['name']}{key}: {bottleneck['why']}", markup=False, highlight=False, soft_wrap=True)


def _title(summary: Mapping[str, Any]) -> str:
    ranks = summary["ranks"] or 1
    where = (
        f"{summary['name']}: {summary['device'] or _MISSING}, {summary['dtype'] or _MISSING}, {ranks} rank{'s' * (ranks > 1)}"
    )
    if ranks > 1:
        where += f" ({summary['engine']}, compression {summary['compression']}, {summary['sync']})"
    shape = f"{summary['accumulation']} x {summary['micro_batch_tokens']:,} tokens at most an update and rank"
    models = f"student {summary['student_parameters'] or 0:,}, teacher {summary['teacher_parameters'] or 0:,} parameters"
    return f"{where}; {shape}; {models}; {summary['updates']} measured updates after {summary['warmup']} of warm-up"


def _rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None, float | None]]:
    yield "step", summary["step_s"], None if summary["step_s"] is None else 1.0
    if summary["phases"] is None:
        yield "phases", None, None
        return
    for name, statistics in summary["phases"].items():
        yield name, statistics, statistics["share"]
    for name in ("communication", "evaluation", "checkpoint"):  # none of the step's own phases
        if (statistics := summary[name]) is not None:
            yield name, statistics, None


def _figures(summary: Mapping[str, Any]) -> Iterator[str]:
    rate = summary["tokens_per_s"]
    yield f"tokens/s: {_MISSING if rate is None else f'{rate:,.0f}'}" + (", all ranks" if (summary["ranks"] or 1) > 1 else "")
    yield f"MFU: {_mfu(summary['mfu'])}"
    if (communication := summary["communication"]) is not None:
        yield f"communication: at least {communication['hidden_share']:.0%} of it hidden behind the rest of the step"
    memory = summary["memory"] or {}
    peaks = {"host": "peak_rss_bytes", "allocated on the GPU": "peak_allocated_bytes", "reserved": "peak_reserved_bytes"}
    texts = [f"{quantity(memory[key], 'bytes')} {label}" for label, key in peaks.items() if memory.get(key) is not None]
    yield f"memory at its peak: {', '.join(texts) or _MISSING}"
    energy = summary["energy"]
    if energy["j_per_update"] is None:
        yield f"energy: {energy['why']}"
    else:
        yield (
            f"energy of rank 0's device: {energy['j_per_update']:,.3g} J an update, {energy['j_per_million_tokens']:,.4g} J a "
            f"million tokens, over {energy['seconds']:.0f} s"
        )
    if (straggler := summary["straggler"]) is not None:
        yield (
            f"slowest rank: {straggler['rank']}, {straggler['share']:.1%} above the mean, in {straggler['slowest_in']} of "
            f"{straggler['lines']} log lines"
        )


def _mfu(mfu: Mapping[str, Any] | None) -> str:
    if mfu is None:
        return _MISSING
    beside = mfu.get("measured")
    return _shares(mfu) + (f"; {_shares(beside)}" if beside is not None else "")


def _shares(mfu: Mapping[str, Any]) -> str:
    if mfu["refused"]:
        return "; ".join(mfu["refused"])
    names = {"student": "student", "with_teacher": "with the teacher", "hfu": "recomputation counted"}
    shares = [f"{mfu[name]:.1%} {label}" for name, label in names.items() if mfu[name] is not None]
    return f"{', '.join(shares)}, of {mfu['peak_flops'] / 1e12:,.4g} TFLOP/s ({mfu['peak_source']})"
