"""Build and install Horovod for this environment's torch: `python -m fastdistil.install.horovod_build`, or `make horovod`.

The package index holds Horovod's sources only, and its last release (0.28.1, 2023) asks for C++14 where today's torch
headers want C++17. So the sources are downloaded, edited (EDITS), built against the installed torch without build isolation,
and the wheel is kept in a cache (${XDG_CACHE_HOME:-~/.cache}/fastdistil/horovod) under everything that it depends on: Build.
A wheel is installed only after two ranks, made of it, have added up a tensor.

Gloo is always built in, MPI where mpicc is there, NCCL where torch is a CUDA build. Standard library only; Horovod is not
imported here, only by child processes.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fastdistil import storage
from fastdistil.errors import FastdistilError, UserError, translated
from fastdistil.install.horovod_installed import (
    REQUIREMENTS,
    STAMP,
    Torch,
    installed_build,
    installed_torch,
    is_installed,
    probe,
    state,
    two_ranks,
)
from fastdistil.install.horovod_tools import (
    Cuda,
    cuda_home,
    cxx,
    find_cuda,
    first_line,
    found,
    nccl_home,
    nccl_version,
    require_tools,
)

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
IDLE_CYCLES = "FASTDISTIL_HOROVOD_IDLE_CYCLES"
"""Environment variable: see EDITS. Unset: 1, Horovod's own way."""
HOW_TO_BUILD = "build it with `make horovod` in a checkout, with `python -m fastdistil.install.horovod_build` elsewhere"
# From release 81 on setuptools lacks what Horovod's build imports.
BUILD_TOOLS = ("setuptools<81", "wheel", "packaging")


class Edit(NamedTuple):
    file: str
    old: str
    new: str


