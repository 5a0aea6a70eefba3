"""Ranks watch each other: who is silent, who does not get on, who failed, who asks to stop.

Every rank writes a sign of life to the store that rank 0 serves, every beat: a counter, its phase, and where in the code its
main thread is. Rank 0 reads them all and publishes a verdict when the ranks cannot go on together; the others read rank 0's
beat and the verdict, and judge rank 0's silence alone. So a beat costs a rank two messages, and rank 0 one read of `size`.

    monitor/beat/R    Beat of rank R as JSON
    monitor/verdict   Verdict as JSON, the first one; empty: the run is well
    monitor/stop      why the ranks should stop and save; empty: nobody asked

Two threads: one talks to the store and may hang there for as long as rank 0 is stopped (torch's TCPStore waits for answers
without a limit, whatever its timeout); the other watches the clock, judges, and ends a process whose main thread is stuck.
Ages are measured by the reader's clock from when a counter last changed.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter

from fastdistil.distributed.diagnosis import Beat, RankStatus, Verdict, View, compact_stack, gone, judge, rank_list, silent
from fastdistil.distributed.rendezvous import SharedStore
from fastdistil.errors import RankLost, UserError

GRACE_S = 5.0
"""From a verdict until a process that has not ended by itself is ended."""
_LINGER_S = 3.0
"""After a verdict rank 0, which serves the store, stays at most this long for the others to hear it."""
_FOREIGN_BEATS = 20
"""Beats from one look for what others than the run's ranks wrote to the next."""
VERDICT, STOP = "monitor/verdict", "monitor/stop"
_BEAT, _VERDICT, _AGREED = TypeAdapter(Beat), TypeAdapter(Verdict), TypeAdapter(dict[str, str])
T = TypeVar("T")


class _Now(NamedTuple):
    """What the main thread is at; replaced as a whole, so that the other threads never see half of a change."""

    changes: int = 0
    phase: str = "start"
    update: int | None = None
    kind: RankStatus = "running"
    waits_for: str = ""


class _RunningClock:
    """Seconds that this process ran. A standstill (SIGSTOP, a suspended machine) counts as `longest_step_s` only: when a whole
    group of ranks is stopped and continued, none of them is to be found silent."""

    def __init__(self, longest_step_s: float) -> None:
        self.seconds = 0.0
        self._longest_step_s = longest_step_s
        self._real = time.monotonic()

    def tick(self) -> float:
        """Call it often. Seconds that really went by since the last call."""
        real = time.monotonic()
        step, self._real = real - self._real, real
        self.seconds += min(step, self._longest_step_s)
        return step


