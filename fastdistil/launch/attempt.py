"""One start of all ranks of a run: started, watched, told to stop, and judged by how they ended.

When one rank fails, the others have `world.timeout_s + END_S` to end by themselves; then they are killed. Ranks that a signal
stops save, which takes as long as the disk does: the launcher, which cannot tell a save from a standstill, waits without a
limit (ranks that hang are ended by their own monitors), says so after `world.timeout_s + SAVE_S`, and kills them when the user
insists with a second signal.
"""

import contextlib
import random
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

from fastdistil.distributed.diagnosis import rank_list
from fastdistil.distributed.rank_info import FIRST_PORT, PORTS
from fastdistil.errors import UserError
from fastdistil.launch.rank_output import RankOutput
from fastdistil.launch.rank_process import KILL_AFTER_S, Launch, RankProcess, start
from fastdistil.signals import stop_signals

POLL_S = 0.05
END_S = 10.0
"""Beyond world.timeout_s, for ranks to end by themselves when another one has failed."""
SAVE_S = 30.0
"""Beyond world.timeout_s: ranks that need longer to save, when a signal stops them, are spoken of."""
SAME_SIGNAL_S = 1.0
"""SIGTERMs within it are one: timeout(1) and others signal the launcher and then its group."""
BAD_INPUT, LOST, SAVED, INTERRUPTED, SSH_FAILED = 2, 12, 75, 130, 255


class Interrupts:
    """Within the block, SIGTERM, SIGINT and SIGHUP are only noted. Off the main thread Python allows no handlers."""

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        """The first signal that arrived."""
        self.second_signal = False
        """Whether another signal followed, which kills the ranks."""
        self._stop_signal_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop_signal is None:
            self.stop_signal, self._stop_signal_s = signal.Signals(number), now
        elif number == signal.SIGINT or (number == signal.SIGTERM and now - self._stop_signal_s >= SAME_SIGNAL_S):
            self.second_signal = True


@dataclass
class Attempt:
    """How the ranks ended."""

    order: list[RankProcess] = field(default_factory=list)
    """The ranks in the order in which they ended."""
    killed: set[int] = field(default_factory=set)
    """Ranks that did not end by themselves in time."""
    stopped: bool = False
    """Whether they were told to stop."""
    stopped_by_user: bool = False
    """Whether a signal of the user was the reason."""
    killed_by_user: bool = False
    """Whether a second signal killed them."""

    @property
    def cause(self) -> RankProcess | None:
        """The rank whose end explains the others': the first that failed of itself; the others follow it with 12."""
        failed = [child for child in self.order if child.code not in (0, SAVED) and child.rank not in self.killed]
        broken = [child for child in failed if child.code != LOST]
        stuck = [child for child in self.order if child.rank in self.killed]
        return next(iter(broken + stuck + failed), None)

    @property
    def lost(self) -> list[RankProcess]:
        """Ranks whose slots are not to be trusted: killed, stuck, unreachable; if there are none, those that broke."""
        gone = [child for child in self.order if child.rank in self.killed or child.code == SSH_FAILED or (child.code or 0) < 0]
        return gone or [child for child in self.order if child.code not in (0, LOST, SAVED)]

    def exit_code(self) -> int:
        """Return the exit code of the command, by the first failing rank."""
        cause, codes = self.cause, [child.code for child in self.order]
        if self.killed_by_user:
            return INTERRUPTED
        if cause is None or cause.code is None:
            return SAVED if SAVED in codes else 0
        before_training = cause.code == INTERRUPTED or -cause.code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if self.stopped and before_training:
            return SAVED if SAVED in codes else INTERRUPTED
        if cause.code < 0 or (cause.slot.host and cause.code == SSH_FAILED):
            return LOST
        return BAD_INPUT if cause.slot.host and cause.code in (126, 127) else cause.code

    def why(self) -> str | None:
        """What the rank that failed could not say itself."""
        cause = self.cause
        if cause is None or cause.code is None or self.killed_by_user:
            return None
        host = cause.slot.host
        if host and cause.code == SSH_FAILED:
            return f"{cause.name}: no connection to {host}, or it broke; see whether this works: ssh {host} true"
        if host and cause.code in (126, 127):
            return f"{host} cannot run {sys.executable}; wanted the same Python and the same directory on every host"
        if cause.rank in self.killed:
            return f"{cause.name} did not end in time (world.timeout_s) and was killed"
        if cause.code < 0 and self.stopped_by_user and self.exit_code() == INTERRUPTED:
            return "stopped before it trained: there was nothing to save"
        if cause.code < 0 and not self.stopped:
            bus_error = cause.code == -signal.SIGBUS
            hint = ": a file that it had mapped was shortened, its disk failed, or /dev/shm is full" if bus_error else ""
            return f"{cause.name} was killed by {signal.Signals(-cause.code).name}{hint}"
        return None


