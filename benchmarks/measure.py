"""What the kernels' benchmarks share: the machine's ceilings, peak memory, timing on a GPU."""

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdistil.kernels.cpu import product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"


def median_s(call: Callable[[], Any], rounds: int = 5) -> float:
    call()
    times = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begun)
    return sorted(times)[rounds // 2]


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


@functools.cache
def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy too large for any cache."""
    source = torch.rand(2**30 if GPU else 2**27, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_s(lambda: target.copy_(source))


@functools.cache
def matrix_flops_per_s(dtype: torch.dtype) -> float:
    """Of the product that makes logits: [N, D] @ [D, V] at the size of a BERT head (GPU: a Llama one), the fastest way."""
    rows, width, columns = (8192, 4096, 16384) if GPU else (1024, 768, 30522)
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = torch.randn(columns, width, device=DEVICE).to(dtype)
    out = torch.empty(rows, columns, device=DEVICE, dtype=dtype)
    seconds = [median_s(lambda path=path: product(hidden, weight.t(), out, path=path)) for path in ("mm", "auto")]
    return 2 * rows * width * columns / min(seconds)


@contextmanager
def peak_bytes(facts: dict[str, Any]) -> Iterator[None]:
    """facts["peak_bytes"]: the most memory held inside, beyond what there was before; the allocator's on a GPU, else resident
    pages."""
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    else:
        _give_back_free_memory()  # what the allocator kept would hide this; and so sides start alike, whatever ran before
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = _status("VmRSS")
        yield
        facts["peak_bytes"] = _status("VmHWM") - before


def _give_back_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def flush() -> None:
    """Between rounds on a GPU: nothing of the inputs stays in its second-level cache."""
    if GPU:
        torch.empty(2**28, dtype=torch.uint8, device=DEVICE).zero_()


Mark = Any  # seconds, or an event on a GPU


def mark() -> Mark:
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def median_between_s(marks: list[tuple[Mark, Mark]]) -> float:
    wait()
    return statistics.median(begun.elapsed_time(ended) / 1000 if GPU else ended - begun for begun, ended in marks)


def measured(benchmark: Any, call: Callable[[], Any], rounds: int, **facts: Any) -> None:
    """Times the call, after another; on a GPU by device events, kept in extra_info."""
    facts["device"] = torch.cuda.get_device_name() if GPU else "cpu"
    call()
    if not GPU:
        with peak_bytes(facts):
            benchmark.pedantic(call, rounds=rounds)
        facts["median_s"] = benchmark.stats.stats.median
    else:
        with peak_bytes(facts):
            call()
        marks = []
        for _ in range(rounds * 5):
            flush()
            begun = mark()
            call()
            marks.append((begun, mark()))
            wait()
        facts["median_s"] = median_between_s(marks)
        benchmark.pedantic(call, rounds=1)
    if "bytes" in facts:
        facts["share_of_copy"] = facts["bytes"] / facts["median_s"] / copy_bytes_per_s()
    if "flops" in facts:
        facts["share_of_products"] = facts["flops"] / facts["median_s"] / matrix_flops_per_s(facts.pop("dtype_object"))
    facts.pop("dtype_object", None)
    benchmark.extra_info.update(facts)
