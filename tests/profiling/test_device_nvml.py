"""The sampler against an NVML that answers what cards have answered, fails where they fail, and counts what it is asked."""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from fastdistil.events import DeviceFacts, DeviceReading
from fastdistil.profiling import device as device_module
from fastdistil.profiling import nvml
from fastdistil.profiling.device import Sampler, _GpuSource, device_facts, usable_cores
from fastdistil.profiling.nvml import METRICS, Gpu, NvmlError, reason_names

UUID = "8c5e8a3e-1f2d-4c0a-9b7e-5a1d2f3c4b5a"
GPU = torch.device("cuda")


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    def __str__(self) -> str:
        return "Not Supported"


class GpuIsLost(NVMLError):
    def __str__(self) -> str:
        return "GPU is lost"


class FakeNvml:
    """As the module pynvml: functions by name, each a constant, or called with the arguments behind the handle.

    A name without an answer is "not supported"; None: this binding has no such function.
    """

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    nvmlMemory_v2 = 0x02000028

    def __init__(self, answers: dict[str, Any], handle: str = f"GPU-{UUID}") -> None:
        self.answers = answers
        self.handle = handle
        self.handles: set[tuple[str, str]] = set()
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.handle:
            raise NVMLError("Not Found")
        return uuid

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86.15"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvmlDevice") or self.answers.get(name, 0) is None:
            raise AttributeError(name)

        def function(handle: str, *arguments: Any) -> Any:
            self.handles.add((name, handle))
            if name not in self.answers:
                raise NotSupported
            answer = self.answers[name]
            return answer(*arguments) if callable(answer) else answer

        return function


def nvlink(tx_kib: int, rx_kib: int) -> Callable[..., Any]:
    def answer(fields: list[tuple[int, int]]) -> list[Any]:
        ((field, scope),) = fields
        assert scope == 0xFFFFFFFF  # all links together
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(ullVal={138: tx_kib, 139: rx_kib}[field]))]

    return answer


def hopper(**changed: Any) -> FakeNvml:
    """An H100 SXM at work, under its power cap."""
    answers = {
        "nvmlDeviceIsMigDeviceHandle": 0,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=61),
        "nvmlDeviceGetClockInfo": lambda kind: {1: 1755, 2: 2619}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda kind: {1: 1980, 2: 2619}[kind],
        "nvmlDeviceGetPowerUsage": 698_431,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetTemperature": lambda sensor: {0: 63}[sensor],
        "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
        "nvmlDeviceGetMemoryInfo": lambda version=None: SimpleNamespace(used=41 << 30 if version else 42 << 30),
        "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
        "nvmlDeviceGetPcieThroughput": lambda counter: {0: 2_000, 1: 30_000}[counter],
        "nvmlDeviceGetFieldValues": nvlink(1_000, 2_000),
        "nvmlDeviceGetCurrPcieLinkGeneration": 5,
        "nvmlDeviceGetMaxPcieLinkGeneration": 5,
        "nvmlDeviceGetCurrPcieLinkWidth": 8,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
    }
    return FakeNvml({**answers, **changed})


def mig() -> FakeNvml:
    """A slice: what the board is asked about is answered for the board, and of the slice only its memory is known."""
    fake = hopper(
        nvmlDeviceIsMigDeviceHandle=SimpleNamespace(value=1),  # a ctypes integer, as nvidia-ml-py has it
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle="board",
    )
    fake.handle = f"MIG-{UUID}"
    return fake


def pascal() -> FakeNvml:
    """A P100: no energy counter, no NVLink fields, the driver knows the old name of the reasons only."""
    fake = hopper(nvmlDeviceGetCurrentClocksThrottleReasons=0x1)
    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues", "nvmlDeviceGetCurrentClocksEventReasons"):
        del fake.answers[name]
    fake.answers["nvmlDeviceGetMemoryInfo"] = lambda version=None: _unversioned(version)
    return fake


def _unversioned(version: int | None) -> Any:
    if version is not None:
        raise NotSupported
    return SimpleNamespace(used=3 << 30)


