"""What of a text becomes tokens: special tokens spelt out, unknown text, outer white space."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastdistil.cli import app
from fastdistil.data import text_files
from fastdistil.data.corpus import Corpus, Manifest
from fastdistil.data.prepare import PrepareOptions, PrepareProgress, prepare
from fastdistil.data.tokenise import Encoder, PieceRules
from fastdistil.data.tokenizer import load_tokenizer, token_facts, train_wordpiece, unknown_id
from fastdistil.errors import UserError
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.storage import canonical, text_sha256

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
    plan = PieceRules(10**6, None, None, None, 0, 1.0, "uint16", special_tokens_in_text=parse)
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
    special = set(token_facts(tokenizer).special_ids.tolist()) - {unknown_id(tokenizer)}
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


def test_a_special_token_within_another_is_counted_once(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(make_tokenizer("Unigram", tmp_path))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s><mask>", "[a.c]"]})
    tokenizer.save_pretrained(tmp_path)
    assert encoder(tmp_path, parse=False)(["the <s><mask> cat <mask> [a.c]", "[abc] <s>", "<mask>"]).special_spellings == 5


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
    common = [str(tmp_path / "text.txt"), "--tokenizer", str(folder), "--max-unknown-share", "1"]
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


# Unknown tokens


def word_level(folder: Path, words: str, **parts: Any) -> Path:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "normalizer" in parts:
        tokenizer.normalizer = parts["normalizer"]
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return save(tokenizer, folder, **names)


def prepared(text: str, tokenizer: Path, out: Path, **changes: Any) -> tuple[Manifest, list[str]]:
    out.parent.mkdir(exist_ok=True)
    file = out.parent / f"{out.name}.txt"
    file.write_text(text)
    notes: list[PrepareProgress] = []
    options = {"tokenizer": str(tokenizer), "documents": "line", "workers": 1, **changes}
    manifest = prepare([str(file)], out, PrepareOptions(**options), notes.append)
    return manifest, [progress.note for progress in notes if "unknown" in progress.note]


def test_the_share_of_unknown_tokens_leaves_out_the_special_ones_added(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "tokenizer", "a b")
    cases = (("a b a b a b a b a x\n", 0.1), ("a b\na x b a b a b\nb\n", 0.1), ("a b\n", 0.0), ("a b " * 99 + "x a", 1 / 200))
    for number, (text, share) in enumerate(cases):
        for special_tokens in (True, False):
            out = tmp_path / f"{number}-{special_tokens}"
            manifest, notes = prepared(text, tokenizer, out, special_tokens=special_tokens, max_length=400)
            assert manifest.unknown_share == pytest.approx(share)
            assert Corpus.open(out).manifest.unknown_share == manifest.unknown_share
            assert len(notes) == (share > 0.01)
            assert all(note.startswith("warning: 10.0% of the tokens of") for note in notes)
    # What max_unknown drops is not counted.
    assert prepared("a b a b\nx x x\n", tokenizer, tmp_path / "dropped", max_unknown=0.5)[0].unknown_share == 0.0


def test_byte_level_tokens_are_never_unknown_whatever_frames_them(tmp_path: Path) -> None:
    folder = make_tokenizer("byte-level", tmp_path / "tokenizer")
    manifest, _ = prepared("字\n" * 20, folder, tmp_path / "out", max_unknown=0.5)
    assert (manifest.unknown_share, manifest.dropped) == (0.0, 0)


@pytest.mark.parametrize(
    ("words", "normalizer", "text", "reason"),
    [
        ("The Cat Sat Down", normalizers.Lowercase(), "The Cat Sat Down\n", "lower-cases the text and its vocabulary is cased"),
        ("the cat sat down", None, "The Cat Sat down\n", "keeps capitals and its vocabulary has none"),
        ("the Cat sat down", None, "猫 は 座 る\n", "another script, language or kind of text"),
    ],
)
def test_a_text_that_is_mostly_unknown_is_refused_with_the_likely_reason(
    words: str, normalizer: Any, text: str, reason: str, tmp_path: Path
) -> None:
    parts = {"normalizer": normalizer} if normalizer is not None else {}
    tokenizer = word_level(tmp_path / "tokenizer", words, **parts)
    with pytest.raises(UserError, match=rf"% of the tokens of .* are unknown.*{reason}.*--max-unknown-share") as caught:
        prepared(text, tokenizer, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert prepared(text, tokenizer, tmp_path / "out", max_unknown_share=1)[0].unknown_share > 0.7


def test_unknown_text_stops_early_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_CHARACTERS", 40)
    tokenizer = word_level(tmp_path / "tokenizer", "a b")
    text = "a b a b\n" * 100 + "x x x x\n" * 1000
    blocks: list[PrepareProgress] = []
    file = tmp_path / "out.txt"
    file.write_text(text)
    options: dict[str, Any] = {"tokenizer": str(tokenizer), "documents": "line", "workers": 1, "shard_tokens": 100}
    with pytest.raises(UserError, match="tokens of the first 130 sequences"):
        prepare([str(file)], tmp_path / "out", PrepareOptions(**options), blocks.append)
    assert len(list((tmp_path / "out").glob("tokens-*.bin"))) > 5
    allowing = PrepareOptions(max_unknown_share=1, **options)
    more, entire = (prepare([str(file)], tmp_path / name, allowing) for name in ("out", "entire"))
    shards = [name for name in entire.files if name.endswith(".bin")]
    assert [more.files[name] for name in shards] == [entire.files[name] for name in shards]
    assert more.unknown_share == entire.unknown_share == pytest.approx(1000 / 1100)


def test_evaluate_reports_unknown_tokens_of_raw_and_prepared_text_and_refuses_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = word_level(tmp_path / "model", "a b")
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    prepared("a b a b a b a b a x [MASK]\n" * 10, folder, tmp_path / "some")
    prepared("a x\n" * 30, folder, tmp_path / "many", max_unknown_share=1)
    common: dict[str, Any] = {"positions": 0, "device": "cpu", "precision": "fp32", "documents": "line"}
    names = [str(tmp_path / name) for name in ("some", "some.txt")]
    report = evaluate(str(folder), names, EvaluateOptions(**common))
    for values, name in zip(json.loads(report.to_json())["corpora"], names, strict=True):
        assert values["unknown_share"] == pytest.approx(2 / 11)  # [MASK] is an unknown word
        assert values["special_spellings"] == 10
        assert values["notes"][0].startswith(f"warning: 18.2% of the tokens of {name} are unknown ([UNK])")
        assert values["notes"][1] == f"{name} spells out 10 special tokens, taken as text"
    parsed = evaluate(str(folder), [names[1]], EvaluateOptions(special_tokens_in_text=True, **common)).corpora[0]
    assert parsed.unknown_share == pytest.approx(1 / 11)
    for name in ("many", "many.txt"):
        with pytest.raises(UserError, match=r"50\.0% of the tokens of .*--max-unknown-share"):
            evaluate(str(folder), [str(tmp_path / name)], EvaluateOptions(**common))
    command = ["evaluate", str(folder), str(tmp_path / "many"), "--max-unknown-share", "1", "--positions", "0"]
    app([*command, "--device", "cpu"], standalone_mode=False)
    assert "unknown tokens" in (out := " ".join(capsys.readouterr().out.split()))
    assert "warning: 50.0% of the tokens of" in out


# Outer white space


def blanks_model(folder: Path) -> tuple[Path, Any]:
    make_tokenizer("byte-level", folder)
    torch.manual_seed(0)
    size = max(load_tokenizer(folder).get_vocab().values()) + 1
    config = transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


LINES = ["  the cat", " = at = ", "a tent \t", "\u00a0the mat", "on the mat", "   ", ""]


@torch.no_grad()
def loss_by_hand(model: Any, tokenizer: Any, lines: list[str]) -> float:
    losses = []
    for line in lines:
        ids = torch.tensor(tokenizer(line, add_special_tokens=False)["input_ids"])[None]
        if ids.shape[1] > 1:
            losses += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    return sum(losses) / len(losses)


def test_causal_models_are_judged_on_outer_white_space_unless_it_is_stripped(tmp_path: Path) -> None:
    folder, model = blanks_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES) + "\n")
    common: dict[str, Any] = {"documents": "line", "device": "cpu", "precision": "fp32", "batch_tokens": 64, "max_length": 64}
    losses = []
    for strip in (None, False, True):
        report = evaluate(str(folder), [str(text)], EvaluateOptions(strip=strip, **common)).corpora[0]
        assert report.causal is not None
        losses.append(report.causal.loss)
        assert report.sequences == 5  # lines of white space alone are no documents
    lines = [line for line in LINES if line.strip()]
    assert losses[0] == losses[1] == pytest.approx(loss_by_hand(model, tokenizer, lines), rel=1e-5)
    assert losses[2] == pytest.approx(loss_by_hand(model, tokenizer, [line.strip() for line in lines]), rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3
    prepared_corpus = tmp_path / "corpus"
    options = PrepareOptions(tokenizer=str(folder), documents="line", special_tokens=False, workers=1)
    prepare([str(text)], prepared_corpus, options)
    measured = evaluate(str(folder), [str(prepared_corpus)], EvaluateOptions(**common)).corpora[0].causal
    assert measured is not None
    assert measured.loss == losses[0]


def test_the_tokenizer_decides_what_is_stripped_unless_told(tmp_path: Path) -> None:
    masked = make_tokenizer("byte-level", tmp_path / "masked")
    tokenizer: Any = load_tokenizer(masked)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(masked)
    causal = make_tokenizer("byte-level", tmp_path / "causal")
    text = "  the cat \n\n\n  \n sat\n"
    for folder, strip, expected in ((masked, None, "the cat"), (masked, False, "  the cat "), (causal, None, "  the cat ")):
        for documents, last in (("line", " sat"), ("paragraph", " sat"), ("file", " sat\n")):
            out = tmp_path / f"{folder.name}-{strip}-{documents}"
            manifest, _ = prepared(text, folder, out, strip=strip, documents=documents, special_tokens=False)
            corpus = Corpus.open(out)
            texts = [tokenizer.decode(corpus.gather(np.array([row]))) for row in range(len(corpus))]
            assert manifest.options["strip"] == (expected == "the cat")
            if documents == "file":
                assert texts == [text.strip() if expected == "the cat" else text]
            else:
                assert texts == [expected, last.strip() if expected == "the cat" else last]


def test_what_an_earlier_version_prepared_is_up_to_date_with_its_options_and_refused_with_others(tmp_path: Path) -> None:
    tokenizer = train_wordpiece([PLAIN] * 5, 80, tmp_path / "tokenizer")
    out, file = tmp_path / "out", tmp_path / "out.txt"
    manifest, _ = prepared(PLAIN, tokenizer, out, special_tokens_in_text=True)
    values = json.loads((out / "manifest.json").read_text())
    for name in ("sha256", "special_spellings", "unknown_share"):
        del values[name]
    for name in ("strip", "special_tokens_in_text"):
        del values["options"][name]
    (out / "manifest.json").write_text(json.dumps({**values, "sha256": text_sha256(canonical(values))}))
    common: dict[str, Any] = {"tokenizer": str(tokenizer), "documents": "line", "workers": 1}
    again = prepare([str(file)], out, PrepareOptions(special_tokens_in_text=True, **common))
    assert (again.tokens, again.unknown_share, again.special_spellings) == (manifest.tokens, None, None)
    for changes, name in (({}, "special_tokens_in_text"), ({"special_tokens_in_text": True, "strip": False}, "strip")):
        with pytest.raises(UserError, match=f"prepared with other {name}; choose"):
            prepare([str(file)], out, PrepareOptions(**common, **changes))
    # Project Gutenberg's text was stripped by other rules then.
    values["options"]["strip_gutenberg"] = True
    (out / "manifest.json").write_text(json.dumps({**values, "sha256": text_sha256(canonical(values))}))
    with pytest.raises(UserError, match="prepared with other strip_gutenberg; choose"):
        prepare([str(file)], out, PrepareOptions(special_tokens_in_text=True, strip_gutenberg=True, **common))
