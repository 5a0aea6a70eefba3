"""What building Horovod takes from the machine: compiler, CMake, MPI's compiler, and for GPUs CUDA's and NCCL."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
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


def found(environ: Mapping[str, str], *names: str) -> str | None:
    paths = (shutil.which(name, path=environ.get("PATH")) for name in names if name)
    return next((path for path in paths if path), None)


def cxx(environ: Mapping[str, str]) -> str | None:
    return found(environ, environ["CXX"]) if environ.get("CXX") else found(environ, "c++", "g++", "clang++")


def first_line(program: str | None, *arguments: str) -> str:
    if program is None:
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0].strip()


def require_tools(environ: Mapping[str, str]) -> None:
    """Compiler, CMake, make, Python's headers and pip; the error names all that are missing."""
    missing = []
    if cxx(environ) is None:
        missing.append(("a C++ compiler", "g++"))
    version = re.search(r"(\d+)\.(\d+)", first_line(found(environ, "cmake"), "--version"))
    if version is None or (int(version[1]), int(version[2])) < (3, 13):
        missing.append(("CMake 3.13 or newer", "cmake"))
    if found(environ, "make") is None:
        missing.append(("make", "make"))
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(("Python's headers", "python3-dev"))
    if missing:
        lacking = ", ".join(tool for tool, _ in missing)
        packages = " ".join(package for _, package in missing)
        raise UserError(f"building Horovod needs {lacking}: install it (Debian, Ubuntu: apt install {packages})")


def find_cuda(torch: Torch, environ: Mapping[str, str]) -> Cuda | UserError:
    """The CUDA toolkit and the NCCL that a CUDA build of torch goes with, pip's before the system's; or what is missing."""
    assert torch.cuda is not None
    major = torch.cuda.split(".")[0]
    pip = package_directory("nvidia")
    nvcc = found(environ, "nvcc")
    # nvcc may be a wrapper script; it says itself where its toolkit lies.
    top = re.search(r"TOP=(.*)", output_of([nvcc, "--dryrun", "-x", "cu", "/dev/null"])) if nvcc else None
    homes = [Path(environ["CUDA_HOME"])] if environ.get("CUDA_HOME") else []
    homes += [pip / f"cu{major}"] if pip else []
    homes += [Path(top[1].strip()).resolve()] if top else []
    homes += [Path("/usr/local/cuda")]
    releases = []
    for home in homes:
        release = re.search(r"release (\d+)\.(\d+)", output_of([str(home / "bin/nvcc"), "--version"]))
        if release and release[1] == major:
            nccl = find_nccl(pip, home)
            return nccl if isinstance(nccl, UserError) else Cuda(home.resolve(), f"{release[1]}.{release[2]}", nccl)
        releases += [f"{release[1]}.{release[2]} in {home}"] if release else []
    # pip itself would mix releases: nvcc's own requirements name no versions.
    pip_packages = " ".join(f"'nvidia-{name}=={torch.cuda}.*'" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-cccl"))
    return UserError(
        f"torch {torch.version} is a CUDA build, and Horovod's GPU operations need CUDA {major}'s compiler (nvcc), found: "
        f"{', '.join(releases) or 'none'}; install the CUDA toolkit {torch.cuda} and set CUDA_HOME"
        f"{f', or pip install {pip_packages}' if int(major) >= 13 else ''}; --cpu builds Horovod without GPU operations"
    )


def find_nccl(pip: Path | None, cuda_home: Path) -> Path | UserError:
    """pip's, which torch loads too; a system's where torch brought none."""
    homes = [pip / "nccl"] if pip else []
    homes += [cuda_home, Path("/usr"), Path("/usr/local")]
    for home in homes:
        if (home / "include/nccl.h").is_file():
            return home
    return UserError(
        f"Horovod's GPU operations need NCCL with its headers, found none in {', '.join(map(str, homes))}; "
        "Debian, Ubuntu: apt install libnccl-dev; --cpu builds Horovod without GPU operations"
    )


def nccl_version(home: Path) -> str:
    header = (home / "include/nccl.h").read_text(encoding="utf-8", errors="replace")
    return ".".join(re.findall(r"#define NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header))


def output_of(command: Sequence[str]) -> str:
    """Both streams; nothing where the program cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return done.stdout


def cuda_home(cuda: Cuda, new: Path) -> Path:
    """A toolkit as CMake knows it. pip's lacks lib64 and the names that a linker looks for."""
    if (cuda.home / "lib64").is_dir():
        return cuda.home
    # nvcc finds the rest from where it really lies, so bin/ cannot be a link.
    shutil.copytree(cuda.home / "bin", new / "bin")
    for name in ("include", "nvvm"):
        (new / name).symlink_to(cuda.home / name)
    link_libraries(cuda.home / "lib", new / "lib64")
    return new


def nccl_home(cuda: Cuda, new: Path) -> Path:
    if not (cuda.nccl / "lib/libnccl.so.2").is_file():
        return cuda.nccl
    new.mkdir()
    (new / "include").symlink_to(cuda.nccl / "include")
    link_libraries(cuda.nccl / "lib", new / "lib")
    return new


def link_libraries(source: Path, new: Path) -> None:
    """Each library under its own name and under the one without numbers."""
    new.mkdir()
    for library in source.iterdir():
        (new / library.name).symlink_to(library)
        plain = new / re.sub(r"\.so[.\d]+$", ".so", library.name)
        if not plain.is_symlink():
            plain.symlink_to(library)
