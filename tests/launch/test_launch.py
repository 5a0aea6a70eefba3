"""The launcher with real processes: a stand-in for a rank that does what its line of a plan says, and for ssh a shell."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastdistil.errors import CorruptData, RankLost, Stopped, UserError
from fastdistil.launch.attempt import free_port
from fastdistil.launch.job import Elastic, Job, choose_slots, parse_elastic, parse_hosts
from fastdistil.launch.launcher import launch, launch_function
from fastdistil.launch.rank_output import RankOutput
from fastdistil.launch.rank_process import Slot, rank_environment
from fastdistil.launch.remote_call import answer_call, read_answer, write_call

# A rank: appends its environment to `starts`, then does what the plan says for it ("default" otherwise).
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
from fastdistil.launch.rank_process import tie_to_launcher

tie_to_launcher(os.environ)
folder, *arguments = sys.argv[1:]
folder = Path(folder)
rank = os.environ["RANK"]
mine = {"pid": os.getpid(), "arguments": arguments, "cwd": os.getcwd(), "environ": dict(os.environ)}
with open(folder / "starts.jsonl", "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # another rank's line may be half written
    file.write(json.dumps(mine) + "\\n")
    file.flush()
    file.seek(0)
    starts = [json.loads(line) for line in file]
plan = json.loads((folder / "plan.json").read_text())
start = sum(each["environ"]["RANK"] == rank for each in starts)
plans = plan.get(rank, plan["default"])
deed = plans[min(start, len(plans)) - 1] if isinstance(plans, list) else plans

def saved(number, frame):
    print(f"saved by {signal.Signals(number).name}", flush=True)
    sys.stdout.flush()
    os._exit(75)

def wait():
    signal.signal(signal.SIGTERM, saved)
    signal.signal(signal.SIGINT, saved)
    signal.signal(signal.SIGHUP, saved)
    (folder / f"ready-{rank}").touch()
    while True:
        signal.pause()

def wait_for(name):
    deadline = time.monotonic() + 30
    while not (folder / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.01)

exec(deed)
"""
# A shell instead of another machine; what it is asked to run comes as ssh's does, as one string after the host's name.
FAKE_SSH = """#!/bin/sh
echo "$*" >> "$SSH_FOLDER/commands"
[ "$1" = -- ] || exit 64
shift
echo "$1" >> "$SSH_FOLDER/hosts"
[ -e "$SSH_FOLDER/down-$1" ] && { echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; }
shift
exec sh -c "$*"
"""


KILLED, OTHERS = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(0.2); sys.exit(12)"


class Ranks:
    """A plan for the stand-in ranks, and what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "stand_in.py"
        self.program.write_text(STAND_IN)

    def command(self, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(self.program), str(self.folder), *arguments)

    def plan(self, default: str | list[str] = "pass", **deeds: str | list[str]) -> None:
        named = {name.removeprefix("rank"): deed for name, deed in deeds.items()}
        (self.folder / "plan.json").write_text(json.dumps({"default": default, **named}))

    def job(self, np: int | None = 2, hosts: str | None = None, **more: Any) -> Job:
        slots, ranks = choose_slots(np, hosts)
        return Job(command=self.command(), slots=slots, ranks=ranks, **{"timeout_s": 5.0, **more})

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sizes(self) -> list[int]:
        """Ranks of each start of the run."""
        return [int(start["environ"]["WORLD_SIZE"]) for start in self.starts if start["environ"]["RANK"] == "0"]

    def wait_for(self, condition: Callable[[], object], event: str = "the ranks") -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {event}"
            time.sleep(0.01)

    def ready(self, count: int) -> None:
        self.wait_for(lambda: len(list(self.folder.glob("ready-*"))) >= count)

    def alive(self) -> list[int]:
        return [start["pid"] for start in self.starts if running(start["pid"])]


def running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    # A launcher that is killed leaves its directory of logs; not outside of this test's.
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    stand_in = Ranks(tmp_path)
    stand_in.plan()
    yield stand_in
    for pid in stand_in.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for ssh in use; the folder holds `hosts`, who was called, and may hold `down-HOST`."""
    folder = tmp_path / "ssh"
    folder.mkdir()
    program = folder / "ssh"
    program.write_text(FAKE_SSH)
    program.chmod(0o755)
    monkeypatch.setenv("FASTDISTIL_SSH", str(program))
    monkeypatch.setenv("SSH_FOLDER", str(folder))
    return folder


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


