"""Starts the ranks of a run, here or on several hosts, and says how it ended: `launch` for the command line,
`launch_function` for Python.

The launcher takes no part in training and does not load torch. Which environment a rank gets and how it is watched,
attempts.py says; how it is started and heard, processes.py.

Elastic: when a rank is lost, the others end by themselves (exit code 12); the run is then started again from its last
checkpoint in the slots that remain. A lost slot is tried again later: the run is stopped as by SIGTERM, which saves it, and
started with more ranks.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdistil.distributed.rank_info import find_place
from fastdistil.errors import UserError
from fastdistil.launch.attempt import INTERRUPTED, LOST, SAVED, SSH_FAILED, Attempt, Interrupts, Start, run_ranks
from fastdistil.launch.rank_process import Slot, Voices, on_host, supervise, tie_to_launcher
from fastdistil.untrusted import shown

RESTARTS = 10
"""Elastic: starts in a row without a new checkpoint, after which the run is given up."""
MOST_RANKS = 2**16
"""More are a mistake: each is a process, and rank 0 holds a connection to each."""
BUG = 1


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """How a run goes on without a lost rank."""

    min_ranks: int
    again: Callable[[], tuple[str, ...]]
    """The ranks' command of a further start: it continues the run."""
    progress: Callable[[], object]
    """Something that changes when the run has a new checkpoint."""
    grow_after_s: float = 60.0
    """How long a lost slot is left alone before it is tried again; twice as long each further time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `launch` runs."""

    command: tuple[str, ...]
    """Of every rank."""
    slots: tuple[Slot, ...]
    ranks: int
    """At most; slots beyond it are spare."""
    timeout_s: float
    """The recipe's world.timeout_s."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Of the ranks, beside the launcher's own."""
    elastic: Elastic | None = None


def parse_hosts(text: str) -> tuple[Slot, ...]:
    """`a:8,b:8` as slots, `a` being `a:1`. Raises UserError."""
    slots: list[Slot] = []
    for part in text.split(","):
        host, colon, count = part.strip().partition(":")
        if not re.fullmatch(r"(?!-)[\w.@%+-]+", host) or (colon and not _is_count(count)):
            raise UserError(
                f"--hosts {shown(text)}: {shown(part)} is not HOST or HOST:RANKS with 1 to {MOST_RANKS:,} ranks; "
                "wanted e.g. a:8,b:8"
            )
        name = None if host in own_names() else host
        if any(slot.host == name for slot in slots):
            raise UserError(f"--hosts {shown(text)} names {shown(host)} twice; give it once, with all its ranks")
        slots += [Slot(name, index) for index in range(int(count or 1))]
        if len(slots) > MOST_RANKS:
            raise UserError(f"--hosts {shown(text)} has room for more than {MOST_RANKS:,} ranks; give fewer")
    return tuple(slots)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_RANKS)) and 1 <= int(text) <= MOST_RANKS


def own_names() -> set[str]:
    name = socket.gethostname()
    return {"localhost", "127.0.0.1", name, name.partition(".")[0], socket.getfqdn()}


def choose_slots(np: int | None, hosts: str | None) -> tuple[tuple[Slot, ...], int]:
    """(slots, ranks to start) for np and hosts as users give them. Raises UserError."""
    if np is not None and not 1 <= np <= MOST_RANKS:
        raise UserError(f"the number of ranks is 1 to {MOST_RANKS:,}, got {shown(np)}")
    if hosts is None:
        return tuple(Slot(None, index) for index in range(np or 1)), np or 1
    slots = parse_hosts(hosts)
    if np is not None and np > len(slots):
        raise UserError(f"{np} ranks are more than the {len(slots)} that {hosts} has room for; write e.g. a:8,b:8")
    return slots, np or len(slots)


