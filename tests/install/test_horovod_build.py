"""Building Horovod: the patch, what a wheel is kept under, the cache, the messages; and the installed one with two ranks.

The build itself takes minutes: `make test` runs it, before these tests.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import psutil
import pytest

from fastdistil.errors import UserError
from fastdistil.install import horovod_build, horovod_installed, horovod_tools
from fastdistil.install.horovod_build import (
    IDLE_CYCLES,
    PATCH,
    REQUIREMENTS,
    Build,
    BuildFailed,
    apply_patch,
    cached_wheel,
    locked,
    main,
    wanted_build,
)
from fastdistil.install.horovod_installed import STAMP, Torch, installed_torch, probe, two_ranks
from fastdistil.install.horovod_tools import Cuda, find_cuda, link_libraries

ROOT = Path(__file__).resolve().parents[2]
BUILD = Build(
    horovod="0.28.1",
    patch="a hash",
    torch="2.13.0+cpu",
    torch_revision="cf30153",
    python="cpython-311-x86_64-linux-gnu",
    libc="glibc 2.36",
    compiler="g++ 12.2.0",
    mpi="gcc -lmpi",
    cuda="13.0",
    nccl="2.29.7",
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The lines of Horovod 0.28.1 that the patch expects, apart from one another."""
    for part in PATCH.read_text().split("\ndiff ")[1:]:
        name, *lines = part.splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("@@"))
        kept = ["..." if line.startswith("@@") else line[1:] for line in lines[first:] if re.match("@@|[- ]", line)]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(kept) + "\n")
    return tmp_path


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_patch(sources: Path) -> None:
    before = {str(path.relative_to(sources)): path.read_text() for path in sources.rglob("*") if path.is_file()}
    apply_patch(sources, PATCH.read_text())
    after = {name: (sources / name).read_text() for name in before}
    assert len(before) == PATCH.read_text().count("\n+++ b/") == 10
    assert all(before[name] != after[name] for name in before)
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt", "horovod/common/ops/cuda/CMakeLists.txt"):
        assert re.findall(r"STANDARD (\d\d)\)", before[name]) != ["17"] == re.findall(r"STANDARD (\d\d)\)", after[name])
    top = after["CMakeLists.txt"]
    assert "if(DEFINED ENV{HOROVOD_GPU})\n    check_language(CUDA)\nendif()\n" in top
    opened = [len(re.findall(r"\bif\(", text)) - text.count("endif(") for text in (before["CMakeLists.txt"], top)]
    assert opened[0] == opened[1], "balanced"
    assert "cffi>=" not in after["setup.py"] and "require_list.append('setuptools')" in after["setup.py"]
    assert "iface = global_context.gloo_iface_;" in after["horovod/common/gloo/gloo_context.cc"]
    assert "} else if (fixed_values_.find(variable) ==" in after["horovod/common/parameter_manager.cc"]
    assert f'GetIntEnvOrDefault("{IDLE_CYCLES}", 1)' in after["horovod/common/operations.cc"]


@pytest.mark.parametrize(("text", "times"), [("a\nb\nd\n", 0), ("a\nb\nc\n" * 2, 2)])
def test_other_sources_are_refused(text: str, times: int, tmp_path: Path) -> None:
    patch = "Why.\n\n--- a/file\n+++ b/file\n@@ -9,3 +9,4 @@ where\n a\n-b\n+B\n+-\n c\n@@ -20 +21 @@\n-z\n+y\n\nThe next\n"
    (tmp_path / "file").write_text("first\na\nb\nc\nlast\nz\n")
    apply_patch(tmp_path, patch)
    assert (tmp_path / "file").read_text() == "first\na\nB\n-\nc\nlast\ny\n"
    (tmp_path / "file").write_text(text)
    with pytest.raises(BuildFailed, match=rf"wanted 'a.*c.*' once in Horovod's file, found it {times} times"):
        apply_patch(tmp_path, patch)


@pytest.mark.parametrize("name", [field.name for field in fields(Build)])
def test_wheels_are_kept_apart_by_everything_they_depend_on(name: str) -> None:
    other = replace(BUILD, **{name: "another"})
    assert replace(BUILD).key == BUILD.key
    assert other.key != BUILD.key
    assert not other.met_by(asdict(BUILD), gpu=True)


