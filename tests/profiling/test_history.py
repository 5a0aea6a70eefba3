"""A run directory, read: which lines count, how the run ended, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdistil.console import Console
from fastdistil.errors import CorruptData, UserError
from fastdistil.events import Environment, Start
from fastdistil.profiling.report.history import load_history
from fastdistil.train import train
from tests.small_run import small


def written(directory: Path, *events: dict[str, Any], recipe: str = "seed: 1\n") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return directory


def start(update: int, kind: str = "start", **facts: Any) -> dict[str, Any]:
    return {"event": kind, "time": float(update), "update": update, "updates": 9, "ranks": 1, **facts}


def line(update: int, **fields: Any) -> dict[str, Any]:
    return {"event": "train", "update": update, **fields}


def test_a_real_run(material: Path, tmp_path: Path) -> None:
    train(small(material, tmp_path), console=Console(quiet=True))
    history = load_history(tmp_path / "run")
    assert history.name == "run" and history.directory == tmp_path / "run"
    assert history.recipe["loop"]["updates"] == 8
    assert (history.start.update, history.start.engine) == (0, "alone")
    assert (
        [event.update for event in history.lines] == list(range(1, 9)) == [event.update for event in history.comparable_lines]
    )
    assert [event.update for event in history.evaluations] == [3, 6, 8]
    assert history.checkpoints and history.outcome == "done"


def test_lines_that_a_resume_went_back_behind_are_left_out(tmp_path: Path) -> None:
    events = start(0), line(1), line(2, total=1.0), line(3), start(1, "resume"), line(2, total=2.0)
    history = load_history(written(tmp_path / "a", *events))
    assert [(event.update, event.total) for event in history.lines] == [(1, None), (2, 2.0)]
    assert history.start.kind == "resume" and len(history.starts) == 2


def test_wall_time_counts_what_was_superseded_and_no_interruption(tmp_path: Path) -> None:
    """190 s up to a death at update 19, and 15 s from update 10 on, begun at 1000 s."""
    events = start(0), line(10, time=100.0), line(19, time=190.0), start(10, "resume"), line(11, time=1015.0)
    history = load_history(written(tmp_path / "a", *events[:3], {**events[3], "time": 1000.0}, events[4]))
    assert [event.update for event in history.lines] == [10, 11]
    assert history.wall_s == 190.0 + 15.0
    assert load_history(written(tmp_path / "b")).wall_s is None


def test_comparable_lines_ran_as_the_last_start_says(tmp_path: Path) -> None:
    """One rank, two ranks, one rank again."""
    events = start(0), line(1), line(2), start(2, "resume", ranks=2), line(3), start(3, "resume"), line(4)
    history = load_history(written(tmp_path / "a", *events))
    assert [event.update for event in history.lines] == [1, 2, 3, 4]
    assert [event.update for event in history.comparable_lines] == [1, 2, 4]
    again = start(0), line(1), start(1, "resume"), line(2), start(0, "resume", ranks=2), line(1), start(1, "resume"), line(2)
    history = load_history(written(tmp_path / "b", *again))
    assert [event.update for event in history.lines] == [1, 2]
    assert [event.update for event in history.comparable_lines] == [2]


@pytest.mark.parametrize("other", [{"devices": [{"name": "NVIDIA A100"}] * 2}, {"processor": "another"}])
def test_lines_of_other_hardware_are_not_comparable(tmp_path: Path, other: dict[str, Any]) -> None:
    """`start` has cuda:0 of either; the last one of b died before it could tell."""
    names = {"devices": [{"name": "NVIDIA H200"}] * 2, "processor": "one"}
    named, again = ({"event": "environment", "host": host, **names} for host in ("a", "b"))
    parts = [start(0), named, line(1)], [start(1, "resume"), {**named, **other}, line(2)], [start(2, "resume"), again, line(3)]
    events = [event for part in parts for event in part]
    hosts = [(event["host"], event["processor"]) for event in events if event["event"] == "environment"]
    for directory in (written(tmp_path / "a", *events), written(tmp_path / "b", *events, start(3, "resume"))):
        history = load_history(directory)
        assert [entry.update for entry in history.comparable_lines] == [1, 3]
        assert [(environment.host, environment.processor) for environment in history.environments[:3]] == hosts
    history = load_history(written(tmp_path / "c", *events[:6]))
    assert [entry.update for entry in history.comparable_lines] == [2]


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        ([{"event": "done", "update": 1}], "done"),
        ([{"event": "stopped", "update": 1, "why": "SIGTERM"}], "stopped"),
        ([{"event": "nonfinite", "update": 1}], "nonfinite"),
        ([], "open"),
        ([{"event": "stopped", "update": 1}, start(1, "resume")], "open"),
    ],
)
def test_outcome(tmp_path: Path, ending: list[dict[str, Any]], outcome: str) -> None:
    assert load_history(written(tmp_path / "a", start(0), line(1), *ending)).outcome == outcome


def test_the_last_environment_and_memory_count(tmp_path: Path) -> None:
    events = [{"event": kind, "cores": n, "peak_bytes": n} for n in (1, 2) for kind in ("environment", "memory")]
    history = load_history(written(tmp_path / "a", start(0), *events))
    assert history.environment.cores == 2
    assert history.memory is not None and history.memory.peak_bytes == 2
    bare = load_history(written(tmp_path / "b"))
    assert (bare.start, bare.environment, bare.memory, bare.comparable_lines) == (Start(), Environment(), None, [])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: wanted a directory with recipe\.yaml and events\.jsonl"):
        load_history(tmp_path)
    with pytest.raises(UserError, match=r"wanted names with values, got \[1\]"):
        load_history(written(tmp_path / "a", recipe="- 1\n"))
    with pytest.raises(UserError, match="not valid YAML"):
        load_history(written(tmp_path / "b", recipe="a: [\n"))
    (written(tmp_path / "c") / "events.jsonl").write_text("no JSON\n")
    with pytest.raises(CorruptData, match="line 1"):
        load_history(tmp_path / "c")
