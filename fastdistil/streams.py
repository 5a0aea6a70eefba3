"""Standard output and error that outlive their reader: a closed pipe or terminal ends no work.

What is written to a reader that has gone goes nowhere, and the work goes on with the exit code that it deserves, so that
`fastdistil ... | head` is harmless. Letters that the encoding has not are escaped.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from fastdistil.errors import DiskFull


class LastingStream:
    """A text stream whose `write` and `flush` never fail; `lost` is the error after which nothing is written any more.

    own_descriptor: the process's standard output or error. What its buffer still holds when it is lost goes nowhere too;
    otherwise the interpreter would try again at its end, and complain.
    """

    def __init__(self, stream: TextIO, *, own_descriptor: bool = False) -> None:
        self._stream, self._own_descriptor = stream, own_descriptor
        self.lost: Exception | None = None
        self.loss_is_noted = False
        """Whether somebody was told of the loss elsewhere."""

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        self.lost = error
        if self._own_descriptor:
            with suppress(OSError, ValueError):  # in a test's capture, say, it has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def lasting(stream: TextIO) -> LastingStream:
    """Return the stream itself where it is a LastingStream already, so that one loss is known everywhere."""
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make standard output and error lasting within the block. Raises DiskFull where a full disk took none of the output."""
    before = sys.stdout, sys.stderr
    # A stream that was closed before the start is None.
    streams = (stream or Path(os.devnull).open("w", encoding="utf-8") for stream in before)  # noqa: SIM115
    output, errors = (LastingStream(stream, own_descriptor=True) for stream in streams)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", errors)
    try:
        yield
        output.flush()
        if isinstance(output.lost, OSError) and output.lost.errno in (errno.ENOSPC, errno.EDQUOT) and not output.loss_is_noted:
            raise DiskFull("the disk is full while writing standard output; free space or write it elsewhere")
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
