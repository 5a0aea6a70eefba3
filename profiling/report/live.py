"""A run directory followed while it is written: what `fastdistil watch` shows.

`Live.refresh` reads what events.jsonl has gained since the last call, for a bounded time; `Live.changes` gives what a page has
not seen yet. A start or resume after update N takes back what was logged for later updates, as
`events.read_events(..., effective=True)` does for the whole file.

Rates are over the last `RECENT` log lines of the present attempt (since the last start or resume):

    seconds of a line     tokens / tokens_per_s: training alone
    tokens/s              sum of tokens / sum of seconds
    time left             (updates - update) * (sum of seconds / sum of updates
                          + seconds of the attempt's evaluations and checkpoints / updates of the attempt)
    a rank's own work     sum of rank_worked_s / sum of updates; slow: more than `SLOW` times the mean of the ranks
    silent                no event for 5 usual (median) intervals between log lines and twice the longest pause so far

Nothing here waits, and nothing imports torch: following a run must not cost its machine anything.
"""

import itertools
import math
import os
import re
import secrets
import statistics
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastdistil.events import as_fields, parse_event
from fastdistil.profiling.report.live_lines import CURVES, LOSSES, PER_RANK, Event, Line, LiveCurve, line_of
from fastdistil.redaction import redacted
from fastdistil.untrusted import read_yaml, real

RECENT = 20
"""Log lines."""
POINTS = 400
"""Of a curve, at most: longer ones go out as mean, least and largest value of equally many lines."""
SLOW = 1.1
QUIET_S, FIRST_QUIET_S = 5.0, 120.0
"""Shorter pauses are no silence; the second where no interval is known yet (compilation, the first window of data)."""
LOG_ENTRIES = 400
READ_S = 0.2
CHUNK_BYTES = 2**20