def parse_elastic(text: str) -> tuple[int, int]:
    """`2:8` as (2, 8). Raises UserError."""
    low, _, high = text.partition(":")
    if not (_is_count(low) and _is_count(high) and int(low) <= int(high)):
        raise UserError(f"--elastic {shown(text)} is not MIN:MAX with 1 <= MIN <= MAX, e.g. 2:8")
    return int(low), int(high)


def refuse_ranks_of_ranks(environ: Mapping[str, str]) -> None:
    place = find_place(environ)
    if place is not None and place.size > 1:
        raise UserError(
            f"this process is rank {place.rank} of {place.size} already, started by {place.launcher}; leave out np and hosts"
        )


def launch(job: Job) -> int:
    """Run a job to its end. Returns the command's exit code; what the ranks could not say themselves is printed."""
    code, _ = _run(job)
    return code


def _run(job: Job) -> tuple[int, Attempt]:
    refuse_ranks_of_ranks(os.environ)
    voices = Voices(sys.stderr)
    logs = Path(tempfile.mkdtemp(prefix="fastdistil-"))
    code = BUG
    try:
        with Interrupts() as interrupts:
            code, attempt = _run_elastic(job, voices, logs, interrupts)
            return code, attempt
    finally:
        if code in (0, SAVED, INTERRUPTED) or not any(log.stat().st_size for log in logs.iterdir()):
            shutil.rmtree(logs, ignore_errors=True)
        else:
            voices.say(f"what the other ranks printed is in {logs}")


def _run_elastic(job: Job, voices: Voices, logs: Path, interrupts: Interrupts) -> tuple[int, Attempt]:
    elastic, command = job.elastic, job.command
    absent = AbsentSlots(job, voices)
    idle, progress = 0, elastic.progress() if elastic is not None else None
    while True:
        slots = absent.present()
        begin = Start(command=command, slots=slots, timeout_s=job.timeout_s, logs=logs, environ={**os.environ, **job.environ})
        attempt = run_ranks(begin, voices, interrupts, enough=absent.some_are_back)
        code, why = attempt.exit_code(), attempt.why()
        if why is not None:
            voices.say(why)
        grown = absent.stopped_to_grow and interrupts.asked is None and code in (LOST, SAVED, INTERRUPTED)
        if elastic is None or interrupts.asked is not None or not (grown or worth_a_restart(attempt, code)):
            return code, attempt
        if not grown:
            absent.add(attempt)
        idle, progress = (idle + 1, progress) if elastic.progress() == progress else (0, elastic.progress())
        absent.take_back()
        left = len(absent.present())
        if left < elastic.min_ranks:
            voices.say(f"{left} ranks remain, fewer than --elastic's {elastic.min_ranks}; continue with --resume auto")
            return LOST, attempt
        if idle >= RESTARTS:
            voices.say(f"given up after {idle} starts in a row without a new checkpoint; continue with --resume auto")
            return LOST, attempt
        voices.say(f"going on with {left} rank{'s' if left > 1 else ''} from the last checkpoint")
        command = elastic.again()


def worth_a_restart(attempt: Attempt, code: int) -> bool:
    """Whether a rank was lost: killed, stuck, unreachable, or broken while the others only missed it."""
    broken = [each for each in attempt.order if each.code == BUG]
    return code == LOST or (code == BUG and len(broken) < len(attempt.order))