def test_what_several_ranks_say_alike_is_said_once(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default="print('fastdistil: no such corpus', file=sys.stderr); sys.exit(2)")
    assert launch(ranks.job(3)) == 2
    assert capsys.readouterr().err == "fastdistil: no such corpus\n"
    ranks.plan(default="print('fastdistil: rank 0 is lost', file=sys.stderr); sys.exit(12)", rank0="sys.exit(1)")
    assert launch(ranks.job(4)) == 1
    assert capsys.readouterr().err == "[ranks 1-3] fastdistil: rank 0 is lost\n"
    ranks.plan(default="pass", rank1="raise ZeroDivisionError('x')")
    assert launch(ranks.job(2)) == 1
    err = capsys.readouterr().err
    assert "[rank 1] Traceback" in err and "[rank 1] ZeroDivisionError: x" in err


def test_what_was_said_already_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may be seconds later than the others with the same words."""
    monkeypatch.setattr(RankOutput, "HOLD_S", 0.0)
    out = io.StringIO()
    voices = RankOutput(out)
    for rank in (2, 1):
        reading, writing = os.pipe()
        os.write(writing, b"fastdistil: rank 0 is lost\n")
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            voices.listen(rank, pipe)
        voices.flush()
    assert out.getvalue() == "[rank 2] fastdistil: rank 0 is lost\n"


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

settings = ["device=cpu", "data.train=none", "teacher.path=none", "world.timeout_s=10", "world.engine=torch"]
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
    assert launch(ranks.job(2)) == 12
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
        out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert out == f"saved by {number.name}\n"
    assert ranks.alive() == []


def test_a_signal_before_training_is_an_interruption(ranks: Ranks) -> None:
    ranks.plan(default="(folder / f'ready-{rank}').touch(); time.sleep(300)")
    with background(ranks, ranks.job(2)) as launcher:
        ranks.ready(2)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
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
        err = launcher.communicate(timeout=30)[1]
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
        launcher.communicate(timeout=30)
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
        launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert ranks.alive() == []


@pytest.mark.parametrize("hosts", [None, "a:1,b:1"])
def test_ranks_end_with_a_launcher_that_is_killed(ranks: Ranks, ssh: Path, hosts: str | None) -> None:
    ranks.plan(default="wait()")
    with background(ranks, ranks.job(2, hosts)) as launcher:
        ranks.ready(2)
        launcher.kill()
        launcher.communicate(timeout=30)
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


def elastic(ranks: Ranks, np: int, low: int, hosts: str | None = None, **more: Any) -> Job:
    slots, count = choose_slots(np, hosts)
    options = Elastic(
        min_ranks=low,
        again=lambda: ranks.command("again"),
        progress=more.pop("progress", lambda: None),
        grow_after_s=more.pop("grow_after_s", 3600.0),
    )
    return Job(command=ranks.command("first"), slots=slots, ranks=count, timeout_s=5.0, elastic=options, **more)


def test_elastic_goes_on_without_the_lost_rank(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default=[OTHERS, "pass"], rank1=[KILLED, "pass"])
    assert launch(elastic(ranks, 3, 1)) == 0
    assert ranks.sizes() == [3, 2]
    assert [start["arguments"] for start in ranks.starts] == 3 * [["first"]] + 2 * [["again"]]
    err = capsys.readouterr().err
    assert "rank 1 was killed by SIGKILL" in err and "going on with 2 ranks" in err
    # The lost slot was GPU 1: the two ranks that remain use GPUs 0 and 2.
    assert {start["environ"].get("CUDA_VISIBLE_DEVICES") for start in ranks.starts[3:]} == {"0,2"}
    ports = {start["environ"]["MASTER_PORT"] for start in ranks.starts[3:]}
    assert len(ports) == 1


def test_elastic_ends_below_its_minimum(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.plan(default=[OTHERS, OTHERS, "pass"], rank1=[KILLED, KILLED, "pass"])
    assert launch(elastic(ranks, 3, 2)) == 12
    assert ranks.sizes() == [3, 2]
    assert "1 ranks remain" in capsys.readouterr().err


@pytest.mark.parametrize("code", [2, 10, 11, 13, 14, 75])
def test_elastic_starts_nothing_again_that_would_fail_again(ranks: Ranks, code: int) -> None:
    ranks.plan(default=f"sys.exit({code})")
    assert launch(elastic(ranks, 2, 1)) == code
    assert ranks.sizes() == [2]


def test_elastic_a_bug_on_one_rank_or_on_all(ranks: Ranks) -> None:
    ranks.plan(default=[OTHERS, "pass"], rank1="sys.exit(1)")
    assert launch(elastic(ranks, 2, 1)) == 0
    assert ranks.sizes() == [2, 1]
    (ranks.folder / "starts.jsonl").unlink()
    ranks.plan(default="sys.exit(1)")
    assert launch(elastic(ranks, 2, 1)) == 1
    assert ranks.sizes() == [2]


def test_elastic_uses_spare_slots_first(ranks: Ranks, ssh: Path) -> None:
    ranks.plan(default=[OTHERS, "pass"], rank1=[KILLED, "pass"])
    assert launch(elastic(ranks, 2, 2, "a:2,b:2")) == 0
    assert ranks.sizes() == [2, 2]
    assert [start["environ"]["LOCAL_WORLD_SIZE"] for start in ranks.starts] == ["2", "2", "1", "1"]


def test_elastic_does_without_a_host_that_cannot_be_reached(ranks: Ranks, ssh: Path) -> None:
    (ssh / "down-b").touch()
    ranks.plan(default=[OTHERS, "pass"])
    assert launch(elastic(ranks, 3, 1, "a:2,b:2")) == 0
    assert ranks.sizes() == [3, 2]  # b's other slot is no better


def test_elastic_is_given_up_without_progress(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is known to be lost: the same ranks start again, but not for ever; a new checkpoint counts anew."""
    monkeypatch.setattr("fastdistil.launch.launcher.RESTARTS", 3)
    ranks.plan(default="sys.exit(12)")
    assert launch(elastic(ranks, 1, 1, progress=lambda: min(len(ranks.starts), 2))) == 12
    assert ranks.sizes() == 5 * [1]
    assert "given up after 3 starts" in capsys.readouterr().err


