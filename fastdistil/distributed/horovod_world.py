"""Horovod behind the interface of world.py.

Gradients are float32 or float64. What Horovod cannot carry goes another way: bfloat16 is summed as float32 and broadcast as
16-bit integers, bools as bytes.

horovod is imported in this file and nowhere else.
"""

import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdistil.distributed import horovod_rings
from fastdistil.distributed.monitor import GRACE_S
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.rendezvous import Connect, choose_interface, open_store, own_address
from fastdistil.distributed.world import Collective, Handle, OnConnect, RankWatch, World, starting, unhurried
from fastdistil.errors import UserError
from fastdistil.install.horovod_build import HOW_TO_BUILD, IDLE_CYCLES
from fastdistil.recipe import WorldOptions as Options

_RING_COMMAND = (sys.executable, "-m", "fastdistil.distributed.horovod_world")


class HorovodWorld(World):
    """Horovod: this process's context, and with several rings on the CPU one communicator process for each."""

    engine = "horovod"

    def __init__(
        self,
        place: RankInfo,
        device: torch.device,
        options: Options,
        connect: Connect,
        hvd: Any,
        servers: Any,
        watch: RankWatch | None = None,
    ) -> None:
        super().__init__(place, device, options.rings, connect, watch)
        self._hvd, self._servers = hvd, servers
        self._variables_to_unset = [] if place.launcher == "horovodrun" else list(_horovod_environment(place, 0))
        if options.topology != "flat":
            self._variables_to_unset += ["HOROVOD_TORUS_ALLREDUCE", "HOROVOD_HIERARCHICAL_ALLREDUCE"]
        self._processes: horovod_rings.RingProcesses | None = None
        if device.type == "cpu" and options.rings > 1:
            with starting(watch, self.rank):
                self._processes = self._start_rings(place)

    def _start_rings(self, place: RankInfo) -> horovod_rings.RingProcesses:
        assert self.connect is not None
        store, ports = self.connect(), []
        if self.is_chief:
            ports = [_serve_rendezvous(place, self._servers) for _ in range(self.rings)]
            store.set("horovod/rings", ",".join(map(str, ports)))
        ports = [int(port) for port in store.get("horovod/rings").decode().split(",")]
        _idle_seldom(self.device)
        processes = horovod_rings.RingProcesses(_RING_COMMAND, [_horovod_environment(place, port) for port in ports])
        # A busy machine or a slow disk may load the library for longer than timeout_s: nobody is lost by that, and nobody
        # connects, for which Gloo has its limit, before all others can.
        with unhurried(self.watch, "loading the rings' processes"):
            processes.wait_until_loaded()
        ready = torch.zeros(1)
        self.wait(self._begin("fastdistil.rings", lambda: self._carry("allreduce", ready, "fastdistil.rings", None)))
        processes.connect()
        return processes

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._processes is None:
            return super().empty(numel, dtype)
        return self._processes.empty(numel, dtype)

    def _carry(self, kind: Collective, tensor: Tensor, name: str, ring: int | None) -> Handle:
        if tensor.dtype == torch.bfloat16:
            return self._carry_bf16(kind, tensor, name, ring)
        if self._processes is not None and ring is not None:
            done, finish = self._processes.start(kind, tensor, name, ring, self.size)
            return Handle(name, done, finish)
        return Handle(name, *start_horovod(self._hvd, kind, tensor, name))

    def _carry_bf16(self, kind: Collective, tensor: Tensor, name: str, ring: int | None) -> Handle:
        if kind != "allreduce":
            inner = self._carry(kind, tensor.view(torch.int16), name, None)
            return Handle(name, inner.done, lambda: inner.finish().view(torch.bfloat16))
        inner = self._carry(kind, tensor.float(), name, ring)
        return Handle(name, inner.done, lambda: tensor.copy_(inner.finish()))

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> Handle:
        bits = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}.get(tensor.dtype)
        carried = tensor if bits is None else tensor.view(bits)
        handle = self._hvd.broadcast_async_(carried, root_rank=root, name=name)
        return Handle(name, partial(self._hvd.poll, handle), partial(self._hvd.synchronize, handle))

    def _move(self, sent: Tensor, received_bytes: int, name: str, source: int, target: int) -> Handle:
        sends, _ = self._splits(sent.numel(), received_bytes, source, target)
        handle = self._hvd.alltoall_async(sent, torch.tensor(sends, dtype=torch.int32), name=name)
        return Handle(name, partial(self._hvd.poll, handle), lambda: _only(self._hvd.synchronize(handle)))

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()
        self._hvd.shutdown()
        for name in self._variables_to_unset:  # else this process would next be taken for one of horovodrun's
            os.environ.pop(name, None)
        for server in self._servers:
            server.shutdown()
            server.server_close()


def start_horovod(hvd: Any, kind: Collective, tensor: Tensor, name: str) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
    match kind:
        case "allreduce":
            handle = hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)
        case "all_to_all":
            handle = hvd.alltoall_async(tensor, name=name)
        case "all_gather":
            handle = hvd.allgather_async(tensor, name=name)
    # Its synchronize spins: on few cores that starves Horovod's own thread, so it is asked only once the work is done.
    return partial(hvd.poll, handle), lambda: _only(hvd.synchronize(handle))


