"""What a person sees on a terminal: lines, bars."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import rich.console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fastdistil.errors import printable
from fastdistil.streams import lasting

if TYPE_CHECKING:
    from fastdistil.data.corpus import Manifest
    from fastdistil.data.prepare import PrepareProgress


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
        """Draw the bar; `done` updates were finished before this process, and do not count in the time left."""
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
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{remainder:02d}"


class _Bar:
    """A progress bar while the block lasts; nothing where there is no terminal."""

    def __init__(self, console: rich.console.Console, *columns: ProgressColumn | str) -> None:
        self._console = console
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class PrepareBar(_Bar):
    """A bar with the time left on a terminal; elsewhere a line every 10 seconds."""

    def __init__(self) -> None:
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        super().__init__(rich.console.Console(highlight=False), "preparing", *columns)
        self._task = self._bar.add_task("", total=None)
        self._printed_s = 0.0

    def __call__(self, progress: "PrepareProgress") -> None:
        if progress.note:
            self._console.print(progress.note, markup=False, soft_wrap=True)
        self._bar.update(self._task, completed=progress.bytes_read, total=progress.bytes_total)
        if not self._console.is_terminal and progress.seconds - self._printed_s >= 10 and progress.bytes_read:
            self._printed_s = progress.seconds
            left_s = progress.seconds * (progress.bytes_total / progress.bytes_read - 1)
            share = progress.bytes_read / progress.bytes_total
            print(f"prepared {share:.0%}, {progress.tokens:,} tokens, about {left_s:.0f} s left", flush=True)


def prepare_summary(out: Path, manifest: "Manifest", *, gutenberg: bool) -> str:
    """Say on one line what `prepare` wrote, and what it left out; `gutenberg`: it was to take out Project Gutenberg's text."""
    removed, total = manifest.gutenberg_removed, manifest.gutenberg_characters
    unmarked, half_marked = manifest.unmarked_files, manifest.half_marked_files
    spellings, unknown = manifest.special_spellings, manifest.unknown_share
    parts = [
        f"{out}: {manifest.tokens:,} tokens in {manifest.sequences:,} sequences of {manifest.documents:,} documents",
        manifest.dropped and f"{manifest.dropped:,} pieces dropped",
        manifest.bad_records and f"{manifest.bad_records:,} bad records in {out / 'quarantine.jsonl'}",
        manifest.passed_over_files and f"{manifest.passed_over_files:,} hidden or backup files passed over",
        gutenberg and f"Project Gutenberg's {removed:,} of {total:,} characters taken out ({removed / max(total, 1):.1%})",
        gutenberg and unmarked and f"no Gutenberg markers in {unmarked:,} files",
        gutenberg and half_marked and f"only half of the markers in {half_marked:,} files",
        spellings and f"{spellings:,} special tokens spelt out in the text, {manifest.special_spellings_became}",
        unknown is not None and f"{unknown:.2%} of the tokens unknown",
    ]
    return "; ".join(part for part in parts if part)


class EvaluateBar(_Bar):
    """On standard error, so that --json leaves standard output clean: a bar on a terminal, a line a stage elsewhere."""

    def __init__(self, task: str = "evaluating") -> None:
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        super().__init__(rich.console.Console(stderr=True, highlight=False), *columns)
        self._task = self._bar.add_task(task, total=1.0)
        self._stage = ""

    def __call__(self, fraction: float, text: str) -> None:
        self._bar.update(self._task, completed=fraction, description=text)
        if not self._console.is_terminal and text != self._stage:
            self._stage = text
            self._console.print(f"{fraction:.0%} {text}", markup=False, soft_wrap=True)
