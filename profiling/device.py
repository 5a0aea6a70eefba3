"""What the devices of this machine are (processor, cores that may be used, memory, fast bf16), and what they do: a sampler.

Linux only: the kernel's own files are the source. What they do not say is answered with None or "no", never guessed.
torch is loaded only where a torch.device is asked about, so that a launcher may count cores without it.
"""

import importlib.metadata
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import psutil

from fastdistil.profiling.nvml import METRICS, Gpu, NvmlError, reason_names

if TYPE_CHECKING:
    import torch

# Instructions that multiply bf16 matrices: tiles and dot products on x86, the bf16 extension of Arm.
_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the feature flags of the first processor in the text of /proc/cpuinfo (`flags` on x86, `Features` on Arm)."""
    return frozenset((_cpu_field(cpuinfo, "flags", "features") or "").split())


def parse_cpu_model(cpuinfo: str) -> str | None:
    return _cpu_field(cpuinfo, "model name")


def _cpu_field(cpuinfo: str, *names: str) -> str | None:
    """Return the first value that is not empty under one of the names."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip().lower() in names and value.strip()), None)


@cache
def cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where the system has none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def installed_version(distribution: str) -> str | None:
    """Return a package's version by the metadata of its installation; None: there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_fast_bf16(device: "torch.device") -> bool:
    """Say whether bf16 matrix products run in hardware on `device`, rather than being emulated in fp32.

    A GPU needs compute capability 8.0 (Ampere); a processor AMX, AVX512-BF16 or Arm's BF16, and a torch built with oneDNN,
    whose kernels use them. Raises ValueError for other kinds of device.
    """
    import torch

    match device.type:
        case "cuda":
            capable = torch.cuda.get_device_capability(device) >= (8, 0)
            with torch.cuda.device(device):
                return capable and torch.cuda.is_bf16_supported(including_emulation=False)
        case "cpu":
            onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
            return onednn and bool(_BF16_FLAGS & parse_cpu_flags(cpuinfo()))
        case other:
            raise ValueError(f"wanted a cpu or cuda device, got {other!r}")


def control_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The directories of this process's cgroup (version 2) and its ancestors; a limit of any of them holds."""
    if not proc.is_file():
        return []
    for line in proc.read_text(encoding="utf-8").splitlines():
        if line.startswith("0::"):
            here = root / line.removeprefix("0::").strip().lstrip("/")
            return [group for group in (here, *here.parents) if group.is_relative_to(root) and group.is_dir()]
    return []


def usable_cores(groups: list[Path] | None = None) -> float:
    """Cores that this process may use: its affinity mask, or less where a cgroup's quota says so (then maybe a fraction)."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in control_groups() if groups is None else groups:
        limit = _words(group / "cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
        if len(limit) == 2 and limit[0] != "max":
            cores = min(cores, int(limit[0]) / int(limit[1]))
    return cores


def usable_memory(groups: list[Path] | None = None) -> int:
    """Bytes of memory that this process may use at most: the machine's, or less where a cgroup's limit says so."""
    memory = int(psutil.virtual_memory().total)
    for group in control_groups() if groups is None else groups:
        limit = _words(group / "memory.max")
        if limit and limit[0] != "max":
            memory = min(memory, int(limit[0]))
    return memory


def _words(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def gpu_of(device: "torch.device") -> Gpu:
    """NVML's view of a CUDA device. Raises NvmlError."""
    import torch

    if torch.version.hip is not None:
        raise NvmlError("NVML knows NVIDIA's GPUs only: clocks, power and utilisation of this one are not recorded")
    return Gpu(str(torch.cuda.get_device_properties(device).uuid))


