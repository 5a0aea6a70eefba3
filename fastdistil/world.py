"""The ranks: one process alone, Horovod, or torch.distributed, behind one small interface.

    world.allreduce / all_to_all / all_gather   asynchronous, on flat buffers, each on one of `world.rings` rings
    world.sum / gather / broadcast / barrier    small or rare, and waited for: control messages, counted apart

Nothing else in the trainer knows which engine runs. Both engines meet through one torch TCPStore that rank 0 serves at the
place's address: it starts the engine (Horovod's own rendezvous server runs inside rank 0), and the monitor lives on it.

What a ring is:
    torch, Gloo      a process group over all ranks, with a TCP connection of its own between each two of them
    torch, NCCL      a process group, that is a communicator, of which NCCL makes at least `rings` CTAs
    Horovod, NCCL    one of HOROVOD_NUM_NCCL_STREAMS communicators, taken in turn; Horovod's fusion is off, so that several
                     buckets are under way at once
    Horovod, CPU     Horovod runs one collective after another on one thread. Ring 0 is this process's Horovod; with several
                     rings each is a communicator process with a Horovod context of its own, over shared memory (rings.py)

Gradients are float32 or float64. What Horovod cannot carry goes another way: bfloat16 is summed as float32 and broadcast as
16-bit integers, bools as bytes.

horovod is imported in this file and nowhere else.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from fastdistil import rings
from fastdistil.build_horovod import HOW_TO_BUILD
from fastdistil.errors import FastdistilError, RankLost, UserError
from fastdistil.meeting import Connect, choose_interface, open_store
from fastdistil.monitor import GRACE_S
from fastdistil.ranks import Place
from fastdistil.recipe import World as Options

Kind = Literal["allreduce", "all_to_all", "all_gather"]
_FOREVER = timedelta(days=7)
_MOVED_BYTES = 2**26
"""At a time: engines count bytes in 32 bits, and copy."""


class Watch(Protocol):
    """What a wait asks while it lasts; monitor.Monitor is one."""

    def check(self) -> None: ...
    def waiting(self, what: str) -> AbstractContextManager[Any]: ...
    def lost(self, error: BaseException) -> RankLost: ...


Met = Callable[[Connect], Watch | None]
"""Called when the ranks can reach each other's store and no engine has been started: to compare, and to watch from there on."""


@dataclass
class Counters:
    """Since the start: what this rank sent. Bytes are those of ring and pairwise algorithms, without packet headers."""

    gradient_collectives: int = 0
    ring_bytes: list[int] = field(default_factory=list)
    """Of gradients, per ring."""
    control_messages: int = 0
    control_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        return sum(self.ring_bytes)

    def since(self, before: "Counters") -> dict[str, Any]:
        """As fields of an event."""
        return {
            "gradient_collectives": self.gradient_collectives - before.gradient_collectives,
            "gradient_bytes": self.gradient_bytes - before.gradient_bytes,
            "ring_bytes": [now - then for now, then in zip(self.ring_bytes, before.ring_bytes, strict=True)],
            "control_messages": self.control_messages - before.control_messages,
            "control_bytes": self.control_bytes - before.control_bytes,
        }

    def copy(self) -> "Counters":
        return Counters(self.gradient_collectives, list(self.ring_bytes), self.control_messages, self.control_bytes)


def sent_bytes(kind: Kind, nbytes: int, ranks: int) -> int:
    """What one rank sends: `nbytes` is its buffer for allreduce and all_to_all, its own part for all_gather."""
    match kind:
        case "allreduce":
            return 2 * (ranks - 1) * nbytes // ranks
        case "all_to_all":
            return (ranks - 1) * nbytes // ranks
        case "all_gather":
            return (ranks - 1) * nbytes


@dataclass(frozen=True)
class Handle:
    """A collective under way."""

    name: str
    done: Callable[[], bool]
    finish: Callable[[], Tensor]
    wait: Callable[[float], object] | None = None
    """Until it is done, or for so many seconds; None: it can only be asked."""


