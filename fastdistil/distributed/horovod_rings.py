"""Communicator processes: several collectives of an engine that runs one at a time, side by side.

A rank starts one helper, which loads the engine's library once and forks into one process a ring, each with a context of its
own. Buffers live in anonymous shared memory, so that a ring process works on the rank's own gradients; only short messages
pass through a socket. A ring process ends when its rank's end of the socket is closed, however that came.

Messages: JSON, one each way a collective, over SOCK_SEQPACKET; a new buffer's descriptor travels with its first mention.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

_SOCKETS = "FASTDISTIL_RING_SOCKETS"
_ENVIRONMENTS = "FASTDISTIL_RING_ENVIRONMENTS"
_MESSAGE_BYTES = 1 << 16
_ALIGNMENT = 4096

StartCollective = Callable[[Any, Tensor, str], tuple[Callable[[], bool], Callable[[], Tensor]]]


class _Buffer(NamedTuple):
    number: int
    descriptor: int
    memory: Tensor
    """uint8, all of it."""


class RingProcesses:
    """The rank's side: one process for each of `environments`, which its engine reads when it starts.

    They are of use after `wait_until_loaded` and `connect`.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in environments]
        self._sockets = [ours for ours, _ in pairs]
        theirs = [their.fileno() for _, their in pairs]
        environment = {
            **os.environ,
            _SOCKETS: json.dumps(theirs),
            _ENVIRONMENTS: json.dumps([dict(variables) for variables in environments]),
            "OMP_NUM_THREADS": "1",
        }
        # In a session of its own: Ctrl-C is for the rank, which ends its rings when it is done.
        self._process = subprocess.Popen(
            command, pass_fds=theirs, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
        for _, their in pairs:
            their.close()
        self._buffers: list[_Buffer] = []
        self._known: list[set[int]] = [set() for _ in pairs]
        self._staging: dict[str, Tensor] = {}
        self._answers: dict[str, dict[str, Any]] = {}

    def wait_until_loaded(self) -> None:
        """Wait until every process has loaded its engine's library, which concerns no other rank. Raises ConnectionError."""
        for connection in self._sockets:
            self._receive(connection)

    def connect(self) -> None:
        """Have every process connect to those of the other ranks, which are to do the same now. Raises ConnectionError."""
        for connection in self._sockets:
            connection.send(b'{"kind": "connect"}')
        for connection in self._sockets:
            self._receive(connection)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros in memory that the ring processes see too."""
        size = max(_ALIGNMENT, -(-numel * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT)
        descriptor = os.memfd_create("fastdistil-ring")
        os.ftruncate(descriptor, size)
        memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self._buffers.append(_Buffer(len(self._buffers), descriptor, memory))
        return memory[: numel * dtype.itemsize].view(dtype)

    def start(
        self, kind: str, tensor: Tensor, name: str, ring: int, ranks: int
    ) -> tuple[Callable[[], bool], Callable[[], Tensor]]:
        """Start a collective as horovod_world.start_horovod does. A tensor that is not from `empty` is copied in, and back."""
        sent = tensor
        if self._find(tensor) is None:
            sent = self._staged(f"{name}.in", tensor.numel(), tensor.dtype).copy_(tensor)
        target = sent
        if kind != "allreduce":
            target = self._staged(f"{name}.out", tensor.numel() * (ranks if kind == "all_gather" else 1), tensor.dtype)
        message: dict[str, Any] = {"kind": kind, "name": name, "dtype": str(tensor.dtype).removeprefix("torch.")}
        message |= {"source": self._place(sent, ring), "target": self._place(target, ring)}
        self._sockets[ring].send(json.dumps(message).encode())

        def done() -> bool:
            while name not in self._answers and self._receive(self._sockets[ring], wait=False):
                pass
            return name in self._answers

        def finish() -> Tensor:
            while not done():
                self._receive(self._sockets[ring])
            answer = self._answers.pop(name)
            if answer.get("error"):
                raise RuntimeError(answer["error"])
            return tensor.copy_(target) if kind == "allreduce" and target is not tensor else target

        return done, finish

    def close(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):  # gone already, with its rank's peers
                connection.send(b'{"kind": "end"}')
            connection.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for buffer in self._buffers:
            os.close(buffer.descriptor)
        self._buffers.clear()

    def _staged(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        memory = self._staging.get(name)
        if memory is None or memory.numel() != numel or memory.dtype != dtype:
            memory = self._staging[name] = self.empty(numel, dtype)
        return memory

    def _find(self, tensor: Tensor) -> tuple[_Buffer, int] | None:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for buffer in self._buffers:
            start = buffer.memory.data_ptr()
            if start <= first and last <= start + buffer.memory.numel():
                return buffer, first - start
        return None

    def _place(self, tensor: Tensor, ring: int) -> list[int]:
        """[buffer, first byte, elements]; tells the ring of a buffer that it has not seen."""
        location = self._find(tensor)
        assert location is not None
        buffer, first = location
        if buffer.number not in self._known[ring]:
            message = json.dumps({"kind": "buffer", "number": buffer.number, "bytes": buffer.memory.numel()}).encode()
            socket.send_fds(self._sockets[ring], [message], [buffer.descriptor])
            self._known[ring].add(buffer.number)
        return [buffer.number, first, tensor.numel()]

    def _receive(self, ring: socket.socket, wait: bool = True) -> bool:
        """Take in one answer. False if there is none yet. Raises ConnectionError if the process is gone."""
        try:
            data = ring.recv(_MESSAGE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not data:
            raise ConnectionError(f"a communicator process ended (exit code {self._process.poll()})")
        answer = json.loads(data)
        if answer.get("error") and "name" not in answer:
            raise ConnectionError(answer["error"])
        if "name" in answer:
            self._answers[answer["name"]] = answer
        return True


def serve(begin: Callable[[], object], start: StartCollective, end: Callable[[], object]) -> NoReturn:
    """The helper's main: fork into the rings, and in each carry what the rank asks for until it closes its socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sockets, environments = json.loads(os.environ[_SOCKETS]), json.loads(os.environ[_ENVIRONMENTS])
    torch.set_num_threads(1)
    mine = len(sockets) - 1
    children = []
    for ring in range(len(sockets) - 1):
        # Nothing has been started yet that a fork would break: the library is loaded, its threads come with `begin`.
        child = os.fork()
        if child == 0:
            mine = ring
            break
        children.append(child)
    for ring, descriptor in enumerate(sockets):
        if ring != mine:
            os.close(descriptor)
    orderly = False
    with socket.socket(fileno=sockets[mine]) as rank:
        try:
            os.environ.update(environments[mine])
            rank.send(b"{}")
            if rank.recv(_MESSAGE_BYTES):  # the word to connect; nothing: the rank is gone
                begin()
                rank.send(b"{}")
                orderly = _carry_all(rank, start)
        except Exception as error:  # noqa: BLE001 (the rank has to hear of it, whatever it is)
            reason = f"a communicator process failed: {' '.join(str(error).split())[:2000]}"
            with suppress(OSError):  # the rank is gone too
                rank.send(json.dumps({"error": reason}).encode())
    if orderly:
        end()  # with all ranks; otherwise it would wait for those that are gone
    for child in children if mine == len(sockets) - 1 else []:
        os.waitpid(child, 0)
    os._exit(0 if orderly else 1)


def _carry_all(rank: socket.socket, start: StartCollective) -> bool:
    """False if the rank went away without a word."""
    buffers: dict[int, Tensor] = {}
    # With nothing under way it sleeps in recvmsg; otherwise it looks after what is, and for more, in turn.
    running: list[tuple[str, Callable[[], bool], Callable[[], Tensor], Tensor]] = []
    rank.settimeout(None)
    while True:
        rank.settimeout(2e-4 if running else None)
        try:
            data, descriptors, _, _ = socket.recv_fds(rank, _MESSAGE_BYTES, 1)
            if not data:
                return False
            message = json.loads(data)
            if message["kind"] == "end":
                return True
            if message["kind"] == "buffer":
                memory = mmap.mmap(descriptors[0], message["bytes"])
                os.close(descriptors[0])
                buffers[message["number"]] = torch.frombuffer(memory, dtype=torch.uint8)
            else:
                dtype = getattr(torch, message["dtype"])
                source, target = (_view(buffers, message[side], dtype) for side in ("source", "target"))
                running.append((message["name"], *start(message["kind"], source, message["name"]), target))
        except TimeoutError:
            pass
        waiting = []
        for name, done, finish, target in running:
            if not done():
                waiting.append((name, done, finish, target))
                continue
            result = finish()
            if result.data_ptr() != target.data_ptr():
                target.copy_(result)
            rank.settimeout(None)
            rank.send(json.dumps({"name": name}).encode())
        running = waiting


def _view(buffers: Mapping[int, Tensor], place: Sequence[int], dtype: torch.dtype) -> Tensor:
    number, first, count = place
    return buffers[number][first : first + count * dtype.itemsize].view(dtype)
