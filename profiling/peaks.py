"""What a device can do at most: dense rates of its datasheet, where its full name is in the table, and measured ones.

A share above 1 says that the peak is wrong, and is refused.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastdistil.profiling.flops import Work


@dataclass(frozen=True, kw_only=True)
class Datasheet:
    """One device as torch shows it: dense rates, in operations and bytes a second.

    `multiprocessors`: where set, a device of this name with another number is a part of the whole, and not this.
    """

    flops: dict[str, float]
    bytes: float
    source: str
    multiprocessors: int | None = None


def _nvidia(half: float, tf32: float | None, fp32: float, gigabytes: float, source: str) -> Datasheet:
    """Rates in TFLOP/s; no `tf32`: a device older than Ampere, which has no bf16 either."""
    rates = {"fp16": half, "fp32": fp32} | ({} if tf32 is None else {"bf16": half, "tf32": tf32})
    return Datasheet(flops={name: rate * 1e12 for name, rate in rates.items()}, bytes=gigabytes * 1e9, source=source)


_V100 = "NVIDIA V100 datasheet, 2020"
_A100 = "NVIDIA A100 datasheet, 2022"
_H100 = "NVIDIA H100 datasheet, 2024; half of its rates, which are with sparsity"
_H200 = "NVIDIA H200 datasheet, 2024; half of its rates, which are with sparsity"


# By the full name that the driver gives; a name that is not here (a slice, an engineering sample, another cooler) has no
# datasheet. A100 with 80 GB and H100 PCIe are other devices than those with 40 GB and SXM.
_V100_SXM2 = _nvidia(125, None, 15.7, 900, _V100)
_V100_PCIE = _nvidia(112, None, 14, 900, _V100)
_A100_40 = _nvidia(312, 156, 19.5, 1555, _A100)


DATASHEETS = {
    "Tesla V100-SXM2-16GB": _V100_SXM2,
    "Tesla V100-SXM2-32GB": _V100_SXM2,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": _nvidia(130, None, 16.4, 1134, _V100),
    "Tesla T4": _nvidia(65, None, 8.1, 320, "NVIDIA T4 product brief PB-09256, 2020"),
    "NVIDIA A10": _nvidia(125, 62.5, 31.2, 600, "NVIDIA A10 datasheet, 2021"),
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-PCIE-40GB": _A100_40,
    "A100-PCIE-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": _nvidia(312, 156, 19.5, 2039, _A100),
    "NVIDIA A100 80GB PCIe": _nvidia(312, 156, 19.5, 1935, _A100),
    "NVIDIA L4": _nvidia(121, 60, 30.3, 300, "NVIDIA L4 datasheet, 2023; half of its rates, which are with sparsity"),
    "NVIDIA L40S": _nvidia(362.05, 183, 91.6, 864, "NVIDIA L40S datasheet, 2023"),
    "NVIDIA GeForce RTX 4090": _nvidia(
        165.2, 82.6, 82.6, 1008, "NVIDIA Ada GPU architecture whitepaper 2.1, 2023; sums in fp32"
    ),
    "NVIDIA H100 80GB HBM3": _nvidia(989.4, 494.7, 66.9, 3350, _H100),
    "NVIDIA H100 PCIe": _nvidia(756.5, 378, 51.2, 2039, "NVIDIA H100 datasheet and architecture whitepaper, 2022"),
    "NVIDIA H100 NVL": _nvidia(835.5, 417.5, 60, 3900, _H100),
    "NVIDIA H200": _nvidia(989.4, 494.7, 66.9, 4800, _H200),
    "NVIDIA H200 NVL": _nvidia(835.5, 417.5, 60, 4800, _H200),
    "NVIDIA B200": _nvidia(2250, 1125, 75, 8000, "NVIDIA DGX B200 datasheet, 2024; an eighth, half of the rates with sparsity"),
    # One of a card's two dies is a device. Both names' rates are matrix rates; the vector rate of fp32 is half of it.
    "AMD Instinct MI250": Datasheet(
        flops={"fp16": 181.05e12, "bf16": 181.05e12, "fp32": 45.25e12}, bytes=1638.4e9, multiprocessors=104,
        source="AMD Instinct MI250 datasheet, 2022; half a card",
    ),
    "AMD Instinct MI250X": Datasheet(
        flops={"fp16": 191.5e12, "bf16": 191.5e12, "fp32": 47.85e12}, bytes=1638.4e9, multiprocessors=110,
        source="AMD Instinct MI250X datasheet, 2022; half a card",
    ),
    "AMD Instinct MI300X": Datasheet(
        flops={"fp16": 1307.4e12, "bf16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12}, bytes=5300e9, multiprocessors=304,
        source="AMD Instinct MI300X datasheet, 2023; not partitioned",
    ),
}  # fmt: skip


def datasheet(name: str, multiprocessors: int | None = None) -> Datasheet | None:
    """Return that of the device with exactly this name, and of nothing that resembles it; None: not known."""
    sheet = DATASHEETS.get(name)
    if sheet is None or sheet.multiprocessors not in (None, multiprocessors):
        return None
    return sheet


@dataclass(frozen=True, kw_only=True)
class MeasuredPeaks:
    """Medians, with the lowest and highest of the rounds. flops in operations, bytes in bytes (read and written) a second."""

    flops: float
    flops_range: tuple[float, float]
    bytes: float
    bytes_range: tuple[float, float]
    size: int
    """The product's matrices are [size, size]."""
    copied_bytes: int
    """Size of the buffer that was copied."""
    dtype: torch.dtype
    rounds: int
    copies: int


