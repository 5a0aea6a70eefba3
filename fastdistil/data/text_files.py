"""Text files as a stream of documents, in constant memory and in an order that depends on nothing but the inputs.

Bytes come in chunks of about a megabyte that end at a line; each chunk is decoded, stripped of Project Gutenberg's wrapping
if asked, and cut into documents; documents are gathered into blocks, the unit of work of the tokenising processes. Plain
text is judged line by line, JSON and parquet record by record; what cannot be read, or holds NUL bytes, is set aside whole
in the quarantine file and counted. A document longer than a block is cut near BLOCK_CHARACTERS: at the last blank line of the
second half, else at a line's end, else at a space, else where it is.
"""

import base64
import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from fastdistil.data.gutenberg import GutenbergText
from fastdistil.data.json_text import array_elements, json_text, whole_lines
from fastdistil.data.text_inputs import LINE_SUFFIXES, InputFile, decompressed, kind_suffix, reading
from fastdistil.errors import UserError, printable

BLOCK_CHARACTERS = 1_000_000
CHUNK_BYTES = 1 << 20
LONGEST_RECORD_BYTES = 1 << 28
"""A line of JSON must fit into memory; a file without line ends would fill it."""
EARLY_STOP_RECORDS = 1000
_CONTROL_CHARACTERS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1a\x1b"))
_BINARY_SHARE = 0.08
"""A file with a larger share of control characters in its first chunk is no text; of random bytes it is 0.1."""
_SIGNATURES = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive (or a docx, odt, epub file)",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"PAR1": "a parquet file (name it .parquet)",
    b"\x1f\x8b": "compressed with gzip (let its name end in .gz)",
    b"\xfd7zXZ": "compressed with xz (let its name end in .xz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (let its name end in .zst)",
}
LARGE_SHARE = 0.3
"""Files that lose more than this to strip_gutenberg, themselves or of a record, are named."""

Documents = Literal["file", "paragraph", "line"]


class Block(NamedTuple):
    documents: list[str]
    files_done: int
    bytes_read: int
    """On disk, so far: compressed bytes of a compressed file."""


@dataclass
class Reading:
    """One pass over the inputs: what is read, how, and what was met so far. `blocks()` does the reading, once."""

    sources: Sequence[InputFile]
    documents: Documents
    text_field: str
    strip_gutenberg: bool
    max_bad_fraction: float
    quarantine: Path
    """Rewritten by every pass; absent when nothing was set aside."""
    strip: bool = True
    """Whether outer white space of documents is taken off."""
    records: int = 0
    """Lines of plain text, records of JSON lines and parquet."""
    bad: Counter[str] = field(default_factory=Counter)
    """Records set aside, by file."""
    unmarked: list[str] = field(default_factory=list)
    """Files in which strip_gutenberg found nothing to strip."""
    half_marked: list[str] = field(default_factory=list)
    """Files in which it found a header without its footer, or a footer without its header."""
    shortened: list[tuple[str, float]] = field(default_factory=list)
    """Files that lost more than LARGE_SHARE of their characters to it, and the share; of records, the largest share of one."""
    shortened_records: Counter[str] = field(default_factory=Counter)
    """Records that lost more than LARGE_SHARE, by file."""
    gutenberg_characters: int = 0
    """Characters that strip_gutenberg looked through."""
    gutenberg_removed: int = 0
    files_done: int = 0
    bytes_read: int = 0
    first_reason: str = ""

    def blocks(self) -> Iterator[Block]:
        """Every document of every source, none of white space alone, about BLOCK_CHARACTERS a block.

        Raises UserError where a file cannot be read at all or too many records are bad.
        """
        self.quarantine.unlink(missing_ok=True)
        gathered: list[str] = []
        size = 0
        for document in self._all_documents():
            for part in _cut_long(document):
                text = part.strip() if self.strip else part
                if text and not text.isspace():
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
            stripper = GutenbergText() if self.strip_gutenberg else None
            if source.kind == "txt":
                texts = self._decoded(source, _cut_at_lines(self._bytes(source, before)))
                yield from cut_documents(texts if stripper is None else stripper.strip(texts), self.documents)
            else:
                records = self._parquet(source, before) if source.kind == "parquet" else self._json(source, before)
                yield from records if stripper is None else self._stripped_records(source, records, stripper)
            if stripper is not None:
                self._count_stripped(source, stripper)
            before += source.size
            self.bytes_read = before
            self.files_done += 1

    def _count_stripped(self, source: InputFile, stripper: GutenbergText) -> None:
        name = printable(source.path)
        self.gutenberg_characters += stripper.characters
        self.gutenberg_removed += stripper.removed
        if not stripper.removed:
            self.unmarked.append(name)
        if stripper.half_marked:
            self.half_marked.append(name)
        if source.kind == "txt" and stripper.removed > LARGE_SHARE * stripper.characters:
            self.shortened.append((name, stripper.removed / stripper.characters))

    def _stripped_records(self, source: InputFile, records: Iterator[str], stripper: GutenbergText) -> Iterator[str]:
        name = printable(source.path)
        largest_share = 0.0
        for text in records:
            removed_before = stripper.removed
            yield "".join(stripper.strip([text]))
            share = (stripper.removed - removed_before) / max(len(text), 1)
            if share > LARGE_SHARE:
                self.shortened_records[name] += 1
                largest_share = max(largest_share, share)
        if largest_share:
            self.shortened.append((name, largest_share))

    # Plain text

    def _decoded(self, source: InputFile, chunks: Iterator[bytes]) -> Iterator[str]:
        """Text with line ends as Python's open() gives them: \\r\\n and \\r become \\n."""
        line = 1
        for chunk in chunks:
            ends = chunk.count(b"\n")
            self.records += ends + (not chunk.endswith(b"\n"))
            try:
                text = decoded(chunk)
            except ValueError:
                text = self._good_lines(source, chunk, line)
            line += ends
            yield text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text

    def _good_lines(self, source: InputFile, chunk: bytes, first_line: int) -> str:
        good = []
        for number, raw in enumerate(chunk.split(b"\n"), first_line):
            try:
                good.append(decoded(raw))
            except ValueError as error:
                self._set_aside(source, number, str(error), raw)
        return "\n".join(good)

    # Records

    def _json(self, source: InputFile, before: int) -> Iterator[str]:
        """Texts of lines or, where the name does not say that it holds lines, of the elements of one array."""
        chunks = self._bytes(source, before)
        first = next(chunks, b"")
        is_array = kind_suffix(source.path) not in LINE_SUFFIXES and first.lstrip().startswith(b"[")
        split = array_elements if is_array else whole_lines
        records = split(chain([first], chunks), LONGEST_RECORD_BYTES, source.path)
        for number, raw in enumerate(records, 1):
            if raw.strip():
                self.records += 1
                try:
                    text = json_text(decoded(raw), self.text_field)
                except ValueError as error:
                    self._set_aside(source, number, str(error), raw)
                else:
                    yield text

    def _parquet(self, source: InputFile, before: int) -> Iterator[str]:
        with reading(source.path):
            from fastdistil.data.parquet_text import column_rows

        for number, (raw, share) in enumerate(column_rows(source.path, self.text_field), 1):
            self.bytes_read = before + int(source.size * share)
            self.records += 1
            try:
                text = decoded(raw)
            except ValueError as error:
                self._set_aside(source, number, str(error), raw)
                self._stop_early()
            else:
                yield text

    # Bytes

    def _bytes(self, source: InputFile, before: int) -> Iterator[bytes]:
        """Chunks of CHUNK_BYTES, decompressed, of a file that looks like text."""
        with reading(source.path), source.path.open("rb") as file:
            stream = decompressed(source.path, file)
            first = True
            while data := stream.read(CHUNK_BYTES):
                self._stop_early()
                if first:
                    data = _checked_start(source.path, data)
                    first = False
                self.bytes_read = before + min(file.tell(), source.size)
                yield data

    # What is set aside

    def _set_aside(self, source: InputFile, line: int, reason: str, raw: bytes) -> None:
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


