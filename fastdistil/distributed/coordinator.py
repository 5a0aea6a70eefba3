"""A rank's dealings with the others around the steps: begin alike, agree, share what rank 0 knows, fail together.

Rank 0 alone reads and writes the run directory, so nodes need not share a disk for it.
"""

import json
import signal as signals
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fastdistil import __version__, errors
from fastdistil.distributed.horovod_world import join_horovod
from fastdistil.distributed.monitor import Monitor, agree_equal
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.rendezvous import Connect, choose_interface, open_store
from fastdistil.distributed.torch_world import TorchWorld
from fastdistil.distributed.world import OnConnect, World
from fastdistil.errors import CorruptData, FastdistilError, RankLost, UserError
from fastdistil.recipe import Recipe
from fastdistil.recipe import WorldOptions as Options
from fastdistil.runs import PAUSE

T = TypeVar("T")


@contextmanager
def joined(place: RankInfo | None, recipe: Recipe, note: Callable[[str], None]) -> "Iterator[Coordinator]":
    """This process as one of the place's ranks, until the block ends. Raises UserError, RankLost; see `join`.

    When this rank fails, the others learn why before they wait for it. `note` is for rank 0's warnings.
    """
    options, chief_note = recipe.world, note if place is not None and place.rank == 0 else _nothing
    equal = {"recipe": recipe.to_yaml(), "fastdistil": __version__, "torch": torch.__version__}
    if recipe.device == "cpu":  # sums over a whole gradient are cut by threads, and weights would drift apart by their rounding
        equal["number of threads (OMP_NUM_THREADS)"] = str(torch.get_num_threads())
    monitor: Monitor | None = None

    def met(connect: Connect) -> Monitor:
        nonlocal monitor
        assert place is not None
        monitor = Monitor(connect(), place.rank, place.size, timeout_s=options.timeout_s, note=chief_note)
        agree_equal(connect(), place.rank, place.size, equal, monitor)
        return monitor

    try:
        try:
            world = join(place, options, torch.device(recipe.device), met)
            yield Coordinator(world, monitor)
            _leave(world, monitor)
        except (errors.Stopped, errors.NonFinite):  # on all ranks alike
            _leave(world, monitor)
            raise
        except RankLost as error:  # of whatever needed the lost rank first: the verdict's words are the same for all
            if monitor is None:
                raise
            raise monitor.lost(error) from error
        except BaseException as error:
            if monitor is not None:
                monitor.failed(error)
            raise
    finally:
        if monitor is not None:
            monitor.close()


def _leave(world: World, monitor: Monitor | None) -> None:
    """Leave with all others: after an error they are not there, and the engine would wait.

    Nobody leaves before rank 0 has written what it has to: launchers take the first rank's end for everybody's, and kill the
    rest.
    """
    if monitor is None:
        return
    with monitor.unhurried("leaving"):
        world.barrier("fastdistil.leave")
        world.close()
    monitor.finished()


def _nothing(_: str) -> None:
    return


Groups = dict[str, dict[str, Tensor]]

# Of a float's 64 bits so many that the sum over ranks fits again.
_VALID = 2**48 - 59

# A hash's weights of the columns: odd, so that no bit of a weight is lost.
_COLUMNS = 1024


