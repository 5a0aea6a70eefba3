"""Tokenizers: what is trained and loaded, what is known of their tokens, and what they cannot encode."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdistil.data.prepare import prepare
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece, vocabulary_fingerprint
from fastdistil.errors import UserError
from tests.data.short_sentences import SENTENCES, options


def test_train_wordpiece_is_lower_casing_deterministic_and_loads_by_itself(
    wordpiece: Path,
    tmp_path: Path,
) -> None:
    again = train_wordpiece(iter(SENTENCES), 120, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (wordpiece / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(wordpiece)
    assert tokenizer.is_fast
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer("The FOX")["input_ids"] == tokenizer("the fox")["input_ids"]
    assert tokenizer.decode(tokenizer("the fox jumps")["input_ids"]) == "[CLS] the fox jumps [SEP]"
    with pytest.raises(UserError, match="no text to train"):
        train_wordpiece([], 100, tmp_path / "empty")


def test_token_facts_of_wordpiece_and_byte_level(wordpiece: Path, byte_level: Path) -> None:
    tokenizer = load_tokenizer(wordpiece)
    facts = token_facts(tokenizer)
    assert (facts.vocab_size, facts.pad_id, facts.mask_id) == (len(tokenizer), 0, 4)
    assert facts.special_ids.tolist() == [0, 1, 2, 3, 4]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert facts.continues.tolist() == [token.startswith("##") for token in tokens]
    assert facts.continues.any()
    assert facts.marks_words

    tokenizer = load_tokenizer(byte_level)
    facts = token_facts(tokenizer)
    assert (facts.pad_id, facts.mask_id, facts.special_ids.tolist()) == (0, None, [0])
    by_token = {token: bool(facts.continues[index]) for token, index in tokenizer.get_vocab().items()}
    assert {token: by_token[token] for token in ("Ġthe", "Ġ", "Ċ", "e", "<|endoftext|>")} == {
        "Ġthe": False,
        "Ġ": False,
        "Ċ": False,
        "e": True,
        "<|endoftext|>": False,
    }
    assert facts.marks_words


def test_vocabulary_without_word_marks_or_padding() -> None:
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a")),
        unk_token="a",
    )
    with pytest.raises(UserError, match="no padding, eos or sep token"):
        token_facts(tokenizer)
    tokenizer.pad_token = "b"
    facts = token_facts(tokenizer)
    assert facts.vocab_size == 6  # ids 1 to 4 are a gap
    assert not facts.marks_words
    assert not facts.continues.any()


def test_the_fingerprint_is_of_the_token_map_alone(wordpiece: Path, byte_level: Path, tmp_path: Path) -> None:
    first = vocabulary_fingerprint(load_tokenizer(wordpiece))
    assert first == vocabulary_fingerprint(load_tokenizer(shutil.copytree(wordpiece, tmp_path / "copy")))
    assert first != vocabulary_fingerprint(load_tokenizer(byte_level))
    path = tmp_path / "copy" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["the"], values["model"]["vocab"]["fox"] = (
        values["model"]["vocab"]["fox"],
        values["model"]["vocab"]["the"],
    )
    path.write_text(json.dumps(values))
    assert first != vocabulary_fingerprint(load_tokenizer(tmp_path / "copy"))  # same size, other map


def test_special_tokens_are_found_where_only_a_tokenizer_json_lies(
    wordpiece: Path,
    byte_level: Path,
    tmp_path: Path,
) -> None:
    for source, front in ((wordpiece, "[CLS]"), (byte_level, "<|endoftext|>")):
        folder = tmp_path / source.name
        folder.mkdir()
        shutil.copy(source / "tokenizer.json", folder)
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.cls_token or tokenizer.bos_token) == front
        assert tokenizer.get_vocab() == load_tokenizer(source).get_vocab()
    assert load_tokenizer(tmp_path / wordpiece.name).mask_token_id == 4


def test_bert_base_uncased_loads_with_its_special_tokens(data_folder: Path) -> None:
    if not (data_folder / "bert-base-uncased").is_dir():
        pytest.skip("the data folder has no bert-base-uncased")
    tokenizer = load_tokenizer(data_folder / "bert-base-uncased")
    ids = (
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.mask_token_id,
    )
    assert ids == (0, 100, 101, 102, 103)
    facts = token_facts(tokenizer)
    assert facts.vocab_size == 30522
    assert int(facts.continues.sum()) == 5828  # grep -c '^##' vocab.txt


def test_tokenizers_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, complaint in (
        ("nobody/nothing-of-this-name", "cannot load the tokenizer"),
        (str(tmp_path / "nowhere"), "no tokenizer directory"),
        ("./nowhere", "no tokenizer directory"),
        (str(tmp_path / "empty"), "holds no tokenizer; wanted one of"),
        (str(tmp_path / "broken"), "cannot load the tokenizer"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_code_of_a_tokenizer_is_never_run_and_nobody_is_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (tmp_path / "vocab.txt").write_text("[UNK]\nthe\n")
    (tmp_path / "code.py").write_text("raise SystemExit('the code was run')\n")
    values = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="runs no code that comes with a checkpoint"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_any_frame_is_refused_unless_none_is_wanted(lines: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "the": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, unk_token="a").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no cls, sep, bos or eos token"):
        prepare([str(lines)], tmp_path / "out", options(tmp_path / "tokenizer"))
    bare = options(tmp_path / "tokenizer", special_tokens=False, max_unknown_share=1)
    assert prepare([str(lines)], tmp_path / "out", bare).sequences


FRAME = ("[CLS]", "[SEP]", "[PAD]", "[MASK]")
LETTERS = {token: index for index, token in enumerate([*FRAME, "the", "dog", *"thedog", "do"])}
NO_UNKNOWN: dict[str, Any] = {
    "WordPiece": models.WordPiece(LETTERS, unk_token="[UNK]"),
    "WordLevel": models.WordLevel(LETTERS, unk_token="[UNK]"),
    "BPE": models.BPE(LETTERS, [("d", "o")], unk_token="<unk>"),
    "Unigram": models.Unigram([(token, -1.0) for token in LETTERS], None, False),
}


def without_unknown(kind: str, folder: Path) -> Path:
    tokenizer = Tokenizer(NO_UNKNOWN[kind])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    names = dict(zip(("cls_token", "sep_token", "pad_token", "mask_token"), FRAME, strict=True))
    make(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 1) for kind in NO_UNKNOWN), ("WordPiece", 2)])
def test_a_tokenizer_without_its_unknown_token_says_what_it_cannot_encode(
    kind: str,
    workers: int,
    tmp_path: Path,
) -> None:
    folder, text = without_unknown(kind, tmp_path / "tokenizer"), tmp_path / "text.txt"
    text.write_text("the dog\n" * 40 + "the zebra\n" + "dog\n")
    line = "the tokenizer cannot encode the text 'the zebra': .*; give one whose vocabulary has its unknown token"
    with pytest.raises(UserError, match=line) as caught:
        prepare([str(text)], tmp_path / "out", options(folder, documents="line", workers=workers))
    assert "\n" not in str(caught.value)
    assert "memory" not in str(caught.value)


@pytest.mark.parametrize("kind", NO_UNKNOWN)
def test_text_of_known_words_alone_needs_no_unknown_token(kind: str, tmp_path: Path) -> None:
    folder, text = without_unknown(kind, tmp_path / "tokenizer"), tmp_path / "text.txt"
    text.write_text("the dog\n" * 3 + "dog\n")
    assert prepare([str(text)], tmp_path / "out", options(folder, documents="line", min_tokens=1)).sequences
