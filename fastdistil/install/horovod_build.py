"""Build and install Horovod for the installed torch: `python -m fastdistil.install.horovod_build`, or `make horovod`.

The package index holds Horovod's sources only, and its last release (0.28.1, 2023) is older than what it is built
against. So pip downloads the sources, horovod-0.28.1.patch is applied (it says what and why), and pip builds a wheel
against the installed torch. The wheel is kept in ${XDG_CACHE_HOME:-~/.cache}/fastdistil/horovod under everything that
it depends on: pip's own cache knows neither torch nor MPI. It is installed only after two ranks, made of it, have added
up a tensor.

Gloo is always built in, MPI where mpicc is there, NCCL where torch is a CUDA build: then CUDA_HOME may say which
toolkit, HOROVOD_NCCL_INCLUDE and HOROVOD_NCCL_LIB which NCCL. Horovod is not imported here, only by child processes.
"""

import argparse
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastdistil import storage
from fastdistil.errors import FastdistilError, UserError, translated
from fastdistil.install.horovod_installed import Torch, installed_torch, package_directory, probe, two_ranks

VERSION = "0.28.1"
_SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH = Path(__file__).with_name(f"horovod-{VERSION}.patch")
STAMP = "fastdistil_build.py"
"""The file in the package horovod that holds its `stamp`."""
IDLE_CYCLES = "FASTDISTIL_HOROVOD_IDLE_CYCLES"
"""An environment variable that the patch adds."""
HOW_TO_BUILD = "build it with `make horovod` in a checkout, with `python -m fastdistil.install.horovod_build` elsewhere"
_SYSTEM_CUDA = Path("/usr/local/cuda")
_NCCL_VARIABLES = ("HOROVOD_NCCL_HOME", "HOROVOD_NCCL_INCLUDE", "HOROVOD_NCCL_LIB")
REQUIREMENTS = ("cloudpickle>=2.2", "packaging", "psutil", "pyyaml", "setuptools>=70.1")
"""What Horovod imports at run time, and setuptools builds its wheel; pyproject.toml's extra `horovod` lists the same."""


def provide(*, cpu: bool, constraint: Path | None) -> str:
    """Install Horovod for this environment's torch, from the cache where it lies there; return its title."""
    torch = installed_torch()
    if torch is None:
        raise UserError("wanted torch in this environment, found none: Horovod is built against it; pip install torch")
    if torch.hip:
        raise UserError(f"wanted a CPU or CUDA build of torch, got {torch.version} for ROCm: use world.engine=torch")
    gpu = torch.cuda is not None and not cpu
    operations = ["gloo", *(["mpi"] if shutil.which("mpicc") else []), *(["nccl"] if gpu else [])]
    if installed := installed_operations(torch, operations):
        return _title(torch, installed)
    cuda_home = find_cuda(torch) if gpu else None
    nccl_include = _find_nccl_include(cuda_home) if cuda_home else None
    cache = cache_directory()
    with translated("preparing the cache of Horovod's wheels", cache), locked(cache / "lock"):
        _pip("install", *(["-c", str(constraint)] if constraint else []), *REQUIREMENTS)
        directory = cache / wheel_key(torch, cuda_home, nccl_include)
        wheel = next(directory.glob("*.whl"), None)
        if wheel and (problem := _problem_of(wheel)):
            say(f"{wheel} does not work here ({problem}); building it anew")
            wheel = None
        if wheel is None:
            say(f"building {_title(torch, operations)} (about 3 minutes on 2 cores)")
            wheel = _build_wheel(directory, stamp(torch), _build_environment(operations, cuda_home))
            if problem := _problem_of(wheel):
                raise FastdistilError(f"two ranks of the Horovod that was built cannot add up a tensor: {problem}")
        _pip("install", "--force-reinstall", "--no-deps", "--no-index", wheel)
    return _title(torch, operations)


def _title(torch: Torch, operations: Iterable[str]) -> str:
    names = [name for name in ("Gloo", "MPI", "NCCL") if name.lower() in operations]
    return f"Horovod {VERSION} for torch {torch.version} with {', '.join(names)}"


def stamp(torch: Torch) -> str:
    """Return what the installed package says of the sources, the torch and the Python that it was built with."""
    facts = [VERSION, PATCH.read_text(encoding="utf-8"), torch.version, torch.cuda, sysconfig.get_config_var("SOABI")]
    return f'BUILD = "{storage.text_sha256(storage.canonical(facts))}"\n'


