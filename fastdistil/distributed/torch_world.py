"""The ranks over torch.distributed: NCCL on GPUs, Gloo on CPUs."""

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.rendezvous import Connect
from fastdistil.distributed.world import Collective, Handle, RankWatch, World, starting
from fastdistil.recipe import WorldOptions as Options

_FOREVER = timedelta(days=7)
_GLOO_THREADS = 8
"""Threads of a ring: so many buckets are under way at once, over one connection.

Groups that torch makes itself have 2. Beside DDP, which uses those: benchmarks/test_exchange.py."""


class TorchWorld(World):
    """torch.distributed: one process group a ring, and one for control messages."""

    engine = "torch"

    def __init__(
        self, place: RankInfo, device: torch.device, options: Options, connect: Connect, watch: RankWatch | None = None
    ) -> None:
        super().__init__(place, device, options.rings, connect, watch)
        backend = "nccl" if device.type == "cuda" else _threaded_gloo()
        if device.type == "cuda" and options.rings > 1:
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # several communicators on one device
        with starting(watch, self.rank):
            dist.init_process_group(
                "gloo",
                store=connect().of_engine("torch"),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=options.timeout_s),
            )
            # A rank may evaluate or copy for as long as it needs while the others wait: the monitor tells who is lost.
            self._small = dist.new_group(backend="gloo", timeout=_FOREVER)
            self._groups = [
                dist.new_group(backend=backend, timeout=_FOREVER, pg_options=_nccl_options(options.rings, device))
                for _ in range(options.rings)
            ]

    def _carry(self, kind: Collective, tensor: Tensor, name: str, ring: int | None) -> Handle:
        group = self._small if ring is None and not tensor.is_cuda else self._groups[ring or 0]
        match kind:
            case "allreduce":
                work, result = dist.all_reduce(tensor, group=group, async_op=True), tensor
            case "all_to_all":
                result = torch.empty_like(tensor)
                work = dist.all_to_all_single(result, tensor, group=group, async_op=True)
            case "all_gather":
                result = tensor.new_empty(self.size * tensor.numel())
                # Its older name warns since torch 2.13, its newer one does not exist before.
                gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
                work = gather(result, tensor, group=group, async_op=True)
        return _torch_handle(name, work, result)

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> Handle:
        group = self._groups[0] if tensor.is_cuda else self._small
        return _torch_handle(name, dist.broadcast(tensor, root, group=group, async_op=True), tensor)

    def _move(self, sent: Tensor, received_bytes: int, name: str, source: int, target: int) -> Handle:
        received, (sends, receives) = sent.new_empty(received_bytes), self._splits(sent.numel(), received_bytes, source, target)
        work = dist.all_to_all_single(received, sent, receives, sends, group=self._small, async_op=True)
        return _torch_handle(name, work, received)

    def close(self) -> None:
        dist.destroy_process_group()


def _torch_handle(name: str, work: Any, result: Tensor) -> Handle:
    def finish() -> Tensor:
        work.wait()  # NCCL: the stream waits, not the host
        return result

    if result.is_cuda:
        return Handle(name, lambda: True, finish)
    # Gloo's own wait takes no limit that would leave the collective whole. Asking now and then costs what the cores, which sum
    # gradients meanwhile, lack.
    ended = threading.Event()
    work.get_future().add_done_callback(lambda _: ended.set())
    return Handle(name, work.is_completed, finish, ended.wait)


def _threaded_gloo() -> str:
    """The name of a backend like Gloo's own, with _GLOO_THREADS: new_group leaves no choice."""
    name = "fastdistil_gloo"
    if name not in dist.Backend.backend_list:
        dist.Backend.register_backend(name, _make_gloo, devices=["cpu"])
    return name


def _make_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # the stubs lack its options
    interfaces = [interface for interface in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if interface]
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=interface) for interface in interfaces] or [gloo.create_default_device()]
    options._threads, options._timeout = _GLOO_THREADS, timeout
    return gloo(store, rank, size, options)


def _nccl_options(ring_count: int, device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = max(1, ring_count)
    if ring_count > 1:  # together no more of the GPU than one communicator may take, which is 32
        options.config.max_ctas = max(ring_count, 32 // ring_count)
    return options
