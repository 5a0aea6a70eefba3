"""What ranks tell of themselves, and why they cannot go on together: pure functions of what one rank knows of the others.

monitor.py carries the beats and acts on the verdicts. Times are seconds on the reader's clock, which is never compared with
another machine's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from types import CodeType
from typing import Literal, NamedTuple

_STACK_FRAMES = 12

RankStatus = Literal["running", "waiting", "unhurried", "finished", "ended"]
"""waiting: for other ranks; unhurried: need not get on within the timeout; finished: in good order; ended: by a verdict."""
_LIVE = ("running", "waiting", "unhurried")


@dataclass(frozen=True)
class Beat:
    number: int
    kind: RankStatus
    phase: str
    update: int | None
    waits_for: str
    idle_s: float
    """Since the main thread last changed its phase, on the sender's clock."""
    stack: str
    broken: str | None
    """A collective failed on this rank, with these words."""

    def where(self) -> str:
        update = "" if self.update is None else f", update {self.update}"
        return f"its last phase: {self.phase}{update}; its stack: {self.stack}"


@dataclass(frozen=True)
class View:
    """One rank as another sees it."""

    seen: float
    """When its counter last changed, or the reader began to listen."""
    beat: Beat | None = None

    @property
    def live(self) -> bool:
        return self.beat is None or self.beat.kind in _LIVE


class Verdict(NamedTuple):
    rank: int | None
    """Who is to blame; None: nobody alone."""
    text: str


def judge(views: Mapping[int, View], now: float, timeout_s: float, quick_s: float) -> Verdict | None:
    """Why these ranks, which are all, cannot go on together, or None. quick_s: for silence once a collective has failed."""
    beats = {rank: view.beat for rank, view in views.items() if view.beat is not None}
    if any(beat.broken for beat in beats.values()):
        # Who does not get on is held up by that: only the one who caused it, and is gone, is to blame.
        return silent(views, now, quick_s)
    # Those that wait may just have been let go by one that has finished, and not have said so yet.
    finished = [
        rank for rank, beat in beats.items() if beat.kind == "finished" and beat.idle_s + now - views[rank].seen >= timeout_s
    ]
    return silent(views, now, timeout_s) or _stuck(beats, timeout_s) or _mismatch(beats, finished, len(views), timeout_s)


def silent(views: Mapping[int, View], now: float, limit_s: float) -> Verdict | None:
    """The rank that is silent longest, if for as long as the limit."""
    ages = {rank: now - view.seen for rank, view in views.items() if view.live}
    if not ages or (age := max(ages.values())) < limit_s:
        return None
    rank = max(ages, key=ages.__getitem__)
    beat = views[rank].beat
    if beat is not None:
        return Verdict(rank, f"rank {rank} is silent for {age:.0f} s (killed, stopped or cut off); {beat.where()}")
    absent = [other for other, view in views.items() if view.beat is None]
    verb = "is" if len(absent) == 1 else "are"
    return Verdict(rank, f"{rank_list(absent)} {verb} silent for {age:.0f} s (not started, killed, stopped or cut off)")


def gone(rank: int, why: str, beat: Beat | None = None) -> Verdict:
    """Return the verdict on a rank whose process cannot be reached any more, in the same words at every moment of a run."""
    return Verdict(rank, f"rank {rank} is gone ({why})" + (f"; {beat.where()}" if beat is not None else ""))


def _stuck(beats: Mapping[int, Beat], timeout_s: float) -> Verdict | None:
    idle = {rank: beat.idle_s for rank, beat in beats.items() if beat.kind == "running"}
    if not idle or (age := max(idle.values())) < timeout_s:
        return None
    rank = max(idle, key=idle.__getitem__)
    return Verdict(rank, f"rank {rank} does not get on for {age:.0f} s; {beats[rank].where()}")


def _mismatch(beats: Mapping[int, Beat], finished: Sequence[int], size: int, timeout_s: float) -> Verdict | None:
    """All wait for each other, or for those that have finished long since: their collectives do not match."""
    waiting = {rank: beat for rank, beat in beats.items() if beat.kind == "waiting" and beat.idle_s >= timeout_s}
    if not waiting or len(waiting) + len(finished) < size:
        return None

    def key(rank: int) -> tuple[str, str, int]:
        return waiting[rank].waits_for, waiting[rank].phase, waiting[rank].update or 0

    groups = sorted(list(group) for _, group in groupby(sorted(waiting, key=key), key))
    parts = [f"{rank_list(group)} for {waiting[group[0]].waits_for} ({waiting[group[0]].where()})" for group in groups]
    if finished:
        parts.append(f"{rank_list(finished)} finished")
    age = min(beat.idle_s for beat in waiting.values())
    return Verdict(None, f"the ranks wait for each other for {age:.0f} s: {'; '.join(parts)}")


def rank_list(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    ordered = sorted(ranks)
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    words = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"rank {words}" if len(ordered) == 1 else f"ranks {words}"


def compact_stack(frames: Iterable[tuple[CodeType, int]]) -> str:
    """Return the calls of a stack, innermost first, as one line: "in batches.py:88 window < train.py:142 train_step"."""
    calls = [f"{code.co_filename.rpartition('/')[2]}:{line} {code.co_name}" for code, line in islice(frames, _STACK_FRAMES)]
    return f"in {' < '.join(calls)}" if calls else "not known"
