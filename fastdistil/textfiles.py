"""Text files as a stream of documents, in constant memory and in an order that depends on nothing but the inputs.

Bytes come in chunks of about a megabyte that end at a line; each chunk is decoded, stripped of Project Gutenberg's wrapping
if asked, and cut into documents; documents are gathered into blocks, the unit of work of the tokenising processes. Plain
text is judged line by line, JSON lines and parquet record by record; what cannot be read is set aside whole in the
quarantine file and counted. A document longer than a block is cut near BLOCK_CHARACTERS: at the last blank line of the
second half, else at a line's end, else at a space, else where it is.
"""

import base64
import codecs
import errno
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from fastdistil.errors import UserError, printable

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BLOCK_CHARACTERS = 1_000_000
CHUNK_BYTES = 1 << 20
LONGEST_RECORD_BYTES = 1 << 28
"""A line of JSON must fit into memory; a file without line ends would fill it."""
EARLY_STOP_RECORDS = 1000
PARQUET_ROWS = 256

Documents = Literal["file", "paragraph", "line"]


class Source(NamedTuple):
    path: Path
    size: int
    """Bytes on disk."""
    mtime_ns: int


class Block(NamedTuple):
    documents: list[str]
    files_done: int
    bytes_read: int
    """On disk, so far: compressed bytes of a .gz file."""


