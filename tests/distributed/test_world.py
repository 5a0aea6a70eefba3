"""The engines, with real ranks: what arrives, what is counted, what is refused."""

import json
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from fastdistil.distributed.coordinator import join
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.world import Handle, World, sent_bytes
from fastdistil.errors import RankLost, UserError
from fastdistil.recipe import WorldOptions as Options
from tests.distributed.conftest import CPU, place

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


def test_a_process_can_join_again(
    engine: str,
    run_ranks: Callable[..., list[str]],
    reserve_port: Callable[[], int],
) -> None:
    """As a notebook does that trains twice."""
    assert run_ranks(TWICE, 2, engine, reserve_port(), reserve_port()) == ["[3]\n[3]\n"] * 2


def test_bytes_that_a_rank_sends() -> None:
    """From the algorithms: a ring allreduce passes on N-1 of N parts twice, an all-to-all keeps one part of N."""
    assert sent_bytes("allreduce", 1200, 2) == 1200
    assert sent_bytes("allreduce", 1200, 4) == 2 * 3 * 300
    assert sent_bytes("all_to_all", 1200, 4) == 3 * 300
    assert sent_bytes("all_gather", 300, 4) == 3 * 300


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
def test_what_cannot_be_had_is_refused(
    rank_info: RankInfo | None,
    options: dict[str, object],
    says: str,
) -> None:
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
def test_a_collective_that_does_not_even_start_is_a_lost_rank(
    collective: Callable[[World], object],
    watched: bool,
) -> None:
    class Verdicts:
        waiting = unhurried = staticmethod(nullcontext)

        def check(self) -> None: ...

        def lost(self, error: BaseException) -> RankLost:
            return RankLost(f"rank 0 is silent; its last phase: saving ({error})")

    ranks = Refuses(place(rank=1), CPU, watch=Verdicts() if watched else None)
    with pytest.raises(
        RankLost,
        match="its last phase: saving" if watched else r"rank 1 could not finish x.*shut down",
    ):
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
