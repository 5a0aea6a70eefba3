"""A timing means nothing without its machine: written into every result file."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.profiling.device import cpuinfo, installed_version, parse_cpu_flags, parse_cpu_model, usable_cores

from .machine import add_percentiles, gpu, processor_clock
from .ranks import RANK_THREADS, make_demo_material

# What decides how fast something runs.
DISTRIBUTIONS = ("fastdistil", "torch", "triton", "transformers", "numpy", "tokenizers", "pyarrow", "horovod")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    flags = parse_cpu_flags(cpuinfo())
    machine_info["fastdistil"] = {
        "processor": parse_cpu_model(cpuinfo()),
        **processor_clock(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "threads_per_rank": RANK_THREADS,
        # What the C library was told about keeping freed memory: on a CPU it decides what eager code costs.
        "malloc": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
        "versions": {name: installed_version(name) for name in DISTRIBUTIONS},
        "gpus": [gpu(index) for index in range(torch.cuda.device_count())],
    }


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    add_percentiles(
        output_json["benchmarks"],
        {benchmark.fullname: benchmark.stats.data for benchmark in benchmarks if not benchmark.has_error},
    )


@pytest.fixture(scope="session")
def demo_material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_material(tmp_path_factory.mktemp("demo"))
