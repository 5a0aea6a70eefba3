"""Elastic runs: whether another start is worth it, and the slots whose ranks were lost, which are tried again later."""

import os
import subprocess
import threading
import time
from pathlib import Path

from fastdistil.launch.attempt import LOST, SSH_FAILED, Attempt, Start
from fastdistil.launch.job import BUG, Job
from fastdistil.launch.rank_output import Voices
from fastdistil.launch.rank_process import Slot, on_host

RESTARTS = 10
"""Elastic: starts in a row without a new checkpoint, after which the run is given up."""


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
