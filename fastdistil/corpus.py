"""Text files -> token shards on disk (`fastdistil prepare`), and the shards back as arrays.

    DIR/tokens-00000.bin     uint16 (uint32 above 65,536 entries of vocabulary), little-endian: sequences laid end to end
    DIR/lengths-00000.bin    int32: the length of each, special tokens included; offsets are their cumulative sum
    DIR/counts.bin           int64 [V]: how often each token occurs, for masking
    DIR/tokenizer/           a copy of the tokenizer
    DIR/quarantine.jsonl     records that could not be read, if any
    DIR/manifest.json        see Manifest; written last, so a directory that has it is complete

One process reads and cuts the text into blocks, the others tokenise; results are written in the order of the blocks, so
the bytes do not depend on the number of processes. A shard ends with a block. After each shard progress.json says how many
blocks are done; a later call with the same inputs and options reads over those and goes on.

A document becomes pieces as in the Hugging Face distillation example: [CLS] tokens [SEP] if that fits into max_length, else
chunks of max_length - 2 of it, each given the special tokens it lacks (so the first piece is one token shorter than the
next). Tokenizers without [CLS] and [SEP] use their bos and eos; those with only one of them get that one alone.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from fastdistil.errors import CorruptData, OutOfMemory, UserError, translated
from fastdistil.textfiles import Block, Documents, Reading, Source, find_inputs

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
PIECE_CHARACTERS = 32_768
"""Long documents are tokenised in stretches of this size: a megabyte in one call takes up to 1.6 times as long."""
BYTES_PER_WORKER = 8_000_000
"""Without `workers`, one process more for every so many bytes of input: starting one takes seconds."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]


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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json: these fields, `format`, and `sha256` of them all as JSON with sorted keys and no spaces."""

    sequences: int
    tokens: int
    documents: int
    """With at least one token; a document of more than a block counts once for each part."""
    dropped: int
    """Pieces dropped by min_tokens and max_unknown."""
    records: int
    """Lines of .txt, records of JSON lines and parquet, read or not."""
    bad_records: int
    unmarked_files: int
    """Files in which strip_gutenberg found nothing to strip."""
    vocab_size: int
    fingerprint: str
    """vocabulary_fingerprint of the tokenizer."""
    tokenizer_sha256: str
    """Of the tokenizer's whole definition."""
    dtype: str
    """Of the token shards."""
    options: dict[str, Any]
    """PrepareOptions without workers and max_bad_fraction."""
    inputs: list[dict[str, Any]]
    """path, bytes, mtime_ns of each input, in the order read."""
    shards: list[dict[str, int]]
    """tokens, sequences of each shard."""
    files: dict[str, dict[str, Any]]
    """bytes, sha256 of every file but the manifest, by name."""

    def to_json(self) -> str:
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps({**values, "sha256": text_sha256(canonical(values))}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises CorruptData where the file does not match its own checksum, UserError where a newer fastdistil wrote it."""
        try:
            values = json.loads(path.read_bytes())
            found = values["format"]
            expected = values.pop("sha256")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptData(f"{path} is damaged ({error}); {PREPARE_AGAIN}") from error
        if isinstance(found, int) and found > FORMAT:
            raise UserError(f"{path} has format {found}, this fastdistil reads up to {FORMAT}; upgrade fastdistil")
        actual = text_sha256(canonical(values))
        if actual != expected:
            raise CorruptData(f"{path} is damaged: sha256 expected {expected}, found {actual}; {PREPARE_AGAIN}")
        return cls(**{item.name: values[item.name] for item in fields(cls)})


PREPARE_AGAIN = "restore the directory from a copy, or delete it and run fastdistil prepare again"


def canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading


class Corpus:
    """A prepared corpus: sequences of tokens in memory-mapped shards. Make one with `Corpus.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.tokenizer_dir = path / "tokenizer"
        self.counts: Integers = np.fromfile(path / "counts.bin", "<i8")
        """int64 [V]: token frequencies."""
        names = range(len(manifest.shards))
        parts = [np.fromfile(path / lengths_name(shard), "<i4") for shard in names]
        self.lengths: Lengths = np.concatenate(parts)
        """int32 [n_sequences], special tokens included."""
        self._offsets: Integers = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=self._offsets[1:])
        little = np.dtype(manifest.dtype).newbyteorder("<")
        self._shards = [np.memmap(path / tokens_name(shard), little, "r") for shard in names]
        self._first_sequence = np.cumsum([0, *(len(part) for part in parts)])
        held = [len(tokens) for tokens in self._shards]
        described = self._offsets[self._first_sequence[1:]] - self._offsets[self._first_sequence[:-1]]
        if held != described.tolist() or len(self.counts) != manifest.vocab_size:
            raise CorruptData(f"{path}: lengths add up to {described.tolist()} tokens, shards hold {held}; {PREPARE_AGAIN}")

    @classmethod
    def open(cls, path: str | Path, verify: str = "full") -> Self:
        """Open what `prepare` wrote. verify: "full" compares every file's sha256, "size" only its size.

        Raises UserError (no complete corpus there, a newer format) and CorruptData (a file was changed, cut or lost).
        """
        path = Path(path)
        if verify not in ("full", "size"):
            raise UserError(f"verify must be full or size, got {verify!r}")
        if not (path / "manifest.json").is_file():
            if (path / "progress.json").is_file():
                raise UserError(f"{path} is not complete: fastdistil prepare was interrupted; run it again to go on")
            raise UserError(f"{path} is no prepared corpus (no manifest.json); make one with fastdistil prepare")
        with translated("opening the corpus", path):
            manifest = Manifest.read(path / "manifest.json")
            with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
                checks = pool.map(lambda item: check_file(path / item[0], item[1], verify == "full"), manifest.files.items())
                for _ in checks:
                    pass
            return cls(path, manifest)

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, sequences: Integers) -> Integers:
        """Tokens of these sequences (int64 [n], any order), laid end to end: int64 [sum of their lengths]."""
        lengths_n = self.lengths[sequences].astype(np.int64)
        ends_n = np.cumsum(lengths_n)
        tokens = np.empty(int(ends_n[-1]) if len(ends_n) else 0, np.int64)
        shards_n = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        for shard in np.unique(shards_n):
            here = shards_n == shard
            starts = self._offsets[sequences[here]] - self._offsets[self._first_sequence[shard]]
            source = ranges(starts, lengths_n[here])
            if here.all():
                tokens[:] = self._shards[shard][source]
            else:
                tokens[ranges(ends_n[here] - lengths_n[here], lengths_n[here])] = self._shards[shard][source]
        return tokens


def ranges(starts_n: Integers, lengths_n: Integers) -> Integers:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then those of starts[1]: int64 [sum of lengths]."""
    ends_n = np.cumsum(lengths_n)
    total = int(ends_n[-1]) if len(ends_n) else 0
    return np.repeat(starts_n - ends_n + lengths_n, lengths_n) + np.arange(total)


def check_file(path: Path, expected: dict[str, Any], full: bool) -> None:
    if not path.is_file():
        raise CorruptData(f"{path} is missing; {PREPARE_AGAIN}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CorruptData(f"{path} is damaged: expected {expected['bytes']} bytes, found {size}; {PREPARE_AGAIN}")
    if full and (found := file_sha256(path)) != expected["sha256"]:
        raise CorruptData(f"{path} is damaged: sha256 expected {expected['sha256']}, found {found}; {PREPARE_AGAIN}")


def tokens_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def lengths_name(shard: int) -> str:
    return f"lengths-{shard:05d}.bin"


# Tokenising


class Plan(NamedTuple):
    """How tokens become sequences."""

    max_length: int
    front: int | None
    back: int | None
    unknown: int | None
    min_tokens: int
    max_unknown: float
    dtype: str


class Encoded(NamedTuple):
    tokens: Tokens
    """[sum of lengths]"""
    lengths: Lengths
    """[sequences]"""
    documents: int
    dropped: int


class Encoder:
    """Documents -> sequences, with one thread of the tokenizers library and numpy."""

    def __init__(self, tokenizer_file: str, plan: Plan) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        plain(self.tokenizer)
        self.plan = plan
        # A tokenizer that marks the beginning of every text would mark the stretches too.
        probe = self.tokenizer.encode_batch_fast(["one two three four", "one two", " three four"], add_special_tokens=False)
        whole, first, second = (part.ids for part in probe)
        self.stretch = PIECE_CHARACTERS if whole == first + second else sys.maxsize

    def __call__(self, documents: list[str]) -> Encoded:
        stretches: list[str] = []
        firsts: list[int] = []
        for document in documents:
            firsts.append(len(stretches))
            stretches += [document] if len(document) <= self.stretch else cut_at_spaces(document, self.stretch)
        encodings = self.tokenizer.encode_batch_fast(stretches, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = chain.from_iterable(encoding.ids for encoding in encodings)
        tokens = np.fromiter(ids, self.plan.dtype, int(lengths.sum()))
        return pieces(tokens, np.add.reduceat(lengths, firsts), self.plan)


def cut_at_spaces(text: str, stretch: int) -> Iterator[str]:
    """Cut between two words, before a single space: no pre-tokenizer in use joins those, so the tokens stay the same.

    A text that has no such place within a stretch is left whole from there on.
    """
    start = 0
    while len(text) - start > stretch:
        end = text.rfind(" ", start + 1, start + stretch)
        while end > 0 and not (text[end - 1].isalnum() and text[end + 1].isalnum()):
            end = text.rfind(" ", start + 1, end)
        if end <= 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def pieces(tokens: Tokens, lengths_d: Integers, plan: Plan) -> Encoded:
    """Split documents (tokens end to end, lengths [documents]) and frame each piece."""
    has_front = int(plan.front is not None)
    added = has_front + int(plan.back is not None)
    chunk = plan.max_length - added
    first = chunk - has_front  # the example cuts the framed document: its front token takes room in the first chunk
    count_d = np.where(lengths_d + added <= plan.max_length, 1, 1 + -((first - lengths_d) // chunk))
    count_d[lengths_d == 0] = 0
    length_p = np.repeat(lengths_d, count_d)
    index_p = ranges(np.zeros_like(count_d), count_d)
    whole_p = np.repeat(count_d, count_d) == 1
    end_p = np.where(whole_p, length_p, np.minimum(length_p, first + index_p * chunk))
    start_p = np.where(index_p == 0, 0, first + (index_p - 1) * chunk)
    framed_p = end_p - start_p + added
    ends_p = np.cumsum(framed_p)
    starts_p = ends_p - framed_p
    out: Tokens = np.empty(int(framed_p.sum()), plan.dtype)
    body = np.ones(len(out), np.bool_)
    if plan.front is not None:
        out[starts_p] = plan.front
        body[starts_p] = False
    if plan.back is not None:
        out[ends_p - 1] = plan.back
        body[ends_p - 1] = False
    out[body] = tokens
    keep_p = framed_p >= plan.min_tokens
    if plan.max_unknown < 1.0 and plan.unknown is not None and len(framed_p):
        keep_p &= np.add.reduceat(out == plan.unknown, starts_p, dtype=np.int64) / framed_p < plan.max_unknown
    documents = int((lengths_d > 0).sum())
    if keep_p.all():
        return Encoded(out, framed_p.astype(np.int32), documents, 0)
    return Encoded(out[np.repeat(keep_p, framed_p)], framed_p[keep_p].astype(np.int32), documents, int((~keep_p).sum()))


_encoder: Encoder
"""A worker process's own."""


def _start_worker(tokenizer_file: str, plan: Plan) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer_file, plan)


def _leave_with_parent() -> None:
    """A parent that is killed cannot tell its workers to stop; they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(documents: list[str]) -> Encoded:
    return _encoder(documents)


def encoded_blocks(
    blocks: Iterator[Block], tokenizer_file: str, plan: Plan, workers: int
) -> Generator[tuple[Block, Encoded], None, None]:
    """Every block and its tokens, in order; at most two blocks a worker are in flight."""
    if workers == 1:
        with one_thread():
            encoder = Encoder(tokenizer_file, plan)
            for block in blocks:
                yield block, encoder(block.documents)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer_file, plan))
    waiting: deque[tuple[Block, Future[Encoded]]] = deque()
    try:
        for block in blocks:
            waiting.append((block._replace(documents=[]), pool.submit(_encode, block.documents)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            "a tokenising process died, most likely killed for want of memory; run again with fewer --workers "
            "(finished shards are kept); in a script of your own, call prepare under if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """The tokenizers library would use every core; it reads this variable at each call and has no other switch."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# Writing


@dataclass
class Written:
    """What finished shards hold; progress.json keeps it."""

    blocks: int = 0
    documents: int = 0
    dropped: int = 0
    sequences: int = 0
    tokens: int = 0
    shards: list[dict[str, int]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


class HashedFile:
    """A file that is summed while it is written, and on disk for good once closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def write(self, data: npt.NDArray[Any]) -> None:
        little = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
        self._file.write(little.data)
        self._sha256.update(little.data)
        self.bytes += little.nbytes

    def finish(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        with suppress(OSError):  # of a buffer that no longer fits onto the disk: that error is on its way already
            self._file.close()


class Shards:
    """Appends blocks to shard files; `written` counts what they hold, `counts_V` how often each token occurs."""

    def __init__(self, out: Path, written: Written, counts_V: Integers, identity: dict[str, Any], shard_tokens: int) -> None:
        self.out, self.written, self.counts_V = out, written, counts_V
        self.identity, self.shard_tokens = identity, shard_tokens
        self._open: tuple[HashedFile, HashedFile] | None = None
        self._sequences = self._tokens = 0

    def append(self, encoded: Encoded) -> None:
        if len(encoded.tokens):
            if self._open is None:
                shard = len(self.written.shards)
                self._open = HashedFile(self.out / tokens_name(shard)), HashedFile(self.out / lengths_name(shard))
            tokens, lengths = self._open
            tokens.write(encoded.tokens)
            lengths.write(encoded.lengths)
        self.counts_V += np.bincount(encoded.tokens, minlength=len(self.counts_V))
        self._tokens += len(encoded.tokens)
        self._sequences += len(encoded.lengths)
        self.written.blocks += 1
        self.written.tokens += len(encoded.tokens)
        self.written.sequences += len(encoded.lengths)
        self.written.documents += encoded.documents
        self.written.dropped += encoded.dropped
        if self._tokens >= self.shard_tokens:
            self.finish_shard()

    def finish_shard(self) -> None:
        if self._open is not None:
            for file in self._open:
                self.written.files[file.path.name] = file.finish()
            self.written.shards.append({"tokens": self._tokens, "sequences": self._sequences})
            self._open, self._sequences, self._tokens = None, 0, 0
            self.save_progress()

    def save_progress(self) -> None:
        write_atomically(self.out / "progress.json", json.dumps({**self.identity, "written": asdict(self.written)}))

    def abandon(self) -> None:
        for file in self._open or ():
            file.abandon()


def write_atomically(path: Path, text: str) -> None:
    """The whole new file or the old one, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        names = ", ".join(path.name for path in ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        tell(f"ignored {len(ignored)} files of other kinds: {names}")
    with translated("writing the prepared corpus", out), locked(out):
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


def identity_of(sources: list[Source], options: PrepareOptions, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """All that decides which bytes are written: a directory goes on, or is up to date, only with the same."""
    return {
        "format": FORMAT,
        "options": options.shaping(),
        "inputs": [{"path": str(path), "bytes": size, "mtime_ns": mtime} for path, size, mtime in sources],
        "tokenizer_sha256": text_sha256(tokenizer.backend_tokenizer.to_str()),
    }


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
def locked(out: Path) -> Iterator[None]:
    """Hold the output directory, made if need be, against a second prepare."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out} cannot be a directory: a file is in the way; choose another --out") from error
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another fastdistil prepare is writing {out}; wait for it or choose another --out") from error
    finally:
        os.close(handle)


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
    differ = sorted(options) + [name for name in ("inputs", "tokenizer_sha256", "format") if wanted[name] != found.get(name)]
    if differ:
        raise UserError(f"{out} was prepared with other {', '.join(differ)}; choose another --out, or delete it to start anew")


def counted(out: Path, written: Written, vocab_size: int) -> Integers:
    """int64 [V]: token frequencies of the finished shards."""
    counts_V = np.zeros(vocab_size, np.int64)
    for shard in range(len(written.shards)):
        tokens = np.memmap(out / tokens_name(shard), np.dtype(token_dtype(vocab_size)).newbyteorder("<"), "r")
        for start in range(0, len(tokens), 2**22):
            counts_V += np.bincount(tokens[start : start + 2**22], minlength=vocab_size)
    return counts_V


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


# Tokenizers


@dataclass(frozen=True)
class TokenFacts:
    """What masking and batching must know of a tokenizer."""

    vocab_size: int
    mask_id: int | None
    pad_id: int
    """Of the padding token, else of eos, else of sep."""
    special_ids: Integers
    """int64 [k], ascending."""
    continues: npt.NDArray[np.bool_]
    """bool [V]: True where a token continues a word (##x of WordPiece; no leading white space mark in byte-level BPE and
    sentencepiece). Special tokens: False. All False for vocabularies without such marks; see marks_words."""
    marks_words: bool
    """Whether the vocabulary shows where words begin at all; if not, there is no whole-word masking."""


def token_facts(tokenizer: "PreTrainedTokenizerFast") -> TokenFacts:
    """Raises UserError for a tokenizer that has nothing to pad with."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos", "sep")}
    pad_id = next((ids[name] for name in ("pad", "eos", "sep") if ids[name] is not None), None)
    if pad_id is None:
        raise UserError("the tokenizer has no padding, eos or sep token; name one as pad_token in tokenizer_config.json")
    vocab_size = vocabulary_size(tokenizer)
    marked = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = sorted({*tokenizer.all_special_ids, *marked.values()})
    tokens = tokenizer.get_vocab()
    continues = np.zeros(vocab_size, np.bool_)
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    starts = next((marks for marks in WORD_STARTS if any(name.startswith(marks) for name in tokens)), None)
    for token, index in tokens.items():
        continues[index] = token.startswith(prefix) if prefix else starts is not None and not token.startswith(starts)
    continues[special] = False
    return TokenFacts(vocab_size, ids["mask"], pad_id, np.array(special, np.int64), continues, bool(prefix or starts))


WORD_STARTS = (("\u0120", "\u010a", "\u0109", "\u010d"), ("\u2581",))
"""Space, line feed, tab and carriage return as byte-level BPE spells them; sentencepiece's space."""


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the largest id: vocabularies may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """sha256 of the sorted token -> id map, in hexadecimal: equal fingerprints mean equal vocabularies."""
    return text_sha256(canonical(sorted(tokenizer.get_vocab().items())))


def plain(tokenizer: "Tokenizer") -> None:
    """A tokenizer.json may ask for truncation and padding; pieces are cut here."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


SPECIAL_TOKENS = (
    {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"},
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
)
"""BERT's, RoBERTa's and GPT-2's spelling, for directories that hold a tokenizer.json and no word of what its tokens are for."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """A fast tokenizer from a directory or by its hub id. Raises UserError.

    Where the directory names no special tokens, those of BERT, RoBERTa or GPT-2 are taken if the vocabulary has them all.
    """
    from transformers import AutoTokenizer

    name = str(path)
    folder = Path(path)
    if folder.is_dir():
        if not any(match for pattern in TOKENIZER_FILES for match in folder.glob(pattern)):
            raise UserError(f"{folder} holds no tokenizer; wanted one of {', '.join(TOKENIZER_FILES)}")
    elif folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no tokenizer directory {name}; give a directory or a hub id such as bert-base-uncased")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds, all for what was given
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load the tokenizer {name!r}: {reason}; give a directory or a reachable hub id") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer {name!r} has no fast (Rust) version; save one with convert_slow_tokenizer")
    if not tokenizer.all_special_ids:
        vocabulary = tokenizer.get_vocab()
        named = next((names for names in SPECIAL_TOKENS if vocabulary.keys() >= set(names.values())), {})
        length = tokenizer.model_max_length
        tokenizer = fast_tokenizer(tokenizer.backend_tokenizer, length, named)
    return cast("PreTrainedTokenizerFast", tokenizer)


def fast_tokenizer(tokenizer: "Tokenizer", model_max_length: int, special_tokens: dict[str, str]) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast  # untyped in the library
    return cast(
        "PreTrainedTokenizerFast", make(tokenizer_object=tokenizer, model_max_length=model_max_length, **special_tokens)
    )


def make_plan(tokenizer: "PreTrainedTokenizerFast", options: PrepareOptions) -> Plan:
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


ALPHABET = 1000
"""Letters of a trained vocabulary; rarer ones are unknown."""


def train_wordpiece(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a lower-casing WordPiece tokenizer as BERT's, save it to `out` for AutoTokenizer, and return `out`.

    Ids: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the vocabulary. Raises UserError where there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = SPECIAL_TOKENS[0]
    special = [names[f"{name}_token"] for name in ("pad", "unk", "cls", "sep", "mask")]
    texts = list(texts)

    def trained(first_ids: list[str], size: int, alphabet: list[str], limit: int) -> dict[str, int]:
        from tokenizers import trainers

        draft = Tokenizer(models.WordPiece(unk_token=names["unk_token"]))
        draft.normalizer, draft.pre_tokenizer = normalizer, pre_tokenizer
        draft.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(
                vocab_size=size, special_tokens=first_ids, initial_alphabet=alphabet, limit_alphabet=limit, show_progress=False
            ),
        )
        return draft.get_vocab()

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the ##x of its alphabet in an order that changes from run to run, and breaks ties by number. A
    # first training, of the alphabet alone, finds them; the second is told their order.
    letters = trained(special, 0, [], 2**31).keys() - set(special)
    if not letters:
        raise UserError("there is no text to train a tokenizer on; give some")
    frequency = Counter(chain.from_iterable(text.lower() for text in texts))
    singles = sorted((letter for letter in letters if len(letter) == 1), key=lambda letter: (-frequency[letter], letter))
    alphabet = singles[:ALPHABET]
    continuing = sorted(letter for letter in letters if letter.startswith("##") and letter[2:] in alphabet)
    vocabulary = trained(special + continuing, vocab_size, alphabet, len(alphabet))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(special)
    # The trainer gives special tokens the first ids, in their order.
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    out = Path(out)
    with translated("writing the tokenizer", out):
        fast_tokenizer(tokenizer, 512, names).save_pretrained(out)
    return out
