"""A prepared corpus on disk: what `fastdistil prepare` writes, back as arrays.

    DIR/tokens-00000.bin     uint16 (uint32 above 65,536 entries of vocabulary), little-endian: sequences laid end to end
    DIR/lengths-00000.bin    int32: the length of each, special tokens included; offsets are their cumulative sum
    DIR/counts.bin           int64 [V]: how often each token occurs, for masking
    DIR/tokenizer/           a copy of the tokenizer
    DIR/quarantine.jsonl     records that could not be read, if any
    DIR/manifest.json        see Manifest; written last, so a directory that has it is complete

Written by prepare.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from fastdistil.data.masking import TokenFacts
from fastdistil.data.ragged import Ints, offsets, ranges
from fastdistil.data.range_reader import RangeReader
from fastdistil.data.tokenizer import FastTokenizer, load_tokenizer, token_facts
from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.storage import canonical, file_sha256, text_sha256
from fastdistil.untrusted import FileFacts, PlainName, Sealed, Whole, check, converted, read_json, reason

FORMAT = 1

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int32]


class InputFacts(TypedDict):
    """What identifies a file of text."""

    path: str
    bytes: Whole
    mtime_ns: int


class ShardFacts(TypedDict):
    tokens: Whole
    sequences: Whole


def _corpus_name(name: str) -> str:
    first, *others = name.split("/")
    for part in (first, *others):
        check(PlainName, part)
    if others and first != "tokenizer":
        raise ValueError("wanted the name of a file of a corpus, or of one in its tokenizer/")
    return name


CorpusName = Annotated[str, AfterValidator(_corpus_name)]
"""A file within a corpus's directory: nothing else may be read, copied or written by a manifest."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json: these fields, `format`, and `sha256` of them all as JSON with sorted keys and no spaces."""

    sequences: Whole
    tokens: Whole
    documents: Whole
    """With at least one token; a document of more than a block counts once for each part."""
    dropped: Whole
    """Pieces dropped by min_tokens and max_unknown."""
    records: Whole
    """Lines of .txt, records of JSON lines and parquet, read or not."""
    bad_records: Whole
    unmarked_files: Whole
    """Files in which strip_gutenberg found nothing to strip."""
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=2**32)]
    fingerprint: str
    """vocabulary_fingerprint of the tokenizer."""
    tokenizer_sha256: str
    """Checksum of the tokenizer's whole definition."""
    dtype: Annotated[str, Field(pattern="^uint(16|32)$")]
    """Type of the numbers in the token shards."""
    options: dict[str, Any]
    """PrepareOptions without workers, max_bad_fraction and max_unknown_share."""
    inputs: list[InputFacts]
    """path, bytes, mtime_ns of each input, in the order read."""
    shards: Annotated[list[ShardFacts], Field(min_length=1)]
    """tokens, sequences of each shard."""
    files: dict[CorpusName, FileFacts]
    """bytes, sha256 of every file but the manifest, by name."""
    passed_over_files: Whole = 0
    """Hidden and backup files of the directories given."""
    half_marked_files: Whole = 0
    """Files in which strip_gutenberg found a header without its footer, or a footer without its header."""
    gutenberg_characters: Whole = 0
    """Characters that strip_gutenberg looked through."""
    gutenberg_removed: Whole = 0
    """Those of gutenberg_characters that were headers, footers and licences."""
    special_spellings: Whole | None = None
    """How often the text spells out a special token such as [MASK]; None where an earlier version did not count."""
    unknown_share: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    """Share of unknown tokens among all but the special ones added, 0 to 1; None where an earlier version did not count."""

    @property
    def special_spellings_became(self) -> str:
        return "parsed as these" if self.options.get("special_tokens_in_text", True) else "taken as text"

    def to_json(self) -> str:
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps({**values, "sha256": text_sha256(canonical(values))}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises CorruptData where the file does not match its own checksum, UserError where a newer fastdistil wrote it."""
        try:
            values = read_json(path)
            check(Sealed, values)
        except ValueError as error:
            raise CorruptData(f"{path} is damaged ({reason(error)}); {PREPARE_AGAIN}") from error
        if values["format"] > FORMAT:
            raise UserError(f"{path} has format {values['format']}, this fastdistil reads up to {FORMAT}; upgrade fastdistil")
        expected = values.pop("sha256")
        actual = text_sha256(canonical(values))
        if actual != expected:
            raise CorruptData(f"{path} is damaged: sha256 expected {expected}, found {actual}; {PREPARE_AGAIN}")
        try:
            manifest = converted(cls, values)
            shards = range(len(manifest.shards))
            needed = ["counts.bin", *map(tokens_name, shards), *map(lengths_name, shards)]
            if missing := [name for name in needed if name not in manifest.files]:
                raise ValueError(f"files.{missing[0]} is missing")
        except ValueError as error:
            raise CorruptData(f"{path} is no manifest ({reason(error)}); {PREPARE_AGAIN}") from error
        return manifest


PREPARE_AGAIN = "restore the directory from a copy, or delete it and run fastdistil prepare again"


class Corpus:
    """A prepared corpus: sequences of tokens in shards, which stay on disk. Make one with `Corpus.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.tokenizer_dir = path / "tokenizer"
        self.counts: Ints = np.fromfile(path / "counts.bin", "<i8")
        """int64 [V]: token frequencies."""
        names = range(len(manifest.shards))
        parts = [np.fromfile(path / lengths_name(shard), "<i4") for shard in names]
        self.lengths: Lengths = np.concatenate(parts)
        """int32 [n_sequences], special tokens included."""
        if not len(self.lengths) or self.lengths.min() < 1:
            raise CorruptData(f"{path} has a sequence without tokens, or no sequence at all; {PREPARE_AGAIN}")
        self._offsets = offsets(self.lengths)
        little = np.dtype(manifest.dtype).newbyteorder("<")
        try:
            self._shards = [RangeReader(path / tokens_name(shard), little) for shard in names]
        except ValueError as error:  # a part of a token at its end
            raise CorruptData(f"{path} has a shard that holds no whole tokens ({error}); {PREPARE_AGAIN}") from error
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

    @cached_property
    def tokenizer(self) -> FastTokenizer:
        """The tokenizer that the corpus was prepared with."""
        return load_tokenizer(self.tokenizer_dir)

    @cached_property
    def facts(self) -> TokenFacts:
        return token_facts(self.tokenizer)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, sequences: int) -> list[Ints]:
        """TokenArray of up to so many sequences, int64 each, evenly spread over the corpus."""
        chosen = np.unique(np.linspace(0, len(self) - 1, sequences).astype(np.int64))
        return [self.gather(chosen[[row]]) for row in range(len(chosen))]

    def gather(self, sequences: Ints) -> Ints:
        """Tokens of these sequences (int64 [n], any order), laid end to end: int64 [sum of their lengths].

        Raises CorruptData where a shard was shortened since it was opened.
        """
        lengths_n = self.lengths[sequences].astype(np.int64)
        ends_n = np.cumsum(lengths_n)
        tokens = np.empty(int(ends_n[-1]) if len(ends_n) else 0, np.int64)
        shards_n = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        for shard in np.unique(shards_n):
            here = shards_n == shard
            starts = self._offsets[sequences[here]] - self._offsets[self._first_sequence[shard]]
            of_shard = self._shards[shard].read(starts, lengths_n[here])
            if here.all():
                tokens[:] = of_shard
            else:
                tokens[ranges(ends_n[here] - lengths_n[here], lengths_n[here])] = of_shard
        if len(tokens) and (largest := int(tokens.max())) >= self.manifest.vocab_size:  # where only sizes were verified
            vocabulary = self.manifest.vocab_size
            raise CorruptData(f"{self.path} holds token {largest}, its vocabulary has {vocabulary}; {PREPARE_AGAIN}")
        return tokens


def check_file(path: Path, expected: FileFacts, full: bool, advice: str = PREPARE_AGAIN) -> None:
    """Compare a file's size, and where `full` its sha256, with what was written. Raises CorruptData, ending with `advice`."""
    if not path.is_file():
        raise CorruptData(f"{path} is missing; {advice}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CorruptData(f"{path} is damaged: expected {expected['bytes']} bytes, found {size}; {advice}")
    if full and (actual_sha256 := file_sha256(path)) != expected["sha256"]:
        raise CorruptData(f"{path} is damaged: sha256 expected {expected['sha256']}, found {actual_sha256}; {advice}")


def tokens_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def lengths_name(shard: int) -> str:
    return f"lengths-{shard:05d}.bin"


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"
