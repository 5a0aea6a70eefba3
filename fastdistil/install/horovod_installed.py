"""The Horovod of this environment, seen from outside: what its files say, what a child process can do with it.

Horovod is imported in child processes only: a broken one takes nobody along.
"""

import importlib.metadata
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECK_S = 300

_PROBE = """
import json
import horovod.torch as hvd
print(json.dumps({"gloo": hvd.gloo_built(), "mpi": hvd.mpi_built(), "nccl": int(hvd.nccl_built())}))
"""

# NCCL wants a GPU for each rank, so tensors on GPUs are tried where there are two.
_TWO_RANKS = """
import horovod

def add_up():
    import torch
    import horovod.torch as hvd
    hvd.init()
    devices = ["cpu"] + ([f"cuda:{hvd.rank()}"] if hvd.nccl_built() and torch.cuda.device_count() >= 2 else [])
    for device in devices:
        if device != "cpu":
            torch.cuda.set_device(device)
        addend = torch.arange(1000, dtype=torch.float32, device=device) * (hvd.rank() + 1)
        total = hvd.allreduce(addend, op=hvd.Sum, name=device.split(":")[0])
        assert total.tolist() == [3.0 * i for i in range(1000)], f"wrong sum on {device}: {total[:4].tolist()}..."
    hvd.shutdown()

horovod.run(add_up, np=2, use_gloo=True)
"""


@dataclass(frozen=True)
class HorovodState:
    status: Literal["ok", "absent", "problem"]
    text: str


@dataclass(frozen=True)
class Torch:
    version: str
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
    return Torch(facts["__version__"], facts.get("cuda"), facts.get("hip"))


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
    output, problem = _run(_PROBE, os.environ, last_lines=1)
    return problem or {name: int(value) for name, value in json.loads(output.splitlines()[-1]).items()}


def two_ranks(environ: Mapping[str, str]) -> str:
    """Let two ranks of the Horovod that `environ` leads to add up a tensor; return what went wrong, or nothing."""
    clean = {name: value for name, value in environ.items() if not name.startswith("HOROVOD_")}
    return _run(_TWO_RANKS, clean | {"OMP_NUM_THREADS": "1"}, last_lines=5)[1]


def _run(script: str, environ: Mapping[str, str], last_lines: int) -> tuple[str, str]:
    """Run a Python script for at most CHECK_S; return its output, and the last lines of it and its errors if it failed.

    Whatever it started in its session is gone afterwards. Horovod's ranks have sessions of their own, and end with it.
    """
    command = [sys.executable, "-P", "-c", script]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=CHECK_S)
        except subprocess.TimeoutExpired:
            return "", f"not done within {CHECK_S} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = (output + errors).strip().splitlines() or [f"it ends the process with {process.returncode}"]
    return output, " | ".join(lines[-last_lines:]) if process.returncode else ""
