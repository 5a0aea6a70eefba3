"""Building Horovod: the patch, what a wheel is kept under, the cache, the messages, CUDA's compiler and NCCL.

The build itself takes minutes: `make test` runs it, before these tests.
"""

import re
import threading
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fastdistil.errors import FastdistilError, UserError
from fastdistil.install import horovod_build
from fastdistil.install.horovod_build import (
    IDLE_CYCLES,
    PATCH,
    REQUIREMENTS,
    STAMP,
    apply_patch,
    find_cuda,
    installed_operations,
    locked,
    main,
    stamp,
    wheel_key,
)
from fastdistil.install.horovod_installed import Torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Torch("2.13.0+cpu", None, None)
CUDA_TORCH = Torch("2.13.0+cu130", "13.0", None)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The lines of Horovod 0.28.1 that the patch expects, apart from one another."""
    for part in PATCH.read_text().split("\ndiff ")[1:]:
        name, *lines = part.splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("@@"))
        context = ["..." if line.startswith("@@") else line[1:] for line in lines[first:] if re.match("@@|[- ]", line)]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(context) + "\n")
    return tmp_path


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_requirements_are_declared_and_pinned() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]["horovod"]
    assert declared == list(REQUIREMENTS)
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split("[<>=~]", requirement)[0] for requirement in REQUIREMENTS} <= pinned


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
    with pytest.raises(
        FastdistilError,
        match=rf"wanted 'a.*c.*' once in Horovod's file, found it {times} times",
    ):
        apply_patch(tmp_path, patch)


@pytest.mark.parametrize(
    "other",
    [replace(TORCH, version="2.14.0+cpu"), replace(TORCH, cuda="13.0")],
    ids=["version", "cuda"],
)
def test_another_torch_has_another_stamp_and_wheel(other: Torch) -> None:
    assert stamp(replace(TORCH)) == stamp(TORCH) != stamp(other)
    assert wheel_key(TORCH, None) != wheel_key(other, None)


def test_another_patch_has_another_stamp_and_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stamp(TORCH), wheel_key(TORCH, None)
    monkeypatch.setattr(horovod_build, "PATCH", tmp_path / "other.patch")
    (tmp_path / "other.patch").write_text("nothing")
    assert stamp(TORCH) != before[0] and wheel_key(TORCH, None) != before[1]


@pytest.mark.usefixtures("elsewhere")
def test_wheels_are_kept_apart_by_the_tools_that_build_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [wheel_key(TORCH, None)]
    program(tmp_path / "bin/mpicc", "echo gcc -lmpi")
    keys.append(wheel_key(TORCH, None))
    program(tmp_path / "cuda/bin/nvcc", "echo release 13.0")
    keys.append(wheel_key(TORCH, tmp_path / "cuda"))
    for minor in (29, 30):
        (tmp_path / "nccl.h").write_text(f"#define NCCL_MAJOR 2\n#define NCCL_MINOR {minor}\n")
        keys.append(wheel_key(TORCH, tmp_path / "cuda", tmp_path))
    for name in ("HOROVOD_NCCL_INCLUDE", "HOROVOD_NCCL_LIB"):
        monkeypatch.setenv(name, "/opt/nccl")
        keys.append(wheel_key(TORCH, tmp_path / "cuda", tmp_path))
    keys.append(wheel_key(TORCH, None))
    assert keys.pop() == keys[1], "without CUDA, NCCL does not matter"
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    keys.append(wheel_key(TORCH, None))
    program(tmp_path / "bin/g++", "echo g++ 12.2.0; echo Copyright")
    keys.append(wheel_key(TORCH, None))
    monkeypatch.setenv("CXX", str(program(tmp_path / "clang++", "echo clang 19")))
    keys.append(wheel_key(TORCH, None))
    assert len(set(keys)) == 10


@pytest.mark.usefixtures("elsewhere")
def test_installed_one_counts_if_it_loads_with_what_is_wanted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the tools that built it are gone."""
    monkeypatch.setattr(horovod_build, "package_directory", lambda _: tmp_path)
    monkeypatch.setattr(horovod_build, "probe", lambda: {"gloo": 1, "mpi": 1, "nccl": 0})
    assert installed_operations(TORCH, ["gloo"]) == [], "built by somebody else"
    (tmp_path / STAMP).write_text(stamp(TORCH))
    assert installed_operations(TORCH, ["gloo"]) == ["gloo", "mpi"]
    assert installed_operations(TORCH, ["gloo", "nccl"]) == []
    assert installed_operations(replace(TORCH, version="2.14.0"), ["gloo"]) == []
    monkeypatch.setattr(horovod_build, "probe", lambda: "libmpi.so.40: cannot open")
    assert installed_operations(TORCH, ["gloo"]) == []


