"""The report's figures against values computed by hand, as page, Markdown and JSON have them; and the command."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastdistil.cli import app
from fastdistil.errors import UserError
from fastdistil.profiling.flops import Work
from fastdistil.profiling.peaks import utilisation
from fastdistil.profiling.report import report
from tests.event_streams import BEGUN, GIB, write_events
from tests.profiling.known_run import RECIPE, known_events
from tests.profiling.parsed_page import Page, charts_of, check_page, figures_of, page_of

KNOWN: dict[str, float] = {
    "run.updates": 6,
    "run.tokens": 600,
    "run.wall_s": 101.0,
    "run.evaluation_s": 5.0,
    "run.tokens_per_update": 100.0,
    "speed.tokens_per_s": 400 / (200 / 50 + 200 / 100),  # behind the line that warmed up
    # measured steps: 2, 1, 3, 1, 1
    "speed.step_mean_s": 8 / 5,
    "speed.step_p50_s": 1.0,
    "speed.step_p95_s": 2 + 0.8,  # 0.95 of the way along 1, 1, 1, 2, 3 is 3.8
    "speed.step_p99_s": 2 + 0.96,
    "speed.mfu_student": (0.2 * 4 + 0.5 * 2) / 6,
    "step.data_s": 0.25 * 8 / 5,
    "step.backward_s": 0.5 * 8 / 5,
    "step.other_s": 0.25 * 8 / 5,
    "step.backward_share": 0.5,
    "learning.total": 5.0,
    "learning.skipped": 0,
    "learning.final_heldout_loss": 2.0,
    "learning.best_heldout_loss": 1.0,
    "learning.final_perplexity": math.e**2,
    "memory.peak_allocated_bytes": 4 * GIB,
    "memory.fragmented_bytes": GIB // 2,
    "memory.parts.activations_and_logits": 4 * GIB,
    "memory.peak_bytes": 4 * GIB,
    "device.utilisation": (0.2 * 4 + 0.5 * 2) / 6,
    "device.j_per_update": 150 / 4,
    "device.j_per_million_tokens": 150 / 200 * 1e6,
    "communication.gradient_bytes": 6000 / 4,
    "communication.ring_0_bytes": 4500 / 4,
    "communication.ring_1_bytes": 1500 / 4,
    "communication.control_bytes": 120 / 4,
    "communication.control_messages": 12 / 4,
    "communication.wait_s": 0.6 / 4,
    "communication.imbalance_time": 0.2,
    "communication.straggler_share": 6 / 5 - 1,  # the ranks worked 4 and 6 s
}


def test_every_figure_is_what_its_events_say(known_run: Path) -> None:
    (figures,) = figures_of(known_run)
    values = {key: figures[key]["value"] for key in KNOWN}
    assert values == pytest.approx(KNOWN)


def test_figures_have_unit_spread_and_count(known_run: Path) -> None:
    (figures,) = figures_of(known_run)
    rate, mean, loss, perplexity = (
        figures[key]
        for key in (
            "speed.tokens_per_s",
            "speed.step_mean_s",
            "learning.final_heldout_loss",
            "learning.final_perplexity",
        )
    )
    assert (rate["unit"], rate["n"], rate["of"]) == ("tokens/s", 2, "log lines")
    assert rate["spread"] == pytest.approx(50 / math.sqrt(2))  # of 50 and 100
    assert (mean["unit"], mean["n"], mean["spread_kind"]) == ("s", 5, "sd")
    assert mean["spread"] == pytest.approx(math.sqrt(3.2 / 4))  # squared distances from 1.6 add up to 3.2
    assert (loss["unit"], loss["spread"], loss["spread_kind"], loss["n"], loss["of"]) == (
        "nats",
        0.1,
        "se",
        400,
        "labels",
    )
    assert perplexity["spread"] == pytest.approx(0.1 * math.e**2)
    assert "rank 1, the slowest in 2 of 2" in figures["communication.straggler_share"]["detail"]
    assert "2.000 GiB (-50.0%)" in figures["memory.peak_bytes"]["detail"]
    assert figures["speed.mfu_student"]["detail"] == "of 1.000 TFLOP/s (measured, bf16)"
    assert all(re.search(r"\w", figure["label"]) for figure in figures.values())


def test_the_page_prints_the_figures(known_run: Path) -> None:
    page = page_of(known_run)
    assert page.row("throughput")[1:4] == ["66.67 tokens/s", "± 35 tokens/s sd", "2 log lines"]
    assert page.row("step, mean")[1:4] == ["1.600 s", "± 894 ms sd", "5 updates"]
    assert page.row("step, p95")[1] == "2.800 s"
    assert page.row("gradient bytes an update")[1] == "1.465 KiB/update"
    assert page.row("backward")[1::2] == ["50.0%", "800.0 ms", "500.0 ms", "1.480 s"]
    assert page.row("held-out loss, final")[1:4] == ["2.000 nats", "± 0.10 nats se", "400 labels"]
    assert page.row("energy an update")[1] == "37.50 J"
    assert page.row("peak allocated")[1] == "4.000 GiB"
    assert "bert-base-uncased distilled into distilbert: 6 of 6 updates in 1 min 41 s." in page.text
    assert "2 ranks, 50 tokens \N{MULTIPLICATION SIGN} 1 micro-batches" in page.text
    assert "look here" in page.text
    assert page.begins("evaluations, in all2: p50 2.500 s")[1] == "5.000 s"
    assert "5 updates measured, 1 of warm-up left out" in page.text


def test_the_bottleneck_comes_with_its_recipe_key(known_run: Path) -> None:
    """No kernel runs 70% of the time; a quarter of each step waits for data."""
    runs = report.read_runs([known_run])
    assert "Bottleneck: launch-bound -> loop.compile" in Page(report.as_html(runs)).text
    assert "| bottleneck | launch-bound -\\> loop.compile |" in report.as_markdown(runs)
    (run,) = report.figures_json(runs)["runs"]
    assert (run["bottleneck"]["name"], run["bottleneck"]["key"]) == ("launch-bound", "loop.compile")
    assert run["bottleneck"]["why"].startswith("no kernel runs 70% of the time, 25% of it in waits for data")


def test_a_power_cap_is_no_caution(runs: Mapping[str, Path], tmp_path: Path) -> None:
    def cautions(**throttled: float) -> str:
        events = [{**event, "device": {"samples": 10, "throttled": throttled}} for event in known_events()[2:4]]
        (run,) = report.read_runs(
            [write_events(tmp_path / "-".join(throttled), [known_events()[0], *events], RECIPE)],
        )
        return " ".join(report.cautions(run))

    assert "slowed itself down: hw thermal slowdown in 50.0% of the samples" in cautions(
        hw_thermal_slowdown=0.5,
    )
    assert "slowed" not in cautions(sw_power_cap=1.0)


def test_the_trace_shows_its_kernels(known_run: Path) -> None:
    page = page_of(known_run)
    assert "What took the most time in updates 4 to 5" in Page(page.section("step")).text
    assert page.row("gemm<T>")[1:] == ["1,200", "750.0 ms", "75.0%"]
    markdown = report.as_markdown(report.read_runs([known_run]))
    assert "| gemm\\<T\\> | 1,200 | 750.0 ms | 75.0% |" in markdown
    (run,) = json.loads(report.json_text(report.read_runs([known_run])))["runs"]
    assert run["trace"]["kernels"][0]["ms"] == 750.0


def test_mfu_above_one_is_refused_with_the_reason(tmp_path: Path) -> None:
    refused = utilisation(Work(student=1.4e12), 1.0, 1e12, "measured, bf16")  # as a run writes it
    events = [{**event, "mfu": refused} if "mfu" in event else event for event in known_events()]
    page = page_of(write_events(tmp_path / "run", events, RECIPE))
    row = page.row("MFU, student")
    assert row[1] == "refused"
    assert "140% of 1 TFLOP/s" in row[4]
    assert "MFU is refused: in 2 of 2 log lines: 140% of 1 TFLOP/s (measured, bf16) is more than there is" in page.text
    assert not [chart for chart in charts_of(page.html) if (chart.get("aria-label") or "").startswith("MFU")]


def test_a_run_that_was_continued_otherwise_says_so(tmp_path: Path) -> None:
    first, a, b, c = known_events()[:4]
    resume = {**first, "event": "resume", "update": 2, "ranks": 1, "time": BEGUN + 60}
    times = {"time": BEGUN + 70}
    run = write_events(
        tmp_path / "run",
        [first, {**a, "time": BEGUN + 10}, resume, {**b, **times}, {**c, **times}],
        RECIPE,
    )
    page = page_of(run)
    assert "1 of 3 log lines ran otherwise" in page.text
    assert "The run did not end: open: running, or it died." in page.text
    (figures,) = figures_of(run)
    assert figures["run.wall_s"]["value"] == pytest.approx(
        10 + 10,
    )  # the 50 s between the attempts are left out
    assert figures["run.ranks"]["value"] == "1"


def test_values_that_were_not_finite_are_left_blank(tmp_path: Path) -> None:
    events = known_events()
    events[2] = {**events[2], "total": "nan", "grad_norm": "inf", "lr": "-inf"}
    events[3] = {**events[3], "total": "nan", "soft": "inf"}
    run = write_events(tmp_path / "run", events, RECIPE)
    page = page_of(run)
    check_page(page)
    assert page.row("soft loss")[1] == "not finite"
    (figures,) = figures_of(run)
    assert figures["learning.soft"]["value"] is None
    assert "Values that are not finite or not recorded: 3, left blank." in page.text


def test_markdown_has_the_same_figures(known_run: Path, tmp_path: Path) -> None:
    text = report.as_markdown(report.read_runs([known_run]))
    assert "| throughput | 66.67 tokens/s | ± 35 tokens/s sd | 2 log lines | all ranks; all tokens over all time |" in text
    other = write_events(tmp_path / "other", known_events(), RECIPE)
    both = report.as_markdown(report.read_runs([known_run, other]))
    assert "| step, p50 | 1.000 s, 5 updates | 1.000 s, 5 updates | same |" in both
    for document in (text, both):
        for table in re.findall(r"(?:^\|.*\n)+", document, re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(widths) == 1, table


def test_the_command_writes_where_it_is_told(
    known_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    other = write_events(tmp_path / "other", known_events(), RECIPE)
    assert run.invoke(app, ["report", str(known_run)]).exit_code == 0
    assert "known" in (known_run / "report.html").read_text(encoding="utf-8")
    assert run.invoke(app, ["report", str(known_run), str(other)]).exit_code == 0
    assert "against" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run.invoke(app, ["report", str(known_run), "--out", "new/page.html"]).exit_code == 0
    assert (tmp_path / "new" / "page.html").is_file()
    printed = run.invoke(app, ["report", str(known_run), "--json"]).stdout
    assert json.loads(printed)["runs"][0]["figures"]["speed.step_p50_s"]["value"] == 1.0
    assert run.invoke(app, ["report", str(known_run), "--markdown"]).stdout.startswith("# known\n")
    assert run.invoke(app, ["report", str(known_run), "--markdown", "--out", "page.md"]).exit_code == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8").startswith("# known\n")
    both = run.invoke(app, ["report", str(known_run), "--markdown", "--json"])
    assert isinstance(both.exception, UserError)
    blocked = run.invoke(app, ["report", str(known_run), "--out", str(tmp_path)])
    assert isinstance(blocked.exception, UserError)
    assert "--out" in str(blocked.exception)