def run_ranks(begin: Launch, output: RankOutput, interrupts: Interrupts, enough: Callable[[], bool] = lambda: False) -> Attempt:
    """Start all ranks and wait until all have ended; none is left behind, whatever happens here.

    `enough` is asked all the time; once it is true the ranks are told to save and stop.
    """
    attempt = Attempt()
    ranks: list[RankProcess] = []
    try:
        _start_all(begin, output, ranks)
        _watch(begin, ranks, attempt, output, interrupts, enough)
    finally:
        # After a KeyboardInterrupt or a bug of ours they may still run.
        _kill([child for child in ranks if child.code is None and child.process.poll() is None])
        for child in ranks:
            child.close()
    return attempt


def _start_all(begin: Launch, output: RankOutput, ranks: list[RankProcess]) -> None:
    hosts = list(dict.fromkeys(slot.host for slot in begin.slots))
    if hosts != [None] and shutil.which(begin.ssh[0]) is None:
        raise UserError(f"--hosts starts ranks with {begin.ssh[0]}, which is not here; install it, or set FASTDISTIL_SSH")
    address = _rendezvous_host(hosts)
    rendezvous = {
        "FASTDISTIL_LAUNCHER": "fastdistil",
        "FASTDISTIL_STORE_SECRET": secrets.token_hex(16),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(free_port(address)),
    }
    for rank, slot in enumerate(begin.slots):
        here = [other.index for other in begin.slots if other.host == slot.host]
        variables = rendezvous | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(begin.slots)),
            "LOCAL_RANK": str(here.index(slot.index)),
            "LOCAL_WORLD_SIZE": str(len(here)),
            "GROUP_RANK": str(hosts.index(slot.host)),
            "GROUP_WORLD_SIZE": str(len(hosts)),
        }
        devices = None if here == list(range(len(here))) else here
        ranks.append(start(rank, begin, variables, devices, output))


def _rendezvous_host(hosts: Sequence[str | None]) -> str:
    """Rank 0's host, as all the others reach it."""
    if hosts == [None]:
        return "127.0.0.1"
    return hosts[0] if hosts[0] is not None else socket.gethostname()


def free_port(address: str) -> int:
    """A port of `address` if that is this machine; elsewhere one that is rarely taken. If it is, rank 0 says so."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
    return FIRST_PORT + random.randrange(PORTS)


def _watch(
    begin: Launch,
    ranks: list[RankProcess],
    attempt: Attempt,
    output: RankOutput,
    interrupts: Interrupts,
    enough: Callable[[], bool],
) -> None:
    sent: signal.Signals | None = None
    speak_s, end_by_s, kill_by_s = float("inf"), float("inf"), float("inf")
    while running := [child for child in ranks if child.code is None]:
        now = time.monotonic()
        for child in running:
            if child.ended():
                attempt.order.append(child)
                if child.code not in (0, SAVED):
                    # A rank that ends with 12 has told the others, and one that cannot be reached is nothing to wait for.
                    reported = child.code == LOST or (child.slot.host is not None and child.code == SSH_FAILED)
                    end_by_s = min(end_by_s, now + (0.0 if reported else begin.timeout_s) + END_S)
        request = interrupts.stop_signal or (signal.SIGTERM if sent is None and end_by_s == float("inf") and enough() else None)
        if sent is None and request is not None:
            sent, attempt.stopped, attempt.stopped_by_user = request, True, interrupts.stop_signal is not None
            speak_s = now + begin.timeout_s + SAVE_S
            _send(running, sent)
        alive = [child.rank for child in running if child.code is None]
        if alive and now >= speak_s:
            speak_s = float("inf")
            output.say(
                f"still waiting for {rank_list(alive)}, told to stop {begin.timeout_s + SAVE_S:.0f} s ago: a large save takes "
                "its time; a second Ctrl-C or SIGTERM kills"
            )
        if now >= end_by_s and kill_by_s == float("inf"):
            attempt.killed |= set(alive)
            kill_by_s = now + KILL_AFTER_S
            _send(running, signal.SIGTERM)
        if interrupts.second_signal or now >= kill_by_s:
            attempt.killed_by_user = interrupts.second_signal
            attempt.killed |= set(alive)
            _kill(running)
        time.sleep(POLL_S)


def _send(ranks: list[RankProcess], number: signal.Signals) -> None:
    for child in ranks:
        if child.code is None:
            child.send(number)


def _kill(ranks: list[RankProcess]) -> None:
    _send(ranks, signal.SIGKILL)
    for child in ranks:
        child.kill()