_ROUNDS, _FEWEST_ROUNDS = 5, 3
_ENOUGH_S = 0.1
"""A processor's rounds that took this long together, and are _FEWEST_ROUNDS at least, are enough."""
_COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}  # larger than a cache
_SIZES = (512, 1024, 2048, 4096, 8192)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> MeasuredPeaks:
    """A matrix product in `dtype` and a copy, timed here: under a second on an idle device, and 0.6 GiB of its memory at most.

    With as many threads, and in float32 with the precision (TF32 or not), as torch is set to. The device should have nothing
    else to do. A lower bound of what it can, not a limit. On a GPU it leaves nothing in torch's allocator, whose peaks begin
    anew.
    """
    measured = _measure_peaks(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return measured


def _measure_peaks(device: torch.device, dtype: torch.dtype) -> MeasuredPeaks:
    with torch.no_grad():
        size, times = _time_product(device, dtype)
        rates = sorted(2 * size**3 / seconds for seconds in times)
        source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        copy = torch.empty_like(source)
        speeds = sorted(2 * source.nbytes / seconds for seconds in _timed(lambda: copy.copy_(source), device, warmup=1))
    return MeasuredPeaks(
        flops=median(rates),
        flops_range=(rates[0], rates[-1]),
        bytes=median(speeds),
        bytes_range=(speeds[0], speeds[-1]),
        size=size,
        copied_bytes=source.nbytes,
        dtype=dtype,
        rounds=len(rates),
        copies=len(speeds),
    )


def _time_product(device: torch.device, dtype: torch.dtype) -> tuple[int, list[float]]:
    """The largest size whose rounds fit into 0.2 s, and their seconds by the faster of torch's libraries."""
    size, times = 0, [0.0]
    for size in _SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = min((_timed(product, device, warmup=2) for product in _products_of(a, b)), key=median)
        if 8 * median(times) * (_ROUNDS + 2) > 0.2:
            break
    return size, times


def _products_of(a: Tensor, b: Tensor) -> list[Callable[[], object]]:
    out = torch.empty_like(a)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # torch.mm is MKL's, which oneDNN beats on some processors; kernels.cpu.product takes the faster, too.
        weight = b.t().contiguous()
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], ""))
    return products


