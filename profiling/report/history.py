"""What a run directory tells, read once: the recipe and the effective events, sorted by kind.

Everything that shows, sums up or compares runs starts from here. Fields that an older run did not record are absent, not
guessed. A run that died within a write loses its torn last line, as everywhere (`events.read_events`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.events import Fields, effective_events, read_events
from fastdistil.redaction import redacted
from fastdistil.untrusted import Positive, check, read_yaml, real, reason

Outcome = Literal["done", "stopped", "nonfinite", "open"]
Event = dict[str, Any]
# Of a start: when and where it was, not how it ran.
_POSITION = frozenset({"event", "time", "update", "updates"})
_BY_RANK = ("rank_worked_s", "rank_tokens", "rank_data_wait_s")


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
    start: Event
    """The last `start` or `resume`; empty if the run died before it."""
    starts: list[Event]
    """Every one, in order: `start` is the last."""
    environment: Event
    """The last one recorded; empty without."""
    environments: list[Event]
    """Of each start, the last one recorded before the next; empty without."""
    lines: list[Event]
    """`train` events, in order of their updates; those that a resume went back behind are left out."""
    evaluations: list[Event]
    notes: list[Event]
    checkpoints: list[Event]
    memory: Event | None
    trace: Event | None
    """The last trace's: which updates, and the kernels that took most of them."""
    wall_s: float | None
    """From each start to the last event before the next, superseded ones too; what lies between attempts is left out."""
    outcome: Outcome
    """Since the last start; open: it is running, or it died."""

    @property
    def device(self) -> str | None:
        """The name of rank 0's GPU or processor, or what the recipe calls it."""
        kind, devices = self.start.get("device"), self.environment.get("devices") or [{}]
        return (devices[0].get("name") if str(kind).startswith("cuda") else self.environment.get("processor")) or kind

    @property
    def comparable_lines(self) -> list[Event]:
        """The lines that ran as `start` and `environment` say: a run may have been continued by other ranks, or on others."""
        environments = [*self.environments[:-1], self.environment]  # the last start may have died before its own
        ran = [
            ({name: value for name, value in start.items() if name not in _POSITION}, _hardware(environment))
            for start, environment in zip(self.starts, environments, strict=False)
        ]
        begins = [start.get("update", 0) for start in self.starts]
        spans = [
            (begin, min(begins[number + 1 :], default=math.inf))  # a later start may have gone back behind this one
            for number, begin in enumerate(begins)
            if ran[number] == ran[-1]
        ]
        return [line for line in self.lines if any(begin < line["update"] <= end for begin, end in spans)]


def load_history(path: str | Path) -> History:
    """Read the run in a directory. Raises UserError for what is no run, CorruptData for a bad line."""
    directory = Path(path)
    if not (directory / "recipe.yaml").is_file() or not (directory / "events.jsonl").is_file():
        raise UserError(f"{directory} is no run: wanted a directory with recipe.yaml and events.jsonl, e.g. runs/NAME")
    written = list(read_events(directory / "events.jsonl"))
    events = effective_events(written)
    _check_ranks(events, directory / "events.jsonl")
    starts = _of(events, "start", "resume")
    environments, memories, traces = _of(events, "environment"), _of(events, "memory"), _of(events, "trace")
    return History(
        directory=directory,
        name=directory.resolve().name,
        recipe=redacted(_recipe(directory / "recipe.yaml")),
        start=starts[-1] if starts else {},
        starts=starts,
        environment=environments[-1] if environments else {},
        environments=_environments(events),
        lines=sorted(_of(events, "train"), key=lambda line: line["update"]),
        evaluations=_of(events, "evaluation"),
        notes=[redacted(note) for note in _of(events, "note")],
        checkpoints=_of(events, "checkpoint"),
        memory=memories[-1] if memories else None,
        trace=traces[-1] if traces else None,
        wall_s=_wall_s(written),
        outcome=_outcome(events),
    )


def _check_ranks(events: Sequence[Event], path: Path) -> None:
    """Raise CorruptData unless the log lines of as many ranks tell of equally many."""
    widths: dict[Any, int] = {}
    ranks = None
    for event in events:
        if event["event"] in ("start", "resume"):
            ranks = event.get("ranks")
        elif event["event"] == "train":
            counts = {len(values) for name in _BY_RANK if (values := event.get(name))}
            if counts and counts != {widths.setdefault(ranks, max(counts))}:
                update, width = event["update"], max(counts)
                raise CorruptData(f"{path} is damaged: update {update} tells of {width} ranks, other lines of {widths[ranks]}")


def _of(events: Iterable[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event.get("event") in kinds]


def _environments(events: Iterable[Event]) -> list[Event]:
    environments: list[Event] = []
    for event in events:
        match event.get("event"):
            case "start" | "resume":
                environments.append({})
            case "environment" if environments:
                environments[-1] = event
    return environments


def _hardware(environment: Event) -> tuple[Any, list[Any]]:
    """The processor, and the device of each rank: of which model, not which one."""
    return environment.get("processor"), [device.get("name") for device in environment.get("devices") or ()]


def _wall_s(events: Iterable[Event]) -> float | None:
    attempts: list[list[float]] = []
    for event in events:
        if event.get("event") in ("start", "resume"):
            attempts.append([])
        if attempts and math.isfinite(when := real(event.get("time"))):
            attempts[-1].append(when)
    spans = [max(times) - times[0] for times in attempts if times]
    return math.fsum(spans) if spans else None


def _outcome(events: Iterable[Event]) -> Outcome:
    outcome: Outcome = "open"
    for event in events:
        match event.get("event"):
            case "start" | "resume":
                outcome = "open"
            case "done":
                outcome = "done"
            case "stopped":
                outcome = "stopped"
            case "nonfinite":
                outcome = "nonfinite"
    return outcome


def _recipe(path: Path) -> dict[str, Any]:
    with translated("reading the recipe", path):
        try:
            values: dict[str, Any] = read_yaml(path)
            check(StoredRecipe, values)
        except ValueError as error:
            raise UserError(f"{path} is no recipe: {reason(error)}; a run directory keeps it as it was") from error
    return values
