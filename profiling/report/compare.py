"""Two measurements side by side, and a verdict: is B slower than A by more than a limit, for certain?

    what                a run's directory, the profile.json of `fastdistil profile`, or what pytest --benchmark-json wrote
    ratio               B's median step over A's, with a 95% interval (bootstrap.py says how it is made)
    slower by a limit   the lower bound of that interval is above 1 + limit: the whole interval says so, not the one number

Measurements of different work are refused (devices, precision, ranks, micro-batch, accumulation, models; of benchmarks the
machine and its threads) unless asked for; other differences are listed, a device's power limit and clocks among them. A GPU
that slowed itself down (heat, power brake) in either measurement says nothing about the code: there is a warning, and asking
for a verdict is an error.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.markup
from rich.console import Console
from rich.table import Table

from fastdistil.errors import FellShort, UserError, translated
from fastdistil.profiling.quantities import quantity
from fastdistil.profiling.report.bootstrap import MAX_SAMPLES, MIN_SAMPLES, ratio_of
from fastdistil.profiling.report.history import flat, load_history
from fastdistil.profiling.report.measurement_files import Benchmarks, Profile
from fastdistil.profiling.report.summary import SAME_WORK, slowed_down, summarise
from fastdistil.profiling.report.svg import without_controls
from fastdistil.untrusted import Fields, at, check, read_json, real, reason

_OF_DEVICES = ("power_limit_w", "sm_clock_max_mhz", "slice", "driver", "pcie_generation", "pcie_width")
"""Facts of the environment's devices that are listed where they differ; their names must agree, of every rank."""
_SAME_MACHINE = ("processor", "usable_cores", "torch_threads", "gpus")
"""Of benchmarks' machine_info."""
_FREE = (
    "name",
    "runs_dir",
    "loop.updates",
    "loop.epochs",
    "logging.",
    "profile.",
    "checkpoint.",
    "evaluation.",
    "data.heldout",
)
"""Recipe keys that do not change what a step does."""
_MISSING = "not recorded"


class Measurement(NamedTuple):
    path: str
    kind: str
    """run or benchmarks."""
    content: dict[str, Any]


def compare(a: Path, b: Path, *, fail_above: float | None = None, anyway: bool = False) -> dict[str, Any]:
    """Both sides, differences, warnings, rows and the verdict, as JSON. Raises UserError.

    `fail_above`: a fraction, 0.05 for 5%. A row's ratio is B over A, of medians; of tokens_per_s, of means.
    """
    first, second = load_measurement(a), load_measurement(b)
    if first.kind != second.kind:
        raise UserError(f"{a} holds a {first.kind}, {b} {second.kind}; give two of one kind")
    if first.kind == "run":
        refused, differences, warnings = _run_differences(first.content, second.content)
        rows = list(_run_rows(first.content, second.content))
        judged = [row for row in rows if row["name"] == "step"]
        more = {"losses": _losses(first.content, second.content)}
    else:
        refused, differences, warnings = _machine_differences(first.content, second.content)
        rows = list(_benchmark_rows(first, second))
        judged, more = rows, {"only_in": _only_in(first.content, second.content)}
    if refused and not anyway:
        refusals = "; ".join(f"{difference['key']}: {difference['a']} against {difference['b']}" for difference in refused)
        raise UserError(f"{a} and {b} did not measure the same work: {refusals}; --anyway compares them all the same")
    throttled = [text for name, side in (("A", first), ("B", second)) for text in _throttled(name, side)]
    return {
        "kind": first.kind,
        "a": _about(first),
        "b": _about(second),
        "differences": refused + differences,
        "warnings": warnings + throttled,
        "rows": rows,
        **more,
        "verdict": None if fail_above is None else _verdict(judged, fail_above, throttled),
    }


def parse_limit(text: str) -> float:
    """`5%` as 0.05. Raises UserError."""
    try:
        limit = float(text.removesuffix("%")) / 100
    except ValueError:
        limit = math.nan
    if not text.endswith("%") or not 0 <= limit < math.inf:
        raise UserError(f"--fail-above {text!r}: wanted a percentage, e.g. 5%")
    return limit