def wheel_key(torch: Torch, cuda_home: Path | None, nccl_include: Path | None = None) -> str:
    """Return a name for all that a wheel depends on: also the C library, the C++ compiler, MPI, CUDA and NCCL."""
    compiler = _output_of(os.environ.get("CXX") or "g++", "--version").partition("\n")[0]
    tools = [compiler, _output_of("mpicc", "-show")]
    if cuda_home:
        tools += [_output_of(cuda_home / "bin/nvcc", "--version"), *(os.environ.get(name, "") for name in _NCCL_VARIABLES)]
    if nccl_include:
        header = (nccl_include / "nccl.h").read_text(encoding="utf-8", errors="replace")
        tools += re.findall(r"#define NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header)
    return storage.text_sha256(storage.canonical([stamp(torch), platform.libc_ver(), tools]))[:20]


def installed_operations(torch: Torch, operations: Sequence[str]) -> list[str]:
    """Return all operations of the installed Horovod if it is of this stamp and loads with these; else none.

    The tools that built it may be gone: a machine that only runs needs none of them.
    """
    directory = package_directory("horovod")
    file = directory / STAMP if directory else None
    if file is None or not file.is_file() or file.read_text(encoding="utf-8") != stamp(torch):
        return []
    built = probe()
    installed = [name for name, there in built.items() if there] if isinstance(built, dict) else []
    return installed if set(operations) <= set(installed) else []


def _build_wheel(directory: Path, stamp: str, environ: Mapping[str, str]) -> Path:
    """Build the wheel into the new directory `directory`, which appears whole or not at all."""
    _require_tools()
    # Not in /tmp: the library keeps the directories that it was linked from in its search path.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".build-") as name:
        work = Path(name)
        requirement = work / "requirement.txt"  # the one place where pip takes a hash
        requirement.write_text(f"horovod=={VERSION} --hash=sha256:{_SDIST_SHA256}\n", encoding="utf-8")
        # Without isolation, which would build against another torch.
        options = ["--no-deps", "--no-build-isolation"]
        _pip("download", *options, "--no-binary", "horovod", "--dest", work, "-r", requirement)
        with tarfile.open(work / f"horovod-{VERSION}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        source = work / f"horovod-{VERSION}"
        apply_patch(source, PATCH.read_text(encoding="utf-8"))
        (source / "horovod" / STAMP).write_text(stamp, encoding="utf-8")
        if "HOROVOD_GPU" in environ:
            environ = {**environ, **_pips_nccl(work / "nccl")}
        _pip("wheel", *options, "--use-pep517", "--wheel-dir", work / "dist", source, environ=environ, error=FastdistilError)
        shutil.rmtree(directory, ignore_errors=True)
        (work / "dist").rename(directory)
    return next(directory.glob("*.whl"))


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
                raise FastdistilError(f"wanted {old!r} once in Horovod's {name}, found it {text.count(old)} times")
            text = text.replace(old, new)
        (source / name).write_text(text, encoding="utf-8")


def _build_environment(operations: Sequence[str], cuda_home: Path | None) -> dict[str, str]:
    """Return the variables of the build. Nothing else that is set for Horovod or for an outer make gets in."""
    foreign = re.compile("HOROVOD_(?!NCCL_)|MAKE|MFLAGS")
    variables = {name: value for name, value in os.environ.items() if not foreign.match(name)} | {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if "mpi" in operations else "HOROVOD_WITHOUT_MPI": "1",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the bundled Gloo otherwise
        # 16: each compiler takes more than a GiB, and there are about 60 files.
        "MAKEFLAGS": f"-j{min(16, len(os.sched_getaffinity(0)))}",
    }
    if cuda_home is not None:
        variables |= {
            "HOROVOD_GPU": "CUDA",
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(cuda_home),
            "HOROVOD_NCCL_LINK": "SHARED",  # the libnccl.so.2 that torch has loaded
            "CUDA_HOME": str(cuda_home),
            "PATH": f"{cuda_home / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        }
    return variables


def _pips_nccl(links: Path) -> dict[str, str]:
    """Return the variables that lead to the NCCL that pip installed with torch; CMake finds a system's without any.

    pip's lacks the name that a linker looks for: the new directory `links` has it.
    """
    if (home := _pips_nccl_home()) is None:
        return {}
    links.mkdir()
    (links / "libnccl.so").symlink_to(home / "lib/libnccl.so.2")
    return {"HOROVOD_NCCL_INCLUDE": str(home / "include"), "HOROVOD_NCCL_LIB": str(links)}


def _pips_nccl_home() -> Path | None:
    """Return where pip's NCCL lies, unless the user's variables name another one."""
    nvidia = package_directory("nvidia")
    if nvidia is None or any(os.environ.get(name) for name in _NCCL_VARIABLES):
        return None
    return nvidia / "nccl" if (nvidia / "nccl/lib/libnccl.so.2").is_file() else None


def _find_nccl_include(cuda_home: Path) -> Path:
    """Return the directory of NCCL's header: that of the variables, else pip's, else where CMake looks."""
    prefixes = [Path(directory).parent for directory in os.environ.get("PATH", os.defpath).split(":")]
    named = os.environ.get("HOROVOD_NCCL_HOME")
    homes = [Path(named) if named else None, _pips_nccl_home(), cuda_home, *prefixes]
    directories = [home / "include" for home in homes if home]
    if include := os.environ.get("HOROVOD_NCCL_INCLUDE"):
        directories.insert(0, Path(include))
    for directory in directories:
        if (directory / "nccl.h").is_file():
            return directory
    raise UserError(
        "Horovod's GPU operations need NCCL with its header nccl.h, got none from pip, the CUDA toolkit or the system; "
        "install it (Debian, Ubuntu: apt install libnccl-dev), or set HOROVOD_NCCL_INCLUDE to the directory of nccl.h "
        "and HOROVOD_NCCL_LIB to that of libnccl.so; --cpu builds Horovod without GPU operations"
    )


def find_cuda(torch: Torch) -> Path:
    """Return the first CUDA toolkit on this machine whose compiler is of torch's major CUDA version."""
    assert torch.cuda is not None
    major = torch.cuda.split(".")[0]
    others = []
    for home in _cuda_toolkits(major):
        release = re.search(r"release ((\d+)\.\d+)", _output_of(home / "bin/nvcc", "--version"))
        if release and release[2] == major:
            return home
        others += [f"{release[1]} in {home}"] if release else []
    raise UserError(
        f"torch {torch.version} is a CUDA build, and Horovod's GPU operations need CUDA {major}'s compiler (nvcc), "
        f"got {', '.join(others) or 'none'}; install the CUDA toolkit {torch.cuda} and set CUDA_HOME; "
        "--cpu builds Horovod without GPU operations"
    )


def _cuda_toolkits(major: str) -> list[Path]:
    """Return where a CUDA toolkit may lie: CUDA_HOME, that of nvcc on PATH, pip's, the system's."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    # nvcc on PATH may be a link or a wrapper script; it says itself where its toolkit lies.
    if top := re.search(r"TOP=(.*)", _output_of("nvcc", "--dryrun", "-x", "cu", "/dev/null")):
        homes.append(Path(top[1].strip()))
    if nvidia := package_directory("nvidia"):
        homes.append(nvidia / f"cu{major}")
    return list(dict.fromkeys(home.resolve() for home in [*homes, _SYSTEM_CUDA]))


def _require_tools() -> None:
    """Raise UserError naming all that is missing of compiler, CMake, make and Python's headers."""
    cmake = re.search(r"version (\d+)\.(\d+)", _output_of("cmake", "--version"))
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    tools = {
        ("a C++ compiler", "g++"): any(map(shutil.which, compilers)),
        ("CMake 3.13 or newer", "cmake"): cmake and (int(cmake[1]), int(cmake[2])) >= (3, 13),
        ("make", "make"): shutil.which("make"),
        ("Python's headers", "python3-dev"): Path(sysconfig.get_path("include"), "Python.h").is_file(),
    }
    if missing := [names for names, present in tools.items() if not present]:
        names, packages = zip(*missing, strict=True)
        raise UserError(
            f"building Horovod needs {', '.join(names)}: install it (Debian, Ubuntu: apt install {' '.join(packages)})"
        )


def _output_of(*command: str | Path) -> str:
    """Return what a program prints, on both streams; nothing where it cannot be started."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    except OSError:
        return ""


def _problem_of(wheel: Path) -> str:
    """Let two ranks, of the wheel and not of what is installed, add up a tensor; return what went wrong, or nothing."""
    say(f"trying it with two ranks: {wheel}")
    with tempfile.TemporaryDirectory(prefix="fastdistil-horovod-") as directory:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(directory)  # noqa: S202  (a wheel that was built here)
        except (zipfile.BadZipFile, zlib.error) as error:
            return f"damaged: {error}"
        return two_ranks({**os.environ, "PYTHONPATH": directory})


def _pip(*arguments: str | Path, environ: Mapping[str, str] | None = None, error: type[FastdistilError] = UserError) -> None:
    """Run pip. Unless it builds, a failure is no mistake of ours: no pip or network here, an index without the package."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    code = subprocess.run(command, env=environ, check=False).returncode
    if code != 0:
        raise error(f"pip {arguments[0]} failed (exit {code}); what went wrong stands above")


def cache_directory() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Relative ones are to be ignored: XDG Base Directory Specification.
    return (named if named.is_absolute() else Path.home() / ".cache") / "fastdistil" / "horovod"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time build; a dead one's lock is gone with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with storage.locked(path, "waiting for another process that prepares Horovod", say, wait=True):
        yield


def say(text: str) -> None:
    print(f"fastdistil: {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastdistil.install.horovod_build", description="Build and install Horovod for the installed torch."
    )
    parser.add_argument("--cpu", action="store_true", help="without GPU operations, although torch is a CUDA build")
    parser.add_argument("--constraint", type=Path, metavar="FILE", help="pip's constraints for what Horovod requires")
    try:
        say(f"{provide(**vars(parser.parse_args(arguments)))} is installed")
    except FastdistilError as error:
        print(f"fastdistil: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastdistil: interrupted; what was begun is thrown away", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
