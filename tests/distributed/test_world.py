"""The engines, with real ranks: what arrives, what is counted, what is refused."""

import json
import socket
import sys
from collections.abc import Callable

import pytest
import torch

from fastdistil.errors import UserError
from fastdistil.ranks import Place
from fastdistil.recipe import World as Options
from fastdistil.world import join, sent_bytes

PROGRAM = """
import json, os, sys
import torch
from fastdistil.ranks import find_place
from fastdistil.recipe import World as Options
from fastdistil.world import join

engine, rings = sys.argv[1], int(sys.argv[2])
world = join(find_place(os.environ), Options(engine=engine, rings=rings, timeout_s=60), torch.device("cpu"))
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
world.barrier()
found["control"] = [world.counters.control_messages, world.counters.control_bytes]
print(json.dumps(found))
world.close()
"""


@pytest.mark.parametrize(("rings", "ranks"), [(1, 2), (3, 2), (2, 3)])
def test_collectives(engine: str, rings: int, ranks: int, run_ranks: Callable[..., list[str]]) -> None:
    everyone = [json.loads(out.splitlines()[-1]) for out in run_ranks(PROGRAM, ranks, engine, rings)]
    for rank, found in enumerate(everyone):
        assert (found["engine"], found["rank"], found["size"]) == (engine, rank, ranks)
        assert found["all_to_all"] == [100 * other + 3 * rank + i for other in range(ranks) for i in range(3)]
        assert found["all_gather"] == [value for other in range(ranks) for value in (other, 7)]
        assert found["fp16"] == found["bf16"] == [sum(other + 0.5 for other in range(ranks))] * 3
        for dtype, values in found["broadcasts"].items():
            assert values == [1.0 if dtype == "torch.bool" else float(ranks)] * 5, dtype
        assert found["sum"] == [sum(range(ranks)), ranks * 2**40, -ranks]
        assert found["gather"] == [[other / 3, 5.0] for other in range(ranks)]
        assert found["text"] == "größer" and found["empty"] == ""
        collectives, ring_bytes, control = found["counters"]
        # 2 x 2 rings buffers, and 5 single ones; every ring carried some.
        assert collectives == 4 * rings + 5 and len(ring_bytes) == rings and min(ring_bytes) > 0
        assert control == 0 and found["control"][0] == 3
    assert len({str(found["counters"]) for found in everyone}) == 1


def test_bytes_that_a_rank_sends() -> None:
    """From the algorithms: a ring allreduce passes on N-1 of N parts twice, an all-to-all keeps one part of N."""
    assert sent_bytes("allreduce", 1200, 2) == 1200
    assert sent_bytes("allreduce", 1200, 4) == 2 * 3 * 300
    assert sent_bytes("all_to_all", 1200, 4) == 3 * 300
    assert sent_bytes("all_gather", 300, 4) == 3 * 300


CPU = torch.device("cpu")


def place(rank: int = 0, size: int = 2, port: int | None = 29501, address: str | None = "127.0.0.1") -> Place:
    return Place(
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
    ("given", "options", "says"),
    [
        (None, {"engine": "torch"}, "one rank; start several with --np"),
        (None, {"rings": 4}, "world.rings is 4 and there is one rank"),
        (place(), {"engine": "alone"}, "mpirun started 2 ranks"),
        (place(), {"engine": "torch", "topology": "torus"}, "world.topology=torus is Horovod's"),
        (place(address=None, port=None), {"engine": "torch"}, "set MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_cannot_be_had_is_refused(given: Place | None, options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        join(given, Options(**options), CPU)  # type: ignore[arg-type]


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
    with pytest.raises(UserError, match=r"build_horovod.*world\.engine=torch"):
        join(place(), Options(), CPU)


MISSING = """
import os, sys
import torch
from fastdistil.errors import RankLost
from fastdistil.ranks import find_place
from fastdistil.recipe import World as Options
from fastdistil.world import join

place = find_place(os.environ)
if place.rank == 1:
    sys.exit(0)
try:
    join(place, Options(engine="torch", timeout_s=8), torch.device("cpu"))
except RankLost as error:
    print(error)
"""


def test_ranks_that_never_come_are_named(run_ranks: Callable[..., list[str]]) -> None:
    said = run_ranks(MISSING, 3)
    for rank in (0, 2):
        assert "rank 1 did not start within 8 s" in said[rank]
