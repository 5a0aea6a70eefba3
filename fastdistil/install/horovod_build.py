"""Build and install Horovod for the installed torch: `python -m fastdistil.install.horovod_build`, or `make horovod`.

The package index holds Horovod's sources only, and its last release (0.28.1, 2023) is older than what it is built
against. So the sources are downloaded, patched (horovod-0.28.1.patch says what and why) and built against the
installed torch without build isolation. The wheel is kept in ${XDG_CACHE_HOME:-~/.cache}/fastdistil/horovod under
everything that it depends on (Build): pip's own cache knows neither torch nor MPI. It is installed only after two
ranks, made of it, have added up a tensor.

Gloo is always built in, MPI where mpicc is there, NCCL where torch is a CUDA build. Horovod is not imported here, only
by child processes.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fastdistil import storage
from fastdistil.errors import FastdistilError, UserError, translated
from fastdistil.install import horovod_tools as tools
from fastdistil.install.horovod_installed import STAMP, Torch, installed_build, installed_torch, probe, two_ranks
from fastdistil.profiling.device import installed_version

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH = Path(__file__).with_name(f"horovod-{VERSION}.patch")
IDLE_CYCLES = "FASTDISTIL_HOROVOD_IDLE_CYCLES"
"""An environment variable that the patch adds."""
HOW_TO_BUILD = "build it with `make horovod` in a checkout, with `python -m fastdistil.install.horovod_build` elsewhere"
REQUIREMENTS = ("cloudpickle", "packaging", "psutil", "pyyaml", "setuptools")
"""What Horovod imports at run time; pyproject.toml's extra `horovod` lists the same."""


class BuildFailed(FastdistilError):
    """Everything needed is there, and still Horovod cannot be built, or what was built does not work."""


@dataclass(frozen=True)
class Build:
    """What a wheel depends on: equal ones are interchangeable. Texts, empty where there is nothing."""

    horovod: str
    patch: str
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
        """Return whether the installed wheel will do.

        The tools that built it may be gone, and MPI's library with them: then it is loaded, to see.
        """
        required = asdict(self)
        if installed is None or installed.keys() != required.keys() or (gpu and not installed["cuda"]):
            return False
        different = [name for name in required if required[name] != installed[name]]
        absent_tools = [name for name in ("compiler", "mpi", "cuda", "nccl") if not required[name]]
        return not different or (set(different) <= set(absent_tools) and isinstance(probe(), dict))


def wanted_build(torch: Torch, cuda: tools.Cuda | None, environ: Mapping[str, str]) -> Build:
    return Build(
        horovod=VERSION,
        patch=hashlib.sha256(PATCH.read_bytes()).hexdigest()[:20],
        torch=torch.version,
        torch_revision=torch.revision,
        python=str(sysconfig.get_config_var("SOABI")),
        libc=" ".join(platform.libc_ver()).strip(),
        compiler=tools.first_line(tools.cxx(environ), "--version"),
        mpi=tools.first_line(tools.program(environ, "mpicc"), "-show"),  # its compiler, directories and libraries
        cuda=cuda.release if cuda else "",
        nccl=cuda.nccl_version if cuda else "",
    )


def build_wheel(build: Build, cuda: tools.Cuda | None, target: Path, log: Path, environ: Mapping[str, str], jobs: int) -> Path:
    """Build the wheel into the new directory `target`, which appears whole or not at all."""
    tools.require_tools(environ)
    say(f"building {build.title} (about 3 minutes on 2 cores; log: {log})")
    log.write_bytes(b"")
    # Not in /tmp: the library keeps the directories that it was linked from in its search path. The caller's lock
    # makes one name enough, and what a killed build left goes now.
    work = target.parent / ".build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        # One that makes wheels, whatever the environment's is.
        _pip(log, environ, "install", "--target", str(work / "tools"), "setuptools>=70.1", "packaging")
        environ = {**environ, "PYTHONPATH": str(work / "tools")}
        requirement = work / "requirement.txt"  # the one place where pip takes a hash
        requirement.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        options = ["--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--dest", str(work)]
        _pip(log, environ, "download", *options, "-r", str(requirement))
        with tarfile.open(work / f"horovod-{VERSION}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        source = work / f"horovod-{VERSION}"
        apply_patch(source, PATCH.read_text(encoding="utf-8"))
        stamp = f"BUILD = {json.dumps(asdict(build), indent=4)}\n"
        (source / "horovod" / STAMP).write_text(stamp, encoding="utf-8")
        environ = _build_environment(build, cuda, work, environ, jobs)
        # With an option in front setup.py does not see that it is to build, and fetches no packages of its own.
        run_logged([sys.executable, "setup.py", "--quiet", "bdist_wheel"], log, environ, "building Horovod", source)
        (source / "dist").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def apply_patch(source: Path, patch: str) -> None:
    """Apply a unified diff strictly: the lines that a hunk expects stand once in their file, anywhere.

    Neither patch nor git is needed otherwise, and the machine may have none of them.
    """
    for name, hunks in re.findall(r"^--- a/(.+)\n\+\+\+ .+\n((?:@@.*\n(?:[-+ ].*\n)+)+)", patch, re.MULTILINE):
        text = (source / name).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] != "+")
            new = "".join(line[1:] for line in lines if line[0] != "-")
            if text.count(old) != 1:
                raise BuildFailed(f"wanted {old!r} once in Horovod's {name}, found it {text.count(old)} times")
            text = text.replace(old, new)
        (source / name).write_text(text, encoding="utf-8")


