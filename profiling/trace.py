"""A trace of a few updates for Perfetto or chrome://tracing, and the kernels that took the most time in them.

`profile.trace_steps: [10, 13]` traces updates 10 to 13, on every rank: operators and GPU kernels, no shapes, no Python stacks,
so that the file stays small and the updates nearly as fast. The spans of spans.py are in it by name.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fastdistil.profiling.spans import Spans

TOP = 20


class _Ranges:
    """Spans as ranges of the trace."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def range_push(self, name: str) -> None:
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()

    def range_pop(self) -> None:
        self._open.pop().__exit__(None, None, None)


class Tracer:
    """One rank's: of updates, numbered from 1."""

    def __init__(self, steps: Sequence[int] | None, device: torch.device, spans: Spans) -> None:
        """`steps`: the first and the last update to be traced; None: none is."""
        self._first, self._last = steps if steps is not None else (0, 0)
        self._device, self._spans = device, spans
        self._profiler: Any = None
        self._before: Any = None

    def close(self) -> None:
        """What is under way is dropped."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    @property
    def tracing(self) -> bool:
        return self._profiler is not None

    def begins(self, update: int) -> bool:
        """Say whether to start before it. A run that begins within the traced updates traces what is left of them."""
        return not self.tracing and self._first <= update <= self._last

    def ends(self, update: int, last: bool) -> bool:
        """Say whether to stop after it. `last`: of the run."""
        return self.tracing and (last or update >= self._last)

    def start(self) -> None:
        """It takes a while, as does `stop`: keep them out of the time of updates."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        self._profiler = torch.profiler.profile(activities=activities)
        self._before, self._spans.ranges = self._spans.ranges, _Ranges()
        self._profiler.start()

    def wait(self) -> None:
        """Wait for the device's updates, which count as training."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def stop(self) -> tuple[bytes, list[dict[str, Any]]]:
        """(the trace, JSON, gzipped; what top_kernels says of it). After `wait`."""
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._spans.ranges = self._before
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(path))
            return path.read_bytes(), top_kernels(profiler.key_averages(), self._device)


def top_kernels(averages: Any, device: torch.device) -> list[dict[str, Any]]:
    """The TOP operators or kernels by time of their own: name, calls, milliseconds in all, share of the total.

    On a GPU the kernels, by time on it; on a CPU the operators. Spans are none.
    """
    on_gpu = device.type == "cuda"
    device_type = torch._C._autograd.DeviceType.CUDA if on_gpu else torch._C._autograd.DeviceType.CPU
    kernels = []
    for average in averages:
        if average.device_type != device_type or getattr(average, "is_user_annotation", False):
            continue
        own_us = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        kernels.append({"name": average.key, "calls": average.count, "ms": own_us / 1e3})
    total = sum(kernel["ms"] for kernel in kernels)
    largest = sorted(kernels, key=lambda kernel: -kernel["ms"])[:TOP]
    return [{**kernel, "share": kernel["ms"] / total if total else 0.0} for kernel in largest]
