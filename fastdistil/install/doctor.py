"""`fastdistil doctor`: what this machine has, what it lacks, and how to get it.

Each fact is a Finding. `absent` is something one can work without; `problem` is something fastdistil needs and that is
broken. transformers and triton are looked up, not imported, and horovod only in a child process: a broken one must not
take the doctor with it.
"""

import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdistil import __version__
from fastdistil.install.horovod_build import HOW_TO_BUILD
from fastdistil.install.horovod_installed import probe, state
from fastdistil.profiling import nvml
from fastdistil.profiling.device import installed_version

Status = Literal["ok", "absent", "problem"]

# Lowest and highest release (major, minor) that the tests run with. Below the first is a problem, above the last a note.
TESTED = {
    "torch": ((2, 11), (2, 13)),
    "triton": ((3, 6), (3, 7)),
    "transformers": ((5, 17), (5, 23)),
}
_PYTHON_TESTED = ((3, 11), (3, 13))
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    status: Status = "ok"
    advice: str = ""
    """What to do, or what it is good for; empty where nothing need be done."""


def examine(directory: Path = Path()) -> list[Finding]:
    """Look at the installation, the devices and `directory` (where runs would be written). Takes seconds: imports torch."""
    torch, _ = _load_torch()
    devices = [] if torch is None or _missing_parts() else [*processor(torch), *gpus(torch)]
    return [*versions(), *devices, *options(), *disk(directory)]


def exit_code(findings: Iterable[Finding]) -> int:
    return 2 if any(finding.status == "problem" for finding in findings) else 0


