"""The Horovod of this environment, seen from outside: what its files say, what a child process can do with it.

Nothing is imported here but the standard library, and Horovod in child processes only: a broken one takes
nobody along.
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

STAMP = "fastdistil_build.py"
"""The file in the package horovod that holds its Build (horovod_build.py)."""
CHECK_S = 300

PROBE = """
import json
import horovod.torch as hvd
print(json.dumps({"gloo": hvd.gloo_built(), "mpi": hvd.mpi_built(), "nccl": int(hvd.nccl_built())}))
"""

# A rank of the check. Rank 0 serves the rendezvous and starts rank 1. NCCL wants a GPU for each rank, so tensors on
# GPUs are tried where there are two.
RANK = """
import os, subprocess, sys, threading
rank = os.environ.setdefault("HOROVOD_RANK", "0")
os.environ["HOROVOD_LOCAL_RANK"] = rank
if rank == "0":
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer
    server = RendezvousHTTPServer(("127.0.0.1", 0), RendezvousHandler, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = str(server.server_address[1])
    rank_1 = subprocess.Popen(sys.orig_argv, env={**os.environ, "HOROVOD_RANK": "1"})
import torch
import horovod.torch as hvd
hvd.init()
devices = ["cpu"] + ([f"cuda:{rank}"] if hvd.nccl_built() and torch.cuda.device_count() >= 2 else [])
for device in devices:
    if device != "cpu":
        torch.cuda.set_device(device)
    addend = torch.arange(1000, dtype=torch.float32, device=device) * (hvd.rank() + 1)
    total = hvd.allreduce(addend, op=hvd.Sum, name=device.split(":")[0])
    assert total.tolist() == [3.0 * i for i in range(1000)], f"wrong sum on {device}: {total[:4].tolist()}..."
hvd.shutdown()
sys.exit(rank_1.wait() if rank == "0" else 0)
"""
_RANK_ENVIRONMENT = {
    "HOROVOD_SIZE": "2",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "0",
    "HOROVOD_CROSS_SIZE": "1",
    "HOROVOD_HOSTNAME": "localhost",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    "HOROVOD_GLOO_IFACE": "lo",
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CPU_OPERATIONS": "gloo",
    "HOROVOD_CYCLE_TIME": "0.1",
    "OMP_NUM_THREADS": "1",
}


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
    """Return where a package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a stand-in in sys.modules
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def installed_torch() -> Torch | None:
    """Return what the installed torch says of itself, without importing it."""
    directory = package_directory("torch")
    if directory is None or not (directory / "version.py").is_file():
        return None
    facts = runpy.run_path(str(directory / "version.py"))
    return Torch(facts["__version__"], facts.get("git_version") or "", facts.get("cuda"), facts.get("hip"))


def installed_build() -> dict[str, str] | None:
    """Return the Build of the installed Horovod; None where there is none or it was not built here."""
    directory = package_directory("horovod")
    try:
        assert directory is not None
        build = ast.literal_eval((directory / STAMP).read_text(encoding="utf-8").removeprefix("BUILD = "))
    except (AssertionError, OSError, ValueError, SyntaxError):  # cut off, say
        return None
    return build if isinstance(build, dict) else None


def state() -> HorovodState:
    """Judge by its files whether the installed Horovod fits the installed torch. Cheap: nothing is imported."""
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
    """Import the installed Horovod in a child process, and return what it has, or why it does not load.

    What it has is {"gloo": 0 or 1, "mpi": 0 or 1, "nccl": version or 0}.
    """
    try:
        done = _run(PROBE, os.environ)
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {CHECK_S} s"
    if done.returncode == 0:
        return {name: int(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
    return (done.stderr.strip().splitlines() or [f"importing it ends the process with {done.returncode}"])[-1]


def two_ranks(environ: Mapping[str, str]) -> str:
    """Let two ranks of the Horovod that `environ` leads to add up a tensor; return what went wrong, or nothing."""
    clean = {name: value for name, value in environ.items() if not name.startswith("HOROVOD_")}
    try:
        done = _run(RANK, clean | _RANK_ENVIRONMENT)
    except subprocess.TimeoutExpired:
        return f"not done within {CHECK_S} s"
    last_lines = (done.stdout + done.stderr).strip().splitlines()[-5:]
    return " | ".join(last_lines or [f"exit {done.returncode}"]) if done.returncode else ""


def _run(script: str, environ: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a Python script for at most CHECK_S. Whatever it started is gone afterwards."""
    command = [sys.executable, "-P", "-c", script]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=CHECK_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
