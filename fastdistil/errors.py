"""What can go wrong, as exit codes.

Every error a user can cause or meet derives from `FastdistilError`; its text says what was wanted, what was found and what
to do. The command line prints that text on one line and exits with `exit_code`; anything else is a bug of ours (exit 1).
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODES = {
    0: "done",
    1: "a bug of fastdistil (a traceback is printed: please report it)",
    2: "bad input: recipe, arguments, corpus, model",
    3: "a comparison fell short",
    10: "a loss, gradient or measure was not finite",
    11: "out of memory",
    12: "a rank was lost or stalled",
    13: "the disk is full",
    14: "corrupt data: a shard or checkpoint does not match its checksum",
    75: "stopped and saved: continue with --resume auto",
    130: "interrupted before there was anything to save",
}


class FastdistilError(Exception):
    exit_code = 1


class UserError(FastdistilError, ValueError):
    """Bad input. Also a ValueError, so that library users can catch it as one."""

    exit_code = 2


class FellShort(FastdistilError):
    exit_code = 3


class NonFinite(FastdistilError):
    """A loss, a gradient, a measure or what a teacher gives is not finite. `cause` is the message without its advice.

    Of training, `first` is the first bad update, and `update` the same where the weights were kept as they were before it. Of
    an evaluation, `sequence` is the first bad one of the corpus.
    """

    exit_code = 10
    first: int | None = None
    update: int | None = None
    sequence: int | None = None

    def __init__(self, cause: str, advice: str = "") -> None:
        super().__init__(f"{cause}; {advice}" if advice else cause)
        self.cause = cause


class OutOfMemory(FastdistilError):
    exit_code = 11


class RankLost(FastdistilError):
    """A rank died, failed or got stuck, so that the others cannot go on."""

    exit_code = 12


class DiskFull(FastdistilError):
    exit_code = 13


class CorruptData(FastdistilError):
    exit_code = 14


class Stopped(FastdistilError):
    """A signal or a PAUSE file: the state is saved."""

    exit_code = 75


def printable(text: object) -> str:
    """Return a path or text as one that can be printed and written as UTF-8: what is not UTF-8 of a file's name is escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


@contextmanager
def translated(doing: str, path: Path | None = None) -> Iterator[None]:
    """Turn the operating system's and the allocator's refusals into ours; `doing` completes "while ..."."""
    where = f" ({path})" if path is not None else ""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full while {doing}{where}; free space or choose another directory") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            place = error.filename or path
            raise UserError(f"no permission while {doing}: {place}; choose a directory you can write to") from error
        # A file for a directory, or the other way round; a name that no file system has.
        if error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            place = error.filename2 or error.filename or path
            raise UserError(f"{error.strerror} while {doing}: {place}; name another path") from error
        raise
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":
            raise
        raise UserError(
            f"a library takes no name that is not UTF-8, as {printable(error.object)[:200]}{where} is, while {doing}; rename it"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(_out_of_memory_text(doing)) from error
        raise


def of_a_library(error: BaseException) -> bool:
    """Return whether an error is an Exception, or a library's panic in Rust, which is none and of a class nobody can import."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or of a GPU."""
    # torch.OutOfMemoryError is a RuntimeError; torch's CPU allocator has no exception class of its own.
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text.lower())
    )


def _out_of_memory_text(doing: str) -> str:
    return (
        f"out of memory while {doing}; lower data.micro_batch_tokens (and raise loop.accumulation to keep the batch), "
        "or evaluation.batch_tokens if it happened there; --dry-run estimates what a recipe needs"
    )