def render(findings: Iterable[Finding], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("status", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("value", overflow="fold")
    styles = {"ok": "green", "absent": "yellow", "problem": "bold red"}
    for finding in findings:
        text = Text(finding.value)
        if finding.advice:
            text.append(f"\n{finding.advice}", style="dim")
        table.add_row(Text(finding.status, style=styles[finding.status]), Text(finding.name), text)
    console.print(table)


def as_json(findings: Iterable[Finding]) -> str:
    entries = list(findings)
    return json.dumps({"exit_code": exit_code(entries), "findings": [asdict(finding) for finding in entries]}, indent=2)


def versions() -> list[Finding]:
    findings = [
        Finding("fastdistil", __version__),
        release("Python", platform.python_version(), _PYTHON_TESTED, "make an environment with a newer Python"),
        _torch_release(),
        *map(package, ("transformers", "tokenizers", "safetensors", "numpy")),
    ]
    if missing := _missing_parts():
        advice = "the links in fastdistil/ were not checked out as links: git config core.symlinks true, and check out again"
        findings.append(Finding("fastdistil's parts", f"{', '.join(missing)} not found", "problem", advice))
    return findings


def _missing_parts() -> list[str]:
    return [name for name in ("kernels", "profiling") if importlib.util.find_spec(f"fastdistil.{name}") is None]


def release(name: str, version: str, tested: tuple[tuple[int, int], tuple[int, int]], remedy: str) -> Finding:
    """Judge a version by the range that was tested, by its first two numbers."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    lowest, highest = (".".join(map(str, bound)) for bound in tested)
    if numbers is None:
        return Finding(name, version, "ok", f"cannot tell whether this lies between the tested {lowest} and {highest}")
    here = (int(numbers[1]), int(numbers[2]))
    if here < tested[0]:
        return Finding(name, version, "problem", f"wanted {lowest} or newer: {remedy}")
    if here > tested[1]:
        return Finding(name, version, "ok", f"newer than {highest}, the last one tested")
    return Finding(name, version)


def package(name: str, advice: str = "", absent: Status = "problem") -> Finding:
    """Look a Python package up by the metadata of its installation; `absent` is what its absence means."""
    version = installed_version(name)
    if version is None:
        return Finding(name, "not installed", absent, f"{advice}pip install {name}")
    if importlib.util.find_spec(name) is None:
        advice = f"pip install --force-reinstall {name}"
        return Finding(name, f"{version} is listed but its files are missing", "problem", advice)
    if name not in TESTED:
        return Finding(name, version)
    return release(name, version, TESTED[name], f"pip install --upgrade {name}")


def _load_torch() -> tuple[Any, str]:
    """Return torch, or None and why it does not load: the doctor must outlive a broken one."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return None, " ".join(str(error).split())
    return torch, ""


def _torch_release() -> Finding:
    torch, error = _load_torch()
    if torch is None:
        listed = package("torch")
        if listed.status == "problem":
            return listed
        return Finding("torch", f"{listed.value} does not load: {error}", "problem", "pip install --force-reinstall torch")
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    judged = release("torch", torch.__version__, TESTED["torch"], "pip install --upgrade torch")
    return replace(judged, value=f"{judged.value} ({kind} build)")


def processor(torch: Any) -> list[Finding]:
    from fastdistil.profiling.device import cpuinfo, has_fast_bf16, parse_cpu_model, usable_cores, usable_memory

    cores = f"{usable_cores():g} of {psutil.cpu_count()} cores usable, {torch.get_num_threads()} torch threads"
    model = parse_cpu_model(cpuinfo()) or platform.machine()
    available = psutil.virtual_memory().available
    findings = [
        Finding("processor", f"{model}, {cores}"),
        Finding("memory", f"{usable_memory() / GIB:.1f} GiB, {available / GIB:.1f} GiB available"),
    ]
    if has_fast_bf16(torch.device("cpu")):
        return [*findings, Finding("bf16 on the processor", "bf16 matrix products in hardware (AMX, AVX512-BF16 or Arm BF16)")]
    advice = "loop.precision: auto chooses fp32 here; bf16 would be slower"
    return [*findings, Finding("bf16 on the processor", "no bf16 matrix products in hardware", "absent", advice)]


def gpus(torch: Any) -> list[Finding]:
    clocks, names, driver = nvml_gpus()
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [gpu(torch, index, driver) for index in range(usable)] or [unused_gpus(torch, names, driver)]
    return [clocks, *devices, package("triton", "the GPU kernels need it: ", absent="problem" if usable else "absent")]


def gpu(torch: Any, index: int, driver: str | None) -> Finding:
    from fastdistil.profiling.device import has_fast_bf16

    facts = torch.cuda.get_device_properties(index)
    value = f"{facts.name}, {facts.total_memory / GIB:.1f} GiB, compute capability {facts.major}.{facts.minor}"
    value += f", driver {driver}" if driver else ""
    if has_fast_bf16(torch.device("cuda", index)):
        return Finding(f"GPU {index}", f"{value}, bf16 matrix products in hardware")
    return Finding(f"GPU {index}", value, "ok", "no bf16 matrix products in hardware: use loop.precision=fp16 or fp32")


def unused_gpus(torch: Any, names: list[str], driver: str | None) -> Finding:
    """Say why torch offers no GPU: there is none, or its build or the driver does not fit."""
    if not names:
        return Finding("GPU", "none found", "absent", "everything works on the processor; a GPU needs NVIDIA's driver")
    value = f"{', '.join(names)} (driver {driver}), but torch cannot use {'it' if len(names) == 1 else 'them'}"
    if torch.version.cuda is None:
        return Finding("GPU", value, "absent", "this torch is built without CUDA: install a CUDA build to use the GPU")
    advice = f"hidden by CUDA_VISIBLE_DEVICES, or the driver is too old for CUDA {torch.version.cuda}: update the driver"
    return Finding("GPU", value, "absent", advice)


def nvml_gpus() -> tuple[Finding, list[str], str | None]:
    """Return nvidia-ml-py, the names of the GPUs that the driver knows, and its version; no names where there is no driver."""
    try:
        pynvml = nvml.library()
    except nvml.NvmlError as error:
        status: Status = "absent" if isinstance(error.__cause__, ImportError) else "problem"
        return Finding("nvidia-ml-py", "no GPU clocks and power", status, str(error)), [], None
    package = Finding("nvidia-ml-py", installed_version("nvidia-ml-py") or "of an unknown version")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return package, [], None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return package, [pynvml.nvmlDeviceGetName(handle) for handle in handles], pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return package, [f"a GPU that the driver cannot read ({error})"], None
    finally:
        pynvml.nvmlShutdown()


def options() -> list[Finding]:
    return [
        horovod(),
        package("tensorboard", "logging.tensorboard needs it: ", absent="absent"),
        package("pyarrow", "preparing .parquet and .zst files needs it: ", absent="absent"),
        compiler(),
    ]


def horovod() -> Finding:
    """Which operations the installed Horovod was built with, as a child process that imports it says."""
    installed = state()
    if installed.status == "absent":
        advice = f"engine: horovod needs it, engine: torch and a single rank do not; {HOW_TO_BUILD}"
        return Finding("horovod", installed.text, "absent", advice)
    if installed.status == "problem":
        return Finding("horovod", installed.text, "problem", HOW_TO_BUILD)
    built = probe()
    if isinstance(built, str):
        return Finding("horovod", f"{installed.text} does not load: {built}", "problem", HOW_TO_BUILD)
    operations = [name for name, key in (("Gloo", "gloo"), ("MPI", "mpi")) if built[key]]
    if built["nccl"]:
        operations.append(f"NCCL {_nccl_release(built['nccl'])}")
    return Finding("horovod", f"{installed.text}: {', '.join(operations)}")


def _nccl_release(code: int) -> str:
    """22907 -> 2.29.7: how NCCL numbers its releases since 2.9."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def compiler() -> Finding:
    """Find what torch.compile on the processor (C++) and triton's launcher (C, Python's headers) are compiled with."""
    cc = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    cxx = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    parts = {"a C compiler": cc, "a C++ compiler": cxx, "Python's headers": headers}
    lacking = [name for name, present in parts.items() if not present]
    if lacking:
        advice = "loop.compile and the GPU kernels need it (Debian, Ubuntu: apt install g++ python3-dev)"
        return Finding("compiler", f"missing: {', '.join(lacking)}", "absent", advice)
    return Finding("compiler", f"{cc}, {cxx}")


def disk(directory: Path) -> list[Finding]:
    try:
        free = shutil.disk_usage(directory).free
        # Permission bits do not tell (root, read-only mounts, quotas): try it.
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(b"fastdistil")
            file.flush()
    except OSError as error:
        advice = "runs are written to the current directory: change to one you can write to, or set runs_dir"
        return [Finding("current directory", f"cannot be written: {error.strerror}", "problem", advice)]
    if free < 2 * GIB:
        return [Finding("disk", f"{free / GIB:.1f} GiB free here", "ok", "little: --dry-run says what a run needs")]
    return [Finding("disk", f"{free / GIB:.1f} GiB free here")]
