"""What a run tells: the event log (the source of truth), a meter on the device, the console, TensorBoard.

`runs/NAME/events.jsonl` holds one JSON object a line, {"event": kind, "time": unix seconds, ...}, and is only ever appended
to. A run that starts or resumes after update N appends {"event": "start" or "resume", "update": N}: what was logged for later
updates before that line has been superseded, and `read_events(path, effective=True)` leaves it out.
"""

import dataclasses
import json
import math
import numbers
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, cast

import rich.console
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fastdistil.errors import CorruptData, UserError, printable, translated
from fastdistil.events import LINE_BYTES, check_fields, parse_event
from fastdistil.profiling.memory import device_memory, host_memory
from fastdistil.streams import lasting
from fastdistil.training.guards import FiniteGuard
from fastdistil.untrusted import reason


class EventLog:
    """Appends to a file of JSON lines; each line is one write, so that a killed process tears at most the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated("opening the event log", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            whole = _whole_lines_bytes(path)
            if whole < path.stat().st_size:
                self._file.truncate(whole)

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append {"event": kind, "time": now, **fields}. Numbers that are not finite become "nan", "inf", "-inf" (float() reads
        them back), other values that JSON does not know become text. Raises DiskFull, UserError (no permission)."""
        line = json.dumps(_plain({"event": kind, "time": time.time(), **fields}), allow_nan=False).encode() + b"\n"
        with translated("writing the event log", self.path):
            before = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(line):  # a nearly full disk takes a part; the next write tells why
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(before)
                raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def read_events(path: Path, effective: bool = False) -> Iterator[dict[str, Any]]:
    """The events of a log, in order; a torn last line is left out. Raises UserError without a log, CorruptData on a bad line.

    effective: without the events of updates that a later start or resume went back behind (their own lines stay).
    """
    if not path.is_file():
        raise UserError(f"no event log at {path}; give the events.jsonl of a run")
    events = _parsed(path)
    return iter(effective_events(list(events))) if effective else events


