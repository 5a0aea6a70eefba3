"""The report's figures against values computed by hand, and its page against what a browser and a reader need."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from fastdistil.cli import app
from fastdistil.errors import UserError
from fastdistil.profiling.flops import Work
from fastdistil.profiling.peaks import utilisation
from fastdistil.profiling.report import report
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.key_figures import Figure
from fastdistil.profiling.report.summary import summarise
from tests.event_streams import BEGUN, GIB, Stream, write_events, write_run

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}
RECIPE = {
    "teacher": {"path": "bert-base-uncased"},
    "student": {"architecture": "distilbert"},
    "data": {"train": "corpus/", "micro_batch_tokens": 50},
    "loop": {"accumulation": 1},
}
START = {
    "event": "start", "update": 0, "updates": 6, "engine": "torch", "ranks": 2, "nodes": 1, "rings": 2, "sync": "delayed",
    "compression": "none", "device": "cuda:0", "threads": 1, "torch": "2.13.0", "precision": "bf16", "kernels": "triton",
    "student_parameters": 1000, "teacher_parameters": 3000,
}  # fmt: skip


def line(update: int, rate: float, step_s: list[float], **fields: Any) -> dict[str, Any]:
    """A log line of 200 tokens, half of them rank 0's."""
    shares = {"data": 0.25, "backward": 0.5}
    return {
        "event": "train", "update": update, "updates": 2, "skipped": 0, "tokens": 200, "tokens_per_s": rate, "step_s": step_s,
        "phases": {name: [share * value for value in step_s] for name, share in shares.items()},
        "rank_tokens": [100, 100], "lr": 1e-4, "grad_norm": 1.0, "grad_norm_max": 2.0, **fields,
    }  # fmt: skip


KERNELS = [
    {"name": "gemm<T>", "calls": 1200, "ms": 750.0, "share": 0.75},
    {"name": "softmax", "calls": 7, "ms": 250.0, "share": 0.25},
]


def held_out(loss: float) -> dict[str, Any]:
    return {"loss": loss, "loss_se": 0.1, "perplexity": math.exp(loss), "labels": 400}