def device_facts(device: "torch.device", tell: Callable[[str], None] = warnings.warn) -> dict[str, Any]:
    """What a device is, for the record. What is not known is None.

    GPU: name, uuid, memory_bytes, compute_capability, multiprocessors, driver, slice (a MIG slice), sm_clock_max_mhz,
    memory_clock_max_mhz, power_limit_w, pcie_generation, pcie_generation_max, pcie_width, pcie_width_max; where NVML cannot
    be asked, `tell` hears why and its part is left out. CPU: name, uuid (None), cores (that may be used), memory_bytes.
    """
    if device.type != "cuda":
        return {"name": parse_cpu_model(cpuinfo()), "uuid": None, "cores": usable_cores(), "memory_bytes": usable_memory()}
    import torch

    properties = torch.cuda.get_device_properties(device)
    facts = {
        "name": properties.name,
        "uuid": str(properties.uuid),
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }
    try:
        gpu = gpu_of(device)
    except NvmlError as error:
        tell(str(error))
        return facts
    try:
        return facts | gpu.facts()
    finally:
        gpu.close()


Sample = dict[str, float | None]
"""Of one instant: `at` (seconds of a steady clock) and the metrics."""


class _GpuSource:
    """`gpu`: None, because of `why`, where NVML cannot be asked."""

    def __init__(self, gpu: Gpu | None, why: str = "") -> None:
        self._gpu = gpu
        self.news = gpu.news if gpu is not None else [why]

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()

    def sample(self) -> Sample:
        gpu = self._gpu
        return {"at": time.perf_counter()} | {name: None if gpu is None else gpu.read(name) for name in METRICS}

    def summary(self, before: Sample | None, samples: list[Sample]) -> dict[str, Any]:
        window = _window(before, samples)
        reasons = _column(samples, "reasons")
        throttled = None
        if reasons is not None:
            counts = Counter(name for bits in reasons for name in reason_names(int(bits)))
            throttled = {name: count / len(samples) for name, count in counts.items()}
        energy, source = _growth(window, "energy_j"), "counter"
        if energy is None:
            energy, source = _integral(window, "power_w"), "power"
        moved = {way: _growth(window, f"nvlink_{way}_bytes") for way in ("tx", "rx")}
        return {
            **{name: _of(statistic, samples, name) for name, statistic in _STATISTICS.items()},
            "sm_clock_min_mhz": _of(min, samples, "sm_clock_mhz"),
            **{f"nvlink_{way}_bytes_per_s": size and size / _seconds(window) for way, size in moved.items()},
            "energy_j": energy,
            "energy_source": None if energy is None else source,
            "throttled": throttled,
        }


_STATISTICS: dict[str, Callable[[list[float]], float]] = {
    **dict.fromkeys(("utilisation", "power_w", "pcie_tx_bytes_per_s", "pcie_rx_bytes_per_s"), mean),
    **dict.fromkeys(("sm_clock_mhz", "memory_clock_mhz"), median),
    **dict.fromkeys(("temperature_c", "memory_used_bytes"), max),
}
"""How the samples of a GPU's metric become one number."""


class _CpuSource:
    def __init__(self) -> None:
        self.news: list[str] = []
        self._process = psutil.Process()

    def close(self) -> None:
        pass

    def sample(self) -> Sample:
        times = self._process.cpu_times()
        frequency: Any = psutil.cpu_freq()  # None, or 0 MHz, where the kernel does not say
        clock = (frequency.current or None) if frequency is not None else None
        return {"at": time.perf_counter(), "clock_mhz": clock, "busy_s": times.user + times.system}

    def summary(self, before: Sample | None, samples: list[Sample]) -> dict[str, Any]:
        window = _window(before, samples)
        busy_s = _growth(window, "busy_s")
        share = None if busy_s is None else busy_s / _seconds(window) / usable_cores()
        return {"utilisation": share, "clock_mhz": _of(median, samples, "clock_mhz")}


