"""Text files -> a prepared corpus on disk (`fastdistil prepare`); corpus.py says what is written.

One process reads and cuts the text into blocks, the others tokenise; results are written in the order of the blocks, so
the bytes do not depend on the number of processes. A shard ends with a block. After each shard progress.json says how many
blocks are done; a later call with the same inputs and options reads over those and goes on.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastdistil.corpus import (
    FORMAT,
    FastTokenizer,
    Manifest,
    check_file,
    file_sha256,
    load_tokenizer,
    plain,
    text_sha256,
    token_dtype,
    vocabulary_fingerprint,
    vocabulary_size,
)
from fastdistil.errors import CorruptData, UserError, printable, translated
from fastdistil.files import locked, write_atomically
from fastdistil.shards import HashedFile, Shards, Written, counted
from fastdistil.textfiles import Block, Documents, Reading, Source, find_inputs
from fastdistil.tokenising import Plan, encoded_blocks

BYTES_PER_WORKER = 8_000_000
"""Without `workers`, one process more for every so many bytes of input: starting one takes seconds."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    tokenizer: str
    """Hub id or directory."""
    max_length: int = 512
    """Tokens of the longest sequence, special tokens included."""
    documents: Documents = "file"
    """What a document is in a .txt file: the whole file, a paragraph (between blank lines) or a line."""
    text_field: str = "text"
    strip_gutenberg: bool = False
    special_tokens: bool = True
    min_tokens: int = 0
    """Pieces with fewer tokens, special ones included, are dropped; the example: 12."""
    max_unknown: float = 1.0
    """Below 1, pieces with at least this share of unknown tokens are dropped; the example: 0.5."""
    max_bad_fraction: float = 0.001
    shard_tokens: int = 64 * 2**20
    """A shard ends with the block that brings it to this many tokens."""
    workers: int | None = None
    """Processes that tokenise; null: one a core, fewer for small inputs; 1: this process itself."""

    def __post_init__(self) -> None:
        limits = (
            ("max_length", 4, 2**31 - 1),
            ("min_tokens", 0, self.max_length),
            ("max_unknown", 0, 1),
            ("max_bad_fraction", 0, 1),
            ("shard_tokens", 1, 2**40),
            ("workers", 1, 1024),
        )
        for name, low, high in limits:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} must be from {low} to {high}, got {value}")
        if self.documents not in ("file", "paragraph", "line"):
            raise UserError(f"documents must be file, paragraph or line, got {self.documents!r}")

    def shaping(self) -> dict[str, Any]:
        """The options that decide which bytes are written: not how many processes do it, nor when to give up."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "max_bad_fraction")}


@dataclass(frozen=True)
class Progress:
    """What `prepare` tells its `progress` callback after each block, and when there is something to say."""

    files_done: int
    files: int
    bytes_read: int
    """On disk: compressed bytes of .gz files."""
    bytes_total: int
    tokens: int
    seconds: float
    note: str = ""
    """One line for the user; empty after a block."""


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    options: PrepareOptions,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenise text files, directories and globs into `out`; see the module's text for what is written and how.

    Goes on where an interrupted call with the same inputs and options stopped; returns the manifest at once where they
    are already prepared. Raises UserError (bad input, `out` holds something else), DiskFull, CorruptData, OutOfMemory.
    """
    out = Path(out)
    sources, ignored = find_inputs(inputs, out)
    if not any(source.size for source in sources):
        raise UserError(f"the inputs are empty ({len(sources)} files, 0 bytes); give files with text")
    tokenizer = load_tokenizer(options.tokenizer)
    plain(tokenizer.backend_tokenizer)
    identity = identity_of(sources, options, tokenizer)
    tell = Teller(progress, sources)
    if ignored:
        names = ", ".join(printable(path.name) for path in ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        tell(f"ignored {len(ignored)} files of other kinds: {names}")
    with translated("writing the prepared corpus", out), sole_writer(out, tell):
        if (manifest := finished_before(out, identity)) is not None:
            tell(f"{out} is up to date")
            return manifest
        written = resumed(out, identity)
        if written.shards:
            tell(f"going on after {len(written.shards)} finished shards")
        plan = make_plan(tokenizer, options)
        tokenizer.save_pretrained(out / "tokenizer")
        shards = Shards(out, written, counted(out, written, vocabulary_size(tokenizer)), identity, options.shard_tokens)
        shards.save_progress()
        reader = Reading(
            sources,
            options.documents,
            options.text_field,
            options.strip_gutenberg,
            options.max_bad_fraction,
            quarantine=out / "quarantine.jsonl",
        )
        workers = options.workers or min(len(os.sched_getaffinity(0)), 1 + tell.bytes_total // BYTES_PER_WORKER)
        write_shards(shards, reader, plan, workers, tell)
        if not written.sequences:
            raise UserError(
                f"no usable sequence in {len(sources)} files ({written.documents} documents with tokens, {written.dropped} "
                "pieces dropped by min_tokens and max_unknown); give more text or looser limits"
            )
        return completed(shards, reader, vocabulary_fingerprint(tokenizer), plan.dtype)


def identity_of(sources: list[Source], options: PrepareOptions, tokenizer: FastTokenizer) -> dict[str, Any]:
    """All that decides which bytes are written: a directory goes on, or is up to date, only with the same."""
    return {
        "format": FORMAT,
        "options": options.shaping(),
        "inputs": [{"path": printable(path), "bytes": size, "mtime_ns": mtime} for path, size, mtime in sources],
        "tokenizer_sha256": text_sha256(tokenizer.backend_tokenizer.to_str()),
    }


def make_plan(tokenizer: FastTokenizer, options: PrepareOptions) -> Plan:
    front = back = None
    if options.special_tokens:
        front = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        back = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        if front is None and back is None:
            raise UserError(
                f"the tokenizer {options.tokenizer!r} has no cls, sep, bos or eos token to begin and end sequences with; "
                "name them in tokenizer_config.json, or prepare without special tokens"
            )
    dtype = token_dtype(vocabulary_size(tokenizer))
    limits = options.min_tokens, options.max_unknown
    return Plan(options.max_length, front, back, tokenizer.unk_token_id, *limits, dtype)


class Teller:
    """Calls `progress`, if there is one, with what it wants to know."""

    def __init__(self, progress: Callable[[Progress], None] | None, sources: list[Source]) -> None:
        self.bytes_total = sum(source.size for source in sources)
        self._progress = progress
        self._files = len(sources)
        self._started = time.monotonic()
        self._last = (0, 0, 0)

    def __call__(self, note: str = "", block: Block | None = None, tokens: int = 0) -> None:
        if block is not None:
            self._last = block.files_done, block.bytes_read, tokens
        if self._progress is not None:
            done, read, tokens = self._last
            seconds = time.monotonic() - self._started
            self._progress(Progress(done, self._files, read, self.bytes_total, tokens, seconds, note))


def write_shards(shards: Shards, reader: Reading, plan: Plan, workers: int, tell: Teller) -> None:
    """Tokenise what `reader` gives behind the blocks that finished shards hold."""
    todo = islice(reader.blocks(), shards.written.blocks, None)
    tokenizer_file = str(shards.out / "tokenizer" / "tokenizer.json")
    try:
        with closing(encoded_blocks(todo, tokenizer_file, plan, workers)) as results:
            for block, encoded in results:
                shards.append(encoded)
                tell("", block, shards.written.tokens)
        shards.finish_shard()
    finally:
        shards.abandon()
    if reader.unmarked:
        tell(f"{len(reader.unmarked)} files have no Project Gutenberg lines and are kept whole: {reader.unmarked[0]}, ...")


def completed(shards: Shards, reader: Reading, fingerprint: str, dtype: str) -> Manifest:
    """Write counts.bin and, last, the manifest."""
    out, written = shards.out, shards.written
    counts = HashedFile(out / "counts.bin")
    counts.write(shards.counts_V)
    written.files[counts.path.name] = counts.finish()
    others = [path for path in sorted((out / "tokenizer").rglob("*")) if path.is_file()]
    if reader.quarantine.exists():
        others.append(reader.quarantine)
    for path in others:
        written.files[str(path.relative_to(out))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = Manifest(
        sequences=written.sequences,
        tokens=written.tokens,
        documents=written.documents,
        dropped=written.dropped,
        records=reader.records,
        bad_records=reader.bad.total(),
        unmarked_files=len(reader.unmarked),
        vocab_size=len(shards.counts_V),
        fingerprint=fingerprint,
        tokenizer_sha256=shards.identity["tokenizer_sha256"],
        dtype=dtype,
        options=shards.identity["options"],
        inputs=shards.identity["inputs"],
        shards=written.shards,
        files=dict(sorted(written.files.items())),
    )
    write_atomically(out / "manifest.json", manifest.to_json())
    (out / "progress.json").unlink()
    return manifest


@contextmanager
def sole_writer(out: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the output directory, made if need be, against a second prepare."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out} cannot be a directory: a file is in the way; choose another --out") from error
    with locked(out, f"another fastdistil prepare is writing {out}; wait for it or choose another --out", note):
        yield


def finished_before(out: Path, identity: dict[str, Any]) -> Manifest | None:
    path = out / "manifest.json"
    if path.is_file():
        manifest = Manifest.read(path)
        (out / "progress.json").unlink(missing_ok=True)  # a kill between the two last steps leaves it
        refuse_other(out, identity, {**asdict(manifest), "format": FORMAT})
        return manifest
    if not (out / "progress.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and no prepared corpus; choose another --out")
    return None


def resumed(out: Path, identity: dict[str, Any]) -> Written:
    """What an interrupted call left: verified, and of the same inputs and options. Raises UserError, CorruptData."""
    path = out / "progress.json"
    if not path.is_file():
        return Written()
    try:
        found = json.loads(path.read_bytes())
        written = Written(**found["written"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{path} is damaged ({error}); delete {out} and run fastdistil prepare again") from error
    if not written.shards:
        return Written()
    refuse_other(out, identity, found)
    for name, expected in written.files.items():
        check_file(out / name, expected, full=True)
    return written


def refuse_other(out: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises UserError where `out` was made from other inputs, options or another tokenizer."""
    options = {name for name in wanted["options"] if wanted["options"][name] != found["options"].get(name)}
    found = {**found, "inputs": [{**source, "path": printable(source["path"])} for source in found.get("inputs", ())]}
    differ = sorted(options) + [name for name in ("inputs", "tokenizer_sha256", "format") if wanted[name] != found.get(name)]
    if differ:
        raise UserError(f"{out} was prepared with other {', '.join(differ)}; choose another --out, or delete it to start anew")
