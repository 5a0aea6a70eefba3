"""The engines, with real ranks: what arrives, what is counted, what is refused."""

import json
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from fastdistil.distributed import horovod_world
from fastdistil.distributed.coordinator import join
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.rendezvous import own_address
from fastdistil.distributed.world import Handle, World, sent_bytes
from fastdistil.errors import RankLost, UserError
from fastdistil.recipe import WorldOptions as Options
from tests.distributed.conftest import Start


class Joined(NamedTuple):
    code: int
    said: str


PROGRAM = """
import json, os, sys
import torch
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import WorldOptions as Options
from fastdistil.distributed.coordinator import join

engine, rings = sys.argv[1], int(sys.argv[2])
world = join(find_rank_info(os.environ), Options(engine=engine, rings=rings, timeout_s=60), torch.device("cpu"))
rank, size = world.rank, world.size
found = {"engine": world.engine, "rank": rank, "size": size}

# Several at once, on every ring, twice under the same names; from buffers of the world and from foreign memory.
buffers = [world.empty(1000 + i, torch.float32 if i % 2 else torch.float64) for i in range(2 * rings)]
foreign = torch.full((77,), float(rank))
for repeat in range(2):
    for i, buffer in enumerate(buffers):
        buffer.copy_(torch.arange(len(buffer)) * (rank + 1) + i + repeat)
    handles = [world.allreduce(buffer, name=f"b{i}", ring=i % rings) for i, buffer in enumerate(buffers)]
    sums = [world.wait(handle) for handle in handles]
    for i, (buffer, summed) in enumerate(zip(buffers, sums)):
        assert summed.data_ptr() == buffer.data_ptr()
        wanted = torch.arange(len(buffer)) * sum(range(1, size + 1)) + size * (i + repeat)
        assert torch.equal(buffer, wanted.to(buffer.dtype)), (i, repeat)
world.wait(world.allreduce(foreign, name="foreign", ring=rings - 1))
assert foreign.eq(sum(range(size))).all()

def collect(name, tensor):
    return world.wait(getattr(world, name)(tensor, name=name, ring=rings - 1)).tolist()

found["all_to_all"] = collect("all_to_all", torch.arange(3 * size, dtype=torch.uint8) + 100 * rank)
found["all_gather"] = collect("all_gather", torch.tensor([rank, 7], dtype=torch.uint8))
found["fp16"] = world.wait(world.allreduce(torch.full((3,), rank + 0.5).half(), name="fp16")).tolist()
found["bf16"] = world.wait(world.allreduce(torch.full((3,), rank + 0.5).bfloat16(), name="bf16")).tolist()
counted = world.counters.copy()
found["counters"] = [counted.gradient_collectives, counted.ring_bytes, counted.control_messages]

broadcasts = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool):
    value = torch.full((5,), rank + 1).to(dtype)
    world.broadcast(value, f"broadcast.{dtype}", root=size - 1)
    broadcasts[str(dtype)] = value.double().tolist()
found["broadcasts"] = broadcasts
found["sum"] = world.sum([rank, 2**40, -1], "sum")
found["gather"] = world.gather([rank / 3, 5.0], "gather")
found["text"] = world.broadcast_bytes("größer".encode() if rank == 0 else b"", "text").decode()
found["empty"] = world.broadcast_bytes(b"", "nothing").decode()
world.move(torch.empty(0), "nothing", source=1, target=0)
world.barrier()
found["control"] = [world.counters.control_messages, world.counters.control_bytes]
print(json.dumps(found))
world.close()
"""