@dataclass
class Reading:
    """One pass over the inputs: what is read, how, and what was met so far. `blocks()` does the reading, once."""

    sources: Sequence[Source]
    documents: Documents
    text_field: str
    strip_gutenberg: bool
    max_bad_fraction: float
    quarantine: Path
    """Rewritten by every pass; absent when nothing was set aside."""
    records: int = 0
    """Lines of plain text, records of JSON lines and parquet."""
    bad: Counter[str] = field(default_factory=Counter)
    """Records set aside, by file."""
    unmarked: list[str] = field(default_factory=list)
    """Files in which strip_gutenberg found nothing to strip."""
    files_done: int = 0
    bytes_read: int = 0
    first_reason: str = ""

    def blocks(self) -> Iterator[Block]:
        """Every document of every source, stripped of outer white space, none empty, about BLOCK_CHARACTERS a block.

        Raises UserError where a file cannot be read at all or too many records are bad.
        """
        self.quarantine.unlink(missing_ok=True)
        gathered: list[str] = []
        size = 0
        for document in self._all_documents():
            for part in cut_long(document):
                if text := part.strip():
                    gathered.append(text)
                    size += len(text) + 1
                if size >= BLOCK_CHARACTERS:
                    yield Block(gathered, self.files_done, self.bytes_read)
                    gathered, size = [], 0
        self._judge(self.records)
        if gathered:
            yield Block(gathered, self.files_done, self.bytes_read)

    def _all_documents(self) -> Iterator[str]:
        before = 0
        for source in self.sources:
            name = source.path.name.lower()
            if name.endswith(".parquet"):
                yield from self._parquet(source, before)
            else:
                chunks = self._chunks(source, before, whole_lines=".jsonl" in name)
                yield from self._jsonl(source, chunks) if ".jsonl" in name else self._text(source, chunks)
            before += source.size
            self.bytes_read = before
            self.files_done += 1

    # Plain text

    def _text(self, source: Source, chunks: Iterator[bytes]) -> Iterator[str]:
        texts = self._decoded(source, chunks)
        body = GutenbergBody()
        if self.strip_gutenberg:
            texts = map(body.feed, texts)
        yield from cut_documents(texts, self.documents)
        if self.strip_gutenberg and not body.marked:
            self.unmarked.append(printable(source.path))

    def _decoded(self, source: Source, chunks: Iterator[bytes]) -> Iterator[str]:
        """Text with line ends as Python's open() gives them: \\r\\n and \\r become \\n."""
        line = 1
        for chunk in chunks:
            ends = chunk.count(b"\n")
            self.records += ends + (not chunk.endswith(b"\n"))
            try:
                text = chunk.decode()
            except UnicodeDecodeError:
                text = self._good_lines(source, chunk, line)
            line += ends
            yield text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text

    def _good_lines(self, source: Source, chunk: bytes, first_line: int) -> str:
        good = []
        for number, raw in enumerate(chunk.split(b"\n"), first_line):
            try:
                good.append(raw.decode())
            except UnicodeDecodeError as error:
                self._set_aside(source, number, not_utf8(error), raw)
        return "\n".join(good)

    # Records

    def _jsonl(self, source: Source, chunks: Iterator[bytes]) -> Iterator[str]:
        lines = (raw for chunk in chunks for raw in chunk.removesuffix(b"\n").split(b"\n"))
        for number, raw in enumerate(lines, 1):
            if raw.strip():
                self.records += 1
                try:
                    text = text_of(raw, self.text_field)
                except UnicodeDecodeError as error:
                    self._set_aside(source, number, not_utf8(error), raw)
                except (ValueError, RecursionError) as error:
                    self._set_aside(source, number, str(error), raw)
                else:
                    yield text

    def _parquet(self, source: Source, before: int) -> Iterator[str]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError(f"{source.path} needs pyarrow to be read; pip install pyarrow") from error
        # Its own open() takes no name that is not UTF-8.
        with reading(source.path, pa.ArrowException), source.path.open("rb") as stream, pq.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            if self.text_field not in names:
                raise UserError(
                    f"{source.path} has no column {self.text_field!r}, only {', '.join(names)}; name one with --text-field"
                )
            row, rows = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[self.text_field]):
                self._stop_early()
                self.bytes_read = before + source.size * row // rows
                for value in batch.column(0):
                    row += 1
                    self.records += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        self._set_aside(source, row, not_utf8(error), value.as_buffer().to_pybytes())
                        continue
                    if isinstance(text, str):
                        yield text
                    else:
                        reason = f"{self.text_field!r} is {json_kind(text)}, wanted a string"
                        self._set_aside(source, row, reason, repr(text).encode())

    # Bytes

    def _chunks(self, source: Source, before: int, whole_lines: bool) -> Iterator[bytes]:
        """About CHUNK_BYTES at a time, ending at a line's end; a longer line of plain text is cut at a space."""
        with reading(source.path, EOFError, zlib.error), source.path.open("rb") as file:
            stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file) if source.path.suffix.lower() == ".gz" else file
            rest = b""
            first = True
            while data := stream.read(CHUNK_BYTES):
                self._stop_early()
                if first:
                    data = checked_start(source.path, data)
                    first = False
                data = rest + data
                end = data.rfind(b"\n") + 1
                if not end and not whole_lines:
                    end = cut_in_line(data)
                if not end and len(data) > LONGEST_RECORD_BYTES:
                    raise UserError(
                        f"{source.path} has a line of more than {LONGEST_RECORD_BYTES >> 20} MB; "
                        "JSON lines hold one record a line"
                    )
                self.bytes_read = before + min(file.tell(), source.size)
                if end:
                    yield data[:end]
                rest = data[end:]
            if rest:
                yield rest

    # What is set aside

    def _set_aside(self, source: Source, line: int, reason: str, raw: bytes) -> None:
        """One JSON object a line: file, line or row (from 1), reason, and the record's bytes in base64, whole."""
        entry = {"file": printable(source.path), "line": line, "reason": reason, "bytes_base64": base64.b64encode(raw).decode()}
        with self.quarantine.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.first_reason = self.first_reason or f"{printable(source.path)} line {line}: {reason}"
        self.bad[printable(source.path)] += 1

    def _stop_early(self) -> None:
        """Give up once even twice as many records as the bytes still to come promise would not save the corpus."""
        if self.bad.total() > EARLY_STOP_RECORDS:
            total_bytes = sum(source.size for source in self.sources)
            self._judge(2 * self.records * total_bytes // max(self.bytes_read, 1))

    def _judge(self, expected_records: int) -> None:
        bad = self.bad.total()
        if bad <= self.max_bad_fraction * expected_records:
            return
        file, count = self.bad.most_common(1)[0]
        way_out = "repair them or allow more with --max-bad-fraction"
        if "UTF-8" in self.first_reason:
            way_out = f"if it is another encoding, convert it: iconv -f latin1 -t utf-8 (or -f cp1252); else {way_out}"
        raise UserError(
            f"{bad} of {self.records} records are bad, more than the {100 * self.max_bad_fraction:g}% allowed: {count} in "
            f"{file} (first: {self.first_reason}), all set aside in {self.quarantine}; {way_out}"
        )


@contextmanager
def reading(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    corrupt: tuple[type[Exception], ...] = (gzip.BadGzipFile, *kinds)
    try:
        yield
    except corrupt as error:
        raise UserError(f"{path} is truncated or corrupt ({error}); fetch or compress it again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the quarantine file
            raise
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def checked_start(path: Path, data: bytes) -> bytes:
    """The first chunk without a UTF-8 byte order mark. Raises UserError where it is no UTF-8 text at all."""
    wide = (
        ("utf-32", codecs.BOM_UTF32_LE),
        ("utf-32", codecs.BOM_UTF32_BE),
        ("utf-16", codecs.BOM_UTF16_LE),
        ("utf-16", codecs.BOM_UTF16_BE),
    )
    for name, mark in wide:
        if data.startswith(mark):
            raise UserError(f"{path} is {name.upper()}, wanted UTF-8; convert it: iconv -f {name} -t utf-8 {path} > new.txt")
    if b"\0" in data:
        raise UserError(
            f"{path} holds NUL bytes: a binary file, or UTF-16 text without a byte order mark; "
            "leave it out, or convert it: iconv -f utf-16le -t utf-8"
        )
    return data.removeprefix(codecs.BOM_UTF8)


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"


def json_kind(value: object) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def text_of(raw: bytes, text_field: str) -> str:
    """The text of one line of JSON. Raises ValueError with the reason (UnicodeDecodeError where it is not UTF-8)."""
    try:
        record = json.loads(raw.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{json_kind(record)}, wanted an object")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{text_field!r} is {json_kind(text)}, wanted a string")
    if b"\\u" in raw:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text_field!r} holds half a surrogate pair") from error
    return text


def cut_in_line(data: bytes) -> int:
    """Where to cut a line without end: behind a space, else between two characters."""
    end = data.rfind(b" ", len(data) // 2) + 1
    if end:
        return end
    end = len(data)
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:  # not a continuation byte: the last character starts here
            return end - back or end
    return end


def cut_documents(texts: Iterable[str], documents: Documents) -> Iterator[str]:
    """Documents of one file from its text in chunks that end at lines; at most one block's worth is held back."""
    pending = ""
    for text in texts:
        pending += text
        match documents:
            case "line":
                *done, pending = pending.split("\n")
            case "paragraph":
                *done, pending = re.split(r"\n[^\S\n]*\n\s*", pending)
            case "file":
                done = []
        yield from done
        while len(pending) > BLOCK_CHARACTERS:
            end = cut_position(pending)
            yield pending[:end]
            pending = pending[end:]
    yield pending


def cut_long(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > BLOCK_CHARACTERS:
        end = cut_position(document, start)
        yield document[start:end]
        start = end
    yield document[start:] if start else document


def cut_position(text: str, start: int = 0) -> int:
    middle, limit = start + BLOCK_CHARACTERS // 2, start + BLOCK_CHARACTERS
    for separator in ("\n\n", "\n", " "):
        end = text.rfind(separator, middle, limit)
        if end > 0:
            return end + len(separator)
    return limit


class GutenbergBody:
    """Keeps what lies between the '*** START OF ...' and '*** END OF ...' lines of Project Gutenberg's books.

    Older books have a line 'End of the Project Gutenberg EBook of ...' before the latter; it counts as an END line.

    Fed a file's text in order. A file whose first chunk has no START line is kept from its beginning; what follows an END
    line is dropped until the next START, so a file of several books works too.
    """

    # Two expressions, because each begins with a literal that is looked for ten times as fast as an alternative.
    MARKERS = (
        re.compile(r"\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)\b"),
        re.compile(r"\n(E)nd of (?:[Tt]he |[Tt]his )?Project Gutenberg"),
    )
    TITLE_CHARACTERS = 400
    """A marker's title may run over several lines; its closing asterisks are looked for this far."""
    NOTE_CHARACTERS = 5000
    """Two START lines this near to each other enclose a transcriber's note, not a book."""

    def __init__(self) -> None:
        self.marked = False
        self._inside: bool | None = None

    def feed(self, text: str) -> str:
        found = (marker for expression in self.MARKERS for marker in expression.finditer(text))
        markers = sorted(found, key=lambda marker: marker.start())
        if self._inside is None:
            self._inside = not (markers and markers[0][1] == "START")
        kept = []
        at = 0
        for marker in markers:
            if marker.start() < at:
                continue
            note = marker[1] == "START" and at > 0 and marker.start() - at < self.NOTE_CHARACTERS
            if self._inside and not note:
                kept.append(text[at : marker.start()])
            self.marked = True
            self._inside = marker[1] == "START"
            close = text.find("***", marker.end(), marker.end() + self.TITLE_CHARACTERS)
            line_end = text.find("\n", max(close, marker.end()))
            at = line_end + 1 if line_end >= 0 else len(text)
        if self._inside:
            kept.append(text[at:])
        return "".join(kept)


def find_inputs(inputs: Sequence[str], out: Path) -> tuple[list[Source], list[Path]]:
    """Files named by paths, directories (recursive, sorted) and globs, each once, and the ignored files of directories.

    Raises UserError for what is missing, unreadable, or of a kind that cannot be read.
    """
    found: dict[Path, Path] = {}
    ignored: list[Path] = []
    if not inputs:
        raise UserError("no inputs; give text files, directories or globs")
    for given in inputs:
        for path in named_by(given):
            if path.is_dir():
                walk = os.walk(path, onerror=refuse_folder, followlinks=True)
                files = sorted(Path(folder) / name for folder, _, names in walk for name in names)
                if path.resolve() in out.resolve().parents:  # written below its input: its own quarantine is not text
                    files = [file for file in files if out.resolve() not in (path.resolve() / file.relative_to(path)).parents]
            elif readable_kind(path):
                files = [path]
            else:
                raise UserError(f"{path} is of no kind that can be read; wanted {', '.join(SUFFIXES)}")
            ignored += [file for file in files if not readable_kind(file)]
            for file in files:
                if readable_kind(file):
                    found.setdefault(file.resolve(), file)
    if not found:
        raise UserError(f"no {', '.join(SUFFIXES)} files in {', '.join(inputs)}")
    sources = []
    for file in found.values():
        with reading(file):
            stat = file.stat()
        sources.append(Source(file, stat.st_size, stat.st_mtime_ns))
    return sources, ignored


def refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def named_by(given: str) -> list[Path]:
    if os.path.lexists(given):
        return [Path(given)]
    matches = sorted(glob(given, recursive=True))
    if not matches:
        raise UserError(f"no file, directory or glob matches {given!r}; check the path")
    return [Path(match) for match in matches]


def readable_kind(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)
