"""Collectives between ranks, behind one small interface: what every engine has, and one rank alone.

    world.allreduce / all_to_all / all_gather   asynchronous, on flat buffers, each on one of `world.rings` rings
    world.sum / gather / barrier                small, and waited for: control messages, counted apart
    world.broadcast / move                      rare (a start, a resume, one re-ordering of buckets): not counted

coordinator.join makes one. Horovod and torch.distributed both meet through one torch TCPStore, which rank 0 serves at the
place's address: it starts the engine (Horovod's own rendezvous server runs inside rank 0), and the monitor lives on it.

What a ring is:
    torch, Gloo      a process group over all ranks, with a TCP connection of its own between each two of them
    torch, NCCL      a process group, that is a communicator, of which NCCL makes at least `rings` CTAs
    Horovod, NCCL    one of HOROVOD_NUM_NCCL_STREAMS communicators, taken in turn; Horovod's fusion is off, so that several
                     buckets are under way at once
    Horovod, CPU     Horovod runs one collective after another on one thread. Ring 0 is this process's Horovod; with several
                     rings each is a communicator process with its own Horovod context, over shared memory (horovod_rings.py)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.rendezvous import Connect
from fastdistil.errors import FastdistilError, RankLost

Collective = Literal["allreduce", "all_to_all", "all_gather"]
_MOVED_BYTES = 2**26
"""At a time: engines count bytes in 32 bits, and copy."""


class RankWatch(Protocol):
    """What a wait asks while it lasts; monitor.Monitor is one."""

    def check(self) -> None: ...
    def waiting(self, operation: str) -> AbstractContextManager[Any]: ...
    def unhurried(self, name: str) -> AbstractContextManager[Any]: ...
    def lost(self, error: BaseException) -> RankLost: ...


OnConnect = Callable[[Connect], RankWatch | None]
"""Called when the ranks can reach each other's store and no engine has been started: to compare, and to watch from there on."""


@dataclass
class Counters:
    """What this rank sent since the start. Bytes are those of ring and pairwise algorithms, without packet headers."""

    gradient_collectives: int = 0
    ring_bytes: list[int] = field(default_factory=list)
    """Traffic of gradients, per ring."""
    control_messages: int = 0
    control_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        return sum(self.ring_bytes)

    def since(self, before: "Counters") -> dict[str, Any]:
        """Return the counts as fields of an event."""
        return {
            "gradient_collectives": self.gradient_collectives - before.gradient_collectives,
            "gradient_bytes": self.gradient_bytes - before.gradient_bytes,
            "ring_bytes": [now - then for now, then in zip(self.ring_bytes, before.ring_bytes, strict=True)],
            "control_messages": self.control_messages - before.control_messages,
            "control_bytes": self.control_bytes - before.control_bytes,
        }

    def copy(self) -> "Counters":
        return Counters(self.gradient_collectives, list(self.ring_bytes), self.control_messages, self.control_bytes)