@pytest.mark.parametrize(("rings", "ranks"), [(1, 2), (3, 2), (2, 3)])
def test_collectives(engine: str, rings: int, ranks: int, run_ranks: Callable[..., list[str]]) -> None:
    everyone = [json.loads(out.splitlines()[-1]) for out in run_ranks(PROGRAM, ranks, engine, rings)]
    for rank, report in enumerate(everyone):
        assert (report["engine"], report["rank"], report["size"]) == (engine, rank, ranks)
        assert report["all_to_all"] == [100 * other + 3 * rank + i for other in range(ranks) for i in range(3)]
        assert report["all_gather"] == [value for other in range(ranks) for value in (other, 7)]
        assert report["fp16"] == report["bf16"] == [sum(other + 0.5 for other in range(ranks))] * 3
        for dtype, values in report["broadcasts"].items():
            assert values == [1.0 if dtype == "torch.bool" else float(ranks)] * 5, dtype
        assert report["sum"] == [sum(range(ranks)), ranks * 2**40, -ranks]
        assert report["gather"] == [[other / 3, 5.0] for other in range(ranks)]
        assert report["text"] == "größer" and report["empty"] == ""
        collectives, ring_bytes, control = report["counters"]
        # 2 x 2 rings buffers, and 5 single ones; every ring carried some.
        assert collectives == 4 * rings + 5 and len(ring_bytes) == rings and min(ring_bytes) > 0
        assert control == 0 and report["control"][0] == 3
    assert len({str(report["counters"]) for report in everyone}) == 1


TWICE = """
import os, sys
import torch
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import WorldOptions as Options
from fastdistil.distributed.coordinator import join

for port in sys.argv[2:]:
    os.environ["MASTER_PORT"] = port
    world = join(find_rank_info(os.environ), Options(engine=sys.argv[1], timeout_s=60), torch.device("cpu"))
    print(world.sum([world.rank + 1], "sum"), flush=True)
    world.close()
"""


def test_a_process_can_join_again(engine: str, run_ranks: Callable[..., list[str]], reserve_port: Callable[[], int]) -> None:
    """As a notebook does that trains twice."""
    assert run_ranks(TWICE, 2, engine, reserve_port(), reserve_port()) == ["[3]\n[3]\n"] * 2


def test_bytes_that_a_rank_sends() -> None:
    """From the algorithms: a ring allreduce passes on N-1 of N parts twice, an all-to-all keeps one part of N."""
    assert sent_bytes("allreduce", 1200, 2) == 1200
    assert sent_bytes("allreduce", 1200, 4) == 2 * 3 * 300
    assert sent_bytes("all_to_all", 1200, 4) == 3 * 300
    assert sent_bytes("all_gather", 300, 4) == 3 * 300


CPU = torch.device("cpu")


def place(rank: int = 0, size: int = 2, port: int | None = 29501, address: str | None = "127.0.0.1") -> RankInfo:
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


