"""Readers that go away, from pipes and terminals: work goes on, printing ends quietly, a full disk is no success."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from fastdistil import cli, train
from fastdistil.console import Console
from fastdistil.events import read_events
from fastdistil.launch.rank_process import _pump
from fastdistil.streams import LastingStream, lasting
from tests.small_run import events, small

ROOT = Path(__file__).resolve().parents[1]


def closed_pipe() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


class Terminal(io.StringIO):
    """A terminal that hangs up after some writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.writes = writes

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(text)


@pytest.mark.parametrize("make", [closed_pipe, lambda: Terminal(0), lambda: Terminal(2)])
def test_training_goes_on_without_its_console(
    make: Callable[[], TextIO], material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines or a bar; from the first word, or later. Said once in the log."""
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=make())
    recipe = small(material, tmp_path, "loop.updates=3", "evaluation.every=null", "data.heldout=null")
    assert train.train(recipe, console=console).updates == 3
    notes = [event["message"] for event in events(tmp_path / "run", "note")]
    assert len([note for note in notes if "the console is gone" in note]) == 1, notes
    assert list(read_events(tmp_path / "run" / "events.jsonl"))[-1].kind == "done"
    assert (tmp_path / "run" / "student" / "config.json").is_file()


@pytest.mark.parametrize("arguments", [["train", "demo", "--dry-run"], ["--help"], ["scale", "--table", "distilbert-2020"]])
def test_printing_commands_end_quietly(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastdistil", *arguments])
    out, err = closed_pipe(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert (caught.value.code, err.getvalue()) == (0, "")
    out.close()  # what was left in its buffer goes nowhere: no error is left for the interpreter's end


def test_a_full_disk_below_standard_output_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastdistil", "--version"])
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 13 and err.getvalue().startswith("fastdistil: the disk is full while writing standard output")


def test_a_real_process_says_nothing_when_its_reader_goes() -> None:
    """Both streams, through the interpreter's own end."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastdistil", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, check=False)
    second = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=write, check=False)
    os.close(write)
    assert (first.returncode, first.stderr, second.returncode) == (0, b"", 0)


def test_ranks_are_heard_out_though_nobody_listens() -> None:
    """A notebook's cell that is closed must not leave rank 0 waiting for somebody to take its output."""
    read, write = os.pipe()
    os.write(write, b"x" * 5000)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        _pump(pipe, Terminal(0))
        assert pipe.read() == b""


def test_a_lasting_stream_is_the_stream_until_it_is_lost() -> None:
    text = io.StringIO()
    stream = LastingStream(text)
    assert stream.write("é") == 1 and not stream.isatty() and text.getvalue() == "é"
    assert lasting(stream) is stream  # type: ignore[arg-type]
    text.close()
    assert stream.write("more") == 4 and isinstance(stream.lost, ValueError)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    LastingStream(narrow).write("1 ± 2")
    narrow.flush()
    assert narrow.buffer.getvalue() == rb"1 \xb1 2"  # type: ignore[attr-defined]
