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
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from fastdistil.data.masking import ranges
from fastdistil.data.word_marks import word_marks
from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.storage import RangeReader
from fastdistil.untrusted import FileFacts, PlainName, Sealed, Whole, check, converted, read_json, reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FORMAT = 1

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]
FastTokenizer: TypeAlias = "PreTrainedTokenizerFast"
"""A name for annotations that costs no import of transformers."""


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
    """Of the tokenizer's whole definition."""
    dtype: Annotated[str, Field(pattern="^uint(16|32)$")]
    """Of the token shards."""
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
    """Of these, those of headers, footers and licences."""
    special_spellings: Whole | None = None
    """How often the text spells out a special token such as [MASK]; None where an earlier version did not count."""
    unknown_share: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    """Of all tokens but the special ones added, from 0 to 1; None where an earlier version did not count."""

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


def canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Reading


class Corpus:
    """A prepared corpus: sequences of tokens in shards, which stay on disk. Make one with `Corpus.open`."""

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
        if not len(self.lengths) or self.lengths.min() < 1:
            raise CorruptData(f"{path} has a sequence without tokens, or no sequence at all; {PREPARE_AGAIN}")
        self._offsets: Integers = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=self._offsets[1:])
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

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, sequences: int) -> list[Integers]:
        """Tokens of up to so many sequences, int64 each, evenly spread over the corpus."""
        chosen = np.unique(np.linspace(0, len(self) - 1, sequences).astype(np.int64))
        return [self.gather(chosen[[row]]) for row in range(len(chosen))]

    def gather(self, sequences: Integers) -> Integers:
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


def check_file(path: Path, expected: FileFacts, full: bool) -> None:
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
    """bool [V]: True where a token goes on with the word before it (##x of WordPiece; no leading blank in byte-level BPE and
    sentencepiece). Special tokens: False. All False for vocabularies without such marks; see marks_words."""
    marks_words: bool
    """Whether the vocabulary shows where words begin at all; if not, there is no whole-word masking."""
    ends: npt.NDArray[np.bool_]
    """bool [V]: True where a token ends its word (x</w>), so that the next one begins a word although it `continues`."""


def token_facts(tokenizer: FastTokenizer) -> TokenFacts:
    """Raises UserError for a tokenizer that has nothing to pad with."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos", "sep")}
    pad_id = next((ids[name] for name in ("pad", "eos", "sep") if ids[name] is not None), None)
    if pad_id is None:
        raise UserError("the tokenizer has no padding, eos or sep token; name one as pad_token in tokenizer_config.json")
    vocab_size = vocabulary_size(tokenizer)
    marked = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = sorted({*tokenizer.all_special_ids, *marked.values()})
    marks = word_marks(tokenizer.backend_tokenizer, vocab_size)
    marks.continues_V[special] = False
    special_ids = np.array(special, np.int64)
    return TokenFacts(vocab_size, ids["mask"], pad_id, special_ids, marks.continues_V, marks.marks_words, marks.ends_V)


def frame(tokenizer: FastTokenizer) -> tuple[int | None, int | None]:
    """Return the special tokens that begin and end a sequence: [CLS] and [SEP], else bos and eos."""
    back = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    return front_token(tokenizer), cast("int | None", back)


def added_tokens(tokenizer: FastTokenizer, options: Mapping[str, Any]) -> list[int]:
    """Return the special tokens that `prepare` puts around each sequence, by the options that a manifest holds."""
    front, back = frame(tokenizer)
    tokens = (front if has_front(options) else None, back if options["special_tokens"] else None)
    return [token for token in tokens if token is not None]


def has_front(options: Mapping[str, Any]) -> bool:
    """Return whether a manifest's options put the `front_token` in front of each sequence."""
    without_option = "yes" if options["special_tokens"] else "no"  # as earlier versions had it
    return bool(options.get("bos", without_option) == "yes")