def _only(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output  # alltoall tells the sizes too
    return tensor


def join_horovod(place: RankInfo, options: Options, device: torch.device, met: OnConnect) -> World:
    hvd = import_horovod()
    _check_topology(hvd, place, options, device)
    _set_horovod(options, device)
    servers: list[Any] = []
    if place.address is None:
        if os.environ.get("HOROVOD_CONTROLLER") == "gloo":
            _idle_seldom(device)
        with starting(None, place.rank):
            hvd.init()  # horovodrun, or MPI, knows how
            place = _agree_on_address(hvd, place)
        connect = open_store(place, options.timeout_s)
        watch = met(connect)
    else:
        connect = open_store(place, options.timeout_s)
        watch = met(connect)
        choose_interface(place)
        with starting(watch, place.rank):
            store = connect()
            if place.rank == 0:
                store.set("horovod/port", str(_serve_rendezvous(place, servers)))
            os.environ.update(_horovod_environment(place, int(store.get("horovod/port"))))
            _idle_seldom(device)
            hvd.init()
    if options.topology == "hierarchical" and not hvd.mpi_enabled():
        raise UserError(
            "world.topology=hierarchical works only where Horovod runs over MPI, and here it would silently be flat; "
            "start the ranks with mpirun, or set world.topology=torus"
        )
    return HorovodWorld(place, device, options, connect, hvd, servers, watch)


def import_horovod() -> Any:
    """Raises UserError naming the command that builds it."""
    try:
        import horovod.torch as hvd
    except (ImportError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"several ranks use Horovod (world.engine), and it does not load ({why}); {HOW_TO_BUILD}, or set world.engine=torch"
        ) from error
    return hvd


def _check_topology(hvd: Any, place: RankInfo, options: Options, device: torch.device) -> None:
    if options.topology == "flat":
        return
    if device.type != "cuda" or not hvd.nccl_built():
        raise UserError(
            f"world.topology={options.topology} is of Horovod's NCCL allreduce, and there is none here; set world.topology=flat"
        )
    if place.cross_size == 1:
        raise UserError(f"world.topology={options.topology} is for several nodes, and there is one; set world.topology=flat")


def _set_horovod(options: Options, device: torch.device) -> None:
    """What Horovod reads when it starts. What the user set stays."""
    # Our buckets leave as they are: fusing would copy them, and make one response of several.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    # Longer than the monitor needs to name the lost rank: Gloo would end the process without a word.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(int(options.timeout_s + 2 * GRACE_S)))
    os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")  # the monitor tells more, and sooner
    if device.type == "cpu":
        # Ranks coordinate once a cycle, and cores that compute do it. At its default of 1 ms that took a sixth to a quarter of
        # two of them; an update waits for a few cycles.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "10")
    if device.type == "cuda":
        os.environ.setdefault("HOROVOD_NUM_NCCL_STREAMS", str(options.rings))
        os.environ.setdefault("NCCL_MIN_CTAS", str(options.rings))
        if options.rings > 1:
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # several communicators on one device
    if options.topology == "torus":
        os.environ["HOROVOD_TORUS_ALLREDUCE"] = "1"
    if options.topology == "hierarchical":
        os.environ["HOROVOD_HIERARCHICAL_ALLREDUCE"] = "1"


def _idle_seldom(device: torch.device) -> None:
    """Let ranks with nothing to send coordinate ten times less, in what starts from here on (Horovod as we build it).

    This is for Gloo only: over MPI those who wait for an idle rank would spin.
    """
    if device.type == "cpu":
        os.environ.setdefault(IDLE_CYCLES, "10")


def _serve_rendezvous(place: RankInfo, servers: list[Any]) -> int:
    """Horovod's own rendezvous server, in this process, on the place's address. Returns its port."""
    import threading

    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((place.address, 0), RendezvousHandler, 0)
    threading.Thread(target=server.serve_forever, name="fastdistil-rendezvous", daemon=True).start()
    servers.append(server)
    return int(server.server_address[1])


def _horovod_environment(place: RankInfo, port: int) -> dict[str, str]:
    return {
        "HOROVOD_RANK": str(place.rank),
        "HOROVOD_SIZE": str(place.size),
        "HOROVOD_LOCAL_RANK": str(place.local_rank),
        "HOROVOD_LOCAL_SIZE": str(place.local_size),
        "HOROVOD_CROSS_RANK": str(place.cross_rank),
        "HOROVOD_CROSS_SIZE": str(place.cross_size),
        "HOROVOD_HOSTNAME": f"node{place.cross_rank}",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": str(place.address),
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def _agree_on_address(hvd: Any, place: RankInfo) -> RankInfo:
    """Where rank 0 serves the control plane, when the launcher told nobody: over the engine that it started."""
    import dataclasses

    host = "127.0.0.1" if place.cross_size == 1 else own_address(socket.gethostname(), place.cross_size)
    encoded = torch.zeros(6, dtype=torch.int64)
    if place.rank == 0:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        encoded = torch.tensor([*socket.inet_aton(host), *divmod(port, 256)], dtype=torch.int64)
    hvd.broadcast_(encoded, root_rank=0, name="fastdistil.address")
    *parts, high, low = encoded.tolist()
    return dataclasses.replace(place, address=".".join(map(str, parts)), port=256 * high + low)


def _ring_main() -> None:
    """A communicator process: `python -m fastdistil.distributed.horovod_world`, started by horovod_rings.RingProcesses."""
    hvd = import_horovod()
    horovod_rings.serve(hvd.init, partial(start_horovod, hvd), hvd.shutdown)


if __name__ == "__main__":
    _ring_main()
