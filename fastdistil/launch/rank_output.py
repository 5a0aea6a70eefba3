"""The ranks' lines on the launcher's own streams, each with its rank where there are several."""

import contextlib
import os
import threading
import time
from typing import IO, TextIO

from fastdistil.distributed.diagnosis import rank_list


class RankOutput:
    """What the ranks write on standard error, put on ours: rank 0's as it is, the others' lines with their rank before them.

    What a rank says when it ends (an error line, a traceback) is held for a moment, so that what several ranks say alike is
    said once. Lines that rewrite themselves (progress bars) are rank 0's alone.
    """

    HOLD_S = 2.0
    LAST_WORDS = (b"fastdistil: ", b"Traceback (most recent call last)")

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._partial: dict[int, bytes] = {}
        self._held: dict[int, bytes] = {}
        self._held_since_s: float | None = None
        self._shown: set[bytes] = set()

    def listen(self, rank: int, pipe: IO[bytes]) -> None:
        """Until the pipe ends. In a thread for each rank."""
        while chunk := os.read(pipe.fileno(), 65536):
            with self._lock:
                self._hear(rank, chunk)
        with self._lock:
            if tail := self._partial.pop(rank, b""):
                self._line(rank, tail + (b"" if rank == 0 else b"\n"))

    def _hear(self, rank: int, chunk: bytes) -> None:
        *lines, tail = (self._partial.get(rank, b"") + chunk).split(b"\n")
        for line in lines:
            self._line(rank, line + b"\n")
        if rank == 0 and tail and rank not in self._held and not any(words.startswith(tail[:10]) for words in self.LAST_WORDS):
            self._write(tail)  # a prompt, a progress bar: it must not wait for its line's end
            tail = b""
        self._partial[rank] = tail

    def _line(self, rank: int, line: bytes) -> None:
        if rank in self._held or line.startswith(self.LAST_WORDS):
            self._held[rank] = self._held.get(rank, b"") + line
            self._held_since_s = time.monotonic() if self._held_since_s is None else self._held_since_s
        elif rank == 0:
            self._write(line)
        elif b"\r" not in line:
            self._write(_labelled([rank], line))

    def flush(self, now: bool = False) -> None:
        """Say what was held long enough, or all (`now`: the ranks have ended)."""
        with self._lock:
            if self._held_since_s is None or not (now or time.monotonic() - self._held_since_s >= self.HOLD_S):
                return
            by_words: dict[bytes, list[int]] = {}
            for rank in sorted(self._held):
                by_words.setdefault(self._held[rank], []).append(rank)
            for words, ranks in by_words.items():
                if words not in self._shown:
                    self._write(words if ranks[0] == 0 else _labelled(ranks, words))
            self._shown = set() if now else self._shown | by_words.keys()
            self._held.clear()
            self._held_since_s = None

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        with self._lock:
            self._write(f"fastdistil: {text}\n".encode())

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more: the run goes on
            self._out.write(data.decode(errors="replace"))
            self._out.flush()


def _labelled(ranks: list[int], lines: bytes) -> bytes:
    label = f"[{rank_list(ranks)}] ".encode()
    return b"".join(label + line for line in lines.splitlines(keepends=True))
