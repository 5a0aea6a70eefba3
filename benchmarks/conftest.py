"""A timing means nothing without its machine: written into every result file."""

import importlib.metadata
import os
from typing import Any

import torch

from fastdistil.profiling.device import cpuinfo, parse_cpu_flags, parse_cpu_model, usable_cores

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    flags = parse_cpu_flags(cpuinfo())
    machine_info["fastdistil"] = {
        "processor": parse_cpu_model(cpuinfo()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        # What the C library was told about keeping freed memory: on a CPU it decides what eager code costs.
        "malloc": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
        "versions": {name: version(name) for name in ("fastdistil", "torch", "triton", "transformers", "numpy")},
        "gpus": [gpu(index) for index in range(torch.cuda.device_count())],
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def driver() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