@pytest.mark.parametrize("loads", [True, False])
def test_tools_may_be_gone_while_the_wheel_loads(loads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_build, "probe", lambda: {"gloo": 1} if loads else "libmpi.so.40: cannot open")
    without_tools = replace(BUILD, compiler="", mpi="", cuda="", nccl="")
    assert without_tools.met_by(asdict(BUILD), gpu=True) is loads
    assert not without_tools.met_by(asdict(replace(BUILD, cuda="", nccl="")), gpu=True), "no GPU operations"
    assert without_tools.met_by(asdict(replace(BUILD, cuda="", nccl="")), gpu=False) is loads
    assert not replace(without_tools, torch="2.14.0").met_by(asdict(BUILD), gpu=True)
    assert not without_tools.met_by(None, gpu=False)
    assert not without_tools.met_by({"horovod": "0.28.1"}, gpu=False), "another fastdistil's stamp"


def test_what_this_machine_builds_follows_its_tools(tmp_path: Path) -> None:
    torch = Torch("2.13.0+cpu", "cf30153", None, None)
    bare = wanted_build(torch, None, {"PATH": str(tmp_path)})
    assert (bare.compiler, bare.mpi, bare.cuda) == ("", "", "")
    assert bare.title == "Horovod 0.28.1 for torch 2.13.0+cpu with Gloo"
    program(tmp_path / "g++", "echo g++ 12.2.0; echo Copyright")
    program(tmp_path / "mpicc", "echo gcc -lmpi")
    full = wanted_build(torch, None, {"PATH": str(tmp_path)})
    assert (full.compiler, full.mpi) == ("g++ 12.2.0", "gcc -lmpi")
    assert full.title == "Horovod 0.28.1 for torch 2.13.0+cpu with Gloo, MPI"
    program(tmp_path / "own", "echo own 1.0")
    assert wanted_build(torch, None, {"PATH": str(tmp_path), "CXX": "own"}).compiler == "own 1.0"


# The cache


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment whose torch has no Horovod and whose PATH and cache are empty; pip and the ranks are not started."""
    monkeypatch.setattr(horovod_build, "installed_build", lambda: None)
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: Torch("2.13.0+cpu", "cf30153", None, None))
    monkeypatch.setattr(horovod_build, "two_ranks", lambda _: "")
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip is asked to install."""
    requirements: list[str] = []
    monkeypatch.setattr(horovod_build, "installed_version", lambda _: "1.0")
    monkeypatch.setattr(horovod_build, "_pip", lambda _log, _environ, *arguments: requirements.append(arguments[-1]))
    return requirements


