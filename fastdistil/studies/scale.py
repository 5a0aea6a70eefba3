"""What `fastdistil scale` does with its options: measure or read, fit, predict; print, write scale.json and scale.html."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from fastdistil.errors import UserError, printable, translated
from fastdistil.gradients.cost_model import SIMPLEST_FIRST, WORTH, PredictedKind
from fastdistil.runs import next_free
from fastdistil.studies import minutes_table
from fastdistil.studies.cost_fit import Fit, Point, Workload, fit
from fastdistil.studies.networks import Network, load_network
from fastdistil.studies.points import LOSSES, MeasuredPoints, Mode, ceilings, efficiencies, losses
from fastdistil.studies.predict import FASTEST, FOREVER, BreakEven, break_even, predict_workload
from fastdistil.studies.scale_plot import Grid, ScaleCurve, ScalePlot, figure, page, show
from fastdistil.studies.scale_runs import Study, as_json, baseline_of, load_points, measure, model_points, workload
from fastdistil.untrusted import shown

SMALLER: tuple[PredictedKind, ...] = ("fp16", "int8")
"""Compressors whose break-even points are worked out."""


BUSY = 0.1
"""Residual, as a share of an update, above which the fit is worth little."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be predicted."""

    ranks: tuple[int, ...] = ()
    networks: tuple[tuple[str, Network | None], ...] = ()
    """By name as given; None: the measured one."""
    compression: tuple[PredictedKind, ...] = ("none",)
    rings: tuple[int, ...] = (1,)


def question(predict_text: str | None, network: str | None, compression: Sequence[str], rings: Sequence[int]) -> Question:
    """Raises UserError."""
    names = network.split(",") if network else []
    if names and not predict_text:
        raise UserError("--network says where to predict; add --predict with rank counts, e.g. --predict 64,512")
    networks: list[tuple[str, Network | None]] = [(name, load_network(name)) for name in names]
    return Question(
        ranks=numbers(predict_text, "--predict") if predict_text else (),
        networks=tuple(networks) or (("the measured network", None),),
        compression=tuple(kind for kind in SIMPLEST_FIRST if kind in ("none", *compression)),
        rings=tuple(rings),
    )


def numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,2,4`. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= 7 and 1 <= int(part) <= 10**6 for part in parts):
        raise UserError(f"{option} wants whole numbers from 1 to 1,000,000 separated by commas, e.g. 1,2,4; got {shown(text)}")
    return tuple(dict.fromkeys(int(part) for part in parts))


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """The options of the command line, with its defaults."""

    recipe: str | None = None
    overrides: Sequence[str] = ()
    np: str | None = None
    hosts: str | None = None
    mode: str = "weak"
    rings: str = "1"
    compression: str = "none"
    sync: str = "delayed"
    steps: int = 6
    rounds: int = 3
    ceiling: bool = True
    on: str | None = None
    baseline: int | None = None
    predict: str | None = None
    network: str | None = None
    table: str | None = None
    points: str | None = None
    out: Path | None = None

    def refuse_all_but(self, *names: str) -> None:
        """Raises UserError for what was given and would change nothing."""
        changed = [option.name for option in fields(self) if getattr(self, option.name) != option.default]
        if dropped := ["--no-ceiling" if name == "ceiling" else f"--{name}" for name in changed if name not in names]:
            way, *others = (f"--{name}" for name in names)
            raise UserError(f"{way} goes with {' and '.join(others)} only; leave out {' and '.join(dropped)}")


def command(options: ScaleOptions) -> None:
    """Raises FastdistilError."""
    console = rich.console.Console()
    ways = {"RECIPE": options.recipe, "--table": options.table, "--points": options.points}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(f"wanted one of RECIPE (to measure), --points and --table, got {' and '.join(chosen) or 'none'}")
    if options.table is not None:
        options.refuse_all_but("table", "baseline", "out")
        run_table(options.table, options.baseline, options.out, console)
        return
    rings, compression = numbers(options.rings, "--rings"), tuple(dict.fromkeys(options.compression.split(",")))
    query = question(options.predict, options.network, compression, rings)
    if options.points is not None:
        options.refuse_all_but("points", "out", "predict", *(("network", "compression", "rings") if query.ranks else ()))
        if unknown := [kind for kind in compression if kind not in SIMPLEST_FIRST]:
            raise UserError(f"--compression {','.join(unknown)} is not in the model, which has {', '.join(SIMPLEST_FIRST)}")
        paths = [Path(path) for path in options.points.split(",")]
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(f"--points {options.points} has a study twice, which would count its measurements twice")
        run_given(paths, query, options.out or _free_folder("points"), console)
        return
    assert options.recipe is not None
    modes: dict[str, tuple[Mode, ...]] = {"weak": ("weak",), "strong": ("strong",), "both": ("weak", "strong")}
    if options.mode not in modes:
        raise UserError(f"--mode is weak, strong or both, got {options.mode!r}")
    if options.np is None:
        raise UserError("--np says which rank counts to measure, e.g. --np 1,2,4")
    study = Study(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        ranks=numbers(options.np, "--np"),
        hosts=options.hosts,
        modes=modes[options.mode],
        rings=rings,
        compression=compression,
        sync=tuple(dict.fromkeys(options.sync.split(","))),
        steps=options.steps,
        rounds=options.rounds,
        ceiling=options.ceiling,
        on=load_network(options.on) if options.on else None,
        out=options.out or _free_folder(Path(options.recipe).stem),
    )
    if options.baseline is not None and options.baseline not in study.ranks:
        raise UserError(f"--baseline {options.baseline} is none of --np {options.np}")
    run_study(study, query, options.baseline, console)


def _free_folder(name: str) -> Path:
    return next_free(Path("runs"), f"scale-{name}")


def run_study(study: Study, query: Question, baseline: int | None, console: rich.console.Console) -> None:
    """Measure, show and write down. Raises FastdistilError."""
    points, recipe = measure(study, lambda text: console.print(text, markup=False, soft_wrap=True))
    values = as_json(study, recipe, points, baseline)
    grids, curves = _measured_grids(points, baseline, values), _measured_curves(points, baseline)
    base = baseline_of(points, points[0], baseline)
    if chosen := model_points(points, baseline):
        model = fit(chosen, on_cpu=(base.rounds[0].start.device or "cpu").startswith("cpu"))
        tokens = statistics.median(update.tokens for run in base.rounds for update in run.updates)
        update_s = tokens / statistics.median(base.tokens_per_s)
        work = workload(points, recipe.loop.accumulation)
        model_grids, predicted, model_values = _model(
            model, work, query, update_s * work.accumulation / base.setting.accumulation
        )
        grids += model_grids
        curves += predicted
        values |= model_values
    ideals = {f"linear from {base.setting.name}": (base.setting.ranks, 1.0)}
    plot = figure(curves, ideals, "ranks", f"speed over {base.setting.name}")
    _write(study.out, f"Scaling of {study.recipe}", values, grids, plot, console)


def run_given(paths: Sequence[Path], query: Question, out: Path, console: rich.console.Console) -> None:
    """The model on the points of earlier studies together. Raises UserError."""
    studies = [load_points(path) for path in paths]
    ran = _alike(paths, studies)
    works = [work for _, work, _ in studies]
    several = [work for work in works if work.engine != "alone"] or works
    alone = {point.accumulation for points, _, _ in studies for point in points if point.ranks == 1}
    work = next((work for work in several if work.accumulation in alone), several[0])  # with a baseline, where one has it
    on_cpu = str(ran["device"]["kind"]).startswith("cpu")
    model = fit([point for points, _, _ in studies for point in points], on_cpu=on_cpu)
    single = [point for point in model.points if point.ranks == 1 and point.accumulation == work.accumulation]
    steps = [sample.step_s for point in single for sample in point.samples]
    grids, curves, model_values = _model(model, work, query, statistics.median(steps) if steps else None)
    grids[0] = replace(grids[0], title=f"{grids[0].title}, on {_described(ran)}")
    values = {"studies": [str(path) for path in paths], **ran, **model_values}
    plot = figure(curves, {"linear": (1, 1.0)}, "ranks", "speed over 1 rank") if curves else None
    _write(out, f"Scaling on {_device(ran)}: the model on earlier studies", values, grids, plot, console)


def _alike(paths: Sequence[Path], studies: Sequence[tuple[list[Point], Workload, dict[str, Any]]]) -> dict[str, Any]:
    """What all of them ran on. Raises UserError."""
    first: dict[str, tuple[Any, Path]] = {}
    for path, (_, work, ran) in zip(paths, studies, strict=True):
        threads = {"threads a rank (OMP_NUM_THREADS)": ran["device"]["threads_per_rank"]}
        facts = {"device": _device(ran), **threads, "dtype": ran["dtype"], **ran["shape"]}
        if work.engine != "alone":
            facts |= {"engine": work.engine, "gradient_bytes": work.gradient_bytes}
        for name, value in facts.items():
            expected, there = first.setdefault(name, (value, path))
            if value != expected:
                raise UserError(
                    f"{path} has {name} {value}, wanted {expected} as in {there}: one model is fitted to what differs in "
                    "ranks, accumulation, rings, compression and network; measure alike, or give the studies one by one"
                )
    return studies[0][2]


def _device(ran: Mapping[str, Any]) -> str:
    return str(ran["device"]["name"] or ran["device"]["kind"])


def _described(ran: Mapping[str, Any]) -> str:
    """Device, dtype and shape of a study."""
    shape = ran["shape"]
    return (
        f"{_device(ran)}, {ran['device']['threads_per_rank']} threads a rank, {ran['dtype']}; "
        f"student + teacher: {shape['student_parameters']:,} + {shape['teacher_parameters']:,} parameters; "
        f"micro-batches of {shape['micro_batch_tokens']:,} tokens"
    )


def run_table(name: str, baseline: int | None, out: Path | None, console: rich.console.Console) -> None:
    """A given table. Raises UserError."""
    table = minutes_table.load_table(name)
    grid, plot, values = minutes_table.study(table, baseline)
    if out is None:
        show(grid, console)
    else:
        _write(out, f"Scaling of {table.title}", values, [grid], plot, console)


def _write(
    out: Path, title: str, values: dict[str, Any], grids: Sequence[Grid], plot: ScalePlot | None, console: rich.console.Console
) -> None:
    with translated("writing the study", out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "scale.json").write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
        (out / "scale.html").write_text(printable(page(title, plot, grids)), encoding="utf-8")
    for grid in grids:
        show(grid, console)
    console.print(f"{out / 'scale.json'} has every number, {out / 'scale.html'} the plot", markup=False, soft_wrap=True)


# --- measured


def _range(values: Sequence[float], form: str, times: float = 1.0) -> str:
    """Write the median, and the least and most of several; nothing for no value."""
    scaled = [value * times for value in values]
    if not scaled:
        return ""
    middle = f"{statistics.median(scaled):{form}}"
    return middle if len(scaled) == 1 else f"{middle} ({min(scaled):{form}} to {max(scaled):{form}})"


def _measured_grids(points: Sequence[MeasuredPoints], baseline: int | None, values: dict[str, Any]) -> list[Grid]:
    counts = values["counts"]
    title = (
        f"Measured on {_described(values)}; {counts['rounds']} rounds of {counts['updates']} updates after {counts['warmup']}. "
        "Median (least to most over rounds)"
    )
    rows, lost_rows = [], []
    for point, record in zip(points, values["points"], strict=True):
        base = baseline_of(points, point, baseline)
        efficiency, ceiling, lost = efficiencies(point, base), ceilings(point, base), losses(point, base)
        times = point.setting.ranks / base.setting.ranks
        startups = [run.startup_s for run in point.rounds if run.startup_s is not None]
        of_ceiling = [ratio / most for ratio, most in zip(efficiency, ceiling, strict=True)] if ceiling else []
        rows.append(
            {
                "point": point.setting.name + (" (baseline)" if point is base else ""),
                "micro-batches a rank": str(point.setting.accumulation),
                "update, ms": _range([run.step_s for run in point.rounds], ",.1f", 1e3),
                "tokens/s": _range(point.tokens_per_s, ",.0f"),
                "speed-up": _range([ratio * times for ratio in efficiency], ".2f"),
                "efficiency, % of linear": _range(efficiency, ".1f", 100),
                "ceiling, %": _range(ceiling, ".1f", 100),
                "of the ceiling, %": _range(of_ceiling, ".1f", 100),
                "start-up, s": _range(startups, ".1f"),
                "": "oversubscribed" if point.oversubscribed else "",
            }
        )
        record |= {"baseline": base.setting.name, "efficiency": efficiency, "ceiling": ceiling, "lost_s": dict(lost.seconds)}
        record |= {"ideal_s": lost.ideal_s, "cause": lost.cause if point is not base else None}
        if point is not base:
            shares = {
                LOSSES[name]: "not recorded" if value is None else f"{value / lost.step_s:.1%}"
                for name, value in lost.seconds.items()
            }
            lost_rows.append(
                {
                    "point": point.setting.name,
                    "lost of an update": f"{1 - lost.ideal_s / lost.step_s:.1%}",
                    **shares,
                    "mostly": LOSSES[lost.cause] if lost.cause else "nothing",
                    "slowest rank": "{} (in {} of {} updates)".format(*point.slowest) if point.slowest else "not recorded",
                }
            )
    notes = ["Efficiency: tokens/s over the baseline's times ranks. Ceiling: the same for unconnected runs side by side."]
    notes.append("Start-up: from the launch to the first update: imports, models, the ranks' meeting; in no other column.")
    if left_out := [point.setting.name for point in points if not point.modelled]:
        notes.append(f"Not in the model's fit: {'; '.join(left_out)}.")
    grids = [Grid(title=title, rows=rows, notes=notes)]
    if lost_rows:
        grids.append(Grid(title="Measured: where the time beyond the ideal goes, shares of an update", rows=lost_rows))
    return grids


def _measured_curves(points: Sequence[MeasuredPoints], baseline: int | None) -> list[ScaleCurve]:
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    ones: list[tuple[float, float, float, float]] = []
    for point in points:
        base = baseline_of(points, point, baseline)
        times = point.setting.ranks / base.setting.ranks
        speeds = [ratio * times for ratio in efficiencies(point, base)]
        place = (point.setting.ranks, statistics.median(speeds), min(speeds), max(speeds))
        if point.setting.mode is None:
            ones.append(place)
            continue
        label = replace(point.setting, ranks=1, accumulation=1).name.removeprefix("1 rank, ")
        curves.setdefault(f"measured: {label}" + (", oversubscribed" if point.oversubscribed else ""), []).append(place)
    if not curves:
        return [ScaleCurve(name="measured", points=tuple(ones))]
    return [ScaleCurve(name=name, points=(*ones, *places)) for name, places in curves.items()]


# --- the model


def _model(
    model: Fit, work: Workload, query: Question, ideal_s: float | None
) -> tuple[list[Grid], list[ScaleCurve], dict[str, Any]]:
    """(tables, curves, JSON); predictions are marked as such. `ideal_s`: of one rank's update; None without a baseline."""
    places: dict[str, list[tuple[float, float, float, float]]] = {}
    rows, break_even_rows, notes = [], [], []
    predictions: list[dict[str, Any]] = []
    break_evens: list[dict[str, Any]] = []
    for (name, network), kind, rings, ranks in product(query.networks, query.compression, query.rings, query.ranks):
        prediction = predict_workload(model, work, network, kind, rings, ranks)
        marks = {"predicted": True, "network_name": name}
        label = f"predicted: {name}, {kind}" + (f", {rings} rings" if rings > 1 else "")
        # The fast end of a wide band may be no time at all: then the efficiency has no upper end.
        ends = (prediction.step_s, prediction.high_s, prediction.low_s)
        shares = [ideal_s / seconds if seconds > 0 else math.inf for seconds in ends] if ideal_s else None
        finite = [share if share < math.inf else None for share in shares] if shares else [None] * 3  # JSON has no infinity
        efficiency = dict(zip(("efficiency", "efficiency_low", "efficiency_high"), finite, strict=True))
        predictions.append({**marks, "compression": kind, **asdict(prediction), **efficiency})
        most = "no upper end" if shares is None or shares[2] == math.inf else f"{shares[2]:.1%}"
        rows.append(
            {
                "predicted, not measured": label,
                "ranks": str(ranks),
                "update, ms (band)": f"{_ms(prediction.step_s)} ({_ms(prediction.low_s)} to {_ms(prediction.high_s)})",
                "efficiency (band)": f"{shares[0]:.1%} ({shares[1]:.1%} to {most})" if shares else "no baseline",
                "own work, ms": _ms(prediction.work_s),
                "imbalance, ms": _ms(prediction.imbalance_s),
                "exposed, ms": _ms(prediction.exposed_s),
            }
        )
        notes += [f"Band: {prediction.band}.", *(f"Assumed: {assumption}." for assumption in prediction.assumed)]
        if shares:
            place = (ranks, ranks * shares[0], ranks * shares[1], ranks * min(shares[2], 2 * shares[0]))
            places.setdefault(label, []).append(place)
        if network is not None and kind == "none" and ranks > 1:
            for small in SMALLER:
                estimate = break_even(model, work, small, ranks, network.nodes(ranks), network, rings)
                label = f"predicted: {name}, {ranks} ranks, {small}"
                break_even_rows.append({"predicted, not measured": label, **_break_even_cells(estimate, model)})
                break_evens.append({**marks, "ranks": ranks, "rings": rings, **asdict(estimate)})
    grids = [_parameter_grid(model), _residual_grid(model)]
    if rows:
        title = (
            f"PREDICTED, not measured: {work.accumulation} micro-batches a rank and update, computed as on the measured device"
        )
        grids.append(Grid(title=title, rows=rows, predicted=True, notes=list(dict.fromkeys(notes))))
    if break_even_rows:
        title = f"PREDICTED: where compression saves over {WORTH:.0%} of an update"
        grids.append(Grid(title=title, rows=break_even_rows, predicted=True))
    curves = [ScaleCurve(name=name, points=tuple(curve), predicted=True) for name, curve in places.items()]
    limits = {"most_accumulation": FOREVER, "most_bytes_per_s": FASTEST}
    values = {"model": _fit_json(model), "predictions": predictions, "break_even": break_evens, "break_even_looked_to": limits}
    return grids, curves, values


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _parameter_grid(model: Fit) -> Grid:
    rows = []
    for parameter in model.parameters:
        if parameter.value is None:
            value = f"cannot be determined ({parameter.low:.3g} to {parameter.high:.3g} fit as well)"
            error, remark = "", f"measure {parameter.remedy}"
        else:
            value, error = f"{parameter.value:.4g}", "" if parameter.sd is None else f"{parameter.sd:.2g}"
            remark = "not told from 0" if parameter.vague else ""
        rows.append({"parameter": parameter.meaning, "value": value, "± s.e.": error, "": remark})
    singular = ", ".join(f"{value:.2g}" for value in model.singular_values)
    notes = [f"Jacobian: rank {model.rank} of {len(model.names)} parameters; singular values {singular}."]
    if model.undetermined:
        open_ones = "; ".join(parameter.meaning for parameter in model.undetermined)
        notes.append(
            f"These points cannot determine: {open_ones}. Predictions take all values that fit as well into their band."
        )
    if model.residual is None:
        notes.append("As many numbers fitted as measured: there is no residual to judge by.")
    elif model.residual > BUSY:
        notes.append(
            f"A residual of {model.residual:.0%}: a busy machine, or costs that the model does not have; measure again."
        )
    return Grid(title="The cost model, calibrated on the measured points", rows=rows, notes=notes)


def _residual_grid(model: Fit) -> Grid:
    rows = []
    for point, fitted in zip(model.points, model.predicted_s, strict=True):
        measured = statistics.median(sample.step_s for sample in point.samples)
        residual = f"{fitted / measured - 1:+.1%}"
        rows.append({"point": point.name, "measured, ms": _ms(measured), "fitted, ms": _ms(fitted), "residual": residual})
    title = "Its fit"
    if model.residual is not None:
        title += f"; residual {model.residual:.2%} of an update a number, {model.freedom} degrees of freedom"
    return Grid(title=title, rows=rows)


def _break_even_cells(estimate: BreakEven, model: Fit) -> dict[str, str]:
    most, widest, remark = estimate.most_accumulation, estimate.most_bytes_per_s, ""
    if estimate.free:
        remark = "at most: no point measured what compressing costs"
    elif any(parameter.name == "memory_byte_s" and parameter.vague for parameter in model.parameters):
        remark = "what compressing costs is not told from 0"
    return {
        "pays up to micro-batches an update": "never" if most is None else "any number" if most == FOREVER else f"{most:,}",
        "pays below bandwidth, GB/s": "never" if widest is None else "any" if widest == FASTEST else f"{widest / 1e9:.3g}",
        "": remark,
    }


def _fit_json(model: Fit) -> dict[str, Any]:
    parameters = [
        {**asdict(parameter), "meaning": parameter.meaning, "determined": parameter.value is not None, "unit": "s"}
        for parameter in model.parameters
    ]
    summary = {"parameters": parameters, "rank": model.rank, "singular_values": model.singular_values}
    return summary | {"residual": model.residual, "freedom": model.freedom, "fitted_s": model.predicted_s}
