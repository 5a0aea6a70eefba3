"""Files that survive other processes and power cuts: locks, texts written whole or not at all, reads that notice a cut.

The kernel lets go of a lock when its holder ends, however it ends. Some cluster file systems have no locks at all: there work
goes on, with a note that says what is not protected.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdistil.errors import CorruptData, UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What `flock` answers where the file system, or a network server behind it, has no locks."""
TEMPORARY = ".tmp"
"""What the name of a file ends with while it is written."""


@contextmanager
def locked(path: Path, busy: str, note: Callable[[str], None], *, wait: bool = False) -> Iterator[None]:
    """Hold `path`, which exists, against other processes until the block ends.

    Where another process holds it: raises UserError with the text `busy`, or with `wait` notes that text and waits. Where the
    file system has no locks, a note says what is not protected.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            _lock(handle, busy, note, wait)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            note(
                f"the file system of {path} has no locks ({error.strerror}): nothing keeps a second process from writing "
                "there, so start no other one"
            )
        yield
    finally:
        os.close(handle)


def _lock(handle: int, busy: str, note: Callable[[str], None], wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            raise UserError(busy) from error
        note(busy)
        fcntl.flock(handle, fcntl.LOCK_EX)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that then holds the whole text, or what it held before: also after a power cut or on a full disk."""
    # A name of its own for each process: every rank may write the same text.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RangeReader:
    """Reads ranges of a file's items, where a file that somebody shortens meanwhile is an error with its name.

    A memory map is not used: reading one beyond the file's new end gives zeros, and beyond its last page ends the process
    (SIGBUS) without a word. Positioned reads cost about the same (1 to 2 us a range) and any thread may make them.
    """

    def __init__(self, path: Path, dtype: "np.dtype[Any]", header_bytes: int = 0) -> None:
        """Open `path`, whose items of `dtype` begin after `header_bytes`. Raises ValueError where it does not end with one."""
        self.path, self.dtype = path, dtype
        self._file = path.open("rb", buffering=0)
        self._header_bytes = header_bytes
        self._bytes = os.fstat(self._file.fileno()).st_size
        self._items, remainder = divmod(self._bytes - header_bytes, dtype.itemsize)
        if remainder or self._items < 0:
            raise ValueError(f"{self._bytes} bytes are no whole number of items of {dtype.itemsize} bytes")

    def __len__(self) -> int:
        """Return how many items the file had when it was opened."""
        return self._items

    def read(self, starts: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Return the items of these ranges (first item and number of items, [n] each), laid end to end.

        Raises CorruptData where the file has become shorter than it was when it was opened.
        """
        if os.fstat(self._file.fileno()).st_size < self._bytes:
            raise self._shortened()
        ends = np.cumsum(lengths, dtype=np.int64)
        items = np.empty(int(ends[-1]) if len(ends) else 0, self.dtype)
        memory = memoryview(items.view(np.uint8).data)
        positions = np.asarray(starts, np.int64) * self.dtype.itemsize + self._header_bytes
        begin = 0
        for end, position in zip((ends * self.dtype.itemsize).tolist(), positions.tolist(), strict=True):
            self._fill(memory[begin:end], position)
            begin = end
        return items

    def _fill(self, memory: memoryview, position: int) -> None:
        handle = self._file.fileno()
        received = os.preadv(handle, [memory], position)
        while received < len(memory):  # Linux reads 2 GiB at most at once
            count = os.preadv(handle, [memory[received:]], position + received)
            if count == 0:
                raise self._shortened()
            received += count

    def _shortened(self) -> CorruptData:
        return CorruptData(
            f"{self.path} was shortened while it was in use: {self._bytes} bytes when it was opened, now "
            f"{os.fstat(self._file.fileno()).st_size}; restore it or make it again, and write into no file that is in use"
        )
