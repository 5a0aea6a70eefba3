"""What may stop a run: signals, and values that are not finite.

Nothing here waits for the device except `FiniteGuard.read`.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fastdistil.errors import NonFinite
from fastdistil.signals import die_of, stop_signals


class Signals:
    """Within the block, SIGTERM, SIGINT and SIGHUP only set `requested`, for the loop to look at between updates.

    SIGHUP stays ignored where it is, as `nohup` has it.

    A second SIGINT raises KeyboardInterrupt at once. Off the main thread Python allows no handlers: then `note` is called
    with a sentence that says so and the block changes nothing.
    """

    def __init__(self, note: Callable[[str], None] = lambda _: None) -> None:
        self.requested: str | None = None
        self._note = note
        self._interrupts = 0
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            self._note("not on the main thread: SIGTERM, SIGINT and SIGHUP keep their meaning; pause with a PAUSE file instead")
            return self
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed by Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            die_of(number)  # a data worker of the user's, say
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number).name


class FiniteGuard:
    """Gates the optimizer on the device when a loss or gradient is not finite, and tells the host when it next reads.

    `check` costs a handful of scalar kernels and no wait. Its result goes to a fused optimizer as `optimizer.found_inf`
    (with `optimizer.grad_scale = None`), which then leaves weights, moments and step as they were.

    mode "stop": once an update was bad, every later one is gated too, so that the weights stay as they were before it until
    `read` raises. mode "skip": only bad updates are gated; `read` raises once there were more than `limit`.
    `describe(update)` names the batches of an update for the message; `skipped` is the count to go on from after a resume.
    """

    def __init__(
        self,
        mode: Literal["stop", "skip"] = "stop",
        limit: int = 10,
        *,
        skipped: int = 0,
        describe: Callable[[int], str] | None = None,
    ) -> None:
        self._mode = mode
        self._limit = limit
        self._skipped_before = skipped
        self._describe = describe
        self._names: tuple[str, ...] = ()
        self._count: Tensor | None = None  # [] float64: bad updates so far
        self._first: Tensor | None = None  # [1 + terms] float64: number and values of the first bad update

    @torch.no_grad()
    def check(self, terms: Mapping[str, Tensor], grad_norm: Tensor, update: int) -> Tensor:
        """Return found_inf, float32 [] on the terms' device: 1.0 where the update of this number must not be applied.

        `terms` and `grad_norm` are scalars; the same names at every call.
        """
        named = {**terms, "gradient norm": grad_norm}
        values = torch.stack([value.detach().reshape(()).double() for value in named.values()])
        if self._count is None or self._first is None:
            self._names = tuple(named)
            self._count = values.new_zeros(())
            self._first = values.new_zeros(1 + len(values))
        assert tuple(named) == self._names, f"terms changed from {self._names} to {tuple(named)}"
        bad = values.isfinite().all().logical_not()
        numbered = torch.cat([values.new_full((1,), update), values])
        self._first = torch.where(bad & (self._count == 0), numbered, self._first)
        self._count = self._count + bad
        gate = self._count > 0 if self._mode == "stop" else bad
        return gate.float()  # without dimensions: torch subtracts it from the optimizer's step counts, which have none

    def read(self) -> int:
        """`judge(pending())`: updates skipped so far. Waits for the device, so: not on every update."""
        pending = self.pending()
        return self._skipped_before if pending is None else self.judge(pending.tolist())

    def pending(self) -> Tensor | None:
        """What `judge` needs, float64 [2 + terms], still on the device; None before the first check."""
        return None if self._count is None or self._first is None else torch.cat([self._count.reshape(1), self._first])

    def judge(self, pending: list[float]) -> int:
        """Updates skipped so far, before a resume included. Raises NonFinite as the mode says."""
        count, first, *values = pending
        skipped = self._skipped_before + int(count)
        if count and self._mode == "stop":
            error = NonFinite(
                f"{self._blame(int(first), values)}; the weights are as before that update",
                "lower optim.lr, use loop.precision=fp32, look at those batches, or set loop.nonfinite=skip",
            )
            error.first = error.update = int(first)
            raise error
        if count and skipped > self._limit:
            error = NonFinite(
                f"{skipped} updates were not finite and skipped, more than loop.nonfinite_limit={self._limit}; the first "
                f"since the start or resume: {self._blame(int(first), values)}",
                "lower optim.lr or use loop.precision=fp32",
            )
            error.first = int(first)
            raise error
        return skipped

    def _blame(self, update: int, values: list[float]) -> str:
        named = zip(self._names, values, strict=True)
        terms = ", ".join(f"{name} {value}" for name, value in named if not math.isfinite(value))
        batches = f" ({self._describe(update)})" if self._describe is not None else ""
        return f"update {update}{batches}: {terms}"