def known_events() -> list[dict[str, Any]]:
    """Three lines of two updates; the first update is warm-up. Their figures are in KNOWN."""

    def fields(gradient: int, imbalance: float, worked: list[float], gib: int, share: float, joules: float) -> dict[str, Any]:
        return {
            "gradient_bytes": gradient, "ring_bytes": [gradient * 3 // 4, gradient // 4], "control_bytes": gradient // 50,
            "control_messages": 6, "gradient_collectives": 4, "exchange_wait_s": gradient / 1e4, "imbalance_time": imbalance,
            "imbalance_tokens": 0.0, "rank_worked_s": worked,
            "memory": {"peak_allocated_bytes": gib * GIB, "peak_rss_bytes": GIB, "fragmented_bytes": GIB // gib, "retries": 0},
            "device": {"samples": 10, "seconds": 200 / joules, "utilisation": share, "energy_j": joules, "throttled": {}},
            "mfu": {"student": share, "with_teacher": None, "hfu": None, "peak_flops": 1e12, "peak_source": "measured, bf16"},
        }  # fmt: skip

    return [
        {**START, "time": BEGUN},
        line(2, 20.0, [8.0, 2.0], warmup=1, total=9.0, soft=3.0),
        line(4, 50.0, [1.0, 3.0], total=7.0, soft=2.0, **fields(2000, 0.1, [3.0, 3.5], 4, 0.2, 50.0)),
        line(6, 100.0, [1.0, 1.0], total=5.0, soft=1.0, **fields(4000, 0.3, [1.0, 2.5], 2, 0.5, 100.0)),
        {"event": "evaluation", "update": 1, "seconds": 2.0, **held_out(1.0)},
        {"event": "evaluation", "update": 6, "seconds": 3.0, **held_out(2.0)},
        {"event": "memory", "update": 2, "time": BEGUN + 90, "peak_bytes": 4 * GIB,
         "parts": {"activations_and_logits": 4 * GIB}, "estimate": {"logits": GIB, "activations": GIB}},
        {"event": "trace", "update": 6, "first": 4, "last": 5, "kernels": KERNELS},
        {"event": "note", "update": 6, "time": BEGUN + 100, "message": "look here"},
        {"event": "done", "update": 6, "time": BEGUN + 101},
    ]  # fmt: skip


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


@pytest.fixture
def known_run(tmp_path: Path) -> Path:
    return write_events(tmp_path / "known", known_events(), RECIPE)


class Page(HTMLParser):
    """Parses a page; `rows`: the cells of each table row, `text`: what a reader sees, `tags`: all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.seen: list[str] = []
        self.html = html
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, text: str) -> None:
        if "style" in self.open:
            return
        self.seen.append(text)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    def section(self, key: str) -> str:
        match = re.search(rf'<section id="{key}">.*?</section>', self.html, re.DOTALL)
        assert match
        return match[0]

    def begins(self, label: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].startswith(label))

    def row(self, label: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == label)


def page_of(*runs: Path) -> Page:
    return Page(report.as_html(report.read_runs(runs)))


def charts_of(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def figures_of(*runs: Path) -> list[dict[str, Any]]:
    return [run["figures"] for run in json.loads(report.json_text(report.read_runs(runs)))["runs"]]


def test_every_figure_is_what_its_events_say(known_run: Path) -> None:
    (figures,) = figures_of(known_run)
    values = {key: figures[key]["value"] for key in KNOWN}
    assert values == pytest.approx(KNOWN)


def test_figures_have_unit_spread_and_count(known_run: Path) -> None:
    (figures,) = figures_of(known_run)
    rate, mean, loss, perplexity = (
        figures[key]
        for key in ("speed.tokens_per_s", "speed.step_mean_s", "learning.final_heldout_loss", "learning.final_perplexity")
    )
    assert (rate["unit"], rate["n"], rate["of"]) == ("tokens/s", 2, "log lines")
    assert rate["spread"] == pytest.approx(50 / math.sqrt(2))  # of 50 and 100
    assert (mean["unit"], mean["n"], mean["spread_kind"]) == ("s", 5, "sd")
    assert mean["spread"] == pytest.approx(math.sqrt(3.2 / 4))  # squared distances from 1.6 add up to 3.2
    assert (loss["unit"], loss["spread"], loss["spread_kind"], loss["n"], loss["of"]) == ("nats", 0.1, "se", 400, "labels")
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


def test_curves_hold_every_line_and_step(known_run: Path) -> None:
    page = page_of(known_run)
    titles = [element.text or "" for chart in charts_of(page.html) for element in chart.iter("title")]
    assert "update 4\ntotal: 7.000\nsoft: 2.000" in titles
    assert "update 2\nstep: 2.000 s" in titles
    assert not any(text.startswith("update 1\nstep") for text in titles)  # warm-up
    assert "update 4\ngradients: 1,000 B/update\ncontrol: 20.00 B/update" in titles
    assert "rank 1: 1.500 s" in titles
    assert "update 1\nperplexity: 2.718 (± one standard error: 2.460 to 3.004)" in titles


def test_other_is_what_no_phase_took(known_run: Path) -> None:
    titles = [element.text or "" for chart in charts_of(page_of(known_run).section("step")) for element in chart.iter("title")]
    assert "update 4\nother: 750.0 ms\nbackward: 1.500 s\ndata: 750.0 ms" in titles


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "gpu": write_run(folder / "gpu"),
        "faster": write_run(folder / "faster", Stream(speed=1.25, ranks=4, seed=3), {"optim": {"lr": 1e-4}}),
        "cpu": write_run(folder / "cpu", Stream(gpu=False, ranks=1, lines=12)),
        "old": write_run(folder / "old", Stream(old=True)),
        "short": write_run(folder / "short", Stream(lines=1, every=1, outcome=None)),
        "empty": write_events(folder / "empty", []),
    }


@pytest.mark.parametrize("name", ["gpu", "faster", "cpu", "old", "short", "empty"])
def test_pages_are_well_formed_self_contained_and_without_non_numbers(runs: Mapping[str, Path], name: str) -> None:
    check_page(page_of(runs[name]))


def check_page(page: Page) -> None:
    assert page.html.startswith("<!doctype html>") or page.html.lstrip().startswith("<!doctype html>")
    for chart in charts_of(page.html):
        if chart.get("class") == "chart":
            assert chart.get("role") == "img"
            assert chart.get("aria-label")
    assert not re.search(r"\b(nan|None|inf|Infinity|undefined|Markup)\b", page.text)
    for number in re.findall(r'(?:x|y|width|height|d|viewBox|points)="([^"]*)"', page.html):
        assert not re.search(r"nan|inf|None|e[+-]", number), number
    assert "://" not in page.html
    assert "url(" not in page.html
    assert "@import" not in page.html
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "srcset", "action", "background")]
    assert all(value.startswith("#") for name, value in attributes if name == "href")
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in attributes if name == "href"} <= set(ids)


def test_without_recorded_data_a_section_is_one_line(runs: Mapping[str, Path]) -> None:
    page = page_of(runs["old"])
    assert not charts_of(page.section("device"))
    assert "not recorded" in page.section("device")
    step = Page(page.section("step"))
    assert "Step times: not recorded." in page.text
    assert step.text == "Where a step goes Where a step goes: not recorded."
    assert "<table" not in page.section("step")
    for title in ("Step time", "Step-time distribution", "MFU"):
        assert re.search(rf"{title}\b[^.]*: not recorded\.", page.text), title
    assert charts_of(page.section("learning"))
    assert charts_of(page.section("communication"))
    empty = page_of(runs["empty"])
    assert not [chart for chart in charts_of(empty.html) if chart.get("class") == "chart"]
    assert "Learning: not recorded." in empty.text


def test_of_a_run_within_its_warm_up_there_are_curves_and_no_figures_of_speed(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", Stream(lines=1, every=3)))
    assert "All that was recorded is warm-up" in page.text
    assert [chart for chart in charts_of(page.section("speed")) if (chart.get("aria-label") or "").startswith("Throughput")]
    missing = Page(page.section("speed")).text.rpartition("Step time")[2]
    assert "step, p50" in missing
    assert "throughput" not in missing


def test_one_rank_has_no_communication(runs: Mapping[str, Path]) -> None:
    section = Page(page_of(runs["cpu"]).section("communication"))
    assert section.row("communication")[1] == "none: one rank"
    assert "not recorded" not in section.text


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
    pair = page_of(write_events(tmp_path / "a", known_events(), RECIPE), write_events(tmp_path / "b", few, RECIPE))
    assert re.fullmatch(r"[-+][\d.]+%", pair.begins("step, mean")[3])


def test_a_power_cap_is_no_caution(runs: Mapping[str, Path], tmp_path: Path) -> None:
    def cautions(**throttled: float) -> str:
        events = [{**event, "device": {"samples": 10, "throttled": throttled}} for event in known_events()[2:4]]
        (run,) = report.read_runs([write_events(tmp_path / "-".join(throttled), [known_events()[0], *events], RECIPE)])
        return " ".join(report.cautions(run))

    assert "slowed itself down: hw thermal slowdown in 50.0% of the samples" in cautions(hw_thermal_slowdown=0.5)
    assert "slowed" not in cautions(sw_power_cap=1.0)


def test_never_throttled_is_said_where_somebody_looked(runs: Mapping[str, Path], known_run: Path) -> None:
    assert page_of(known_run).row("throttled")[1:4:2] == ["never", ""]
    page = page_of(runs["cpu"])
    assert not [row for row in page.rows if row and row[0] == "throttled"]
    assert re.search(r"\bthrottled\b[^.]*: not recorded\.", Page(page.section("device")).text)


def test_the_trace_shows_its_kernels(known_run: Path) -> None:
    page = page_of(known_run)
    assert "What took the most time in updates 4 to 5" in Page(page.section("step")).text
    assert page.row("gemm<T>")[1:] == ["1,200", "750.0 ms", "75.0%"]
    markdown = report.as_markdown(report.read_runs([known_run]))
    assert "| gemm\\<T\\> | 1,200 | 750.0 ms | 75.0% |" in markdown
    (run,) = json.loads(report.json_text(report.read_runs([known_run])))["runs"]
    assert run["trace"]["kernels"][0]["ms"] == 750.0


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_events(tmp_path / folder / "student", known_events(), RECIPE) for folder in ("a", "b")]
    assert [run.name for run in report.read_runs(paths)] == [str(path) for path in paths]
    with pytest.raises(UserError, match="given twice"):
        report.read_runs([paths[0], paths[0]])
    with pytest.raises(UserError, match="no run to report"):
        report.read_runs([])
    with pytest.raises(UserError, match="is no run"):
        report.read_runs([tmp_path])


HOSTILE = """</pre><script>alert(1)</script><img src=x onerror='alert(1)'>"`|*&amp;"""


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)<img src=x onerror=alert(1)>\"'&|`*\x1b[31m"
    recipe = {**RECIPE, "teacher": {"path": HOSTILE}, HOSTILE: HOSTILE}
    environment = {"event": "environment", "processor": HOSTILE, "versions": {HOSTILE: HOSTILE}, "devices": [{"name": HOSTILE}]}
    environment["peaks"] = {"flops": {HOSTILE: 1e12}}
    first, *later = known_events()
    hostile = [{**event, "device": {"utilisation": 1.0, "throttled": {HOSTILE: 0.5}, "samples": 4}} for event in later[:3]]
    events = [{**first, "precision": HOSTILE}, environment, *hostile, *later[3:], {"event": "note", "message": HOSTILE}]
    one = write_events(tmp_path / name, events, recipe)
    two = write_events(tmp_path / "two", events, RECIPE)
    for page in (page_of(one), page_of(one, two)):
        check_page(page)
        assert "<script>alert(1)" in page.text
        assert "\x1b" not in page.html
    markdown = report.as_markdown(report.read_runs([one]))
    assert not re.search(r"(?<!\\)<", markdown)
    assert json.loads(report.json_text(report.read_runs([one])))["runs"][0]["recipe"][HOSTILE] == HOSTILE


SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"


def test_secrets_are_redacted_and_the_surroundings_stay_out(tmp_path: Path) -> None:
    recipe = {
        **RECIPE,
        "hub": {
            "token": "s3cr3t-a",
            "api_key": "s3cr3t-b",
            "accessToken": "s3cr3t-c",
            "password": ["s3cr3t-d"],
            "HF_TOKEN": "s3cr3t-e",
        },
        "data": {
            "train": "https://me:s3cr3t-f@example.org/corpus",
            "micro_batch_tokens": 2560,
            "tokenizer": "bert-base-uncased",
        },
        "remark": f"use {SECRET}",
    }
    environment = {
        "event": "environment", "host": "node-s3cr3t", "user": "s3cr3t", "env": {"AWS_SECRET": "s3cr3t"},
        "versions": {"python": "3.11.9"},
    }  # fmt: skip
    environment["devices"] = [{"rank": rank, "name": "NVIDIA H200", "uuid": "GPU-s3cr3t", "host": "s3cr3t"} for rank in (0, 1)]
    note = {"event": "note", "message": f"downloading with {SECRET}"}
    slow = line(2, 100.0, [1.0, 1.0], rank_worked_s=[0.5, 2.5])
    run = write_events(tmp_path / "run", [known_events()[0], environment, note, slow], recipe)
    assert "rank 1 on s3cr3t works" in summarise(load_history(run))["bottleneck"]["why"]
    runs = report.read_runs([run])
    for text in (report.as_html(runs), report.as_markdown(runs), report.json_text(runs)):
        assert "s3cr3t" not in text
        assert SECRET not in text
    html = report.as_html(runs)
    for excerpt in ("micro_batch_tokens: 2560", "tokenizer: bert-base-uncased", "NVIDIA H200", "3.11.9", "[redacted]"):
        assert excerpt in html


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
    run = write_events(tmp_path / "run", [first, {**a, "time": BEGUN + 10}, resume, {**b, **times}, {**c, **times}], RECIPE)
    page = page_of(run)
    assert "1 of 3 log lines ran otherwise" in page.text
    assert "The run did not end: open: running, or it died." in page.text
    (figures,) = figures_of(run)
    assert figures["run.wall_s"]["value"] == pytest.approx(10 + 10)  # the 50 s between the attempts are left out
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


def test_equal_runs_give_equal_bytes(runs: Mapping[str, Path]) -> None:
    """In two processes, whose sets have other orders."""
    program = (
        "import sys; from pathlib import Path; from fastdistil.profiling.report import report\n"
        "sys.stdout.write(report.as_html(report.read_runs([Path(sys.argv[1])])))"
    )
    pages = []
    for seed in ("0", "1"):
        environ = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, str(runs["gpu"])]
        pages.append(subprocess.run(command, env=environ, capture_output=True, check=True).stdout)
    assert len(pages[0]) > 10_000
    assert pages[0] == pages[1]


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


def test_the_command_writes_where_it_is_told(known_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.slow
def test_a_run_of_ten_thousand_lines_is_below_a_megabyte(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", Stream(lines=10_000, ranks=8))
    report.write_report([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2**20
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    check_page(page)
    assert "10,000 values in some" in page.text
    assert "99,997 values in some" in page.text  # steps


def luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_dark() -> None:
    source = (Path(report.__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", source, re.DOTALL)[:2]
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for ground in ("page", "surface"):
            for text in ("ink", "muted", "good", "bad", "warn", *(f"s{style}" for style in range(8))):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