def load_measurement(path: Path) -> Measurement:
    """Raises UserError, CorruptData."""
    if path.is_dir():
        return Measurement(str(path), "run", summarise(load_history(path)))
    if not path.is_file():
        raise UserError(f"nothing at {path}; give a run's directory, a profile.json or a file of pytest --benchmark-json")
    with translated("reading", path):
        try:
            content = read_json(path)
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON ({reason(error)}); give a run's directory, a profile.json or a pytest-benchmark file"
            ) from error
    names = content.keys() if isinstance(content, dict) else set()
    kind: type[Fields]
    if names >= {"benchmarks", "machine_info"}:
        name, kind = "benchmarks", Benchmarks
    elif names >= {"fastdistil", "step_s"}:
        name, kind = "run", Profile
    else:
        raise UserError(f"{path} is neither a profile.json of `fastdistil profile` nor a file of pytest --benchmark-json")
    try:
        check(kind, content)
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}): it was damaged, or another version wrote it; measure again"
        ) from error
    return Measurement(str(path), name, content)


def _about(side: Measurement) -> dict[str, Any]:
    content = side.content
    if side.kind == "benchmarks":
        return {"path": side.path, "datetime": content.get("datetime"), "machine": _machine(content)}
    return {"path": side.path, **{name: content.get(name) for name in ("name", *SAME_WORK, "updates", "warmup")}}


def _run_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[str]]:
    """Return (what makes the work another, other differences, warnings)."""
    facts = _unequal(a, b, (*SAME_WORK, "engine", "compression", "sync", "rings", "threads", "kernels"))
    facts += _unequal(_devices(a), _devices(b), ("devices", *_OF_DEVICES))
    refused = [fact for fact in facts if fact["key"] in (*SAME_WORK, "devices") and _MISSING not in (fact["a"], fact["b"])]
    keys = {fact["key"] for fact in refused}
    if "device" in keys:  # the names of all devices say the same once more
        refused, facts = ([fact for fact in listed if fact["key"] != "devices"] for listed in (refused, facts))
    settings = _unequal(flat(a.get("recipe") or {}), flat(b.get("recipe") or {}))
    settings = [one for one in settings if not one["key"].startswith(_FREE) and one["key"].rpartition(".")[2] not in keys]
    versions = _unequal(*(flat({"versions": at(side, "environment", "versions") or {}}) for side in (a, b)))
    missing = [name for name in SAME_WORK if a.get(name) is None or b.get(name) is None]
    warning = f"whether both did the same work cannot be told by {', '.join(missing)}: {_MISSING}"
    others = [fact for fact in facts if fact not in refused]
    return refused, [*others, *settings, *versions], [warning] if missing else []


def _devices(summary: Mapping[str, Any]) -> dict[str, Any]:
    devices = at(summary, "environment", "devices") or ()
    return {"devices": _of_ranks(devices, "name"), **{name: _of_ranks(devices, name) for name in _OF_DEVICES}}


