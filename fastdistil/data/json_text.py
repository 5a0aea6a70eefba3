"""Records of JSON: bytes of files in chunks -> the bytes of each record -> its text, in time linear in the file's size."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from fastdistil.errors import UserError

TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<closed>")?|[\[\]{},]', re.DOTALL)
"""A string, closed or not, or what gives an array its structure."""


def whole_lines(chunks: Iterable[bytes], longest: int, path: Path) -> Iterator[bytes]:
    """Yield lines without their ends. Raises UserError for a line of more than `longest` bytes."""
    pieces: list[bytes] = []
    size = 0
    for chunk in chunks:
        end = chunk.rfind(b"\n")
        if end >= 0:
            yield from b"".join((*pieces, chunk[:end])).split(b"\n")
            pieces, size = [], 0
        pieces.append(chunk[end + 1 :])
        size += len(pieces[-1])
        if size > longest:
            raise UserError(f"{path} has a line of more than {longest >> 20} MB; JSON lines hold one record a line")
    if size:
        yield b"".join(pieces)


def array_elements(chunks: Iterable[bytes], longest: int, path: Path) -> Iterator[bytes]:
    """Yield the elements of one JSON array, each as it is written; one at a time is held in memory.

    Raises UserError for an element of more than `longest` bytes, and where the array is not the whole file.
    """
    pieces: list[bytes] = []
    size = enough = depth = position = 0
    closed = False
    for chunk in chain(chunks, [b""]):
        pieces.append(chunk)
        size += len(chunk)
        if chunk and size < enough:
            continue
        data = b"".join(pieces)
        pieces = []
        start = 0
        for token in TOKEN.finditer(data, position):
            position = token.start()
            first = data[position : position + 1]
            if first == b'"' and not token["closed"]:
                break
            depth += (first in b"[{") - (first in b"]}")
            if closed:
                break
            if (depth == 1 and first in b"[,") or depth == 0:
                if depth == 0 or first == b",":
                    yield data[start:position]
                start = token.end()
                closed = depth == 0
        else:
            position = len(data)
        if closed and data[start:].strip():
            raise UserError(f"{path} does not end where its JSON array does; wanted one array, or one object a line")
        pieces = [data[start:]]
        size = len(pieces[0])
        position -= start
        enough = min(2 * size, longest + 1)  # doubling: in all, no more is scanned again than was read
        if size > longest:
            raise UserError(f"{path} has an element of more than {longest >> 20} MB; wanted an array of records")
    if not closed:
        raise UserError(f"{path} is truncated or corrupt (its JSON array does not end); fetch it again")


def json_text(record: str, text_field: str) -> str:
    """Return the text of one record of JSON. Raises ValueError with the reason."""
    try:
        value = json.loads(record)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_json_kind(value)}, wanted an object")
    if text_field not in value:
        raise ValueError(f"no field {text_field!r}")
    text = value[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{text_field!r} is {_json_kind(text)}, wanted a string")
    if "\\u" in record:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text_field!r} holds half a surrogate pair") from error
        if "\0" in text:
            raise ValueError(f"{text_field!r} holds a NUL character at offset {text.index(chr(0))}")
    return text


def _json_kind(value: object) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")
