"""A Python function called in ranks: its result, its errors, and what an interrupt leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistil.errors import CorruptData, RankLost, Stopped, UserError
from fastdistil.launch.launcher import launch_function
from fastdistil.launch.remote_call import answer_call, read_answer, write_call
from tests.launch.stand_ins import running


def add(first: int, second: int) -> Any:
    import torch

    rank = int(os.environ["RANK"])
    print("from rank", rank)
    return {"sum": first + second, "rank": rank, "size": os.environ["WORLD_SIZE"], "tensor": torch.ones(2)}


def call(function: Callable[..., Any], np: int = 2, **arguments: Any) -> Any:
    return launch_function(function, arguments, np=np, hosts=None, timeout_s=5.0)


def test_a_function_in_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    def local(first: int, second: int) -> Any:  # as in a notebook: no module holds it
        return add(first, second)

    answer = call(local, first=1, second=2)
    assert (answer["sum"], answer["rank"], answer["size"]) == (3, 0, "2")
    assert answer["tensor"].tolist() == [1, 1]
    assert capsys.readouterr().out == "from rank 0\n"


def test_errors_come_back_as_they_were() -> None:
    def fails() -> None:
        if os.environ["RANK"] == "1":
            raise CorruptData("shard 3 is bad")
        raise RankLost("rank 1 is lost")

    with pytest.raises(CorruptData, match=r"^shard 3 is bad$"):
        call(fails)


def test_a_rank_that_died_left_no_error(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL"):
        read_answer(tmp_path, 12, 1, "rank 1 was killed by SIGKILL")
    with pytest.raises(RankLost, match="rank 1 ended with exit code 1"):
        read_answer(tmp_path, 1, 1, None)
    with pytest.raises(KeyboardInterrupt):
        read_answer(tmp_path, 130, 0, None)


class Stubborn(Exception):
    def __reduce__(self) -> str:
        raise TypeError("stays here")


class Picky(Exception):
    """Leaves, but does not arrive: unpickled, it would be called with what it says."""

    def __init__(self, text: str, *, reason: str = "") -> None:
        super().__init__(text, reason, "three")


@pytest.mark.parametrize(
    ("kind", "code", "raised"),
    [(Stopped, 75, Stopped), (ZeroDivisionError, 1, ZeroDivisionError), (Stubborn, 1, RuntimeError), (Picky, 1, RuntimeError)],
)
def test_errors_of_all_kinds(tmp_path: Path, kind: type[Exception], code: int, raised: type[Exception]) -> None:
    def fails() -> None:
        raise kind("saved")

    write_call(tmp_path, fails, {})
    assert answer_call(tmp_path, 3) == code
    with pytest.raises(raised, match="saved") as caught:
        read_answer(tmp_path, code, 3, None)
    if raised is ZeroDivisionError:
        assert "On rank 3" in caught.value.__notes__[0]


def test_arguments_that_cannot_travel() -> None:
    with pytest.raises(UserError, match=r"file \(lock\) cannot be sent"):
        call(print, file=threading.Lock())
    with pytest.raises(UserError, match="1 to 65,536"):
        call(print, np=0)


def test_an_interrupted_call_leaves_no_process(tmp_path: Path) -> None:
    """In a notebook: the first interrupt asks the ranks to save, a second one does not wait."""
    program = f"""
import os, signal, time
from pathlib import Path
from fastdistil.launch.launcher import launch_function

def forever():
    signal.signal(signal.SIGINT, lambda *_: Path({str(tmp_path)!r}, "heard-" + os.environ["RANK"]).touch())
    Path({str(tmp_path)!r}, "ready-" + os.environ["RANK"]).write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)

try:
    launch_function(forever, {{}}, np=2, hosts=None, timeout_s=5.0)
except KeyboardInterrupt:
    print("interrupted")
"""
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids: list[int] = []
    try:
        wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        wait_until(lambda: all(path.read_text() for path in tmp_path.glob("ready-*")))
        pids = [int(path.read_text()) for path in tmp_path.glob("ready-*")]
        caller.send_signal(signal.SIGINT)
        wait_until(lambda: len(list(tmp_path.glob("heard-*"))) == 2)
        caller.send_signal(signal.SIGINT)
        out, _ = caller.communicate(timeout=120)
    finally:
        caller.kill()
        survivors = [pid for pid in pids if running(pid)]
        for pid in survivors:
            os.kill(pid, signal.SIGKILL)
    assert out == "interrupted\n"
    assert survivors == []


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
