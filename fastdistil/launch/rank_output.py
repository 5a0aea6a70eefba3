"""The ranks' lines on the launcher's own streams, each with its rank where there are several."""

import contextlib
import os
import threading
from typing import IO, TextIO


class RankOutput:
    """What the ranks write on standard error, put on ours: rank 0's as it is, the others' lines with their rank before them.

    Lines that rewrite themselves (progress bars) are rank 0's alone.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def listen(self, rank: int, pipe: IO[bytes]) -> None:
        """Pass on what comes until the pipe ends; in a thread for each rank."""
        partial = b""
        while chunk := os.read(pipe.fileno(), 65536):
            if rank == 0:  # at once: a prompt or a progress bar must not wait for its line's end
                self._write(chunk)
                continue
            *lines, partial = (partial + chunk).split(b"\n")
            for line in lines:
                self._label(rank, line)
        if partial:
            self._label(rank, partial)

    def _label(self, rank: int, line: bytes) -> None:
        if b"\r" not in line:
            self._write(b"[rank %d] %s\n" % (rank, line))

    def say(self, text: str) -> None:
        """Write a line of the launcher's own."""
        self._write(f"fastdistil: {text}\n".encode())

    def _write(self, data: bytes) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # nobody listens any more: the run goes on
            self._out.write(data.decode(errors="replace"))
            self._out.flush()
