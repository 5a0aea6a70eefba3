"""What a result file says of the machine beside pytest-benchmark's own entry, and of each benchmark beside its statistics."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import psutil
import torch

from fastdistil.profiling.device import device_facts, gpu_of
from fastdistil.profiling.nvml import NvmlError

NOW = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")


def processor_clock() -> dict[str, float | None]:
    """MHz, over all cores: now, and at most; None where the kernel does not say (a virtual machine's often does not)."""
    frequency: Any = psutil.cpu_freq()
    readings = (None, None) if frequency is None else (frequency.current, frequency.max)
    return {name: value or None for name, value in zip(("clock_mhz", "clock_max_mhz"), readings, strict=True)}


def gpu(index: int) -> dict[str, Any]:
    """Name, memory, driver, the largest clocks and the power limit; `now`: clocks, power and temperature at this moment."""
    device = torch.device("cuda", index)
    facts = device_facts(device)
    del facts["uuid"]  # of one card: results are compared between cards
    return {**facts, "cuda": torch.version.cuda, "now": _now(device)}


def _now(device: torch.device) -> dict[str, float | None] | None:
    try:
        gpu = gpu_of(device)
    except NvmlError:  # device_facts told it
        return None
    try:
        return {name: gpu.read(name) for name in NOW}
    finally:
        gpu.close()


def add_percentiles(results: Iterable[dict[str, Any]], timings: Mapping[str, Any]) -> None:
    """p95 and p99 (linear interpolation) beside each result's median; `timings`: seconds of every round, by full name."""
    for result in results:
        p95, p99 = np.percentile(timings[result["fullname"]], [95, 99]).tolist()
        result["stats"] |= {"p95": p95, "p99": p99}