def _checked_start(path: Path, data: bytes) -> bytes:
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
    for signature, description in _SIGNATURES.items():
        if data.startswith(signature):
            raise UserError(f"{path} is {description}, wanted UTF-8 text; leave it out, or convert it")
    if len(data) - len(data.translate(None, _CONTROL_CHARACTERS)) > _BINARY_SHARE * len(data):
        raise UserError(
            f"{path} holds {'NUL bytes' if bytes(1) in data else 'control characters'}: a binary file, or UTF-16 text without "
            "a byte order mark; leave it out, or convert it: iconv -f utf-16le -t utf-8"
        )
    return data.removeprefix(codecs.BOM_UTF8)


def decoded(raw: bytes) -> str:
    """Return the text of UTF-8 bytes. Raises ValueError with the reason where they are not, or hold NUL bytes."""
    if b"\0" in raw:
        raise ValueError(f"a NUL byte at offset {raw.index(0)}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from error


def _cut_at_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut chunks anew so that each ends at a line's end, a longer line at a space."""
    pending = b""
    for chunk in chunks:
        pending += chunk
        end = pending.rfind(b"\n") + 1 or cut_in_line(pending)
        if end:
            yield pending[:end]
        pending = pending[end:]
    if pending:
        yield pending


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
                pending = re.sub(r"\A(?:[^\S\n]*\n)+", "", pending)  # blank lines after a paragraph of the chunk before
                *done, pending = re.split(r"\n(?:[^\S\n]*\n)+", pending)
            case "file":
                done = []
        yield from done
        while len(pending) > BLOCK_CHARACTERS:
            end = _cut_position(pending)
            yield pending[:end]
            pending = pending[end:]
    yield re.sub(r"\n[^\S\n]*\Z", "", pending) if documents == "paragraph" else pending


def _cut_long(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > BLOCK_CHARACTERS:
        end = _cut_position(document, start)
        yield document[start:end]
        start = end
    yield document[start:] if start else document


def _cut_position(text: str, start: int = 0) -> int:
    middle, limit = start + BLOCK_CHARACTERS // 2, start + BLOCK_CHARACTERS
    for separator in ("\n\n", "\n", " "):
        end = text.rfind(separator, middle, limit)
        if end > 0:
            return end + len(separator)
    return limit
