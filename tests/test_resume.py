"""Runs that are interrupted and continued: they are the uninterrupted one, and nothing else continues them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistil import train
from fastdistil.console import Console
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.errors import CorruptData, Stopped, UserError
from fastdistil.recipe import Recipe, load_recipe
from fastdistil.runs import sole_user
from tests.fork_server import ForkServer
from tests.small_run import (
    assert_same_bits,
    events,
    learnt,
    quiet,
    saved_state,
    saved_updates,
    small,
    stop_after,
)

DRIVER = """
import os, signal, sys
from pathlib import Path
from fastdistil import train
from fastdistil.training import checkpoint
from fastdistil.errors import FastdistilError
from fastdistil.console import Console
from fastdistil.recipe import load_recipe
how, at, resume = sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
step, calls = train.train_step, 0
def counted(run, window, counts, waited_s):
    if run.update + 1 == at:
        if how == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how in ("TERM", "INT", "HUP"):
            os.kill(os.getpid(), getattr(signal, "SIG" + how))
        if how == "PAUSE":
            (run.directory / "PAUSE").touch()
    return step(run, window, counts, waited_s)
train.train_step = counted
try:
    train.train(load_recipe(sys.argv[1]), resume=resume, console=Console(quiet=True))
except FastdistilError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def start(fork_server: ForkServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a recipe in a process of its own that a signal meets in the middle of a given update."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(recipe: Recipe, how: str = "", at: int = 0, resume: str = "") -> subprocess.CompletedProcess[str]:
        path = tmp_path / "asked.yaml"
        path.write_text(recipe.to_yaml())
        command = [sys.executable, str(driver), str(path), how, str(at), resume]
        process = fork_server.popen(command, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode or 0, out, err)

    return run


@pytest.mark.parametrize(
    ("how", "at", "code"),
    [("KILL", 6, -9), ("TERM", 1, 75), ("HUP", 4, 75), ("INT", 5, 75), ("PAUSE", 3, 75)],
)
def test_an_interrupted_run_is_the_uninterrupted_one(
    how: str,
    at: int,
    code: int,
    material: Path,
    tmp_path: Path,
    start: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Bit for bit: weights, moments, steps, losses, gradient norms and rates, with dropout on."""
    quiet(small(material, tmp_path / "whole"))
    recipe = small(material, tmp_path / "cut")
    run = tmp_path / "cut" / "run"
    first = start(recipe, how, at)
    assert first.returncode == code, first.stderr
    assert not (run / "student").exists()
    if how == "PAUSE":
        assert events(run, "evaluation", update=at - 1) and not (run / "PAUSE").exists()
    if code == 75:
        # The open window is dropped: the last whole update is what is saved.
        assert saved_updates(run / "checkpoints")[-1] == at - 1
        assert "--resume" in first.stderr
    second = start(recipe, resume="auto")
    assert second.returncode == 0, second.stderr
    assert_same_bits(saved_state(tmp_path / "whole" / "run"), saved_state(run))
    assert learnt(tmp_path / "whole" / "run") == learnt(run)
    values = [
        [e["loss"] for e in events(place, "evaluation") if e["update"] == 8] for place in (tmp_path / "whole" / "run", run)
    ]
    assert values[0] == values[1]


def test_resuming_a_finished_run_changes_nothing(material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path))
    before = saved_state(tmp_path / "run")
    result = quiet(small(material, tmp_path), resume="auto")
    assert result.updates == 8 and result.tokens_per_second == 0
    assert_same_bits(before, saved_state(tmp_path / "run"))


def test_a_checkpoint_can_be_named(material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path, "checkpoint.keep=9"))
    before = saved_state(tmp_path / "run")
    quiet(
        small(material, tmp_path, "checkpoint.keep=9"),
        resume=tmp_path / "run" / "checkpoints" / "step-00000004",
    )
    assert_same_bits(before, saved_state(tmp_path / "run"))
    assert [e["update"] for e in events(tmp_path / "run", "train")] == list(range(1, 9))


def test_a_flipped_bit_in_a_checkpoint_is_seen(material: Path, tmp_path: Path) -> None:
    quiet(small(material, tmp_path, "checkpoint.keep=2"))
    run = tmp_path / "run"
    names = saved_updates(run / "checkpoints")
    newest = run / "checkpoints" / f"step-{names[-1]:08d}"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        quiet(small(material, tmp_path), resume=newest)
    said: list[str] = []
    console = Console(quiet=True)
    console.note = said.append  # type: ignore[method-assign]
    result = train.train(small(material, tmp_path), resume="auto", console=console)
    assert result.updates == 8
    assert any("step-00000008" in line for line in said), said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lr=1e-3"], "optim.lr was 0.0005, is 0.001"),
        (["loop.updates=9"], "loop.updates"),
        (["seed=1"], "seed"),
    ],
)
def test_resuming_with_another_recipe_is_refused(
    overrides: list[str],
    says: str,
    material: Path,
    tmp_path: Path,
) -> None:
    quiet(small(material, tmp_path, "loop.updates=2", "evaluation.every=null"))
    again = [] if overrides[0].startswith("loop.updates") else ["loop.updates=2"]
    with pytest.raises(UserError, match=says):
        quiet(small(material, tmp_path, "evaluation.every=null", *again, *overrides), resume="auto")
    # What changes nothing that is learnt may differ.
    quiet(
        small(
            material,
            tmp_path,
            "evaluation.every=null",
            "loop.updates=2",
            "logging.every=2",
            "checkpoint.keep=5",
        ),
        resume="auto",
    )


def test_resuming_on_another_corpus_is_refused(material: Path, tmp_path: Path) -> None:
    place = tmp_path / "corpus"
    options = PrepareOptions(tokenizer=str(material / "tokenizer"), max_length=48, workers=1)
    prepare([str(material / "train.jsonl")], place, options)
    quiet(small(material, tmp_path, f"data.train={place}", "loop.updates=2"))
    place.rename(tmp_path / "old")
    prepare([str(material / "heldout.jsonl")], place, options)
    with pytest.raises(UserError, match="another corpus"):
        quiet(small(material, tmp_path, f"data.train={place}", "loop.updates=2"), resume="auto")


def test_a_second_process_is_refused(material: Path, tmp_path: Path) -> None:
    recipe = small(material, tmp_path, "loop.updates=1", "evaluation.every=null")
    quiet(recipe)
    with sole_user(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        quiet(recipe, resume="auto")


def test_the_advice_to_continue_works_as_it_is_printed(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the overrides that the run was started with."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stop_after(2))
        with pytest.raises(
            Stopped,
            match=r"continue with fastdistil train \S+/recipe\.yaml --resume \S+/run$",
        ) as caught:
            quiet(small(material, tmp_path))
    _, _, recipe, _, resume = str(caught.value).rpartition("continue with ")[2].split()
    assert quiet(load_recipe(recipe), resume=resume).updates == 8
