"""What only Horovod does: its cycles, its threads, the processes of its rings, and connections that mpirun makes."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdistil.distributed import horovod_world
from fastdistil.distributed.coordinator import join
from fastdistil.errors import RankLost
from fastdistil.recipe import WorldOptions as Options
from tests.distributed.conftest import CPU, Start, place

IDLES = """
import os, sys, time
import torch
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import WorldOptions as Options
from fastdistil.distributed.coordinator import join

world = join(find_rank_info(os.environ), Options(engine="horovod", timeout_s=60), torch.device("cpu"))
world.barrier()
time.sleep(2)
assert world.sum([world.rank + 1], "sum") == [3]
world.close()
"""


def test_horovod_with_nothing_to_send_leaves_the_cores_alone(
    horovod: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_ranks: Callable[..., list[str]]
) -> None:
    """Its own timeline tells when ranks coordinate: in two seconds 200 times at its cycle of 10 ms."""
    timeline = tmp_path / "timeline.json"
    monkeypatch.setenv("HOROVOD_TIMELINE", str(timeline))
    monkeypatch.setenv("HOROVOD_TIMELINE_MARK_CYCLES", "1")
    run_ranks(IDLES, 2)
    assert 10 <= timeline.read_text().count("CYCLE_START") < 100


ENQUEUES = """
import os, signal, threading
import torch
from fastdistil.errors import RankLost
from fastdistil.distributed.monitor import Monitor
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import WorldOptions as Options
from fastdistil.distributed.coordinator import join

place = find_rank_info(os.environ)
def met(connect):
    return Monitor(connect(), place.rank, place.size, timeout_s=20)
world = join(place, Options(engine="horovod", timeout_s=20), torch.device("cpu"), met)
world.barrier()
if place.rank == 1:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
handles = []
try:
    while True:
        handles += [world.allreduce(torch.ones(100), name=f"{len(handles)}.{i}") for i in range(100)]
except RankLost as error:
    print(error, flush=True)
    os._exit(error.exit_code)
"""


def test_a_rank_that_enqueues_hears_of_a_lost_one(horovod: None, start_ranks: Start, tmp_path: Path) -> None:
    """Horovod gives up what was enqueued on a thread of its own, and tensors need the interpreter's lock to go."""
    program = tmp_path / "program.py"
    program.write_text(ENQUEUES)
    survivor, lost = start_ranks([sys.executable, str(program)], 2)
    out, err = survivor.communicate(timeout=60)
    assert lost.wait(60) == -signal.SIGKILL
    # Where Horovod waits for its dead peer instead, the monitor ends the process, and says why on standard error.
    assert survivor.returncode == 12 and "rank 1 " in out + err, out + err


@pytest.mark.parametrize("step", ["init", "broadcast_"])
def test_an_engine_that_mpirun_connects_and_that_fails_is_a_lost_rank(
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Connection reset by peer")

    engine = SimpleNamespace(**{"init": lambda: None, "broadcast_": lambda *_, **__: None, step: fail})
    monkeypatch.setattr(horovod_world, "import_horovod", lambda: engine)
    monkeypatch.setattr(horovod_world, "_set_horovod", lambda *_: None)
    with pytest.raises(RankLost, match="rank 1 could not finish its connections: Connection reset by peer"):
        join(place(rank=1, address=None, port=None), Options(engine="horovod"), CPU)


# A ring's process: it has loaded once its rank is known to be unhurried, and connects once all ranks are ready.
STAND_IN_RING = """
import json, os, socket, sys, time

def wait_for(name):
    until = time.monotonic() + 20
    while not os.path.exists(os.path.join(sys.argv[1], name)):
        if time.monotonic() > until:
            sys.exit(f"waited in vain for {name}")
        time.sleep(0.01)

sockets = [socket.socket(fileno=number) for number in json.loads(os.environ["FASTDISTIL_RING_SOCKETS"])]
for step in ("unhurried", "ready"):
    wait_for(step)
    for each in sockets:
        each.send(b"{}")
    for each in sockets:
        each.recv(1000)
"""


def test_ring_processes_load_unhurried_and_connect_once_all_have_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        waiting = staticmethod(nullcontext)

        @contextmanager
        def unhurried(self, _: str) -> Iterator[None]:
            (tmp_path / "unhurried").touch()
            yield

        def check(self) -> None: ...

        def lost(self, error: BaseException) -> RankLost:
            return RankLost(str(error))

    def allreduce(tensor: torch.Tensor, **_: object) -> torch.Tensor:
        (tmp_path / "ready").touch()
        return tensor

    engine = SimpleNamespace(
        Sum=None,
        allreduce_async_=allreduce,
        poll=lambda _: True,
        synchronize=lambda tensor: tensor,
        shutdown=lambda: None,
    )
    store: dict[str, bytes] = {}
    connection = SimpleNamespace(
        set=lambda key, value: store.update({key: value.encode()}),
        get=store.__getitem__,
    )
    monkeypatch.setattr(horovod_world, "_serve_rendezvous", lambda *_: 1)
    monkeypatch.setattr(horovod_world, "_RING_COMMAND", (sys.executable, "-c", STAND_IN_RING, str(tmp_path)))
    ranks = horovod_world.HorovodWorld(
        place(), CPU, Options(engine="horovod", rings=2), lambda: connection, engine, [], Recorder()
    )
    ranks.close()