class Monitor:
    """One rank's part. Made on the thread that trains; its methods belong to that thread and to hooks that it waits for.

    `store` is a connection of the monitor's own to the store of rank 0, opened already: from the first moment on rank 0's end
    shows as its end. `note` hears on rank 0 of ranks that have used up half of their time. Every rank ends with `finished` or
    `failed` (or by a RankLost), then `close`. After a verdict the process ends within GRACE_S, with code 12, even when its
    main thread is in a call that never returns; once closed, within GRACE_S of its main thread's end.
    """

    def __init__(
        self,
        store: SharedStore,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        beat_s: float = 0.5,
        hard_exit: Callable[[int], Any] = os._exit,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.timeout_s = timeout_s
        self.stop_requested: str | None = None
        """What some rank was told by `request_stop`: the same text on all ranks."""
        self._store, self._rank, self._beat_s = store, rank, beat_s
        self._quick_s = min(timeout_s, max(2.0, 4 * beat_s))  # beats come late while a C call holds the interpreter's lock
        self._hard_exit, self._note = hard_exit, note
        self._thread = threading.get_ident()
        self._clock = _RunningClock(self._quick_s)
        self._now = _Now()
        self._progress = (0, 0.0)  # changes when last looked at, and when they were last found changed
        self._beats = 0
        self._sent: Beat | None = None
        self._broken: str | None = None
        self._stop_wanted: str | None = None
        self._cut_off: str | None = None
        self._resumed: tuple[float, float] | None = None  # after a standstill: when, and for how long it was
        self._worried: Verdict | None = None
        self._views = {other: View(0.0) for other in (range(1, size) if rank == 0 else [0])}
        self._errands: deque[threading.Event] = deque()
        self._hurry, self._ended = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._verdict_lock = threading.Lock()
        self._exit_code = RankLost.exit_code
        self._closed = self._strange = self._warned_of_strangers = False
        self._courier = threading.Thread(target=self._correspond, name="fastdistil-beats", daemon=True)
        self._courier.start()
        threading.Thread(target=self._watch, name="fastdistil-watch", daemon=True).start()

    # What the training loop says

    def phase(self, name: str, update: int | None = None) -> None:
        """Note progress. `update` stays what it was where none is given."""
        self._change(phase=name, update=self._now.update if update is None else update)

    def waiting(self, operation: str) -> AbstractContextManager[None]:
        """Return the block around a wait for other ranks: a rank inside is not to blame."""
        return self._during(kind="waiting", waits_for=operation)

    def unhurried(self, name: str) -> AbstractContextManager[None]:
        """Return the block around an evaluation, a checkpoint, loading: signs of life are wanted, progress is not."""
        return self._during(kind="unhurried", phase=name, waits_for="")

    @contextmanager
    def _during(self, **fields: Any) -> Iterator[None]:
        before = self._now
        self._change(**fields)
        try:
            yield
        finally:
            self._change(phase=before.phase, kind=before.kind, waits_for=before.waits_for)

    def _change(self, **fields: Any) -> None:
        self._now = self._now._replace(changes=self._now.changes + 1, **fields)

    def request_stop(self, why: str) -> None:
        """All ranks' `stop_requested` becomes "WHY on rank R" within about two beats. Safe within a signal handler."""
        self._stop_wanted = f"{why} on rank {self._rank}"

    def check(self) -> None:
        """Raises RankLost if there is a verdict. Cheap."""
        if self._verdict is not None:
            raise self._lost()

    def failed(self, error: BaseException) -> None:
        """This rank is about to end by `error`: tell the others. `close` then stays _LINGER_S at most until they know."""
        frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        beat = replace(self._beat(), stack=compact_stack(reversed(frames)))
        self._exit_code = getattr(error, "exit_code", 1)
        words = f"rank {self._rank} failed: {type(error).__name__}: {' '.join(str(error).split())}; {beat.where()}"
        self._settle(Verdict(self._rank, words))

    def lost(self, error: BaseException) -> RankLost:
        """Return the error that says which rank is gone, after something that needs the others failed here with `error`.

        Waits `timeout_s` at most for the verdict; the same one, whatever failed first.
        """
        if self._verdict is None:
            self._broken = " ".join(str(error).split()) or type(error).__name__
            self._hurry.set()
        if not self._ended.wait(self.timeout_s):
            words = f"a collective failed on rank {self._rank}, but every rank answers: {self._broken}; {self._beat().where()}"
            self._settle(Verdict(None, words))
            self._tell(_LINGER_S)
        return self._lost()

    def finished(self) -> None:
        """This rank's work is done. Rank 0, whose end would end the store, waits for all. Raises RankLost if one is lost."""
        self._change(kind="finished", waits_for="")
        self._tell(self.timeout_s)
        self.check()
        while self._rank == 0 and not all(view.beat and view.beat.kind == "finished" for view in self._views.values()):
            time.sleep(min(self._beat_s, 0.1))
            self.check()

    def close(self) -> None:
        """No more signs of life. After a verdict, rank 0 first lets the others hear it, and they tell that they did."""
        if self._verdict is not None:
            self._linger()
        self._closed = True
        self._hurry.set()
        self._courier.join(_LINGER_S)  # an interpreter that ends while a thread is inside torch's store may abort

    # The verdict

    def _settle(self, verdict: Verdict) -> None:
        """The first one stays."""
        with self._verdict_lock:
            self._verdict = self._verdict or verdict
        self._hurry.set()
        self._ended.set()

    def _lost(self) -> RankLost:
        return RankLost(self._words())

    def _words(self) -> str:
        assert self._verdict is not None
        given_up = self._verdict.rank == self._rank and self._exit_code == RankLost.exit_code
        return f"this rank was given up by the others: {self._verdict.text}" if given_up else self._verdict.text

    def _tell(self, seconds: float) -> None:
        """Wait until the store has this rank's present state, `seconds` at most."""
        done = threading.Event()
        self._errands.append(done)
        self._hurry.set()
        if self._courier.is_alive():
            done.wait(max(0.0, seconds))

    def _linger(self) -> None:
        if self._rank != 0 and self._verdict is not None and self._verdict.rank == 0:
            return  # it does not answer
        deadline = time.monotonic() + min(_LINGER_S, self.timeout_s)
        self._tell(deadline - time.monotonic())
        while self._rank == 0 and self._some_listen() and self._courier.is_alive() and time.monotonic() < deadline:
            time.sleep(min(self._beat_s, 0.1))

    def _some_listen(self) -> bool:
        now = self._clock.seconds
        return any(view.beat and view.live and now - view.seen < self._quick_s for view in self._views.values())

    # The thread that watches the clock

    def _watch(self) -> None:
        while not self._ended.wait(self._beat_s):
            if self._closed:
                return
            step = self._clock.tick()
            if step >= self.timeout_s:
                self._resumed = (self._clock.seconds, step)
            changes = self._now.changes
            if changes != self._progress[0]:
                self._progress = (changes, self._clock.seconds)
            verdict = self._judge()
            if verdict is not None:
                self._settle(verdict)
        time.sleep(GRACE_S)
        if self._closed:
            # The program has its thread back, and may go on. At its end an engine may still wait for ranks that are gone.
            threading.main_thread().join()
            time.sleep(GRACE_S)
        else:
            os.write(2, f"fastdistil: {self._words()}\n".encode())
        self._hard_exit(self._exit_code)

    def _judge(self) -> Verdict | None:
        if self._rank != 0 and self._now.kind == "finished":
            return None
        now = self._clock.seconds
        if self._resumed is not None:
            # The others go on if they were stopped and continued together with this rank, and are gone if they were not.
            since, stood_still_s = self._resumed
            if self._cut_off is None and now - since < self._quick_s:
                return None
            self._resumed = None
            if self._cut_off is not None or all(view.seen < since + self._quick_s / 2 for view in self._views.values()):
                return Verdict(None, f"this rank stood still for {stood_still_s:.0f} s and was given up by the others")
        if self._cut_off is not None:
            return self._judge_cut_off(self._cut_off)
        if self._rank != 0:
            return silent(self._views, now, self._quick_s if self._broken else self.timeout_s)
        views = {0: View(now, self._sent), **self._views}
        verdict = judge(views, now, self.timeout_s, self._quick_s)
        if verdict is None:
            self._worry(judge(views, now, self.timeout_s / 2, self.timeout_s))
        return verdict

    def _judge_cut_off(self, why: str) -> Verdict:
        if self._rank == 0:
            return Verdict(None, f"rank 0 cannot reach the store that it serves: {why}")
        return gone(0, "its connection is closed: killed or crashed", self._views[0].beat)

    def _worry(self, worry: Verdict | None) -> None:
        if worry is not None and (self._worried is None or worry.rank != self._worried.rank):
            self._note(f"{worry.text}; given up after {self.timeout_s:g} s")
        self._worried = worry

    def _beat(self) -> Beat:
        now = self._now
        changes, since = self._progress
        idle_s = round(self._clock.seconds - since, 2) if now.changes == changes else 0.0
        kind: RankStatus = "ended" if self._verdict is not None else now.kind
        frame = sys._current_frames().get(self._thread)
        walk = traceback.walk_stack(frame) if frame is not None else ()
        stack = compact_stack((frame.f_code, line) for frame, line in walk)
        return Beat(self._beats, kind, now.phase, now.update, now.waits_for, idle_s, stack, self._broken)

    # The thread that talks to the store

    def _correspond(self) -> None:
        errands: list[threading.Event] = []
        store = self._store
        try:
            store.create((VERDICT, STOP, *map(_beat_key, self._views)))
            last = False
            while not last:
                self._hurry.clear()
                errands = [self._errands.popleft() for _ in range(len(self._errands))]
                last = self._exchange(store)
                for done in errands:
                    done.set()
                if not last:
                    self._hurry.wait(self._beat_s)
        except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
            self._cut_off = str(error).partition("\n")[0]
        finally:
            for done in (*errands, *self._errands):
                done.set()

    def _exchange(self, store: SharedStore) -> bool:
        """Send and read one beat. Returns True after the last one."""
        self._beats += 1
        beat, verdict, closed = self._beat(), self._verdict, self._closed
        self._sent = beat
        store.set(_beat_key(self._rank), json.dumps(vars(beat)))
        if verdict is not None:
            store.set_first(VERDICT, json.dumps(verdict))
        if self._stop_wanted is not None and self.stop_requested is None:
            store.set_first(STOP, self._stop_wanted)
        published, stop, *beats = store.get_all([VERDICT, STOP, *map(_beat_key, self._views)])
        for rank, text in zip(self._views, beats, strict=True):
            self._see(rank, text)
        if stop and self.stop_requested is None:
            self.stop_requested = stop.decode(errors="replace")
        if published:
            heard = self._read(_VERDICT, published)
            if heard is None and verdict is not None:
                store.set(VERDICT, json.dumps(verdict))  # what is no rank's keeps none back
            elif heard is not None and verdict is None:
                self._settle(heard)
        if self._rank == 0 and self._beats % _FOREIGN_BEATS == 1:
            self._tell_of_strangers(store)
        return closed or (self._rank != 0 and beat.kind in ("finished", "ended"))

    def _see(self, rank: int, text: bytes) -> None:
        beat = self._read(_BEAT, text) if text else None
        if beat is None:
            return
        previous = self._views[rank].beat
        if previous is None or previous.number != beat.number:
            self._views[rank] = View(self._clock.seconds, beat)

    def _read(self, kind: TypeAdapter[T], text: bytes) -> T | None:
        """Return what a rank wrote, None where it is nothing of the kind: without a secret, anybody may have written it."""
        try:
            return kind.validate_json(text)
        except ValueError:
            self._strange = True
            return None

    def _tell_of_strangers(self, store: SharedStore) -> None:
        """Note once that others than this run's ranks write to its store."""
        foreign = store.foreign_keys()
        if (foreign or self._strange) and not self._warned_of_strangers:
            self._warned_of_strangers = True
            where = f" ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''})" if foreign else ""
            self._note(
                f"somebody who is no rank of this run writes to the ranks' store{where}: ignored; ranks of another run that "
                "were given the same MASTER_PORT, or ranks of this one without its FASTDISTIL_STORE_SECRET?"
            )


def _beat_key(rank: int) -> str:
    return f"monitor/beat/{rank}"


def agree_equal(store: SharedStore, rank: int, size: int, values: Mapping[str, str], monitor: Monitor) -> None:
    """Compare values that must be the same on all ranks, by name; every rank calls this, with a connection of its own.

    Raises UserError on all ranks, naming who differs from rank 0 in what, and RankLost naming who is gone, or does not come.
    """
    try:
        with monitor.waiting(f"every rank's {', '.join(values)}"):
            differing = _agree(store, rank, size, values, monitor)
    except (RuntimeError, ValueError) as error:  # torch's DistError is one; what is no rank's is no JSON of the kind
        raise monitor.lost(error) from error
    if differing:
        parts = ", ".join(f"another {name} on {rank_list(ranks)}" for name, ranks in differing.items())
        raise UserError(f"{parts} than on rank 0; start every rank with the same command, on the same files")


def _agree(store: SharedStore, rank: int, size: int, facts: Mapping[str, str], monitor: Monitor) -> dict[str, list[int]]:
    """Return, on every rank: name -> ranks whose value is not rank 0's."""
    turn = store.add(f"agree/calls/{rank}", 1)
    keys = [f"agree/{turn}/{other}" for other in range(size)]
    result, heard = f"agree/{turn}/result", f"agree/{turn}/heard"
    store.set(keys[rank], json.dumps(dict(facts)))
    if rank != 0:
        _await_keys(store, [result], monitor)
        differing = TypeAdapter(dict[str, list[int]]).validate_json(store.get(result))
        if differing:
            store.add(heard, 1)
        return differing
    _await_keys(store, keys, monitor)
    first, *others = (_AGREED.validate_json(store.get(key)) for key in keys)
    names = dict.fromkeys(name for values in (first, *others) for name in values)
    by_name = {name: [rank for rank, values in enumerate(others, 1) if values.get(name) != first.get(name)] for name in names}
    differing = {name: ranks for name, ranks in by_name.items() if ranks}
    store.set(result, json.dumps(differing))
    if differing:  # all will raise, and the store goes with rank 0: not before the others have heard
        until = time.monotonic() + _LINGER_S
        while store.add(heard, 0) < size - 1 and time.monotonic() < until:
            time.sleep(0.02)
    return differing


def _await_keys(store: SharedStore, keys: Sequence[str], monitor: Monitor) -> None:
    """Wait until the store has all keys. Without a limit: who does not come, the monitor says, here as everywhere."""
    pause_s = 0.01
    while not store.check(keys):
        monitor.check()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
