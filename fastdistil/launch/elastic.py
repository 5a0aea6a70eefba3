"""Elastic runs: whether another start is worth it, and the slots whose ranks were lost, which on this machine alone are
tried again later."""

import time

from fastdistil.launch.attempt import LOST, SSH_FAILED, Attempt
from fastdistil.launch.job import BUG, Job
from fastdistil.launch.rank_output import RankOutput
from fastdistil.launch.rank_process import Slot

RESTARTS = 10
"""Elastic: starts in a row without a new checkpoint, after which the run is given up."""


def worth_a_restart(attempt: Attempt, code: int) -> bool:
    """Return whether a rank was lost: killed, stuck, unreachable, or broken while the others only missed it."""
    broken = [child for child in attempt.order if child.code == BUG]
    return code == LOST or (code == BUG and len(broken) < len(attempt.order))


class AbsentSlots:
    """Elastic: the slots of lost ranks, and when they are tried again; never in a run with other hosts."""

    def __init__(self, job: Job, output: RankOutput) -> None:
        self._job = job
        self._output = output
        self._again_at_s: dict[Slot, float] = {}
        self._losses: dict[Slot, int] = {}
        self._back: list[Slot] = []

    @property
    def stopped_to_grow(self) -> bool:
        return bool(self._back)

    def present(self) -> list[Slot]:
        return [slot for slot in self._job.slots if slot not in self._again_at_s][: self._job.ranks]

    def add(self, attempt: Attempt) -> None:
        """The slots of an attempt's lost ranks; with a host that cannot be reached, all of its."""
        assert self._job.elastic is not None
        unreachable = {child.slot.host for child in attempt.lost if child.slot.host and child.code == SSH_FAILED}
        for slot in {child.slot for child in attempt.lost} | {slot for slot in self._job.slots if slot.host in unreachable}:
            self._losses[slot] = self._losses.get(slot, 0) + 1
            wait_s = self._job.elastic.grow_after_s * 2 ** (self._losses[slot] - 1)
            self._again_at_s[slot] = time.monotonic() + wait_s

    def some_are_back(self) -> bool:
        """Return whether the run is to be stopped because it can have more ranks: never while it has all it may have."""
        back = [slot for slot, at_s in self._again_at_s.items() if time.monotonic() >= at_s]
        if back and len(self.present()) < self._job.ranks and not any(slot.host for slot in self._job.slots):
            self._back = back
        return self.stopped_to_grow

    def take_back(self) -> None:
        if self.stopped_to_grow:
            self._output.say(f"trying {', '.join(map(str, self._back))} again")
            for slot in self._back:
                del self._again_at_s[slot]
        self._back = []