def _parsed(path: Path) -> Iterator[dict[str, Any]]:
    with translated("reading the event log", path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
            if len(line) == LINE_BYTES:
                raise CorruptData(f"{path} line {number} is not an event: it has {LINE_BYTES:,} bytes or more")
            if not line.endswith(b"\n"):
                return
            try:
                event = parse_event(line)
                check_fields(event)
            except ValueError as error:
                raise CorruptData(
                    f"{path} line {number} is not an event ({reason(error)}): {line[:60]!r}; it was damaged, or a newer "
                    "fastdistil wrote it"
                ) from error
            yield event


def effective_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    resumed_from = math.inf
    for event in reversed(events):
        update = event.get("update")
        if event.get("event") in ("start", "resume") and isinstance(update, int):
            resumed_from = min(resumed_from, update)
        elif isinstance(update, int) and update > resumed_from:
            continue
        kept.append(event)
    return kept[::-1]


def _whole_lines_bytes(path: Path) -> int:
    """Size of the file up to and including its last newline."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | str():
            return value
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _plain(dataclasses.asdict(value))
        case _:
            return str(value)


class Meter:
    """Gathers the scalars of updates on their device; only `read`, once a log line, waits for it.

    `clock` gives seconds; tokens per second and the data-wait share are over the time since the last read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.elapsed_s = 0.0
        """Of training, between the last read and the one before it."""
        self._names: tuple[str, ...] = ()
        self._device = torch.device("cpu")
        self.restart()

    def restart(self) -> None:
        """Forget everything and start the clock anew: right before the first update, say."""
        self._sums: Tensor | None = None  # [k + 1] float64: sums of the terms and of the gradient norm, count of both
        self._peak: Tensor | None = None  # [] float64: largest gradient norm
        self._updates = self._tokens = 0
        self._waited_s = self._excluded_s = 0.0
        self._since = self._clock()

    @torch.no_grad()
    def add(
        self,
        terms: Mapping[str, Tensor],
        grad_norm: Tensor | None,
        tokens: int,
        data_wait_s: float,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take in one update: scalar tensors, the same names at every call, on one device; nothing is waited for.

        An update whose `found_inf` (float []) is 1 was not applied: it counts in tokens and time, but in no mean.
        """
        named = dict(terms) if grad_norm is None else {**terms, "grad_norm": grad_norm}
        values = torch.stack([value.detach().reshape(()).double() for value in named.values()])
        counted = torch.cat([values, values.new_ones(1)])
        if found_inf is not None:
            counted = torch.where(found_inf > 0, 0.0, counted)
        largest = counted[-2] if grad_norm is not None else counted.new_zeros(())
        if self._sums is None or self._peak is None:
            self._names, self._device = tuple(named), values.device
            self._sums, self._peak = counted, largest
        else:
            assert tuple(named) == self._names, f"terms changed from {self._names} to {tuple(named)}"
            self._sums, self._peak = self._sums + counted, torch.maximum(self._peak, largest)
        self._updates += 1
        self._tokens += tokens
        self._waited_s += data_wait_s

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent in the block (evaluation, a checkpoint) does not count as training time."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - start

    def read(self, guard: FiniteGuard | None = None) -> dict[str, Any]:
        """Means over the applied updates since the last read, and rates; waits for the device once, then starts afresh.

        Keys: one per term, grad_norm, grad_norm_max, updates, skipped, tokens, tokens_per_s, data_wait_share, host_peak_bytes
        and, on a GPU, device_allocated_bytes, device_peak_bytes. The verdict of a `guard` comes with the same wait: it adds
        skipped_in_all, or raises NonFinite. Raises ValueError if nothing was added.
        """
        if self._sums is None or self._peak is None:
            raise ValueError("nothing to read: no update was added since the last read")
        flags = guard.pending() if guard is not None else None
        own = [self._sums, self._peak.reshape(1)]
        values = torch.cat(own if flags is None else [*own, flags]).tolist()
        *sums, applied, largest = values[: len(self._sums) + 1]
        skipped_in_all = guard.judge(values[len(self._sums) + 1 :]) if guard is not None and flags is not None else None
        fields: dict[str, Any] = {
            name: total / applied if applied else math.nan for name, total in zip(self._names, sums, strict=True)
        }
        if "grad_norm" in fields:
            fields["grad_norm_max"] = largest if applied else math.nan
        self.elapsed_s = elapsed_s = self._clock() - self._since - self._excluded_s
        fields |= {"updates": self._updates, "skipped": self._updates - int(applied), "tokens": self._tokens}
        if skipped_in_all is not None:
            fields["skipped_in_all"] = skipped_in_all
        fields["tokens_per_s"] = self._tokens / elapsed_s if elapsed_s > 0 else math.nan
        fields["data_wait_share"] = self._waited_s / elapsed_s if elapsed_s > 0 else math.nan
        fields["host_peak_bytes"] = host_memory().peak_rss_bytes
        on_device = device_memory(self._device)
        if on_device is not None:
            fields["device_allocated_bytes"] = on_device.allocated_bytes
            fields["device_peak_bytes"] = on_device.peak_allocated_bytes
        self.restart()
        return fields


class Console:
    """A progress bar with the time left on a terminal, one plain line per log event elsewhere, nothing when `quiet`."""

    def __init__(self, quiet: bool = False, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet = quiet
        self._file = lasting(file if file is not None else sys.stdout)
        self._clock = clock
        # NO_COLOR and TERM=dumb are rich's to obey.
        self._rich = rich.console.Console(file=cast("TextIO", self._file), highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._when_lost: Callable[[str], None] | None = None
        self._total = self._start = 0
        self._started_s = 0.0

    def start(self, total_updates: int, done: int) -> None:
        """`done`: updates that were finished before this process, so that they do not count in the time left."""
        self._total, self._start, self._started_s = total_updates, done, self._clock()
        if self._quiet or not self._rich.is_terminal or self._rich.is_dumb_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}", markup=False),
            console=self._rich,
            speed_estimate_period=300.0,
        )
        self._task = self._progress.add_task("", total=total_updates, completed=done, fields="")
        self._progress.start()

    def update(self, update: int, fields: Mapping[str, Any]) -> None:
        """Move the bar; with `fields`, show them: in the bar, or as a line of their own without one."""
        text = "  ".join(_shown(name, value) for name, value in fields.items())
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=update)
            if fields:
                self._progress.update(self._task, fields=text)
            self._note_loss()
        elif fields:
            done = update - self._start
            left_s = (self._clock() - self._started_s) / done * (self._total - update) if done > 0 else math.nan
            self.note(f"update {update}/{self._total}  {text}  left {_duration(left_s)}")

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.console.print(printable(text), markup=False, soft_wrap=True)
        else:
            print(printable(text), file=cast("TextIO", self._file), flush=True)
        self._note_loss()

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called once, on the thread that uses the console, if nobody reads it any more; it is silent then."""
        self._when_lost = tell
        self._note_loss()

    def _note_loss(self) -> None:
        if self._file.lost is not None and self._when_lost is not None and not self._file.loss_is_noted:
            self._file.loss_is_noted = True
            self._when_lost(f"the console is gone ({self._file.lost}): going on without it")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._note_loss()  # the bar is drawn on a thread of its own, and a last time when it stops
        self._when_lost = None


def _shown(name: str, value: Any) -> str:
    label = name.replace("_", " ")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"{label} {value}"
    if name.endswith("_bytes"):
        return f"{label.removesuffix(' bytes')} {value / 2**30:.2f} GiB"
    if name.endswith("_per_s"):
        return f"{value:,.0f} {label.removesuffix(' per s')}/s"
    if name.endswith("_share"):
        return f"{label.removesuffix(' share')} {100 * value:.1f}%"
    return f"{label} {value:,}" if isinstance(value, int) else f"{label} {value:.4g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{whole:02d}"


class TensorBoard:
    """Writes a run's numbers for TensorBoard. Trouble while writing is told once through `warn` and never stops training."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard needs a package that is not installed; pip install fastdistil[tensorboard], "
                "or set logging.tensorboard=false"
            ) from error
        self._warn: Callable[[str], None] | None = warn
        with translated("opening TensorBoard's directory", directory):
            self._writer: Any = SummaryWriter(str(directory))

    def write(self, update: int, fields: Mapping[str, Any]) -> None:
        """One curve per number in `fields`; other values are not for TensorBoard."""
        with self._harmless():
            for name, value in fields.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(name, value, update)

    def text(self, name: str, text: str) -> None:
        """As it is, in a fixed width."""
        with self._harmless():
            self._writer.add_text(name, "    " + text.replace("\n", "\n    "))

    def histograms(self, update: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        with self._harmless():
            for name, tensor in tensors:
                self._writer.add_histogram(name, tensor.detach().float().cpu(), update)

    def close(self) -> None:
        with self._harmless():
            self._writer.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever it is, training is worth more than a curve)
            if self._warn is not None:
                self._warn(f"TensorBoard: {type(error).__name__}: {error}; its curves may have gaps, events.jsonl has them all")
                self._warn = None
