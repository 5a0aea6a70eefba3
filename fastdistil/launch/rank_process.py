"""One rank's process, here or on another host over ssh.

A rank here is a child in a session of its own: a terminal's Ctrl-C reaches the launcher alone, and one signal to its group
ends whatever it started. A rank elsewhere is a child of `supervise` there, which ssh starts: it gets the rank's command and
environment as a line of JSON on its standard input (no secret shows in a process list), then the numbers of signals to pass
on; when that input ends, because the launcher or the connection is gone, it ends the rank.
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

from fastdistil.distributed.rank_info import RANK_VARIABLES
from fastdistil.launch.rank_output import RankOutput
from fastdistil.profiling.device import usable_cores
from fastdistil.streams import lasting

# What a rank on another host is told of the launcher's environment; the rest (PATH, HOME, ...) is that host's own.
_CARRIED = re.compile(
    r"(FASTDISTIL|HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|TORCH|PYTORCH|TRITON|NCCL|GLOO|HOROVOD|OMP|MKL|CUBLAS)_.*"
)
SSH = "ssh -T -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""What reaches another host; FASTDISTIL_SSH replaces it. No passwords are asked for, and a dead connection is noticed."""
_ORPHAN_S = 600.0
"""Beyond world.timeout_s, for a rank on another host to save when the launcher is gone: no user is left to insist."""
KILL_AFTER_S = 5.0
"""Between a last SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Slot:
    """Room for one rank: the `index`-th of `host`, and so that host's GPU of that number. None: this machine."""

    host: str | None
    index: int

    def __str__(self) -> str:
        return f"slot {self.index} of {self.host or 'this machine'}"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What `run_ranks` starts: `command` in every slot, rank 0 in the first."""

    command: Sequence[str]
    slots: Sequence[Slot]
    timeout_s: float
    logs: Path
    """Directory for the standard output of ranks other than 0."""
    environ: Mapping[str, str]

    @property
    def ssh(self) -> list[str]:
        return shlex.split(self.environ.get("FASTDISTIL_SSH") or SSH)


def _end_group(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def rank_environment(base: Mapping[str, str], variables: Mapping[str, str], devices: Sequence[int] | None) -> dict[str, str]:
    """A rank's environment: `base` without another launcher's variables; `variables`, threads, torch's log level, and the
    GPUs of the slots in use.

    `devices`: None if the slots in use are a host's first ones, for then LOCAL_RANK is the number of the GPU.
    """
    environ = {name: value for name, value in base.items() if not RANK_VARIABLES.fullmatch(name)}
    environ |= variables
    environ["FASTDISTIL_LAUNCHER_PID"] = str(os.getpid())
    environ.setdefault("OMP_NUM_THREADS", str(max(1, int(usable_cores() // int(variables["LOCAL_WORLD_SIZE"])))))
    # Below it, each rank prints a C++ stack when rank 0 and its store are gone; what happened, the ranks say themselves.
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if devices is not None:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(max(devices) + 1)]
        if max(devices) < len(names):
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in devices)
    return environ


def tie_to_launcher(environ: MutableMapping[str, str]) -> None:
    """Let a rank get SIGTERM when the process that started it is gone, however that one ended (Linux).

    Its number is taken out of `environ`: what a rank starts is not the launcher's.
    """
    launcher = environ.pop("FASTDISTIL_LAUNCHER_PID", None)
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(launcher):  # it was gone before
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class RankProcess:
    """A started rank. `start` makes one."""

    rank: int
    slot: Slot
    process: "subprocess.Popen[bytes]"
    threads: list[threading.Thread] = field(default_factory=list)
    code: int | None = None
    """How it ended: its exit code, or minus the number of the signal that killed it."""

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" on {self.slot.host}" if self.slot.host else "")

    def ended(self) -> bool:
        """Return whether it has ended since the last call."""
        if self.code is not None or (code := self.process.poll()) is None:
            return False
        _end_group(self.process.pid)  # what it may have started
        self.code = 128 - code if self.slot.host and 128 < code < 128 + signal.NSIG else code
        return True

    def send(self, number: int) -> None:
        if self.slot.host is None:
            self.process.send_signal(number)
        elif self.process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has ended
                self.process.stdin.write(f"{int(number)}\n".encode())
                self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it at once, with all that it started."""
        self.send(signal.SIGKILL)
        if self.slot.host is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_AFTER_S)  # the word has to arrive
        _end_group(self.process.pid)
        self.process.wait()

    def close(self) -> None:
        for thread in self.threads:
            thread.join(KILL_AFTER_S)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def start(
    rank: int, begin: Launch, variables: Mapping[str, str], devices: Sequence[int] | None, output: RankOutput
) -> RankProcess:
    """Start a rank. Rank 0 has our standard output; the others' goes to a file in `begin.logs`."""
    slot, base = begin.slots[rank], begin.environ
    # A notebook's cell and a test's capture replace sys.stdout, which a child's descriptor knows nothing of.
    piped = rank == 0 and not _is_standard_output(sys.stdout)
    with contextlib.nullcontext() if rank == 0 else (begin.logs / f"rank-{rank}.log").open("wb") as file:
        stdout: Any = subprocess.PIPE if piped else file
        if slot.host is None:
            process = _popen(list(begin.command), stdout, rank_environment(base, variables, devices))
        else:
            process = _popen(on_host(begin.ssh, slot.host, _remote_line(base)), stdout, None)
            request = {
                "command": list(begin.command),
                "environ": {name: value for name, value in base.items() if _CARRIED.fullmatch(name)} | dict(variables),
                "devices": devices,
                "patience_s": begin.timeout_s + _ORPHAN_S,
            }
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # ssh has ended: its exit code says more
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
    started = RankProcess(rank, slot, process)
    assert process.stderr is not None
    started.threads.append(threading.Thread(target=output.listen, args=(rank, process.stderr), daemon=True))
    if piped:
        assert process.stdout is not None
        started.threads.append(threading.Thread(target=_pump, args=(process.stdout, sys.stdout), daemon=True))
    for thread in started.threads:
        thread.start()
    return started


