"""Python programs that start in milliseconds: forks of one process that has imported what nearly all of them need.

Most of a short rank's time is the import of torch and transformers, some 4 seconds of a core. A `ForkServer` pays it once. Its
`popen` is `subprocess.Popen` for a Python script with piped output: another process in a session of its own, with exactly the
environment and the directory that are asked for, and an interpreter that runs the script as `__main__` and ends as ever.

What an import or the interpreter's start reads from the environment is the server's: OMP_NUM_THREADS, TRITON_INTERPRET,
TORCH_CPP_LOG_LEVEL, PYTHONHASHSEED; so all forks have the same hashes of strings. A test of such a variable, of sets whose
order ranks must not trust, or of the start of a command itself, starts its processes the ordinary way.
"""

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "torch.distributed",
    "transformers.models.bert.modeling_bert",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.gpt2.modeling_gpt2",
    "fastdistil.train",
    "fastdistil.api",
    "fastdistil.cli",
)
DESCRIPTORS = 3
"""Of a request: the program's standard output and standard error, and where the server writes how it ended."""
POLL_S = 0.005


# --- the server's side ---


def serve(connection: socket.socket) -> tuple[list[str], socket.socket]:
    """Fork a process for each request until the connection ends; returns, in each of them, the program's argv."""
    import gc
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a library has started threads, which a fork would lose"
    gc.freeze()  # collections of the children leave the shared pages alone
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    ends: dict[int, int] = {}  # process id -> where its end is written
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    connection.send(b"ready")
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if wake in ready:
            os.read(wake, 4096)
            _reap(ends)
        if connection not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, DESCRIPTORS)
        if not message:
            os._exit(0)
        request = json.loads(message)
        pid = os.fork()
        if pid == 0:
            selector.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (wake, waker, descriptors[2], *ends.values()):
                os.close(descriptor)
            connection.close()
            return _become(request, descriptors[:2])
        ends[pid] = descriptors[2]
        for descriptor in descriptors[:2]:
            os.close(descriptor)
        connection.send(json.dumps(pid).encode())


def _reap(ends: dict[int, int]) -> None:
    while ends:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        descriptor = ends.pop(pid)
        with contextlib.suppress(OSError):  # nobody asks any more
            os.write(descriptor, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(descriptor)


def _become(request: dict[str, Any], descriptors: Sequence[int]) -> Any:
    """In the fork: take the place of the process that was asked for, up to the first line of its program."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (descriptors[0], 1), (descriptors[1], 2)):
        os.dup2(source, target)
        os.close(source)
    argv = request["argv"]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in sys.path]
    sys.path[:] = [str(Path(argv[0]).resolve().parent), *added, *sys.path[1:]]
    sys.argv[:] = argv
    sys.orig_argv[:] = [sys.executable, *argv]
    return argv


# --- the tests' side ---


class ForkedProcess:
    """A program that the server forked; the part of `subprocess.Popen` that tests use."""

    def __init__(self, args: Sequence[str], pid: int, end: int, stdout: IO[str], stderr: IO[str]) -> None:
        self.args, self.pid, self.stdout, self.stderr = list(args), pid, stdout, stderr
        self.returncode: int | None = None
        self._end = end
        os.set_blocking(end, False)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                text = os.read(self._end, 64)
                if not text:  # the server is gone, and nobody else would end the process
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.pid, signal.SIGKILL)
                self.returncode = int(text) if text else -signal.SIGKILL
                os.close(self._end)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(POLL_S)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both outputs to their ends, and wait. Raises subprocess.TimeoutExpired."""
        texts = ["", ""]

        def read(index: int, stream: IO[str]) -> None:
            texts[index] = stream.read()

        threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in enumerate((self.stdout, self.stderr))]
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if deadline is None else max(POLL_S, deadline - time.monotonic()))
        self.stdout.close()
        self.stderr.close()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkServer:
    """Starts the server; `close` ends it."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environ, pass_fds=[theirs.fileno()], cwd=ROOT, start_new_session=True)
        theirs.close()
        self._lock = threading.Lock()
        self._connection.settimeout(120)
        assert self._connection.recv(16) == b"ready", "the fork server did not start"

    def popen(self, command: Sequence[str], env: Mapping[str, str], cwd: str | Path | None = None) -> ForkedProcess:
        """Start `command`, which is [sys.executable, script, *arguments], with piped standard output and error."""
        executable, *argv = command
        assert executable == sys.executable and argv[0].endswith(".py"), command
        request = {"argv": argv, "environ": dict(env), "cwd": str(cwd or Path.cwd())}
        (out, out_end), (err, err_end), (end, end_end) = (os.pipe() for _ in range(DESCRIPTORS))
        try:
            with self._lock:
                descriptors = array.array("i", [out_end, err_end, end_end])
                socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors.tolist())
                pid = json.loads(self._connection.recv(64))
        finally:
            for descriptor in (out_end, err_end, end_end):
                os.close(descriptor)
        texts = [os.fdopen(descriptor, encoding="utf-8", errors="replace") for descriptor in (out, err)]
        return ForkedProcess(command, pid, end, *texts)

    def close(self) -> None:
        self._connection.close()
        self._process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    import runpy

    program, *_ = serve(socket.socket(fileno=int(sys.argv[1])))
    # Here, at the top level, so that SystemExit, KeyboardInterrupt, exceptions and the interpreter's end are Python's own.
    runpy.run_path(program, run_name="__main__")
