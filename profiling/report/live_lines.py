"""What a live page takes from a log line: the points of its curves, and what rates are worked out from.

As live.py, without torch.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastdistil.untrusted import at, real

Event = dict[str, Any]


class LiveCurve(NamedTuple):
    name: str
    label: str
    unit: str
    group: str
    get: Callable[[Event], float]
    """From a `train` event; nan where it was not recorded."""


def _field(name: str, scale: float = 1.0) -> Callable[[Event], float]:
    """`name`: a field, or one within another: "device.power_w"."""
    path = name.split(".")
    return lambda event: real(at(event, *path)) * scale


def measured_steps(event: Event) -> list[float]:
    """Seconds of a line's updates, those of the warm-up left out."""
    return _measured(event, event.get("step_s"))


def _measured(event: Event, values: object) -> list[float]:
    warmup = event.get("warmup", 0)
    if not isinstance(values, list) or not isinstance(warmup, int):
        return []
    return [seconds for value in values[max(warmup, 0) :] if math.isfinite(seconds := real(value))]


def _median_step(event: Event) -> float:
    steps = measured_steps(event)
    return statistics.median(steps) * 1e3 if steps else math.nan


PER_RANK = ("rank_worked_s", "rank_tokens", "rank_data_wait_s")
LOSSES = {"soft": ("a_ce",), "hard": ("a_mlm", "a_clm"), "cosine": ("a_cos",), "mse": ("a_mse",)}
"""Term -> the recipe's weights of it."""
CURVES = (
    LiveCurve("total", "Total loss", "", "loss", _field("total")),
    LiveCurve("soft", "Soft loss (teacher)", "", "loss", _field("soft")),
    LiveCurve("hard", "Hard loss (labels)", "", "loss", _field("hard")),
    LiveCurve("cosine", "Cosine loss (hidden states)", "", "loss", _field("cosine")),
    LiveCurve("mse", "MSE loss (hidden states)", "", "loss", _field("mse")),
    LiveCurve("tokens_per_s", "Throughput", "tokens/s", "speed", _field("tokens_per_s")),
    LiveCurve("step", "Step, median of a log line", "ms", "speed", _median_step),
    LiveCurve("data_wait", "Waiting for data", "%", "speed", _field("data_wait_share", 100)),
    LiveCurve("grad_norm", "Gradient norm", "", "optimizer", _field("grad_norm")),
    LiveCurve("lr", "Learning rate", "", "optimizer", _field("lr")),
    LiveCurve("utilisation", "Utilisation", "%", "device", _field("device.utilisation", 100)),
    LiveCurve("sm_clock", "SM clock", "MHz", "device", _field("device.sm_clock_mhz")),
    LiveCurve("clock", "Clock", "MHz", "device", _field("device.clock_mhz")),
    LiveCurve("power", "Power", "W", "device", _field("device.power_w")),
    LiveCurve("temperature", "Temperature", "°C", "device", _field("device.temperature_c")),
    LiveCurve("reserved", "Device memory, reserved", "GiB", "memory", _field("memory.reserved_bytes", 2.0**-30)),
    LiveCurve("rss", "Host memory (RSS)", "GiB", "memory", _field("memory.rss_bytes", 2.0**-30)),
)


class Line(NamedTuple):
    """What is kept of a recent log line."""

    time: float
    updates: int
    tokens: float
    seconds: float
    """Of training; nan if not recorded."""
    steps: list[float]
    phases: dict[str, tuple[float, int]]
    """Name -> (sum of seconds, updates measured)."""
    per_rank: dict[str, Any]
    """Name of a field -> float64 [ranks]; without those that are not recorded or not finite."""
    event: Event


def line_of(event: Event) -> Line:
    tokens, rate = real(event.get("tokens")), real(event.get("tokens_per_s"))
    recorded = event.get("phases")
    phases = {}
    for name, values in recorded.items() if isinstance(recorded, dict) else ():
        measured = _measured(event, values)
        if measured:
            phases[str(name)] = (math.fsum(measured), len(measured))
    per_rank = {}
    for name in PER_RANK:
        if isinstance(column := event.get(name), list):
            values = np.array([real(value) for value in column])
            if np.isfinite(values).all():
                per_rank[name] = values
    updates = event.get("updates")
    return Line(
        time=real(event.get("time")),
        updates=updates if isinstance(updates, int) else 1,
        tokens=tokens,
        seconds=tokens / rate if rate > 0 else math.nan,
        steps=measured_steps(event),
        phases=phases,
        per_rank=per_rank,
        event=event,
    )