def _popen(command: list[str], stdout: Any, environ: Mapping[str, str] | None) -> "subprocess.Popen[bytes]":
    stdin = subprocess.PIPE if environ is None else subprocess.DEVNULL
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environ, start_new_session=True)


def _is_standard_output(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (AttributeError, OSError, ValueError):  # it has no descriptor
        return False


def _pump(pipe: IO[bytes], stream: TextIO) -> None:
    out = lasting(stream)  # a rank whose output nobody takes would wait for ever
    while chunk := os.read(pipe.fileno(), 65536):
        out.write(chunk.decode(errors="replace"))
        out.flush()


def on_host(ssh: Sequence[str], host: str, line: str) -> list[str]:
    """Return the command by which `ssh` has `host`, which is never one of its options, run a line of its shell."""
    return [*ssh, "--", host, line]


def _remote_line(base: Mapping[str, str]) -> str:
    """What ssh has the other host's shell run: the same Python in the same directory."""
    path = f"PYTHONPATH={shlex.quote(base['PYTHONPATH'])} " if base.get("PYTHONPATH") else ""
    return f"cd {shlex.quote(str(Path.cwd()))} || exit 2; exec env {path}{shlex.quote(sys.executable)} -m fastdistil.launch"


def supervise(commands: IO[bytes], base: Mapping[str, str]) -> int:
    """On another host: run the rank that the first line of `commands` describes. Returns its exit code, or 128 + signal."""
    line = commands.readline()
    if not line:
        return 2
    request = json.loads(line)
    environ = rank_environment({**base, **request["environ"]}, request["environ"], request["devices"])
    child = subprocess.Popen(request["command"], stdin=subprocess.DEVNULL, env=environ, start_new_session=True)
    threading.Thread(target=_obey, args=(commands, child, request["patience_s"]), daemon=True).start()
    code = child.wait()
    _end_group(child.pid)
    return 128 - code if code < 0 else code


def _obey(commands: IO[bytes], child: "subprocess.Popen[bytes]", patience_s: float) -> None:
    for line in commands:
        number = int(line)
        if number == signal.SIGKILL:
            _end_group(child.pid)
        else:
            child.send_signal(number)
    # The launcher is gone, or the way to it.
    child.send_signal(signal.SIGTERM)
    time.sleep(patience_s)
    _end_group(child.pid)
