"""Every launcher's environment, as it sets it, and what is wrong with half of one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest

from fastdistil.distributed.rank_info import RankInfo, environment_of_no_rank, expand_counts, expand_hosts, find_rank_info
from fastdistil.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
HOROVODRUN = {
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "node[08-09]",
}
ALL = {
    "fastdistil": {**TORCH, "FASTDISTIL_LAUNCHER": "fastdistil"},
    "torchrun": {**TORCH, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    "horovodrun": HOROVODRUN,
    "mpirun": OPEN_MPI,
    "slurm": SLURM,
    "environment": TORCH,
}


def rank_info_of(environ: dict[str, str]) -> RankInfo:
    place = find_rank_info(environ)
    assert place is not None
    return place


@pytest.mark.parametrize("launcher", ALL)
def test_every_launcher_is_recognised(launcher: str) -> None:
    place = rank_info_of(ALL[launcher])
    assert place.launcher == launcher
    assert (place.rank, place.size, place.local_rank, place.local_size) == (3, 4, 1, 2)
    assert (place.cross_rank, place.cross_size) == (1, 2)
    assert place.serve_store == (launcher != "torchrun")
    assert (place.attempt == "") == place.serve_store


def test_where_rank_0_is() -> None:
    assert (rank_info_of(TORCH).address, rank_info_of(TORCH).port) == ("a", 29500)
    for launcher in ("horovodrun", "mpirun"):
        assert (rank_info_of(ALL[launcher]).address, rank_info_of(ALL[launcher]).port) == (None, None)
    slurm = rank_info_of(SLURM)
    assert slurm.address == "node08"
    assert slurm.port is not None and 20000 <= slurm.port < 30000
    assert rank_info_of({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).port == slurm.port
    assert rank_info_of({**SLURM, "SLURM_JOB_ID": "4712"}).port != slurm.port


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun", "slurm"])
def test_the_user_may_say_where_rank_0_is(launcher: str) -> None:
    place = rank_info_of({**ALL[launcher], "MASTER_ADDR": "there", "MASTER_PORT": "7"})
    assert (place.address, place.port) == ("there", 7)


def test_mpich_and_intel() -> None:
    place = rank_info_of(MPICH)
    assert (place.launcher, place.rank, place.size, place.local_rank, place.cross_rank) == ("mpirun", 3, 4, 1, 1)


def test_one_node_needs_no_address() -> None:
    mpi = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "PMIX_NAMESPACE": "12"}
    assert rank_info_of(mpi).address == "127.0.0.1"
    assert rank_info_of(mpi).port == rank_info_of({**mpi, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}).port
    slurm = {**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3"}
    assert rank_info_of(slurm).address == "127.0.0.1"


@pytest.mark.parametrize("launcher", ALL)
def test_the_stores_secret_comes_from_the_environment_and_goes_no_further(launcher: str) -> None:
    environ = {**ALL[launcher], "FASTDISTIL_STORE_SECRET": "s3cr3t"}
    assert rank_info_of(environ).secret == "s3cr3t" and rank_info_of(ALL[launcher]).secret == ""
    assert "s3cr3t" not in repr(rank_info_of(environ))
    assert "FASTDISTIL_STORE_SECRET" not in environment_of_no_rank(environ)


def test_nobody_started_this_process_as_a_rank() -> None:
    assert find_rank_info({}) is None
    assert find_rank_info({"MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0"}) is None
    in_salloc = {name: value for name, value in SLURM.items() if name not in ("SLURM_PROCID", "SLURM_STEP_ID")}
    assert find_rank_info(in_salloc) is None
    batch_script = {**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    del batch_script["SLURM_STEP_ID"]
    assert find_rank_info(batch_script) is None
    for shell in ("4294967290", "4294967291"):
        assert find_rank_info({**batch_script, "SLURM_STEP_ID": shell}) is None


def test_launchers_inside_launchers() -> None:
    assert rank_info_of({**SLURM, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "8"}).launcher == "mpirun"
    assert rank_info_of({**SLURM, **ALL["torchrun"]}).launcher == "torchrun"
    assert rank_info_of({**SLURM, **ALL["fastdistil"]}).launcher == "fastdistil"
    # srun with its PMI plugin sets these, but not mpirun's others.
    assert rank_info_of({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}).launcher == "slurm"


def test_slurm_steps_smaller_than_their_job() -> None:
    step = {
        **SLURM,
        "SLURM_NTASKS": "16",
        "SLURM_NNODES": "4",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "3,2",
        "SLURM_STEP_NODELIST": "gpu5,node[1-3]",
    }
    place = rank_info_of({**step, "SLURM_PROCID": "4"})
    assert (place.rank, place.size, place.local_size, place.cross_size, place.address) == (4, 5, 2, 2, "gpu5")
    per_node = {**SLURM, "SLURM_NTASKS_PER_NODE": "2"}
    del per_node["SLURM_TASKS_PER_NODE"]
    assert rank_info_of(per_node).local_size == 2


def test_a_pod_of_its_own_for_every_rank() -> None:
    place = rank_info_of({"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"})
    assert (place.local_rank, place.local_size, place.cross_rank, place.cross_size) == (0, 1, 2, 3)


def test_one_rank_is_one_rank() -> None:
    place = rank_info_of({"RANK": "0", "WORLD_SIZE": "1"})
    assert (place.size, place.address) == (1, None)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT"),
        ({**TORCH, "RANK": "4"}, "rank 4 of 4"),
        ({**TORCH, "RANK": "one"}, "RANK must be a number, got 'one'"),
        ({**TORCH, "RANK": "-1"}, "RANK must be a number, got '-1'"),
        ({**TORCH, "WORLD_SIZE": ""}, "WORLD_SIZE must be a number, got ''"),
        ({**TORCH, "MASTER_PORT": "99999"}, "MASTER_PORT"),
        ({**TORCH, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({k: v for k, v in TORCH.items() if k != "LOCAL_WORLD_SIZE"}, "LOCAL_WORLD_SIZE"),
        ({**TORCH, "LOCAL_WORLD_SIZE": "0"}, "local rank 1 of 0"),
        ({"HOROVOD_RANK": "0"}, "HOROVOD_SIZE"),
        ({**HOROVODRUN, "HOROVOD_CROSS_RANK": "2"}, "node 2 of 2"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "--map-by slot"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "5"}, "--map-by slot"),
        ({**MPICH, "PMI_SIZE": "x"}, "PMI_SIZE"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_NTASKS"}, "SLURM_NTASKS"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2,2,2"}, "SLURM_TASKS_PER_NODE"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "many"}, "SLURM_TASKS_PER_NODE"),
        ({**SLURM, "SLURM_JOB_NODELIST": "node[1-"}, "SLURM_JOB_NODELIST"),
        ({**SLURM, "SLURM_PROCID": "4"}, "rank 4 of 4"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        find_rank_info(environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("gpu5", ["gpu5"]),
        ("node[01-03,7],gpu5", ["node01", "node02", "node03", "node7", "gpu5"]),
        ("a[1-2]b[09-10]", ["a1b09", "a1b10", "a2b09", "a2b10"]),
        ("n[098-101].x,m", ["n098.x", "n099.x", "n100.x", "n101.x", "m"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize("text", ["a[1-2", "a]", "a[x]", "a[]", ",a", "a,,b"])
def test_host_lists_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST"):
        list(expand_hosts(text))


def test_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("") == []


PROGRAM = "import os; from fastdistil.distributed.rank_info import find_rank_info; print(find_rank_info(os.environ))"


def test_torchrun_itself() -> None:
    """Not what its documentation says but what it sets: two real ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"RankInfo(rank={rank}, size=2, local_rank={rank}, local_size=2, cross_rank=0, cross_size=1," in done.stdout
    assert done.stdout.count("launcher='torchrun'") == 2


