"""Nobody reads the output any more: training goes on and says so in its log, commands that print end without a word."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from fastdistil import train
from fastdistil.metrics import Console
from tests.small_run import events, learnt, quiet, small

ROOT = Path(__file__).resolve().parents[1]


def pipe_without_reader() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def closed_terminal() -> TextIO:
    master, slave = os.openpty()
    os.close(master)
    return os.fdopen(slave, "w")


@pytest.mark.parametrize("make", [pipe_without_reader, closed_terminal])
def test_a_console_without_reader_drops_what_it_is_told(make: Callable[[], TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a progress bar too, whose thread writes by itself
    with make() as stream:
        console = Console(file=stream)
        console.start(10, 0)
        for update in range(1, 4):
            console.update(update, {"total": 1.0})
            console.note("a line")
        console.close()
        assert console.take_failure() in ("Broken pipe", "Input/output error")
        assert console.take_failure() is None
        print("what others print there goes nowhere", file=stream, flush=True)


def test_training_goes_on_and_its_log_says_so(material: Path, tmp_path: Path) -> None:
    whole = quiet(small(material, tmp_path / "whole"))
    with pipe_without_reader() as stream:
        unread = train.train(small(material, tmp_path / "unread"), console=Console(file=stream))
    assert unread.updates == whole.updates
    assert learnt(unread.run_dir) == learnt(whole.run_dir)
    assert (unread.run_dir / "student" / "config.json").exists()
    notes = [event["message"] for event in events(unread.run_dir, "note")]
    assert [note for note in notes if "nobody reads the console any more (Broken pipe)" in note] == notes[:1]
    assert len([note for note in notes if "nobody reads" in note]) == 1


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["doctor"], ["doctor", "--json"]])
def test_commands_that_print_end_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastdistil", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