EDITS = (
    # torch's headers refuse anything older.
    Edit("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
    Edit("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"),
    # A requirement from the days of torch's C extensions: nothing imports it.
    Edit("setup.py", "require_list.append('cffi>=1.4.0')", "pass"),
    # A process set's context, which all collectives use, was never told the interface: it went by the host's name.
    Edit(
        "horovod/common/gloo/gloo_context.cc",
        "\n\n  attr device_attr;\n  device_attr.iface = gloo_iface_;",
        "\n\n  attr device_attr;\n  device_attr.iface = global_context.gloo_iface_;",
    ),
    # What the environment fixes outlives a shutdown, and the next start writes a default over it: with HOROVOD_FUSION_THRESHOLD
    # and HOROVOD_CYCLE_TIME both fixed that is outside of an empty vector.
    Edit(
        "horovod/common/parameter_manager.cc",
        "    ResetBayes();\n  } else {\n    Eigen::VectorXd v = TunableParameter::BestValue();",
        "    ResetBayes();\n  } else if (fixed_values_.find(variable) == fixed_values_.end()) {\n"
        "    Eigen::VectorXd v = TunableParameter::BestValue();",
    ),
    # When a rank is lost, the others' tensors are given up while queues are locked. torch's tensors take the interpreter's lock
    # when they go, and a thread that has it and enqueues waits for the queues: for ever, and every other Python thread with it.
    # So these tensors stay: the process is about to end.
    Edit(
        "horovod/common/tensor_queue.cc",
        "    e.second.FinishWithCallback(status);\n  }\n  tensor_table_.clear();\n",
        "    e.second.FinishWithCallback(status);\n  }\n"
        "  if (!tensor_table_.empty()) {\n    new auto(std::move(tensor_table_));\n  }\n  tensor_table_.clear();\n",
    ),
    # Ranks coordinate once a cycle, also when none has anything to send: time taken from cores that compute. IDLE_CYCLES makes
    # that every so many cycles, until there is something in this rank's queue. For collectives of all ranks: those of a part
    # of them (process sets), which nothing here has, may wait for an idle rank that is not one of them.
    Edit(
        "horovod/common/tensor_queue.h",
        "  bool IsTensorPresentInTable (const std::string& tensor_name) const;\n",
        "  bool IsTensorPresentInTable (const std::string& tensor_name) const;\n\n"
        "  bool IsEmpty() const {\n"
        "    std::lock_guard<std::mutex> guard(mutex_);\n    return tensor_table_.empty() && message_queue_.empty();\n  }\n",
    ),
    Edit(
        "horovod/common/operations.cc",
        "    std::this_thread::sleep_for(sleep_duration);\n  }\n  state.last_cycle_start",
        "    std::this_thread::sleep_for(sleep_duration);\n  }\n"
        f'  static const int idle_cycles = GetIntEnvOrDefault("{IDLE_CYCLES}", 1);\n'
        "  auto idle = [&state]() {\n"
        "    for (auto id : state.process_set_table.Ids()) {\n"
        "      if (!state.process_set_table.Get(id).tensor_queue.IsEmpty()) return false;\n    }\n"
        "    return !state.shut_down;\n  };\n"
        "  for (int cycle = 1; cycle < idle_cycles && idle(); ++cycle) {\n"
        "    std::this_thread::sleep_for(std::chrono::microseconds(\n"
        "        long(state.parameter_manager.CycleTimeMs() * 1000.)));\n  }\n"
        "  state.last_cycle_start",
    ),
)
# A CUDA compiler on PATH, or a CUDA build of torch, would make a build without GPU operations ask for all of CUDA.
CPU_EDITS = (
    Edit("CMakeLists.txt", "include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)", "if(FALSE)"),
    Edit(
        "cmake/Modules/FindPytorch.cmake",
        "print(True if ((torch.version.cuda is not None) and (CUDA_HOME is not None)) else False)",
        "print(False)",
    ),
)
# CUDA's headers warn below C++17 and refuse C++11 with gcc 14.
CUDA_EDITS = (Edit("horovod/common/ops/cuda/CMakeLists.txt", "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)"),)


class BuildFailed(FastdistilError):
    """Everything needed is there, and still Horovod cannot be built, or what was built does not work."""


@dataclass(frozen=True)
class Build:
    """What a wheel depends on: equal ones are interchangeable. Texts, empty where there is nothing."""

    horovod: str
    edits: str
    torch: str
    torch_revision: str
    python: str
    libc: str
    compiler: str
    mpi: str
    cuda: str
    nccl: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:20]

    @property
    def title(self) -> str:
        operations = ["Gloo", *(["MPI"] if self.mpi else []), *(["NCCL"] if self.cuda else [])]
        return f"Horovod {self.horovod} for torch {self.torch} with {', '.join(operations)}"

    def met_by(self, installed: Mapping[str, str] | None, *, gpu: bool) -> bool:
        """Whether the installed wheel will do. The tools that built it may be gone; MPI's library with them, so it is tried."""
        required = asdict(self)
        if required == installed:
            return True
        if installed is None or installed.keys() != required.keys() or (gpu and not installed["cuda"]):
            return False
        tools = ("compiler", "mpi", "cuda", "nccl")
        fits = all(required[name] == installed[name] or (name in tools and not required[name]) for name in required)
        return fits and not isinstance(probe(), str)


# What is to be built


def wanted_build(torch: Torch, cuda: Cuda | None, environ: Mapping[str, str]) -> Build:
    return Build(
        horovod=VERSION,
        edits=hashlib.sha256(repr((EDITS, CPU_EDITS, CUDA_EDITS, BUILD_TOOLS)).encode()).hexdigest()[:20],
        torch=torch.version,
        torch_revision=torch.revision,
        python=str(sysconfig.get_config_var("SOABI")),
        libc=" ".join(platform.libc_ver()).strip(),
        compiler=first_line(cxx(environ), "--version"),
        mpi=first_line(found(environ, "mpicc"), "-show"),  # names its compiler, directories and libraries
        cuda=cuda.release if cuda else "",
        nccl=nccl_version(cuda.nccl) if cuda else "",
    )


def edits_for(cuda: Cuda | None) -> tuple[Edit, ...]:
    return (*EDITS, *(CUDA_EDITS if cuda else CPU_EDITS))


# Building