RESTARTED = """
import os, signal, sys
from pathlib import Path
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe
from fastdistil.distributed.coordinator import joined

died = Path(sys.argv[1])
settings = ["device=cpu", "data.train=none", "teacher.path=none", "world.timeout_s=60", "world.engine=torch"]
with joined(find_rank_info(), load_recipe("distilbert", settings), print) as team:
    if not died.exists():
        team.world.barrier()
        if team.world.rank == 1:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    total = team.world.sum([team.world.rank + 1], "numbers")
    os.write(1, f"sum {total}\\n".encode())  # at once: the other rank writes there too
"""


def test_torchrun_starts_ranks_again(tmp_path: Path) -> None:
    """Its agent's store keeps what the first attempt's ranks said in it: where they listen, and that one is lost."""
    (tmp_path / "program.py").write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "program.py"), str(tmp_path / "died")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (tmp_path / "died").exists(), done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum [3]") == 2


def test_mpirun_itself(need: Callable[[str, str], Never]) -> None:
    if shutil.which("mpirun") is None:
        need("mpi", "no mpirun on this machine; on Debian: apt install openmpi-bin")
    done = subprocess.run(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"RankInfo(rank={rank}, size=2, local_rank={rank}, local_size=2, cross_rank=0, cross_size=1," in done.stdout
    assert done.stdout.count("launcher='mpirun', address='127.0.0.1'") == 2
