"""The launcher with real processes: what ranks are told, what is seen of them, and how they end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastdistil.launch.job import Job
from fastdistil.launch.launcher import launch
from tests.launch.stand_ins import Ranks, running

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_every_rank_is_told_its_place(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    # Of a launcher that started this process alone: not to be passed on.
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch(ranks.job(2)) == 0
    first, second = sorted((start["environ"] for start in ranks.starts), key=lambda environ: environ["RANK"])
    cores = len(os.sched_getaffinity(0))
    for rank, environ in enumerate((first, second)):
        variables = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
        assert variables == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }
        assert (environ["GROUP_RANK"], environ["GROUP_WORLD_SIZE"]) == ("0", "1")
        assert environ["FASTDISTIL_LAUNCHER"] == "fastdistil" and "TORCHELASTIC_RUN_ID" not in environ
        assert 1 <= int(environ["OMP_NUM_THREADS"]) <= max(1, cores // 2)
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["FASTDISTIL_STORE_SECRET"] == second["FASTDISTIL_STORE_SECRET"]
    assert len(bytes.fromhex(first["FASTDISTIL_STORE_SECRET"])) == 16
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch(ranks.job(2)) == 0
    assert ranks.starts[-1]["environ"]["OMP_NUM_THREADS"] == "3"
    assert ranks.starts[-1]["environ"]["FASTDISTIL_STORE_SECRET"] != first["FASTDISTIL_STORE_SECRET"]


def test_the_launcher_does_not_load_torch() -> None:
    code = "import sys, fastdistil.launch.launcher, fastdistil.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# Rank 0's end tells the others to stop: they may not have begun by then, on a busy machine.
FAILS_WHATEVER_IT_IS_TOLD = "signal.signal(15, signal.SIG_IGN); (folder / 'failing').touch(); sys.exit(11)"


# What the ranks do, and the exit code that the command has then. The others of a lost rank end with 12, as they would.
@pytest.mark.parametrize(
    ("deeds", "code"),
    [
        ({}, 0),
        ({"default": "sys.exit(75)"}, 75),
        ({"rank1": "sys.exit(14)", "rank0": "time.sleep(0.3); sys.exit(12)"}, 14),
        ({"rank1": "time.sleep(0.3); sys.exit(13)", "rank0": "sys.exit(12)"}, 13),
        ({"rank1": "os.kill(os.getpid(), signal.SIGKILL)", "rank0": "time.sleep(0.3); sys.exit(12)"}, 12),
        ({"default": "sys.exit(2)"}, 2),
        ({"default": "sys.exit(12)"}, 12),
        ({"rank1": "raise ZeroDivisionError", "rank0": "time.sleep(0.3); sys.exit(12)"}, 1),
        ({"rank0": "wait_for('failing'); sys.exit(75)", "rank1": FAILS_WHATEVER_IT_IS_TOLD}, 11),
    ],
)
def test_the_first_failing_rank_decides_the_exit_code(ranks: Ranks, deeds: dict[str, str], code: int) -> None:
    ranks.plan(**deeds)
    assert launch(ranks.job(2)) == code
    assert ranks.alive() == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGKILL", ""), ("SIGBUS", ": a file that it had mapped was shortened, its disk failed, or /dev/shm is full")],
)
def test_a_killed_rank_is_named(name: str, words: str, ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    ranks.plan(rank1=f"os.kill(os.getpid(), signal.{name})", default="sys.exit(12)")
    assert launch(ranks.job(3)) == 12
    assert f"fastdistil: rank 1 was killed by {name}{words}\n" in capfd.readouterr().err


def test_rank_0_alone_prints_and_the_others_warn_with_their_rank(ranks: Ranks) -> None:
    ranks.plan(
        default="print('not this'); print('careful', file=sys.stderr); print('bar\\rbar', file=sys.stderr)",
        rank0="print('hello'); print('careful', file=sys.stderr); print('bar\\rbar', file=sys.stderr)",
    )
    # In a process of its own: pytest replaces sys.stdout, a terminal's is inherited.
    done = as_command(ranks, ranks.job(3))
    assert done.returncode == 0
    assert done.stdout == "hello\n"
    assert sorted(done.stderr.splitlines()) == ["[rank 1] careful", "[rank 2] careful", "bar", "bar", "careful"]


def test_a_notebook_sees_what_rank_0_prints(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default="print('not this')", rank0="print('hello')")
    assert launch(ranks.job(2)) == 0
    assert capsys.readouterr().out == "hello\n"


def test_every_line_of_another_rank_has_its_rank(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default="print('fastdistil: no such corpus', file=sys.stderr); sys.exit(2)")
    assert launch(ranks.job(2)) == 2
    assert sorted(capsys.readouterr().err.splitlines()) == ["[rank 1] fastdistil: no such corpus", "fastdistil: no such corpus"]
    ranks.plan(default="pass", rank1="raise ZeroDivisionError('x')")
    assert launch(ranks.job(2)) == 1
    err = capsys.readouterr().err
    assert "[rank 1] Traceback" in err and "[rank 1] ZeroDivisionError: x" in err
    ranks.plan(rank1="sys.stderr.write('cut off')")
    assert launch(ranks.job(2)) == 0
    assert capsys.readouterr().err == "[rank 1] cut off\n"


def test_what_the_others_printed_is_kept_when_it_failed(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default="print('odd'); sys.exit(3 * int(rank))")
    assert launch(ranks.job(2)) == 3
    named = re.search(r"printed is in (\S+)", capsys.readouterr().err)
    assert named is not None
    log = Path(named[1]) / "rank-1.log"
    assert log.read_text() == "odd\n"
    log.unlink()
    log.parent.rmdir()
    ranks.plan(default="print('odd')")
    assert launch(ranks.job(2)) == 0
    assert "printed is in" not in capsys.readouterr().err


STARTS_A_CHILD = (
    "import subprocess; child = subprocess.Popen(['sleep', '300']); (folder / 'child').write_text(str(child.pid)); "
    "(folder / 'started').touch(); "
)


def child_ended(ranks: Ranks) -> bool:
    return not running(int((ranks.folder / "child").read_text()))


@pytest.mark.parametrize("stuck", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(300)"])
def test_a_rank_that_does_not_end_is_ended(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stuck: str
) -> None:
    """Stopped as by SIGSTOP it cannot hear SIGTERM. What it started goes with it."""
    monkeypatch.setattr("fastdistil.launch.attempt.END_S", 0.3)
    monkeypatch.setattr("fastdistil.launch.attempt.KILL_AFTER_S", 0.3)
    ranks.plan(rank1=STARTS_A_CHILD + stuck, rank0="wait_for('started'); sys.exit(12)")
    begun = time.monotonic()
    assert launch(ranks.job(2, timeout_s=0.2)) == 12
    assert time.monotonic() - begun < 20
    assert ranks.alive() == []
    ranks.wait_for(lambda: child_ended(ranks), "its child to end")
    assert "rank 1 did not end in time" in capsys.readouterr().err


def test_what_a_killed_rank_started_ends(ranks: Ranks) -> None:
    ranks.plan(rank1=STARTS_A_CHILD + KILLED, rank0="wait_for('started'); sys.exit(12)")
    assert launch(ranks.job(2)) == 12
    ranks.wait_for(lambda: child_ended(ranks), "its child to end")


LOSES_RANK_0 = """
from fastdistil.errors import RankLost
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe
from fastdistil.distributed.coordinator import joined

