"""A run followed while it is written: what `fastdistil watch` shows.

`Live.refresh` reads what events.jsonl has gained since the last call, for a bounded time. `Live.strip` is the top of the page:
how far the run is and whether it is well. `Live.page` is the report of the events so far, made again when there are more.

Of a long log `LINES` log lines at most are kept, evenly spread, and the last one, so that a report costs the same however long
the run is. Sums of tokens and skipped updates are of all lines, and curves show what stands out among those left out.

Rates are over the last `RECENT` log lines of the present attempt (since the last start or resume):

    seconds of a line     tokens / tokens_per_s: training alone
    time left             (updates - update) * (sum of seconds / sum of updates
                          + seconds of the attempt's evaluations and checkpoints / updates of the attempt)
    a rank's work         sum of rank_worked_s / sum of updates; slow: more than `_SLOW` times the mean of the ranks
    silent                no event for 5 usual (median) intervals between log lines and twice the longest pause so far

Nothing here waits, and nothing imports torch: following a run must not cost its machine anything.
"""

import itertools
import math
import os
import secrets
import statistics
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdistil.errors import FastdistilError, UserError, printable
from fastdistil.events import (
    FORMAT,
    Checkpoint,
    Environment,
    Evaluation,
    Event,
    Format,
    MemoryParts,
    Note,
    Resume,
    RunDone,
    RunNotFinite,
    RunStopped,
    Start,
    Trace,
    Train,
    effective_events,
    parse_event,
)
from fastdistil.profiling.quantities import duration, quantity
from fastdistil.profiling.report.history import extend_attempts, make_history, read_recipe
from fastdistil.profiling.report.report import as_html, sum_up, template
from fastdistil.profiling.report.svg import without_controls
from fastdistil.redaction import redacted
from fastdistil.untrusted import real

RECENT, LINES, _SPIKES = 20, 300, 50
_SLOW = 1.1
_QUIET_S, _FIRST_QUIET_S = 5.0, 120.0
"""Shorter pauses are no silence; the second where no interval is known yet (compilation, the first window of data)."""
POLL_S = 2.0
READ_S = 0.2
CHUNK_BYTES = 2**20
_REPORT_SHARE = 0.05
"""Of a core's time, at most, for the reports of a run that goes on."""
_LINES_SHOWN, _EVENTS_SHOWN = 3, 12
_VERDICTS = {
    "waiting": "waiting for the run", "reading": "reading the log", "unreadable": "cannot be read", "starting": "starting",
    "running": "running", "silent": "silent", "died": "its process is gone", "done": "done", "stopped": "stopped",
    "nonfinite": "not finite",
}  # fmt: skip


class Status(NamedTuple):
    kind: str
    """A key of _VERDICTS."""
    why: str = ""


class Progress(NamedTuple):
    """How far a run is; None: not known."""

    update: int
    planned: int | None
    begun: int
    """The update that the present attempt began after."""
    elapsed_s: float | None
    """Of the present attempt, to its last event."""
    left_s: float | None
    """After the last event."""

    @property
    def share(self) -> float | None:
        return self.update / self.planned if self.planned else None