def _of_ranks(devices: Sequence[Mapping[str, Any]], name: str) -> Any:
    """What all ranks have, or the list of what each has; None: not recorded."""
    values = [device.get(name) for device in devices]
    return values if any(value != values[0] for value in values) else next(iter(values), None)


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any], keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return what differs: of these keys, or of all of them by name."""
    return [
        {"key": key, "a": _MISSING if a.get(key) is None else a[key], "b": _MISSING if b.get(key) is None else b[key]}
        for key in keys or sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _run_rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield seconds, tokens/s and bytes."""
    steps = [_samples(side.get("step_s")) for side in (a, b)]
    yield _row("step", *steps)
    phases = [side.get("phases") or {} for side in (a, b)]
    for name in dict.fromkeys([*phases[0], *phases[1]]):
        yield _row(name, *(_samples(side.get(name)) for side in phases))
    rates = _plain_row("tokens/s", "tokens/s", a.get("tokens_per_s"), b.get("tokens_per_s"))
    means = ratio_of(steps[1], steps[0], "mean")  # a step twice as long is half the rate
    if rates["ratio"] is not None and means is not None and means.value and means.interval is not None:
        # The relative width that the steps' means have.
        rates["interval"] = [rates["ratio"] * bound / means.value for bound in means.interval]
    yield rates
    for name in ("peak_rss_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
        sizes = [at(side, "memory", name) for side in (a, b)]
        if any(size is not None for size in sizes):
            yield _plain_row(name.removesuffix("_bytes").replace("_", " "), "bytes", *sizes)


def _samples(statistics: Mapping[str, Any] | None) -> list[float]:
    return list((statistics or {}).get("samples") or ())


def _row(name: str, a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    a, b = a[-MAX_SAMPLES:], b[-MAX_SAMPLES:]
    ratio = ratio_of(a, b)
    return {
        "name": name,
        "unit": "s",
        "a": statistics.median(a) if a else None,
        "b": statistics.median(b) if b else None,
        "ratio": None if ratio is None else ratio.value,
        "interval": None if ratio is None or ratio.interval is None else list(ratio.interval),
        "n": [len(a), len(b)],
    }


def _plain_row(name: str, unit: str, a: float | None, b: float | None) -> dict[str, Any]:
    return {"name": name, "unit": unit, "a": a, "b": b, "ratio": b / a if a and b is not None else None, "interval": None}


def _losses(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each side's at the last update that both logged."""
    sides = [{line["update"]: line for line in side.get("losses") or ()} for side in (a, b)]
    common = sides[0].keys() & sides[1].keys()
    return {"update": max(common), "a": sides[0][max(common)], "b": sides[1][max(common)]} if common else None


def _machine(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of machine_info must agree; without fastdistil's own entry, the processor's name and count."""
    info = content["machine_info"]
    cpu, machine = info.get("cpu") or {}, info.get("fastdistil")
    if machine is None:
        return {"processor": cpu.get("brand_raw"), "usable_cores": cpu.get("count")}
    return {
        name: [gpu.get("name") for gpu in machine.get("gpus") or ()] if name == "gpus" else machine.get(name)
        for name in _SAME_MACHINE
    }


def _machine_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[str]]:
    machines = _machine(a), _machine(b)
    refused = _unequal(*machines, dict.fromkeys([*machines[0], *machines[1]]))
    return refused, _unequal(_software(a), _software(b)), []


def _software(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions and settings that are listed where they differ."""
    info = content["machine_info"]
    ours = info.get("fastdistil") or {}
    return {
        **flat({name: ours[name] for name in ("versions", "malloc") if name in ours}),
        "python": info.get("python_version"),
    }


def _benchmark_rows(a: Measurement, b: Measurement) -> Iterator[dict[str, Any]]:
    sides = [{benchmark["fullname"]: benchmark["stats"] for benchmark in side.content["benchmarks"]} for side in (a, b)]
    common = [name for name in sides[0] if name in sides[1]]
    if not common:
        raise UserError(f"{a.path} and {b.path} have no benchmark in common; compare two results of the same files")
    for side, measurement in zip(sides, (a, b), strict=True):
        if any("data" not in side[name] for name in common):
            raise UserError(
                f"{measurement.path} has no single timings; make it with --benchmark-json, or --benchmark-save-data beside "
                "--benchmark-save"
            )
    for name in common:
        yield _row(name, sides[0][name]["data"], sides[1][name]["data"])


def _only_in(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    one, other = ([benchmark["fullname"] for benchmark in side["benchmarks"]] for side in (a, b))
    return {"a": [name for name in one if name not in other], "b": [name for name in other if name not in one]}


def _throttled(name: str, side: Measurement) -> list[str]:
    return [
        f"{name} ran on a GPU that slowed itself down ({reason}, {share:.0%} of the samples): its times are not the code's"
        for reason, share in (slowed_down(side.content) if side.kind == "run" else {}).items()
    ]


def _verdict(rows: Sequence[Mapping[str, Any]], limit: float, throttled: Sequence[str]) -> dict[str, Any]:
    """Raises UserError where there is nothing to judge by: a gate must not open because nothing was measured."""
    if throttled:
        raise UserError(
            f"nothing to judge by: {throttled[0]}; measure again, cooler, or leave out --fail-above to see the numbers"
        )
    if all(row["interval"] is None for row in rows):
        counts = " and ".join(str(n) for n in rows[0]["n"])
        raise UserError(
            f"nothing to judge by: {counts} measured samples, wanted {MIN_SAMPLES} each behind the warm-up; profile more steps "
            "(a run of an older fastdistil recorded no step times)"
        )
    slower = [row["name"] for row in rows if row["interval"] is not None and row["interval"][0] > 1 + limit]
    unjudged = [row["name"] for row in rows if row["interval"] is None]
    why = f"fewer than {MIN_SAMPLES} samples" if unjudged else ""
    return {"limit": limit, "slower": slower, "unjudged": unjudged, "why": why}


def show(comparison: Mapping[str, Any], console: Console) -> None:
    for name in ("a", "b"):
        side = comparison[name]
        facts = ", ".join(f"{key} {value}" for key, value in side.items() if key != "path" and value is not None)
        _say(f"{name.upper()}: {side['path']}: {facts}", console)
    for difference in comparison["differences"]:
        _say(f"differs: {difference['key']}: {difference['a']} against {difference['b']}", console)
    for text in comparison["warnings"]:
        _say(f"warning: {text}", console)
    title = f"B over A; medians with 95% intervals, of the last {MAX_SAMPLES:,} samples at most"
    table = Table(title=title, title_justify="left")
    for column in ("", "A", "B", "B - A", "95% interval", "samples"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for row in comparison["rows"]:
        interval = row["interval"]
        table.add_row(
            rich.markup.escape(without_controls(row["name"])),
            *(_MISSING if row[side] is None else quantity(row[side], row["unit"]) for side in ("a", "b")),
            _MISSING if row["ratio"] is None else _change(row["ratio"]),
            "" if interval is None else " to ".join(map(_change, interval)),
            " and ".join(str(n) for n in row.get("n", ())),
        )
    console.print(table)
    if losses := comparison.get("losses"):
        terms = [name for name in losses["a"] if name != "update" and name in losses["b"]]
        text = ", ".join(f"{name} {real(losses['a'][name]):.5g} and {real(losses['b'][name]):.5g}" for name in terms)
        _say(f"losses of A and B at update {losses['update']}: {text}", console)
    for side, names in (comparison.get("only_in") or {}).items():
        if names:
            _say(f"only in {side.upper()}: {', '.join(names)}", console)


def _say(text: str, console: Console) -> None:
    console.print(without_controls(text), markup=False, highlight=False, soft_wrap=True)


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.1%}" if ratio < 10 else f"{ratio:,.0f} times"


def run_compare(a: Path, b: Path, *, fail_above: str | None, anyway: bool, as_json: bool, console: Console) -> None:
    """The command. Raises UserError, and FellShort where B is slower than allowed."""
    comparison = compare(a, b, fail_above=None if fail_above is None else parse_limit(fail_above), anyway=anyway)
    if as_json:
        print(json.dumps(comparison, indent=1))
    else:
        show(comparison, console)
    verdict = comparison["verdict"]
    if verdict is None:
        return
    limit = f"{verdict['limit']:.1%}"
    if verdict["slower"]:
        ratios = {row["name"]: row["ratio"] for row in comparison["rows"]}
        slowdowns = ", ".join(f"{name} by {ratios[name] - 1:.1%}" for name in verdict["slower"])
        raise FellShort(f"B is slower than A by more than {limit}, for certain: {slowdowns}")
    conclusion = f"B is not shown to be slower than A by more than {limit}"
    if verdict["unjudged"]:
        conclusion = f"not judged against {limit}: {', '.join(verdict['unjudged'])} ({verdict['why']})"
    if not as_json:
        _say(conclusion, console)