class Looks:
    """The sampler's source without its thread, at times of our own."""

    def __init__(self, fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake, self.now = fake, 100.0
        self.gpu = Gpu(UUID, fake)
        self.source = _GpuSource(self.gpu)
        monkeypatch.setattr(device_module.time, "perf_counter", lambda: self.now)

    def look(self, after_s: float = 0.5, **changed: Any) -> dict[str, float | None]:
        self.now += after_s
        self.fake.answers.update(changed)
        return self.source.sample()


def test_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(hopper(), monkeypatch)
    before = looks.look()
    samples = [
        looks.look(
            1.5,
            nvmlDeviceGetTotalEnergyConsumption=5_349_000,
            nvmlDeviceGetClockInfo=lambda kind: {1: 1200, 2: 2619}[kind],
            nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=0),
        ),
        looks.look(
            nvmlDeviceGetTotalEnergyConsumption=5_698_000,
            nvmlDeviceGetClockInfo=lambda kind: {1: 1755, 2: 2619}[kind],
            nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=90),
            nvmlDeviceGetTemperature=lambda sensor: 71,
            nvmlDeviceGetCurrentClocksEventReasons=0x24,
            nvmlDeviceGetFieldValues=nvlink(1_000 + 512, 2_000 + 1024),
        ),
    ]
    summary = looks.source.summary(before, samples)
    assert summary == {
        "utilisation": pytest.approx(0.45),
        "sm_clock_mhz": 1477.5,
        "sm_clock_min_mhz": 1200,
        "memory_clock_mhz": 2619,
        "power_w": pytest.approx(698.431),
        "temperature_c": 71,
        "memory_used_bytes": 41 << 30,
        "pcie_tx_bytes_per_s": 2_000 * 1024,
        "pcie_rx_bytes_per_s": 30_000 * 1024,
        "nvlink_tx_bytes_per_s": pytest.approx(256 * 1024),  # in two seconds
        "nvlink_rx_bytes_per_s": pytest.approx(512 * 1024),
        "energy_j": pytest.approx(698.0),
        "energy_source": "counter",
        "throttled": {"sw_power_cap": 1.0, "sw_thermal_slowdown": 0.5},
    }
    assert looks.gpu.facts() == {
        "driver": "570.86.15", "slice": False, "sm_clock_max_mhz": 1980, "memory_clock_max_mhz": 2619, "power_limit_w": 700.0,
        "pcie_generation": 5, "pcie_generation_max": 5, "pcie_width": 8, "pcie_width_max": 16,
    }  # fmt: skip