class Live:
    """`clock`: unix seconds; `elapsed`: seconds that only ever grow."""

    def __init__(
        self, directory: Path, clock: Callable[[], float] = time.time, elapsed: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory = directory
        self._clock, self._elapsed = clock, elapsed
        self._log_stamp: tuple[int, ...] = ()
        self._recipe: dict[str, Any] = {}
        self._recipe_stamp: tuple[int, ...] = ()
        self._trouble, self._locked = "", False
        self._page, self._page_of, self._page_due = b"", "", -math.inf
        self._forget()

    def _forget(self) -> None:
        """Begin anew: there is no log, or it is another one than before."""
        self._log_name = secrets.token_hex(4)
        self._identity: tuple[int, int] | None = None
        self._offset = self._size = self._log_lines = 0
        self.events: list[Event] = []
        """The effective ones, with every `_stride`-th log line."""
        self._stride = 1
        self._spikes: list[Train] = []
        self.updates, self._tokens, self._skipped = array("q"), array("q"), array("d")
        """Of every effective log line; skipped: nan where it is not recorded."""
        self._attempts: list[list[float]] = []
        self._heard, self._last_time = self._elapsed(), math.nan
        self._begin(None)

    def _begin(self, start: Start | None) -> None:
        """Begin an attempt."""
        self._start, self._update = start, start.update if start is not None else 0
        self._recent: deque[Train] = deque(maxlen=RECENT)
        self._longest_s = self._aside_s = 0.0
        self._outcome: RunDone | RunStopped | RunNotFinite | None = None
        self._lock_seen = False

    # ---- reading

    def refresh(self) -> None:
        """Take in what was written since the last call; stops after about `READ_S` seconds, the next call goes on."""
        # Before reading: a run that ends writes its last line first and lets go of the directory then.
        self._locked, self._trouble = _holds_lock(self.directory), ""
        try:
            self._read_recipe()
            self._read_log(self.directory / "events.jsonl")
        except FileNotFoundError:
            if self._identity is not None:
                self._forget()
        except OSError as error:
            self._trouble = f"{error.strerror}: {error.filename or self.directory}"
        self._lock_seen |= self._locked

    def _read_recipe(self) -> None:
        path = self.directory / "recipe.yaml"
        try:
            stamp = _stamp(path)
        except FileNotFoundError:
            return
        if stamp != self._recipe_stamp:
            self._recipe_stamp = stamp
            try:
                self._recipe = redacted(read_recipe(path))
            except UserError:
                self._recipe = {}  # half written; its time changes when it is whole

    def _read_log(self, path: Path) -> None:
        stamp = device, inode, size, _ = _stamp(path)
        if stamp == self._log_stamp and not self.reading:
            return
        self._log_stamp = stamp
        if (device, inode) != self._identity or size < self._offset:
            self._forget()
            self._identity = device, inode
        following, before = self._log_lines > 0 and not self.reading, self._log_lines
        self._size = size
        until = self._elapsed() + READ_S
        with path.open("rb") as file:
            file.seek(self._offset)
            while lines := file.readlines(CHUNK_BYTES):
                for line in lines:
                    if not line.endswith(b"\n"):
                        self._size = self._offset  # torn, or being written
                        break
                    self._offset += len(line)
                    self._take(line)
                if self._elapsed() > until:
                    break
        if self._log_lines > before:
            # The run's machine may have another clock; what was there before has only that one.
            self._heard = self._elapsed() - (0.0 if following else max(0.0, self._clock() - self._last_time))

    @property
    def reading(self) -> bool:
        """True while there is more to read at once."""
        return self._offset < self._size

    def _take(self, line: bytes) -> None:
        self._log_lines += 1
        try:
            event = parse_event(line)
        except ValueError:
            self._note(f"line {self._log_lines} of events.jsonl is not an event and was left out")
            return
        extend_attempts(self._attempts, event)
        if event.time is not None:
            if self._start is not None and math.isfinite(self._last_time):
                self._longest_s = max(self._longest_s, event.time - self._last_time)
            self._last_time = event.time
        match event:
            case Train():
                self._take_line(event)
                return
            case Format():
                if event.version > FORMAT:
                    self._note(f"a newer fastdistil wrote this log (format {event.version}): some of it may be missing here")
                return
            case Start():
                self._take_back(event.update)
                self._begin(event)
            case Evaluation() | Checkpoint():
                self._aside_s += event.seconds or 0.0
            case RunStopped() | RunNotFinite() | RunDone():
                self._outcome = event
                self._update = event.update or self._update
        self.events.append(event)

    def _note(self, message: str) -> None:
        self.events.append(Note(time=self._last_time if math.isfinite(self._last_time) else None, message=message))

    def _take_line(self, line: Train) -> None:
        if len(self.updates) % self._stride == 0:
            self.events.append(line)
        elif self._recent:
            self._leave_out(line, self._recent[-1])
        self._recent.append(line)
        self._update = line.update
        self.updates.append(line.update)
        self._tokens.append(line.tokens or 0)
        self._skipped.append(math.nan if line.skipped is None else line.skipped)
        if len(self.updates) > LINES * self._stride:
            self._stride *= 2
            lines = [event for event in self.events if isinstance(event, Train)]
            for line, usual in zip(lines[1::2], lines[::2], strict=False):
                self._leave_out(line, usual)
            left_out = {id(line) for line in lines[1::2]}
            self.events = [event for event in self.events if id(event) not in left_out]

    def _leave_out(self, line: Train, usual: Train) -> None:
        if _stands_out(line, usual):
            self._spikes = [*self._spikes, line][-_SPIKES:]

    def _take_back(self, update: int) -> None:
        count = bisect_right(self.updates, update)
        for column in (self.updates, self._tokens, self._skipped):
            del column[count:]
        self.events = effective_events([*self.events, Resume(update=update)])[:-1]
        self._spikes = [line for line in self._spikes if line.update <= update]

    # ---- showing

    @property
    def _state(self) -> str:
        """Changes with everything that a report is made of."""
        return f"{self._log_name}.{self._log_lines}.{'-'.join(map(str, self._recipe_stamp))}"

    def page(self) -> tuple[bytes, str]:
        """The report as a page, and a name of this version of it; while a run goes on it may lag behind a little."""
        state = self._state
        due = self._elapsed() >= self._page_due or self._outcome is not None
        if not self._page or (state != self._page_of and due and not self.reading):
            begun = self._elapsed()
            self._page, self._page_of = printable(self._report(state)).encode(), state
            self._page_due = self._elapsed() + (self._elapsed() - begun) / _REPORT_SHARE
        return self._page, self._page_of

    def _report(self, state: str) -> str:
        last = [line for line in [*self._recent][-1:] if not any(line is event for event in self.events)]
        skipped = [count for count in self._skipped if not math.isnan(count)]
        try:
            history = replace(
                make_history(self.directory, self._recipe, [*self.events, *last], self._attempts),
                log_lines=len(self.updates),
                spikes=self._spikes,
                tokens=sum(self._tokens),
                skipped=round(math.fsum(skipped)) if skipped else None,
            )
            return as_html([sum_up(history)], live=state)
        except FastdistilError as error:
            note = Note(message=str(error))
            return as_html([sum_up(make_history(self.directory, self._recipe, [note], self._attempts))], live=state)

    def strip(self) -> bytes:
        """The top of the page, as HTML."""
        status = self.status()
        events = [event for event in self.events if not isinstance(event, Train | Environment | MemoryParts | Trace)]
        log = sorted([*events[-_EVENTS_SHOWN:], *list(self._recent)[-_LINES_SHOWN:]], key=_when)
        progress, age_s = self.progress(), max(0.0, self._elapsed() - self._heard)
        left_s = progress.left_s if status.kind == "running" else None
        html = template("watch.html.j2").render(
            name=without_controls(self.directory.resolve().name),
            directory=without_controls(str(self.directory)),
            page=self.page()[1],
            poll_s=0.1 if self.reading else POLL_S,
            kind=status.kind,
            verdict=_VERDICTS[status.kind],
            why=without_controls(status.why),
            progress=progress,
            time_left=None if left_s is None else duration(max(0.0, left_s - age_s)),
            elapsed=None if progress.elapsed_s is None else duration(progress.elapsed_s),
            heard=None if status.kind == "waiting" else duration(age_s),
            ranks=self.ranks_text(),
            log=[(_when(event), event.kind, without_controls(_text(event))) for event in log],
        )
        return printable(html).encode()

    def status(self) -> Status:
        age_s, usual_s = self._elapsed() - self._heard, self._usual_s()
        allowed_s = _FIRST_QUIET_S if math.isnan(usual_s) else max(_QUIET_S, 5 * usual_s, 2 * self._longest_s)
        if self._trouble:
            return Status("unreadable", self._trouble)
        if self.reading:
            return Status("reading", f"{self._offset / self._size:.0%} read")
        if self._outcome is not None:
            message = _text(self._outcome)
            if isinstance(self._outcome, RunStopped):
                message = f"saved{f' ({message})' if message else ''}; continue with --resume"
            return Status(self._outcome.kind, message)
        if self._start is None:
            return Status("waiting", f"there is no {self.directory / 'events.jsonl'} yet; this page goes on when it appears")
        if self._lock_seen and not self._locked:
            return Status("died", "the process that held the run directory ended without a last word; continue with --resume")
        if age_s > allowed_s:
            usual = "" if math.isnan(usual_s) else f", with {duration(usual_s)} between log lines before"
            holder = "a process still holds" if self._locked else "no process on this machine holds"
            return Status("silent", f"no event for {duration(age_s)}{usual}; {holder} the run directory")
        if not self._recent:
            return Status("starting", "no log line yet: the first update is under way")
        return Status("running")

    def _usual_s(self) -> float:
        """The median interval between log lines; nan before the second."""
        times = [real(line.time) for line in self._recent]
        gaps = [gap for before, after in itertools.pairwise(times) if math.isfinite(gap := after - before)]
        return statistics.median(gaps) if gaps else math.nan

    def progress(self) -> Progress:
        planned, begun = (self._start.updates or None, self._start.update) if self._start is not None else (None, 0)
        timed = [(line.updates or 1, seconds) for line in self._recent if math.isfinite(seconds := _seconds(line))]
        left_s, done = None, self._update - begun
        if planned and done > 0 and timed and self._outcome is None:
            per_update_s = math.fsum(seconds for _, seconds in timed) / sum(updates for updates, _ in timed)
            left_s = (planned - self._update) * (per_update_s + self._aside_s / done)
        first, latest = (self._attempts or [[]])[-1] or (math.nan, math.nan)
        elapsed_s = latest - first if math.isfinite(first) else None
        return Progress(update=self._update, planned=planned, begun=begun, elapsed_s=elapsed_s, left_s=left_s)

    def ranks_text(self) -> str:
        """Say whether the ranks work equally long; empty with one rank or where it is not recorded."""
        ranks = (self._start.ranks or 1) if self._start is not None else 1
        lines = [line for line in self._recent if len(line.rank_worked_s) == ranks]
        if ranks < 2 or not lines:
            return ""
        of_rank = np.sum([line.rank_worked_s for line in lines], axis=0) / sum(line.updates or 1 for line in lines)
        mean = float(of_rank.mean())
        text = f"{ranks} ranks, work of each {quantity(of_rank.min(), 's')} to {quantity(of_rank.max(), 's')} an update"
        slow = [f"rank {rank} (\N{MULTIPLICATION SIGN}{of_rank[rank] / mean:.2f})" for rank in np.argsort(-of_rank)
                if of_rank[rank] > _SLOW * mean > 0]  # fmt: skip
        return f"{text}; slow: {', '.join(slow)}" if slow else f"{text}; even"


def _stands_out(line: Train, usual: Train) -> bool:
    """Say whether a curve would miss this line: a loss or norm of more than twice that of another one, or not finite."""
    pairs = [(line.total, usual.total), (line.grad_norm, usual.grad_norm), (line.grad_norm_max, usual.grad_norm_max)]
    return any(
        value is not None and normal is not None and math.isfinite(normal) and not value <= 2 * abs(normal)
        for value, normal in pairs
    )


def _seconds(line: Train) -> float:
    """Return the line's seconds of training; nan if not recorded."""
    rate = real(line.tokens_per_s)
    return (line.tokens or 0) / rate if 0 < rate < math.inf else math.nan


def _stamp(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _when(event: Event) -> str:
    return "" if event.time is None else f"{datetime.fromtimestamp(event.time, UTC):%Y-%m-%d %H:%M:%S}"


def _text(event: Event) -> str:
    """Return what the log on the page says of an event."""
    match event:
        case Start():
            ranks = event.ranks or 1
            who = f"{ranks} ranks, engine {event.engine}" if ranks > 1 else "1 rank"
            return f"{'continued after' if isinstance(event, Resume) else 'started at'} update {event.update:,} with {who}"
        case Checkpoint():
            return f"saved {event.path or ''} in {duration(event.seconds or 0.0)}"
        case Train():
            return _numbers(event.update, {"loss": event.total, "tokens/s": event.tokens_per_s})
        case Evaluation():
            return _numbers(event.update, {"loss": event.loss, "perplexity": event.perplexity, "KL": event.kl})
        case Note() | RunNotFinite():
            return str(redacted(event.message))
        case RunStopped():
            return str(redacted(event.why))
    return ""


def _numbers(update: int, numbers: Mapping[str, float | None]) -> str:
    return ", ".join([f"update {update:,}", *(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)])


def _holds_lock(directory: Path) -> bool:
    """Look whether a process that this one can see holds the run (runs.sole_user), without locking: that could refuse a run.

    False says little: the run may be on another machine, or in another container.
    """
    try:
        status = directory.stat()
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    device = status.st_dev
    return f" {os.major(device):02x}:{os.minor(device):02x}:{status.st_ino} " in locks
