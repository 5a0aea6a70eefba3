"""Files of measurements that people pass about, checked: the profile.json of `fastdistil profile` and pytest-benchmark's JSON.

Only what a comparison reads is named; the rest may be anything.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fastdistil.untrusted import LARGEST, Amount, Fields, Whole

Samples = list[Annotated[float, Field(strict=True, ge=-1e9, le=1e9)]]
"""Seconds; a difference of two readings may come out just below 0."""


def _recorded(value: Any) -> Any:
    number = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= LARGEST
    if value is not None and not number and value not in ("nan", "inf", "-inf"):
        raise ValueError("wanted a number")
    return value


Recorded = Annotated[Any, AfterValidator(_recorded)]
"""A number, or null; "nan", "inf" and "-inf" where it is not finite."""
OptionalText = str | None
OptionalCount = Whole | None


class Statistics(Fields):
    samples: Samples = Field(default_factory=list)


class Loss(Fields):
    update: Whole
    total: Recorded = None
    soft: Recorded = None
    hard: Recorded = None
    cosine: Recorded = None
    mse: Recorded = None


class ProfilePeaks(Fields):
    peak_rss_bytes: Amount | None = None
    peak_allocated_bytes: Amount | None = None
    peak_reserved_bytes: Amount | None = None


class ProfileReadings(Fields):
    throttled: dict[str, Amount] | None = None


class Machine(Fields):
    devices: list[dict[str, Any]] | None = None


class Profile(Fields):
    """profile.json: a run's summary (summary.summarise)."""

    fastdistil: str
    name: OptionalText = None
    device: OptionalText = None
    dtype: OptionalText = None
    engine: OptionalText = None
    compression: OptionalText = None
    sync: OptionalText = None
    kernels: OptionalText = None
    ranks: OptionalCount = None
    rings: OptionalCount = None
    threads: OptionalCount = None
    micro_batch_tokens: OptionalCount = None
    accumulation: OptionalCount = None
    student_parameters: OptionalCount = None
    teacher_parameters: OptionalCount = None
    updates: OptionalCount = None
    warmup: OptionalCount = None
    step_s: Statistics | None
    phases: dict[str, Statistics] | None = None
    tokens_per_s: Amount | None = None
    memory: ProfilePeaks | None = None
    readings: ProfileReadings | None = None
    losses: list[Loss] | None = None
    environment: Machine | None = None
    recipe: dict[str, Any] | None = None


class Timings(Fields):
    data: Samples = Field(default_factory=list)


class Benchmark(Fields):
    fullname: str
    stats: Timings


class Processor(Fields):
    brand_raw: OptionalText = None
    count: OptionalCount = None


class Gpu(Fields):
    name: OptionalText = None


class OurMachine(Fields):
    """What benchmarks/conftest.py adds to machine_info."""

    processor: OptionalText = None
    usable_cores: Amount | None = None
    torch_threads: OptionalCount = None
    gpus: list[Gpu] = Field(default_factory=list)


class MachineInfo(Fields):
    cpu: Processor | None = None
    python_version: OptionalText = None
    fastdistil: OurMachine | None = None


class Benchmarks(Fields):
    """What pytest --benchmark-json wrote."""

    machine_info: MachineInfo
    benchmarks: list[Benchmark]
    datetime: OptionalText = None
