"""Efficiency and where the rest goes, from event streams made by hand, against numbers worked out by hand; plot and page."""

import inspect
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rich.console

from fastdistil import cli
from fastdistil.errors import UserError
from fastdistil.profiling.report.history import load_history
from fastdistil.recipe import load_recipe
from fastdistil.studies import scale_runs
from fastdistil.studies.minutes_table import (
    default_base,
    efficiency,
    explaining_bandwidth,
    load_table,
    study,
)
from fastdistil.studies.points import (
    MeasuredPoints,
    Round,
    Setting,
    ceilings,
    choose_baseline,
    efficiencies,
    losses,
    model_point,
    read_round,
)
from fastdistil.studies.scale import ScaleOptions, command, question, run_given
from fastdistil.studies.scale_plot import Grid, ScaleCurve, ScalePlot, figure, page
from fastdistil.studies.scale_runs import Study, _measured, as_json, settings


def run(folder: Path, steps: list[float], tokens: int, device: str = "cpu", **fields: Any) -> Round:
    """A finished run with one log line an update; its first update is slow and left out."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("version: 1\n")
    start = {"event": "start", "time": 105.5, "update": 0, "device": device, "engine": "torch", "precision": "fp32"}
    start |= {"threads": 3, "student_parameters": 1000, "teacher_parameters": 2000}
    machine = {"processor": "A processor", "cores": 64, "memory_bytes": 7, "devices": [{"rank": 0, "name": "A GPU"}]}
    lines: list[dict[str, Any]] = [start, {"event": "environment", **machine}]
    for number, step in enumerate([9.0, *steps], 1):
        line = {"event": "train", "update": number, "updates": 1, "tokens": tokens, "tokens_per_s": tokens / step}
        lines.append({**line, **fields})
    lines.append({"event": "done", "update": len(steps) + 1})
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_round(load_history(folder), 1, launched_s=100.0)


SEVERAL = {"buckets": 2, "gradient_collectives": 2, "gradient_bytes": 4000}
ONE, TWO = Setting(ranks=1, accumulation=4), Setting(ranks=2, accumulation=4, mode="weak")


def measured(setting: Setting, *rounds: Round, **fields: Any) -> MeasuredPoints:
    return MeasuredPoints(setting=setting, nodes=1, rounds=rounds, **fields)


def test_efficiency_and_losses_by_hand(tmp_path: Path) -> None:
    one = measured(ONE, run(tmp_path / "1", [1.0, 1.0, 1.0], 1000))
    # 2000 tokens in 1.6 s against 1000 in 1 s. Ranks worked 1.3 and 1.1 s: the slowest waited 0.3 s, 0.25 of it for gradients.
    fields = {**SEVERAL, "exchange_wait_s": 0.25, "rank_worked_s": [1.3, 1.1]}
    two = measured(TWO, run(tmp_path / "2", [1.6, 1.6, 1.6], 2000, **fields))
    assert efficiencies(two, one) == pytest.approx([0.625])
    lost = losses(two, one)
    assert lost.step_s == pytest.approx(1.6)
    assert lost.ideal_s == pytest.approx(1.0)
    # 1.2 s of work on average, 0.2 more than the ideal; 0.1 s of them the slowest does beyond the mean.
    expected_losses = {"exposed": 0.25, "control": 0.05, "imbalance": 0.1, "compression": 0.0, "compute": 0.2}
    lost_seconds = {name: value for name, value in lost.seconds.items() if value is not None}
    assert lost_seconds == pytest.approx(expected_losses)
    assert lost.seconds["shared"] is None
    assert lost.cause == "exposed"
    assert two.rounds[0].startup_s == pytest.approx(5.5)


def test_the_ceiling_takes_its_part_of_slower_compute(tmp_path: Path) -> None:
    one = measured(ONE, run(tmp_path / "1", [1.0, 1.0], 1000))
    beside = tuple(run(tmp_path / f"c{number}", [1.25, 1.25], 1000) for number in range(2))
    fields = {**SEVERAL, "exchange_wait_s": 0.05, "rank_worked_s": [1.3, 1.3]}
    two = measured(TWO, run(tmp_path / "2", [1.4, 1.4], 2000, **fields), ceiling=(beside,))
    assert ceilings(two, one) == pytest.approx([0.8])
    lost = losses(two, one)
    assert lost.seconds["shared"] == pytest.approx(0.25)
    assert lost.seconds["compute"] == pytest.approx(0.05)
    assert lost.seconds["control"] == pytest.approx(0.05)
    assert lost.cause == "shared"


def earlier(folder: Path, accumulation: int, one_s: float, two_s: float, **changed: Any) -> Path:
    """scale.json of one and of two ranks, in seconds an update."""
    one, two = (replace(setting, accumulation=accumulation) for setting in (ONE, TWO))
    points = [
        measured(one, run(folder / "1", [one_s], 1000 * accumulation)),
        measured(two, run(folder / "2", [two_s], 2000 * accumulation, **SEVERAL)),
    ]
    recipe = load_recipe("demo", [f"loop.accumulation={accumulation}"])
    values = as_json(plan(ranks=(1, 2), rounds=1), recipe, points, None) | changed
    (folder / "scale.json").write_text(json.dumps(values))
    return folder / "scale.json"


def test_studies_of_two_accumulations_are_held_against_one_rank_of_the_same(tmp_path: Path) -> None:
    """Micro-batches of 0.1 s and nothing else of one rank; two ranks take 0.125 s and 0.825 s: 80% and 97% of linear."""
    files = [earlier(tmp_path / "a", 1, 0.1, 0.125), earlier(tmp_path / "b", 8, 0.8, 0.825)]
    for order, expected in ((files, 0.8), (files[::-1], 0.8 / 0.825)):
        values, written = predicted(order, tmp_path / "out", "1,2")
        assert [prediction["efficiency"] for prediction in values["predictions"]] == pytest.approx([1.0, expected])
        for prediction in values["predictions"]:
            text = f"{prediction['efficiency']:.1%} ({prediction['efficiency_low']:.1%} to {prediction['efficiency_high']:.1%})"
            assert text in written
        assert values["device"] == {"kind": "cpu", "name": "A processor", "threads_per_rank": 3}
        assert (values["dtype"], values["shape"]["teacher_parameters"]) == ("fp32", 2000)
        assert "<h1>Scaling on A processor: " in written
        assert "on A processor, 3 threads a rank, fp32; student + teacher: 1,000 + 2,000 parameters" in written


def predicted(studies: list[Path], out: Path, ranks: str) -> tuple[dict[str, Any], str]:
    """(scale.json, scale.html)"""
    run_given(studies, question(ranks, None, (), (1,)), out, rich.console.Console(file=io.StringIO()))
    return json.loads((out / "scale.json").read_text()), (out / "scale.html").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": {"kind": "cpu", "name": "Another", "threads_per_rank": 3}}, "device Another, wanted A processor as in"),
        ({"device": {"kind": "cpu", "name": "A processor", "threads_per_rank": 1}}, "NUM_THREADS\\) 1, wanted 3 as in"),
        ({"dtype": "bf16"}, "dtype bf16, wanted fp32 as in"),
        ({"shape": {"micro_batch_tokens": 7, "student_parameters": 1000, "teacher_parameters": 2000}}, "tokens 7, wanted"),
    ],
)
def test_studies_of_different_machines_or_shapes_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = [earlier(tmp_path / "a", 1, 0.1, 0.125), earlier(tmp_path / "b", 8, 0.8, 0.825, **changed)]
    with pytest.raises(UserError, match=f"b/scale.json has .*{message} .*a/scale.json: .*measure alike"):
        predicted(files, tmp_path / "out", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": "x/scale.json,y.json,x/../x/scale.json"}, "a study twice"),
        ({"points": "x", "baseline": 2, "np": "1,2"}, "--points goes with .*; leave out --np and --baseline"),
        ({"points": "x", "rings": "4"}, "--points goes with --out and --predict only; leave out --rings"),
        ({"points": "x", "predict": "8", "ceiling": False}, "leave out --no-ceiling"),
        ({"points": "x", "predict": "8", "compression": "top-k"}, "--compression top-k is not in the model"),
        ({"table": "distilbert-2020", "predict": "8"}, "--table goes with --baseline and --out only; leave out --predict"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(ScaleOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": "."}, r"Is a directory while reading a study: \.; name another path"),
        ({"points": "file/scale.json"}, "Not a directory while reading a study: file/scale.json"),
        ({"table": "distilbert-2020", "out": Path("file")}, "File exists while writing the study: file"),
        ({"table": "distilbert-2020", "out": Path("file/x")}, "Not a directory while writing the study: file"),
        ({"recipe": "demo", "np": "1", "out": Path("file")}, "File exists while making the directory of the study: file"),
    ],
)
def test_a_file_for_a_directory_is_the_users_mistake(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=f"^{message}"):
        command(ScaleOptions(**options))


def test_options_have_the_command_lines_defaults() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(cli.scale).parameters.items()}
    assert ScaleOptions(**{**defaults, "overrides": ()}) == ScaleOptions()


def test_what_was_not_recorded_is_said_to_be(tmp_path: Path) -> None:
    one = measured(ONE, run(tmp_path / "1", [1.0, 1.0], 1000))
    two = measured(TWO, run(tmp_path / "2", [1.5, 1.5], 2000, **SEVERAL, exchange_wait_s=0.4))
    lost = losses(two, one)
    assert lost.seconds["imbalance"] is None
    assert lost.seconds["control"] is None
    assert lost.seconds["exposed"] == pytest.approx(0.4)
    assert lost.seconds["compute"] == pytest.approx(0.1)


def test_a_rank_that_is_waited_for_is_no_communication(tmp_path: Path) -> None:
    """Rank 0 waits 0.5 s of each update for rank 1, before gradients leave, and then 0.1 s, as rank 1 does, for them."""
    one = measured(ONE, run(tmp_path / "1", [1.0, 1.0], 1000))
    for device, gradients in (("cpu", 0.1), ("cuda:0", 0.0)):  # a GPU's host waits for no gradients
        fields = {**SEVERAL, "exchange_wait_s": gradients, "rank_worked_s": [1.0, 1.5], "phases": {"exposed": [0.6]}}
        two = measured(TWO, run(tmp_path / device, [1.6, 1.6], 2000, device, **fields))
        lost = losses(two, one)
        assert lost.seconds["exposed"] == pytest.approx(0.1)
        assert lost.seconds["control"] == (None if gradients == 0 else pytest.approx(0.0))
        assert lost.seconds["imbalance"] == pytest.approx(0.25)
        assert two.slowest == (1, 2, 2)
        assert model_point(two, one).samples[0].recorded == pytest.approx((1.25, 0.25, 0.1))
    assert one.slowest is None


def test_the_machine_is_the_runs_and_not_the_launchers(tmp_path: Path) -> None:
    fields = {**SEVERAL, "exchange_wait_s": 0.1, "rank_worked_s": [1.0, 1.0]}
    rounds = [run(tmp_path / str(number), [1.2], 2000, "cuda:0", **fields) for number in range(2)]
    study_of = plan(ranks=(2,), rounds=2)
    values = as_json(study_of, load_recipe("demo"), [measured(TWO, *rounds)], None)
    assert (values["device"]["name"], values["device"]["cores"], values["device"]["memory_bytes"]) == ("A GPU", 64, 7)
    assert (values["points"][0]["device_name"], values["points"][0]["slowest_rank"]) == ("A GPU", 0)
    on_cpu = run(tmp_path / "cpu", [1.2], 2000, **fields)
    crowded = [_measured(TWO, [on_cpu], {}, threads, study_of).oversubscribed for threads in (32, 33)]
    assert crowded == [False, True]  # 2 ranks on its 64 cores


@pytest.mark.parametrize("code", [75, 130])
def test_a_side_run_that_is_stopped_stops_the_study(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_runs, "launch", lambda job: code)
    runner = scale_runs._Runner(plan(), "train", 1)
    with pytest.raises(KeyboardInterrupt):
        runner.side_by_side(ONE, 2, tmp_path)


def test_recorded_phases_and_steps_go_before_what_is_derived(tmp_path: Path) -> None:
    one = measured(ONE, run(tmp_path / "1", [1.0], 1000))
    phases = {"exposed": [0.2], "compression": [0.1], "backward": [0.5]}
    setting = Setting(ranks=2, accumulation=4, mode="weak", compression="int8")
    fields = {**SEVERAL, "exchange_wait_s": 9.0, "step_s": [1.5], "phases": phases}
    two = measured(setting, run(tmp_path / "2", [99.0], 2000, **fields))
    lost = losses(two, one)
    assert (lost.step_s, lost.seconds["exposed"], lost.seconds["compression"]) == pytest.approx((1.5, 0.2, 0.1))


def test_strong_scaling_holds_the_whole_work(tmp_path: Path) -> None:
    """4 micro-batches of one rank, 2 of each of two: T_1 = 1 s, T_2 = 0.625 s, S = 1.6, E = 0.8."""
    one = measured(ONE, run(tmp_path / "1", [1.0], 1000))
    strong = Setting(ranks=2, accumulation=2, mode="strong")
    two = measured(strong, run(tmp_path / "2", [0.625], 1000, **SEVERAL, exchange_wait_s=0.1))
    assert efficiencies(two, one) == pytest.approx([0.8])
    assert losses(two, one).ideal_s == pytest.approx(0.5)


def test_rounds_are_held_against_their_own_baseline(tmp_path: Path) -> None:
    """A machine that slows down by half between rounds changes no efficiency."""
    one = measured(ONE, run(tmp_path / "1a", [1.0], 1000), run(tmp_path / "1b", [2.0], 1000))
    fields = {**SEVERAL, "exchange_wait_s": 0.1}
    two = measured(TWO, run(tmp_path / "2a", [1.25], 2000, **fields), run(tmp_path / "2b", [2.5], 2000, **fields))
    assert efficiencies(two, one) == pytest.approx([0.8, 0.8])


def test_what_the_model_sees(tmp_path: Path) -> None:
    one = measured(ONE, run(tmp_path / "1", [1.0], 1000))
    every = Setting(ranks=2, accumulation=4, mode="weak", sync="every-micro-batch")
    fields = {"buckets": 2, "gradient_collectives": 8, "gradient_bytes": 16000, "exchange_wait_s": 0.3}
    two = measured(every, run(tmp_path / "2", [1.6], 2000, **fields, rank_worked_s=[1.3, 1.1]))
    point = model_point(two, one)
    assert (point.exchanges, point.sent_bytes, point.collectives, point.hops) == (4, 4000, 2, 4)
    (sample,) = point.samples
    assert sample.recorded == pytest.approx((1.2, 0.1, 0.3))
    oversubscribed = measured(TWO, two.rounds[0], oversubscribed=True)
    assert not oversubscribed.modelled
    assert not measured(Setting(ranks=2, compression="powersgd", mode="weak"), two.rounds[0]).modelled


def test_a_run_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raise --steps"):
        run(tmp_path / "short", [], 1000)
    events = tmp_path / "short" / "events.jsonl"
    events.write_text(events.read_text().replace('"updates": 1', '"updates": 5'))
    with pytest.raises(UserError, match=r"wanted logging\.every=1"):
        read_round(load_history(tmp_path / "short"), 0)
    events.write_text("".join(line for line in events.read_text().splitlines(keepends=True) if '"done"' not in line))
    with pytest.raises(UserError, match="did not finish"):
        read_round(load_history(tmp_path / "short"), 0)


def test_the_baseline_is_the_fewest_ranks_or_what_was_asked_for(tmp_path: Path) -> None:
    one = measured(ONE, run(tmp_path / "1", [1.0], 1000))
    int8 = measured(Setting(ranks=2, compression="int8", mode="weak"), run(tmp_path / "2", [1.0], 2000))
    two = measured(TWO, run(tmp_path / "3", [1.0], 2000))
    assert choose_baseline([two, int8, one], None) is one
    assert choose_baseline([two, int8, one], 2) is two
    with pytest.raises(UserError, match=r"measured \[1, 2\]"):
        choose_baseline([one, two], 3)


def plan(**changes: Any) -> Study:
    return Study(recipe="demo", out=Path("unused"), **{"ranks": (1, 2, 4), **changes})


def test_points_of_a_study() -> None:
    both = settings(plan(modes=("weak", "strong")), 8)
    assert [(point.ranks, point.mode, point.accumulation) for point in both] == [
        (1, None, 8),
        (2, "weak", 8),
        (2, "strong", 4),
        (4, "weak", 8),
        (4, "strong", 2),
    ]
    # One rank exchanges nothing: neither rings nor compression make another point of it.
    many = settings(plan(ranks=(1, 2), rings=(1, 4), compression=("none", "int8"), sync=("delayed", "every-micro-batch")), 8)
    assert [point.ranks for point in many] == [1, *[2] * 8]
    for wrong, says in (
        ({"modes": ("strong",)}, r"loop\.accumulation=6 among 4"),
        ({"ranks": (1,), "compression": ("zip",)}, "--compression zip is none of none, auto, fp16"),
        ({"ranks": (1,), "sync": ("never",)}, "--sync never is none of delayed, every-micro-batch"),
    ):
        with pytest.raises(UserError, match=says):
            settings(plan(**wrong), 6)


def test_what_disturbs_an_update_is_not_in_those_that_count() -> None:
    """The run watches memory in the last update of its own warm-up, and traces when it is told to."""
    disturbing = ["profile.trace_steps=[3,5]", "profile.warmup=9", "evaluation.every=3", "checkpoint.every=1"]
    recipe = load_recipe("demo", [*disturbing, *scale_runs._overrides(ONE, plan(steps=6), Path("runs/x"))])
    assert (recipe.profile.warmup, recipe.loop.updates) == (2, 8)
    assert recipe.profile.trace_steps is recipe.evaluation.every is recipe.checkpoint.every is None


# --- the table of 2020


def test_the_2020_table() -> None:
    """Efficiencies from 204 minutes, overheads and bandwidths worked out by hand for 264 MB and 50 micro-batches."""
    table = load_table("distilbert-2020")
    base = default_base(table)
    assert base.minutes == 204
    expected = {
        70: (72.9, 72.2, 73.6, 0.55, 0.18),
        66: (77.3, 76.5, 78.1, 0.70, 0.23),
        37: (68.9, 67.8, 70.0, 0.46, 0.15),
        32: (79.7, 78.3, 81.2, 0.82, 0.27),
    }
    for row in table.rows[3:]:
        share, low, high, quick, slow = expected[int(row.minutes)]
        estimate = efficiency(table, row, base)
        assert [round(100 * value, 1) for value in (estimate.value, estimate.low, estimate.high)] == [share, low, high]
        for seconds, bandwidth in ((0.05, quick), (0.15, slow)):
            bandwidth_range = explaining_bandwidth(table, row, base, seconds)
            assert bandwidth_range is not None
            assert round(bandwidth_range.value / 1e9, 2) == bandwidth
            assert bandwidth_range.low < bandwidth_range.value < bandwidth_range.high


def test_the_2020_table_from_both_rows() -> None:
    table = load_table("distilbert-2020")
    assert study(table, None) == study(table, 2)  # both without being asked
    grid, plot, values = study(table, None)
    text = "\n".join(grid.notes)
    assert "157% of linear" in text
    assert "not both identifiable" in text
    assert "rank 1 of 2" in text
    last = grid.rows[-1]
    assert last["% of linear from row 2"].startswith("157.0 (")
    assert last["% of linear from row 3"] == "79.7 (78.3 to 81.2)"
    names = [name for _, name in plot.legend]
    assert names == ["the table, rings: 1", "the table, rings: several", "linear from row 2", "linear from row 3"]
    rows = values["rows"]
    assert isinstance(rows, list)
    assert rows[-1]["efficiency"][3]["value"] == pytest.approx(0.797, abs=5e-4)
    with pytest.raises(UserError, match="rows 1 to 7"):
        study(table, 8)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows: [{gpus: 8, minutes: 10}, {gpus: 8, minutes: 9}]", "same number of GPUs"),
        ("rows: [{gpus: 8, minutes: 10}, {gpus: 0, minutes: 9}]", "rows.1.gpus"),
        ("lines: []", "rows"),
        ("rounding: 2\nrows: [{gpus: 8, minutes: 10}, {gpus: 64, minutes: 2}]", "wanted more than rounding, 2"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_table(str(tmp_path / "t.yaml"))


def test_the_plots_bars_are_as_wide_as_the_rounding(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("rounding: 2\nrows: [{gpus: 8, minutes: 20}, {gpus: 16, minutes: 10}]")
    _, plot, _ = study(load_table(str(tmp_path / "t.yaml")), None)
    assert "2.000 (range: 1.667 to 2.500)" in plot.chart  # 20 / 10, 20 / 12, 20 / 8


# --- the plot


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_plot_marks_predictions_and_lies_where_the_numbers_are() -> None:
    solid = ScaleCurve(name="measured: weak", points=((1, 1, 1, 1), (2, 1.8, 1.7, 1.9), (4, 3.0, 2.9, 3.1)))
    hollow = ScaleCurve(name="predicted: p3dn", points=((64, 40, 30, 50),), predicted=True)
    plot = figure([solid, hollow], {"linear": (1, 1)}, "ranks", "speed")
    assert [("predicted" in swatch, name) for swatch, name in plot.legend] == [
        (False, "measured: weak"),
        (True, "predicted: p3dn"),
        (False, "linear"),
    ]
    elements = _Elements()
    elements.feed(plot.chart)
    classes = [values["class"] for tag, values in elements.found if tag == "path"]
    assert [name for name in classes if name and name.startswith("line")] == ["line s0", "line s1 predicted", "line s2"]
    dots = [values for tag, values in elements.found if tag == "circle"]
    assert [dot["class"] for dot in dots] == ["dot s0"] * 3 + ["dot s1 predicted"] + ["dot s2"] * 2
    x, y = ([float(dot[name] or 0) for dot in dots] for name in ("cx", "cy"))
    # The first point is on the ideal line; a doubling of ranks is as wide everywhere, and 1.8 of it lies below.
    assert (x[0], y[0]) == (x[4], y[4])
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert x[3] - x[2] == pytest.approx(4 * (x[1] - x[0]), abs=0.4)
    assert x[5] == x[3]
    slope = (y[5] - y[4]) / (x[5] - x[4])
    assert y[1] > y[4] + slope * (x[1] - x[4])


def test_the_page_works_offline_in_light_and_dark() -> None:
    grid = Grid(title="PREDICTED <b>", rows=[{"a": "1 < 2", "b": "x"}], predicted=True)
    text = page("Scaling of x & y", ScalePlot("<svg></svg>", ()), [grid])
    assert "://" not in text
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert '<table class="predicted">' in text
    assert "1 &lt; 2" in text
    assert "PREDICTED &lt;b&gt;" in text
