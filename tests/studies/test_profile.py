"""`fastdistil profile` on real runs, and planted causes in real runs."""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastdistil import cli, distil, train
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.profiling.flops import Work
from fastdistil.profiling.peaks import utilisation
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.summary import summarise
from fastdistil.recipe import Recipe
from fastdistil.studies import profile
from fastdistil.studies.profile import WARMUP, profiled, show
from tests.small_run import small

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Calls the entry point; (exit code, standard output, standard error), those of its ranks too."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdistil", "profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def recipe(material: Path, tmp_path: Path) -> Path:
    """A file; its run evaluates, saves and logs at every update."""
    path = tmp_path / "tiny.yaml"
    path.write_text(small(material, tmp_path / "runs", "name=null", "loop.epochs=2", "loop.updates=null").to_yaml())
    return path


def test_a_profile_of_real_updates(command: Command, recipe: Path, tmp_path: Path) -> None:
    code, out, err = command(recipe, "--steps", 7, "loop.accumulation=3")
    assert code == 0, err
    run = tmp_path / "runs" / "tiny-profile-1"
    assert sorted(path.name for path in run.iterdir()) == ["events.jsonl", "profile.json", "recipe.yaml", "report.html"]
    history = load_history(run)
    assert history.lines[-1].update == WARMUP + 7 and history.outcome == "done"
    assert history.recipe["loop"]["accumulation"] == 3 and not history.evaluations
    summary = json.loads((run / "profile.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(summarise(history)))
    assert "tiny-profile-1: " in out and ", fp32, 1 rank; 3 x 256 tokens at most an update and rank" in out
    assert (summary["updates"], summary["warmup"]) == (7, WARMUP)
    assert {"data", "teacher", "student", "backward", "optimizer", "other"} <= summary["phases"].keys()
    assert f"; 7 measured updates after {WARMUP} of warm-up" in out
    assert f"tokens/s: {summary['tokens_per_s']:,.0f}\n" in out
    assert f"bottleneck: {summary['bottleneck']['name']}" in out
    assert f"{Path('runs') / 'tiny-profile-1' / 'profile.json'}" in out and "report.html" in out
    assert "update 12/12" in err and "update 12/12" not in out


def test_json_alone_on_standard_output(command: Command, recipe: Path, tmp_path: Path) -> None:
    code, out, err = command(recipe, "--steps", 2, "--json", "name=mine")
    assert code == 0, err
    assert json.loads(out) == json.loads((tmp_path / "runs" / "mine" / "profile.json").read_text(encoding="utf-8"))


def test_bad_input_is_one_line(command: Command, recipe: Path) -> None:
    code, _, err = command("demo")
    assert code == 2 and "the demo prepares data of its own" in err and err.count("\n") == 1
    code, _, err = command(recipe, "loop.acumulation=2")
    assert code == 2 and "did you mean 'loop.accumulation'" in err
    assert command(recipe, "--steps", 0)[0] == 2


def test_several_ranks(command: Command, recipe: Path, tmp_path: Path) -> None:
    code, out, err = command(recipe, "--steps", 6, "--np", 2, "world.engine=torch", "compression.kind=int8")
    assert code == 0, err
    run = tmp_path / "runs" / "tiny-profile-1"
    assert (start := load_history(run).start).ranks == 2 and start.engine == "torch"
    assert "2 ranks (torch, compression int8, delayed)" in out and "all ranks" in out
    assert "update 11/11" in err and "update 11/11" not in out
    summary = summarise(load_history(run))
    assert [device["rank"] for device in summary["environment"]["devices"]] == [0, 1]
    assert all(device["name"] and device["host"] for device in summary["environment"]["devices"])
    assert summary["phases"]["exposed"]["p50"] > 0 and summary["phases"]["compression"]["p50"] > 0
    assert len(summary["straggler"]["worked_s"]) == 2 and min(summary["straggler"]["worked_s"]) > 0
    code, _, err = command(recipe, "--steps", 6, "--np", 2, "world.engine=torch", "name=tiny-profile-1")
    assert code == 2 and "exists" in err


def test_auto_has_decided_before_the_first_measured_update(command: Command, recipe: Path, tmp_path: Path) -> None:
    code, _, err = command(recipe, "--steps", 3, "--np", 2, "world.engine=torch", "compression.kind=auto")
    assert code == 0, err
    (decided,) = [note for note in load_history(tmp_path / "runs" / "tiny-profile-1").notes if "auto:" in note.message]
    assert decided.update < WARMUP


def late_rank(recipe: Recipe, recipe_name: str) -> Path:
    """A rank of a profile; rank 1 sleeps before each of its forwards."""
    place = find_rank_info(os.environ)
    assert place is not None
    original = train.loss_terms

    def late(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.1)
        return original(*arguments, **keywords)

    if place.rank == 1:
        train.loss_terms = late
    return profile._train(recipe, recipe_name)


def test_a_late_rank_is_named(command: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the network, though all that rank 0 does about it is to wait for gradients."""
    monkeypatch.setattr(profile, "_train", late_rank)
    code, out, err = command(recipe, "--steps", 6, "--np", 2, "world.engine=torch")
    assert code == 0, err
    summary = summarise(load_history(tmp_path / "runs" / "tiny-profile-1"))
    assert summary["straggler"]["rank"] == 1 and summary["straggler"]["slowest_in"] == summary["straggler"]["lines"]
    mine, its = summary["straggler"]["worked_s"]
    assert its - mine > 0.75 * 6 * 2 * 0.1, "most of what it slept: rank 0 waits for it before gradients, too"
    assert summary["phases"]["exposed"]["share"] > 0.3, "rank 0 waited"
    assert summary["bottleneck"]["name"] == "straggler", summary["causes"]
    assert "slowest rank: 1, " in out and "bottleneck: straggler" in out and f"rank 1 on {socket.gethostname()} works" in out


def test_a_profile_does_each_update_as_the_long_run(material: Path, tmp_path: Path) -> None:
    """Only what is between updates, and when compression begins, is another."""
    long = small(material, tmp_path, "compression.kind=int8", "compression.warmup_updates=50")
    before, after = long.model_dump(), profiled(long, 30).model_dump()
    changed = {
        f"{section}.{key}": after[section][key]
        for section, values in before.items()
        if isinstance(values, dict)
        for key in values
        if values[key] != after[section][key]
    }
    assert changed == {
        "loop.updates": WARMUP + 30,
        "data.heldout": None,
        "evaluation.every": None,
        "checkpoint.every": None,
        "compression.warmup_updates": WARMUP - 2,
        "profile.warmup": WARMUP,
        "profile.measure_peaks": True,
    }
    assert {key: value for key, value in before.items() if not isinstance(value, dict)} == {
        key: value for key, value in after.items() if not isinstance(value, dict)
    }
    assert profiled(small(material, tmp_path, "logging.every=100"), 30).logging.every == WARMUP


def test_what_is_shown_of_a_known_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = {"event": "start", "update": 0, "ranks": 2, "engine": "torch", "compression": "none", "sync": "delayed"}
    facts = {"device": "cuda:0", "precision": "bf16", "student_parameters": 66_000_000, "teacher_parameters": 109_000_000}
    environment = {"event": "environment", "devices": [{"rank": 0, "name": "A GPU"}]}
    line = {
        "event": "train",
        "update": 4,
        "updates": 4,
        "warmup": 0,
        "tokens": 4_000_000,
        "tokens_per_s": 500_000.0,
        "step_s": [2.0, 2.0, 2.0, 2.0],
        "phases": {"data": [0.5] * 4, "student": [1.0] * 4, "communication": [0.5] * 4, "exposed": [0.1] * 4},
        "mfu": {"student": 0.305, "with_teacher": 0.401, "hfu": None, "peak_flops": 989e12, "peak_source": "datasheet"},
        "memory": {"peak_rss_bytes": 2**30, "peak_allocated_bytes": 2**31},
        "device": {"samples": 8, "seconds": 8.0, "energy_j": 4000.0, "utilisation": 0.9},
        "rank_worked_s": [7.0, 7.2],
        "rank_tokens": [2_000_000, 2_000_000],
    }
    (tmp_path / "recipe.yaml").write_text("data: {micro_batch_tokens: 8192}\nloop: {accumulation: 4}\n")
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in ({**start, **facts}, environment, line))
    )
    show(summarise(load_history(tmp_path)), Console(width=120))
    out = capsys.readouterr().out
    assert "A GPU, bf16, 2 ranks (torch, compression none, delayed); 4 x 8,192 tokens at most an update and rank; " in out
    assert "student 66,000,000, teacher 109,000,000 parameters; 4 measured updates after 0 of warm-up" in out
    rows = {cells[0]: cells[1:] for text in out.splitlines() if len(cells := [c.strip() for c in text.split("│")[1:-1]]) == 6}
    assert rows == {
        "step": ["2.000 s", "2.000 s", "2.000 s", "100.0%", "4"],
        "data": ["500.0 ms", "500.0 ms", "500.0 ms", "25.0%", "4"],
        "student": ["1.000 s", "1.000 s", "1.000 s", "50.0%", "4"],
        "exposed": ["100.0 ms", "100.0 ms", "100.0 ms", "5.0%", "4"],
        "other": ["400.0 ms", "400.0 ms", "400.0 ms", "20.0%", "4"],
        "communication": ["500.0 ms", "500.0 ms", "500.0 ms", "", "4"],
    }
    assert "tokens/s: 500,000, all ranks" in out
    assert "MFU: 30.5% student, 40.1% with the teacher, of 989 TFLOP/s (datasheet)" in out
    assert "communication: at least 80% of it hidden behind the rest of the step" in out
    assert "memory at its peak: 1.000 GiB host, 2.000 GiB allocated on the GPU" in out
    assert "energy of rank 0's device: 1e+03 J an update, 2,000 J a million tokens, over 8 s" in out
    assert "slowest rank: 1, 1.4% above the mean, in 1 of 1 log lines" in out
    assert "bottleneck: data-bound -> data.cache_dir: 25% of the step waits for data" in out


def test_mfu_is_shown_against_both_peaks_or_refused(tmp_path: Path) -> None:
    """As the trainer writes it."""
    work = Work(student=4, teacher=1, executed=6)
    start = {"event": "start", "update": 0, "ranks": 1}
    shown = []
    for seconds in (1.0, 0.5):
        mfu = {**utilisation(work, seconds, 20.0, "a sheet"), "measured": utilisation(work, seconds, 10.0, "here")}
        line = {"event": "train", "update": 1, "updates": 1, "warmup": 0, "step_s": [seconds], "tokens": 1, "mfu": mfu}
        (tmp_path / "recipe.yaml").write_text("{}")
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (start, line)))
        (text,) = [text for text in profile._figures(summarise(load_history(tmp_path))) if text.startswith("MFU")]
        shown.append(text.replace("e-11", ""))
    fine, refused = shown
    assert "20.0% student, 25.0% with the teacher, 30.0% recomputation counted, of 2" in fine
    assert "(a sheet); 40.0% student" in fine
    assert "40.0% student" in refused and "(a sheet); " in refused
    assert "120% of" in refused and "(here) is more than there is" in refused and "80.0%" not in refused


class Batches:
    """Micro-batches of random tokens; each keeps whoever asks for it waiting."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s

    def __iter__(self) -> Iterator[dict[str, Any]]:
        random = torch.Generator().manual_seed(0)
        while True:
            time.sleep(self.wait_s)
            yield {"input_ids": torch.randint(5, 300, (4, 16), generator=random)}


def test_a_slow_loader_is_named(material: Path, tmp_path: Path) -> None:
    """A fifth of a second a micro-batch, beside updates of some milliseconds."""
    distil(small(material, tmp_path, "data.heldout=null", "evaluation.every=null", "loop.updates=9"), corpus=Batches(0.2))
    bottleneck = summarise(load_history(tmp_path / "run"))["bottleneck"]
    assert (bottleneck["name"], bottleneck["key"]) == ("data-bound", "data.train")
    waited = re.search(r"data p50 ([\d,.]+) ms", bottleneck["why"])
    assert waited and float(waited[1].replace(",", "")) > 300  # two micro-batches an update, less what the update took