class World:
    """One rank alone, and what the engines share. Ranks call the same collectives under the same names in the same order."""

    engine: Literal["alone", "horovod", "torch"] = "alone"

    def __init__(
        self,
        place: Place | None,
        device: torch.device,
        ring_count: int = 1,
        connect: Connect | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.size = (place.rank, place.size) if place is not None else (0, 1)
        self.local_rank, self.local_size = (place.local_rank, place.local_size) if place is not None else (0, 1)
        self.cross_rank, self.cross_size = (place.cross_rank, place.cross_size) if place is not None else (0, 1)
        self.device, self.rings, self.connect = device, ring_count, connect
        self.counters = Counters(ring_bytes=[0] * ring_count)
        self.watch = watch
        self.waited_s = 0.0
        """Of the host, in all waits for other ranks."""

    @property
    def is_chief(self) -> bool:
        return self.rank == 0

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer, zeros, on the device, that the engine can carry without a copy."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def allreduce(self, tensor: Tensor, *, name: str, ring: int = 0) -> Handle:
        """Sum over ranks, in place: 1-D, contiguous, floating. Keep `tensor` untouched until `wait` returns it."""
        return self._start("allreduce", tensor, name, ring)

    def all_to_all(self, tensor: Tensor, *, name: str, ring: int = 0) -> Handle:
        """1-D [size * c]: part i goes to rank i; `wait` gives [size * c], part j from rank j."""
        assert tensor.numel() % self.size == 0, (tensor.numel(), self.size)
        return self._start("all_to_all", tensor, name, ring)

    def all_gather(self, tensor: Tensor, *, name: str, ring: int = 0) -> Handle:
        """1-D [c] of this rank; `wait` gives [size * c] in the order of ranks."""
        return self._start("all_gather", tensor, name, ring)

    def wait(self, handle: Handle) -> Tensor:
        """Raises RankLost if a rank that it needs is gone. On a GPU only the stream waits, where the engine can."""
        begun = time.perf_counter()
        try:
            with _waiting(self.watch, handle.name):
                pause_s = 2e-5
                while not handle.done():
                    if self.watch is not None:
                        self.watch.check()
                    if handle.wait is not None:
                        handle.wait(0.1)
                    else:
                        time.sleep(pause_s)
                        pause_s = min(2 * pause_s, 5e-4)
                return handle.finish()
        except RankLost:
            raise
        except Exception as error:
            raise self._lost(handle.name, error) from error
        finally:
            self.waited_s += time.perf_counter() - begun

    def sum(self, values: Sequence[int], name: str) -> list[int]:
        """Of every rank's 64-bit integers, on every rank."""
        return self.wait(self.sum_async(values, name)).tolist()

    def sum_async(self, values: Sequence[int], name: str) -> Handle:
        return self._control("allreduce", torch.tensor(list(values), dtype=torch.int64), name)

    def gather(self, values: Sequence[float], name: str) -> list[list[float]]:
        """Every rank's float64 numbers, by rank."""
        found = self.wait(self._control("all_gather", torch.tensor(list(values), dtype=torch.float64), name))
        return found.view(self.size, -1).tolist()

    def sum_terms(self, tensor: Tensor, name: str) -> Handle:
        """A few scalars on the device, summed in place; counts as a control message."""
        return self._control("allreduce", tensor, name)

    def broadcast(self, tensor: Tensor, name: str, root: int = 0) -> None:
        """Every rank's `tensor` (contiguous, any dtype) becomes root's."""
        if tensor.numel():
            self.wait(self._broadcast(tensor, name, root))

    def broadcast_bytes(self, data: bytes, name: str, root: int = 0) -> bytes:
        """Root's, on every rank."""
        size = torch.tensor([len(data)], dtype=torch.int64)
        self.broadcast(size, f"{name}.size", root)
        if self.rank == root:
            text = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        else:
            text = torch.empty(max(1, int(size)), dtype=torch.uint8)
        self.broadcast(text, f"{name}.bytes", root)
        return bytes(text.numpy().tobytes())[: int(size)]

    def move(self, tensor: Tensor, name: str, *, source: int, target: int) -> None:
        """Target's `tensor` becomes source's, and nothing travels between others, which say how large it is. All ranks call it.

        Contiguous, on the CPU, any dtype.
        """
        if source == target:
            return
        for part in torch.split(tensor.view(-1).view(torch.uint8), _MOVED_BYTES):
            sent, received = part[: part.numel() * (self.rank == source)], part[: part.numel() * (self.rank == target)]
            received.copy_(self.wait(self._move(sent, received.numel(), name, source, target)))

    def barrier(self, name: str = "barrier") -> None:
        self.sum([0], name)

    def close(self) -> None:
        """Orderly, after the last collective."""

    def _start(self, kind: Kind, tensor: Tensor, name: str, ring: int) -> Handle:
        assert tensor.dim() == 1, tensor.shape
        assert tensor.is_contiguous()
        assert 0 <= ring < self.rings, (ring, self.rings)
        self.counters.gradient_collectives += 1
        self.counters.ring_bytes[ring] += sent_bytes(kind, tensor.nbytes, self.size)
        try:
            return self._carry(kind, tensor, name, ring)
        except Exception as error:
            raise self._lost(name, error) from error

    def _control(self, kind: Kind, tensor: Tensor, name: str) -> Handle:
        if self.size > 1:
            self.counters.control_messages += 1
            self.counters.control_bytes += sent_bytes(kind, tensor.nbytes, self.size)
        try:
            return self._carry(kind, tensor, name, None)
        except Exception as error:
            raise self._lost(name, error) from error

    def _carry(self, kind: Kind, tensor: Tensor, name: str, ring: int | None) -> Handle:
        """ring None: a control message."""
        return Handle(name, lambda: True, lambda: tensor)

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> Handle:
        return Handle(name, lambda: True, lambda: tensor)

    def _move(self, sent: Tensor, received_bytes: int, name: str, source: int, target: int) -> Handle:
        """Bytes from the source, or none; so many to be received."""
        raise NotImplementedError

    def _splits(self, sent_bytes: int, received_bytes: int, source: int, target: int) -> tuple[list[int], list[int]]:
        """Of an uneven all-to-all: what this rank sends to each, and receives from each."""
        ranks = range(self.size)
        return [sent_bytes * (r == target) for r in ranks], [received_bytes * (r == source) for r in ranks]

    def _lost(self, name: str, error: Exception) -> Exception:
        return _lost(self.watch, self.rank, name, error)


def _waiting(watch: Watch | None, what: str) -> AbstractContextManager[Any]:
    return watch.waiting(what) if watch is not None else nullcontext()


def _lost(watch: Watch | None, rank: int, name: str, error: Exception) -> RankLost:
    if watch is not None:
        return watch.lost(error)
    return RankLost(f"rank {rank} could not finish {name}: {' '.join(str(error).split())}")


@contextmanager
def _starting(watch: Watch | None, rank: int) -> Iterator[None]:
    """Around what an engine does with all ranks to get ready."""
    try:
        with _waiting(watch, "the engine's connections"):
            yield
    except FastdistilError:
        raise
    except Exception as error:
        raise _lost(watch, rank, "its connections", error) from error


class TorchWorld(World):
    """torch.distributed: one process group a ring, and one for control messages."""

    engine = "torch"

    def __init__(
        self, place: Place, device: torch.device, options: Options, connect: Connect, watch: Watch | None = None
    ) -> None:
        super().__init__(place, device, options.rings, connect, watch)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda" and options.rings > 1:
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # several communicators on one device
        with _starting(watch, self.rank):
            dist.init_process_group(
                "gloo",
                store=PrefixStore("torch", connect()),
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

    def _carry(self, kind: Kind, tensor: Tensor, name: str, ring: int | None) -> Handle:
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


def _nccl_options(ring_count: int, device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = max(1, ring_count)
    return options


class HorovodWorld(World):
    """Horovod: this process's context, and with several rings on the CPU one communicator process for each."""

    engine = "horovod"

    def __init__(
        self,
        place: Place,
        device: torch.device,
        options: Options,
        connect: Connect,
        hvd: Any,
        servers: Any,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(place, device, options.rings, connect, watch)
        self._hvd, self._servers = hvd, servers
        self._processes: rings.RingProcesses | None = None
        if device.type == "cpu" and options.rings > 1:
            with _starting(watch, self.rank):
                self._processes = self._start_rings(place)

    def _start_rings(self, place: Place) -> rings.RingProcesses:
        assert self.connect is not None
        store, ports = self.connect(), []
        if self.is_chief:
            ports = [_serve_rendezvous(place, self._servers) for _ in range(self.rings)]
            store.set("horovod/rings", ",".join(map(str, ports)))
        ports = [int(port) for port in store.get("horovod/rings").decode().split(",")]
        return rings.RingProcesses([sys.executable, "-m", "fastdistil.world"], [_horovod_environment(place, p) for p in ports])

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._processes is None:
            return super().empty(numel, dtype)
        return self._processes.empty(numel, dtype)

    def _carry(self, kind: Kind, tensor: Tensor, name: str, ring: int | None) -> Handle:
        if tensor.dtype == torch.bfloat16:
            return self._carry_bf16(kind, tensor, name, ring)
        if self._processes is not None and ring is not None:
            done, finish = self._processes.start(kind, tensor, name, ring, self.size)
            return Handle(name, done, finish)
        return Handle(name, *start_horovod(self._hvd, kind, tensor, name))

    def _carry_bf16(self, kind: Kind, tensor: Tensor, name: str, ring: int | None) -> Handle:
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
        for server in self._servers:
            server.shutdown()
            server.server_close()


def start_horovod(hvd: Any, kind: Kind, tensor: Tensor, name: str) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
    match kind:
        case "allreduce":
            handle = hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)
        case "all_to_all":
            handle = hvd.alltoall_async(tensor, name=name)
        case "all_gather":
            handle = hvd.allgather_async(tensor, name=name)
    # Its synchronize spins: on few cores that starves Horovod's own thread, so it is asked only once the work is done.
    return partial(hvd.poll, handle), lambda: _only(hvd.synchronize(handle))


def _only(found: Any) -> Tensor:
    tensor: Tensor = found[0] if isinstance(found, tuple) else found  # alltoall tells the sizes too
    return tensor


def join(place: Place | None, options: Options, device: torch.device, met: Met = lambda _: None) -> World:
    """Become one of the place's ranks. Raises UserError (an engine that is not there, a port in use), RankLost (not all came).

    `met`: see Met; what it raises ends this. Not called where there is one rank.
    Reads and sets environment variables that the engines read when they start.
    """
    if device.type == "cuda":
        _choose_gpu(place)
    if place is None:
        for key in ("engine", "rings"):
            if (value := getattr(options, key)) not in ("auto", "alone", 1):
                raise UserError(f"world.{key} is {value} and there is one rank; start several with --np, or leave it out")
    if place is None or place.size == 1:  # such as what is left of an elastic run
        return World(None, device)
    if options.engine == "alone":
        raise UserError(f"world.engine is alone and {place.launcher} started {place.size} ranks; set it to horovod or torch")
    if options.engine == "torch":
        if options.topology != "flat":
            raise UserError(f"world.topology={options.topology} is Horovod's; set world.topology=flat, or world.engine=horovod")
        connect = open_store(place, options.timeout_s)
        watch = met(connect)
        choose_interface(place)
        return TorchWorld(place, device, options, connect, watch)
    return _join_horovod(place, options, device, met)


def _join_horovod(place: Place, options: Options, device: torch.device, met: Met) -> World:
    hvd = import_horovod()
    _check_topology(hvd, place, options, device)
    _set_horovod(options, device)
    servers: list[Any] = []
    if place.address is None:
        hvd.init()  # horovodrun, or MPI, knows how
        place = _agree_on_address(hvd, place)
        connect = open_store(place, options.timeout_s)
        watch = met(connect)
    else:
        connect = open_store(place, options.timeout_s)
        watch = met(connect)
        choose_interface(place)
        with _starting(watch, place.rank):
            store = connect()
            if place.rank == 0:
                store.set("horovod/port", str(_serve_rendezvous(place, servers)))
            os.environ.update(_horovod_environment(place, int(store.get("horovod/port"))))
            hvd.init()
    if options.topology == "hierarchical" and not hvd.mpi_enabled():
        raise UserError(
            "world.topology=hierarchical works only where Horovod runs over MPI, and here it would silently be flat; "
            "start the ranks with mpirun, or set world.topology=torus"
        )
    return HorovodWorld(place, device, options, connect, hvd, servers, watch)


def _choose_gpu(place: Place | None) -> None:
    """The local rank's; or the only one, where the launcher shows each rank its own."""
    if place is None:
        return
    visible = torch.cuda.device_count()
    if visible < place.local_size and visible != 1:
        raise UserError(f"{place.local_size} ranks on this node and {visible} GPUs; start one rank for each GPU")
    torch.cuda.set_device(place.local_rank if visible > 1 else 0)


def import_horovod() -> Any:
    """Raises UserError naming the command that builds it."""
    try:
        import horovod.torch as hvd
    except (ImportError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"world.engine is horovod and it does not load ({why}); {HOW_TO_BUILD}, or set world.engine=torch"
        ) from error
    return hvd


def _check_topology(hvd: Any, place: Place, options: Options, device: torch.device) -> None:
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
        # Ranks coordinate once a cycle, idle or not. At its default of 1 ms that took a sixth to a quarter of two cores that
        # compute; an update waits for a few cycles.
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


def _serve_rendezvous(place: Place, servers: list[Any]) -> int:
    """Horovod's own rendezvous server, in this process, on the place's address. Returns its port."""
    import threading

    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((place.address, 0), RendezvousHandler, 0)
    threading.Thread(target=server.serve_forever, name="fastdistil-rendezvous", daemon=True).start()
    servers.append(server)
    return int(server.server_address[1])


def _horovod_environment(place: Place, port: int) -> dict[str, str]:
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


def _agree_on_address(hvd: Any, place: Place) -> Place:
    """Where rank 0 serves the control plane, when the launcher told nobody: over the engine that it started."""
    import dataclasses

    host = "127.0.0.1" if place.cross_size == 1 else socket.gethostbyname(socket.gethostname())
    told = torch.zeros(6, dtype=torch.int64)
    if place.rank == 0:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        told = torch.tensor([*socket.inet_aton(host), *divmod(port, 256)], dtype=torch.int64)
    hvd.broadcast_(told, root_rank=0, name="fastdistil.address")
    *parts, high, low = told.tolist()
    return dataclasses.replace(place, address=".".join(map(str, parts)), port=256 * high + low)


def _ring_main() -> None:
    """A communicator process: `python -m fastdistil.world`, started by rings.RingProcesses."""
    hvd = import_horovod()
    rings.serve(hvd.init, partial(start_horovod, hvd), hvd.shutdown)


if __name__ == "__main__":
    _ring_main()
