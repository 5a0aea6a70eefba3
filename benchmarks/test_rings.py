"""Rings: 33.5 MB of float32 gradients in 8 buckets between two ranks, k = 1, 2, 4 side by side. Needs root (network.py).

Two networks. In one each TCP flow is capped, at a tenth or less of what the loopback gives: there k rings should be k times
as fast. In the other the flows share a link: there rings should lose nothing. What a ring is on each engine,
distributed/world.py says. Ranks are started anew for each k, turn about. Printed and kept in extra_info: ms, ratios,
bytes as the world counted them, and as the network's devices and classes did. Ratios are facts of a run, not asserted; that
the bytes moved in k flows is.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch

from .network import INTERFACE, Network, missing
from .ranks import environment, has_horovod

RINGS = (1, 2, 4)
BUCKETS, NUMEL = 8, 2**20
TURNS, ROUNDS = 2, 5  # of ranks started, and of exchanges by each
FLOW_MBIT, LINK_MBIT = 500.0, 1000.0  # a flow's may be less, see `flow_cap`
RANKS = 2
PORT = 29500

PROGRAM = f"""
import json, sys, time
import torch
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import WorldOptions
from fastdistil.distributed.coordinator import join

engine, rings, device = sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3])
world = join(find_rank_info(), WorldOptions(engine=engine, rings=rings), device)
buffers = [world.empty({NUMEL}, torch.float32) for _ in range({BUCKETS})]
for buffer in buffers:
    buffer.fill_(world.rank + 1)

def wait_for_device():
    if device.type == "cuda":
        torch.cuda.synchronize()

seconds = []
for turn in range(1 + {ROUNDS}):
    wait_for_device()
    world.barrier()
    begun = time.perf_counter()
    handles = [world.allreduce(buffer, name=f"bucket{{i}}", ring=i % rings) for i, buffer in enumerate(buffers)]
    sums = [world.wait(handle) for handle in handles]
    wait_for_device()
    seconds.append(time.perf_counter() - begun)
    assert all((each == 3 * 2**turn).all() for each in sums)
print(json.dumps({{"seconds": seconds[1:], "ring_bytes": world.counters.ring_bytes}}))
world.close()
"""


class Seen(NamedTuple):
    """Of all exchanges of rank 0."""

    seconds: list[float]
    """Without the first, which may open connections."""
    ring_bytes: list[int]
    """As the world counted them."""
    tx_bytes: int
    """As the network device did, with headers and control messages."""
    flow_bytes: list[int]
    """As the classes did, most first; empty without a cap for flows."""


def exchange(network: Network, engine: str, rings: int, device: str, *, loopback: bool = False) -> Seen:
    """Start the ranks in a fresh network, let them exchange. Loopback: both in one namespace."""
    argv = [sys.executable, "-c", PROGRAM, engine, str(rings), device]
    ranks = [
        network.run(
            0 if loopback else rank,
            argv,
            rank_environment(rank, device, "127.0.0.1" if loopback else network.address(0), "lo" if loopback else INTERFACE),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    ended = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, error) in zip(ranks, ended, strict=True):
        assert rank.returncode == 0, error[-2000:]
    measurement = json.loads(ended[0][0].splitlines()[-1])
    flows = network.flow_bytes(0) if network.flow_mbit is not None else []
    return Seen(measurement["seconds"], measurement["ring_bytes"], network.tx_bytes(0), flows)


def rank_environment(rank: int, device: str, address: str, interface: str) -> dict[str, str]:
    """Two nodes, unless they are to share this one's GPUs."""
    names: dict[str, Any] = {"GLOO_SOCKET_IFNAME": interface, "HOROVOD_GLOO_IFACE": interface, "NCCL_SOCKET_IFNAME": interface}
    if device == "cpu":
        names |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank, "GROUP_WORLD_SIZE": RANKS}
    else:  # through the network though the GPUs could reach each other
        names |= {"NCCL_P2P_DISABLE": 1, "NCCL_SHM_DISABLE": 1, "NCCL_IB_DISABLE": 1}
    return environment(rank, RANKS, PORT, address, **{name: str(value) for name, value in names.items()})


