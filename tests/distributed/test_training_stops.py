"""Whole runs whose ranks are killed, stopped or lost: what the others do and say, and how the run goes on."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.driver import Ended, all_well
from tests.small_run import assert_same_bits, events, learnt, saved_state, saved_updates, small


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_killed_run_continues_bit_for_bit(
    compression: str, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """Weights, moments, and what compression still owes on each rank."""
    extra = [f"compression={{kind: {compression}, warmup_updates: 2, block: 64}}", "world.engine=torch"]
    all_well(train_ranks(small(material, tmp_path / "whole", *extra), 2))
    recipe = small(material, tmp_path / "cut", *extra)
    codes = [code for code, _ in train_ranks(recipe, 2, "KILL-ALL", 6)]
    assert codes == [-signal.SIGKILL] * 2
    assert saved_updates(tmp_path / "cut" / "run" / "checkpoints")[-1] == 4
    all_well(train_ranks(recipe, 2, resume="auto"))
    reference, cut = (saved_state(tmp_path / name / "run") for name in ("whole", "cut"))
    assert any(name.startswith("rank-1.") for name in reference) == (compression == "int8")
    assert_same_bits(reference, cut)
    assert learnt(tmp_path / "whole" / "run") == learnt(tmp_path / "cut" / "run")


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_number_of_ranks_continues_the_same_updates(
    ranks: int, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """The batches of an update, the schedule and the number of updates stay; with dropout off so do the losses."""
    extra = ["student.dropout=0", "world.engine=torch"]
    all_well(train_ranks(small(material, tmp_path / "whole", *extra), 2))
    recipe = small(material, tmp_path / "cut", *extra)
    train_ranks(recipe, 2, "KILL-ALL", 5)
    fewer = small(material, tmp_path / "cut", "student.dropout=0") if ranks == 1 else recipe
    all_well(train_ranks(fewer, ranks, resume="auto"))
    for of_whole, of_cut in zip(
        learnt(tmp_path / "whole" / "run"),
        learnt(tmp_path / "cut" / "run"),
        strict=True,
    ):
        assert of_cut == pytest.approx(of_whole, rel=2e-5)


def test_what_compression_owes_is_shared_among_other_ranks(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    extra = ["compression={kind: int8, warmup_updates: 1, block: 64}", "world.engine=torch"]
    recipe = small(material, tmp_path, *extra)
    train_ranks(recipe, 2, "KILL-ALL", 5)
    all_well(train_ranks(recipe, 3, resume="auto"))
    (note,) = events(tmp_path / "run", "note")
    assert note["message"] == "what 2 ranks had not sent yet is shared among 3"
    assert len(events(tmp_path / "run")) == 8


def test_one_rank_pays_what_two_owed(
    material: Path,
    tmp_path: Path,
    train_ranks: Callable[..., list[Ended]],
) -> None:
    """Top-k of 1% owes nearly all of an update: with it the next one's gradient is as large as the sum of several."""
    norms = {}
    for kind in ("none", "top-k"):
        extra = [
            f"compression={{kind: {kind}, warmup_updates: 1}}",
            "student.dropout=0",
            "evaluation.every=null",
        ]
        train_ranks(small(material, tmp_path / kind, *extra, "world.engine=torch"), 2, "KILL-ALL", 5)
        all_well(train_ranks(small(material, tmp_path / kind, *extra), 1, resume="auto"))
        norms[kind] = {line["update"]: line["grad_norm"] for line in events(tmp_path / kind / "run")}
    (note,) = events(tmp_path / "top-k" / "run", "note")
    assert note["message"] == "what 2 ranks had not sent yet joins this rank's next update"
    assert events(tmp_path / "none" / "run", "note") == []
    assert norms["top-k"][5] > 1.8 * norms["none"][5]
    assert norms["top-k"][6] < 1.5 * norms["none"][6]


@pytest.mark.parametrize(
    ("how", "on"),
    [
        ("TERM", 1),
        pytest.param("TERM", 0, marks=pytest.mark.slow),
        pytest.param("INT", 1, marks=pytest.mark.slow),
        ("PAUSE", 0),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_update(
    how: str, on: int, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    recipe = small(material, tmp_path, "world.engine=torch", "evaluation.every=null")
    ended = train_ranks(recipe, 2, how, 4, on)
    for code, err in ended:
        assert code == 75, err
        assert "after update 3" in err and "--resume" in err
        assert how in err
    assert saved_updates(tmp_path / "run" / "checkpoints")[-1] == 3
    assert [e["update"] for e in events(tmp_path / "run", "evaluation")] == ([3] if how == "PAUSE" else [])
    all_well(train_ranks(recipe, 2, resume="auto"))
    assert [line[0] for line in learnt(tmp_path / "run")] == list(range(1, 9))


def test_a_signal_while_rank_0_still_saves_harms_nothing(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    all_well(train_ranks(small(material, tmp_path, "world.engine=torch", "world.timeout_s=20"), 2, "LATE"))
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert events(tmp_path / "run", "done")


@pytest.mark.parametrize(
    ("how", "on", "says"),
    [
        ("KILL", 1, "rank 1 is silent for"),
        ("KILL", 0, "rank 0 is gone"),
        ("STOP", 1, "rank 1 is silent for"),
        pytest.param("STOP", 0, "rank 0 is silent for", marks=pytest.mark.slow),
        pytest.param("SLEEP", 1, "rank 1 does not get on for", marks=pytest.mark.slow),
        ("RAISE", 1, "rank 1 failed: RuntimeError: planted"),
    ],
)
def test_a_lost_rank_is_named_and_the_others_end(
    how: str,
    on: int,
    says: str,
    engine: str,
    material: Path,
    tmp_path: Path,
    train_ranks: Callable[..., list[Ended]],
) -> None:
    """With exit code 12, the lost rank's last phase and its stack; the last checkpoint is whole."""
    if how in ("SLEEP", "STOP") and engine == "horovod" and on == 0:
        pytest.skip("the same as with torch, which is tried")
    recipe = small(material, tmp_path, f"world.engine={engine}", "world.timeout_s=6", "evaluation.every=null")
    ended = train_ranks(recipe, 2, how, 4, on)
    code, err = ended[1 - on]
    assert code == 12, err
    # Whoever is killed last said where it was some moments before, which may be in a <listcomp> or a <lambda>.
    update, function = (r"(, update \d)?", r"[\w<>]+") if how == "KILL" else (", update 4", "counted")
    assert re.search(rf"{says}.*; its last phase: \w+{update}; its stack: in \S+:\d+ {function} < ", err), err
    assert saved_updates(tmp_path / "run" / "checkpoints")[-1] == 2
    all_well(train_ranks(recipe, 2, resume="auto"))