def test_elastic_grows_back(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    """After a while the run is stopped as by SIGTERM, which saves it, and started with all its ranks."""
    ranks.plan(default=[OTHERS, "wait()", "pass"], rank1=[KILLED, "pass"])
    assert launch(elastic(ranks, 2, 1, grow_after_s=0.3)) == 0
    assert ranks.sizes() == [2, 1, 2]
    out, err = capsys.readouterr()
    assert "saved by SIGTERM" in out
    assert "trying slot 1 of this machine again" in err
    assert "CUDA_VISIBLE_DEVICES" not in ranks.starts[-1]["environ"]


def test_elastic_over_hosts_goes_on_with_the_slots_that_remain(ranks: Ranks, ssh: Path) -> None:
    ranks.plan(default=[OTHERS, "time.sleep(0.5)"], rank1=KILLED)
    assert launch(elastic(ranks, 2, 1, "a,b", grow_after_s=0.0)) == 0
    assert ranks.sizes() == [2, 1]
    assert (ssh / "hosts").read_text().split().count("b") == 1, "it is not asked again either"


@pytest.mark.parametrize(
    ("deed", "code"),
    [("wait()", 75), ("signal.signal(15, lambda *_: os._exit(12)); (folder / f'ready-{rank}').touch(); time.sleep(300)", 12)],
)
def test_elastic_obeys_the_user(ranks: Ranks, deed: str, code: int) -> None:
    """A run that was told to stop is not started again, not even if its ranks could not save."""
    ranks.plan(default=deed)
    job = elastic(ranks, 2, 1)
    program = (
        "import sys; from fastdistil.launch.job import *; from fastdistil.launch.launcher import launch\n"
        f"elastic = Elastic(min_ranks=1, again=lambda: {job.command!r}, progress=lambda: None)\n"
        f"job = Job(command={job.command!r}, slots=(Slot(None, 0), Slot(None, 1)), ranks=2, timeout_s=5.0, elastic=elastic)\n"
        "sys.exit(launch(job))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        ranks.ready(2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == code
    finally:
        launcher.kill()
    assert ranks.sizes() == [2]


def test_hosts_and_numbers() -> None:
    assert parse_hosts("a:2,b") == (Slot("a", 0), Slot("a", 1), Slot("b", 0))
    assert parse_hosts(f"localhost:1,{'other'}:1") == (Slot(None, 0), Slot("other", 0))
    assert parse_hosts(socket.gethostname()) == (Slot(None, 0),)
    assert choose_slots(None, "a:2,b:2")[1] == 4
    assert choose_slots(3, "a:2,b:2")[1] == 3
    assert parse_elastic("2:8") == (2, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:0",
        "a:",
        "a:x",
        ":2",
        "a,,b",
        "a:2,a:2",
        "localhost,localhost",
        "-oProxyCommand=x:1",
        "a;b",
        "a b",
        "$(x)",
        "a\0",
    ],
)
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--hosts"):
        parse_hosts(text)


def test_without_ssh_no_rank_is_started_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDISTIL_SSH", "/nowhere/ssh -q")
    with pytest.raises(UserError, match=r"/nowhere/ssh, which is not here.*FASTDISTIL_SSH"):
        launch(Job(command=("true",), slots=parse_hosts("localhost:1,elsewhere:1"), ranks=2, timeout_s=1))


@pytest.mark.parametrize("text", ["", "2", "3:2", "0:2", "a:b", "1:2:3"])
def test_elastic_ranges_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="MIN:MAX"):
        parse_elastic(text)


