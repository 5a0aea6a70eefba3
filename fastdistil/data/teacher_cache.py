"""A teacher's likeliest tokens, cached on disk: what training reads instead of running the teacher.

    CACHE/identity.json               what the cache was made of and how (see `identity`)
    CACHE/E-NNNNN.npy                 epoch E, shard NNNNN: one record a token, in the corpus's order
    CACHE/E-NNNNN.json                its sha256 and size, written after it: a shard without is not there yet

A record holds the K tokens (uint16 or int32), their log-probabilities at the objective's temperature (float16: 0.1% of each
probability above e^-16) and the mass of the rest (float32). Masked teachers see other masks in every epoch, so each has its
shards; causal ones see the same text, and epoch 0 serves all.

Shapes: n sequences, T tokens end to end, K listed tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from fastdistil.data.corpus import Corpus, check_file
from fastdistil.data.ragged import Ints, offsets
from fastdistil.data.range_reader import RangeReader
from fastdistil.errors import CorruptData, FastdistilError, UserError, translated
from fastdistil.recipe import Recipe
from fastdistil.storage import canonical, text_sha256
from fastdistil.untrusted import FileFacts, Sha256, check, read_json, reason

FORMAT = 1
SHARD_TOKENS = 2**18
IDENTITY = "identity.json"


class Cached(NamedTuple):
    """Teachers of tokens laid end to end, fields as in kernels.distill_options.SparseTeacher."""

    indices_TK: NDArray[np.int64]
    log_probabilities_TK: NDArray[np.float32]
    tail_T: NDArray[np.float32] | None


def record(vocabulary: int, k: int) -> np.dtype[Any]:
    index = np.uint16 if vocabulary <= 2**16 else np.int32
    return np.dtype([("index", index, (k,)), ("log_probability", np.float16, (k,)), ("tail", np.float32)])


def shard_starts(corpus: Corpus) -> list[int]:
    """First sequence of each shard, and n: about SHARD_TOKENS tokens each."""
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    starts = [0]
    while starts[-1] < len(ends):
        done = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(max(starts[-1] + 1, int(ends.searchsorted(done + SHARD_TOKENS, side="right"))))
    return starts


def shard_name(epoch: int, shard: int) -> str:
    return f"{epoch}-{shard:05d}.npy"


def identity(
    recipe: Recipe, corpus: Corpus, causal: bool, teacher: str, vocabulary: int, columns: int | None
) -> dict[str, Any]:
    """All that the cached numbers depend on, by the names that a person can change. `recipe` must be resolved.

    `columns`: the first entries of the vocabulary, over which the teacher's distribution is; None: all.
    """
    assert recipe.teacher is not None
    masks = {} if causal else {"seed": recipe.seed, **{f"mask.{key}": value for key, value in recipe.mask.model_dump().items()}}
    return {
        "format": FORMAT,
        "data.train": text_sha256(canonical(corpus.manifest.files)),
        "tokenizer": corpus.manifest.fingerprint,
        "teacher.path": teacher,
        "teacher.dtype": recipe.teacher.dtype,
        "teacher.top_k": min(recipe.teacher.top_k, vocabulary),
        "teacher.min_probability": recipe.teacher.min_probability,
        "objective.temperature": recipe.objective.temperature,
        "vocabulary": vocabulary,
        **({} if columns is None else {"columns": columns}),
        **masks,
    }


class _Identity(TypedDict):
    """identity.json: what a cache was made of, and its checksum."""

    identity: dict[str, Any]
    sha256: Sha256


def check_identity(directory: Path, identity: Mapping[str, Any]) -> None:
    """Raises UserError where a cache was made of something else, CorruptData where its identity cannot be read."""
    path = directory / IDENTITY
    if not path.is_file():
        raise UserError(f"no teacher cache at {directory}; make one with `fastdistil cache-teacher` and the run's recipe")
    try:
        with translated("reading a teacher cache", path):
            values = read_json(path)
        check(_Identity, values)
        cached = values["identity"]
        if text_sha256(canonical(cached)) != values["sha256"]:
            raise ValueError("sha256")
    except UserError:  # a ValueError too
        raise
    except ValueError as error:
        raise CorruptData(
            f"{path} is damaged ({reason(error)}); delete {directory} and run fastdistil cache-teacher again"
        ) from error
    for key in dict.fromkeys([*identity, *cached]):
        if identity.get(key) != cached.get(key):
            raise UserError(
                f"the teacher cache {directory} was made with another {key}: it has {_short(cached.get(key))}, the recipe "
                f"{_short(identity.get(key))}; change the recipe back, or run fastdistil cache-teacher with this one"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class TeacherCache:
    """Reads shards, which stay on disk. Make one with `TeacherCache.open`."""

    shards: Mapping[tuple[int, int], RangeReader]
    starts: Ints
    """First sequence of each shard, and n."""
    offsets_n: Ints
    """First token of each sequence, and the total."""
    causal: bool
    tail: bool
    vocabulary: int

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any], corpus: Corpus, epochs: int, verify: str) -> "TeacherCache":
        """All shards of `epochs` epochs, checked. Raises UserError, CorruptData."""
        check_identity(directory, identity)
        causal = "seed" not in identity
        starts, bounds = shard_starts(corpus), offsets(corpus.lengths)
        shards = {}
        dtype = record(identity["vocabulary"], identity["teacher.top_k"])
        for epoch in range(1 if causal else epochs):
            for shard in range(len(starts) - 1):
                path = directory / shard_name(epoch, shard)
                if not path.with_suffix(".json").is_file():
                    raise UserError(
                        f"the teacher cache {directory} lacks epoch {epoch}, shard {shard}: this run needs {epochs} epochs; "
                        "run fastdistil cache-teacher with this run's recipe, which continues what is there"
                    )
                check_shard(path, full=verify == "full")
                records = open_shard(path)
                tokens = int(bounds[starts[shard + 1]] - bounds[starts[shard]])
                if records.dtype != dtype or len(records) != tokens:
                    raise CorruptData(
                        f"{path} holds {len(records)} records of {records.dtype}, wanted {tokens} of {dtype}; delete it and "
                        "run fastdistil cache-teacher again"
                    )
                shards[epoch, shard] = records
        tail = identity["teacher.min_probability"] is None
        return cls(shards, np.array(starts), bounds, causal, tail, identity["vocabulary"])

    def rows(self, epoch: int, sequences_n: Ints) -> Cached:
        """Read the teacher's lists for the tokens of these sequences, end to end.

        Raises CorruptData where a shard was shortened since it was opened.
        """
        epoch = 0 if self.causal else epoch
        shards_n = self.starts.searchsorted(sequences_n, side="right") - 1
        begins_n = self.offsets_n[sequences_n] - self.offsets_n[self.starts[shards_n]]
        lengths_n = self.offsets_n[sequences_n + 1] - self.offsets_n[sequences_n]
        # Sequences that follow each other in one shard are read by one call.
        firsts = np.flatnonzero(np.diff(shards_n, prepend=-1)).tolist()
        joined = np.concatenate(
            [
                self.shards[epoch, int(shards_n[first])].read(begins_n[first:end], lengths_n[first:end])
                for first, end in pairwise([*firsts, len(sequences_n)])
            ]
        )
        indices_TK = joined["index"].astype(np.int64)
        if indices_TK.size and not 0 <= (least := indices_TK.min()) <= (largest := indices_TK.max()) < self.vocabulary:
            raise CorruptData(  # which data.verify=size lets pass
                f"the teacher cache lists tokens {least} to {largest} of a vocabulary of {self.vocabulary}; delete it and run "
                "fastdistil cache-teacher again"
            )
        tail_T = np.ascontiguousarray(joined["tail"]) if self.tail else None
        return Cached(indices_TK, joined["log_probability"].astype(np.float32), tail_T)


def open_shard(path: Path) -> RangeReader:
    """Return a shard's records. Raises CorruptData where the file is no one-dimensional array of numpy's."""
    try:
        with translated("opening a shard of the teacher's cache", path):
            array: Any = np.load(path, mmap_mode="r")  # reads the header alone
        if not isinstance(array, np.memmap) or array.ndim != 1 or not array.dtype.itemsize:
            raise ValueError("no one-dimensional array of records")
        return RangeReader(path, array.dtype, array.offset)
    except (MemoryError, FastdistilError):  # says nothing of the shard
        raise
    except Exception as error:  # numpy's reader of headers evaluates what stands there, and may raise anything
        again = "delete it and run fastdistil cache-teacher again"
        raise CorruptData(f"{path} holds no records ({reason(error)}); {again}") from error


def check_shard(path: Path, full: bool) -> None:
    """Compare a shard with the sha256 (full) or size beside it. Raises CorruptData."""
    again = "run fastdistil cache-teacher again, which makes it anew"
    try:
        expected = read_json(path.with_suffix(".json"))
        check(FileFacts, expected)
    except ValueError as error:
        raise CorruptData(f"{path.with_suffix('.json')} is damaged ({reason(error)}); {again}") from error
    check_file(path, expected, full, again)
