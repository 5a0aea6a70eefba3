"""The event log: real files, every kind of event as the file of its format has it, and logs of older formats."""

import ast
import dataclasses
import errno
import inspect
import itertools
import json
import math
import os
import signal
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdistil import events
from fastdistil.errors import CorruptData, DiskFull, UserError
from fastdistil.events import (
    FORMAT,
    KINDS,
    DeviceReading,
    Event,
    EventLog,
    Note,
    Resume,
    Start,
    Train,
    effective_events,
    parse_event,
    read_events,
)
from fastdistil.profiling.report.history import load_history
from tests.event_streams import write_run

FILES = Path(__file__).parent / "events"
FIRST_LINE = f'{{"event": "format", "version": {FORMAT}}}\n'.encode()


# --- fields and formats ---


def nested_types(kind: Any) -> Iterator[type]:
    """The dataclasses that a field's type speaks of."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
    for part in typing.get_args(kind):
        yield from nested_types(part)


def field_tree(kind: type) -> dict[str, Any]:
    """{field: None, or the tree of the object that it holds} of a type of events.py."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: next((field_tree(inner) for inner in nested_types(hints[field.name]) if inner is not kind), None)
        for field in dataclasses.fields(kind)
    }


def key_tree(value: Any, tree: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same of an object in a log; what is a mapping by its type, as phases, has no tree."""
    if tree is None:
        return None
    objects = value if isinstance(value, list) else [value]
    return {key: key_tree(item, tree.get(key)) for fields in objects for key, item in fields.items()}


def test_every_field_of_every_kind_is_as_the_file_of_its_format_has_it() -> None:
    """Whoever renames a field must count FORMAT up, and keep a file of the format before for the test of old logs."""
    lines = [json.loads(line) for line in (FILES / f"format-{FORMAT}.jsonl").read_bytes().splitlines()]
    assert {line["event"] for line in lines} == KINDS.keys()
    for line in lines:
        kind = line.pop("event")
        tree = field_tree(KINDS[kind]) if kind != "format" else {"version": None}  # which has no time
        assert key_tree(line, tree) == tree, kind


def test_every_kind_is_read_and_written_again_without_a_change(tmp_path: Path) -> None:
    path = FILES / f"format-{FORMAT}.jsonl"
    first, *lines = path.read_bytes().splitlines()
    with EventLog(tmp_path / "events.jsonl") as log:
        for event in read_events(path):
            log.write(event)
    first_again, *again = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert first_again == first
    assert [json.loads(line) for line in again] == [json.loads(line) for line in lines]
    train = next(event for event in read_events(path) if isinstance(event, Train))
    assert train.grad_norm == math.inf and math.isnan(train.grad_norm_max or 0.0)


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_what_happened_at_an_update_names_it(kind: str) -> None:
    with pytest.raises(ValueError, match="update"):
        parse_event(f'{{"event": "{kind}"}}'.encode())
    with pytest.raises(TypeError, match="update"):
        KINDS[kind]()


@pytest.mark.parametrize("version", range(FORMAT + 1))
def test_logs_of_older_formats_tell_the_same(version: int, tmp_path: Path) -> None:
    write_run(tmp_path / "run")  # for its recipe
    (tmp_path / "run" / "events.jsonl").write_bytes((FILES / f"format-{version}.jsonl").read_bytes())
    history = load_history(tmp_path / "run")
    assert [line.update for line in history.lines] == ([2, 4] if version == 0 else [2])
    assert history.outcome == "done" and [type(start) for start in history.starts] == [Start, Resume]
    if version == 0:
        (before, line), evaluation = history.lines, history.evaluations[-1]
        assert (line.updates, line.tokens, line.total, line.warmup) == (2, 1872, 12.18638801574707, 2)
        assert line.phases["exposed"] == (0.030167651999931877, 0.05215881200001604)
        assert (line.rank_tokens, line.ring_bytes, line.slowest_rank) == ((908, 964), (169856,), 1)
        assert line.device is not None and (line.device.samples, line.device.clock_mhz) == (6, 2596.13)
        assert (evaluation.loss, evaluation.kl_tokens) == (5.7873397434459015, 900)
        assert [device.host for device in history.environment.devices] == ["node-1", "node-1"]
        assert history.memory is not None and (history.memory.parts or {})["gradients"] == 84928
        assert history.trace is not None and history.trace.kernels[0].calls == 4
        assert before.memory is not None and before.memory.phase_peaks is None


def test_a_log_of_a_newer_format_is_refused_and_a_new_kind_or_field_is_not(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(FIRST_LINE + b'{"event": "surprise", "update": 3, "x": 1}\n{"event": "note", "message": "m", "x": 1}\n')
    surprise, note = read_events(path)
    assert surprise.update == 3 and note == Note(message="m")
    path.write_text(f'{{"event": "format", "version": {FORMAT + 1}}}\n')
    with pytest.raises(UserError, match=rf"format {FORMAT + 1}, and this fastdistil reads formats up to {FORMAT}; update it"):
        list(read_events(path))


def test_every_field_says_what_it_means() -> None:
    """Each has a comment on its line; the types are the module's own dataclasses."""
    source = inspect.getsource(events)
    tokens = tokenize.generate_tokens(iter(source.splitlines(True)).__next__)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    public = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    fields = [(node.name, field) for node in public for field in node.body if isinstance(field, ast.AnnAssign)]
    assert len(fields) > 100
    silent = [
        f"{name}.{ast.unparse(field.target)}"
        for name, field in fields
        if field.end_lineno not in commented and "ClassVar" not in ast.unparse(field.annotation)
    ]
    assert silent == []


def test_events_cannot_be_changed() -> None:
    for kind in KINDS.values():
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        for inner in nested_types(types.GenericAlias(tuple, tuple(typing.get_type_hints(kind).values()))):
            assert inner.__dataclass_params__.frozen, inner  # type: ignore[attr-defined]


# --- the file ---


def refuse_constant(name: str) -> None:
    raise AssertionError(f"not strict JSON: {name}")


def test_lines_are_strict_json_whatever_is_written(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a" / "events.jsonl"
    event = Train(
        update=np.int64(7),  # type: ignore[arg-type]
        total=math.nan,
        lr=np.float32(0.5),  # type: ignore[arg-type]
        step_s=(np.float64("inf"), 1.5),
        phases={"data": [0.5, -math.inf]},  # type: ignore[dict-item]
        device=DeviceReading(throttled={}, power_w=math.inf),
        compression="line\nbreak \ud800 ü",
        engine=Path("a/b"),  # type: ignore[arg-type]
    )
    with EventLog(path) as log:
        log.write(event)
    first, line = path.read_text(encoding="ascii").splitlines()
    assert json.loads(first) == {"event": "format", "version": FORMAT}
    fields = json.loads(line, parse_constant=refuse_constant)
    assert isinstance(fields.pop("time"), float)
    assert fields == {
        "event": "train",
        "update": 7,
        "warmup": 0,
        "total": "nan",
        "lr": 0.5,
        "step_s": ["inf", 1.5],
        "phases": {"data": [0.5, "-inf"]},
        "device": {"samples": 0, "throttled": {}, "power_w": "inf"},
        "compression": "line\nbreak \ud800 ü",
        "engine": "a/b",
    }


def test_a_log_is_appended_to_and_a_torn_line_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(Start())
    content = path.read_bytes()
    for torn in (b'{"event": "st', b"x" * 10_000, b"\xff\xfe"):
        path.write_bytes(content + torn)
        assert list(map(type, read_events(path))) == [Start]
        with EventLog(path) as log:
            assert path.read_bytes().startswith(content + FIRST_LINE)
            log.write(Note(message="more"))
        assert list(map(type, read_events(path))) == [Start, Note]
    path.write_bytes(b"never a newline")
    EventLog(path).close()
    assert path.read_bytes() == FIRST_LINE


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        log = EventLog(path)
        for update in itertools.count():
            log.write(Note(update=update, message="x" * 5000))
            if update == 50:
                os.write(tell, b"x")
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(tell)
    EventLog(path).close()
    updates = [event.update for event in read_events(path)]
    assert len(updates) > 50
    assert updates == list(range(len(updates)))


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no event log at"):
        list(read_events(tmp_path / "events.jsonl"))
    for bad in ("nonsense", "[1]", '{"event": 3}', '{"event": "train", "update": "seven"}'):
        (tmp_path / "events.jsonl").write_text(f'{{"event": "a"}}\n{bad}\n{{"event": "b"}}\n')
        with pytest.raises(CorruptData, match=r"events\.jsonl line 2 is not"):
            list(read_events(tmp_path / "events.jsonl"))


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    class FullFile:
        """Takes 10 bytes and is then full."""

        def __init__(self, file: Any) -> None:
            self._file = file
            self._room = 10

        def write(self, content: bytes) -> int:
            if not self._room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written: int = self._file.write(content[: self._room])
            self._room -= written
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(Start())
    with EventLog(path) as log:
        before = path.read_bytes()
        log._file = FullFile(log._file)  # type: ignore[assignment]
        with pytest.raises(DiskFull, match="writing the event log"):
            log.write(Note())
        assert path.read_bytes() == before


def effective_by_definition(events: list[Event]) -> list[Event]:
    """Event i stands unless some later resume went back to before its update."""
    return [
        event
        for i, event in enumerate(events)
        if isinstance(event, Start)
        or event.update is None
        or not any(isinstance(later, Start) and later.update < event.update for later in events[i + 1 :])
    ]


updates = st.integers(0, 9)


@given(
    st.lists(
        st.one_of(
            st.just(Note(message="without an update")),
            st.builds(Train, update=updates),
            st.builds(Start, update=updates),
            st.builds(Resume, update=updates),
        )
    )
)
@example([Train(update=5), Resume(update=7), Resume(update=3)])
def test_effective_events_leave_out_what_was_superseded(events: list[Event]) -> None:
    numbered = [dataclasses.replace(event, time=float(number)) for number, event in enumerate(events)]
    assert effective_events(numbered) == effective_by_definition(numbered)


def test_effective_events_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for update in (1, 2, 3):
            log.write(Train(update=update, lr=1.0))
        log.write(Resume(update=1))
        log.write(Train(update=2, lr=2.0))
    rows = [(type(event), event.update, getattr(event, "lr", None)) for event in read_events(path, effective=True)]
    assert rows == [(Train, 1, 1.0), (Resume, 1, None), (Train, 2, 2.0)]
    assert len(list(read_events(path))) == 5
