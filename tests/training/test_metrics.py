"""The event log on real files, the meter against plain arithmetic, the console on a real pseudo-terminal."""

import builtins
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import pty
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fastdistil.console import Console
from fastdistil.errors import CorruptData, DiskFull, NonFinite, UserError
from fastdistil.events import EventLog, read_events
from fastdistil.training.guards import FiniteGuard
from fastdistil.training.metrics import Meter, TensorBoard

# --- the event log ---


def refuse_constant(name: str) -> None:
    raise AssertionError(f"not strict JSON: {name}")


def test_lines_are_strict_json_whatever_is_written(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Point:
        x: float

    path = tmp_path / "runs" / "a" / "events.jsonl"
    with EventLog(path) as log:
        log.write(
            "step",
            update=1,
            loss=math.nan,
            nested={"deep": [math.inf, (-math.inf, 1.5)], 3: None},
            numpy=[np.float32(0.5), np.int64(7), np.float64("nan")],
            text="line\nbreak \ud800 ü",
            path=Path("a/b"),
            point=Point(math.inf),
            flag=True,
            kind="own",
        )
    line = path.read_text(encoding="ascii")
    assert line.count("\n") == 1
    event = json.loads(line, parse_constant=refuse_constant)
    assert isinstance(event.pop("time"), float)
    assert event == {
        "event": "step",
        "update": 1,
        "loss": "nan",
        "nested": {"deep": ["inf", ["-inf", 1.5]], "3": None},
        "numpy": [0.5, 7, "nan"],
        "text": "line\nbreak \ud800 ü",
        "path": "a/b",
        "point": {"x": "inf"},
        "flag": True,
        "kind": "own",
    }
    assert math.isnan(float(event["loss"]))


def test_a_log_is_appended_to_and_a_torn_line_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("start")
    content = path.read_bytes()
    for torn in (b'{"event": "st', b"x" * 10_000, b"\xff\xfe"):
        path.write_bytes(content + torn)
        assert [event["event"] for event in read_events(path)] == ["start"]
        with EventLog(path) as log:
            assert path.read_bytes() == content
            log.write("more")
        assert [event["event"] for event in read_events(path)] == ["start", "more"]
    path.write_bytes(b"never a newline")
    EventLog(path).close()
    assert path.read_bytes() == b""


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        log = EventLog(path)
        for update in itertools.count():
            log.write("step", update=update, text="x" * 5000)
            if update == 50:
                os.write(tell, b"x")
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(tell)
    EventLog(path).close()
    updates = [event["update"] for event in read_events(path)]
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
            taken: int = self._file.write(content[: self._room])
            self._room -= taken
            return taken

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("start")
    with EventLog(path) as log:
        before = path.read_bytes()
        log._file = FullFile(log._file)  # type: ignore[assignment]
        with pytest.raises(DiskFull, match="writing the event log"):
            log.write("step")
        assert path.read_bytes() == before


def effective_by_definition(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Event i stands unless some later resume went back to before its update."""
    return [
        event
        for i, event in enumerate(events)
        if event["event"] in ("start", "resume")
        or "update" not in event
        or not any(later["event"] in ("start", "resume") and later["update"] < event["update"] for later in events[i + 1 :])
    ]


@given(
    st.lists(
        st.one_of(st.just(("note", None)), st.tuples(st.sampled_from(["step", "step", "start", "resume"]), st.integers(0, 9)))
    )
)
@example([("step", 5), ("resume", 7), ("resume", 3)])
def test_effective_events_leave_out_what_was_superseded(kinds: list[tuple[str, int | None]]) -> None:
    from fastdistil.events import effective_events

    events = [
        {"event": kind, "n": n, **({} if update is None else {"update": update})} for n, (kind, update) in enumerate(kinds)
    ]
    assert effective_events(events) == effective_by_definition(events)


def test_effective_events_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for update in (1, 2, 3):
            log.write("step", update=update, try_=1)
        log.write("resume", update=1)
        log.write("step", update=2, try_=2)
    rows = [(event["event"], event["update"], event.get("try_")) for event in read_events(path, effective=True)]
    assert rows == [("step", 1, 1), ("resume", 1, None), ("step", 2, 2)]
    assert len(list(read_events(path))) == 5


# --- the meter ---


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def scalar(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def test_meter_gives_means_and_rates_since_the_last_read() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.now_s += 5
    meter.restart()
    for soft, norm in ((1.0, 3.0), (2.0, 5.0), (6.0, 1.0)):
        meter.add({"soft": scalar(soft), "hard": scalar(10 * soft)}, scalar(norm), tokens=400, data_wait_s=0.1)
        clock.now_s += 2
    with meter.excluded():
        clock.now_s += 100
    fields = meter.read()
    assert fields.pop("host_peak_bytes") > 10_000_000
    assert fields.pop("data_wait_share") == pytest.approx(0.05)
    assert fields == {
        "soft": 3.0, "hard": 30.0, "grad_norm": 3.0, "grad_norm_max": 5.0,
        "updates": 3, "skipped": 0, "tokens": 1200, "tokens_per_s": 200.0,
    }  # fmt: skip
    meter.add({"soft": scalar(7.0), "hard": scalar(0.0)}, scalar(2.0), tokens=10, data_wait_s=0.0)
    clock.now_s += 1
    again = meter.read()
    assert (again["soft"], again["grad_norm_max"], again["updates"], again["tokens_per_s"]) == (7.0, 2.0, 1, 10.0)
    with pytest.raises(ValueError, match="nothing to read"):
        meter.read()


def test_meter_leaves_gated_updates_out_of_the_means() -> None:
    meter = Meter(Clock())
    for value, gated in ((1.0, 0.0), (math.nan, 1.0), (3.0, 0.0)):
        meter.add({"soft": scalar(value)}, scalar(value), 10, 0.0, found_inf=torch.tensor(gated))
    fields = meter.read()
    assert (fields["soft"], fields["grad_norm"], fields["grad_norm_max"]) == (2.0, 2.0, 3.0)
    assert (fields["updates"], fields["skipped"], fields["tokens"]) == (3, 1, 30)
    meter.add({"soft": scalar(math.inf)}, None, 10, 0.0, found_inf=torch.tensor(1.0))
    fields = meter.read()
    assert math.isnan(fields["soft"])
    assert "grad_norm" not in fields


def test_adding_never_waits_for_the_device() -> None:
    """Tensors on the meta device have no values: whatever asks for one fails."""
    meter = Meter()
    for _ in range(3):
        terms = {"soft": torch.empty((), device="meta"), "hard": torch.empty(1, device="meta", dtype=torch.bfloat16)}
        meter.add(terms, torch.empty((), device="meta"), 10, 0.0, found_inf=torch.empty((), device="meta"))
    with pytest.raises(RuntimeError):
        meter.read()


def test_one_wait_per_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.Size] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or tolist(tensor))
    for name in ("item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda tensor, name=name: pytest.fail(f"another wait: {name}"))
    meter, guard = Meter(), FiniteGuard("skip", limit=2)
    for lines in (1, 2):
        for norm in (1.0, math.inf, 3.0):
            terms = {"soft": scalar(1.0), "hard": scalar(2.0)}
            meter.add(terms, scalar(norm), 10, 0.0, guard.check(terms, scalar(norm)))
        fields = meter.read(guard)
        assert (fields["skipped"], fields["skipped_in_all"], fields["grad_norm"]) == (1, lines, 2.0)
        assert len(waits) == lines
    meter.add(terms, scalar(norm), 10, 0.0, guard.check(terms, scalar(math.nan)))
    with pytest.raises(NonFinite, match="3 updates"):
        meter.read(guard)
    assert len(waits) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_adding_never_waits_for_a_gpu() -> None:
    meter = Meter()
    terms = {"soft": torch.ones((), device="cuda"), "hard": torch.ones((), device="cuda")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meter.add(terms, torch.ones((), device="cuda"), 10, 0.0, found_inf=torch.zeros((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fields = meter.read()
    assert fields["soft"] == 1.0
    assert fields["device_peak_bytes"] >= fields["device_allocated_bytes"] > 0


# --- the console ---

FIELDS = {"loss": 1.23456, "updates": 12000, "tokens_per_s": 12345.6, "data_wait_share": 0.0123, "host_peak_bytes": 3 * 2**29}


def test_plain_lines_where_there_is_no_terminal() -> None:
    clock = Clock()
    out = io.StringIO()
    console = Console(file=out, clock=clock)
    console.start(1000, done=100)
    clock.now_s += 50
    console.update(110, {})
    console.update(150, FIELDS)
    console.note("saved [bold]step-150[/bold] " + "x" * 200)
    console.close()
    line, note = out.getvalue().splitlines()
    assert line == (
        "update 150/1000  loss 1.235  updates 12,000  12,346 tokens/s  data wait 1.2%  host peak 1.50 GiB  left 0:14:10"
    )
    assert note == "saved [bold]step-150[/bold] " + "x" * 200


def test_a_quiet_console_says_nothing() -> None:
    out = io.StringIO()
    console = Console(quiet=True, file=out)
    console.start(10, 0)
    console.update(5, FIELDS)
    console.note("text")
    console.close()
    assert out.getvalue() == ""


@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_on_a_terminal_without_colour_if_asked(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    mine, theirs = pty.openpty()
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.extend(chunks(mine)))
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        console = Console(file=terminal)
        console.start(1000, done=100)
        console.update(150, {"loss": 1.5})
        console.note("saved [x]")
        console.close()
    reader.join()
    os.close(mine)
    output = b"".join(received).decode()
    assert "100/1000" in output
    assert "150/1000" in output
    assert "loss 1.5" in output
    assert "saved [x]" in output
    assert ("\x1b[3" in output) == (not no_color)


def chunks(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # the other end of a pseudo-terminal was closed
            return
        if not chunk:
            return
        yield chunk


# --- TensorBoard ---


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, pytest.fail)
    board.write(10, {"loss": 2.5, "updates": 10, "text": "not a curve", "flag": True})
    board.write(20, {"loss": 1.5})
    board.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "updates"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(10, 2.5), (20, 1.5)]


def test_tensorboard_missing_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importing(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install fastdistil\[tensorboard\]"):
        TensorBoard(tmp_path, pytest.fail)


def test_tensorboard_failing_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Broken:
        def add_scalar(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise RuntimeError("closed already")

    warnings: list[str] = []
    board = TensorBoard(tmp_path, warnings.append)
    board._writer.close()
    board._writer = Broken()
    fields: Mapping[str, float] = {"loss": 1.0}
    board.write(1, fields)
    board.write(2, fields)
    board.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
