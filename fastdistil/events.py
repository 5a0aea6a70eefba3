"""The event log of a run: writing it, reading it, and what each kind of event holds, by name and type.

`runs/NAME/events.jsonl` holds one JSON object a line, {"event": kind, "time": unix seconds, ...}, and is only ever appended
to. A run that starts or resumes after update N appends {"event": "start" or "resume", "update": N}: what was logged for later
updates before that line has been superseded, and `read_events(path, effective=True)` leaves it out.

Logs of any version are read: a field may be absent, and a field or a kind that is not listed here passes as it is. A number
that is not finite is the text "nan", "inf" or "-inf" in the log.

Without torch: following a run must not cost its machine anything.
"""

import dataclasses
import json
import math
import numbers
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.untrusted import LARGEST, Amount, Positive, Real, Whole, check, parse_json, reason

LINE_BYTES = 2**26
"""Of a log line: it holds a few numbers for each of its updates and ranks."""
Event = dict[str, Any]


def _recorded(value: Any) -> Any:
    number = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= LARGEST
    if value is not None and not number and value not in ("nan", "inf", "-inf"):
        raise ValueError("wanted a number")
    return value


Recorded = Annotated[Any, AfterValidator(_recorded)]
"""A number as the log writes it, or null."""
StepSeconds = Annotated[float, Field(strict=True, ge=0, le=1e9)]
Ranks = Annotated[int, Field(strict=True, ge=1, le=2**16)]
Time = Annotated[float, Field(strict=True, ge=0, le=2e11)]
"""Unix seconds, before the year 8307."""


class Fields(BaseModel):
    """Fields of an event or of an object in it."""

    model_config = ConfigDict(frozen=True, extra="allow")


class AnyEvent(Fields):
    """What makes an object an event."""

    event: Annotated[str, Field(strict=True)]
    update: Whole | None = None


class Known(AnyEvent):
    """An event of a kind, or of none that is listed here."""

    time: Time | None = None


class Start(Known):
    update: Whole = 0
    updates: Whole | None = None
    ranks: Ranks | None = None
    nodes: Ranks | None = None
    rings: Ranks | None = None
    threads: Whole | None = None
    engine: str | None = None
    sync: str | None = None
    compression: str | None = None
    device: str | None = None
    torch: str | None = None
    precision: str | None = None
    kernels: str | None = None
    student_parameters: Whole | None = None
    teacher_parameters: Whole | None = None


class Memory(Fields):
    rss_bytes: Amount | None = None
    peak_rss_bytes: Amount = 0
    allocated_bytes: Amount | None = None
    peak_allocated_bytes: Amount = 0
    reserved_bytes: Amount | None = None
    peak_reserved_bytes: Amount = 0
    fragmented_bytes: Amount | None = None
    used_bytes: Amount | None = None
    outside_bytes: Real | None = None
    retries: Whole | None = None
    ooms: Whole | None = None
    phase_peaks: dict[str, Amount] = {}


class Readings(Fields):
    utilisation: Real | None = None
    sm_clock_mhz: Real | None = None
    sm_clock_min_mhz: Real | None = None
    memory_clock_mhz: Real | None = None
    clock_mhz: Real | None = None
    power_w: Real | None = None
    temperature_c: Real | None = None
    memory_used_bytes: Real | None = None
    pcie_tx_bytes_per_s: Real | None = None
    pcie_rx_bytes_per_s: Real | None = None
    nvlink_tx_bytes_per_s: Real | None = None
    nvlink_rx_bytes_per_s: Real | None = None
    samples: Whole = 0
    seconds: Amount | None = None
    energy_j: Amount | None = None
    energy_source: str | None = None
    throttled: dict[str, Amount] | None = None


class Utilisation(Fields):
    student: Recorded = None
    with_teacher: Recorded = None
    hfu: Recorded = None
    peak_flops: Amount | None = None
    peak_source: str | None = None
    refused: str | None = None
    measured: "Utilisation | None" = None