# The cache


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead to a torch without Horovod, to a PATH and a cache that are empty, and to ranks that are not started."""
    monkeypatch.setattr(horovod_build, "package_directory", lambda _: None)
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: TORCH)
    monkeypatch.setattr(horovod_build, "two_ranks", lambda _: "")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CUDA_HOME", "CXX", *horovod_build._NCCL_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pip(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Return what pip is asked for; nothing of it is done."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        horovod_build,
        "_pip",
        lambda *arguments, **_: commands.append(tuple(map(str, arguments))),
    )
    return commands


@pytest.fixture
def wheel(elsewhere: None) -> Path:
    """Return a wheel in the cache."""
    path = horovod_build.cache_directory() / wheel_key(TORCH, None) / "horovod-0.28.1-cp311.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("horovod/__init__.py", "# not the real one\n" * 100)
    return path


def test_cached_wheel_is_installed_without_building(
    wheel: Path, pip: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--constraint", "pins.txt"]) == 0
    assert pip == [
        ("install", "-c", "pins.txt", *REQUIREMENTS),
        ("install", "--force-reinstall", "--no-deps", "--no-index", str(wheel)),
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert main([]) == 2, "built: no compiler"


@pytest.mark.parametrize("problem", ["undefined symbol", "a bit", "cut off"])
def test_cached_wheel_that_does_not_work_is_built_anew(
    problem: str,
    wheel: Path,
    pip: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = bytearray(wheel.read_bytes())
    content[60] ^= problem == "a bit"  # in the only file's text
    wheel.write_bytes(b"cut off" if problem == "cut off" else content)
    monkeypatch.setattr(horovod_build, "two_ranks", lambda _: problem)
    monkeypatch.setattr(horovod_build, "_build_wheel", lambda *_: wheel)
    assert main([]) == 1
    output = capsys.readouterr()
    assert re.search(r"does not work here \((damaged: .*|undefined symbol)\); building it anew", output.out)
    assert "two ranks of the Horovod that was built cannot add up a tensor" in output.err
    assert [command for command in pip if str(wheel) in command] == [], "not installed"


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


@pytest.mark.parametrize(("named", "expected"), [("/big", "/big"), ("here", "~/.cache"), ("", "~/.cache")])
def test_cache_directory(named: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert horovod_build.cache_directory() == Path(expected).expanduser() / "fastdistil/horovod"


# Messages


@pytest.mark.usefixtures("pip")
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("cmake", ["3.9.1", None])
def test_missing_tools_are_named_with_their_packages(
    compiler: bool, cmake: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if compiler:
        program(tmp_path / "bin/g++", "echo g++ 12.2.0")
    if cmake:
        program(tmp_path / "bin/cmake", f"echo cmake version {cmake}")
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("a C++ compiler" in said) == (not compiler)
    assert "CMake 3.13 or newer" in said
    assert f"(Debian, Ubuntu: apt install {'' if compiler else 'g++ '}cmake make" in said


@pytest.mark.usefixtures("elsewhere")
def test_unusable_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: None)
    assert main([]) == 2
    assert "pip install torch" in capsys.readouterr().err
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: Torch("2.13.0+rocm7", None, "7.0"))
    assert main([]) == 2
    assert "got 2.13.0+rocm7 for ROCm: use world.engine=torch" in capsys.readouterr().err


def test_failing_pip_shows_what_went_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"pip install failed \(exit 1\); what went wrong stands above"):
        horovod_build._pip("install", "--no-index", tmp_path / "absent.whl")
    assert "absent.whl" in capfd.readouterr().err


# CUDA's compiler and NCCL


def toolkit(home: Path, release: str) -> Path:
    says = f"case $1 in --version) echo release {release}, V{release}.88;; *) echo '#$ TOP={home}/bin/..';; esac"
    program(home / "bin/nvcc", says)
    return home


@pytest.fixture
def toolkits(elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the four places where a toolkit may lie, in their order; all hold an older one."""
    homes = [tmp_path / name for name in ("named", "of-nvcc", "nvidia/cu13", "system")]
    for minor, home in enumerate(homes):
        toolkit(home, f"11.{minor}")
    monkeypatch.setenv("CUDA_HOME", str(homes[0]))
    program(tmp_path / "bin/nvcc", f'exec {homes[1]}/bin/nvcc "$@"')  # a wrapper script names its toolkit
    monkeypatch.setattr(horovod_build, "package_directory", lambda _: tmp_path / "nvidia")
    monkeypatch.setattr(horovod_build, "_SYSTEM_CUDA", homes[3])
    return homes