def sent_bytes(kind: Collective, nbytes: int, ranks: int) -> int:
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
        place: RankInfo | None,
        device: torch.device,
        ring_count: int = 1,
        connect: Connect | None = None,
        watch: RankWatch | None = None,
    ) -> None:
        self.rank, self.size = (place.rank, place.size) if place is not None else (0, 1)
        self.local_rank, self.local_size = (place.local_rank, place.local_size) if place is not None else (0, 1)
        self.cross_rank, self.cross_size = (place.cross_rank, place.cross_size) if place is not None else (0, 1)
        self.device, self.rings, self.connect = device, ring_count, connect
        self.counters = Counters(ring_bytes=[0] * ring_count)
        self.watch = watch

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
        try:
            with waiting(self.watch, handle.name):
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

    def sum(self, values: Sequence[int], name: str) -> list[int]:
        """Return the sums of all ranks' 64-bit integers, on every rank."""
        return self.wait(self.sum_async(values, name)).tolist()

    def sum_async(self, values: Sequence[int], name: str) -> Handle:
        return self._control("allreduce", torch.tensor(list(values), dtype=torch.int64), name)

    def gather(self, values: Sequence[float], name: str) -> list[list[float]]:
        """Every rank's float64 numbers, by rank."""
        gathered = self.wait(self._control("all_gather", torch.tensor(list(values), dtype=torch.float64), name))
        return gathered.view(self.size, -1).tolist()

    def sum_terms(self, tensor: Tensor, name: str) -> Handle:
        """A few scalars on the device, summed in place; counts as a control message."""
        return self._control("allreduce", tensor, name)

    def broadcast(self, tensor: Tensor, name: str, root: int = 0) -> None:
        """Every rank's `tensor` (contiguous, any dtype) becomes root's."""
        if tensor.numel():
            self.wait(self._begin(name, lambda: self._broadcast(tensor, name, root)))

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
        if source == target or not tensor.numel():
            return
        for part in torch.split(tensor.view(-1).view(torch.uint8), _MOVED_BYTES):
            sent, received = part[: part.numel() * (self.rank == source)], part[: part.numel() * (self.rank == target)]
            start = partial(self._move, sent, received.numel(), name, source, target)
            received.copy_(self.wait(self._begin(name, start)))

    def barrier(self, name: str = "barrier") -> None:
        self.sum([0], name)

    def close(self) -> None:
        """Orderly, after the last collective."""

    def _start(self, kind: Collective, tensor: Tensor, name: str, ring: int) -> Handle:
        assert tensor.dim() == 1, tensor.shape
        assert tensor.is_contiguous()
        assert 0 <= ring < self.rings, (ring, self.rings)
        self.counters.gradient_collectives += 1
        self.counters.ring_bytes[ring] += sent_bytes(kind, tensor.nbytes, self.size)
        return self._begin(name, lambda: self._carry(kind, tensor, name, ring))

    def _control(self, kind: Collective, tensor: Tensor, name: str) -> Handle:
        if self.size > 1:
            self.counters.control_messages += 1
            self.counters.control_bytes += sent_bytes(kind, tensor.nbytes, self.size)
        return self._begin(name, lambda: self._carry(kind, tensor, name, None))

    def _begin(self, name: str, start: Callable[[], Handle]) -> Handle:
        """Start any collective: an engine may refuse it already here, because a rank is gone. Raises RankLost."""
        if self.watch is not None:
            self.watch.check()  # an engine that still waits for a lost rank accepts ever more
        try:
            return start()
        except Exception as error:
            raise self._lost(name, error) from error

    def _carry(self, kind: Collective, tensor: Tensor, name: str, ring: int | None) -> Handle:
        """ring None: a control message."""
        return Handle(name, lambda: True, lambda: tensor)

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> Handle:
        return Handle(name, lambda: True, lambda: tensor)

    def _move(self, sent: Tensor, received_bytes: int, name: str, source: int, target: int) -> Handle:
        """Bytes from the source, or none; so many to be received. One rank alone is both, and `move` asks for nothing."""
        return Handle(name, lambda: True, lambda: sent)

    def _splits(self, sent_bytes: int, received_bytes: int, source: int, target: int) -> tuple[list[int], list[int]]:
        """Return what this rank sends to each, and receives from each, in an uneven all-to-all."""
        ranks = range(self.size)
        return [sent_bytes * (r == target) for r in ranks], [received_bytes * (r == source) for r in ranks]

    def _lost(self, name: str, error: Exception) -> Exception:
        return lost(self.watch, self.rank, name, error)


def waiting(watch: RankWatch | None, operation: str) -> AbstractContextManager[Any]:
    return watch.waiting(operation) if watch is not None else nullcontext()


def unhurried(watch: RankWatch | None, name: str) -> AbstractContextManager[Any]:
    """Return the block around what may take as long as it needs."""
    return watch.unhurried(name) if watch is not None else nullcontext()


def lost(watch: RankWatch | None, rank: int, name: str, error: Exception) -> RankLost:
    if watch is not None:
        return watch.lost(error)
    return RankLost(f"rank {rank} could not finish {name}: {' '.join(str(error).split())}")


@contextmanager
def starting(watch: RankWatch | None, rank: int) -> Iterator[None]:
    """Watch over what an engine does with all ranks to get ready."""
    try:
        with waiting(watch, "the engine's connections"):
            yield
    except FastdistilError:
        raise
    except Exception as error:
        raise lost(watch, rank, "its connections", error) from error