class Live:
    """`clock`: unix seconds; `elapsed`: seconds that only ever grow."""

    def __init__(
        self, directory: Path, clock: Callable[[], float] = time.time, elapsed: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory = directory
        self._clock, self._elapsed = clock, elapsed
        self._name = directory.resolve().name
        self._seen: tuple[int, ...] = ()
        self._recipe: Event = {}
        self._recipe_seen: tuple[int, ...] = ()
        self._trouble: str | None = None
        self._locked = False
        self._forget()

    def _forget(self) -> None:
        """There is no log, or it is another one than before."""
        self._generation = secrets.token_hex(4)
        self._identity: tuple[int, int] | None = None
        self._offset = self._size = self._events = 0
        self._updates = array("q")
        self._tokens = array("d")
        """Of all effective lines up to each."""
        self._columns = {curve.name: array("d") for curve in CURVES}
        self._recorded: set[str] = set()
        """Names of the columns that hold a number."""
        self._evaluations: list[Event] = []
        self._log: list[Event] = []
        self._dropped = 0
        """Log entries that were left out at the front."""
        self._environment: Event = {}
        self._heard = self._elapsed()
        self._last_time = math.nan
        self._begin({})

    def _begin(self, start: Event) -> None:
        """A new attempt."""
        self._start = start
        self._update = start.get("update", 0)
        self._recent: deque[Line] = deque(maxlen=RECENT)
        self._unsummed: deque[Event] = deque(maxlen=RECENT)
        """Lines that are not in `_recent` yet: of the many that are read at first only the last ones are looked into."""
        self._longest_s = self._aside_s = 0.0
        self._outcome: Event | None = None
        self._lock_seen = False

    # ---- reading

    def refresh(self) -> None:
        """Take in what was written since the last call; stops after about `READ_S` seconds, the next call goes on."""
        # Before reading: a run that ends writes its last line first and lets go of the directory then.
        self._locked = _holds_lock(self.directory)
        self._trouble = None
        try:
            self._read_recipe()
            self._read_events()
        except FileNotFoundError:
            if self._identity is not None:
                self._forget()
        except OSError as error:
            self._trouble = f"{error.strerror}: {error.filename or self.directory}"
        self._lock_seen |= self._locked

    def _read_recipe(self) -> None:
        path = self.directory / "recipe.yaml"
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        if (stamp := (status.st_ino, status.st_mtime_ns, status.st_size)) == self._recipe_seen:
            return
        self._recipe_seen = stamp
        try:
            values = read_yaml(path)
        except ValueError:
            values = None  # half written; its time changes when it is whole
        self._recipe = values if isinstance(values, dict) else {}

    def _read_events(self) -> None:
        path = self.directory / "events.jsonl"
        status = path.stat()
        if (stamp := (status.st_ino, status.st_size, status.st_mtime_ns)) == self._seen and not self.reading:
            return
        self._seen = stamp
        identity = status.st_dev, status.st_ino
        if identity != self._identity or status.st_size < self._offset:
            self._forget()
            self._identity = identity
        following, begun = self._events > 0 and not self.reading, self._events
        self._size = status.st_size
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
        if self._events > begun:
            # The run's machine may have another clock; what was there before has only that one.
            self._heard = self._elapsed() - (0.0 if following else max(0.0, self._clock() - self._last_time))

    @property
    def reading(self) -> bool:
        """There is more to read at once."""
        return self._offset < self._size

    def _take(self, line: bytes) -> None:
        self._events += 1
        try:
            parsed = parse_event(line)
            event = {"event": parsed.kind, **as_fields(parsed)}
        except ValueError:
            self._note("unreadable", {}, f"line {self._events} of events.jsonl is not an event and was left out")
            return
        at, update = real(event.get("time")), event.get("update")
        if self._start and math.isfinite(at - self._last_time):
            self._longest_s = max(self._longest_s, at - self._last_time)
        if math.isfinite(at):
            self._last_time = at
        match event["event"]:
            case "start" | "resume":
                self._take_back(update if isinstance(update, int) else 0)
                self._begin(event)
                self._note(event["event"], event, _start_text(event))
            case "train" if isinstance(update, int):
                self._update = update
                self._updates.append(update)
                self._tokens.append((self._tokens[-1] if self._tokens else 0.0) + _or_zero(event.get("tokens")))
                for curve in CURVES:
                    value = curve.get(event)
                    self._columns[curve.name].append(value)
                    if curve.name not in self._recorded and math.isfinite(value):
                        self._recorded.add(curve.name)
                self._unsummed.append(event)
            case "evaluation":
                self._aside_s += _or_zero(event.get("seconds"))
                self._evaluations.append(event)
                self._note("evaluation", event, _evaluation_text(event))
            case "checkpoint":
                self._aside_s += _or_zero(event.get("seconds"))
                self._note("checkpoint", event, f"saved {event.get('path', '')} in {_or_zero(event.get('seconds')):.2g} s")
            case "note":
                self._note("note", event, str(event.get("message", "")))
            case "environment":
                self._environment = event
            case "stopped" | "nonfinite" | "done" as kind:
                self._outcome = event
                if isinstance(update, int):
                    self._update = update
                text = {"stopped": event.get("why"), "nonfinite": event.get("message")}.get(kind) or ""
                self._note(kind, event, str(text))

    def _note(self, kind: str, event: Event, text: str) -> None:
        at, update = real(event.get("time")), event.get("update")
        self._log.append(
            {
                "kind": kind,
                "time": at if math.isfinite(at) else None,
                "update": update if isinstance(update, int) else None,
                "text": redacted(text),
            }
        )
        if len(self._log) > 2 * LOG_ENTRIES:
            self._dropped += len(self._log) - LOG_ENTRIES
            del self._log[:-LOG_ENTRIES]

    def _take_back(self, update: int) -> None:
        count = bisect_right(self._updates, update)
        evaluations = [event for event in self._evaluations if not _later(event, update)]
        log = [entry for entry in self._log if entry["kind"] in ("start", "resume") or not _later(entry, update)]
        if (count, len(evaluations), len(log)) == (len(self._updates), len(self._evaluations), len(self._log)):
            return
        columns: list[array[Any]] = [self._updates, self._tokens, *self._columns.values()]
        for column in columns:
            del column[count:]
        self._evaluations, self._log = evaluations, log
        self._generation = secrets.token_hex(4)

    # ---- showing

    def changes(self, cursor: str = "") -> Event | None:
        """What is new since the answer that had this `cursor` (all of it for an unknown one); None: nothing.

        While the log is still being read, the status alone.
        """
        self._recent.extend(map(line_of, self._unsummed))
        self._unsummed.clear()
        status = self._status()
        lines, stride = len(self._updates), _stride(len(self._updates))
        recipe = "-".join(map(str, self._recipe_seen))
        position = (self._generation, stride, lines, len(self._evaluations), self._dropped + len(self._log))
        now = ".".join(map(str, (*position, self._events, recipe, status["kind"], int(status["locked"]))))
        if self.reading:
            return {"cursor": cursor, "now": self._clock(), "poll_s": 0.05, "status": status}
        if cursor == now:
            return None
        parsed = re.fullmatch(r"([0-9a-f]{8})\.(\d+)\.(\d{1,18})\.(\d{1,18})\.(\d{1,18})\..*", cursor, re.ASCII)
        reset = parsed is None or parsed.group(1, 2) != (self._generation, str(stride))
        seen_lines, seen_evaluations, seen_log = map(int, parsed.group(3, 4, 5)) if parsed and not reset else (0, 0, 0)
        return {
            "cursor": now,
            "reset": reset,
            "now": self._clock(),
            "poll_s": self._poll_s(),
            "status": status,
            "run": self._run(),
            "progress": self._progress(),
            "speed": self._speed(),
            "phases": self._phases(),
            "ranks": self._ranks(),
            "memory": self._memory(),
            "device": self._device(),
            "curves": self._curves(min(seen_lines, lines) // stride, stride),
            "evaluations": [_plain(event) for event in self._evaluations[seen_evaluations:]],
            "log": self._log[max(0, seen_log - self._dropped) :][-LOG_ENTRIES:],
        }

    def _intervals(self) -> list[float]:
        times = [line.time for line in self._recent]
        return [gap for before, after in itertools.pairwise(times) if math.isfinite(gap := after - before)]

    def _poll_s(self) -> float:
        intervals = self._intervals()
        return min(10.0, max(3.0, statistics.median(intervals))) if intervals else 2.0

    def _status(self) -> Event:
        """kind: waiting, reading, unreadable, starting, running, silent, died, done, stopped, nonfinite."""
        age_s = self._elapsed() - self._heard
        intervals = self._intervals()
        usual_s = statistics.median(intervals) if intervals else None
        allowed_s = max(QUIET_S, 5 * usual_s, 2 * self._longest_s) if usual_s is not None else FIRST_QUIET_S
        status: Event = {
            "kind": "running" if self._recent else "starting",
            "heard": _or_none(self._clock() - age_s),
            "usual_interval_s": usual_s,
            "last_interval_s": intervals[-1] if intervals else None,
            "allowed_s": allowed_s,
            "locked": self._locked,
            "message": "",
        }
        if self._trouble is not None:
            status |= {"kind": "unreadable", "message": self._trouble}
        elif self.reading:
            status |= {"kind": "reading", "share": self._offset / self._size}
        elif self._outcome is not None:
            outcome = self._outcome
            message = outcome.get("why") or outcome.get("message") or ""
            status |= {"kind": outcome["event"], "message": redacted(str(message))}
        elif not self._start:
            status |= {"kind": "waiting", "message": str(self.directory / "events.jsonl")}
        elif self._lock_seen and not self._locked:
            status |= {"kind": "died"}
        elif age_s > allowed_s:
            status |= {"kind": "silent"}
        return status

    def _run(self) -> Event:
        names = ("device", "precision", "engine", "ranks", "nodes", "rings", "sync", "compression", "torch", "kernels")
        counts = ("student_parameters", "teacher_parameters")
        devices = self._environment.get("devices")
        first = devices[0] if isinstance(devices, list) and devices and isinstance(devices[0], dict) else {}
        return {
            "name": self._name,
            "directory": str(self.directory),
            **{name: _plain(self._start.get(name)) for name in (*names, *counts)},
            "device_name": _plain(first.get("name")),
            "device_memory_bytes": _or_none(real(first.get("memory_bytes"))),
            "processor": _plain(self._environment.get("processor")),
            "host": _plain(self._environment.get("host")),
            "host_memory_bytes": _or_none(real(self._environment.get("memory_bytes"))),
        }

    def _seconds_per_update(self) -> float:
        timed = [line for line in self._recent if math.isfinite(line.seconds)]
        updates = sum(line.updates for line in timed)
        return math.fsum(line.seconds for line in timed) / updates if updates else math.nan

    def _progress(self) -> Event:
        updates, begun = self._start.get("updates"), self._start.get("update", 0)
        has_total = isinstance(updates, int) and updates > 0
        done = self._update - begun if isinstance(begun, int) else 0
        left_s = math.nan
        if has_total and done > 0 and self._outcome is None:
            left_s = (updates - self._update) * (self._seconds_per_update() + self._aside_s / done)
        return {
            "update": self._update,
            "updates": updates if has_total else None,
            "share": self._update / updates if has_total else None,
            "left_s": _or_none(left_s),
            "elapsed_s": _or_none(self._last_time - real(self._start.get("time"))),
            "attempt_from": begun,
            "tokens": self._tokens[-1] if self._tokens else None,
        }

    def _speed(self) -> Event:
        timed = [line for line in self._recent if math.isfinite(line.seconds)]
        seconds = math.fsum(line.seconds for line in timed)
        steps = [step for line in self._recent for step in line.steps]
        p50, p95 = np.percentile(steps, (50, 95)).tolist() if steps else (None, None)
        last = self._recent[-1].event if self._recent else {}
        mfu = last.get("mfu")
        return {
            "tokens_per_s": math.fsum(line.tokens for line in timed) / seconds if seconds > 0 else None,
            "lines": len(self._recent),
            "step_p50_s": p50,
            "step_p95_s": p95,
            "steps": len(steps),
            "data_wait_share": _or_none(real(last.get("data_wait_share"))),
            "mfu": _plain(mfu) if isinstance(mfu, dict) else None,
            "latest": {name: _plain(last.get(name)) for name in ("total", "grad_norm", "lr", "skipped", "skipped_in_all")},
        }

    def _phases(self) -> Event | None:
        """Mean seconds of an update; `overlapped` runs beside the others, so that it is no part of the whole."""
        steps = [step for line in self._recent for step in line.steps]
        names = dict.fromkeys(name for line in self._recent for name in line.phases)
        if not steps or not names:
            return None
        means = {}
        for name in names:
            sums = [line.phases[name] for line in self._recent if name in line.phases]
            means[name] = math.fsum(seconds for seconds, _ in sums) / sum(count for _, count in sums)
        step_s = math.fsum(steps) / len(steps)
        overlapped = means.pop("communication", None)
        means["other"] = max(0.0, step_s - math.fsum(means.values()))
        return {"step_s": step_s, "updates": len(steps), "seconds": means, "communication_s": overlapped}

    def _ranks(self) -> list[Event] | None:
        """One entry a rank; None with a single rank, or before the first log line."""
        ranks = self._start.get("ranks")
        if not isinstance(ranks, int) or ranks < 2 or not self._recent:
            return None
        worked, tokens, waited = (self._per_rank(name, ranks) for name in PER_RANK)
        mean = statistics.fmean(worked) if worked else math.nan
        slowest = [line.event.get("slowest_rank") for line in self._recent]
        all_tokens = math.fsum(tokens) if tokens else 0.0
        return [
            {
                "rank": rank,
                "worked_s": worked[rank] if worked else None,
                "of_mean": worked[rank] / mean if worked and mean > 0 else None,
                "slow": bool(worked and mean > 0 and worked[rank] > SLOW * mean),
                "tokens_share": tokens[rank] / all_tokens if tokens and all_tokens > 0 else None,
                "data_wait_s": waited[rank] if waited else None,
                "slowest_share": slowest.count(rank) / len(slowest) if None not in slowest else None,
            }
            for rank in range(ranks)
        ]

    def _per_rank(self, name: str, ranks: int) -> list[float] | None:
        """Per update, of each rank; None if not recorded."""
        lines = [line for line in self._recent if len(line.per_rank.get(name, ())) == ranks]
        updates = sum(line.updates for line in lines)
        if not updates:
            return None
        summed: list[float] = (np.sum([line.per_rank[name] for line in lines], axis=0) / updates).tolist()
        return summed

    def _memory(self) -> Event:
        """Bytes, by name."""
        event = self._recent[-1].event if self._recent else {}
        old = {"device_allocated_bytes": "allocated_bytes", "device_peak_bytes": "peak_allocated_bytes"}
        old["host_peak_bytes"] = "peak_rss_bytes"
        values = {new: event[name] for name, new in old.items() if name in event}
        memory = event.get("memory")
        values |= memory if isinstance(memory, dict) else {}
        return {name: _or_none(real(value)) for name, value in values.items() if not isinstance(value, dict)}

    def _device(self) -> Event | None:
        device = self._recent[-1].event.get("device") if self._recent else None
        return _plain(device) if isinstance(device, dict) else None

    def _curves(self, begin: int, stride: int) -> Event:
        """Buckets of `stride` lines from number `begin` on: the last update, and mean, least and largest of each curve."""
        updates = np.array(self._updates[begin * stride :])
        starts = np.arange(0, len(updates), stride)
        ends = np.minimum(starts + stride, len(updates)) - 1
        weights = self._recipe.get("objective")
        series = []
        for curve in CURVES:
            if curve.name not in self._recorded or not self._shown(curve, weights):
                continue
            values = np.array(self._columns[curve.name][begin * stride :])
            values = np.where(np.isfinite(values), values, np.nan)
            entry: Event = {"name": curve.name, "label": curve.label, "unit": curve.unit, "group": curve.group}
            if stride == 1 or not len(starts):
                entry["mean"] = _rounded(values)
            else:
                count = np.add.reduceat(np.isfinite(values).astype(float), starts)
                with np.errstate(invalid="ignore"):
                    entry["mean"] = _rounded(np.add.reduceat(np.nan_to_num(values), starts) / count)
                entry["least"] = _rounded(np.fmin.reduceat(values, starts))
                entry["largest"] = _rounded(np.fmax.reduceat(values, starts))
            series.append(entry)
        return {"from": begin, "stride": stride, "updates": updates[ends].tolist() if len(starts) else [], "series": series}

    @staticmethod
    def _shown(curve: LiveCurve, weights: object) -> bool:
        """Terms of weight 0 are computed but no part of the objective."""
        if curve.name not in LOSSES or not isinstance(weights, dict):
            return True
        return any(real(weights.get(key, math.nan)) != 0 for key in LOSSES[curve.name])


def _stride(lines: int) -> int:
    stride = 1
    while lines > POINTS * stride:
        stride *= 2
    return stride


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Six digits are more than a curve shows."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_zero(value: object) -> float:
    number = real(value)
    return number if math.isfinite(number) else 0.0


def _later(event: Event, update: int) -> bool:
    return isinstance(event.get("update"), int) and event["update"] > update


def _plain(value: Any) -> Any:
    """JSON that every parser takes: Python's also reads NaN and Infinity."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case _:
            return value


def _start_text(event: Event) -> str:
    ranks, update = event.get("ranks", 1), event.get("update", 0)
    who = f"{ranks} ranks, engine {event.get('engine')}" if ranks != 1 else "1 rank"
    return f"{'continued after update' if event['event'] == 'resume' else 'started at update'} {update} with {who}"


def _evaluation_text(event: Event) -> str:
    shown = [f"{name} {real(event[name]):.4g}" for name in ("loss", "perplexity", "kl") if name in event]
    return "held out: " + (", ".join(shown) or "nothing recorded")


def _holds_lock(directory: Path) -> bool:
    """Whether a process that this one can see holds the run (runs.sole_user). Looks without locking: that could refuse a run.

    False says little: the run may be on another machine, or in another container.
    """
    try:
        status = directory.stat()
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    device = status.st_dev
    return f" {os.major(device):02x}:{os.minor(device):02x}:{status.st_ino} " in locks