class _UpdateCounts(Protocol):
    """What an update counts over all ranks, see data.batch.Counts."""

    @property
    def batches(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def labels(self) -> int: ...
    @property
    def valid(self) -> float: ...


class Decision(NamedTuple):
    """The same on all ranks."""

    stop: bool
    paused: bool
    """Nobody had a signal: it was a PAUSE file."""
    why: str


class Coordinator:
    """`monitor`: None for one rank alone."""

    def __init__(self, world: World, monitor: Monitor | None) -> None:
        self.world, self.monitor = world, monitor

    @property
    def is_chief(self) -> bool:
        return self.world.is_chief

    @property
    def alone(self) -> bool:
        return self.world.size == 1

    def phase(self, name: str, update: int | None = None) -> None:
        if self.monitor is not None:
            self.monitor.phase(name, update)

    def unhurried(self, name: str) -> AbstractContextManager[Any]:
        """Return a context for what may take as long as it needs."""
        return self.monitor.unhurried(name) if self.monitor is not None else nullcontext()

    def stop_wanted(self, reason: str | None) -> str | None:
        """This rank's reason to stop, or another's. The others hear of it within a second."""
        if self.monitor is None or reason is None:
            return reason if self.monitor is None else self.monitor.stop_requested
        if self.monitor.stop_requested is None:
            self.monitor.request_stop(reason)
        return reason

    def decide(self, signal: str | None, pause: bool, counts: _UpdateCounts) -> Decision:
        """Decide whether the update under way is dropped, from the signal that each rank had, and from PAUSE.

        `counts` of the update over all ranks, as this rank knows them. Raises UserError where ranks know different ones: their
        gradients would be divided by different numbers.
        """
        if self.alone:
            return Decision(signal is not None or pause, signal is None, signal or PAUSE)
        number = 0 if signal is None else signals.Signals[signal].value
        valid = int.from_bytes(struct.pack("<d", counts.valid), "little") % _VALID
        own_counts = [counts.batches, counts.tokens, counts.labels, valid]
        terms = [int(number > 0), number, self.world.rank if number else 0, int(pause), *own_counts]
        having, numbers, ranks, pauses, *sums = self.world.sum(terms, "fastdistil.stop")
        if sums != [self.world.size * count for count in own_counts]:
            raise UserError(
                f"the ranks have different batches: rank {self.world.rank} counts {counts.tokens} tokens in {counts.batches} "
                "micro-batches of an update, others do not; an iterable of batches must give the same on every rank"
            )
        if not having:
            return Decision(pauses > 0, True, PAUSE)
        # One rank's, or one that a launcher passed on to several: the mean is it.
        name = signals.Signals(numbers // having).name if numbers % having == 0 else "signals"
        return Decision(True, False, f"{name} on rank {ranks}" if having == 1 else f"{name} on {having} ranks")

    def require_equal(self, facts: Mapping[str, str]) -> None:
        """What must be the same on all ranks. Raises UserError on every rank, naming those that differ, and in what."""
        if self.monitor is not None:
            assert self.world.connect is not None
            self.world.barrier("fastdistil.ready")  # some load for longer, and have all the time that they need
            store = self.world.connect()
            agree_equal(store, self.world.rank, self.world.size, facts, self.monitor)

    def chief_does(self, topic: str, work: Callable[[], T]) -> T:
        """Rank 0's result (as JSON has it) on every rank; what it raises, every rank raises."""
        if self.alone:
            return work()
        answer: dict[str, Any] = {}
        if self.is_chief:
            try:
                answer["result"] = work()
            except FastdistilError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
        data = json.dumps(answer).encode() if self.is_chief else b""
        answer = json.loads(self.world.broadcast_bytes(data, f"fastdistil.{topic}"))
        if "error" in answer:
            raise getattr(errors, answer["error"], RankLost)(answer["message"])
        result: T = answer["result"]
        return result

    def share(self, groups: Groups | None, topic: str, root: int = 0) -> Groups:
        """Root's tensors, by group and name, on every rank's device; the others give None, or tensors to be overwritten."""
        if self.alone:
            assert groups is not None
            return groups
        shapes = {
            group: {name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
            for group, tensors in (groups or {}).items()
        }
        data = self.world.broadcast_bytes(json.dumps(shapes).encode(), f"fastdistil.{topic}.shapes", root)
        if groups is None:
            groups = {
                group: {
                    name: torch.empty(shape, dtype=getattr(torch, dtype), device=self.world.device)
                    for name, (shape, dtype) in layouts.items()
                }
                for group, layouts in json.loads(data).items()
            }
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                flat = tensor.detach().contiguous().view(-1)
                self.world.broadcast(flat, f"fastdistil.{topic}.{group}.{name}", root)
                if flat.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(flat.view(tensor.shape))
        return groups

    def send_each(self, read: Callable[[int], Mapping[str, Tensor]], states: Mapping[str, Tensor], topic: str) -> None:
        """What rank 0's `read(r)` gives becomes rank r's `states`, in place, and travels to no other. Names and shapes are the
        same on all ranks."""
        for rank in range(self.world.size):
            rank_states = read(rank) if self.is_chief else {name: _host_memory(tensor) for name, tensor in states.items()}
            for name, tensor in states.items():
                carried = rank_states[name].to("cpu", tensor.dtype).contiguous()
                assert carried.shape == tensor.shape, (name, carried.shape, tensor.shape)
                self.world.move(carried, f"fastdistil.{topic}.{name}", source=0, target=rank)
                if rank == self.world.rank:
                    tensor.copy_(carried)

    def fetch_each(self, states: Mapping[str, Tensor], topic: str) -> Iterator[dict[str, Tensor]]:
        """On rank 0 the states of every rank, one after the other, on the CPU; the others send theirs, and get nothing."""
        for rank in range(self.world.size):
            fetched = {}
            for name, tensor in states.items():
                holds = self.world.rank == rank
                carried = tensor.cpu().contiguous() if holds else _host_memory(tensor)
                self.world.move(carried, f"fastdistil.{topic}.{name}", source=rank, target=0)
                fetched[name] = carried
            yield fetched if self.is_chief else {}

    def collect_bytes(self, payload: bytes, topic: str) -> Iterator[bytes]:
        """On rank 0 every rank's, by rank, one after the other; elsewhere as many empty ones. All iterate to the end."""
        sizes = [int(size) for (size,) in self.world.gather([len(payload)], f"fastdistil.{topic}.sizes")]
        for rank, size in enumerate(sizes):
            if rank == self.world.rank:
                data = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[:size]
            else:
                data = torch.empty(size, dtype=torch.uint8)
            self.world.move(data, f"fastdistil.{topic}.{rank}", source=rank, target=0)
            yield data.numpy().tobytes() if self.is_chief else b""

    def check_replicas(self, weights: Sequence[Tensor], update: int) -> None:
        """Raises CorruptData, naming the ranks whose weights are not, bit for bit, rank 0's. Waits for the device."""
        if self.alone:
            return
        first, *others = self.world.gather([float(content_hash(weights))], "fastdistil.replicas")
        differing = [str(rank) for rank, value in enumerate(others, 1) if value != first]
        if differing:
            raise CorruptData(
                f"after update {update} the weights of rank {', '.join(differing)} are not those of rank 0; an exchange or a "
                "device damaged them: continue from the last checkpoint with --resume auto, and look at that rank's machine"
            )


def _host_memory(like: Tensor) -> Tensor:
    """Contiguous. The system takes none of it until it is written to."""
    return torch.empty(like.shape, dtype=like.dtype)


def content_hash(tensors: Sequence[Tensor]) -> int:
    """53 bits of the tensors' bits, in order: a sum of 32-bit words, weighted by column, in integers (so in any order)."""
    total = 0
    sums = []
    for tensor in tensors:
        words = tensor.detach().contiguous().view(torch.int32).flatten()
        aligned = len(words) // _COLUMNS * _COLUMNS
        columns = words[:aligned].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
        columns[: len(words) - aligned] += words[aligned:]
        weights = 2 * torch.arange(_COLUMNS, device=tensor.device) + 1
        sums.append((columns * weights).sum())
    for number, value in enumerate(torch.stack(sums).tolist()):
        total = (total * 1_000_003 + value + number) % (2**53 - 111)
    return total


def join(place: RankInfo | None, options: Options, device: torch.device, met: OnConnect = lambda _: None) -> World:
    """Become one of the place's ranks. Raises UserError (an engine that is not there, a port in use), RankLost (not all came).

    `met`: see OnConnect; what it raises ends this. Not called where there is one rank.
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
    return join_horovod(place, options, device, met)


def _choose_gpu(place: RankInfo | None) -> None:
    """The local rank's; or the only one, where the launcher shows each rank its own."""
    if place is None:
        return
    visible = torch.cuda.device_count()
    if visible < place.local_size and visible != 1:
        raise UserError(f"{place.local_size} ranks on this node and {visible} GPUs; start one rank for each GPU")
    torch.cuda.set_device(place.local_rank if visible > 1 else 0)
