"""Files of measurements that people pass about, checked: the profile.json of `fastdistil profile` and pytest-benchmark's JSON.

Only what a comparison reads is named; the rest may be anything.
"""

from typing import Annotated, Any

from pydantic import Field

from fastdistil.events import Fields, Recorded
from fastdistil.untrusted import Amount, Whole

Samples = list[Annotated[float, Field(strict=True, ge=-1e9, le=1e9)]]
"""Seconds; a difference of two readings may come out just below 0."""
Name = str | None
Count = Whole | None


class Statistics(Fields):
    samples: Samples = Field(default_factory=list)


class Loss(Fields):
    update: Whole
    total: Recorded = None
    soft: Recorded = None
    hard: Recorded = None
    cosine: Recorded = None
    mse: Recorded = None


class Peaks(Fields):
    peak_rss_bytes: Amount | None = None
    peak_allocated_bytes: Amount | None = None
    peak_reserved_bytes: Amount | None = None


class Readings(Fields):
    throttled: dict[str, Amount] | None = None


class Machine(Fields):
    devices: list[dict[str, Any]] | None = None


class Profile(Fields):
    """profile.json: a run's summary (summary.summarise)."""

    fastdistil: str
    name: Name = None
    device: Name = None
    dtype: Name = None
    engine: Name = None
    compression: Name = None
    sync: Name = None
    kernels: Name = None
    ranks: Count = None
    rings: Count = None
    threads: Count = None
    micro_batch_tokens: Count = None
    accumulation: Count = None
    student_parameters: Count = None
    teacher_parameters: Count = None
    updates: Count = None
    warmup: Count = None
    step_s: Statistics | None
    phases: dict[str, Statistics] | None = None
    tokens_per_s: Amount | None = None
    memory: Peaks | None = None
    readings: Readings | None = None
    losses: list[Loss] | None = None
    environment: Machine | None = None
    recipe: dict[str, Any] | None = None


class Timings(Fields):
    data: Samples = Field(default_factory=list)


class Benchmark(Fields):
    fullname: str
    stats: Timings


class Processor(Fields):
    brand_raw: Name = None
    count: Count = None


class Gpu(Fields):
    name: Name = None


class OurMachine(Fields):
    """What benchmarks/conftest.py adds to machine_info."""

    processor: Name = None
    usable_cores: Amount | None = None
    torch_threads: Count = None
    gpus: list[Gpu] = Field(default_factory=list)


class MachineInfo(Fields):
    cpu: Processor | None = None
    python_version: Name = None
    fastdistil: OurMachine | None = None


class Benchmarks(Fields):
    """What pytest --benchmark-json wrote."""

    machine_info: MachineInfo
    benchmarks: list[Benchmark]
    datetime: Name = None