@pytest.mark.parametrize(
    ("rank_info", "options", "says"),
    [
        (None, {"engine": "torch"}, "one rank; start several with --np"),
        (None, {"rings": 4}, "world.rings is 4 and there is one rank"),
        (place(), {"engine": "alone"}, "mpirun started 2 ranks"),
        (place(), {"engine": "torch", "topology": "torus"}, "world.topology=torus is Horovod's"),
        (place(address=None, port=None), {"engine": "torch"}, "set MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_cannot_be_had_is_refused(rank_info: RankInfo | None, options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        join(rank_info, Options(**options), CPU)  # type: ignore[arg-type]


@pytest.mark.usefixtures("horovod")
@pytest.mark.parametrize("topology", ["torus", "hierarchical"])
def test_a_topology_that_would_silently_be_flat_is_refused(topology: str) -> None:
    with pytest.raises(UserError, match=f"world.topology={topology}.*set world.topology=flat"):
        join(place(), Options(engine="horovod", topology=topology), CPU)  # type: ignore[arg-type]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use.*MASTER_PORT"):
            join(place(port=port), Options(engine="torch"), CPU)


def test_without_horovod_the_command_that_builds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "horovod", None)
    with pytest.raises(UserError, match=r"horovod_build.*world\.engine=torch"):
        join(place(), Options(), CPU)


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
    start_ranks: Start, tmp_path: Path, plant: str, ranks: int, engine: str, port: int | None = None, after: str = ""
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
def test_a_rank_that_dies_while_the_engine_starts_is_named(engine: str, on: int, start_ranks: Start, tmp_path: Path) -> None:
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


def test_another_program_on_the_port_is_no_reason_to_wait_for_ever(start_ranks: Start, tmp_path: Path) -> None:
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


class Refuses(World):
    """Rank 1 of two, whose engine refuses every collective at its start, as Horovod does once a peer is gone."""

    def _refuse(self, *_: object) -> Handle:
        raise RuntimeError("Horovod has been shut down")

    _carry = _broadcast = _move = _refuse  # type: ignore[assignment]


COLLECTIVES: list[Callable[[World], object]] = [
    lambda ranks: ranks.allreduce(torch.ones(4), name="x"),
    lambda ranks: ranks.all_to_all(torch.ones(4), name="x"),
    lambda ranks: ranks.all_gather(torch.ones(4), name="x"),
    lambda ranks: ranks.sum([1], "x"),
    lambda ranks: ranks.gather([1.0], "x"),
    lambda ranks: ranks.sum_terms(torch.ones(2), "x"),
    lambda ranks: ranks.broadcast(torch.ones(4), "x"),
    lambda ranks: ranks.broadcast_bytes(b"x", "x"),
    lambda ranks: ranks.move(torch.ones(4), "x", source=0, target=1),
    lambda ranks: ranks.barrier("x"),
]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_collective_that_does_not_even_start_is_a_lost_rank(collective: Callable[[World], object], watched: bool) -> None:
    class Verdicts:
        waiting = unhurried = staticmethod(nullcontext)

        def check(self) -> None: ...

        def lost(self, error: BaseException) -> RankLost:
            return RankLost(f"rank 0 is silent; its last phase: saving ({error})")

    ranks = Refuses(place(rank=1), CPU, watch=Verdicts() if watched else None)
    with pytest.raises(RankLost, match="its last phase: saving" if watched else r"rank 1 could not finish x.*shut down"):
        collective(ranks)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_no_collective_starts_after_a_verdict(collective: Callable[[World], object]) -> None:
    """An engine that still waits for the lost rank would accept it, and whoever only starts collectives would go on."""

    class Verdicts:
        waiting = unhurried = staticmethod(nullcontext)

        def check(self) -> None:
            raise RankLost("rank 0 is silent")

        def lost(self, error: BaseException) -> RankLost:
            raise AssertionError("nothing failed") from error

    class Accepts(World):
        def _carry(self, *_: object) -> Handle:
            raise AssertionError("the engine was asked")

        _broadcast = _move = _carry  # type: ignore[assignment]

    with pytest.raises(RankLost, match="rank 0 is silent"):
        collective(Accepts(place(rank=1), CPU, watch=Verdicts()))


@pytest.mark.parametrize("step", ["init", "broadcast_"])
def test_an_engine_that_mpirun_connects_and_that_fails_is_a_lost_rank(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        Sum=None, allreduce_async_=allreduce, poll=lambda _: True, synchronize=lambda tensor: tensor, shutdown=lambda: None
    )
    store: dict[str, bytes] = {}
    connection = SimpleNamespace(set=lambda key, value: store.update({key: value.encode()}), get=store.__getitem__)
    monkeypatch.setattr(horovod_world, "_serve_rendezvous", lambda *_: 1)
    monkeypatch.setattr(horovod_world, "_RING_COMMAND", (sys.executable, "-c", STAND_IN_RING, str(tmp_path)))
    ranks = horovod_world.HorovodWorld(
        place(), CPU, Options(engine="horovod", rings=2), lambda: connection, engine, [], Recorder()
    )
    ranks.close()


@pytest.mark.slow
def test_ring_processes_may_load_for_longer_than_the_timeout(horovod: None, start_ranks: Start, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=r"node7 is 127\.0\.1\.1 on its own machine \(/etc/hosts\).*set MASTER_ADDR"):
        own_address("node7", nodes=2)
    assert own_address("node7", nodes=1) == "127.0.1.1"  # there are no others
    assert own_address("127.0.0.1", nodes=2) == "127.0.0.1"  # somebody asked for it