def _build_environment(
    build: Build, cuda: tools.Cuda | None, work: Path, environ: Mapping[str, str], jobs: int
) -> dict[str, str]:
    """Return the variables of the build. Nothing that others set for Horovod or for an outer make gets in."""
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
        home = tools.cuda_home(cuda, work / "cuda")
        variables |= {
            "HOROVOD_GPU": "CUDA",
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(home),
            "HOROVOD_NCCL_HOME": str(tools.nccl_home(cuda, work / "nccl")),
            "HOROVOD_NCCL_LINK": "SHARED",  # the libnccl.so.2 that torch has loaded
            "CUDA_HOME": str(home),
            "PATH": f"{home / 'bin'}:{environ.get('PATH', os.defpath)}",
        }
    return variables


def _install_wheel(wheel: Path, log: Path, environ: Mapping[str, str]) -> None:
    """Install the wheel once two ranks, of it and not of what is installed, have added up a tensor."""
    say(f"trying it with two ranks: {wheel}")
    with tempfile.TemporaryDirectory(prefix="fastdistil-horovod-") as directory:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)  # noqa: S202  (a wheel that was built here)
        problem = two_ranks({**environ, "PYTHONPATH": directory})
    if problem:
        raise BuildFailed(f"two ranks of the Horovod that was built cannot add up a tensor: {problem}")
    _pip(log, environ, "install", "--force-reinstall", "--no-deps", "--no-index", str(wheel))


def _pip(log: Path, environ: Mapping[str, str], command: str, *arguments: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError("wanted pip in this environment, found none: python -m ensurepip")
    pip = [sys.executable, "-m", "pip", command, "--disable-pip-version-check"]
    # No mistake of ours: a machine without network, an index without the package.
    run_logged([*pip, *arguments], log, environ, f"pip {command}", error=UserError)


def run_logged(
    command: Sequence[str],
    log: Path,
    environ: Mapping[str, str],
    doing: str,
    directory: Path | None = None,
    error: type[FastdistilError] = BuildFailed,
) -> None:
    with log.open("ab") as file:
        code = subprocess.run(command, cwd=directory, env=environ, stdout=file, stderr=file, check=False).returncode
    if code != 0:
        # What went wrong stands above the traceback of the Python program that started it.
        text = log.read_text(encoding="utf-8", errors="replace").rsplit("Traceback (most recent call last)", 1)[0]
        print("\n".join(text.splitlines()[-30:]), file=sys.stderr)
        raise error(f"{doing} failed (exit {code}); above the end of its log, {log}")


def provide(*, cpu: bool, constraint: Path | None, jobs: int, environ: Mapping[str, str]) -> str:
    """Install Horovod for this environment's torch, from the cache where it lies there; return its title."""
    torch = installed_torch()
    if torch is None:
        raise UserError("wanted torch in this environment, found none: Horovod is built against it; pip install torch")
    if torch.hip:
        raise UserError(f"wanted a CPU or CUDA build of torch, got {torch.version} for ROCm: use world.engine=torch")
    gpu = torch.cuda is not None and not cpu
    cuda = tools.find_cuda(torch, environ) if gpu else None
    build = wanted_build(torch, None if isinstance(cuda, UserError) else cuda, environ)
    installed = installed_build()
    met = installed is not None and build.met_by(installed, gpu=gpu)
    missing = [name for name in REQUIREMENTS if installed_version(name) is None]
    if installed is not None and met and not missing:
        return Build(**installed).title
    if isinstance(cuda, UserError):
        raise cuda
    cache = cache_directory(environ)
    with translated("preparing the cache of Horovod's wheels", cache), locked(cache / "lock"):
        log = cache / f"{build.key}.log"
        if missing:
            _pip(log, environ, "install", *(["-c", str(constraint)] if constraint else []), *missing)
        if not met:
            target = cache / build.key
            wheel = cached_wheel(target) or build_wheel(build, cuda, target, log, environ, jobs)
            _install_wheel(wheel, log, environ)
    return build.title


def cache_directory(environ: Mapping[str, str]) -> Path:
    named = Path(environ.get("XDG_CACHE_HOME", ""))
    # Relative ones are to be ignored: XDG Base Directory Specification.
    return (named if named.is_absolute() else Path.home() / ".cache") / "fastdistil" / "horovod"


def cached_wheel(directory: Path) -> Path | None:
    """Return the wheel; None where there is none. A damaged one is deleted."""
    for wheel in directory.glob("*.whl"):
        with suppress(OSError, zipfile.BadZipFile, zlib.error), zipfile.ZipFile(wheel) as archive:
            if archive.testzip() is None:
                return wheel
        say(f"{wheel} is damaged; building it anew")
    shutil.rmtree(directory, ignore_errors=True)
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time build; a dead one's lock is gone with it."""
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
        say(f"{provide(**vars(options), environ=environ)} is installed")
    except FastdistilError as error:
        print(f"fastdistil: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastdistil: interrupted; what was begun is thrown away", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