def test_events_have_a_field_for_whatever_a_gpu_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log line or an environment with a name that its type lacks would end a run on a GPU, and on none that tests see."""
    looks = Looks(hopper(), monkeypatch)
    reading = DeviceReading(samples=1, seconds=2.0, **looks.source.summary(looks.look(), [looks.look()]))
    assert reading.temperature_c is not None and reading.throttled is not None
    properties = SimpleNamespace(name="A GPU", uuid=UUID, total_memory=1, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(device_module, "gpu_of", lambda _: looks.gpu)
    facts = DeviceFacts(rank=0, host="node-1", **device_facts(torch.device("cuda", 0)))
    assert (facts.compute_capability, facts.power_limit_w) == ("9.0", 700.0)


def test_a_slice_is_not_billed_for_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(mig(), monkeypatch)
    summary = looks.source.summary(looks.look(), [looks.look()])
    measured_names = {name for name, value in summary.items() if value is not None}
    assert measured_names == {
        "memory_used_bytes", "sm_clock_mhz", "sm_clock_min_mhz", "memory_clock_mhz", "temperature_c", "throttled",
    }  # fmt: skip
    assert ("nvmlDeviceGetMemoryInfo", f"MIG-{UUID}") in looks.fake.handles
    assert ("nvmlDeviceGetClockInfo", "board") in looks.fake.handles
    assert not {name for name, handle in looks.fake.handles if name == "nvmlDeviceGetUtilizationRates"}
    assert looks.gpu.news == []


def test_a_card_without_energy_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(pascal(), monkeypatch)
    before = looks.look(nvmlDeviceGetPowerUsage=100_000)
    samples = [looks.look(2.0, nvmlDeviceGetPowerUsage=200_000), looks.look(1.0, nvmlDeviceGetPowerUsage=300_000)]
    summary = looks.source.summary(before, samples)
    assert summary["energy_j"] == pytest.approx(2 * 150 + 1 * 250)
    assert summary["energy_source"] == "power"
    assert summary["power_w"] == pytest.approx(250)
    assert summary["throttled"] == {}, "idle is no reason"
    assert summary["memory_used_bytes"] == 3 << 30
    assert summary["nvlink_tx_bytes_per_s"] is None
    assert looks.gpu.news == [], "what a card never had is no news"
    looks.fake.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = None  # a binding without either name
    looks.fake.answers["nvmlDeviceGetCurrentClocksEventReasons"] = None
    assert Gpu(UUID, looks.fake).read("reasons") is None


def test_what_fails_on_the_way_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(hopper(), monkeypatch)
    first = looks.look()

    def lost(*_: Any) -> Any:
        raise GpuIsLost

    broken = looks.look(nvmlDeviceGetPowerUsage=lost)
    whole_again = looks.look(nvmlDeviceGetPowerUsage=300_000)
    summary = looks.source.summary(first, [broken, whole_again])
    assert summary["power_w"] is None
    assert looks.source.summary(None, [first, broken])["power_w"] is None, "no mean of a part"
    assert looks.source.summary(whole_again, [looks.look()])["power_w"] is None, "not taken up again"
    assert summary["sm_clock_mhz"] == 1755
    assert summary["energy_j"] == 0.0, "the counter goes on"
    assert len(looks.gpu.news) == 1
    assert "power_w" in looks.gpu.news[0]
    assert "GPU is lost" in looks.gpu.news[0]


def test_a_counter_that_starts_anew_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(hopper(nvmlDeviceGetPowerUsage=lambda: 1 / 0), monkeypatch)
    del looks.fake.answers["nvmlDeviceGetPowerUsage"]
    before = looks.look()
    summary = looks.source.summary(before, [looks.look(nvmlDeviceGetTotalEnergyConsumption=1)])
    assert summary["energy_j"] is None
    assert summary["energy_source"] is None


def test_one_look_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(hopper(), monkeypatch)
    summary = looks.source.summary(None, [looks.look()])
    assert summary["energy_j"] is None
    assert summary["nvlink_tx_bytes_per_s"] is None
    assert summary["power_w"] == pytest.approx(698.431)
    assert set(looks.source.summary(None, []).values()) == {None}


def test_reasons_by_name() -> None:
    assert reason_names(0x1) == []
    assert reason_names(0x1 | 0x8 | 0x40) == ["hw_slowdown", "hw_thermal_slowdown"]
    assert reason_names(0x80000 | 0x4) == ["sw_power_cap", "unknown_0x80000"]
    pynvml = pytest.importorskip("pynvml")
    values = {getattr(pynvml, name) for name in dir(pynvml) if name.startswith("nvmlClocksThrottleReason")}
    named = {value for value in values if value and value & (value - 1) == 0} - {pynvml.nvmlClocksThrottleReasonGpuIdle}
    assert set(nvml.REASONS) == named
    for bit, name in nvml.REASONS.items():
        theirs = "nvmlClocksThrottleReason" + name.replace("_", "")
        assert {bit} == {getattr(pynvml, constant) for constant in dir(pynvml) if constant.lower() == theirs.lower()}


def test_constants_and_functions_exist_in_nvidia_ml_py() -> None:
    """The fake would accept any name."""
    pynvml = nvml.library()
    fake = hopper()
    for name in [*fake.answers, *(attribute for attribute in vars(FakeNvml) if attribute.startswith(("NVML_", "nvml")))]:
        assert hasattr(pynvml, name), name
    for name in (
        "NVML_CLOCK_SM",
        "NVML_CLOCK_MEM",
        "NVML_TEMPERATURE_GPU",
        "NVML_PCIE_UTIL_TX_BYTES",
        "NVML_PCIE_UTIL_RX_BYTES",
    ):
        assert getattr(pynvml, name) == getattr(FakeNvml, name)
    assert pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX == 138
    assert pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX == 139


def test_the_package_pynvml_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("pynvml")
    old.nvmlInit = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", old)
    with pytest.raises(NvmlError, match="pip uninstall -y pynvml"):
        nvml.library()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlError, match="pip install nvidia-ml-py"):
        nvml.library()


def test_another_gpu_and_a_dead_driver_are_errors() -> None:
    with pytest.raises(NvmlError, match="knows no GPU"):
        Gpu("0" * 36, hopper())
    fake = hopper()

    def dead() -> None:
        raise NVMLError("Driver Not Loaded")

    fake.nvmlInit = dead  # type: ignore[method-assign]
    with pytest.raises(NvmlError, match="Driver Not Loaded"):
        Gpu(UUID, fake)


def wait_for(event: threading.Event) -> None:
    assert event.wait(60)


def test_the_thread_samples_and_stops() -> None:
    fake = hopper()
    third, counted = threading.Event(), itertools.count(1)

    def rates() -> Any:
        assert threading.current_thread() is not threading.main_thread()
        if next(counted) == 3:
            third.set()
        return SimpleNamespace(gpu=50)

    fake.answers["nvmlDeviceGetUtilizationRates"] = rates
    messages: list[str] = []
    sampler = Sampler(GPU, hz=10, tell=messages.append, gpu=Gpu(UUID, fake))
    wait_for(third)
    reading = sampler.read()
    assert reading["samples"] >= 2  # the third may not be noted down yet
    assert reading["utilisation"] == 0.5
    assert 0 < reading["seconds"] < 60
    sampler.close()
    assert fake.opened == 0
    look_count = next(counted)
    sampler.read()
    empty = sampler.read()
    assert empty["samples"] == 0
    assert empty["utilisation"] is None
    assert next(counted) == look_count + 1, "nobody asks any more"
    assert messages == []


def test_windows_join_without_gaps() -> None:
    """Energy of consecutive reads adds up to that of the whole time."""
    fake = hopper()
    total, looked = itertools.count(1_000_000, 100_000), threading.Semaphore(0)

    def energy() -> int:
        looked.release()
        return next(total)

    fake.answers["nvmlDeviceGetTotalEnergyConsumption"] = energy
    sampler = Sampler(GPU, hz=10, gpu=Gpu(UUID, fake))
    parts = []
    for _ in range(3):
        for _ in range(3):
            assert looked.acquire(timeout=60)
        parts.append(sampler.read())
    sampler.close()
    parts.append(sampler.read())
    samples = sum(part["samples"] for part in parts)
    assert sum(part["energy_j"] or 0 for part in parts) == pytest.approx((samples - 1) * 100.0)


def test_news_reach_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(device: torch.device) -> Gpu:
        raise NvmlError("no NVML here; install it")

    monkeypatch.setattr(device_module, "gpu_of", nobody)
    messages: list[str] = []
    sampler = Sampler(GPU, tell=messages.append)
    readings = [sampler.read(), sampler.read()]
    sampler.close()
    assert messages == ["no NVML here; install it"]
    assert all(value is None for one in readings for name, value in one.items() if name not in ("samples", "seconds"))


@pytest.fixture
def cpu_sampler() -> Iterator[Sampler]:
    sampler = Sampler(torch.device("cpu"), hz=10)
    yield sampler
    sampler.close()


def test_a_processor(cpu_sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cpu_sampler._source
    busy = itertools.count(10, 3)
    monkeypatch.setattr(source, "_process", SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=next(busy), system=1)))
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=2300.0))
    now = itertools.count(50, 2)
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(device_module, "usable_cores", lambda: 2.0)
    samples = [source.sample() for _ in range(3)]
    summary = source.summary(None, samples)
    assert summary == {"utilisation": pytest.approx(6 / 4 / 2), "clock_mhz": 2300.0}
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert source.summary(None, [source.sample(), source.sample()])["clock_mhz"] is None
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=0.0))
    assert source.summary(None, [source.sample(), source.sample()])["clock_mhz"] is None


def test_a_busy_processor_is_seen(cpu_sampler: Sampler) -> None:
    """Within the bounds of this process's own clocks, read just before and just after each sample."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")  # what /proc counts in: user and system time are each short of one at most
    clocks, samples = [], []
    for _ in range(2):
        clocks.append((time.process_time(), time.perf_counter()))
        samples.append(cpu_sampler._source.sample())
        clocks.append((time.process_time(), time.perf_counter()))
        while time.process_time() < clocks[0][0] + 0.6:
            sum(range(1000))
    (cpu_0, wall_0), (cpu_1, wall_1), (cpu_2, wall_2), (cpu_3, wall_3) = clocks
    utilisation = cpu_sampler._source.summary(None, samples)["utilisation"] * usable_cores()
    assert (cpu_2 - cpu_1 - 2 * tick_s) / (wall_3 - wall_0) <= utilisation <= (cpu_3 - cpu_0 + 2 * tick_s) / (wall_2 - wall_1)


def test_facts_of_a_processor() -> None:
    facts = device_facts(torch.device("cpu"))
    assert facts["cores"] == usable_cores() <= (os.cpu_count() or 1)
    assert 0 < facts["memory_bytes"] <= psutil.virtual_memory().total


def test_rates_out_of_bounds() -> None:
    for hz in (0, -1, 11):
        with pytest.raises(ValueError, match="up to 10"):
            Sampler(torch.device("cpu"), hz=hz)


def test_every_metric_is_asked() -> None:
    gpu = Gpu(UUID, hopper())
    assert None not in {gpu.read(name) for name in METRICS}
