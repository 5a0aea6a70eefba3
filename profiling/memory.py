"""What a process and a device hold, read while it runs."""

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HostMemory:
    rss_bytes: int
    anonymous_bytes: int
    """Without file-backed pages: mapped files (libraries, weights) count in rss_bytes but can be dropped at any time."""
    peak_rss_bytes: int


@dataclass(frozen=True)
class DeviceMemory:
    allocated_bytes: int
    peak_allocated_bytes: int


def host_memory() -> HostMemory:
    """Read this process's memory now."""
    status = Path("/proc/self/status")
    fields: dict[str, int] = {}
    if status.exists():
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                fields[name] = int(value.split()[0]) * 1024
    peak = fields.get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    if "VmRSS" in fields and "RssAnon" in fields:
        return HostMemory(fields["VmRSS"], fields["RssAnon"], max(peak, fields["VmRSS"]))
    full = psutil.Process().memory_full_info()
    return HostMemory(full.rss, full.uss, max(peak, full.rss))


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Read torch's allocator on `device`, without waiting for it; None for the CPU, which has no such allocator."""
    if device.type != "cuda":
        return None
    return DeviceMemory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))


PARTS = ("student_weights", "teacher_weights", "gradients", "optimizer", "residuals", "activations_and_logits")


class MemoryMeter:
    """Memory of this process and of `device`, for a log line; nothing here waits for the device.

    On a GPU `phase` finds the peak of each part of an update. For that it resets torch's peak counters, so that whoever else
    reads them sees the peak of a phase; the meter keeps the whole run's, and does so only while `watching` (one update is
    enough). A processor's allocator has no such counters.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.watching = False
        self.phase_peaks: dict[str, int] = {}
        """Bytes allocated at the worst instant of each phase."""
        self.parts: dict[str, int | None] = {}
        """What `memory_parts` found last, for the text of an error."""
        self._peak_allocated = self._peak_reserved = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Surround a phase of an update. Phases do not nest."""
        if self.device.type != "cuda" or not self.watching:
            yield
            return
        self._keep_peaks()
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.phase_peaks[name] = max(self.phase_peaks.get(name, 0), peak)
            self._keep_peaks()

    def read(self, used_bytes: float | None = None) -> dict[str, Any]:
        """A log line's `memory`, in bytes: rss_bytes and peak_rss_bytes of the process; on a GPU allocated_bytes,
        reserved_bytes and their peaks since the start, fragmented_bytes (reserved beyond the most that was allocated), retries
        and ooms of the allocator (numbers), phase_peaks, used_bytes (of all processes, as given; None if not known) and
        outside_bytes (of it what this allocator has not reserved: contexts, communication buffers, other processes)."""
        host = host_memory()
        memory: dict[str, Any] = {"rss_bytes": host.rss_bytes, "peak_rss_bytes": host.peak_rss_bytes}
        if self.device.type != "cuda":
            return memory
        stats = torch.cuda.memory_stats(self.device)
        self._keep_peaks()
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return memory | {
            "allocated_bytes": allocated,
            "reserved_bytes": reserved,
            "peak_allocated_bytes": self._peak_allocated,
            "peak_reserved_bytes": self._peak_reserved,
            "fragmented_bytes": self._peak_reserved - self._peak_allocated,
            "used_bytes": used_bytes,
            "outside_bytes": None if used_bytes is None else max(0, used_bytes - reserved),
            "retries": int(stats.get("num_alloc_retries", 0)),
            "ooms": int(stats.get("num_ooms", 0)),
            "phase_peaks": dict(self.phase_peaks),
        }

    def outside_bytes(self) -> int | None:
        """Ask the driver what of a GPU is in use now and not reserved by this allocator; None: not known."""
        if self.device.type != "cuda":
            return None
        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError:  # an error before this one has made the device unusable
            return None
        return max(0, total - free - torch.cuda.memory_reserved(self.device))

    def peak_bytes(self) -> int:
        """The most that was allocated on a GPU, or resident of the process, so far."""
        if self.device.type != "cuda":
            return host_memory().peak_rss_bytes
        self._keep_peaks()
        return self._peak_allocated

    def _keep_peaks(self) -> None:
        self._peak_allocated = max(self._peak_allocated, torch.cuda.max_memory_allocated(self.device))
        self._peak_reserved = max(self._peak_reserved, torch.cuda.max_memory_reserved(self.device))


def memory_parts(
    *,
    students: Iterable[nn.Module],
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    residuals: Iterable[Tensor] = (),
    peak: int | None = None,
    kept: int | None = None,
) -> dict[str, int | None]:
    """Bytes that training holds, under the names PARTS: exact where tensors hold them, after an optimizer's step.

    students: student and projection; residuals: of the exchange. Activations and logits are what autograd `kept` of a
    micro-batch, where it was counted (Kept: fused losses hold logits of some rows, and only for a moment, so that these are not
    in it), else what is left of `peak` (an update's, on a GPU); None where neither is known, or where the parts are more than
    the peak, which was then reached without some of them.
    """
    modules = list(students)
    trained = [parameter for module in modules for parameter in module.parameters()]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    parts: dict[str, int | None] = {
        "student_weights": held_bytes(tensor for module in modules for tensor in _tensors(module)),
        "teacher_weights": held_bytes(_tensors(teacher)) if teacher is not None else 0,
        "gradients": held_bytes(parameter.grad for parameter in trained if parameter.grad is not None),
        "optimizer": held_bytes(state),
        "residuals": held_bytes(residuals),
    }
    if kept is None and peak is not None:
        remainder = peak - sum(size or 0 for size in parts.values())
        kept = remainder if remainder >= 0 else None
    return parts | {"activations_and_logits": kept}


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the storages behind tensors, each once: a view holds the whole."""
    storages = [tensor.untyped_storage() for tensor in tensors]  # all at once, so that no address is given out again
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class SavedTensorBytes:
    """Counter, while entered, of the `bytes` that autograd keeps for backward, without the tensors of `modules`.

    For around one forward; it costs a call for each tensor kept, and is for code that is not compiled."""

    def __init__(self, *modules: nn.Module | None) -> None:
        self.bytes = 0
        tensors = (tensor for module in modules if module is not None for tensor in _tensors(module))
        self._seen = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._held: list[torch.UntypedStorage] = []  # so that no address is given out again meanwhile

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self._held.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(storage)
            self.bytes += storage.nbytes()
        return tensor
