"""Real ranks: processes on this machine, each told its place as a launcher does."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastdistil.distributed.rank_info import RankInfo
from fastdistil.recipe import Recipe
from tests.distributed.driver import DRIVER, Ended
from tests.fork_server import ForkedProcess, ForkServer

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")

Start = Callable[..., list[ForkedProcess]]
RunRanks = Callable[..., list[str]]


@pytest.fixture
def reserve_port() -> Iterator[Callable[[], int]]:
    """reserve_port() -> a port of 127.0.0.1 that nobody is given before the test ends, and that a rank 0 can listen at.

    It stays bound here. The kernel gives a bound port to nobody who leaves the choice to it, and lets another socket that has
    SO_REUSEADDR, as every server has, bind and listen there as long as this one does not listen.
    """
    with contextlib.ExitStack() as stack:

        def reserve() -> int:
            holder = stack.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            return int(holder.getsockname()[1])

        yield reserve


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    names |= {"GROUP_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {
        **os.environ,
        **{name: str(value) for name, value in names.items()},
        "MASTER_ADDR": "127.0.0.1",
        "FASTDISTIL_LAUNCHER": "fastdistil",
        "FASTDISTIL_STORE_SECRET": "0123456789abcdef",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }


def place(
    rank: int = 0,
    size: int = 2,
    port: int | None = 29501,
    address: str | None = "127.0.0.1",
) -> RankInfo:
    """Return a rank's place as mpirun tells it."""
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        cross_rank=0,
        cross_size=1,
        launcher="mpirun",
        address=address,
        port=port,
    )


@pytest.fixture
def start_ranks(fork_server: ForkServer, reserve_port: Callable[[], int]) -> Iterator[Start]:
    """start_ranks([sys.executable, script, ...], ranks) -> processes; all of them are gone when the test ends."""
    started: list[ForkedProcess] = []

    def start(command: list[str], ranks: int, port: int | None = None) -> list[ForkedProcess]:
        port = port or reserve_port()
        processes = [fork_server.popen(command, rank_environment(rank, ranks, port)) for rank in range(ranks)]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def run_ranks(start_ranks: Start, tmp_path: Path) -> RunRanks:
    """run_ranks(program, ranks, *arguments) -> what each rank printed. Fails if one does not end well."""

    def run(program: str, ranks: int, *arguments: object, timeout_s: float = 120) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(program)
        processes = start_ranks([sys.executable, str(path), *map(str, arguments)], ranks)
        ended = [process.communicate(timeout=timeout_s) for process in processes]
        for rank, (process, (_, err)) in enumerate(zip(processes, ended, strict=True)):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}: {err[-3000:]}"
        return [out for out, _ in ended]

    return run


@pytest.fixture
def train_ranks(start_ranks: Start, tmp_path: Path) -> Callable[..., list[Ended]]:
    """Runs a recipe on several ranks, one of which meets something; (exit code, standard error) by rank."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(
        recipe: Recipe,
        ranks: int,
        how: str = "",
        at: int = 0,
        on: int = 1,
        resume: str = "",
    ) -> list[Ended]:
        path = tmp_path / "asked.yaml"
        path.write_text(recipe.to_yaml())
        processes = start_ranks(
            [sys.executable, str(driver), str(path), how, str(at), str(on), resume],
            ranks,
        )
        ended: dict[int, str] = {}
        for rank, process in enumerate(processes):
            if not (how == "STOP" and rank == on):
                ended[rank] = process.communicate(timeout=120)[1]
        for rank, process in enumerate(processes):
            if rank not in ended:
                assert process.poll() is None
                process.kill()
                ended[rank] = process.communicate()[1]
        return [(process.returncode, ended[rank]) for rank, process in enumerate(processes)]

    return run


@pytest.fixture(params=["torch", "horovod"])
def engine(request: pytest.FixtureRequest, need: Callable[[str, str], None]) -> str:
    if request.param == "horovod":
        require_horovod(need)
    return str(request.param)


def require_horovod(need: Callable[[str, str], None]) -> None:
    try:
        import horovod  # noqa: F401
    except ImportError:
        need("horovod", "Horovod is not installed; build it with `make horovod`")


@pytest.fixture
def horovod(need: Callable[[str, str], None]) -> None:
    require_horovod(need)
