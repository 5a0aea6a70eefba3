"""The report's page, as its source has it: well-formed, self-contained, complete, legible, and safe with any text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastdistil.profiling.report import report
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.summary import summarise
from tests.event_streams import Stream, write_events, write_run
from tests.profiling.known_run import RECIPE, known_events, line
from tests.profiling.parsed_page import Page, charts_of, check_page, page_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["gpu", "faster", "cpu", "old", "short", "empty"])
def test_pages_are_well_formed_self_contained_and_without_non_numbers(
    runs: Mapping[str, Path],
    name: str,
) -> None:
    check_page(page_of(runs[name]))


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


def test_never_throttled_is_said_where_somebody_looked(runs: Mapping[str, Path], known_run: Path) -> None:
    assert page_of(known_run).row("throttled")[1:4:2] == ["never", ""]
    page = page_of(runs["cpu"])
    assert not [row for row in page.rows if row and row[0] == "throttled"]
    assert re.search(r"\bthrottled\b[^.]*: not recorded\.", Page(page.section("device")).text)


HOSTILE = """</pre><script>alert(1)</script><img src=x onerror='alert(1)'>"`|*&amp;"""


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)<img src=x onerror=alert(1)>\"'&|`*\x1b[31m"
    recipe = {**RECIPE, "teacher": {"path": HOSTILE}, HOSTILE: HOSTILE}
    environment = {
        "event": "environment",
        "processor": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "devices": [{"name": HOSTILE}],
    }
    environment["peaks"] = {"flops": {HOSTILE: 1e12}}
    first, *later = known_events()
    hostile = [{**event, "device": {"utilisation": 1.0, "throttled": {HOSTILE: 0.5}, "samples": 4}} for event in later[:3]]
    events = [
        {**first, "precision": HOSTILE},
        environment,
        *hostile,
        *later[3:],
        {"event": "note", "message": HOSTILE},
    ]
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
    for excerpt in (
        "micro_batch_tokens: 2560",
        "tokenizer: bert-base-uncased",
        "NVIDIA H200",
        "3.11.9",
        "[redacted]",
    ):
        assert excerpt in html


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