def test_more_ranks_than_room() -> None:
    with pytest.raises(UserError, match="5 ranks are more than the 4"):
        choose_slots(5, "a:2,b:2")
    with pytest.raises(UserError, match="1 to 65,536"):
        choose_slots(0, None)


def test_ranks_start_no_ranks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="rank 1 of 2 already"):
        launch(ranks.job(2))


def test_gpus_of_the_slots_in_use() -> None:
    rank_variables = {"LOCAL_WORLD_SIZE": "2"}
    assert rank_environment({"CUDA_VISIBLE_DEVICES": "4,5,6"}, rank_variables, [0, 2])["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert rank_environment({}, rank_variables, [1, 3])["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment({}, rank_variables, None)
    # Two ranks share the one GPU that is visible: there is nothing to choose.
    assert rank_environment({"CUDA_VISIBLE_DEVICES": "4"}, rank_variables, [1, 3])["CUDA_VISIBLE_DEVICES"] == "4"


def test_a_free_port_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port("127.0.0.1")))
    assert 20000 <= free_port("no-such-host.invalid") < 30000


def add(left: int, right: int) -> Any:
    import torch

    rank = int(os.environ["RANK"])
    print("from rank", rank)
    return {"sum": left + right, "rank": rank, "size": os.environ["WORLD_SIZE"], "tensor": torch.ones(2)}


