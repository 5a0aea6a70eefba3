"""What a run directory tells, read once: the recipe and the effective events, sorted by kind.

Everything that shows, sums up or compares runs starts from here. Fields that an older run did not record are absent, not
guessed. A run that died within a write loses its torn last line, as everywhere (`events.read_events`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.events import (
    Checkpoint,
    Environment,
    Evaluation,
    Event,
    MemoryParts,
    Note,
    RunDone,
    RunNotFinite,
    RunStopped,
    Start,
    Trace,
    Train,
    effective_events,
    read_events,
)
from fastdistil.redaction import redacted
from fastdistil.untrusted import Fields, Positive, check, read_yaml, reason

Outcome = Literal["done", "stopped", "nonfinite", "open"]
Kind = TypeVar("Kind", bound=Event)


class StoredTeacher(Fields):
    path: str | None = None
    cache: str | None = None


class StoredStudent(Fields):
    path: str | None = None
    architecture: str | None = None


class StoredData(Fields):
    train: str | None = None
    micro_batch_tokens: Positive | None = None


class StoredLoop(Fields):
    accumulation: Positive | None = None


class StoredRecipe(Fields):
    """What is read of a run's recipe.yaml, of any version."""

    teacher: StoredTeacher | None = None
    student: StoredStudent = Field(default_factory=StoredStudent)
    data: StoredData = Field(default_factory=StoredData)
    loop: StoredLoop = Field(default_factory=StoredLoop)
    objective: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class History:
    directory: Path
    name: str
    recipe: dict[str, Any]
    """recipe.yaml as it lies there but for its secrets, not validated: an older or newer fastdistil may have written it."""
    start: Start
    """The last `start` or `resume`; empty if the run died before it."""
    starts: list[Start]
    """Every one, in order: `start` is the last."""
    environment: Environment
    """The last one recorded; empty without."""
    environments: list[Environment]
    """Of each start, the last one recorded before the next; empty without."""
    lines: list[Train]
    """`train` events, in order of their updates; those that a resume went back behind are left out."""
    evaluations: list[Evaluation]
    notes: list[Note]
    checkpoints: list[Checkpoint]
    memory: MemoryParts | None
    trace: Trace | None
    """The last trace's: which updates, and the kernels that took most of them."""
    log_lines: int
    """How many log lines there are; `lines` are fewer where a page that follows a long run keeps some of them (live.py)."""
    spikes: list[Train]
    """Log lines that are in no figure and only in the curves: of those that such a page does not keep, what stands out."""
    tokens: int
    """Of all log lines."""
    skipped: int | None
    """Updates of all log lines; None: not recorded."""
    wall_s: float | None
    """From each start to the last event before the next, superseded ones too; what lies between attempts is left out."""
    outcome: Outcome
    """Since the last start; open: it is running, or it died."""

    @property
    def device(self) -> str | None:
        """The name of rank 0's GPU or processor, or what the recipe calls it."""
        kind, devices = self.start.device, self.environment.devices
        name = devices[0].name if devices and str(kind).startswith("cuda") else self.environment.processor
        return name or kind

    @property
    def curve_lines(self) -> list[Train]:
        return sorted([*self.lines, *self.spikes], key=lambda line: line.update) if self.spikes else self.lines

    @property
    def comparable_lines(self) -> list[Train]:
        """The lines that ran as `start` and `environment` say: a run may have been continued by other ranks, or on others."""
        environments = [*self.environments[:-1], self.environment]  # the last start may have died before its own
        ran = [
            # When and where it began is left out; and whether it was a start or a resume.
            (vars(replace(start, time=None, update=0, updates=None)), _hardware(environment))
            for start, environment in zip(self.starts, environments, strict=False)
        ]
        begins = [start.update for start in self.starts]
        spans = [
            (begin, min(begins[number + 1 :], default=math.inf))  # a later start may have gone back behind this one
            for number, begin in enumerate(begins)
            if ran[number] == ran[-1]
        ]
        return [line for line in self.lines if any(begin < line.update <= end for begin, end in spans)]


