"""Shards on disk, appended block by block, and the progress.json that an interrupted prepare goes on from."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastdistil.data.corpus import CorpusName, ShardFacts, lengths_name, token_dtype, tokens_name
from fastdistil.data.ragged import Ints
from fastdistil.data.range_reader import RangeReader
from fastdistil.data.tokenise import Encoded
from fastdistil.storage import canonical, text_sha256, write_atomically
from fastdistil.untrusted import FileFacts, Whole


@dataclass
class WrittenShards:
    """What finished shards hold; progress.json keeps it."""

    blocks: Whole = 0
    documents: Whole = 0
    dropped: Whole = 0
    special_spellings: Whole | None = 0
    sequences: Whole = 0
    tokens: Whole = 0
    shards: list[ShardFacts] = field(default_factory=list)
    files: dict[CorpusName, FileFacts] = field(default_factory=dict)


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

    def finish(self) -> FileFacts:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}

    def abandon(self) -> None:
        with suppress(OSError):  # of a buffer that no longer fits onto the disk: that error is on its way already
            self._file.close()


class Shards:
    """Appends blocks to shard files; `written` counts what they hold, `counts_V` how often each token occurs."""

    def __init__(self, out: Path, written: WrittenShards, counts_V: Ints, identity: dict[str, Any], shard_tokens: int) -> None:
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
        if self.written.special_spellings is not None:
            self.written.special_spellings += encoded.special_spellings
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
        values = {**self.identity, "written": asdict(self.written)}
        write_atomically(self.out / "progress.json", json.dumps({**values, "sha256": text_sha256(canonical(values))}))

    def abandon(self) -> None:
        for file in self._open or ():
            file.abandon()


def counted(out: Path, written: WrittenShards, vocab_size: int) -> Ints:
    """int64 [V]: token frequencies of the finished shards."""
    counts_V = np.zeros(vocab_size, np.int64)
    dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
    for shard in range(len(written.shards)):
        reader = RangeReader(out / tokens_name(shard), dtype)
        for start in range(0, len(reader), 2**22):
            tokens = reader.read(np.array([start]), np.array([min(2**22, len(reader) - start)]))
            counts_V += np.bincount(tokens, minlength=vocab_size)
    return counts_V
