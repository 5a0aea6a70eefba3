"""Which rank this process is, as its launcher told it through the environment.

Recognised, in this order: fastdistil's own launcher, torchrun, horovodrun, mpirun (Open MPI; MPICH, Intel MPI; a Kubernetes
MPIJob is one of them), Slurm's srun, and the bare variables RANK, WORLD_SIZE, MASTER_ADDR (Kubernetes PyTorchJob and others).
"""

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fastdistil.errors import UserError

Launcher = Literal["fastdistil", "torchrun", "horovodrun", "mpirun", "slurm", "environment"]

# Below the range from which Linux gives ports to clients (32768 on), so that they are rarely taken.
FIRST_PORT, PORTS = 20000, 10000
# Slurm numbers the batch script and an interactive shell like steps, from the top: neither is one of srun's ranks.
_SLURM_SHELLS = frozenset({"4294967290", "4294967291"})
# Set for each rank by one launcher or another: a launcher of ranks must not pass on its own.
RANK_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|FASTDISTIL_LAUNCHER"
    r"|FASTDISTIL_LAUNCHER_PID|FASTDISTIL_STORE_SECRET|TORCHELASTIC_.*|HOROVOD_(RANK|SIZE|LOCAL_RANK|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE)"
    r"|OMPI_COMM_WORLD_.*|PMI_RANK|PMI_SIZE|MPI_LOCALRANKID|MPI_LOCALNRANKS)"
)


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One rank among `size`, on node `cross_rank` of `cross_size`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    launcher: Launcher
    address: str | None
    """Host of rank 0, as the others reach it; None: known to the launcher's library alone (horovodrun, mpirun on several
    nodes)."""
    port: int | None
    """On `address`: where the ranks' store is, or is to be."""
    serve_store: bool = True
    """Whether rank 0 is to serve the store at `port`; False: the launcher does already."""
    secret: str = field(default="", repr=False)
    """What only this run's ranks have: their store takes no other's word. Empty: the launcher gave them none."""
    attempt: str = ""
    """Prefix of all keys in a store that outlives the ranks: torchrun starts them again (--max-restarts) with the same one."""

    def __post_init__(self) -> None:
        for name, rank, size in (
            ("rank", self.rank, self.size),
            ("local rank", self.local_rank, self.local_size),
            ("node", self.cross_rank, self.cross_size),
        ):
            if not 0 <= rank < size:
                raise UserError(
                    f"{self.launcher} started this process as {name} {rank} of {size}; wanted 0 to {size - 1}: look at what "
                    "sets these variables"
                )


