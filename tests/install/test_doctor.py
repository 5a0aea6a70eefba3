"""`fastdistil doctor`: what it says of a healthy, a poor and a broken machine; and the device facts it rests on."""

import importlib.metadata
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastdistil import __version__
from fastdistil.install import doctor
from fastdistil.install.doctor import Finding
from fastdistil.install.horovod_build import HOW_TO_BUILD
from fastdistil.install.horovod_installed import HorovodState
from fastdistil.profiling import device

ROOT = Path(__file__).resolve().parents[2]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_this_machine_is_fit_for_work(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path)
    named = by_name(findings)
    assert doctor.exit_code(findings) == 0
    assert named["fastdistil"].value == __version__
    assert named["torch"].value.startswith(torch.__version__)
    for name in ("transformers", "tokenizers", "safetensors", "numpy"):
        assert named[name] == Finding(name, importlib.metadata.version(name))
    assert all(finding.advice for finding in findings if finding.status != "ok")


def test_output_on_a_narrow_terminal_and_as_json(tmp_path: Path) -> None:
    findings = [*doctor.disk(tmp_path), Finding("horovod", "not installed", "absent", "several ranks [need] it")]
    console = Console(width=40, record=True, file=(tmp_path / "screen").open("w"))
    doctor.render(findings, console)
    text = console.export_text()
    assert "absent" in text
    assert "[need]" in text, "advice is not markup"
    read = json.loads(doctor.as_json(findings))
    assert read["exit_code"] == 0
    assert [Finding(**finding) for finding in read["findings"]] == findings


@pytest.mark.parametrize(
    ("version", "status", "advice"),
    [
        ("5.16.9", "problem", "wanted 5.17 or newer"),
        ("5.9.0", "problem", "wanted 5.17 or newer"),
        ("4.99.0", "problem", "wanted 5.17 or newer"),
        ("5.17.0", "ok", ""),
        ("5.23.1+local", "ok", ""),
        ("5.24.0", "ok", "newer than 5.23"),
        ("6.0.0rc1", "ok", "newer than 5.23"),
        ("unknown", "ok", "cannot tell"),
    ],
)
def test_versions_are_judged_by_the_tested_range(version: str, status: str, advice: str) -> None:
    finding = doctor.release("transformers", version, ((5, 17), (5, 23)), "upgrade it")
    assert (finding.value, finding.status) == (version, status)
    assert finding.advice.startswith(advice)
    assert bool(finding.advice) == bool(advice)


def plant(folder: Path, name: str, version: str) -> None:
    """An installed distribution without files, as importlib.metadata sees it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_library_whose_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "fastdistil-absent-thing", "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.package("fastdistil-absent-thing").status == "problem"
    assert "files are missing" in doctor.package("fastdistil-absent-thing").value
    missing = doctor.package("fastdistil-other-thing")
    assert (missing.value, missing.status) == ("not installed", "problem")


def test_nvml_is_judged_as_its_readers_judge_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.nvml_gpus()[0] == Finding("nvidia-ml-py", importlib.metadata.version("nvidia-ml-py"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing, gpus, driver = doctor.nvml_gpus()
    assert (missing.status, gpus, driver) == ("absent", [], None)
    assert missing.advice.endswith("pip install nvidia-ml-py")
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=lambda: None))
    hidden = doctor.nvml_gpus()[0]
    assert hidden.status == "problem"
    assert "an old package hides it; pip uninstall -y pynvml" in hidden.advice


def test_broken_torch_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open\\nshared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    findings = doctor.examine(tmp_path)
    finding = by_name(findings)["torch"]
    assert finding.status == "problem"
    assert "cannot open shared object file" in finding.value
    assert doctor.exit_code(findings) == 2


def test_missing_links_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout without symbolic links holds small text files in their place."""
    import fastdistil

    for name in ("kernels", "profiling"):
        (tmp_path / name).write_text(f"../{name}")
    for name in [name for name in sys.modules if name.startswith(("fastdistil.kernels", "fastdistil.profiling"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fastdistil, "__path__", [str(tmp_path)])
    # An editable installation knows the folders without the links.
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()])
    findings = doctor.examine(tmp_path)
    assert by_name(findings)["fastdistil's parts"].value == "kernels, profiling not found"
    assert doctor.exit_code(findings) == 2


def test_directory_that_cannot_be_written() -> None:
    (finding,) = doctor.disk(Path("/proc"))  # not even root can make a file there
    assert finding.status == "problem"
    assert "runs_dir" in finding.advice


