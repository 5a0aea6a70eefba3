"""Text files -> a prepared corpus on disk (`fastdistil prepare`); corpus.py says what is written.

One process reads and cuts the text into blocks, the others tokenise; results are written in the order of the blocks, so
the bytes do not depend on the number of processes. A shard ends with a block. After each shard progress.json says how many
blocks are done; a later call with the same inputs and options reads over those and goes on.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from fastdistil.data.corpus import FORMAT, InputFacts, Manifest, check_file, lengths_name, token_dtype, tokens_name
from fastdistil.data.shards import HashedFile, Shards, WrittenShards, counted
from fastdistil.data.text_files import LARGE_SHARE, Block, Documents, Reading
from fastdistil.data.text_inputs import InputFile, TextKind, find_inputs
from fastdistil.data.tokenise import PieceRules, encoded_blocks
from fastdistil.data.tokenizer import (
    FastTokenizer,
    begins_texts,
    frame,
    front_token,
    load_tokenizer,
    plain,
    save_tokenizer,
    unknown_id,
    vocabulary_fingerprint,
    vocabulary_size,
)
from fastdistil.data.unknown_tokens import MAX_UNKNOWN_SHARE, WARNING_SHARE, check_unknown_share, unknown_share, unknown_text
from fastdistil.errors import CorruptData, UserError, printable, translated
from fastdistil.storage import canonical, file_sha256, locked, text_sha256, write_atomically
from fastdistil.untrusted import check, converted, read_json, reason

BYTES_PER_WORKER = 8_000_000
"""Without `workers`, one process more for every so many bytes of input: starting one takes seconds."""


Bos = Literal["auto", "yes", "no"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    tokenizer: str
    """Hub id or directory."""
    max_length: int = 512
    """Tokens of the longest sequence, special tokens included."""
    documents: Documents = "file"
    """What a document is in a .txt file: the whole file, a paragraph (between blank lines) or a line."""
    text_field: str = "text"
    read_as: TextKind | None = None
    """What every input holds, whatever its name; null: what the end of its name says."""
    strip_gutenberg: bool = False
    strip: bool | None = None
    """Whether white space at both ends of documents is taken off. None: where the tokenizer has a mask token; causal models
    learn and are judged on all of the text."""
    special_tokens: bool = True
    """Whether a piece is framed: [CLS] or BOS in front, [SEP] or EOS behind."""
    special_tokens_in_text: bool = False
    """Whether special tokens that the text spells out, such as [MASK], become these tokens and not the text's letters."""
    bos: Bos = "auto"
    """Whether [CLS] or BOS stands in front of each piece. auto: with `special_tokens`, but for causal models (tokenizers
    without [CLS] and mask token) only where a call of the tokenizer puts it there: Llama's does, GPT-2's does not."""
    min_tokens: int = 0
    """Pieces with fewer tokens, special ones included, are dropped; the example: 12."""
    max_unknown: float = 1.0
    """Below 1, pieces with at least this share of unknown tokens are dropped; the example: 0.5."""
    max_unknown_share: float = MAX_UNKNOWN_SHARE
    """Above this share of unknown tokens among all but the special ones added, `prepare` raises UserError; judged after
    each block."""
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
            ("max_unknown_share", 0, 1),
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
        if self.read_as not in (None, *get_args(TextKind)):
            raise UserError(f"read_as must be {', '.join(get_args(TextKind))} or null, got {self.read_as!r}")
        check_bos(self.bos)

    def shaping(self) -> dict[str, Any]:
        """The options that decide which bytes are written: not how many processes do it, nor when to give up."""
        others = ("workers", "max_bad_fraction", "max_unknown_share")
        return {name: value for name, value in asdict(self).items() if name not in others}


@dataclass(frozen=True)
class PrepareProgress:
    """What `prepare` tells its `progress` callback after each block, and when there is something to say."""

    files_done: int
    files: int
    bytes_read: int
    """On disk: compressed bytes of compressed files."""
    bytes_total: int
    tokens: int
    seconds: float
    note: str = ""
    """One line for the user; empty after a block."""