def environment_of_no_rank(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a process that a rank starts and that is none: without what told the rank its place."""
    return {name: value for name, value in environ.items() if not RANK_VARIABLES.fullmatch(name)}


def find_rank_info(environ: Mapping[str, str] = os.environ) -> RankInfo | None:
    """This process's place, or None if nobody started it as a rank. Raises UserError that names the variable at fault."""
    place = _find_place(environ)
    return place and replace(place, secret=environ.get("FASTDISTIL_STORE_SECRET", ""))


def _find_place(environ: Mapping[str, str]) -> RankInfo | None:
    if environ.get("FASTDISTIL_LAUNCHER") == "fastdistil":
        return _from_torch_names(environ, "fastdistil")
    if "TORCHELASTIC_RUN_ID" in environ:
        return _from_torch_names(environ, "torchrun")
    if "HOROVOD_RANK" in environ:
        return _from_horovodrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpirun(environ, *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    # srun sets the first two as well; the others are those of MPICH's and Intel's mpirun.
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        return _from_mpirun(environ, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "4294967291") not in _SLURM_SHELLS:
        return _from_slurm(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torch_names(environ, "environment")
    return None


def _from_torch_names(environ: Mapping[str, str], launcher: Launcher) -> RankInfo:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    # Without LOCAL_RANK every rank has a node for itself, as the pods of a PyTorchJob.
    local_rank = _number(environ, "LOCAL_RANK", 0)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", None if "LOCAL_RANK" in environ else 1)
    address, port = _store_address(environ, None, None)
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if size > 1 and (address is None or port is None):
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        raise UserError(f"RANK and WORLD_SIZE={size} are set, {missing} is not; set it to where rank 0 is reached")
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        cross_rank=_number(environ, "GROUP_RANK", rank // local_size if local_size else 0),
        cross_size=_number(environ, "GROUP_WORLD_SIZE", -(-size // local_size) if local_size else 1),
        launcher=launcher,
        address=address,
        port=port,
        serve_store=not served,
        attempt=f"attempt-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if served else "",
    )


def _from_horovodrun(environ: Mapping[str, str]) -> RankInfo:
    address, port = _store_address(environ, None, None)
    return RankInfo(
        rank=_number(environ, "HOROVOD_RANK"),
        size=_number(environ, "HOROVOD_SIZE"),
        local_rank=_number(environ, "HOROVOD_LOCAL_RANK"),
        local_size=_number(environ, "HOROVOD_LOCAL_SIZE"),
        cross_rank=_number(environ, "HOROVOD_CROSS_RANK"),
        cross_size=_number(environ, "HOROVOD_CROSS_SIZE"),
        launcher="horovodrun",
        address=address,
        port=port,
    )


def _from_mpirun(environ: Mapping[str, str], *names: str) -> RankInfo:
    """Neither family names the node: it follows from ranks that fill one node after another, which is their default."""
    rank, size, local_rank, local_size = (_number(environ, name) for name in names)
    if local_size == 0 or size % local_size or rank % local_size != local_rank:
        raise UserError(
            f"mpirun placed rank {rank} of {size} as {local_rank} of {local_size} on its node; wanted as many ranks on every "
            "node, one node filled after another: use --map-by slot and equal slots"
        )
    alone = local_size == size
    job = next((environ[name] for name in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_KVS") if name in environ), "")
    address, port = _store_address(environ, "127.0.0.1" if alone else None, _derived_port(job) if alone else None)
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        cross_rank=rank // local_size,
        cross_size=size // local_size,
        launcher="mpirun",
        address=address,
        port=port,
    )


def _from_slurm(environ: Mapping[str, str]) -> RankInfo:
    """The step's own numbers where srun gives them: a step may be smaller than its job."""

    def named(*names: str) -> str:
        return next((name for name in names if name in environ), names[-1])

    size_name, nodes_name = named("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), named("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    size, nodes, node = _number(environ, size_name), _number(environ, nodes_name), _number(environ, "SLURM_NODEID")
    tasks_name = named("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    tasks = expand_counts(environ.get(tasks_name, ""), tasks_name)
    if len(tasks) == 1 and nodes > 1:
        tasks *= nodes  # SLURM_NTASKS_PER_NODE is one number for all
    if len(tasks) != nodes or not 0 <= node < nodes:
        raise UserError(
            f"Slurm says {nodes_name}={nodes}, SLURM_NODEID={node}, {tasks_name}={environ.get(tasks_name)!r}; wanted a count "
            "of ranks for each node: start the ranks with srun --ntasks-per-node=N"
        )
    list_name = named("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    first = next(expand_hosts(environ.get(list_name, ""), list_name), None)
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    address, port = _store_address(environ, "127.0.0.1" if nodes == 1 else first, _derived_port(step))
    return RankInfo(
        rank=_number(environ, "SLURM_PROCID"),
        size=size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=tasks[node],
        cross_rank=node,
        cross_size=nodes,
        launcher="slurm",
        address=address,
        port=port,
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        got = "it is not set" if text is None else f"got {text!r}"
        raise UserError(
            f"this process was started as one rank of several: {name} must be a number, {got}; set or unset them all"
        )
    return int(text)


def _store_address(environ: Mapping[str, str], address: str | None, port: int | None) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT where they are set: the user's word counts."""
    if environ.get("MASTER_PORT"):
        port = _number(environ, "MASTER_PORT")
        if not 0 < port < 65536:
            raise UserError(f"MASTER_PORT must be a port, 1 to 65535, got {port}")
    return environ.get("MASTER_ADDR") or address, port


def _derived_port(job: str) -> int:
    """The same for all ranks of a job, and another for the next one."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def expand_counts(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Slurm's counts per node: "2(x3),1" is [2, 2, 2, 1]. Raises UserError."""
    counts: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"{name}={text!r} is not a list of counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_hosts(text: str, name: str = "SLURM_JOB_NODELIST") -> Iterator[str]:
    """Slurm's host lists, in order: "node[01-03,7],gpu5" is node01, node02, node03, node7, gpu5. Raises UserError."""
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text:
        raise UserError(f"{name}={text!r} is not a host list such as node[01-03,7],gpu5")
    for part in parts:
        yield from _expand_brackets(part, f"{name}={text!r}")


def _expand_brackets(part: str, where: str) -> Iterator[str]:
    head, bracket, remainder = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, tail = remainder.partition("]")
    for piece in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if match is None:
            raise UserError(f"{where}: {piece!r} is not a number or a range such as 01-03")
        first, last = match[1], match[2] or match[1]
        for number in range(int(first), int(last) + 1):
            for end in _expand_brackets(tail, where):
                yield f"{head}{number:0{len(first)}d}{end}"
