"""Where the time of updates goes: spans, measured on the device that does the work, read late.

    update    data | transfer  teacher  student  losses  backward | ... | exposed | optimizer        other: what is in no span
                                                  communication --------------->  overlaps backward

On a CPU a span is two readings of a clock. On a GPU it is two CUDA events on the current stream, read at the next log line,
when the device has been waited for anyway: nothing is synchronised for it, and what is measured is the stream, not the host
that runs ahead of it. A wait of the host (for data, say) therefore counts only where the device idles.

A span inside another is taken out of it (compression within backward's hooks): those of an update are disjoint and, with
`other`, add up to it. `communication` is apart: from the first bucket's departure until the step has waited for the last. What
arrives while backward still runs is seen at its end: engines do not say when.

Under Nsight Systems each span is an NVTX range too, and so are evaluations and checkpoints (Instruments.aside).
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:  # readers of logs want the names alone
    import torch

SpanName = Literal["data", "transfer", "teacher", "student", "losses", "backward", "compression", "exposed", "optimizer"]
NAMES: tuple[SpanName, ...] = (
    "data",
    "transfer",
    "teacher",
    "student",
    "losses",
    "backward",
    "compression",
    "exposed",
    "optimizer",
)

Span = Callable[[SpanName], AbstractContextManager[Any]]


def unmeasured(_: SpanName) -> AbstractContextManager[Any]:
    """A span that nobody asks about."""
    return nullcontext()


class _Span:
    """One name's context manager; entered again and again, also within itself."""

    def __init__(self, spans: "Spans", name: SpanName) -> None:
        self._spans, self._name = spans, name

    def __enter__(self) -> Self:
        self._spans._enter(self._name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._spans.failed = self._spans.failed or self._name
        self._spans._exit()


class Spans:
    """One rank's spans. An update: `begin`, spans, `end`; what comes between two (evaluation, a checkpoint) is in none."""

    def __init__(
        self, device: "torch.device", *, warmup: int = 0, clock: Callable[[], float] = time.perf_counter, ranges: Any = None
    ) -> None:
        """`warmup`: updates that are marked as such. `clock`: seconds, on a CPU. `ranges`: torch.cuda.nvtx, or like it."""
        self._mark: Callable[[], Any] = clock
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            from torch.cuda import Event, nvtx

            self._event_type: Callable[..., Any] = Event
            self._free: list[Any] = []
            self._mark = self._event
            if ranges is None and "NSYS_PROFILING_SESSION_ID" in os.environ:
                ranges = nvtx
        self.ranges = ranges
        """What hears of every span as well, by range_push(name) and range_pop(); None: nobody."""
        self.failed: SpanName | None = None
        """The innermost span of this update that an exception left."""
        self._spans: dict[str, _Span] = {name: _Span(self, name) for name in NAMES}
        self.warmup_left = warmup
        self._warmup = 0
        self._open: list[int] = []
        self._records: list[list[Any]] = []  # [name, index of the span around it or -1, begin, end]
        self._communication: list[Any] = []  # departure, waited for, departure, ...
        self._updates: list[tuple[Any, Any, list[list[Any]], list[Any]]] = []  # begin, end, records, communication
        self._begun: Any = None

    def __call__(self, name: SpanName) -> _Span:
        return self._spans[name]

    def begin(self) -> None:
        """An update begins; one that was begun and has not ended is forgotten (its window was dropped)."""
        self._records, self._open, self._communication, self.failed = [], [], [], None
        self._begun = self._mark()

    def departed(self) -> None:
        """A bucket is on its way."""
        if len(self._communication) % 2 == 0:
            self._communication.append(self._mark())

    def awaited(self) -> None:
        """All that were on their way have been waited for. With every-micro-batch this happens many times an update."""
        if len(self._communication) % 2 == 1:
            self._communication.append(self._mark())

    def end(self, counts: bool = True) -> None:
        """`counts`: not, if it was not as updates are; then those before it, up to the last `read`, do not count either."""
        assert not self._open, f"{self._records[self._open[-1]][0]} has not ended"
        self._updates.append((self._begun, self._mark(), self._records, self._communication))
        if self.warmup_left or not counts:
            self._warmup = len(self._updates)
        self.warmup_left = max(0, self.warmup_left - 1)
        self._records, self._communication = [], []

    def read(self) -> dict[str, Any]:
        """step_s, warmup and phases of the updates since the last read, as events.jsonl has them.

        warmup: so many of them, from the first, do not count.
        On a GPU call it when the stream has been waited for: it waits for the last event.
        """
        if self._on_gpu and self._updates:
            self._updates[-1][1].synchronize()
        steps = [self._seconds(begin, end) for begin, end, _, _ in self._updates]
        phases = [self._phases(records, communication) for _, _, records, communication in self._updates]
        names = [name for name in (*NAMES, "communication") if any(name in update for update in phases)]
        timings = {
            "step_s": steps,
            "warmup": self._warmup,
            "phases": {name: [update.get(name, 0.0) for update in phases] for name in names},
        }
        if self._on_gpu:
            for begin, end, records, communication in self._updates:
                self._free += [begin, end, *communication, *(mark for record in records for mark in record[2:])]
        self._updates, self._warmup = [], 0
        return timings

    def _phases(self, records: list[list[Any]], communication: list[Any]) -> Mapping[str, float]:
        phases: dict[str, float] = {}
        for name, around, begin, end in records:
            seconds = self._seconds(begin, end)
            phases[name] = phases.get(name, 0.0) + seconds
            if around >= 0:
                phases[records[around][0]] = phases.get(records[around][0], 0.0) - seconds
        if communication:
            pairs = zip(communication[::2], communication[1::2], strict=True)
            phases["communication"] = sum(self._seconds(begin, end) for begin, end in pairs)
        return phases

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Told to `ranges` alone: what is no part of an update."""
        ranges = self.ranges
        if ranges is None:
            yield
            return
        ranges.range_push(name)
        try:
            yield
        finally:
            ranges.range_pop()

    def _enter(self, name: SpanName) -> None:
        if self.ranges is not None:
            self.ranges.range_push(name)
        self._records.append([name, self._open[-1] if self._open else -1, self._mark(), None])
        self._open.append(len(self._records) - 1)

    def _exit(self) -> None:
        self._records[self._open.pop()][3] = self._mark()
        if self.ranges is not None:
            self.ranges.range_pop()

    def _event(self) -> Any:
        event = self._free.pop() if self._free else self._event_type(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin)