def _timed(work: Callable[[], object], device: torch.device, warmup: int) -> list[float]:
    """Seconds of each round; on a GPU by events on its stream."""
    for _ in range(warmup):
        work()
    if device.type == "cpu":
        seconds = []
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
            if len(seconds) >= _FEWEST_ROUNDS and sum(seconds) > _ENOUGH_S:
                break
        return seconds
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize(device)
        return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]


def arithmetic(precision: str, device: torch.device) -> str:
    """What a recipe's precision ("fp32", "bf16", "fp16") is multiplied in: "tf32" where torch is set to use it for fp32."""
    if precision == "fp32" and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return precision


_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peaks(device: torch.device, *precisions: str, measure: bool = True) -> dict[str, dict[str, float]]:
    """{"flops": {source: operations/s}, "bytes": {source: bytes/s}}: the datasheet's, where there is one, then one measured.

    precisions: the student's, and the teacher's; flops are of the faster, so that no product can be above its peak. Measuring
    takes under a second for each.
    """
    kinds = {arithmetic(precision, device) for precision in precisions}
    flops, moved = {}, {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        sheet = datasheet(properties.name, properties.multi_processor_count)
        if sheet is not None:
            moved[sheet.source] = sheet.bytes
            if kinds <= sheet.flops.keys():
                kind = max(kinds, key=sheet.flops.__getitem__)
                flops[f"{sheet.source}, dense {kind}"] = sheet.flops[kind]
    if not measure:
        return {"flops": flops, "bytes": moved}
    timed = {kind: measure_peaks(device, _DTYPES[kind]) for kind in sorted(kinds)}
    kind = max(timed, key=lambda candidate: timed[candidate].flops)
    measured = timed[kind]
    product = f"{kind} product of {measured.size} x {measured.size}, median of {measured.rounds}"
    flops[f"measured here, {product} ({_range(measured.flops_range, 1e12, 'TFLOP/s')})"] = measured.flops
    copy = f"copy of {measured.copied_bytes >> 20} MiB, median of {measured.copies}"
    moved[f"measured here, {copy} ({_range(measured.bytes_range, 1e9, 'GB/s')})"] = measured.bytes
    return {"flops": flops, "bytes": moved}


def _range(bounds: tuple[float, float], scale: float, unit: str) -> str:
    low, high = (f"{bound / scale:.4g}" for bound in bounds)
    return f"{low} to {high} {unit}"


def utilisation(work: Work, seconds: float, peak_flops: float, peak_source: str) -> dict[str, Any]:
    """A log line's `mfu`: student, with_teacher, hfu (shares of the peak, 0..1), peak_flops (operations/s), peak_source.

    If any is above 1 all three are None and `refused` says why: one of peak, time and count must be wrong, and so may be the
    others. Raises ValueError for a time or a peak that is none.
    """
    if not (seconds > 0 and peak_flops > 0 and math.isfinite(seconds) and math.isfinite(peak_flops)):
        raise ValueError(f"wanted seconds and a peak above 0, got {seconds} s and {peak_flops} operations/s")
    student = work.student + work.student_head
    done = {"student": student, "with_teacher": student + work.teacher + work.teacher_head, "hfu": work.executed}
    shares: dict[str, Any] = {name: count / seconds / peak_flops for name, count in done.items()}
    if (largest := max(shares.values())) > 1:
        shares = {**dict.fromkeys(shares), "refused": _too_fast(largest, peak_flops, peak_source)}
    return {**shares, "peak_flops": peak_flops, "peak_source": peak_source}


def _too_fast(share: float, peak_flops: float, peak_source: str) -> str:
    return (
        f"{share:.0%} of {peak_flops / 1e12:.4g} TFLOP/s ({peak_source}) is more than there is: the peak is not this device's, "
        "or it was measured while the device had other work; measure again on an idle device"
    )