def fake_wheel(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("horovod/__init__.py", "# not the real one\n" * 100)
    return path


def test_cached_wheel_is_installed_without_building(elsewhere: dict[str, str], pip: list[str]) -> None:
    build = wanted_build(Torch("2.13.0+cpu", "cf30153", None, None), None, elsewhere)
    wheel = fake_wheel(horovod_build.cache_directory(elsewhere) / build.key / "horovod-0.28.1-cp311.whl")
    assert main([], elsewhere) == 0
    assert pip == [str(wheel)]
    assert main([], {**elsewhere, "XDG_CACHE_HOME": str(wheel.parents[3] / "other")}) == 2, "built: no compiler"


def test_wheel_that_does_not_work_is_not_installed(
    elsewhere: dict[str, str], pip: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = wanted_build(Torch("2.13.0+cpu", "cf30153", None, None), None, elsewhere)
    fake_wheel(horovod_build.cache_directory(elsewhere) / build.key / "horovod-0.28.1-cp311.whl")
    monkeypatch.setattr(horovod_build, "two_ranks", lambda _: "undefined symbol")
    assert main([], elsewhere) == 1
    assert pip == []
    assert "cannot add up a tensor: undefined symbol" in capsys.readouterr().err


def test_damaged_wheel_is_thrown_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = fake_wheel(tmp_path / "key" / "horovod.whl")
    assert cached_wheel(wheel.parent) == wheel
    content = bytearray(wheel.read_bytes())
    content[60] ^= 1  # in the only file's text
    wheel.write_bytes(content)
    assert cached_wheel(wheel.parent) is None
    assert "damaged" in capsys.readouterr().out
    assert not wheel.parent.exists()
    fake_wheel(wheel).write_bytes(b"cut off")
    assert cached_wheel(wheel.parent) is None
    assert cached_wheel(tmp_path / "none") is None


def test_one_build_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()
    monkeypatch.setattr(horovod_build, "say", lambda _: waits.set())
    order = []

    def second() -> None:
        with locked(tmp_path / "lock"):
            order.append("second")

    other = threading.Thread(target=second)
    with locked(tmp_path / "lock"):
        other.start()
        assert waits.wait(60)
        order.append("first")
    other.join(60)
    assert order == ["first", "second"]


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert horovod_build.cache_directory({"XDG_CACHE_HOME": "/big"}) == Path("/big/fastdistil/horovod")
    assert horovod_build.cache_directory({"XDG_CACHE_HOME": "here"}) == tmp_path / ".cache/fastdistil/horovod"
    assert horovod_build.cache_directory({}) == tmp_path / ".cache/fastdistil/horovod"


# Messages


@pytest.mark.parametrize("mistake", ["nothing there", "old cmake"])
def test_missing_tools_are_named_with_their_packages(
    mistake: str, elsewhere: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if mistake == "old cmake":
        program(tmp_path / "bin/g++", "echo g++ 12.2.0")
        program(tmp_path / "bin/cmake", "echo cmake version 3.9.1")
    assert main([], elsewhere) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("a C++ compiler" in said) == (mistake == "nothing there")
    packages = "g++ cmake make" if mistake == "nothing there" else "cmake make"
    assert f"(Debian, Ubuntu: apt install {packages})" in said


def test_unusable_torch_is_refused(
    elsewhere: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: None)
    assert main([], elsewhere) == 2
    assert "pip install torch" in capsys.readouterr().err
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: Torch("2.13.0+rocm7", "", None, "7.0"))
    assert main([], elsewhere) == 2
    assert "got 2.13.0+rocm7 for ROCm: use world.engine=torch" in capsys.readouterr().err


def test_failing_command_shows_what_went_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "print('error: no member named x', flush=True); import subprocess; subprocess.run(['false'], check=True)"
    log = tmp_path / "log"
    with pytest.raises(BuildFailed, match=rf"building failed \(exit 1\); above the end of its log, {log}"):
        horovod_build.run_logged([sys.executable, "-c", script], log, os.environ, "building", tmp_path)
    assert capsys.readouterr().err == "error: no member named x\n"
    assert "CalledProcessError" in log.read_text()


# CUDA's compiler and NCCL


@pytest.fixture
def cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit 13.0, with NCCL."""
    monkeypatch.setattr(horovod_tools, "package_directory", lambda _: None)
    home = tmp_path / "cuda"
    program(home / "bin/nvcc", "echo Cuda compilation tools, release 13.0, V13.0.88")
    (home / "include").mkdir()
    (home / "include/nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 29\n#define NCCL_PATCH 7\n")
    return home


def test_toolkit_of_torchs_cuda(cuda_home: Path, tmp_path: Path) -> None:
    torch = Torch("2.13.0+cu130", "", "13.0", None)
    named = find_cuda(torch, {"CUDA_HOME": str(cuda_home), "PATH": str(tmp_path)})
    assert named == Cuda(cuda_home, "13.0", cuda_home)
    assert isinstance(named, Cuda) and named.nccl_version == "2.29.7"
    assert wanted_build(torch, named, {"PATH": ""}).title.endswith("Gloo, NCCL")
    # A wrapper script on PATH names the toolkit.
    program(tmp_path / "bin/nvcc", f"echo '#$ TOP={cuda_home}/bin/..'")
    assert find_cuda(torch, {"PATH": str(tmp_path / "bin")}) == named


def test_other_cuda_is_refused(cuda_home: Path, tmp_path: Path) -> None:
    refused = find_cuda(Torch("2.11.0+cu999", "", "99.1", None), {"CUDA_HOME": str(cuda_home), "PATH": str(tmp_path)})
    assert isinstance(refused, UserError)
    assert f"CUDA 99's compiler (nvcc), found: 13.0 in {cuda_home}" in str(refused)
    assert "install the CUDA toolkit 99.1 and set CUDA_HOME" in str(refused)
    assert "--cpu builds" in str(refused)


def test_installed_one_needs_no_cuda_compiler(
    elsewhere: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that only runs: its torch is a CUDA build, its Horovod was built where nvcc is."""
    torch = Torch("2.13.0+cu999", "", "99.1", None)
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: torch)
    assert main([], elsewhere) == 2
    assert "pip install 'nvidia-cuda-nvcc==99.1.*'" in capsys.readouterr().err
    built = {**asdict(wanted_build(torch, None, elsewhere)), "cuda": "99.1", "nccl": "2.99.0", "compiler": "g++"}
    monkeypatch.setattr(horovod_build, "installed_build", lambda: built)
    monkeypatch.setattr(horovod_build, "installed_version", lambda _: "1.0")
    monkeypatch.setattr(horovod_build, "probe", dict)
    assert main([], elsewhere) == 0
    assert "Horovod 0.28.1 for torch 2.13.0+cu999 with Gloo, NCCL is installed" in capsys.readouterr().out


def test_libraries_get_the_names_that_linkers_look_for(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    for name in ("libcudart.so.13", "libcudart_static.a", "libnvperf_host.so"):
        (tmp_path / "lib" / name).write_text(name)
    link_libraries(tmp_path / "lib", tmp_path / "lib64")
    content_of = {path.name: path.read_text() for path in (tmp_path / "lib64").iterdir()}
    assert content_of == {
        "libcudart.so.13": "libcudart.so.13",
        "libcudart.so": "libcudart.so.13",
        "libcudart_static.a": "libcudart_static.a",
        "libnvperf_host.so": "libnvperf_host.so",
    }


# What is installed


def plant(folder: Path, torch: str, metadata: str | None) -> None:
    """A torch and a Horovod by their files."""
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{torch}'\ngit_version = 'cf30153'\ncuda = None\nhip = None\n")
    (folder / "horovod").mkdir(exist_ok=True)
    (folder / "horovod-0.28.1.dist-info").mkdir(exist_ok=True)
    (folder / "horovod-0.28.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n")
    if metadata is not None:
        (folder / "horovod/metadata.json").write_text(metadata)


def ask(folder: Path, expression: str) -> str:
    """Of a Python that has only `folder` and the standard library."""
    script = f"from fastdistil.install.horovod_installed import *; print({expression})"
    environ = {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, "-S", "-P", "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


METADATA = '{\n"pytorch": "2.13.0+cpu",\n"dummy": "none"\n}'


@pytest.mark.parametrize(
    ("torch", "metadata", "state"),
    [
        ("2.13.0+cpu", METADATA, "ok: 0.28.1 for torch 2.13.0+cpu"),
        ("2.12.1", METADATA, "problem: 0.28.1 was built for torch 2.13.0+cpu, and torch here is 2.12.1"),
        ("2.13.0+cpu", '{"dummy": "none"}', "problem: 0.28.1 was built for torch none, and torch here is 2.13.0+cpu"),
        ("2.13.0+cpu", None, "problem: its files are incomplete"),
        ("2.13.0+cpu", "{", "problem: its files are incomplete"),
    ],
)
def test_state_by_files(torch: str, metadata: str | None, state: str, tmp_path: Path) -> None:
    plant(tmp_path, torch, metadata)
    assert ask(tmp_path, "f'{state().status}: {state().text}'") == state


def test_state_without_anything(tmp_path: Path) -> None:
    assert ask(tmp_path, "state().status, installed_torch(), installed_build()") == "absent None None"


def test_stamp_is_read_back(tmp_path: Path) -> None:
    plant(tmp_path, "2.13.0+cpu", METADATA)
    assert ask(tmp_path, "installed_build()") == "None"
    (tmp_path / "horovod" / STAMP).write_text(f"BUILD = {json.dumps(asdict(BUILD), indent=4)}\n")
    assert ask(tmp_path, "installed_build()") == str(asdict(BUILD))
    assert ask(tmp_path, "installed_torch()") == "Torch(version='2.13.0+cpu', revision='cf30153', cuda=None, hip=None)"
    (tmp_path / "horovod" / STAMP).write_text('BUILD = {"horovod": "0.2')
    assert ask(tmp_path, "installed_build()") == "None"


def test_installed_torch_is_the_one_that_is_imported() -> None:
    import torch

    assert installed_torch() == Torch(torch.__version__, torch.version.git_version, torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gloo_built = mpi_built = lambda: True\nnccl_built = lambda: 22907", {"gloo": 1, "mpi": 1, "nccl": 22907}),
        ("gloo_built = lambda: True\nmpi_built = lambda: False\nnccl_built = lambda: 0", {"gloo": 1, "mpi": 0, "nccl": 0}),
        ("raise ImportError('libmpi.so.40: cannot open')", "ImportError: libmpi.so.40: cannot open"),
        ("import os; os._exit(3)", "importing it ends the process with 3"),
    ],
)
def test_probe_survives_what_it_finds(
    source: str, expected: Mapping[str, int] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod/__init__.py").touch()
    (tmp_path / "horovod/torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe() == expected


def ends(pid: int, within_s: float = 60) -> bool:
    """A killed process takes a moment to go; where nobody reaps orphans it stays as a zombie."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_two_ranks_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that hangs ends in time, and its processes with it; one that fails says so."""
    for name in ("horovod", "horovod/runner", "horovod/runner/http"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    server = tmp_path / "horovod/runner/http/http_server.py"
    server.write_text(
        "import subprocess, pathlib\n"
        "RendezvousHandler = None\n"
        "def RendezvousHTTPServer(*arguments):\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        "    written = pathlib.Path(__file__).with_name('writing')\n"
        "    written.write_text(str(child.pid))\n"
        "    written.rename(written.with_name('pid'))\n"
        "    child.wait()\n"
    )

    class Impatient(subprocess.Popen[str]):
        """Its time is over as soon as the child is there."""

        def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # noqa: A002
            assert timeout == horovod_installed.CHECK_S
            while not server.with_name("pid").exists():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Impatient)
        assert two_ranks({**os.environ, "PYTHONPATH": str(tmp_path)}) == "not done within 300 s"
    pid = int(server.with_name("pid").read_text())
    assert ends(pid)
    server.write_text("raise ImportError('no server')\n")
    assert two_ranks({**os.environ, "PYTHONPATH": str(tmp_path)}).endswith("ImportError: no server")


def test_two_ranks_of_the_installed_one_add_up(need: Callable[[str, str], None]) -> None:
    state = horovod_installed.state()
    if state.status != "ok":
        need("horovod", f"Horovod: {state.text}; {horovod_build.HOW_TO_BUILD}")
    assert two_ranks(os.environ) == ""
    built = probe()
    assert isinstance(built, dict)
    assert built["gloo"]


def test_requirements_are_declared_and_pinned() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]["horovod"]
    assert [re.split("[<>=~]", requirement)[0] for requirement in declared] == list(REQUIREMENTS)
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(REQUIREMENTS) <= pinned


def test_missing_requirements_are_installed_with_their_constraints(
    elsewhere: dict[str, str], pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = Torch("2.13.0+cpu", "cf30153", None, None)
    built = asdict(wanted_build(torch, None, elsewhere))
    monkeypatch.setattr(horovod_build, "installed_build", lambda: built)
    assert main([], elsewhere) == 0 and pip == []
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(horovod_build, "installed_version", lambda name: None if name == "psutil" else "1.0")
    monkeypatch.setattr(horovod_build, "_pip", lambda _log, _environ, *arguments: commands.append(arguments))
    assert main(["--constraint", "pins.txt"], elsewhere) == 0
    assert commands == [("install", "-c", "pins.txt", "psutil")]