class AbsentSlots:
    """Elastic: the slots of lost ranks, and when they are tried again."""

    def __init__(self, job: Job, voices: Voices) -> None:
        self._job = job
        self._voices = voices
        self._again_at_s: dict[Slot, float] = {}
        self._losses: dict[Slot, int] = {}
        self._probe: threading.Thread | None = None
        self._back: list[Slot] = []
        self.stopped_to_grow = False

    def present(self) -> list[Slot]:
        return [slot for slot in self._job.slots if slot not in self._again_at_s][: self._job.ranks]

    def add(self, attempt: Attempt) -> None:
        """The slots of an attempt's lost ranks; with a host that cannot be reached, all of its."""
        unreachable = {each.slot.host for each in attempt.lost if each.slot.host and each.code == SSH_FAILED}
        for slot in {each.slot for each in attempt.lost} | {slot for slot in self._job.slots if slot.host in unreachable}:
            self._losses[slot] = self._losses.get(slot, 0) + 1
            self._postpone(slot)

    def _postpone(self, slot: Slot) -> None:
        assert self._job.elastic is not None
        wait_s = self._job.elastic.grow_after_s * 2 ** (self._losses[slot] - 1)
        self._again_at_s[slot] = time.monotonic() + wait_s

    def some_are_back(self) -> bool:
        """Whether the run is to be stopped because it can have more ranks: never while it has all it may have."""
        if not self._again_at_s or len(self.present()) >= self._job.ranks:
            return False
        if self._probe is None:
            due = [slot for slot, at_s in self._again_at_s.items() if time.monotonic() >= at_s]
            if due:
                self._probe = threading.Thread(target=self._look, args=(due,), daemon=True)
                self._probe.start()
            return False
        if self._probe.is_alive():
            return False
        self._probe = None
        self.stopped_to_grow = bool(self._back)
        return self.stopped_to_grow

    def _look(self, due: list[Slot]) -> None:
        ssh = Start(command=(), slots=(), timeout_s=0, logs=Path(), environ=os.environ).ssh
        for host in {slot.host for slot in due}:
            slots = [slot for slot in due if slot.host == host]
            probe = None if host is None else subprocess.run(on_host(ssh, host, "true"), capture_output=True, check=False)
            if probe is None or probe.returncode == 0:
                self._back += slots
            else:
                for slot in slots:
                    self._losses[slot] += 1
                    self._postpone(slot)

    def take_back(self) -> None:
        if self.stopped_to_grow:
            self._voices.say(f"trying {', '.join(map(str, self._back))} again")
            for slot in self._back:
                self._again_at_s.pop(slot, None)
        self._back.clear()
        self.stopped_to_grow = False


def launch_function(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, np: int | None, hosts: str | None, timeout_s: float
) -> Any:
    """Call `function(**arguments)` in new ranks and return rank 0's result, its tensors on the CPU.

    Functions and classes of a notebook or script travel by value. An error of a rank is raised here as it was there; a rank
    that died without one is a RankLost. No process is left behind, whatever happens.
    """
    from fastdistil.launch.remote_call import read_answer, write_call

    slots, ranks = choose_slots(np, hosts)
    # Other hosts see it where they see the run: below the working directory.
    shared = Path.cwd() if any(slot.host for slot in slots) else None
    folder = Path(tempfile.mkdtemp(prefix="fastdistil-call-", dir=shared))
    try:
        write_call(folder, function, arguments)
        command = (sys.executable, "-m", "fastdistil.launch", str(folder))
        path = os.pathsep.join(entry for entry in sys.path if entry)  # what can be imported here can be there
        job = Job(command=command, slots=slots, ranks=ranks, timeout_s=timeout_s, environ={"PYTHONPATH": path})
        code, attempt = _run(job)
        rank = attempt.cause.rank if attempt.cause is not None else 0
        return read_answer(folder, code, rank, attempt.why())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answer_call(folder: Path) -> int:
    """In a rank: what `launch_function` asked for."""
    from fastdistil.launch.remote_call import answer_call

    tie_to_launcher(os.environ)
    place = find_place(os.environ)
    assert place is not None
    return answer_call(folder, place.rank)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        status = _answer_call(Path(sys.argv[1]))
    else:
        status = supervise(open(0, "rb", buffering=0), os.environ)  # noqa: SIM115 - a buffer is locked at the end
    sys.stdout.flush()
    sys.stderr.flush()
    if status == LOST:
        os._exit(status)  # other threads may hang in a collective
    sys.exit(status)
