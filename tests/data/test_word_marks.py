"""Marks of words against the words themselves: what lies between white space in the text that was tokenised."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import MaskTable, mask_table, word_starts
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import load_tokenizer, token_facts
from fastdistil.data.word_marks import check_words, compare_words
from fastdistil.recipe import Mask

SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
NAMES = {f"{name.strip('<>')}_token": name for name in SPECIAL}
# Letters that byte-level BPE marks words with are ordinary ones in the first three.
LANGUAGES = {
    "Czech": "počítač večer začátek oči člověk čas život město dobrý nový den noc dům strom škola kniha",
    "Esperanto": "ĉu vi ĉiam trovas ĉevalon ĉe la granda domo en urbo",
    "Maltese": "Ġużeppi ġie Ċensu ċar iddar Ġorġ ta mara raġel",
    "English": "the cat sat on a mat and looked at dogs in towns",
}
TEXTS = {language: " ".join(np.random.default_rng(0).choice(words.split(), 1000)) for language, words in LANGUAGES.items()}


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any, text: str) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(text.split(" . "), trainer)
    return tokenizer


def subword_tokenizer(kind: str, text: str) -> Tokenizer:
    common: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    short: dict[str, Any] = {"vocab_size": 5 + len(set(text)) + 12, **common}
    metaspace, spaces = pre_tokenizers.Metaspace(), pre_tokenizers.WhitespaceSplit()
    match kind:
        case "unigram":
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **short)
            return trained(models.Unigram(), trainer, metaspace, decoders.Metaspace(), text)
        case "unigram without decoder":
            return trained(models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **short), metaspace, None, text)
        case "metaspace BPE":
            return trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**short), metaspace, decoders.Metaspace(), text)
        case "metaspace BPE that WordPiece decodes":
            return trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**short), metaspace, decoders.WordPiece(), text)
        case "BPE with </w>":
            trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **short)
            return trained(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer, spaces, None, text)
        case "WordPiece":
            return trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**short), spaces, None, text)
        case "byte-level BPE" | "byte-level BPE without decoder":
            trainer = trainers.BpeTrainer(vocab_size=275, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
            decoder = decoders.ByteLevel() if kind == "byte-level BPE" else None
            return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoder, text)
    # As Llama's: no pre-tokenizer, the normalizer spells the blanks.
    tokenizer = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**short), metaspace, None, text)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


KINDS = (
    "unigram",
    "unigram without decoder",
    "metaspace BPE",
    "metaspace BPE that WordPiece decodes",
    "BPE with </w>",
    "WordPiece",
    "byte-level BPE",
    "byte-level BPE without decoder",
    "BPE without pre-tokenizer",
)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    make: Any = PreTrainedTokenizerFast
    loaded: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, **NAMES)
    return loaded


def whole_word_table(tokenizer: PreTrainedTokenizerFast) -> MaskTable:
    facts = token_facts(tokenizer)
    return mask_table(Mask(whole_word=True), facts, np.ones(facts.vocab_size, np.int64))


def masked_words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The text of each word that is masked as a whole."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids)
    starts = word_starts(whole_word_table(tokenizer), ids, np.arange(len(ids)))
    spans = [(encoding.offsets[first][0], encoding.offsets[last - 1][1]) for first, last in pairwise([*starts, len(ids)])]
    return [text[begin:end].strip() for begin, end in spans]


@pytest.mark.parametrize("kind", KINDS)
def test_masked_words_are_those_between_the_blanks(kind: str) -> None:
    for text in TEXTS.values():
        tokenizer = fast(subword_tokenizer(kind, text))
        text = text[:500].rpartition(" ")[0]
        words = text.split()
        assert len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)) > 1.1 * len(words)
        assert masked_words(tokenizer, text) == words
        assert compare_words(tokenizer.backend_tokenizer, whole_word_table(tokenizer), [text]) == (len(words), [])


def test_every_entry_of_a_word_level_vocabulary_is_a_word() -> None:
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    model = models.WordLevel(unk_token="<unk>")
    tokenizer = fast(trained(model, trainer, pre_tokenizers.WhitespaceSplit(), None, TEXTS["Maltese"]))
    assert masked_words(tokenizer, TEXTS["Maltese"]) == TEXTS["Maltese"].split()
    assert not token_facts(tokenizer).continues.any()


def test_line_ends_inside_and_after_tokens_end_words() -> None:
    names = ["<pad>", "a", "b", "Ġ", "Ċ", ".", ".Ċ", "ĠĠ", "ĠĊ"]
    tokenizer = Tokenizer(models.BPE(dict(zip(names, range(9), strict=True)), [(".", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    loaded = make(tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<pad>")
    assert masked_words(loaded, "ab.\nab\na b  a") == ["ab.", "ab", "a", "b", "a"]


def test_vocabularies_without_marks_have_no_words() -> None:
    text = TEXTS["Czech"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    for decoder in (None, decoders.WordPiece(), decoders.BPEDecoder()):
        tokenizer = trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace(), decoder, text)
        facts = token_facts(fast(tokenizer))
        assert not facts.marks_words
        assert not facts.continues.any()
        assert not facts.ends.any()


def test_bert_base_uncased_is_marked_by_its_prefix_and_splits_words_at_punctuation(data_folder: Path) -> None:
    if not (data_folder / "bert-base-uncased").is_dir():
        pytest.skip("the data folder has no bert-base-uncased")
    tokenizer = load_tokenizer(data_folder / "bert-base-uncased")
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert token_facts(tokenizer).continues.tolist() == [name.startswith("##") for name in names]
    assert masked_words(tokenizer, "Unaffable, re-tokenised tokens!") == [
        "Unaffable",
        ",",
        "re",
        "-",
        "tokenised",
        "tokens",
        "!",
    ]


def test_words_that_are_none_are_noted(tmp_path: Path) -> None:
    tokenizer = fast(subword_tokenizer("unigram", TEXTS["Czech"]))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(TEXTS["Czech"])
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), max_length=32, workers=1)
    prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", options)
    corpus = Corpus.open(tmp_path / "corpus")
    table, notes = whole_word_table(tokenizer), list[str]()
    check_words(tokenizer.backend_tokenizer, table, corpus.sample(20), notes.append)
    assert not notes
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    joining = np.array([not name.startswith(("Ġ", "Ċ", "ĉ", "č")) for name in names])
    cutting = np.zeros(len(names), np.bool_)
    for continues_V in (joining, cutting):
        table.continues_V[:] = continues_V
        check_words(tokenizer.backend_tokenizer, table, corpus.sample(20), notes.append)
        wrong, words = (int(word) for word in notes.pop().split() if word.isdecimal())
        assert 0.1 * words < wrong <= words
