"""BOS in front of texts: the same answer when a corpus is prepared and when a causal model is evaluated, judged by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastdistil.data.corpus import Corpus, Manifest
from fastdistil.data.prepare import PrepareOptions, PrepareProgress, prepare
from fastdistil.data.tokenizer import load_tokenizer, train_wordpiece
from fastdistil.errors import UserError
from fastdistil.evaluate import EvaluateOptions, evaluate, print_report

DOCUMENTS = [
    "the river runs under the old mountains and the stones sing of it",
    "a cat",
    "letters of the old cat: running, quickly running under a river of letters",
    "stones and stones",
]
VOCABULARY = 300


def save_byte_level(folder: Path, *, begins: bool, **roles: str) -> Path:
    """A byte-level tokenizer; `begins`: its own call puts <s> in front, as Llama's does and GPT-2's does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama/, gpt2/ and bert/ with a tokenizer each, text.txt with a document a line."""
    folder = tmp_path_factory.mktemp("bos")
    save_byte_level(folder / "llama", begins=True, **ROLES)
    save_byte_level(folder / "gpt2", begins=False, bos_token="</s>", eos_token="</s>")
    train_wordpiece(DOCUMENTS, 120, folder / "bert")
    (folder / "text.txt").write_text("\n".join(DOCUMENTS) + "\n")
    return folder


def prepared(folder: Path, name: str, out: Path, **changes: Any) -> tuple[list[list[int]], list[str]]:
    """(sequences, notes) of text.txt."""
    notes: list[str] = []
    options = {"tokenizer": str(folder / name), "documents": "line", "workers": 1, **changes}

    def hear(progress: PrepareProgress) -> None:
        notes.extend([progress.note] if progress.note else [])

    prepare([str(folder / "text.txt")], out, PrepareOptions(**options), hear)
    corpus = Corpus.open(out)
    return [corpus.gather(np.array([index])).tolist() for index in range(len(corpus))], notes


@pytest.mark.parametrize(
    ("name", "changes", "front", "back"),
    [
        ("llama", {}, [1], [2]),
        ("llama", {"bos": "no"}, [], [2]),
        ("llama", {"special_tokens": False}, [], []),
        ("llama", {"special_tokens": False, "bos": "yes"}, [1], []),
        ("gpt2", {}, [], [2]),
        ("gpt2", {"bos": "yes"}, [2], [2]),
        ("bert", {}, [2], [3]),
        ("bert", {"bos": "no"}, [], [3]),
    ],
)
def test_prepare_puts_in_front_what_the_tokenizers_own_call_does(
    name: str, changes: dict[str, Any], front: list[int], back: list[int], folder: Path, tmp_path: Path
) -> None:
    truth = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
    sequences, notes = prepared(folder, name, tmp_path / "out", **changes)
    assert sequences == [[*front, *truth.encode(text, add_special_tokens=False).ids, *back] for text in DOCUMENTS]
    assert Manifest.read(tmp_path / "out" / "manifest.json").options["bos"] == ("yes" if front else "no")
    if name != "bert":
        spelt = {(1,): "<s>", (2,): "</s>"}
        behind = spelt.get(tuple(back), "no EOS")
        assert f"in front of each piece: {spelt.get(tuple(front), 'no BOS')}; behind it: {behind}" in notes


def test_a_mask_token_means_masked_models_which_keep_their_frame(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "masked", begins=False, **ROLES, mask_token="<mask>")
    (tmp_path / "text.txt").write_text("stones\n")
    ((first, *_, last),), _ = prepared(tmp_path, "masked", tmp_path / "out")
    assert (first, last) == (1, 2)


def test_a_corpus_of_an_earlier_version_is_the_same_where_it_has_the_same_front(folder: Path, tmp_path: Path) -> None:
    """Those put BOS in front wherever the tokenizer has one, and did not write so."""
    for name, same, other in (("llama", {}, {"bos": "no"}), ("gpt2", {"bos": "yes"}, {})):
        out = tmp_path / name
        sequences, _ = prepared(folder, name, out, bos="yes")
        manifest = Manifest.read(out / "manifest.json")
        without = {key: value for key, value in manifest.options.items() if key != "bos"}
        (out / "manifest.json").write_text(replace(manifest, options=without).to_json())
        again, notes = prepared(folder, name, out, **same)
        assert again == sequences
        assert notes == [f"{out} is up to date"]
        with pytest.raises(UserError, match="prepared with other bos"):
            prepared(folder, name, out, **other)


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_a_tokenizer_is_asked_with_no_text(unknown: str | None, tmp_path: Path) -> None:
    """Of "a" it may make nothing, or the very token that begins texts elsewhere: the one for what is unknown."""
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "sat": 2, "<|endoftext|>": 3}, unk_token=unknown or "none"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"} | ({"unk_token": unknown} if unknown else {})
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, **roles).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("the cat sat\n")
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), workers=1)
    prepare([str(tmp_path / "text.txt")], tmp_path / "out", options)
    assert Corpus.open(tmp_path / "out").gather(np.array([0])).tolist() == [0, 1, 2, 3]


def test_a_token_that_the_tokenizer_lacks_cannot_stand_in_front(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "t", begins=False, eos_token="</s>")
    (tmp_path / "text.txt").write_text("stones\n")
    with pytest.raises(UserError, match="no bos or cls token"):
        prepared(tmp_path, "t", tmp_path / "out", bos="yes")
    with pytest.raises(UserError, match="bos must be auto, yes or no, got 'maybe'"):
        PrepareOptions(tokenizer="t", bos="maybe")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bos must be auto, yes or no, got 'maybe'"):
        EvaluateOptions(bos="maybe")  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(kind, transformers' model in float64, its directory with the tokenizer of its kind)."""
    kind, path = request.param, tmp_path_factory.mktemp("model")
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    if kind == "llama":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, **sizes)
    reference: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(path)
    load_tokenizer(folder / kind).save_pretrained(path)
    return kind, reference.double(), path