settings = ["device=cpu", "data.train=none", "teacher.path=none", "world.timeout_s=60", "world.engine=torch"]
try:
    with joined(find_rank_info(), load_recipe("distilbert", settings), print) as team:
        team.world.barrier()
        if rank == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        team.world.barrier()
except RankLost as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(12)
"""


@pytest.mark.parametrize("level", [None, "INFO"])
def test_ranks_without_a_store_show_no_stacks_of_torch(
    ranks: Ranks, level: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the user wants them."""
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    if level is not None:
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", level)
    ranks.plan(default=LOSES_RANK_0)
    assert launch(ranks.job(2, timeout_s=60.0)) == 12
    err = capsys.readouterr().err
    assert "rank 0 is gone" in err
    assert ("frame #0" in err) == (level is not None)


def as_command(ranks: Ranks, job: Job, **more: Any) -> "subprocess.CompletedProcess[str]":
    with background(ranks, job, **more) as done:
        out, err = done.communicate(timeout=60)
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


@contextmanager
def background(ranks: Ranks, job: Job, before: str = "pass", **more: Any) -> Iterator["subprocess.Popen[str]"]:
    """The launcher in a process of its own, which is gone behind the block."""
    slots = [(slot.host, slot.index) for slot in job.slots]
    code = (
        "import sys; from fastdistil.launch.launcher import *; from fastdistil.launch.rank_process import Slot\n"
        f"{before}\n"
        f"slots = tuple(Slot(*slot) for slot in {slots!r})\n"
        f"sys.exit(launch(Job(command={job.command!r}, slots=slots, ranks={job.ranks}, timeout_s={job.timeout_s})))"
    )
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([sys.executable, "-c", code], **(pipes | more))
    try:
        yield launcher
    finally:
        launcher.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("hosts", [None, "a:1,b:1"])
def test_a_signal_is_passed_on_and_ranks_have_time_to_save(
    ranks: Ranks, ssh: Path, number: signal.Signals, hosts: str | None
) -> None:
    ranks.plan(default="wait()")
    with background(ranks, ranks.job(2, hosts)) as launcher:
        ranks.ready(2)
        launcher.send_signal(number)
        out, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 75
    assert out == f"saved by {number.name}\n"
    assert ranks.alive() == []


def test_a_signal_before_training_is_an_interruption(ranks: Ranks) -> None:
    ranks.plan(default="(folder / f'ready-{rank}').touch(); time.sleep(300)")
    with background(ranks, ranks.job(2)) as launcher:
        ranks.ready(2)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, err) == (130, "fastdistil: stopped before it trained: there was nothing to save\n")
    assert ranks.alive() == []


