"""The Horovod of this environment, seen from outside: what its files say, what a child process can do with it.

Nothing is imported here but the standard library, and Horovod in child processes only: a broken one takes nobody along.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What Horovod imports at run time; pyproject.toml's extra `horovod` lists the same. setuptools: horovod.runner imports
# distutils, which Python has not had of its own since 3.12.
REQUIREMENTS = ("cloudpickle", "packaging", "psutil", "pyyaml", "setuptools")
STAMP = "fastdistil_build.py"
CHECK_SECONDS = 300

PROBE = """
import json
import horovod.torch as hvd
print(json.dumps({"gloo": hvd.gloo_built(), "mpi": hvd.mpi_built(), "nccl": int(hvd.nccl_built())}))
"""

# A rank of the check; NCCL wants a GPU for each, so tensors on GPUs are tried where there are two.
RANK = """
import torch
import horovod.torch as hvd
hvd.init()
devices = ["cpu"] + ([f"cuda:{hvd.local_rank()}"] if hvd.nccl_built() and torch.cuda.device_count() >= 2 else [])
for device in devices:
    if device != "cpu":
        torch.cuda.set_device(device)
    own = torch.arange(1000, dtype=torch.float32, device=device) * (hvd.rank() + 1)
    added = hvd.allreduce(own, op=hvd.Sum, name=device.split(":")[0])
    assert added.tolist() == [3.0 * i for i in range(1000)], f"wrong sum on {device}: {added[:4].tolist()}..."
hvd.shutdown()
"""

CHECK = """
import os, subprocess, sys
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer
server = RendezvousServer()
port = server.start()
slots = get_host_assignments(parse_hosts("localhost:2"), 2)
server.init(slots)
ranks = []
for slot in slots:
    place = {
        "RANK": slot.rank, "SIZE": slot.size, "LOCAL_RANK": slot.local_rank, "LOCAL_SIZE": slot.local_size,
        "CROSS_RANK": slot.cross_rank, "CROSS_SIZE": slot.cross_size, "HOSTNAME": slot.hostname,
        "GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": port, "GLOO_IFACE": "lo",
        "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo",
    }
    environ = {**os.environ, **{"HOROVOD_" + name: str(value) for name, value in place.items()}}
    ranks.append(subprocess.Popen([sys.executable, "-P", "-c", os.environ["FASTDISTIL_RANK"]], env=environ))
codes = [rank.wait() for rank in ranks]
server.stop()
sys.exit(f"the ranks exited with {codes}" if any(codes) else 0)
"""


@dataclass(frozen=True)
class HorovodState:
    status: Literal["ok", "absent", "problem"]
    text: str


@dataclass(frozen=True)
class Torch:
    version: str
    revision: str
    cuda: str | None
    hip: str | None


def package_directory(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a stand-in in sys.modules
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def installed_torch() -> Torch | None:
    directory = package_directory("torch")
    if directory is None or not (directory / "version.py").is_file():
        return None
    facts = runpy.run_path(str(directory / "version.py"))
    return Torch(facts["__version__"], facts.get("git_version") or "", facts.get("cuda"), facts.get("hip"))


def installed_build() -> dict[str, str] | None:
    """The Build of the installed Horovod; None where there is none or it was not built here."""
    directory = package_directory("horovod")
    if directory is None or not (directory / STAMP).is_file():
        return None
    try:
        build = ast.literal_eval((directory / STAMP).read_text(encoding="utf-8").removeprefix("BUILD = "))
    except (OSError, ValueError, SyntaxError):  # cut off, say
        return None
    return build if isinstance(build, dict) else None


def state() -> HorovodState:
    """Whether the installed Horovod fits the installed torch, by what its files say. Cheap: nothing is imported."""
    directory = package_directory("horovod")
    if directory is None:
        return HorovodState("absent", "not installed")
    try:
        version = importlib.metadata.version("horovod")
        built_for = json.loads((directory / "metadata.json").read_text(encoding="utf-8")).get("pytorch")
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return HorovodState("problem", "its files are incomplete")
    torch = installed_torch()
    if torch is None or built_for != torch.version:
        here = torch.version if torch else "none"
        return HorovodState("problem", f"{version} was built for torch {built_for or 'none'}, and torch here is {here}")
    return HorovodState("ok", f"{version} for torch {built_for}")


def probe() -> dict[str, int] | str:
    """{"gloo": 0 or 1, "mpi": 0 or 1, "nccl": version or 0} of the installed Horovod as a child process sees it, or why not."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {CHECK_SECONDS} s"
    if done.returncode == 0:
        return {name: int(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return (done.stderr.strip().splitlines() or [f"importing it ends the process with {done.returncode}"])[-1]


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def two_ranks(environ: Mapping[str, str]) -> str:
    """Whether two ranks of the Horovod that a child process finds can add up a tensor: nothing, or what went wrong."""
    clean = {name: value for name, value in environ.items() if not name.startswith("HOROVOD_")}
    clean |= {"FASTDISTIL_RANK": RANK, "HOROVOD_CYCLE_TIME": "0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", CHECK]
    with subprocess.Popen(
        command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            return f"not done within {CHECK_SECONDS} s"
        finally:
            with_all_its_children(process)
    return " | ".join(output.strip().splitlines()[-5:] or ["exit"]) if process.returncode else ""


def with_all_its_children(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
