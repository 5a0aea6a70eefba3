"""Signals in real processes; the gate on values that are not finite, against torch's own fused AdamW."""

import contextlib
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdistil import runs
from fastdistil.errors import NonFinite, UserError
from fastdistil.launch.attempt import Interrupts
from fastdistil.signals import stopping_as_interrupts
from fastdistil.training.guards import FiniteGuard, Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_only_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        assert signals.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == number.name
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("block", [Signals, Interrupts, stopping_as_interrupts])
def test_a_hangup_that_nohup_has_ignored_stays_ignored(block: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with block():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_is_obeyed_at_once_and_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    obeyed = []
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        for interrupt in ("first", "second"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                obeyed.append(interrupt)
        assert signals.requested == "SIGTERM"
    assert obeyed == ["second"]
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_it_says_so_and_changes_nothing() -> None:
    notes: list[str] = []
    handlers: list[object] = []

    def body() -> None:
        with Signals(notes.append) as signals:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert signals.requested is None

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]
    assert len(notes) == 1
    assert "main thread" in notes[0]


def test_a_forked_worker_still_dies_when_told() -> None:
    with Signals() as signals:
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # should it not die when told, the test fails instead of waiting
            os.write(tell, b"x")
            while True:
                signal.pause()
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert signals.requested is None
    os.close(ready)
    os.close(tell)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_a_process_stops_between_its_updates() -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        with Signals() as signals:
            os.write(tell, b"x")
            next(update for update in itertools.count() if signals.requested)
        os._exit(75 if signals.requested == "SIGTERM" else 1)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    os.close(tell)
    assert os.waitstatus_to_exitcode(status) == 75


def test_pause_file(tmp_path: Path) -> None:
    assert not runs.pause_requested(tmp_path)
    with pytest.raises(UserError, match="no run at"):
        runs.request_pause(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    runs.request_pause(tmp_path)
    runs.request_pause(tmp_path)
    assert runs.pause_requested(tmp_path)
    assert (tmp_path / "PAUSE").exists()
    runs.clear_pause(tmp_path)
    runs.clear_pause(tmp_path)
    assert not runs.pause_requested(tmp_path)
    with pytest.raises(UserError, match=r"no run at .*nowhere"):
        runs.request_pause(tmp_path / "nowhere")


# --- values that are not finite ---


def scalars(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


GOOD = scalars(soft=1.0, hard=2.0)


def test_stop_latches_and_names_the_first_bad_update() -> None:
    guard = FiniteGuard("stop", describe=lambda update: f"epoch 2, micro-batches {update} to {update + 3}")
    assert guard.check(GOOD, torch.tensor(1.0), 101).item() == 0.0
    assert guard.read() == 0
    bad = guard.check(scalars(soft=math.nan, hard=2.0), torch.tensor(math.inf), 102)
    assert (bad.dtype, bad.shape, bad.item()) == (torch.float32, (), 1.0)
    assert guard.check(scalars(soft=1.0, hard=-math.inf), torch.tensor(1.0), 103).item() == 1.0
    assert guard.check(GOOD, torch.tensor(1.0), 104).item() == 1.0
    expected = r"update 102 \(epoch 2, micro-batches 102 to 105\): soft nan, gradient norm inf; the weights are as before"
    with pytest.raises(NonFinite, match=expected) as caught:
        guard.read()
    assert (caught.value.exit_code, caught.value.update) == (10, 102)
    assert "hard" not in str(caught.value)


def test_skip_gates_only_the_bad_ones_up_to_a_limit() -> None:
    guard = FiniteGuard("skip", limit=2)
    norms = [1.0, math.inf, 1.0, math.nan, 1.0]
    gates = [guard.check(GOOD, torch.tensor(norm), update).item() for update, norm in enumerate(norms, 1)]
    assert gates == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert guard.read() == 2
    guard.check(GOOD, torch.tensor(-math.inf), 6)
    with pytest.raises(NonFinite, match=r"3 updates .*nonfinite_limit=2.*update 2: gradient norm inf;") as caught:
        guard.read()
    assert caught.value.update is None  # good updates came after it


def test_skip_goes_on_counting_after_a_resume() -> None:
    guard = FiniteGuard("skip", limit=2, skipped=2)
    assert guard.read() == 2
    guard.check(GOOD, torch.tensor(1.0), 51)
    assert guard.read() == 2
    guard.check(scalars(soft=math.nan, hard=0.0), torch.tensor(1.0), 77)
    with pytest.raises(NonFinite, match=r"3 updates.*update 77: soft nan"):
        guard.read()


def test_check_never_waits_for_the_device() -> None:
    """Tensors on the meta device have no values: whatever asks for one fails."""
    guard = FiniteGuard("stop")
    for update in range(3):
        terms = {"soft": torch.empty((), device="meta"), "hard": torch.empty(1, device="meta", dtype=torch.bfloat16)}
        assert guard.check(terms, torch.empty((), device="meta"), update).shape == ()
    with pytest.raises(RuntimeError):
        guard.read()


def test_read_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or tolist(tensor))
    monkeypatch.setattr(Tensor, "item", lambda tensor: pytest.fail("a second wait"))
    guard = FiniteGuard("skip")
    for update in range(3):
        guard.check(GOOD, torch.tensor(1.0), update)
    guard.read()
    assert len(waits) == 1


class Training:
    """Two parameters under fused AdamW, with gradients given from outside."""

    def __init__(self, mode: str) -> None:
        torch.manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(3))]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.1, weight_decay=0.1, fused=True)
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.guard = FiniteGuard(mode)  # type: ignore[arg-type]

    def step(self, seed: int, poison: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if poison is not None:
            self.parameters[0].grad[2, 3] = poison  # type: ignore[index]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.found_inf = self.guard.check({}, norm, seed)  # type: ignore[attr-defined]
        self.optimizer.step()

    def bits(self) -> list[bytes]:
        state = [value for parameter in self.parameters for value in self.optimizer.state[parameter].values()]
        assert len(state) == 6
        return [tensor.detach().numpy().tobytes() for tensor in (*self.parameters, *state)]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gated_step_changes_no_bit_and_leaves_no_trace(poison: float) -> None:
    gated, clean = Training("skip"), Training("skip")
    for seed in (1, 2):
        gated.step(seed)
        clean.step(seed)
    before = gated.bits()
    gated.step(3, poison)
    assert gated.bits() == before
    gated.step(4)
    clean.step(4)
    assert gated.bits() == clean.bits()
    assert gated.bits() != before


def test_a_gated_first_step_leaves_no_trace() -> None:
    gated, clean = Training("skip"), Training("skip")
    gated.step(3, math.nan)
    gated.step(4)
    clean.step(4)
    assert gated.bits() == clean.bits()


def test_after_stop_good_gradients_change_nothing_either() -> None:
    training = Training("stop")
    training.step(1)
    before = training.bits()
    training.step(2, math.nan)
    training.step(3)
    assert training.bits() == before
    with pytest.raises(NonFinite, match="update 2: gradient norm nan"):
        training.guard.read()
