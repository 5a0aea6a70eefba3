"""Ranks until they have met, and how they leave: who never comes, dies, stands still, loads for long, or differs."""

import re
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from fastdistil.distributed.rendezvous import own_address
from fastdistil.errors import UserError
from tests.distributed.conftest import Start


class Joined(NamedTuple):
    code: int
    said: str


# Each program goes through what `fastdistil train` does before it trains, and says how that ended.
JOINED = """
import os, signal, sys, time
import torch
from fastdistil.distributed import coordinator, horovod_world, rendezvous
from fastdistil.errors import FastdistilError
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe

place = find_rank_info(os.environ)
settings = ["device=cpu", "data.train=none", "teacher.path=none", "world.timeout_s=6", f"world.engine={sys.argv[1]}"]
PLANT
try:
    with coordinator.joined(place, load_recipe("distilbert", settings), print) as joined:
        print("met", flush=True)
AFTER
except FastdistilError as error:
    print(error, flush=True)
    os._exit(error.exit_code)
"""


def join_ranks(
    start_ranks: Start,
    tmp_path: Path,
    plant: str,
    ranks: int,
    engine: str,
    port: int | None = None,
    after: str = "",
) -> list[Joined]:
    program = tmp_path / "program.py"
    inside = "".join(f"        {line}\n" for line in after.splitlines())
    program.write_text(JOINED.replace("PLANT", plant).replace("AFTER\n", inside))
    processes = start_ranks([sys.executable, str(program), engine], ranks, port)
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        ended.append(Joined(process.returncode, out + err))
    return ended


def test_ranks_that_never_come_are_named(start_ranks: Start, tmp_path: Path) -> None:
    ended = join_ranks(start_ranks, tmp_path, "if place.rank == 1: sys.exit(0)", 3, "torch")
    for rank in (0, 2):
        assert ended[rank].code == 12, ended[rank].said
        assert re.search(r"rank 1 is silent for \d+ s \(not started, killed", ended[rank].said), ended[rank].said


@pytest.mark.parametrize("on", [0, 1])
def test_a_rank_that_dies_while_the_engine_starts_is_named(
    engine: str,
    on: int,
    start_ranks: Start,
    tmp_path: Path,
) -> None:
    """They have met, and one is gone before the engine has connected it."""
    plant = f"""
def die(place):
    if place.rank == {on}:
        os.kill(os.getpid(), signal.SIGKILL)
coordinator.choose_interface = horovod_world.choose_interface = die
"""
    ended = join_ranks(start_ranks, tmp_path, plant, 3, engine)
    for rank in {0, 1, 2} - {on}:
        assert ended[rank].code == 12, ended[rank].said
        assert f"rank {on} " in ended[rank].said and "Traceback" not in ended[rank].said, ended[rank].said


def test_a_rank_that_stands_still_before_all_have_met_is_named(start_ranks: Start, tmp_path: Path) -> None:
    """Rank 0, which serves the store: the others are in a call that never returns."""
    plant = f"""
open_store = coordinator.open_store
def stop(*given):
    connect, connected = open_store(*given), {str(tmp_path / "connected")!r}
    if place.rank == 1:
        open(connected, "w").close()
    while not os.path.exists(connected):
        time.sleep(0.01)
    if place.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return connect
coordinator.open_store = stop
"""
    program = tmp_path / "program.py"
    program.write_text(JOINED.replace("PLANT", plant).replace("AFTER\n", ""))
    stopped, other = start_ranks([sys.executable, str(program), "torch"], 2)
    out, err = other.communicate(timeout=60)
    assert other.returncode == 12 and "rank 0" in out + err, out + err
    assert stopped.poll() is None  # it was not its end that told


def test_another_program_on_the_port_is_no_reason_to_wait_for_ever(
    start_ranks: Start,
    tmp_path: Path,
) -> None:
    """Rank 0 cannot serve there; the others are connected to somebody who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        first, second = join_ranks(start_ranks, tmp_path, "rendezvous.ANSWER_S = 1", 2, "torch", port)
    assert first.code == 2 and f"127.0.0.1:{port}: Address already in use" in first.said
    assert second.code == 12 and f"127.0.0.1:{port} does not answer as rank 0 does" in second.said


def test_ranks_leave_when_rank_0_has_saved(start_ranks: Start, tmp_path: Path) -> None:
    """A launcher that sees one rank end kills the others. Rank 0's save takes longer than the timeout, too."""
    saved = tmp_path / "saved"
    after = f"""
if place.rank == 0:
    with joined.unhurried("checkpoint"):
        time.sleep(8)
        open({str(saved)!r}, "w").close()
else:
    import atexit
    atexit.register(lambda: print("saved" if os.path.exists({str(saved)!r}) else "not yet", flush=True))
from fastdistil.errors import Stopped
raise Stopped("SIGTERM: saved")
"""
    plant = "leave, os._exit = os._exit, sys.exit"  # so that what is registered is heard
    first, second = join_ranks(start_ranks, tmp_path, plant, 2, "torch", after=after)
    assert (first.code, second.code) == (75, 75), (first.said, second.said)
    assert second.said.splitlines()[-1] == "saved"


@pytest.mark.slow
def test_ring_processes_may_load_for_longer_than_the_timeout(
    horovod: None,
    start_ranks: Start,
    tmp_path: Path,
) -> None:
    slowly = """
if place.rank == 1:
    later = "import time; time.sleep(9); from fastdistil.distributed import horovod_world as world; world._ring_main()"
    horovod_world._RING_COMMAND = (sys.executable, "-c", later)
settings += ["world.rings=2"]
"""
    for ended in join_ranks(start_ranks, tmp_path, slowly, 2, "horovod"):
        assert ended.code == 0 and "met" in ended.said, ended.said


def test_a_rank_may_load_for_longer_than_the_timeout(start_ranks: Start, tmp_path: Path) -> None:
    after = """
with joined.unhurried("loading"):
    time.sleep(9 if place.rank == 1 else 0)
joined.require_equal({"corpus": "the same"})
print("equal", flush=True)
"""
    for ended in join_ranks(start_ranks, tmp_path, "", 2, "torch", after=after):
        assert ended.code == 0 and "equal" in ended.said, ended.said


def test_other_threads_on_another_rank_are_refused(start_ranks: Start, tmp_path: Path) -> None:
    for ended in join_ranks(start_ranks, tmp_path, "torch.set_num_threads(1 + place.rank)", 2, "torch"):
        assert ended.code == 2
        assert "another number of threads (OMP_NUM_THREADS) on rank 1 than on rank 0" in ended.said, ended.said


def test_a_name_that_leads_other_nodes_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", {"node7": "127.0.1.1", "127.0.0.1": "127.0.0.1"}.__getitem__)
    with pytest.raises(
        UserError,
        match=r"node7 is 127\.0\.1\.1 on its own machine \(/etc/hosts\).*set MASTER_ADDR",
    ):
        own_address("node7", nodes=2)
    assert own_address("node7", nodes=1) == "127.0.1.1"  # there are no others
    assert own_address("127.0.0.1", nodes=2) == "127.0.0.1"  # somebody asked for it