@torch.no_grad()
def loss_by_hand(reference: Any, folder: Path, kind: str, front: list[int], size: int, step: int) -> tuple[float, int]:
    """Mean loss and tokens, a forward for every token; only a document's own beginning has the token in front."""
    truth, losses = Tokenizer.from_file(str(folder / kind / "tokenizer.json")), []
    for text in DOCUMENTS:
        ids = torch.tensor([*front, *truth.encode(text, add_special_tokens=False).ids])
        for token in range(1, len(ids)):
            begin = 0 if token < size else step * -(-(token - size + 1) // step)
            logits_V = reference(input_ids=ids[None, begin:token]).logits[0, -1]
            losses.append(F.cross_entropy(logits_V, ids[token]).item())
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
def test_causal_models_are_evaluated_behind_bos_where_their_tokenizer_puts_it(
    bos: Any, model: tuple[str, Any, Path], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    kind, reference, path = model
    token = 1 if kind == "llama" else 2
    front = [token] if bos == "yes" or (bos == "auto" and kind == "llama") else []
    options = EvaluateOptions(device="cpu", precision="fp32", documents="line", bos=bos, max_length=8, stride=3)
    report = evaluate(str(path), [str(folder / "text.txt")], options)
    (corpus,) = report.corpora
    loss, tokens = loss_by_hand(reference, folder, kind, front, 8, 3)
    assert corpus.causal is not None
    assert corpus.causal.loss == pytest.approx(loss, rel=1e-5)
    assert corpus.causal.tokens == tokens
    spelt = {1: "<s>", 2: "</s>"}[token] if front else None
    assert json.loads(report.to_json())["corpora"][0]["bos"] == spelt
    print_report(report)
    assert (f"behind {spelt}" if spelt else "no BOS") in capsys.readouterr().out


def test_a_prepared_corpus_says_whether_it_has_bos_and_is_not_changed(
    model: tuple[str, Any, Path], folder: Path, tmp_path: Path
) -> None:
    kind, _, path = model
    fixed: Any = {"device": "cpu", "precision": "fp32", "documents": "line", "max_length": 16}
    for bos, other in (("yes", "no"), ("no", "yes")):
        out = tmp_path / bos
        prepared(folder, kind, out, special_tokens=False, bos=bos)
        for said in ("auto", bos):
            ready, raw = (
                evaluate(str(path), [source], EvaluateOptions(**fixed, bos=b)).corpora[0]
                for source, b in ((str(out), said), (str(folder / "text.txt"), bos))
            )
            assert (ready.causal, ready.bos) == (raw.causal, raw.bos)
        with pytest.raises(UserError, match=f"prepared with bos {bos}; prepare it with --bos {other}"):
            evaluate(str(path), [str(out)], EvaluateOptions(**fixed, bos=other))


def test_bos_is_refused_for_masked_models(material: Path) -> None:
    with pytest.raises(UserError, match="bos is for causal models"):
        evaluate(str(material / "teacher"), [str(material / "heldout")], EvaluateOptions(bos="yes", device="cpu"))
