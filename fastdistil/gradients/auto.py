"""What compression.kind=auto decides by: the seconds of an allreduce and of a copy, measured on the run's own buckets."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistil.distributed.world import World, sent_bytes
from fastdistil.gradients.buckets import MIB


def measure_exchange(world: World, nbytes: int) -> tuple[float, float]:
    """(latency in seconds, bytes a second of all rings together) of allreduce, medians of 5. All ranks call it.

    These are no gradients: the counters stay as they were.
    """
    counters, world.counters = world.counters, world.counters.copy()
    ring_bytes = max(4, min(nbytes, 16 * MIB) // world.rings)
    small = [world.empty(16, torch.float32)]
    large = [world.empty(ring_bytes // 4, torch.float32) for _ in range(world.rings)]
    latency_s = _median_s(world, small)
    whole_s = _median_s(world, large)
    seconds = max(whole_s - latency_s, 0.1 * whole_s)  # of little data the latency, which varies, may seem to be all
    world.counters = counters
    return latency_s, sum(sent_bytes("allreduce", buffer.nbytes, world.size) for buffer in large) / seconds


def _median_s(world: World, buffers: Sequence[Tensor]) -> float:
    times = []
    for number in range(6):
        world.barrier("fastdistil.measure")
        begun = time.perf_counter()
        handles = [
            world.allreduce(buffer, name=f"fastdistil.measure{buffer.numel()}.{ring}", ring=ring)
            for ring, buffer in enumerate(buffers)
        ]
        for handle in handles:
            world.wait(handle)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if number:  # the first makes connections
            times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def measure_copy(device: torch.device) -> float:
    """Bytes read and written a second by a copy: what compression is made of."""
    source = torch.zeros(2**22, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2 * source.nbytes / min(times)
