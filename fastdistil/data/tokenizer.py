"""A corpus's tokenizer: loaded, trained and saved so that others load the same one, and what the data path must know of it."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from fastdistil.data.masking import TokenFacts
from fastdistil.data.word_marks import word_marks
from fastdistil.errors import UserError, translated
from fastdistil.storage import canonical, text_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


FastTokenizer: TypeAlias = "PreTrainedTokenizerFast"
"""A name for annotations that costs no import of transformers."""


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


_SPECIAL_TOKENS = (
    {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"},
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
)
"""BERT's, RoBERTa's and GPT-2's spelling, for directories that hold a tokenizer.json and no word of what its tokens are for."""


_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def load_tokenizer(path: str | Path) -> FastTokenizer:
    """A fast tokenizer from a directory or by its hub id, as its tokenizer.json says. Raises UserError.

    Where the directory names no special tokens, those of BERT, RoBERTa or GPT-2 are taken if the vocabulary has them all.
    """
    from fastdistil.data.transformers_calls import library_call

    name = str(path)
    folder = Path(path)
    if folder.is_dir():
        if not any(match for pattern in _TOKENIZER_FILES for match in folder.glob(pattern)):
            raise UserError(f"{folder} holds no tokenizer; wanted one of {', '.join(_TOKENIZER_FILES)}")
    elif folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no tokenizer directory {name}; give a directory or a hub id such as bert-base-uncased")
    problem, advice = f"cannot load the tokenizer {name!r}", "give a directory or a reachable hub id"
    with library_call(f"loading the tokenizer {name}", problem, advice):
        tokenizer = _read_tokenizer(name)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer {name!r} has no fast (Rust) version; save one with convert_slow_tokenizer")
    if not tokenizer.all_special_ids:
        vocabulary = tokenizer.get_vocab()
        named = next((names for names in _SPECIAL_TOKENS if vocabulary.keys() >= set(names.values())), {})
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
    for text in (*_PROBES, *texts):
        for add_special_tokens in (True, False):
            ids = loaded(text, add_special_tokens=add_special_tokens).input_ids
            if ids != cast(Any, tokenizer)(text, add_special_tokens=add_special_tokens).input_ids:
                return f"other ids for {text[:40]!r}"
    return None


_PROBES = (
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


_ALPHABET = 1000
"""Letters of a trained vocabulary; rarer ones are unknown."""


def train_wordpiece(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a lower-casing WordPiece tokenizer as BERT's, save it to `out` for AutoTokenizer, and return `out`.

    Ids: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the vocabulary. Raises UserError where there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = _SPECIAL_TOKENS[0]
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
    alphabet = singles[:_ALPHABET]
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