@pytest.mark.parametrize("place", range(4))
def test_first_toolkit_of_torchs_cuda(place: int, toolkits: list[Path]) -> None:
    """Older ones before it do not matter, nor do those after it."""
    for home in toolkits[place:]:
        toolkit(home, "13.2")
    assert find_cuda(CUDA_TORCH) == toolkits[place]


def test_other_cuda_is_refused(toolkits: list[Path]) -> None:
    places = ", ".join(f"11.{minor} in {home}" for minor, home in enumerate(toolkits))
    with pytest.raises(
        UserError,
        match=rf"CUDA 13's compiler \(nvcc\), got {places};.*13.0.*CUDA_HOME.*--cpu",
    ):
        find_cuda(CUDA_TORCH)


@pytest.mark.usefixtures("elsewhere")
def test_installed_one_needs_no_cuda_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that only runs: its torch is a CUDA build, its Horovod was built where nvcc is."""
    torch = Torch("2.13.0+cu999", "99.1", None)
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: torch)
    assert main([]) == 2
    assert "install the CUDA toolkit 99.1 and set CUDA_HOME" in capsys.readouterr().err
    monkeypatch.setattr(horovod_build, "package_directory", lambda _: tmp_path)
    (tmp_path / STAMP).write_text(stamp(torch))
    monkeypatch.setattr(horovod_build, "probe", lambda: {"gloo": 1, "mpi": 0, "nccl": 22907})
    assert main([]) == 0
    assert "Horovod 0.28.1 for torch 2.13.0+cu999 with Gloo, NCCL is installed" in capsys.readouterr().out


@pytest.mark.usefixtures("elsewhere")
def test_pips_nccl_gets_the_name_that_linkers_look_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(horovod_build, "package_directory", lambda _: tmp_path)
    assert horovod_build._pips_nccl(tmp_path / "links") == {}
    (tmp_path / "nccl/lib").mkdir(parents=True)
    (tmp_path / "nccl/lib/libnccl.so.2").write_text("NCCL")
    variables = horovod_build._pips_nccl(tmp_path / "links")
    assert variables["HOROVOD_NCCL_INCLUDE"] == str(tmp_path / "nccl/include")
    assert Path(variables["HOROVOD_NCCL_LIB"], "libnccl.so").read_text() == "NCCL"
    monkeypatch.setenv("HOROVOD_NCCL_INCLUDE", "/opt/nccl")
    assert horovod_build._pips_nccl(tmp_path / "links") == {}, "the user's counts"


def test_missing_nccl_is_refused_before_building(
    toolkits: list[Path],
    pip: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toolkit(toolkits[0], "13.0")
    monkeypatch.setattr(horovod_build, "installed_torch", lambda: CUDA_TORCH)
    assert main([]) == 2
    assert re.search("libnccl-dev.*HOROVOD_NCCL_INCLUDE.*HOROVOD_NCCL_LIB.*--cpu", capsys.readouterr().err)
    assert pip == []
    (tmp_path / "nccl.h").touch()
    monkeypatch.setenv("HOROVOD_NCCL_INCLUDE", str(tmp_path))
    assert main([]) == 2
    assert "building Horovod needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["opt/nccl/include", "nvidia/nccl/include", "named/include", "include"])
def test_nccl_header(
    place: str,
    toolkits: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes from HOROVOD_NCCL_INCLUDE, from pip, from the toolkit, or lies beside a directory of PATH."""
    if place.startswith("opt"):
        monkeypatch.setenv("HOROVOD_NCCL_INCLUDE", str(tmp_path / place))
    for file in (f"{place}/nccl.h", "nvidia/nccl/lib/libnccl.so.2", "include/nccl.h"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert horovod_build._find_nccl_include(toolkits[0]) == tmp_path / place
