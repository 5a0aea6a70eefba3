"""Where words begin and end in a tokenizer's vocabulary, learnt from what its parts do and not from how its entries look.

The same letter marks a word in one vocabulary and is a letter of the language in another: byte-level BPE spells a space as
U+0120, which is also a capital of Maltese. So the tokenizer is asked: its model, whether each entry is a word or which prefix
or suffix it gives to parts of words; else its pre-tokenizer, what becomes of the blank between two words; and its decoder,
before which entries that blank comes back.
"""

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastdistil.data.masking import MaskTable, word_starts
from fastdistil.data.ragged import Bools, Ints

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder


class _WordMarks(NamedTuple):
    """What the entries of a vocabulary of V tell about words; special tokens are not looked at."""

    continues_V: Bools
    """True where an entry goes on with the word of the token before it."""
    ends_V: Bools
    """True where an entry ends its word, so that the next token begins one although that `continues`."""
    marks_words: bool
    """Whether the vocabulary shows words at all. If not, both arrays are False."""


def word_marks(tokenizer: "Tokenizer", vocab_size: int) -> _WordMarks:
    """Ask a tokenizer for its marks of words. Costs some 30 ms for 30,000 entries."""
    from tokenizers import models

    # Entries and their ids; an id without an entry stays False.
    ids = tokenizer.get_vocab()
    names = list(ids)
    index = np.fromiter(ids.values(), np.int64, len(ids))
    continues_V, ends_V = np.zeros(vocab_size, np.bool_), np.zeros(vocab_size, np.bool_)
    model = tokenizer.model
    split = _pretokens(tokenizer, "aa bb")
    if isinstance(model, models.WordLevel):  # an entry is all that the pre-tokenizer leaves together
        return _WordMarks(continues_V, ends_V, len(split) > 1)
    # A prefix such as ## stands on every part of a word but its first.
    if prefix := getattr(model, "continuing_subword_prefix", None):
        continues_V[index] = [name.startswith(prefix) for name in names]
        return _WordMarks(continues_V, ends_V, True)
    # A suffix such as </w> stands on the last part of every word.
    if suffix := getattr(model, "end_of_word_suffix", None):
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}  # whole words without the suffix
        ends_V[index] = [name.endswith(suffix) or name in added for name in names]
        continues_V[index] = [name not in added for name in names]
        return _WordMarks(continues_V, ends_V, True)
    # What the pre-tokenizer makes of a blank is in the entries; between two x the decoder shows it as white space.
    between = re.search("aa(.+)bb", "".join(split), re.IGNORECASE)
    if between is None:  # the blank is gone before the model could mark it
        return _WordMarks(continues_V, ends_V, False)
    decoder = _blank_showing_decoder(tokenizer, between[1])
    texts = [decoder.decode(["x", name, "x"])[1:-1] for name in names]
    continues_V[index] = [not text[:1].isspace() for text in texts]
    ends_V[index] = [text[-1:].isspace() and not text.isspace() for text in texts]
    marked = not continues_V[index].all() or bool(ends_V.any())
    return _WordMarks(continues_V & marked, ends_V, marked)


def normalized(tokenizer: "Tokenizer", text: str) -> str:
    return text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)


def _pretokens(tokenizer: "Tokenizer", text: str) -> list[str]:
    """What the model gets to cut into tokens: the text after the normalizer and the pre-tokenizer."""
    text = normalized(tokenizer, text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _blank_showing_decoder(tokenizer: "Tokenizer", blank: str) -> "Decoder":
    """The tokenizer's decoder if it gives blanks, spelt `blank`, back and adds none; else a plain one that does."""
    from tokenizers import decoders

    def shows_blanks(decoder: "Decoder") -> bool:
        return [decoder.decode(["x", "x"]), decoder.decode(["x", blank + "x"])] == ["xx", "x x"]

    candidates: list[Decoder] = [decoders.ByteLevel(), decoders.Replace(blank, " ")]
    if tokenizer.decoder is not None:
        candidates.insert(0, tokenizer.decoder)
    return next(decoder for decoder in candidates if shows_blanks(decoder))


class _WordCheck(NamedTuple):
    """How the words that whole-word masking makes compare with the words of texts."""

    words: int
    wrong: list[str]
    """Those that hold several words of the text, or only a part of one."""


def compare_words(tokenizer: "Tokenizer", table: MaskTable, texts: Iterable[str]) -> _WordCheck:
    """Group the tokens of texts into words as masking does, and compare with the texts themselves.

    A word is right if the text has white space at its ends only, and if it does not begin inside what white space and the
    pre-tokenizer leave together.
    """
    words, wrong = 0, []
    for text in texts:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids_T = np.array(encoding.ids, np.int64)
        starts = word_starts(table, ids_T, np.arange(len(ids_T))).tolist()
        offsets, pretoken_ids = encoding.offsets, encoding.word_ids  # each access makes a list anew
        for first, last in pairwise([*starts, len(ids_T)]):
            # The word is tokens first ... last - 1, characters begin ... end - 1.
            begin, end = offsets[first][0], offsets[last - 1][1]
            word = text[begin:end].strip()
            after_blank = first == 0 or text[begin - 1].isspace() or text[begin : begin + 1].isspace()
            begins_inside = not after_blank and pretoken_ids[first] == pretoken_ids[first - 1]
            words += 1
            if begins_inside or len(word.split()) > 1:
                wrong.append(word)
    return _WordCheck(words, wrong)


_WRONG_WORDS = 0.01
"""A larger share of words that are none is noted."""


def check_words(tokenizer: "Tokenizer", table: MaskTable, sequences: Iterable[Ints], note: Callable[[str], None]) -> None:
    """Note it where the words that whole-word masking takes from sequences of tokens are not those of their text."""
    texts = (tokenizer.decode(sequence.tolist(), skip_special_tokens=True) for sequence in sequences)
    words, wrong = compare_words(tokenizer, table, texts)
    if len(wrong) > _WRONG_WORDS * words:
        note(
            f"mask.whole_word: {len(wrong)} of {words} sampled words are not words of the text, such as {wrong[0][:60]!r}: "
            "how this tokenizer marks words is not understood; set mask.whole_word=false"
        )
