"""One GPU as NVIDIA's management library (NVML) sees it, through nvidia-ml-py, whose module is named pynvml.

NVML numbers GPUs by their place on the bus and CUDA by CUDA_VISIBLE_DEVICES, so a GPU is found by its UUID. What a GPU, its
driver or a slice of it does not tell is None, never 0. A slice (MIG) has memory of its own; clocks, temperature and the
reasons for low clocks are of the board and hold for the slice too; utilisation, power, energy and traffic are not known of a
slice, and the board's would be its neighbours' as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

REASONS = {
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
"""Bits of nvml.h's nvmlClocksEventReason* (before: nvmlClocksThrottleReason*, with the same values). Idle, 0x1, is no reason
to be told of."""
_IDLE = 0x001

# Of nvml.h: totals over all links, in KiB since the driver was loaded.
_NVLINK_TX, _NVLINK_RX, _ALL_LINKS = 138, 139, 0xFFFFFFFF


class NvmlError(RuntimeError):
    """NVML cannot be asked about a GPU; the text says what to do."""


def library() -> Any:
    """The module pynvml of nvidia-ml-py. Raises NvmlError where it is missing, or hidden by a package of that name."""
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError(
            f"NVML is read through nvidia-ml-py, which cannot be imported ({error}); pip install nvidia-ml-py"
        ) from error
    # The packages pynvml (to version 11) and nvidia-ml-py3 install a module of the same name, with gaps and other types.
    if not all(hasattr(pynvml, name) for name in ("_nvmlGetFunctionPointer", "nvmlDeviceIsMigDeviceHandle")):
        raise NvmlError(
            f"the module pynvml ({getattr(pynvml, '__file__', None)}) is not nvidia-ml-py's: an old package hides it; "
            "pip uninstall -y pynvml nvidia-ml-py3 nvidia-ml-py && pip install nvidia-ml-py"
        )
    return pynvml


def reason_names(bits: int) -> list[str]:
    """Why clocks are lower than they could be, from NVML's bits, idleness left out."""
    names = [name for bit, name in REASONS.items() if bits & bit]
    unknown_bits = bits & ~sum(REASONS) & ~_IDLE
    return [*names, *([f"unknown_{unknown_bits:#x}"] if unknown_bits else [])]


