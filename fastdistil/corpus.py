"""A prepared corpus on disk, and its tokenizer: what `fastdistil prepare` writes, back as arrays.

    DIR/tokens-00000.bin     uint16 (uint32 above 65,536 entries of vocabulary), little-endian: sequences laid end to end
    DIR/lengths-00000.bin    int32: the length of each, special tokens included; offsets are their cumulative sum
    DIR/counts.bin           int64 [V]: how often each token occurs, for masking
    DIR/tokenizer/           a copy of the tokenizer
    DIR/quarantine.jsonl     records that could not be read, if any
    DIR/manifest.json        see Manifest; written last, so a directory that has it is complete

Written by prepare.py.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import chain
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.masking import ranges

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FORMAT = 1

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]
FastTokenizer: TypeAlias = "PreTrainedTokenizerFast"
"""A name for annotations that costs no import of transformers."""


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
        """Tokens of these sequences (int64 [n], any order), laid end to end: int64 [sum of their lengths].

        Raises CorruptData where a shard was shortened since it was opened.
        """
        lengths_n = self.lengths[sequences].astype(np.int64)
        ends_n = np.cumsum(lengths_n)
        tokens = np.empty(int(ends_n[-1]) if len(ends_n) else 0, np.int64)
        shards_n = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        shards = np.unique(shards_n)
        check_mapped([self._shards[shard] for shard in shards])
        for shard in shards:
            here = shards_n == shard
            starts = self._offsets[sequences[here]] - self._offsets[self._first_sequence[shard]]
            source = ranges(starts, lengths_n[here])
            if here.all():
                tokens[:] = self._shards[shard][source]
            else:
                tokens[ranges(ends_n[here] - lengths_n[here], lengths_n[here])] = self._shards[shard][source]
        check_mapped([self._shards[shard] for shard in shards])
        return tokens


def check_mapped(arrays: Iterable["np.memmap[Any, Any]"]) -> None:
    """Raise CorruptData where a mapped file is shorter than it was when it was opened.

    To be called before and after what is read: reading beyond a file's last page ends the process (SIGBUS), and reading beyond
    its end within that page gives zeros.
    """
    for array in arrays:
        mapping = cast(mmap, array.base)
        if (size := mapping.size()) < len(mapping):
            raise CorruptData(
                f"{array.filename} was shortened while it was in use: {len(mapping)} bytes when it was opened, now {size}; "
                "restore it or make it again, and write into no file that is in use"
            )


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


def token_facts(tokenizer: FastTokenizer) -> TokenFacts:
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


def vocabulary_size(tokenizer: FastTokenizer) -> int:
    """One more than the largest id: vocabularies may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def vocabulary_fingerprint(tokenizer: FastTokenizer) -> str:
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


def load_tokenizer(path: str | Path) -> FastTokenizer:
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
    return cast(FastTokenizer, tokenizer)


def fast_tokenizer(tokenizer: "Tokenizer", model_max_length: int, special_tokens: dict[str, str]) -> FastTokenizer:
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast  # untyped in the library
    return cast(
        "PreTrainedTokenizerFast", make(tokenizer_object=tokenizer, model_max_length=model_max_length, **special_tokens)
    )


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
