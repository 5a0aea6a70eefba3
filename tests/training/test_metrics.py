"""The meter against plain arithmetic, the console on a real pseudo-terminal."""

import builtins
import errno
import io
import math
import os
import pty
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistil.console import Console
from fastdistil.errors import NonFinite, UserError
from fastdistil.training.guards import FiniteGuard
from fastdistil.training.metrics import Meter, TensorBoard

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
    meter.add({"soft": scalar(math.inf)}, scalar(1.0), 10, 0.0, found_inf=torch.tensor(1.0))
    fields = meter.read()
    assert math.isnan(fields["soft"]) and math.isnan(fields["grad_norm_max"])


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
            meter.add(terms, scalar(norm), 10, 0.0, guard.check(terms, scalar(norm), 1))
        fields = meter.read(guard)
        assert (fields["skipped"], fields["skipped_in_all"], fields["grad_norm"]) == (1, lines, 2.0)
        assert len(waits) == lines
    meter.add(terms, scalar(norm), 10, 0.0, guard.check(terms, scalar(math.nan), 2))
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