def prepare(
    inputs: Sequence[str],
    out: str | Path,
    options: PrepareOptions,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> Manifest:
    """Tokenise text files, directories and globs into `out`; see the module's text for what is written and how.

    Goes on where an interrupted call with the same inputs and options stopped; returns the manifest at once where they
    are already prepared. Raises UserError (bad input, `out` holds something else), DiskFull, CorruptData, OutOfMemory.
    """
    out = Path(out)
    sources, ignored, passed_over = find_inputs(inputs, out, options.read_as)
    if not any(source.size for source in sources):
        raise UserError(f"the inputs are empty ({len(sources)} files, 0 bytes); give files with text")
    tokenizer = load_tokenizer(options.tokenizer)
    plain(tokenizer.backend_tokenizer)
    if options.strip is None:
        options = replace(options, strip=tokenizer.mask_token_id is not None)
    identity = _identity_of(sources, options, tokenizer)
    tell = _Teller(progress, sources)
    if ignored:
        tell(f"ignored {len(ignored)} files of other kinds: {listed([printable(path.name) for path in ignored])}")
    if passed_over:
        names = [printable(path.name) for path in passed_over]
        tell(f"passed over {len(passed_over)} hidden or backup files: {listed(names)}")
    with translated("writing the prepared corpus", out), _sole_writer(out, tell):
        if (manifest := _finished_before(out, identity)) is not None:
            tell(f"{out} is up to date")
            return manifest
        written = resumed(out, identity)
        if written.shards:
            tell(f"going on after {len(written.shards)} finished shards")
        plan = make_plan(tokenizer, options)
        if tokenizer.cls_token_id is None:
            front, back = (
                None if token is None else tokenizer.convert_ids_to_tokens(token) for token in (plan.front, plan.back)
            )
            tell(f"in front of each piece: {front or 'no BOS'}; behind it: {back or 'no EOS'}")
        save_tokenizer(tokenizer, out / "tokenizer")
        shards = Shards(out, written, counted(out, written, vocabulary_size(tokenizer)), identity, options.shard_tokens)
        shards.save_progress()
        reader = Reading(
            sources,
            options.documents,
            options.text_field,
            options.strip_gutenberg,
            options.max_bad_fraction,
            quarantine=out / "quarantine.jsonl",
            strip=bool(options.strip),
        )
        workers = options.workers or min(len(os.sched_getaffinity(0)), 1 + tell.bytes_total // BYTES_PER_WORKER)

        def share() -> float:
            return unknown_share(tokenizer, shards.counts_V, written.sequences, identity["options"])

        def check_unknown() -> None:
            where = f"the first {written.sequences:,} sequences"
            check_unknown_share(share(), options.max_unknown_share, tokenizer, where)

        _write_shards(shards, reader, plan, workers, tell, check_unknown)
        if not written.sequences:
            raise UserError(
                f"no usable sequence in {len(sources)} files ({written.documents} documents with tokens, {written.dropped} "
                "pieces dropped by min_tokens and max_unknown); give more text or looser limits"
            )
        if share() > WARNING_SHARE:
            tell(f"warning: {unknown_text(share(), tokenizer, str(out))}")
        return completed(shards, reader, vocabulary_fingerprint(tokenizer), plan.dtype, len(passed_over), share())


def listed(names: Sequence[str]) -> str:
    """Name the first five."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _identity_of(sources: list[InputFile], options: PrepareOptions, tokenizer: FastTokenizer) -> dict[str, Any]:
    """All that decides which bytes are written: a directory goes on, or is up to date, only with the same."""
    front, special_tokens = front_token(tokenizer), options.special_tokens
    return {
        "format": FORMAT,
        "options": {**options.shaping(), "bos": "no" if front_of_pieces(tokenizer, options) is None else "yes"},
        # What the options say that earlier versions did not write.
        "earlier_options": {"bos": "yes" if special_tokens and front is not None else "no"},
        "inputs": [{"path": printable(path), "bytes": size, "mtime_ns": mtime} for path, size, mtime, _ in sources],
        "tokenizer_sha256": text_sha256(tokenizer.backend_tokenizer.to_str()),
    }


def check_bos(bos: str) -> None:
    if bos not in get_args(Bos):
        raise UserError(f"bos must be auto, yes or no, got {bos!r}")


def front_of_pieces(tokenizer: FastTokenizer, options: PrepareOptions) -> int | None:
    """The token in front of each piece; see `PrepareOptions.bos`. Raises UserError where it is wanted and there is none."""
    front = front_token(tokenizer)
    if options.bos == "yes":
        if front is None:
            raise UserError(
                f"bos is yes and the tokenizer {options.tokenizer!r} has no bos or cls token; "
                "name one as bos_token in tokenizer_config.json, or use bos no"
            )
        return front
    if options.bos == "no" or not options.special_tokens:
        return None
    masked = tokenizer.cls_token_id is not None or tokenizer.mask_token_id is not None
    return front if masked or begins_texts(tokenizer) else None


def make_plan(tokenizer: FastTokenizer, options: PrepareOptions) -> PieceRules:
    front, back = front_of_pieces(tokenizer, options), None
    if options.special_tokens:
        back = frame(tokenizer)[1]
        if frame(tokenizer) == (None, None):
            raise UserError(
                f"the tokenizer {options.tokenizer!r} has no cls, sep, bos or eos token to begin and end sequences with; "
                "name them in tokenizer_config.json, or prepare without special tokens"
            )
    dtype = token_dtype(vocabulary_size(tokenizer))
    limits = options.min_tokens, options.max_unknown
    return PieceRules(options.max_length, front, back, unknown_id(tokenizer), *limits, dtype, options.special_tokens_in_text)


class _Teller:
    """Calls `progress`, if there is one, with what it wants to know."""

    def __init__(self, progress: Callable[[PrepareProgress], None] | None, sources: list[InputFile]) -> None:
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
            self._progress(PrepareProgress(done, self._files, read, self.bytes_total, tokens, seconds, note))


def _write_shards(
    shards: Shards, reader: Reading, plan: PieceRules, workers: int, tell: _Teller, check_unknown: Callable[[], None]
) -> None:
    """Tokenise what `reader` gives behind the blocks that finished shards hold."""
    todo = islice(reader.blocks(), shards.written.blocks, None)
    tokenizer_file = str(shards.out / "tokenizer" / "tokenizer.json")
    try:
        with closing(encoded_blocks(todo, tokenizer_file, plan, workers)) as results:
            for block, encoded in results:
                shards.append(encoded)
                check_unknown()
                tell("", block, shards.written.tokens)
        shards.finish_shard()
    finally:
        shards.abandon()
    if reader.unmarked:
        tell(f"{len(reader.unmarked)} files have no Project Gutenberg lines and are kept whole: {listed(reader.unmarked)}")
    if reader.half_marked:
        tell(
            f"{len(reader.half_marked)} files have a Project Gutenberg header without its footer or a footer without its "
            f"header; look whether licence is left in them: {listed(reader.half_marked)}"
        )
    if reader.shortened:
        names = []
        for name, share in sorted(reader.shortened, key=lambda entry: -entry[1]):
            records = reader.shortened_records[name]
            names.append(f"{name} ({f'{records:,} records, up to ' if records else ''}{share:.0%})")
        tell(
            f"warning: {len(names)} files lose more than {LARGE_SHARE:.0%} of their characters, or of a record's, as "
            f"Project Gutenberg's; look whether text is among them: {listed(names)}"
        )


def completed(shards: Shards, reader: Reading, fingerprint: str, dtype: str, passed_over: int, share: float) -> Manifest:
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
        **{name: value for name, value in vars(written).items() if name not in ("blocks", "files")},
        records=reader.records,
        bad_records=reader.bad.total(),
        unmarked_files=len(reader.unmarked),
        half_marked_files=len(reader.half_marked),
        gutenberg_characters=reader.gutenberg_characters,
        gutenberg_removed=reader.gutenberg_removed,
        passed_over_files=passed_over,
        vocab_size=len(shards.counts_V),
        fingerprint=fingerprint,
        tokenizer_sha256=shards.identity["tokenizer_sha256"],
        dtype=dtype,
        options=shards.identity["options"],
        inputs=shards.identity["inputs"],
        files=dict(sorted(written.files.items())),
        unknown_share=share,
    )
    write_atomically(out / "manifest.json", manifest.to_json())
    (out / "progress.json").unlink()
    return manifest


@contextmanager
def _sole_writer(out: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the output directory, made if need be, against a second prepare."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out} cannot be a directory: a file is in the way; choose another --out") from error
    with locked(out, f"another fastdistil prepare is writing {out}; wait for it or choose another --out", note):
        yield


def _finished_before(out: Path, identity: dict[str, Any]) -> Manifest | None:
    path = out / "manifest.json"
    if path.is_file():
        manifest = Manifest.read(path)
        (out / "progress.json").unlink(missing_ok=True)  # a kill between the two last steps leaves it
        _refuse_other(out, identity, {**asdict(manifest), "format": FORMAT})
        return manifest
    if not (out / "progress.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and no prepared corpus; choose another --out")
    return None


class _Progress(TypedDict):
    """What is read of progress.json: an identity (identity_of), and what finished shards hold."""

    options: dict[str, Any]
    inputs: list[InputFacts]
    written: dict[str, Any]


def resumed(out: Path, identity: dict[str, Any]) -> WrittenShards:
    """What an interrupted call left: verified, and of the same inputs and options. Raises UserError, CorruptData."""
    path = out / "progress.json"
    if not path.is_file():
        return WrittenShards()
    try:
        progress = read_json(path)
        check(_Progress, progress)
        expected = progress.pop("sha256", None)  # which earlier versions did not write
        if expected not in (None, text_sha256(canonical(progress))):
            raise ValueError("sha256")
        # Earlier versions did not count it, and the count of the rest alone would be none.
        written = converted(WrittenShards, {"special_spellings": None, **progress["written"]})
        names = [name(shard) for shard in range(len(written.shards)) for name in (tokens_name, lengths_name)]
        if sorted(names) != sorted(written.files):
            raise ValueError(f"written.files are not those of {len(written.shards)} shards")
    except ValueError as error:
        raise CorruptData(f"{path} is damaged ({reason(error)}); delete {out} and run fastdistil prepare again") from error
    if not written.shards:
        return WrittenShards()
    _refuse_other(out, identity, progress)
    for name, facts in written.files.items():
        check_file(out / name, facts, full=True)
    return written


_EARLIER_OPTIONS = {"special_tokens_in_text": True, "strip": True}
"""What versions did that had no such options."""


def _refuse_other(out: Path, expected: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Raises UserError where `out` was made from other inputs, options or another tokenizer."""
    before = {**_EARLIER_OPTIONS, **expected["earlier_options"], **recorded["options"]}
    if before.get("strip_gutenberg") and "strip" not in recorded["options"]:
        before["strip_gutenberg"] = "by other rules"  # of earlier versions: old licences stayed, and books went
    options = {name for name in expected["options"] if expected["options"][name] != before.get(name)}
    recorded = {**recorded, "inputs": [{**source, "path": printable(source["path"])} for source in recorded["inputs"]]}
    differ = sorted(options) + [
        name for name in ("inputs", "tokenizer_sha256", "format") if expected[name] != recorded.get(name)
    ]
    if differ:
        raise UserError(f"{out} was prepared with other {', '.join(differ)}; choose another --out, or delete it to start anew")
