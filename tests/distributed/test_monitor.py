"""The monitor between real processes: ranks that die, stop, hang, fail, ask to stop, and end in good order.

All scenarios run at once, as ranks that one process forks (this file run as a script: torch is imported once) and that train
in miniature over Gloo; the tests then judge what each rank printed, when and with which code it ended.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdistil.distributed.monitor import GRACE_S, Monitor
from fastdistil.distributed.rendezvous import SharedStore
from fastdistil.errors import RankLost

TIMEOUT_S = 4.0
LIMIT_S = 180
"""For all scenarios together; they take some 20 s."""
UNTIMED = ("rank 1 killed", "rank 0 killed", "rank 1 fails", "rank 0 fails", "stop")
"""What others notice at once, whatever the timeout: there it is longer than the limit, and whoever waits for it never ends."""
SCENARIOS = {
    "rank 1 killed": 3,
    "rank 0 killed": 3,
    "rank 1 stopped": 3,
    "rank 0 stopped": 3,
    "all stopped": 2,
    "rank 1 fails": 3,
    "rank 0 fails": 3,
    "rank 1 stuck": 2,
    "rank 1 in C": 2,
    "mismatch": 3,
    "stop": 3,
    "early end": 3,
    "slow but well": 2,
    "never started": 2,
    "goes on": 2,
}

# --- one rank ---


class Rank:
    """Trains in miniature: updates of a sleep and an allreduce."""

    def __init__(self, scenario: str, rank: int, size: int, port: int, folder: Path) -> None:
        self.scenario, self.rank, self.size, self.port, self.folder = scenario, rank, size, port, folder

    def connect(self) -> SharedStore:
        store = dist.TCPStore("127.0.0.1", self.port, None, False, timedelta(seconds=30), wait_for_workers=False)
        return SharedStore(store, "secret")

    @staticmethod
    def note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    def mark(self, event: str) -> None:
        with (self.folder / f"{self.rank}.events").open("a") as file:
            file.write(json.dumps([event, time.time()]) + "\n")

    def main(self) -> int:
        # Connected first: the name look-ups of slow name servers are no part of what is timed here.
        connections = [self.connect(), self.connect()]
        if self.scenario != "never started":
            store = connections.pop().of_engine("gloo")
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        timeout_s = 2 * LIMIT_S if self.scenario in UNTIMED else TIMEOUT_S
        self.monitor = Monitor(connections.pop(), self.rank, self.size, timeout_s=timeout_s, note=self.note)
        code = 0
        try:
            self.mark("begun")
            self.train()
            self.monitor.finished()
        except RankLost as error:
            print(f"fastdistil: {error}", file=sys.stderr)
            code = error.exit_code
        except ValueError as error:
            self.monitor.failed(error)
            code = 1
        self.monitor.close()
        self.mark("closed")
        if self.scenario == "goes on" and self.rank == 1:  # its program had an answer to the error, and more to do
            time.sleep(GRACE_S + 2)
            code = 3
        return code

    def train(self) -> None:
        updates = {"early end": 80 if self.rank == 2 else 3, "slow but well": 12, "never started": 100}
        collective = self.scenario not in ("early end", "never started")
        for update in range(1, updates.get(self.scenario, 40) + 1):
            self.monitor.phase("forward", update)
            time.sleep(0.1)
            if update == 7:
                self.fault()
            self.monitor.phase("exchange")
            self.monitor.check()
            if collective and self.sum(update) == self.size and self.scenario == "stop":
                self.mark(f"stop: {self.monitor.stop_requested}")
                return

    def sum(self, update: int) -> float:
        """How many ranks know that they shall stop."""
        flag = torch.tensor(float(self.monitor.stop_requested is not None))
        try:
            with self.monitor.waiting(f"update {update}"):
                work: Any = dist.all_reduce(flag, async_op=True)
                while not work.is_completed():
                    self.monitor.check()
                    time.sleep(0.01)
                work.wait()
        except RuntimeError as error:
            raise self.monitor.lost(error) from error
        return float(flag)

    def wait_until_phase_is_known(self) -> None:
        """Wait until the others can know this rank's phase: in the store, and read from it where the store goes with rank 0."""
        self.await_beats(lambda: [self.monitor._beats])
        if self.scenario in ("rank 0 killed", "rank 0 stopped") and self.rank == 0:
            self.await_beats(lambda: [view.beat.number if view.beat else 0 for view in self.monitor._views.values()])

    @staticmethod
    def await_beats(numbers: Callable[[], list[int]]) -> None:
        """Wait until two beats more are done, of which the second was begun after this call."""
        enough = [number + 2 for number in numbers()]
        while any(number < least for number, least in zip(numbers(), enough, strict=True)):
            time.sleep(0.01)

    def fault(self) -> None:
        self.wait_until_phase_is_known()
        self.mark("fault")
        match self.scenario, self.rank:
            case ("rank 1 killed", 1) | ("rank 0 killed", 0):
                os.kill(os.getpid(), signal.SIGKILL)
            case ("rank 1 stopped", 1) | ("rank 0 stopped", 0) | ("all stopped", _):
                os.kill(os.getpid(), signal.SIGSTOP)
            case ("rank 1 fails", 1) | ("rank 0 fails", 0) | ("goes on", 1):
                raise ValueError("the window\nis bad")
            case "rank 1 stuck", 1:
                time.sleep(1000)
            case "rank 1 in C", 1:
                with self.monitor.waiting("a call that never returns"):
                    ctypes.CDLL(None).pause()
            case "rank 1 in C", 0:
                os.kill(os.getpid(), signal.SIGKILL)
            case "mismatch", _:
                with self.monitor.waiting(f"bucket {self.rank // 2}"):
                    while True:
                        self.monitor.check()
                        time.sleep(0.01)
            case "stop", 2:
                signal.signal(signal.SIGTERM, lambda *_: self.monitor.request_stop("SIGTERM"))
                os.kill(os.getpid(), signal.SIGTERM)
            case "slow but well", 1:
                with self.monitor.unhurried("evaluation"):
                    time.sleep(TIMEOUT_S + 2)
                    ctypes.PyDLL(None).usleep(2_500_000)  # holds the interpreter's lock: no beats


