"""Reports of several runs: side by side, and what is judged of their differences."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fastdistil.errors import UserError
from fastdistil.profiling.report import report
from fastdistil.profiling.report.key_figures import Figure
from tests.event_streams import write_events
from tests.profiling.known_run import RECIPE, known_events
from tests.profiling.parsed_page import charts_of, check_page, page_of


def test_several_runs_stand_side_by_side(runs: Mapping[str, Path]) -> None:
    page = page_of(runs["gpu"], runs["faster"], runs["cpu"])
    check_page(page)
    document = json.loads(report.json_text(report.read_runs([runs["gpu"], runs["faster"]])))
    one, other = (run["figures"]["speed.step_p50_s"]["value"] for run in document["runs"])
    (difference,) = document["differences"]
    assert (difference["run"], difference["baseline"]) == ("faster", "gpu")
    assert difference["relative"]["speed.step_p50_s"] == pytest.approx(other / one - 1)
    judged = difference["judged"]["speed.step_p50_s"]
    assert (judged["verdict"], judged["n"]) == ("better", [597, 597])
    assert judged["interval"][0] < other / one - 1 < judged["interval"][1] < 0
    assert "speed.step_p99_s" not in difference["judged"]
    assert document["uneven"] == ["The runs differ in ranks: 2, 4."]
    row = next(row for row in page.rows if row and row[0].startswith("step, p50"))
    assert re.match(rf"{other / one - 1:+.1%}better", row[3])
    loss = next(chart for chart in charts_of(page.html) if (chart.get("aria-label") or "").startswith("Loss: total"))
    lines = [path.get("class") for path in loss.iter("path") if "line" in (path.get("class") or "").split()]
    assert lines == ["line s0", "line s1", "line s2"]
    assert "The runs differ in ranks: 2, 4, 1." in page.text
    assert "The runs differ in device: NVIDIA H200, Intel(R) Xeon(R) Platinum 8480C." in page.text
    assert page.row("optim.lr")[1:] == ["0.0005", "0.0001", "0.0005"]
    assert "Not recorded in cpu." in page.text


def test_a_difference_within_two_standard_errors_is_no_verdict(tmp_path: Path) -> None:
    events = known_events()
    one = write_events(tmp_path / "one", events, RECIPE)
    moved = [{**event, "loss": event["loss"] + 0.2} if event["event"] == "evaluation" else event for event in events]
    far = [{**event, "loss": event["loss"] + 0.4} if event["event"] == "evaluation" else event for event in events]
    near_page = page_of(one, write_events(tmp_path / "near", moved, RECIPE))
    far_page = page_of(one, write_events(tmp_path / "far", far, RECIPE))
    verdicts = [
        next(row for row in page.rows if row[0].startswith("held-out loss, final"))[3] for page in (near_page, far_page)
    ]
    assert verdicts == ["+10.0%within noise", "+20.0%worse"]  # the error of the difference is 0.14
    runs = report.read_runs([one, tmp_path / "far"])
    assert "| +20.0% worse (+5.9% to +34.1%) |" in report.as_markdown(runs)
    judged = report.figures_json(runs)["differences"][0]["judged"]["learning.final_heldout_loss"]
    error = math.sqrt(2) * 0.1 * 2 / 2.0  # twice that of the difference, over the baseline's loss of 2
    assert judged["interval"] == pytest.approx((0.2 - error, 0.2 + error))
    assert (judged["verdict"], judged["n"]) == ("worse", (400, 400))


def test_a_verdict_is_not_of_other_samples_than_its_number() -> None:
    """3000 slow steps and 2000 quick ones: the number is of all, 20% more than the baseline's; the interval is not."""
    random = np.random.default_rng(0)
    noise = (1 + random.normal(0, 0.01, 5000)).tolist()

    def step(*seconds: float) -> Figure:
        samples = [factor * base for factor, base in zip(noise, np.repeat(seconds, 5000 // len(seconds)), strict=True)]
        return Figure("a", "a", float(np.mean(samples)), "s", samples=samples, better="lower")

    steady = step(1.0)
    mixed = step(1.4, 1.4, 1.4, 0.9, 0.9)
    judged = report.judge(mixed, steady)
    assert judged.difference == pytest.approx(0.2, abs=0.01)
    assert judged == report.Judgement(judged.difference), "the last 2000 say better"
    level = step(1.4, 1.4, 1.4, 1.0, 1.0)
    judged = report.judge(level, steady)
    assert judged == report.Judgement(judged.difference), "the last 2000 say that it is noise"
    sure = report.judge(step(1.2), steady)
    assert (sure.verdict, sure.n) == ("worse", (2000, 2000))


def test_without_a_spread_there_is_no_verdict(runs: Mapping[str, Path], tmp_path: Path) -> None:
    """A 99th percentile has none, and five steps say too little."""
    page = page_of(runs["gpu"], runs["faster"])
    verdicts = {label: page.begins(label)[3] for label in ("throughput", "step, mean", "step, p99")}
    assert verdicts["throughput"].endswith("better") and verdicts["step, mean"].endswith("better")
    assert re.fullmatch(r"[-+][\d.]+%", verdicts["step, p99"])
    few = [{**event, "step_s": [2.0, 2.0]} if event["event"] == "train" else event for event in known_events()]
    pair = page_of(
        write_events(tmp_path / "a", known_events(), RECIPE),
        write_events(tmp_path / "b", few, RECIPE),
    )
    assert re.fullmatch(r"[-+][\d.]+%", pair.begins("step, mean")[3])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_events(tmp_path / folder / "student", known_events(), RECIPE) for folder in ("a", "b")]
    assert [run.name for run in report.read_runs(paths)] == [str(path) for path in paths]
    with pytest.raises(UserError, match="given twice"):
        report.read_runs([paths[0], paths[0]])
    with pytest.raises(UserError, match="no run to report"):
        report.read_runs([])
    with pytest.raises(UserError, match="is no run"):
        report.read_runs([tmp_path])
