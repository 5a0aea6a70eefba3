"""What of a text becomes tokens: special tokens spelt out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastdistil.cli import app
from fastdistil.corpus import Corpus, Manifest, canonical, load_tokenizer, text_sha256, token_facts, train_wordpiece
from fastdistil.errors import UserError
from fastdistil.prepare import PrepareOptions, Progress, prepare
from fastdistil.tokenising import Encoder, Plan

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
TEXT = "the cat <s> sat </s> on<mask>the <pad><pad> mat"
PLAIN = "the cat sat on the mat at a tent, and the matt cat ate < s > / p d k m [ ] l c"
Kind = str


def save(tokenizer: Tokenizer, folder: Path, **names: str) -> Path:
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def make_tokenizer(kind: Kind, folder: Path) -> Path:
    common: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "WordPiece":
        return train_wordpiece([PLAIN, "cls sep mask pad"] * 5, 120, folder)
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator([PLAIN] * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **common))
        return save(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<s>")  # unk_token as GPT-2 names it
    if kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **common)
    elif kind == "BPE that merges a special token":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(vocab_size=60, **common)
    else:
        tokenizer, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(**common)
    word_level = kind == "WordLevel"
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if word_level else pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.WordPiece() if word_level else decoders.Metaspace()
    text = PLAIN + " x<s>x<s> </s>a</s>" if kind.startswith("BPE") else PLAIN
    tokenizer.train_from_iterator([text] * 5, trainer)
    return save(tokenizer, folder, **NAMES)


KINDS = ("WordPiece", "byte-level", "Unigram", "BPE that merges a special token", "WordLevel")


def encoder(folder: Path, parse: bool) -> Encoder:
    plan = Plan(10**6, None, None, None, 0, 1.0, "uint16", special_tokens_in_text=parse)
    return Encoder(str(folder / "tokenizer.json"), plan)


def spelt(text: str, kind: Kind) -> str:
    """The text with WordPiece's own special tokens where those of the others stand."""
    renamed = {"<pad>": "[PAD]", "<s>": "[CLS]", "</s>": "[SEP]", "<mask>": "[MASK]"}
    for name, other in renamed.items():
        text = text.replace(name, other) if kind == "WordPiece" else text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_spelt_out_are_text_unless_parsed(kind: Kind, tmp_path: Path) -> None:
    folder = make_tokenizer(kind, tmp_path)
    tokenizer = load_tokenizer(folder)
    special = set(token_facts(tokenizer).special_ids.tolist()) - {tokenizer.unk_token_id if kind != "byte-level" else None}
    text, backend = spelt(TEXT, kind), Tokenizer.from_file(str(folder / "tokenizer.json"))
    as_text, parsed = encoder(folder, parse=False)([text, PLAIN]), encoder(folder, parse=True)([text, PLAIN])
    assert as_text.special_spellings == parsed.special_spellings == 5
    first, second = np.split(as_text.tokens, as_text.lengths[:1])
    assert special.isdisjoint(first.tolist())
    assert second.tolist() == backend.encode(PLAIN, add_special_tokens=False).ids
    truth = [token for part in (text, PLAIN) for token in backend.encode(part, add_special_tokens=False).ids]
    assert parsed.tokens.tolist() == truth
    assert sum(token in special for token in truth) == 5
    if kind == "WordLevel":
        assert {backend.id_to_token(token) for token in first} == {"the", "cat", "sat", "mat", "<unk>"}
    elif kind == "WordPiece":
        assert "".join(backend.decode(first.tolist()).split()) == "".join(text.lower().split())
    else:
        assert backend.decode(first.tolist(), skip_special_tokens=False) == text


def test_added_tokens_that_are_not_special_and_special_ones_of_one_letter_keep_their_ids(tmp_path: Path) -> None:
    make_tokenizer("Unigram", tmp_path)
    tokenizer: Any = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["catsat"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<late>"]})
    tokenizer.add_tokens(["onthe"])
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = encoder(tmp_path, parse=False)(["catsat <late> onthe a"]).tokens.tolist()
    added = [backend.token_to_id(name) for name in ("catsat", "onthe")]
    assert [token for token in tokens if token in added] == added
    assert backend.token_to_id("<late>") not in tokens
    assert backend.decode(tokens, skip_special_tokens=False) == "catsat <late> onthe a"


def test_several_processes_and_one_count_and_encode_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tokenizer("Unigram", tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(f"{TEXT}\n{PLAIN}\n")
    common = [str(tmp_path / "text.txt"), "--tokenizer", str(folder)]
    for workers in ("1", "2"):
        app(["prepare", *common, "--out", str(tmp_path / workers), "--workers", workers], standalone_mode=False)
        assert "; 5 special tokens spelt out in the text, taken as text" in capsys.readouterr().out
    one, two = Corpus.open(tmp_path / "1"), Corpus.open(tmp_path / "2")
    assert one.manifest.files["tokens-00000.bin"] == two.manifest.files["tokens-00000.bin"]
    assert one.manifest.special_spellings == 5
    app(["prepare", *common, "--out", str(tmp_path / "parsed"), "--special-tokens-in-text"], standalone_mode=False)
    assert "; 5 special tokens spelt out in the text, parsed as these" in capsys.readouterr().out
    parsed = Corpus.open(tmp_path / "parsed")
    assert int(parsed.counts[[0, 4]].sum()) == 3  # two <pad>, one <mask>
    assert int(one.counts[[0, 4]].sum()) == 0


def prepared(text: str, tokenizer: Path, out: Path, **changes: Any) -> tuple[Manifest, list[str]]:
    out.parent.mkdir(exist_ok=True)
    file = out.parent / f"{out.name}.txt"
    file.write_text(text)
    notes: list[Progress] = []
    options = {"tokenizer": str(tokenizer), "documents": "line", "workers": 1, **changes}
    manifest = prepare([str(file)], out, PrepareOptions(**options), notes.append)
    return manifest, [progress.note for progress in notes if "unknown" in progress.note]


def test_what_an_earlier_version_prepared_is_up_to_date_with_its_options_and_refused_with_others(tmp_path: Path) -> None:
    tokenizer = train_wordpiece([PLAIN] * 5, 80, tmp_path / "tokenizer")
    out, file = tmp_path / "out", tmp_path / "out.txt"
    manifest, _ = prepared(PLAIN, tokenizer, out, special_tokens_in_text=True)
    values = json.loads((out / "manifest.json").read_text())
    for name in ("sha256", "special_spellings"):
        del values[name]
    del values["options"]["special_tokens_in_text"]
    (out / "manifest.json").write_text(json.dumps({**values, "sha256": text_sha256(canonical(values))}))
    common: dict[str, Any] = {"tokenizer": str(tokenizer), "documents": "line", "workers": 1}
    again = prepare([str(file)], out, PrepareOptions(special_tokens_in_text=True, **common))
    assert (again.tokens, again.special_spellings) == (manifest.tokens, None)
    with pytest.raises(UserError, match="prepared with other special_tokens_in_text; choose"):
        prepare([str(file)], out, PrepareOptions(**common))