class Train(Known):
    update: Whole
    updates: Positive = 1
    tokens: Whole = 0
    tokens_per_s: Recorded = None
    warmup: Whole = 0
    step_s: list[StepSeconds] = []
    phases: dict[str, list[Real]] = {}
    memory: Memory | None = None
    device: Readings | None = None
    flops: dict[str, Amount | None] | None = None
    mfu: Utilisation | None = None
    rank_worked_s: list[Real] = []
    rank_tokens: list[Whole] = []
    rank_data_wait_s: list[Real] = []
    rank_0_waited_s: Real = 0.0
    slowest_rank: Whole | None = None
    ring_bytes: list[Amount] | None = None
    gradient_bytes: Amount = 0
    gradient_collectives: Amount | None = None
    control_bytes: Amount | None = None
    control_messages: Amount | None = None
    exchange_wait_s: Recorded = None
    imbalance_time: Recorded = None
    imbalance_tokens: Recorded = None
    data_wait_share: Recorded = None
    host_peak_bytes: Amount = 0
    device_peak_bytes: Amount = 0
    device_allocated_bytes: Amount = 0
    total: Recorded = None
    soft: Recorded = None
    hard: Recorded = None
    cosine: Recorded = None
    mse: Recorded = None
    grad_norm: Recorded = None
    grad_norm_max: Recorded = None
    lr: Recorded = None
    skipped: Recorded = None
    skipped_in_all: Recorded = None

    @model_validator(mode="after")
    def _alike(self) -> "Train":
        steps = len(self.step_s)
        for name, seconds in self.phases.items() if steps else ():
            if len(seconds) != steps:
                raise ValueError(f"phases.{name} has {len(seconds)} updates, step_s {steps}")
        lists = (self.rank_worked_s, self.rank_tokens, self.rank_data_wait_s)
        if len({len(values) for values in lists if values}) > 1:
            raise ValueError("rank_worked_s, rank_tokens and rank_data_wait_s are of different numbers of ranks")
        return self


class Evaluation(Known):
    update: Whole
    seconds: Amount = 0.0
    labels: Whole | None = None
    kl_tokens: Whole | None = None
    loss: Recorded = None
    loss_se: Recorded = None
    perplexity: Recorded = None
    kl: Recorded = None
    kl_se: Recorded = None


class Checkpoint(Known):
    update: Whole = 0
    seconds: Amount = 0.0


class Device(Fields):
    rank: Whole | None = None
    host: str | None = None
    name: str | None = None
    memory_bytes: Amount | None = None


class Peaks(Fields):
    flops: dict[str, Amount] | None = None
    bytes: dict[str, Amount] | None = None


class Environment(Known):
    processor: str | None = None
    cores: Amount | None = None
    memory_bytes: Amount | None = None
    devices: list[Device] | None = None
    versions: dict[str, Any] | None = None
    peaks: Peaks | None = None


class MemoryParts(Known):
    parts: dict[str, Amount | None] | None = None
    estimate: dict[str, Amount | None] | None = None
    peak_bytes: Amount | None = None


class Kernel(Fields):
    name: Any
    calls: Whole
    ms: Amount
    share: Amount


class Trace(Known):
    first: Whole | None = None
    last: Whole | None = None
    kernels: list[Kernel] | None = None


KINDS: dict[str, type[Known]] = {
    "start": Start,
    "resume": Start,
    "train": Train,
    "evaluation": Evaluation,
    "checkpoint": Checkpoint,
    "environment": Environment,
    "memory": MemoryParts,
    "trace": Trace,
}


def parse_event(line: bytes) -> Event:
    """Return the event of a line, as it was written: its kind and its update are right. Raises ValueError where it is none."""
    event: Event = parse_json(line)
    check(AnyEvent, event)
    return event


def check_fields(event: Event) -> None:
    """Raise ValueError unless an event holds what its kind does."""
    check(KINDS.get(event["event"], Known), event)


class EventLog:
    """Appends to a file of JSON lines; each line is one write, so that a killed process tears at most the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated("opening the event log", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            size = _whole_lines_bytes(path)
            if size < path.stat().st_size:
                self._file.truncate(size)

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
    effective = []
    resumed_from = math.inf
    for event in reversed(events):
        update = event.get("update")
        if event.get("event") in ("start", "resume") and isinstance(update, int):
            resumed_from = min(resumed_from, update)
        elif isinstance(update, int) and update > resumed_from:
            continue
        effective.append(event)
    return effective[::-1]


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