def build_wheel(build: Build, cuda: Cuda | None, target: Path, log: Path, environ: Mapping[str, str], jobs: int) -> None:
    """Leave the wheel alone in the new directory `target`, which appears whole or not at all."""
    require_tools(environ)
    say(f"building {build.title} (about 3 minutes on 2 cores; log: {log})")
    log.write_bytes(b"")
    # Not in /tmp: the library keeps the directories that it was linked from in its search path. The caller's lock makes
    # one name enough, and what a killed build left goes now.
    work = target.parent / ".build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        pip_install(log, environ, "--target", str(work / "tools"), *BUILD_TOOLS)
        environ = {**environ, "PYTHONPATH": str(work / "tools")}
        source = unpacked(download(work, log, environ))
        apply_edits(source, edits_for(cuda))
        (source / "horovod" / STAMP).write_text(f"BUILD = {json.dumps(asdict(build), indent=4)}\n", encoding="utf-8")
        environ = build_environment(build, cuda, work, environ, jobs)
        # With an option in front setup.py does not see that it is to build, and fetches no packages of its own.
        run_logged([sys.executable, "setup.py", "--quiet", "bdist_wheel"], log, environ, source, "building Horovod")
        (source / "dist").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download(work: Path, log: Path, environ: Mapping[str, str]) -> Path:
    """The sources, from the package index that pip is configured with; pip compares the hash."""
    (work / "wanted.txt").write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(work / "wanted.txt")]
    # No mistake of ours: a machine without network, an index without Horovod.
    run_logged(command, log, environ, work, f"downloading Horovod {VERSION} with pip", UserError)
    (sdist,) = work.glob("horovod-*.tar.gz")
    return sdist


def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / f"horovod-{VERSION}"


def apply_edits(source: Path, edits: Sequence[Edit]) -> None:
    for edit in edits:
        text = (source / edit.file).read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise BuildFailed(f"wanted {edit.old!r} once in Horovod's {edit.file}, found it {text.count(edit.old)} times")
        (source / edit.file).write_text(text.replace(edit.old, edit.new), encoding="utf-8")


def build_environment(build: Build, cuda: Cuda | None, work: Path, environ: Mapping[str, str], jobs: int) -> dict[str, str]:
    """Nothing that others set for Horovod or for an outer make gets in."""
    variables = {name: value for name, value in environ.items() if not name.startswith(("HOROVOD_", "MAKE", "MFLAGS"))}
    variables |= {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if build.mpi else "HOROVOD_WITHOUT_MPI": "1",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the bundled Gloo otherwise
        "MAKEFLAGS": f"-j{jobs}",
    }
    if cuda is not None:
        home = cuda_home(cuda, work / "cuda")
        variables |= {
            "HOROVOD_GPU": "CUDA",
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(home),
            "HOROVOD_NCCL_HOME": str(nccl_home(cuda, work / "nccl")),
            "HOROVOD_NCCL_LINK": "SHARED",  # the libnccl.so.2 that torch has loaded
            "CUDA_HOME": str(home),
            "PATH": f"{home / 'bin'}:{environ.get('PATH', os.defpath)}",
        }
    return variables


# Installing


def install_wheel(wheel: Path, log: Path, environ: Mapping[str, str]) -> None:
    """Once two ranks, of the wheel and not of what is installed, have added up a tensor."""
    say(f"trying it with two ranks: {wheel}")
    with tempfile.TemporaryDirectory(prefix="fastdistil-horovod-") as directory:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)  # noqa: S202  (a wheel that was built here)
        wrong = two_ranks({**environ, "PYTHONPATH": directory})
    if wrong:
        raise BuildFailed(f"two ranks of the Horovod that was built cannot add up a tensor: {wrong}")
    if state().status != "absent" and installed_build() is None:
        say("replacing an installed Horovod that was built elsewhere")
    pip_install(log, environ, "--force-reinstall", "--no-deps", "--no-index", str(wheel))


def install_requirements(constraint: Path | None, log: Path, environ: Mapping[str, str]) -> None:
    missing = [name for name in REQUIREMENTS if not is_installed(name)]
    if missing:
        pip_install(log, environ, *(["-c", str(constraint)] if constraint else []), *missing)