class Sampler:
    """Looks at a device `hz` times a second (at most 10) in a thread of its own, beside the training: a look takes up to tens
    of milliseconds, in which other threads run on.

    `tell` hears, in `read` and on its thread, of what could not be recorded: once for each. Raises ValueError for a rate out
    of bounds.
    """

    def __init__(
        self, device: "torch.device", *, hz: float = 2.0, tell: Callable[[str], None] = warnings.warn, gpu: Gpu | None = None
    ) -> None:
        if not 0 < hz <= 10:
            raise ValueError(f"a device is sampled up to 10 times a second, got {hz}; give a rate above 0 and up to 10")
        self._tell = tell
        self._source: _GpuSource | _CpuSource
        if device.type != "cuda":
            self._source = _CpuSource()
        else:
            try:
                self._source = _GpuSource(gpu if gpu is not None else gpu_of(device))
            except NvmlError as error:
                self._source = _GpuSource(None, str(error))
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._samples: list[Sample] = []
        self._before: Sample | None = None
        self._thread = threading.Thread(target=self._run, args=(1 / hz,), name="device-sampler", daemon=True)
        self._thread.start()

    def read(self) -> dict[str, Any]:
        """Sum up the time since the last read, to the last sample: the contents of a log line's `device`.

        samples (their number), seconds (from the last sample of the previous read, or the first one ever, to the last), and,
        None where not known: on a GPU utilisation (mean share of the time in which any kernel ran, 0..1: not efficiency),
        sm_clock_mhz (median), sm_clock_min_mhz, memory_clock_mhz (median), power_w (mean), temperature_c (highest),
        memory_used_bytes (highest, of all processes), pcie_tx_bytes_per_s, pcie_rx_bytes_per_s, nvlink_tx_bytes_per_s,
        nvlink_rx_bytes_per_s (means), energy_j (in these seconds), energy_source ("counter" of the driver, or "power"
        integrated over the samples), throttled {reason: share of the samples}; on a CPU utilisation (this process's share of
        the cores it may use) and clock_mhz (median).
        """
        with self._lock:
            samples, self._samples = self._samples, []
        while self._source.news:
            self._tell(self._source.news.pop(0))
        before = self._before
        if samples:
            self._before = samples[-1]
        seconds = _seconds(_window(before, samples)) if samples else 0.0
        return {"samples": len(samples), "seconds": seconds} | self._source.summary(before, samples)

    def latest(self, name: str) -> float | None:
        """A metric of the last look that `read` took in; None where not known."""
        return None if self._before is None else self._before.get(name)

    def close(self) -> None:
        """Stop the thread; waits for the look that is under way."""
        self._stop.set()
        self._thread.join()
        self._source.close()

    def _run(self, period_s: float) -> None:
        while True:
            sample = self._source.sample()
            with self._lock:
                self._samples.append(sample)
            if self._stop.wait(period_s):
                return


def _window(before: Sample | None, samples: list[Sample]) -> list[Sample]:
    return samples if before is None else [before, *samples]


def _column(samples: list[Sample], name: str) -> list[float] | None:
    """A metric of all samples; None if any lacks it: a mean over the others would be of another time."""
    values = [value for sample in samples if (value := sample[name]) is not None]
    return values if values and len(values) == len(samples) else None


def _of(statistic: Callable[[list[float]], float], samples: list[Sample], name: str) -> float | None:
    values = _column(samples, name)
    return None if values is None else statistic(values)


def _seconds(samples: list[Sample]) -> float:
    times = _column(samples, "at")
    return times[-1] - times[0] if times else 0.0


def _growth(samples: list[Sample], name: str) -> float | None:
    """Return how much a counter grew from the first sample to the last; None where it was started anew between."""
    values = _column(samples, name)
    if values is None or len(values) < 2 or values[-1] < values[0]:
        return None
    return values[-1] - values[0]


def _integral(samples: list[Sample], name: str) -> float | None:
    """Integrate over time, by trapezoids."""
    values, times = _column(samples, name), _column(samples, "at")
    if values is None or times is None or len(values) < 2:
        return None
    return sum((b + a) / 2 * (end - start) for (a, b), (start, end) in zip(pairwise(values), pairwise(times), strict=True))
