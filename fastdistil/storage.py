"""Files that survive other processes and power cuts: locks, checksums, fsync, and texts that are written whole or not at all.

The kernel lets go of a lock when its holder ends, however it ends. Some cluster file systems have no locks at all: there work
goes on, with a note that says what is not protected.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdistil.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
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
            if error.errno not in _NO_LOCKS:
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
    sync(path.parent)


def canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; the files themselves are on disk.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