# --- the process that starts them ---


@dataclass
class Group:
    """The ranks of one scenario, as their parent sees them."""

    ranks: dict[int, int]
    """Process id -> rank."""
    live: set[int]
    stopped: set[int]
    resume_at: float | None = None


def run_all(folder: Path) -> None:
    """Fork every rank of every scenario, continue groups of which all are stopped, write down how each ended.

    One scenario begins when the ranks of the one before train: each connection that torch opens costs a reverse look-up of its
    address, and a burst of them is more than some name servers answer.
    """
    assert dist.is_available()
    groups: dict[str, Group] = {}
    deadline = time.monotonic() + LIMIT_S
    waiting = list(SCENARIOS)
    try:
        while time.monotonic() < deadline and (waiting or any(group.live for group in groups.values())):
            if waiting and all(begun(folder / name, group) for name, group in groups.items()):
                name = waiting.pop(0)
                groups[name] = fork_ranks(name, folder / name)
            reap(groups, folder)
            time.sleep(0.02)
    finally:
        for group in groups.values():
            for pid in group.live:
                os.kill(pid, signal.SIGKILL)


def begun(here: Path, group: Group) -> bool:
    return not group.live or len(list(here.glob("*.events"))) == len(group.ranks)


def fork_ranks(scenario: str, here: Path) -> Group:
    size = SCENARIOS[scenario]
    here.mkdir()
    reads_port, tells_port = os.pipe()
    ranks = {}
    for rank in range(size - (scenario == "never started")):
        pid = os.fork()
        if pid == 0:
            run_rank(scenario, rank, size, (reads_port, tells_port), here)
        ranks[pid] = rank
    os.close(reads_port)
    os.close(tells_port)
    return Group(ranks, set(ranks), set())