def test_nothing_optional_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "horovod", raising=False)
    named = by_name(doctor.options())
    for name in ("horovod", "tensorboard", "pyarrow", "compiler"):
        assert named[name].status == "absent"
        assert named[name].advice
    assert "a C compiler, a C++ compiler" in named["compiler"].value
    assert doctor.package("triton", absent="absent").status == "absent"
    assert doctor.exit_code(named.values()) == 0


BUILT = HorovodState("ok", "0.28.1 for torch 2.13.0")
WANTED = f"engine: horovod needs it, engine: torch and a single rank do not; {HOW_TO_BUILD}"


@pytest.mark.parametrize(
    ("state", "probe", "expected"),
    [
        (HorovodState("absent", "not installed"), None, ("not installed", "absent", WANTED)),
        (HorovodState("problem", "built for another"), None, ("built for another", "problem", HOW_TO_BUILD)),
        (
            BUILT,
            "ImportError: libmpi.so.40",
            (f"{BUILT.text} does not load: ImportError: libmpi.so.40", "problem", HOW_TO_BUILD),
        ),
        (BUILT, {"gloo": 1, "mpi": 0, "nccl": 0}, (f"{BUILT.text}: Gloo", "ok", "")),
        (BUILT, {"gloo": 1, "mpi": 1, "nccl": 22907}, (f"{BUILT.text}: Gloo, MPI, NCCL 2.29.7", "ok", "")),
    ],
)
def test_horovod_and_its_operations(
    state: HorovodState, probe: dict[str, int] | str | None, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "state", lambda: state)
    monkeypatch.setattr(doctor, "probe", lambda: probe)
    finding = doctor.horovod()
    assert (finding.value, finding.status, finding.advice) == expected


def test_gpus_that_torch_cannot_use() -> None:
    cpu_build = SimpleNamespace(version=SimpleNamespace(cuda=None))
    cuda_build = SimpleNamespace(version=SimpleNamespace(cuda="13.0"))
    assert doctor.unused_gpus(cpu_build, [], None).value == "none found"
    assert "without CUDA" in doctor.unused_gpus(cpu_build, ["NVIDIA H200"], "580.1").advice
    finding = doctor.unused_gpus(cuda_build, ["NVIDIA H200", "NVIDIA H200"], "470.1")
    assert finding.value == "NVIDIA H200, NVIDIA H200 (driver 470.1), but torch cannot use them"
    assert "CUDA 13.0" in finding.advice
    assert finding.status == "absent"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_is_described() -> None:
    named = by_name(doctor.gpus(torch))
    assert torch.cuda.get_device_name(0) in named["GPU 0"].value
    assert "driver" in named["GPU 0"].value


X86 = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx512f {}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        (X86.format("avx512_bf16"), True),
        (X86.format("amx_tile amx_bf16"), True),
        (X86.format("avx512_bf16x avx512_fp16"), False),
        (ARM.format("bf16"), True),
        (ARM.format("sve"), False),
        ("", False),
    ],
)
def test_bf16_by_the_processors_flags(cpuinfo: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpuinfo", lambda: cpuinfo)
    assert device.has_fast_bf16(torch.device("cpu")) is (fast and torch.backends.mkldnn.is_available())
    assert device.parse_cpu_model(cpuinfo) == ("Some Xeon" if "Xeon" in cpuinfo else None)


def test_bf16_on_this_processor_agrees_with_torchs_own_detection() -> None:
    """torch asks the processor itself (cpuid), this project asks the kernel."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("architecture") != "x86_64":
        pytest.skip("torch lists no x86 capabilities here")
    expected = capabilities["amx_bf16"] or capabilities["avx512_bf16"]
    assert device.has_fast_bf16(torch.device("cpu")) is (expected and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)])
def test_bf16_by_compute_capability(capability: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    assert device.has_fast_bf16(torch.device("cuda", 0)) is fast


def test_bf16_of_other_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted a cpu or cuda device, got 'meta'"):
        device.has_fast_bf16(torch.device("meta"))


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The tightest limit on the way to the root holds; `max` is none."""
    inner = tmp_path / "slice" / "job"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:cpu:/old\n0::/slice/job\n")
    groups = device.control_groups(tmp_path / "cgroup", tmp_path)
    assert groups == [inner, inner.parent, tmp_path]
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text("max\n")
    free = device.usable_cores(groups), device.usable_memory(groups)
    assert free == (device.usable_cores([]), device.usable_memory([]))
    (inner.parent / "cpu.max").write_text("50000 100000\n")
    (inner.parent / "memory.max").write_text("1048576\n")
    assert (device.usable_cores(groups), device.usable_memory(groups)) == (0.5, 2**20)
    assert device.control_groups(tmp_path / "none", tmp_path) == []
