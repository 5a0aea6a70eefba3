"""The event log of a run: what each kind of event holds, writing a log, reading it.

`runs/NAME/events.jsonl` holds one JSON object a line, {"event": kind, "time": unix seconds, field: value, ...}, and is only
ever appended to. Whoever opens it for writing first appends {"event": "format", "version": FORMAT}, so that a log begins with
its version, and a run that another version continues says from where on. A run that starts or resumes after update N then
appends a `start` or `resume` with N: what was logged for later updates before that line has been superseded, and
`read_events(path, effective=True)` leaves it out.

A field is None, or empty, where it was not measured, and is not written then; so are the fields that an older version did not
have. Numbers that are not finite are the text "nan", "inf" or "-inf" in the file, and floats here. Whoever renames a field, or
changes its unit or its meaning, counts FORMAT up; a new field needs none.

Without torch: following a run must not cost its machine anything.
"""

import dataclasses
import json
import math
import numbers
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field

from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.untrusted import LARGEST, Amount, Positive, Real, Whole, converted, parse_json, reason

FORMAT = 1
"""Version of the log's fields. 0: logs before there were versions, which have the fields of 1."""
LINE_BYTES = 2**26
"""Of a log line: it holds a few numbers for each of its updates and ranks."""


def _number(value: Any) -> Any:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError("wanted a number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
"""Finite or not: nan is the mean of nothing, and inf what overflowed."""
StepSeconds = Annotated[float, Field(strict=True, ge=0, le=1e9)]
Ranks = Annotated[int, Field(strict=True, ge=1, le=2**16)]
UnixSeconds = Annotated[float, Field(strict=True, ge=0, le=2e11)]
"""Seconds since 1970, before the year 8307."""
Shares = Mapping[str, Amount]
Sizes = Mapping[str, Amount | None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all kinds of events have."""

    kind: ClassVar[str]

    time: UnixSeconds | None = None  # when the line was written; the log adds it
    update: Whole | None = None  # updates of the optimizer done so far, the skipped ones included


@dataclass(frozen=True, kw_only=True)
class Start(Event):
    """A run begins to train: with what, on what."""

    kind = "start"

    update: Whole = 0  # updates done before
    updates: Whole | None = None  # updates that the run will have done at its end
    engine: str | None = None  # of the collectives: horovod, torch, alone
    ranks: Ranks | None = None  # processes that train together
    nodes: Ranks | None = None  # machines that they run on
    rings: Ranks | None = None  # allreduces that may travel at once
    sync: str | None = None  # when gradients travel: recipe key world.sync
    compression: str | None = None  # of gradients: recipe key compression.kind
    device: str | None = None  # torch's name of rank 0's: cpu, cuda:0
    threads: Whole | None = None  # of torch in each rank
    torch: str | None = None  # its version
    precision: str | None = None  # of the forward: fp32, bf16, fp16
    kernels: str | None = None  # backend of the losses: recipe key kernels
    student_parameters: Whole | None = None  # numbers of the student, frozen ones included
    teacher_parameters: Whole | None = None  # 0 without a teacher


@dataclass(frozen=True, kw_only=True)
class Resume(Start):
    """A run goes on from a checkpoint."""

    kind = "resume"


@dataclass(frozen=True)
class MemoryReading:
    """What rank 0 holds at a log line. All but the first two are of a GPU, by torch's allocator unless said otherwise."""

    rss_bytes: Amount | None = None  # resident memory of the process
    peak_rss_bytes: Amount | None = None  # the most since its start
    allocated_bytes: Amount | None = None  # in tensors
    peak_allocated_bytes: Amount | None = None  # the most since the run's start
    reserved_bytes: Amount | None = None  # taken from the driver
    peak_reserved_bytes: Amount | None = None  # the most since the run's start
    fragmented_bytes: Amount | None = None  # peak reserved beyond peak allocated
    used_bytes: Amount | None = None  # on the device, by all processes, as NVML says
    outside_bytes: Real | None = None  # used, and not reserved by this allocator
    retries: Whole | None = None  # allocations that succeeded only after the cache was freed
    ooms: Whole | None = None  # allocations that failed
    phase_peaks: Sizes | None = None  # phase of a step -> the most bytes allocated within it


@dataclass(frozen=True)
class DeviceReading:
    """Rank 0's GPU, or its process's share of the CPU, sampled since the last log line."""

    samples: Whole = 0  # how many
    seconds: Amount | None = None  # from the last sample of the line before to the last one
    utilisation: Real | None = None  # GPU: mean share of the time in which any kernel ran; CPU: of the usable cores
    sm_clock_mhz: Real | None = None  # median
    sm_clock_min_mhz: Real | None = None  # lowest
    memory_clock_mhz: Real | None = None  # median
    clock_mhz: Real | None = None  # of a CPU; median
    power_w: Real | None = None  # mean
    temperature_c: Real | None = None  # highest, degrees Celsius
    memory_used_bytes: Real | None = None  # highest, of all processes
    pcie_tx_bytes_per_s: Real | None = None  # mean; tx leaves the GPU
    pcie_rx_bytes_per_s: Real | None = None  # mean
    nvlink_tx_bytes_per_s: Real | None = None  # mean, over all links
    nvlink_rx_bytes_per_s: Real | None = None  # mean, over all links
    energy_j: Amount | None = None  # in these seconds
    energy_source: str | None = None  # counter (of the driver), or power (integrated over the samples)
    throttled: Shares | None = None  # reason -> share of the samples in which the GPU slowed itself down; None: not known


@dataclass(frozen=True)
class Utilisation:
    """The models' floating-point operations of rank 0 against a peak of its device, as shares of it."""

    student: Number | None = None  # the student's forward and backward
    with_teacher: Number | None = None  # and the teacher's forward
    hfu: Number | None = None  # all that was executed, recomputation included
    peak_flops: Amount | None = None  # operations a second
    peak_source: str | None = None  # datasheet or measured, and the precision
    refused: str | None = None  # why there are no shares: they were above 1
    measured: "Utilisation | None" = None  # against the measured peak, beside the datasheet's


@dataclass(frozen=True, kw_only=True)
class Train(Event):
    """A log line: what `updates` updates did since the one before. Rank 0's numbers where it is not said otherwise.

    Lists have an entry for each update (step_s, phases) or for each rank (rank_..., ring_bytes: for each ring).
    """

    kind = "train"

    update: Whole = field()  # the last of these updates
    updates: Positive | None = None  # how many
    warmup: Whole = 0  # of them, from the first, those whose times do not count
    skipped: Whole | None = None  # of them, not applied: a gradient was not finite
    skipped_in_all: Whole | None = None  # since the run's first start
    tokens: Whole | None = None  # of all ranks, padding left out
    tokens_per_s: Number | None = None  # over the updates' time: without evaluations, checkpoints
    total: Number | None = None  # the weighted loss; losses are means over the updates that were applied
    soft: Number | None = None  # KL to the teacher in nats a token, times the squared temperature
    hard: Number | None = None  # cross-entropy with the labels, nats a label
    cosine: Number | None = None  # 1 - cosine of the hidden states, mean over tokens
    mse: Number | None = None  # squared difference of the logits, mean
    grad_norm: Number | None = None  # before clipping; mean
    grad_norm_max: Number | None = None  # the largest of these updates
    lr: Number | None = None  # learning rate of the last update
    loss_scale: Number | None = None  # what fp16 multiplies the loss by; mean
    step_s: tuple[StepSeconds, ...] = ()  # seconds of each update
    phases: Mapping[str, tuple[Real, ...]] = field(default_factory=dict)  # phase -> seconds of it in each update
    data_wait_share: Number | None = None  # of the time, waited for batches
    memory: MemoryReading | None = None  # at the line
    host_peak_bytes: Amount | None = None  # resident memory of the process, the most since its start
    device_peak_bytes: Amount | None = None  # torch's allocator on a GPU, the most since the run's start
    device_allocated_bytes: Amount | None = None  # in tensors now
    device: DeviceReading | None = None  # between the lines
    flops: Sizes | None = None  # student, teacher, heads -> floating-point operations of the updates
    mfu: Utilisation | None = None  # of the updates behind the warm-up
    engine: str | None = None  # of the collectives
    compression: str | None = None  # in use: `auto` may have chosen
    buckets: Whole | None = None  # that gradients travel in
    gradient_collectives: Amount | None = None  # started since the last line
    gradient_bytes: Amount | None = None  # sent by one rank since then, after compression
    ring_bytes: tuple[Amount, ...] = ()  # of them, through each ring
    control_messages: Amount | None = None  # collectives of counts, flags and norms
    control_bytes: Amount | None = None  # sent by one rank with them
    exchange_wait_s: Number | None = None  # waited for gradients by the host
    imbalance_time: Number | None = None  # work of the rank with the most over the mean rank's, less 1
    imbalance_tokens: Number | None = None  # the same of tokens
    slowest_rank: Whole | None = None  # the one with the most work
    rank_tokens: tuple[Whole, ...] = ()  # of each rank, padding left out
    rank_data_wait_s: tuple[Real, ...] = ()  # waited for batches
    rank_worked_s: tuple[Real, ...] = ()  # the updates' time without waits for other ranks
    rank_0_waited_s: Real | None = None  # for each update's slowest rank, in all


@dataclass(frozen=True, kw_only=True)
class Evaluation(Event):
    """The student on held-out text. A standard error is over sequences; of a single one it is nan."""

    kind = "evaluation"

    update: Whole = field()  # after which it was evaluated
    seconds: Amount | None = None  # that it took
    loss: Number | None = None  # cross-entropy, nats a label
    loss_se: Number | None = None  # standard error
    perplexity: Number | None = None  # e to the loss
    labels: Whole | None = None  # tokens that had to be predicted
    sequences: Whole | None = None  # that were evaluated
    kl: Number | None = None  # KL to the teacher at temperature 1, nats a token
    kl_se: Number | None = None  # standard error
    kl_tokens: Whole | None = None  # that the KL is the mean of


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Event):
    """A checkpoint was written."""

    kind = "checkpoint"

    seconds: Amount | None = None  # that training waited for it
    path: str | None = None  # its directory's name below checkpoints/


@dataclass(frozen=True)
class DeviceFacts:
    """What one rank computes on."""

    rank: Whole | None = None  # whose device it is
    host: str | None = None  # its machine
    name: str | None = None  # of the GPU or processor
    uuid: str | None = None  # of a GPU
    cores: Amount | None = None  # of a CPU, that the process may use
    memory_bytes: Amount | None = None  # of the GPU, or usable memory of the machine
    compute_capability: str | None = None  # of a GPU, as 9.0
    multiprocessors: Whole | None = None  # of a GPU
    driver: str | None = None  # its version
    slice: bool | None = None  # a MIG slice of a GPU
    sm_clock_max_mhz: Amount | None = None  # that the GPU may run at
    memory_clock_max_mhz: Amount | None = None  # that its memory may run at
    power_limit_w: Amount | None = None  # enforced
    pcie_generation: Amount | None = None  # of the link now
    pcie_generation_max: Amount | None = None  # that it may have
    pcie_width: Amount | None = None  # lanes of the link now
    pcie_width_max: Amount | None = None  # that it may have


@dataclass(frozen=True)
class Peaks:
    """What rank 0's device can do at best, by source ("datasheet, bf16 dense", "measured, bf16", ...)."""

    flops: Shares | None = None  # operations a second
    bytes: Shares | None = None  # of its memory, a second


@dataclass(frozen=True, kw_only=True)
class Environment(Event):
    """The machine of rank 0, and the devices of all ranks."""

    kind = "environment"

    processor: str | None = None  # its model
    cores: Amount | None = None  # that the process may use; a container may allow a part of one
    memory_bytes: Amount | None = None  # that the process may use
    host: str | None = None  # the machine's name
    versions: Mapping[str, Any] | None = None  # package -> version
    devices: tuple[DeviceFacts, ...] = ()  # by rank
    peaks: Peaks | None = None  # by which utilisation is judged


@dataclass(frozen=True, kw_only=True)
class MemoryParts(Event):
    """What the peak of rank 0's memory is made of, in bytes, once; beside it what was estimated before."""

    kind = "memory"

    parts: Sizes | None = None  # measured: weights, gradients, optimizer, ...
    estimate: Sizes | None = None  # the same parts as --dry-run estimates them
    peak_bytes: Amount | None = None  # of the updates behind the warm-up; CPU: resident memory


@dataclass(frozen=True)
class Kernel:
    """A kernel of a trace, or an operator on a CPU."""

    name: str  # as the profiler has it
    calls: Whole  # how often it ran
    ms: Amount  # milliseconds in all
    share: Amount  # of all kernels' time


@dataclass(frozen=True, kw_only=True)
class Trace(Event):
    """Updates `first` to `last` were traced: the kernels that took most of them, the longest first."""

    kind = "trace"

    first: Whole | None = None  # update
    last: Whole | None = None  # update
    kernels: tuple[Kernel, ...] = ()  # not all: the longest


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something that a person was told as well."""

    kind = "note"

    message: str = ""  # one line


@dataclass(frozen=True, kw_only=True)
class RunNotFinite(Event):
    """The run ends, or goes back to a checkpoint: a loss or gradient was not finite."""

    kind = "nonfinite"

    message: str = ""  # one line


@dataclass(frozen=True, kw_only=True)
class RunStopped(Event):
    """The run was asked to stop, and saved."""

    kind = "stopped"

    why: str = ""  # the signal, or that it was paused, and by which rank


@dataclass(frozen=True, kw_only=True)
class RunDone(Event):
    """The run has done all its updates."""

    kind = "done"

    tokens: Whole | None = None  # of all ranks and updates
    tokens_per_second: Number | None = None  # over the log lines since the last start


@dataclass(frozen=True, kw_only=True)
class Format(Event):
    """Which version the lines behind this one have."""

    kind = "format"

    version: Whole  # see FORMAT


@dataclass(frozen=True, kw_only=True)
class Unknown(Event):
    """An event of a kind that this version does not know."""

    kind = "unknown"


@dataclass(frozen=True)
class _Kind:
    event: Annotated[str, Field(strict=True)]


_KINDS = (
    *(Start, Resume, Train, Evaluation, Checkpoint, Environment, MemoryParts, Trace),
    *(Note, RunNotFinite, RunStopped, RunDone, Format),
)
KINDS: dict[str, type[Event]] = {kind.kind: kind for kind in _KINDS}


def parse_event(line: bytes) -> Event:
    """Return the event of a line. Raises ValueError where it is none, or holds what its kind does not."""
    values = parse_json(line)
    event = converted(KINDS.get(converted(_Kind, values).event, Unknown), values)
    if isinstance(event, Train):
        _check_lengths(event)
    return event


def _check_lengths(line: Train) -> None:
    for name, seconds in line.phases.items() if line.step_s else ():
        if len(seconds) != len(line.step_s):
            raise ValueError(f"phases.{name} has {len(seconds)} updates, step_s {len(line.step_s)}")
    if len({len(values) for values in (line.rank_worked_s, line.rank_tokens, line.rank_data_wait_s) if values}) > 1:
        raise ValueError("rank_worked_s, rank_tokens and rank_data_wait_s are of different numbers of ranks")


def as_fields(value: Any) -> Any:
    """Return an event, or anything in one, as JSON has it: fields that are None or () are left out, numbers that are not finite
    are text, and so is what JSON does not know."""
    match value:
        case None | bool() | str():
            return value
        case int() | numbers.Integral():  # the plain type is known in a tenth of the time
            return int(value)
        case float() | numbers.Real():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping():
            return {str(key): as_fields(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [as_fields(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {name: as_fields(item) for name, item in vars(value).items() if not _is_absent(item)}
        case _:
            return str(value)


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and not value)


class EventLog:
    """Appends to a file of JSON lines; each line is one write, so that a killed process tears at most the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated("opening the event log", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            size = _complete_lines_bytes(path)
            if size < path.stat().st_size:
                self._file.truncate(size)
        self._append({"event": Format.kind, "version": FORMAT})

    def write(self, event: Event) -> None:
        """Append the event, with the time. Raises DiskFull, UserError (no permission)."""
        self._append({"event": event.kind, "time": time.time(), **as_fields(event)})

    def _append(self, fields: Mapping[str, Any]) -> None:
        line = json.dumps(fields, allow_nan=False).encode() + b"\n"
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


def read_events(path: Path, effective: bool = False) -> Iterator[Event]:
    """The events of a log, in order; a torn last line is left out.

    Raises UserError without a log and for one of a newer format, CorruptData on a bad line.

    effective: without the events of updates that a later start or resume went back behind (their own lines stay).
    """
    if not path.is_file():
        raise UserError(f"no event log at {path}; give the events.jsonl of a run")
    events = _parsed(path)
    return iter(effective_events(list(events))) if effective else events


def _parsed(path: Path) -> Iterator[Event]:
    with translated("reading the event log", path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
            if len(line) == LINE_BYTES:
                raise CorruptData(f"{path} line {number} is not an event: it has {LINE_BYTES:,} bytes or more")
            if not line.endswith(b"\n"):
                return
            try:
                event = parse_event(line)
            except ValueError as error:
                raise CorruptData(
                    f"{path} line {number} is not an event ({reason(error)}): {line[:60]!r}; it was damaged, or a newer "
                    "fastdistil wrote it"
                ) from error
            if not isinstance(event, Format):
                yield event
            elif event.version > FORMAT:
                raise UserError(
                    f"{path} has events of format {event.version}, and this fastdistil reads formats up to {FORMAT}; update it"
                )


def effective_events(events: Iterable[Event]) -> list[Event]:
    """Leave out the events of updates that a later start or resume went back behind."""
    effective: list[Event] = []
    resumed_from = math.inf
    for event in reversed(list(events)):
        if isinstance(event, Start):
            resumed_from = min(resumed_from, event.update)
        elif event.update is not None and event.update > resumed_from:
            continue
        effective.append(event)
    return effective[::-1]


def _complete_lines_bytes(path: Path) -> int:
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
