"""What building Horovod takes from the machine: compiler, CMake, MPI's compiler, and for GPUs CUDA's and NCCL."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastdistil.errors import UserError
from fastdistil.install.horovod_installed import Torch, package_directory


@dataclass(frozen=True)
class Cuda:
    home: Path
    release: str
    nccl: Path
    """A directory with include/nccl.h and lib/libnccl.so.2 (or lib64, lib/<machine>: a system's own)."""

    @property
    def nccl_version(self) -> str:
        header = (self.nccl / "include/nccl.h").read_text(encoding="utf-8", errors="replace")
        return ".".join(re.findall(r"#define NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header))


def program(environ: Mapping[str, str], *names: str) -> str | None:
    """Return the path of the first of the programs that there is."""
    paths = (shutil.which(name, path=environ.get("PATH")) for name in names)
    return next(filter(None, paths), None)


def cxx(environ: Mapping[str, str]) -> str | None:
    return program(environ, environ["CXX"]) if environ.get("CXX") else program(environ, "c++", "g++", "clang++")


def _output_of(command: str | Path | None, *arguments: str) -> str:
    """Return what a program says, on both streams; nothing where it cannot be started."""
    try:
        done = subprocess.run(
            [command or "", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout


def first_line(command: str | None, *arguments: str) -> str:
    return _output_of(command, *arguments).partition("\n")[0].strip()


def require_tools(environ: Mapping[str, str]) -> None:
    """Raise UserError naming all that is missing of compiler, CMake, make and Python's headers."""
    cmake = re.search(r"version (\d+)\.(\d+)", _output_of(program(environ, "cmake"), "--version"))
    missing = {
        ("a C++ compiler", "g++"): cxx(environ) is None,
        ("CMake 3.13 or newer", "cmake"): cmake is None or (int(cmake[1]), int(cmake[2])) < (3, 13),
        ("make", "make"): program(environ, "make") is None,
        ("Python's headers", "python3-dev"): not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    }
    if any(missing.values()):
        tools, packages = zip(*(names for names, absent in missing.items() if absent), strict=True)
        raise UserError(
            f"building Horovod needs {', '.join(tools)}: install it (Debian, Ubuntu: apt install {' '.join(packages)})"
        )


def find_cuda(torch: Torch, environ: Mapping[str, str]) -> Cuda | UserError:
    """Return the CUDA toolkit and the NCCL that torch's CUDA goes with, pip's before the system's; or what is missing."""
    assert torch.cuda is not None
    major = torch.cuda.split(".")[0]
    pip = package_directory("nvidia")
    # nvcc may be a wrapper script; it says itself where its toolkit lies.
    top = re.search(r"TOP=(.*)", _output_of(program(environ, "nvcc"), "--dryrun", "-x", "cu", "/dev/null"))
    homes = [
        *([Path(environ["CUDA_HOME"])] if environ.get("CUDA_HOME") else []),
        *([pip / f"cu{major}"] if pip else []),
        *([Path(top[1].strip()).resolve()] if top else []),
        Path("/usr/local/cuda"),
    ]
    others = []
    for home in homes:
        release = re.search(r"release ((\d+)\.\d+)", _output_of(home / "bin/nvcc", "--version"))
        if release and release[2] == major:
            nccl = _find_nccl(pip, home)
            return nccl if isinstance(nccl, UserError) else Cuda(home.resolve(), release[1], nccl)
        others += [f"{release[1]} in {home}"] if release else []
    # pip itself would mix releases: nvcc's own requirements name no versions.
    packages = " ".join(f"'nvidia-{name}=={torch.cuda}.*'" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl"))
    return UserError(
        f"torch {torch.version} is a CUDA build, and Horovod's GPU operations need CUDA {major}'s compiler (nvcc), found: "
        f"{', '.join(others) or 'none'}; install the CUDA toolkit {torch.cuda} and set CUDA_HOME"
        f"{f', or pip install {packages}' if int(major) >= 13 else ''}; --cpu builds Horovod without GPU operations"
    )


def _find_nccl(pip: Path | None, cuda_home: Path) -> Path | UserError:
    """Return pip's NCCL, which torch loads too; a system's where torch brought none."""
    homes = [*([pip / "nccl"] if pip else []), cuda_home, Path("/usr"), Path("/usr/local")]
    return next(
        (home for home in homes if (home / "include/nccl.h").is_file()),
        UserError(
            f"Horovod's GPU operations need NCCL with its headers, found none in {', '.join(map(str, homes))}; "
            "Debian, Ubuntu: apt install libnccl-dev; --cpu builds Horovod without GPU operations"
        ),
    )


def cuda_home(cuda: Cuda, new: Path) -> Path:
    """Return a toolkit as CMake knows it. pip's lacks lib64 and the names that a linker looks for: `new` gets them."""
    if (cuda.home / "lib64").is_dir():
        return cuda.home
    # nvcc finds the rest from where it really lies, so bin/ cannot be a link.
    shutil.copytree(cuda.home / "bin", new / "bin")
    for name in ("include", "nvvm"):
        (new / name).symlink_to(cuda.home / name)
    link_libraries(cuda.home / "lib", new / "lib64")
    return new


def nccl_home(cuda: Cuda, new: Path) -> Path:
    """Return an NCCL with the name that a linker looks for: `new` gets it where pip's lacks it."""
    if not (cuda.nccl / "lib/libnccl.so.2").is_file():
        return cuda.nccl
    link_libraries(cuda.nccl / "lib", new / "lib")
    (new / "include").symlink_to(cuda.nccl / "include")
    return new


def link_libraries(source: Path, new: Path) -> None:
    """Link each library under its name and under the one without numbers."""
    new.mkdir(parents=True)
    for library in source.iterdir():
        (new / library.name).symlink_to(library)
        plain = new / re.sub(r"\.so[.\d]+$", ".so", library.name)
        if not plain.is_symlink():
            plain.symlink_to(library)