def load_history(path: str | Path) -> History:
    """Read the run in a directory. Raises UserError for what is no run, CorruptData for a bad line."""
    directory = Path(path)
    if not (directory / "recipe.yaml").is_file() or not (directory / "events.jsonl").is_file():
        raise UserError(f"{directory} is no run: wanted a directory with recipe.yaml and events.jsonl, e.g. runs/NAME")
    attempts: list[list[float]] = []
    written = []
    for event in read_events(directory / "events.jsonl"):
        written.append(event)
        extend_attempts(attempts, event)
    return make_history(directory, redacted(read_recipe(directory / "recipe.yaml")), effective_events(written), attempts)


def make_history(
    directory: Path, recipe: dict[str, Any], events: Sequence[Event], attempts: Sequence[Sequence[float]]
) -> History:
    """Sort the effective events of a run by kind; `attempts` as `extend_attempts` leaves it. Raises CorruptData."""
    _check_ranks(events, directory / "events.jsonl")
    starts, environments, lines = _of(events, Start), _of(events, Environment), _of(events, Train)
    memories, traces = _of(events, MemoryParts), _of(events, Trace)
    spans = [latest - first for first, latest in filter(None, attempts)]
    skipped = [line.skipped for line in lines if line.skipped is not None]
    return History(
        directory=directory,
        name=directory.resolve().name,
        recipe=recipe,
        start=starts[-1] if starts else Start(),
        starts=starts,
        environment=environments[-1] if environments else Environment(),
        environments=_environments(events),
        lines=sorted(lines, key=lambda line: line.update),
        evaluations=_of(events, Evaluation),
        notes=[replace(note, message=redacted(note.message)) for note in _of(events, Note)],
        checkpoints=_of(events, Checkpoint),
        memory=memories[-1] if memories else None,
        trace=traces[-1] if traces else None,
        log_lines=len(lines),
        spikes=[],
        tokens=sum(line.tokens or 0 for line in lines),
        skipped=sum(skipped) if skipped else None,
        wall_s=math.fsum(spans) if spans else None,
        outcome=_outcome(events),
    )


def extend_attempts(attempts: list[list[float]], event: Event) -> None:
    """Take the next event of a log into [its first, its latest time] of each attempt, i.e. of each start or resume."""
    if isinstance(event, Start):
        attempts.append([])
    if attempts and event.time is not None:
        first, latest = attempts[-1] or (event.time, event.time)
        attempts[-1] = [first, max(latest, event.time)]


def _check_ranks(events: Sequence[Event], path: Path) -> None:
    """Raise CorruptData unless the log lines of as many ranks tell of equally many."""
    widths: dict[int | None, int] = {}
    ranks = None
    for event in events:
        if isinstance(event, Start):
            ranks = event.ranks
        elif isinstance(event, Train):
            counts = {len(values) for values in (event.rank_worked_s, event.rank_tokens, event.rank_data_wait_s) if values}
            if counts and counts != {widths.setdefault(ranks, max(counts))}:
                width = max(counts)
                raise CorruptData(
                    f"{path} is damaged: update {event.update} tells of {width} ranks, other lines of {widths[ranks]}"
                )


def _of(events: Iterable[Event], kind: type[Kind]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def _environments(events: Iterable[Event]) -> list[Environment]:
    environments: list[Environment] = []
    for event in events:
        if isinstance(event, Start):
            environments.append(Environment())
        elif isinstance(event, Environment) and environments:
            environments[-1] = event
    return environments


def _hardware(environment: Environment) -> tuple[str | None, list[str | None]]:
    """The processor, and the device of each rank: of which model, not which one."""
    return environment.processor, [device.name for device in environment.devices]


def _outcome(events: Iterable[Event]) -> Outcome:
    outcome: Outcome = "open"
    for event in events:
        match event:
            case Start():
                outcome = "open"
            case RunDone():
                outcome = "done"
            case RunStopped():
                outcome = "stopped"
            case RunNotFinite():
                outcome = "nonfinite"
    return outcome


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a run's recipe.yaml, secrets included. Raises UserError for what is none."""
    with translated("reading the recipe", path):
        try:
            values: dict[str, Any] = read_yaml(path)
            check(StoredRecipe, values)
        except ValueError as error:
            raise UserError(f"{path} is no recipe: {reason(error)}; a run directory keeps it as it was") from error
    return values


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a recipe under their dotted keys; an empty section has none."""
    if not isinstance(values, Mapping):
        return {prefix[:-1]: values}
    return {key: value for name, inner in values.items() for key, value in flat(inner, f"{prefix}{name}.").items()}