def unknown_id(tokenizer: FastTokenizer) -> int | None:
    """Return the token of unknown text; None where the model makes none (byte-level BPE), whatever unk_token says."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    if hasattr(backend.model, "unk_token"):
        name = backend.model.unk_token
        return backend.token_to_id(name) if name is not None else None
    return cast("int | None", tokenizer.unk_token_id)  # Unigram does not show its own


def front_token(tokenizer: FastTokenizer) -> int | None:
    """Return the token that can begin a text: [CLS], else BOS."""
    token = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    return cast("int | None", token)


def begins_texts(tokenizer: FastTokenizer) -> bool:
    """Return whether a call of the tokenizer puts its `front_token` in front of a text."""
    front = front_token(tokenizer)
    if front is None:
        return False
    ids = cast(Any, tokenizer)("").input_ids  # of no text: some letters have no token, or that very one
    return bool(ids) and ids[0] == front


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
    """A fast tokenizer from a directory or by its hub id, as its tokenizer.json says. Raises UserError.

    Where the directory names no special tokens, those of BERT, RoBERTa or GPT-2 are taken if the vocabulary has them all.
    """
    from fastdistil.models.pretrained import library_call

    name = str(path)
    folder = Path(path)
    if folder.is_dir():
        if not any(match for pattern in TOKENIZER_FILES for match in folder.glob(pattern)):
            raise UserError(f"{folder} holds no tokenizer; wanted one of {', '.join(TOKENIZER_FILES)}")
    elif folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no tokenizer directory {name}; give a directory or a hub id such as bert-base-uncased")
    problem, advice = f"cannot load the tokenizer {name!r}", "give a directory or a reachable hub id"
    with library_call(f"loading the tokenizer {name}", problem, advice):
        tokenizer = _read_tokenizer(name)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer {name!r} has no fast (Rust) version; save one with convert_slow_tokenizer")
    if not tokenizer.all_special_ids:
        vocabulary = tokenizer.get_vocab()
        named = next((names for names in SPECIAL_TOKENS if vocabulary.keys() >= set(names.values())), {})
        length = tokenizer.model_max_length
        tokenizer = fast_tokenizer(tokenizer.backend_tokenizer, length, named)
    return cast(FastTokenizer, tokenizer)


def _read_tokenizer(name: str) -> Any:
    """Read tokenizer.json where there is one; elsewhere AutoTokenizer makes the tokenizer from the older files.

    AutoTokenizer chooses a class by the model's type, and some classes (Qwen2's) build their own pre-tokenizer, normalizer and
    special tokens in place of the file's. Of such a class only the roles of special tokens are taken that no file names.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    by_type, by_file = cast(Any, AutoTokenizer), cast(Any, PreTrainedTokenizerFast)
    try:
        cached_file(name, "tokenizer.json")
    except OSError:
        return by_type.from_pretrained(name, trust_remote_code=False)
    tokenizer = by_file.from_pretrained(name)
    vocabulary = tokenizer.get_vocab()
    try:
        usual = by_type.from_pretrained(name, trust_remote_code=False)
    except Exception:  # noqa: BLE001 - a class that cannot build this vocabulary, with whichever exception, is not needed
        return tokenizer
    for role in by_file.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(usual, role, None)
        if getattr(tokenizer, role) is None and token in vocabulary:
            setattr(tokenizer, role, token)
    return tokenizer


def save_tokenizer(tokenizer: FastTokenizer, folder: Path) -> None:
    """Write a tokenizer so that AutoTokenizer reads it back from tokenizer.json, whatever kind of model lies beside it.

    The name of a class that builds its own would have it built; transformers before 5 do not know the name that 5 writes.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = {"model_input_names": ["input_ids", "attention_mask"], **json.loads(path.read_text(encoding="utf-8"))}
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def difference_as_loaded(tokenizer: FastTokenizer, folder: Path, texts: Iterable[str]) -> str | None:
    """Say how AutoTokenizer, which users call, reads `folder` otherwise than `tokenizer` is: a vocabulary or a text's ids."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = cast(Any, AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds
        return f"it fails with {type(error).__name__}"
    if vocabulary_size(loaded) != vocabulary_size(tokenizer):
        return f"{vocabulary_size(loaded)} entries, not {vocabulary_size(tokenizer)}"
    if loaded.get_vocab() != tokenizer.get_vocab():
        return "other tokens for the same ids"
    for text in (*PROBES, *texts):
        for add_special_tokens in (True, False):
            ids = loaded(text, add_special_tokens=add_special_tokens).input_ids
            if ids != cast(Any, tokenizer)(text, add_special_tokens=add_special_tokens).input_ids:
                return f"other ids for {text[:40]!r}"
    return None


PROBES = (
    "",
    " two  spaces\tand a tab\n\n and lines\r\n",
    "don't 1234,567 (\ufb01) na\u00efve NA\u00cfVE cafe\u0301",
    "\uff21\uff11 \u4e2d\u6587 \u03a9\u03bc\u03ad \u0434\u0430 \U0001f642",
)
"""White space, digits, contractions, ligatures, composed and decomposed letters, other scripts: where tokenizers differ."""


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