def flow_cap(engine: str, device: str) -> tuple[float, float]:
    """Mbit/s: a flow's cap, and what one ring gets on the loopback, of which it is a tenth or less."""
    with Network(RANKS) as network:
        one_ring = exchange(network, engine, 1, device, loopback=True)
    loopback = 4 * NUMEL * BUCKETS * 8 / min(one_ring.seconds) / 1e6
    return min(FLOW_MBIT, loopback / 10), loopback


@pytest.mark.benchmark(group="rings")
@pytest.mark.parametrize("cap", ["flow", "link"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["torch", "horovod"])
def test_rings(benchmark: Any, engine: str, device: str, cap: str) -> None:
    if reason := missing():
        pytest.skip(reason)
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"not measured: rings of NCCL need {RANKS} GPUs, there are {torch.cuda.device_count()}")
    if engine == "horovod" and not has_horovod():
        pytest.skip("needs Horovod: make horovod")
    loopback_mbit = None
    caps: Mapping[str, float] = {"link_mbit": LINK_MBIT}
    if cap == "flow":
        flow_mbit, loopback_mbit = flow_cap(engine, device)
        caps = {"flow_mbit": flow_mbit}
    measurements: dict[int, list[Seen]] = {rings: [] for rings in RINGS}

    def turn() -> None:
        for rings in RINGS:
            with Network(RANKS, **caps) as network:
                measurements[rings].append(exchange(network, engine, rings, device))

    benchmark.pedantic(turn, rounds=TURNS)
    ms = {
        rings: 1000 * statistics.median(second for measurement in turns for second in measurement.seconds)
        for rings, turns in measurements.items()
    }
    last = {rings: turns[-1] for rings, turns in measurements.items()}
    for rings, measurement in last.items():
        assert sum(measurement.ring_bytes) == (1 + ROUNDS) * 4 * NUMEL * BUCKETS  # 2 (N - 1) / N = 1
        if cap == "flow" and device == "cpu":
            large = [count for count in measurement.flow_bytes if count > min(measurement.ring_bytes) / 2]
            assert len(large) == rings, (rings, measurement.flow_bytes)
    facts = {
        "engine": engine,
        "device": device,
        **caps,
        "loopback_mbit": loopback_mbit,
        "ms": ms,
        "times_faster": {rings: ms[1] / ms[rings] for rings in RINGS},
        "ring_bytes": {rings: measurement.ring_bytes for rings, measurement in last.items()},
        "tx_bytes": {rings: measurement.tx_bytes for rings, measurement in last.items()},
        "flow_bytes": {rings: measurement.flow_bytes[: max(RINGS)] for rings, measurement in last.items()},
    }
    benchmark.extra_info.update(facts)
    print(report(facts))


def report(facts: dict[str, Any]) -> str:
    where = (
        f"{facts['flow_mbit']:.0f} Mbit/s a TCP flow (loopback: {facts['loopback_mbit']:.0f})"
        if "flow_mbit" in facts
        else f"{facts['link_mbit']:.0f} Mbit/s shared"
    )
    lines = [f"\n{facts['engine']} on {facts['device']}, {where}; medians of {TURNS} x {ROUNDS}, {BUCKETS} x {4 * NUMEL} bytes"]
    for rings in RINGS:
        declared, sent = facts["ring_bytes"][rings], facts["tx_bytes"][rings]
        lines.append(
            f"  k = {rings}: {facts['ms'][rings]:.1f} ms, {facts['times_faster'][rings]:.2f}x; bytes by ring {declared}, "
            f"on the wire {sent}, {sent / sum(declared):.4f} of them, by flow {facts['flow_bytes'][rings]}"
        )
    return "\n".join(lines)