def call(function: Callable[..., Any], np: int = 2, **arguments: Any) -> Any:
    return launch_function(function, arguments, np=np, hosts=None, timeout_s=5.0)


def test_a_function_in_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    def local(left: int, right: int) -> Any:  # as in a notebook: no module holds it
        return add(left, right)

    answer = call(local, left=1, right=2)
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
        out, _ = caller.communicate(timeout=30)
    finally:
        caller.kill()
        survivors = [pid for pid in pids if running(pid)]
        for pid in survivors:
            os.kill(pid, signal.SIGKILL)
    assert out == "interrupted\n"
    assert survivors == []


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Job]]]:
    """Calls the command line; its exit code, and the jobs that it would have launched."""
    from fastdistil import cli

    jobs: list[Job] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdistil.launch.launcher.launch", lambda job: jobs.append(job) or 75)

    def run(*arguments: str) -> tuple[int, list[Job]]:
        monkeypatch.setattr(sys, "argv", ["fastdistil", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), jobs

    return run


RECIPE = ("distilbert", "data.train=corpus", "world.timeout_s=7")


def test_ranks_run_the_same_command(command_line: Callable[..., tuple[int, list[Job]]]) -> None:
    code, (job,) = command_line("train", *RECIPE, "--np", "3", "--resume", "auto")
    assert code == 75  # the ranks' own
    assert job.command == (sys.executable, "-m", "fastdistil", "train", *RECIPE, "--resume", "auto")
    assert (job.ranks, len(job.slots), job.timeout_s, job.elastic) == (3, 3, 7.0, None)
    _, jobs = command_line("pretrain", "bert-small", "--hosts", "a:2,b")
    assert jobs[1].command[3:] == ("pretrain", "bert-small")
    assert jobs[1].slots == (Slot("a", 0), Slot("a", 1), Slot("b", 0))


def test_an_elastic_run_has_one_directory(command_line: Callable[..., tuple[int, list[Job]]], tmp_path: Path) -> None:
    _, (job,) = command_line("train", *RECIPE, "--elastic", "2:4", "--grow-after", "9")
    pinned = (sys.executable, "-m", "fastdistil", "train", *RECIPE, 'name="distilbert-1"', 'runs_dir="runs"')
    assert job.command == pinned
    assert job.elastic is not None
    assert job.elastic.again() == (*pinned, "--resume", "auto")
    assert (job.ranks, job.elastic.min_ranks, job.elastic.grow_after_s) == (4, 2, 9.0)
    before = job.elastic.progress()
    assert job.elastic.progress() == before
    (tmp_path / "runs/distilbert-1/checkpoints/step-00000010").mkdir(parents=True)
    assert job.elastic.progress() != before
    # From here on a host that does not find the run is at fault, and must not begin anew.
    (tmp_path / "runs/distilbert-1/recipe.yaml").touch()
    assert job.elastic.again() == (*pinned, "--resume", "runs/distilbert-1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--np", "0"], "1 to 65,536"),
        (["--elastic", "3:2"], "MIN:MAX"),
        (["--np", "8", "--elastic", "2:4"], "outside --elastic 2:4"),
        (["--hosts", "a:0"], "--hosts"),
        (["--np", "3", "--hosts", "a:2"], "3 ranks are more than the 2"),
    ],
)
def test_options_that_make_no_ranks(
    command_line: Callable[..., tuple[int, list[Job]]], capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    code, jobs = command_line("train", *RECIPE, *options)
    err = capsys.readouterr().err
    assert (code, jobs) == (2, []) and says in err and err.count("\n") == 1


def test_the_demo_has_one_rank(command_line: Callable[..., tuple[int, list[Job]]], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("train", "demo", "--np", "2") == (2, [])
    assert "the demo trains" in capsys.readouterr().err
