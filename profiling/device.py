"""What the devices of this machine are, as facts: processor, cores that may be used, memory, fast bf16.

Linux only: the kernel's own files are the source. What they do not say is answered with None or "no", never guessed.
torch is loaded only where a torch.device is asked about, so that a launcher may count cores without it.
"""

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

# Instructions that multiply bf16 matrices: tiles and dot products on x86, the bf16 extension of Arm.
BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The feature flags of the first processor in the text of /proc/cpuinfo (`flags` on x86, `Features` on Arm)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def parse_cpu_model(cpuinfo: str) -> str | None:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name" and value.strip():
            return value.strip()
    return None


@cache
def cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where the system has none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def has_fast_bf16(device: "torch.device") -> bool:
    """Whether bf16 matrix products run in hardware on `device`, rather than being emulated in fp32.

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
            return onednn and bool(BF16_FLAGS & parse_cpu_flags(cpuinfo()))
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