class Gpu:
    """`uuid`: as torch has it, with or without "GPU-" or "MIG-". Raises NvmlError.

    `read(name)` asks for one of METRICS. A metric that fails once is None from then on; if it had worked before, `news` gets a
    line about it.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self._nvml = library() if nvml is None else nvml
        self.news: list[str] = []
        self._answered: set[str] = set()
        self._silent: set[str] = set()
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise NvmlError(
                f"NVML does not start ({error}), so that the GPU's clocks, power and utilisation are not known; in a container "
                "give it the driver's utility capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
            ) from error
        self._own = self._find(uuid)
        self.is_slice = bool(self._ask(lambda: _number(self._nvml.nvmlDeviceIsMigDeviceHandle(self._own))))
        self._board = self._own
        if self.is_slice:
            self._board = self._ask(lambda: self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._own))

    def close(self) -> None:
        self._ask(self._nvml.nvmlShutdown)

    def read(self, name: str) -> float | None:
        """A metric now, in the unit that METRICS says."""
        whose, ask = METRICS[name]
        handle = self._own if whose == "own" or not self.is_slice else self._board if whose == "board" else None
        if handle is None or name in self._silent:
            return None
        try:
            value = ask(self._nvml, handle)
        except (self._nvml.NVMLError, AttributeError) as error:
            self._silent.add(name)
            if name in self._answered:
                self.news.append(f"the GPU's {name} is not recorded from here on: NVML says {error}")
            return None
        self._answered.add(name)
        return value

    def facts(self) -> dict[str, Any]:
        """What does not change: driver, largest clocks (MHz), enforced power limit (W), the PCIe link now and at its best."""
        nvml, board = self._nvml, self._board
        milliwatts = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(board))
        return {
            "driver": self._ask(nvml.nvmlSystemGetDriverVersion),
            "slice": self.is_slice,
            "sm_clock_max_mhz": self._ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(board, nvml.NVML_CLOCK_SM)),
            "memory_clock_max_mhz": self._ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(board, nvml.NVML_CLOCK_MEM)),
            "power_limit_w": None if milliwatts is None else milliwatts / 1000,
            "pcie_generation": self._ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(board)),
            "pcie_generation_max": self._ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(board)),
            "pcie_width": self._ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(board)),
            "pcie_width_max": self._ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(board)),
        }

    def _find(self, uuid: str) -> Any:
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        for prefix in ("GPU-", "MIG-"):
            handle = self._ask(partial(self._nvml.nvmlDeviceGetHandleByUUID, prefix + bare))
            if handle is not None:
                return handle
        raise NvmlError(f"NVML knows no GPU {uuid}, which torch has; the driver and the container may be of different versions")

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):
            return None


def _number(value: Any) -> int:
    """Return an int, or the value of a ctypes integer."""
    return int(getattr(value, "value", value))


def _reasons(nvml: Any, handle: Any) -> float:
    """Ask by the new name, or the old one: a new binding may stand on an old driver, and the other way round."""
    new, old = (getattr(nvml, f"nvmlDeviceGetCurrentClocks{name}Reasons", None) for name in ("Event", "Throttle"))
    if new is not None:
        try:
            return _number(new(handle))
        except nvml.NVMLError:
            if old is None:
                raise
    if old is None:
        raise AttributeError("this nvidia-ml-py has no function for the reasons of low clocks")
    return _number(old(handle))


def _used_bytes(nvml: Any, handle: Any) -> float:
    """Leave the driver's own reserve out, where the second version of the call tells them apart."""
    version = getattr(nvml, "nvmlMemory_v2", None)
    if version is not None:
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(handle, version).used)
        except nvml.NVMLError:
            pass
    return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _nvlink_bytes(field: int) -> Callable[[Any, Any], float]:
    def ask(nvml: Any, handle: Any) -> float:
        (field_value,) = nvml.nvmlDeviceGetFieldValues(handle, [(field, _ALL_LINKS)])
        if field_value.nvmlReturn:
            raise nvml.NVMLError(field_value.nvmlReturn)
        return int(field_value.value.ullVal) * 1024

    return ask


def _pcie(counter: str) -> Callable[[Any, Any], float]:
    # Measured by the driver over 20 ms, for which the call blocks; in KiB.
    return lambda nvml, handle: int(nvml.nvmlDeviceGetPcieThroughput(handle, getattr(nvml, counter))) * 1024


METRICS: dict[str, tuple[str, Callable[[Any, Any], float]]] = {
    "utilisation": ("whole", lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
    "sm_clock_mhz": ("board", lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
    "memory_clock_mhz": ("board", lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
    "power_w": ("whole", lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    "temperature_c": ("board", lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
    "reasons": ("board", _reasons),
    "memory_used_bytes": ("own", _used_bytes),
    "energy_j": ("whole", lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000),
    "pcie_tx_bytes_per_s": ("whole", _pcie("NVML_PCIE_UTIL_TX_BYTES")),
    "pcie_rx_bytes_per_s": ("whole", _pcie("NVML_PCIE_UTIL_RX_BYTES")),
    "nvlink_tx_bytes": ("whole", _nvlink_bytes(_NVLINK_TX)),
    "nvlink_rx_bytes": ("whole", _nvlink_bytes(_NVLINK_RX)),
}
"""name -> (whose, how to ask). own: of the slice, or of the GPU where there is none; board: of the whole GPU, and true for a
slice of it too; whole: of a whole GPU only. energy_j and nvlink_* count since the driver was loaded."""