def pip_install(log: Path, environ: Mapping[str, str], *arguments: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError("wanted pip in this environment, found none: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    run_logged(command, log, environ, Path.cwd(), "installing with pip", UserError)


def run_logged(
    command: Sequence[str],
    log: Path,
    environ: Mapping[str, str],
    directory: Path,
    doing: str,
    error: type[FastdistilError] = BuildFailed,
) -> None:
    with log.open("ab") as file:
        code = subprocess.run(command, cwd=directory, env=environ, stdout=file, stderr=file, check=False).returncode
    if code != 0:
        # What went wrong stands above the traceback of the Python program that started it.
        text = log.read_text(encoding="utf-8", errors="replace").rsplit("Traceback (most recent call last)", 1)[0]
        print("\n".join(text.splitlines()[-30:]), file=sys.stderr)
        raise error(f"{doing} failed (exit {code}); above the end of its log, {log}")


# The whole


def provide(*, cpu: bool, constraint: Path | None, jobs: int, environ: Mapping[str, str]) -> str:
    """Have Horovod installed for this environment's torch, from the cache where it lies there; says what was done."""
    torch = installed_torch()
    if torch is None:
        raise UserError("wanted torch in this environment, found none: Horovod is built against it; pip install torch")
    if torch.hip:
        raise UserError(f"wanted a CPU or CUDA build of torch, got {torch.version} for ROCm: use world.engine=torch")
    gpu = torch.cuda is not None and not cpu
    cuda = find_cuda(torch, environ) if gpu else None
    build = wanted_build(torch, None if isinstance(cuda, UserError) else cuda, environ)
    installed = installed_build()
    if installed and build.met_by(installed, gpu=gpu) and all(map(is_installed, REQUIREMENTS)):
        return f"{Build(**installed).title} is installed"
    if isinstance(cuda, UserError):
        raise cuda
    cache = cache_directory(environ)
    with translated("preparing the cache of Horovod's wheels", cache), locked(cache / "lock"):
        log = cache / f"{build.key}.log"
        if build.met_by(installed_build(), gpu=gpu):  # by another process, meanwhile; or only what it requires is missing
            install_requirements(constraint, log, environ)
            return f"{build.title} is installed"
        wheel = cached_wheel(cache / build.key)
        if wheel is None:
            build_wheel(build, cuda, cache / build.key, log, environ, jobs)
            (wheel,) = (cache / build.key).glob("*.whl")
        install_requirements(constraint, log, environ)
        install_wheel(wheel, log, environ)
    return f"{build.title} is installed; two ranks of it have added up a tensor"


def cache_directory(environ: Mapping[str, str]) -> Path:
    named = Path(environ.get("XDG_CACHE_HOME", ""))
    # Relative ones are to be ignored: XDG Base Directory Specification.
    return (named if named.is_absolute() else Path.home() / ".cache") / "fastdistil" / "horovod"


def cached_wheel(directory: Path) -> Path | None:
    """The wheel; None where there is none. A damaged one is thrown away."""
    wheels = list(directory.glob("*.whl"))
    if len(wheels) == 1:
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                if archive.testzip() is None:
                    return wheels[0]
        except (OSError, zipfile.BadZipFile, zlib.error):
            pass
        say(f"{wheels[0]} is damaged; building it anew")
    shutil.rmtree(directory, ignore_errors=True)
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; a dead one's lock is gone with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with storage.locked(path, "waiting for another process that prepares Horovod", say, wait=True):
        yield


def say(text: str) -> None:
    print(f"fastdistil: {text}", flush=True)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastdistil.install.horovod_build", description="Build and install Horovod for the installed torch."
    )
    parser.add_argument("--cpu", action="store_true", help="without GPU operations, although torch is a CUDA build")
    parser.add_argument("--constraint", type=Path, metavar="FILE", help="pip's constraints for what Horovod requires")
    # 16: each takes more than a GiB, and there are about 60 files to compile.
    cores = min(16, len(os.sched_getaffinity(0)))
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=f"compilers at a time (default: {cores})")
    options = parser.parse_args(arguments)
    try:
        say(provide(cpu=options.cpu, constraint=options.constraint, jobs=options.jobs, environ=environ))
    except FastdistilError as error:
        print(f"fastdistil: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastdistil: interrupted; what was begun is thrown away", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