def run_rank(scenario: str, rank: int, size: int, pipe: tuple[int, int], here: Path) -> None:
    """Of a forked process: never returns."""
    code = 99
    try:
        output = os.open(here / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
            os.write(pipe[1], store.port.to_bytes(4) * (size - 1))
            port = store.port
        else:
            port = int.from_bytes(os.read(pipe[0], 4))
        code = Rank(scenario, rank, size, port, here).main()
    finally:
        sys.stderr.flush()
        os._exit(code)


def reap(groups: Mapping[str, Group], folder: Path) -> None:
    while (pid_and_status := os.waitpid(-1, os.WUNTRACED | os.WNOHANG) if any(g.live for g in groups.values()) else (0, 0))[0]:
        pid, status = pid_and_status
        name, group = next((name, group) for name, group in groups.items() if pid in group.ranks)
        if os.WIFSTOPPED(status):
            group.stopped.add(pid)
            continue
        group.live.discard(pid)
        group.stopped.discard(pid)
        ending = {"code": os.waitstatus_to_exitcode(status), "time": time.time()}
        (folder / name / f"{group.ranks[pid]}.end").write_text(json.dumps(ending))
    for group in groups.values():
        if not group.live or group.stopped != group.live:
            continue
        if group.resume_at is None:
            group.resume_at = time.monotonic() + TIMEOUT_S + 1
        elif time.monotonic() > group.resume_at:
            for pid in group.stopped:
                os.kill(pid, signal.SIGCONT)
            group.stopped.clear()
            group.resume_at = None


# --- what the tests see ---


@dataclass
class Ended:
    code: int | None
    time: float
    words: str
    events: dict[str, float]

    @property
    def message(self) -> str:
        """What the user reads; exactly one."""
        lines = [line for line in self.words.splitlines() if line.startswith("fastdistil: ")]
        assert len(lines) == 1, self.words
        return lines[0]


class Results:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, scenario: str) -> list[Ended]:
        here, endings = self.folder / scenario, []
        for rank in range(SCENARIOS[scenario] - (scenario == "never started")):
            words = (here / f"{rank}.stderr").read_text()
            assert (here / f"{rank}.end").exists(), f"rank {rank} never ended: {words}"
            end = json.loads((here / f"{rank}.end").read_text())
            events = here / f"{rank}.events"
            lines = events.read_text().splitlines() if events.exists() else []
            endings.append(Ended(end["code"], end["time"], words, dict(map(json.loads, lines))))
        return endings


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
        "RES_OPTIONS": "timeout:1",  # of name servers that do not answer
    }
    command = [sys.executable, __file__, str(folder)]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=LIMIT_S + 30)
        assert process.returncode == 0, errors
        yield Results(folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too, also those that are stopped
        process.wait()


LATE = r"(?:[4-9]|\d\d+)"
"""Seconds that are at least the timeout; how many more they are depends on the machine."""
STACK = r"its stack: in test_monitor\.py:\d+ \w+ < .*test_monitor\.py:\d+ train < "


@pytest.mark.parametrize(
    ("scenario", "culprit", "words"),
    [
        ("rank 1 killed", 1, r"rank 1 is silent for \d+ s \(killed, stopped or cut off\); its last phase: forward, update 7; "),
        ("rank 0 killed", 0, r"rank 0 is gone \(its connection is closed.*; its last phase: forward, update 7; "),
        ("rank 1 stopped", 1, rf"rank 1 is silent for {LATE} s .*; its last phase: forward, update 7; "),
        ("rank 0 stopped", 0, rf"rank 0 is silent for {LATE} s .*; its last phase: forward, update 7; "),
        ("rank 1 fails", 1, r"rank 1 failed: ValueError: the window is bad; its last phase: forward, update 7; "),
        ("rank 0 fails", 0, r"rank 0 failed: ValueError: the window is bad; its last phase: forward, update 7; "),
        ("rank 1 stuck", 1, rf"rank 1 does not get on for {LATE} s; its last phase: forward, update 7; "),
    ],
)
def test_every_other_rank_ends_and_names_the_lost_one(results: Results, scenario: str, culprit: int, words: str) -> None:
    """At once where there is something to notice (UNTIMED)."""
    for rank, ended in enumerate(results[scenario]):
        if rank != culprit:
            assert ended.code == 12, ended.words
            assert re_match(words + STACK, ended.message)


def re_match(pattern: str, text: str) -> bool:
    assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"
    return True


def test_a_stopped_rank_that_is_continued_finds_that_it_was_given_up(results: Results) -> None:
    for scenario, culprit in (("rank 1 stopped", 1), ("rank 0 stopped", 0)):
        ended = results[scenario][culprit]
        assert ended.code == 12, ended.words
        assert "given up by the others" in ended.message


def test_ranks_that_are_stopped_and_continued_together_go_on(results: Results) -> None:
    ranks = results["all stopped"]
    assert [ended.code for ended in ranks] == [0, 0], [ended.words for ended in ranks]
    assert all(ended.time - ended.events["fault"] > TIMEOUT_S + 1 for ended in ranks)


def test_a_rank_whose_main_thread_is_stuck_ends_all_the_same(results: Results) -> None:
    asleep = results["rank 1 stuck"][1]
    assert asleep.code == 12, asleep.words
    assert "given up by the others: rank 1 does not get on" in asleep.message
    in_c = results["rank 1 in C"][1]
    assert in_c.code == 12, in_c.words
    assert "rank 0 is gone" in in_c.message
    assert "closed" not in in_c.events
    assert in_c.time - in_c.events["fault"] > GRACE_S


def test_collectives_that_do_not_match(results: Results) -> None:
    for ended in results["mismatch"]:
        assert ended.code == 12, ended.words
        assert re_match(
            rf"the ranks wait for each other for {LATE} s: ranks 0, 1 for bucket 0 \(its last phase: forward, update 7; "
            r"its stack: in .*\); rank 2 for bucket 1 \(",
            ended.message,
        )


def test_a_request_to_stop_reaches_all_ranks_with_the_same_words(results: Results) -> None:
    ranks = results["stop"]
    assert [ended.code for ended in ranks] == [0, 0, 0], [ended.words for ended in ranks]
    assert all("stop: SIGTERM on rank 2" in ended.events for ended in ranks)


def test_ranks_that_end_early_in_good_order_are_not_lost_and_rank_0_stays_for_the_others(results: Results) -> None:
    ranks = results["early end"]
    assert [ended.code for ended in ranks] == [0, 0, 0], [ended.words for ended in ranks]
    assert ranks[1].time + TIMEOUT_S < ranks[2].events["closed"] < ranks[0].time


def test_a_long_evaluation_and_a_held_interpreter_lock_are_no_loss(results: Results) -> None:
    ranks = results["slow but well"]
    assert [ended.code for ended in ranks] == [0, 0], [ended.words for ended in ranks]
    assert ranks[1].time - ranks[1].events["fault"] > TIMEOUT_S + 4


def test_a_rank_that_never_starts(results: Results) -> None:
    (alone,) = results["never started"]
    assert alone.code == 12, alone.words
    assert re_match(rf"rank 1 is silent for {LATE} s \(not started, killed, stopped or cut off\)", alone.message)


def test_a_program_that_goes_on_after_its_error_is_left_alone(results: Results) -> None:
    other, failed = results["goes on"]
    assert (other.code, failed.code) == (12, 3), (other.words, failed.words)
    assert failed.time - failed.events["closed"] > GRACE_S + 1


def test_rank_0_warns_before_it_gives_a_rank_up(results: Results) -> None:
    notes = [line for line in results["rank 1 stopped"][0].words.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert re_match(r"rank 1 is silent for \d+ s .*; given up after 4 s", notes[0])


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