SPEAKS_SOON = "import fastdistil.launch.attempt; fastdistil.launch.attempt.SAVE_S = fastdistil.launch.attempt.END_S = 0.1"
SAVES_SLOWLY = (
    "def save(*_): (folder / f'heard-{rank}').touch(); wait_for('go'); os._exit(75)\n"
    "signal.signal(15, save); (folder / f'ready-{rank}').touch()\n"
    "while True: signal.pause()"
)


def test_a_save_may_take_as_long_as_it_does(ranks: Ranks) -> None:
    """timeout(1) signals its child and then its group, so that the launcher gets two SIGTERMs: they are one."""
    ranks.plan(default=SAVES_SLOWLY, rank1="wait()")
    with background(ranks, ranks.job(3, timeout_s=0.1), SPEAKS_SOON) as launcher:
        ranks.ready(3)
        launcher.send_signal(signal.SIGTERM)
        ranks.wait_for(lambda: len(list(ranks.folder.glob("heard-*"))) == 2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.stderr is not None
        said = launcher.stderr.readline()
        (ranks.folder / "go").touch()
        err = launcher.communicate(timeout=120)[1]
    assert said == (
        "fastdistil: still waiting for ranks 0, 2, told to stop 0 s ago: a large save takes its time; "
        "a second Ctrl-C or SIGTERM kills\n"
    )
    assert (launcher.returncode, err) == (75, "")


@pytest.mark.parametrize("stuck", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(300)"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_second_signal_ends_ranks_that_hear_nothing(ranks: Ranks, stuck: str, count: int) -> None:
    """Not one that hangs by itself, and not one that cannot be told."""
    deaf = f"signal.signal(15, signal.SIG_IGN); (folder / f'ready-{{rank}}').touch(); {stuck}"
    ranks.plan(default=deaf)
    before = f"{SPEAKS_SOON}; fastdistil.launch.attempt.SAME_SIGNAL_S = 0.0"
    with background(ranks, ranks.job(count, timeout_s=0.1), before) as launcher:
        ranks.ready(count)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.stderr is not None
        assert "still waiting" in launcher.stderr.readline()
        assert len(ranks.alive()) == count
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=120)
    assert launcher.returncode == 130
    assert ranks.alive() == []


def test_a_second_interrupt_kills(ranks: Ranks) -> None:
    ranks.plan(default="signal.signal(2, lambda *_: (folder / f'heard-{rank}').touch()); (folder / f'ready-{rank}').touch()\n"
               "while True: time.sleep(0.05)")  # fmt: skip
    with background(ranks, ranks.job(2)) as launcher:
        ranks.ready(2)
        launcher.send_signal(signal.SIGINT)
        ranks.wait_for(lambda: len(list(ranks.folder.glob("heard-*"))) == 2)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=120)
    assert launcher.returncode == 130
    assert ranks.alive() == []


@pytest.mark.parametrize("hosts", [None, "a:1,b:1"])
def test_ranks_end_with_a_launcher_that_is_killed(ranks: Ranks, ssh: Path, hosts: str | None) -> None:
    ranks.plan(default="wait()")
    with background(ranks, ranks.job(2, hosts)) as launcher:
        ranks.ready(2)
        launcher.kill()
        launcher.communicate(timeout=120)
        ranks.wait_for(lambda: not ranks.alive(), "the ranks to end")


def test_other_hosts(ranks: Ranks, ssh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "it's secret")
    folder = ranks.folder / "with a blank"
    folder.mkdir()
    monkeypatch.chdir(folder)
    ranks.plan(default="print('hello'); print('careful', file=sys.stderr)")
    assert launch(ranks.job(None, "a:2,b")) == 0
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert sorted(err.splitlines()) == ["[rank 1] careful", "[rank 2] careful", "careful"]
    assert sorted((ssh / "hosts").read_text().split()) == ["a", "a", "b"]
    by_rank = sorted((start["environ"] for start in ranks.starts), key=lambda environ: environ["RANK"])
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "NCCL_DEBUG", "HF_TOKEN")
    places = [[environ[name] for name in names] for environ in by_rank]
    carried = ["a", "WARN", "it's secret"]
    assert places == [["0", "2", "0", "2", *carried], ["1", "2", "0", "2", *carried], ["0", "1", "1", "2", *carried]]
    assert {start["cwd"] for start in ranks.starts} == {str(folder)}
    (secret,) = {environ["FASTDISTIL_STORE_SECRET"] for environ in by_rank}
    assert secret not in (ssh / "commands").read_text()  # nor in any list of processes


def test_a_host_that_cannot_be_reached_is_named(ranks: Ranks, ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ssh / "down-b").touch()
    ranks.plan(default="sys.exit(12)")
    assert launch(ranks.job(None, "a,b")) == 12
    err = capsys.readouterr().err
    assert "[rank 1] ssh: connect to host b port 22: No route to host" in err
    assert "rank 1 on b: no connection to b" in err and "ssh b true" in err


def test_a_rank_elsewhere_that_is_killed(ranks: Ranks, ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default="sys.exit(12)", rank1="os.kill(os.getpid(), signal.SIGKILL)")
    assert launch(ranks.job(None, "a,b")) == 12
    assert "rank 1 on b was killed by SIGKILL" in capsys.readouterr().err
