"""`fastdistil evaluate`: what it measures on corpora and raw text, with models of any architecture, and what it refuses."""

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import load_tokenizer, train_wordpiece
from fastdistil.errors import UserError
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.models import language_model, loading
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.perplexity import causal_perplexity, held_out, pseudo_perplexity
from tests.evaluation.references import (
    CONFIGS,
    LENGTH,
    build,
    each_sequence,
    error_of_ratio,
    literal_pseudo_losses,
    masked_as_held_out,
    other_causal,
    other_masked,
)


@pytest.fixture(scope="module")
def saved(tokenizer: Path, facts: TokenFacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories with the tokenizer, and one without."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("bert", "gpt2"):
        loading.save_pretrained(LanguageModel(build(kind, facts.vocab_size).float()), folder / kind)
        load_tokenizer(tokenizer).save_pretrained(folder / kind)
    loading.save_pretrained(LanguageModel(build("bert", facts.vocab_size).float()), folder / "bare")
    return {name: str(folder / name) for name in ("bert", "gpt2", "bare")}


FP32 = EvaluateOptions(
    precision="fp32",
    device="cpu",
    documents="line",
    max_length=LENGTH,
    positions=30,
    batch_tokens=200,
)


def test_evaluate_measures_prepared_corpora_and_raw_text_alike(
    saved: dict[str, str], corpus: Corpus, text: Path, facts: TokenFacts, capfd: pytest.CaptureFixture[str]
) -> None:
    progress: list[tuple[float, str]] = []
    report = evaluate(
        saved["bert"],
        [str(corpus.path), str(text)],
        FP32,
        lambda *event: progress.append(event),
    )
    assert capfd.readouterr() == ("", "")
    prepared, raw = report.corpora
    model = loading.load_model(saved["bert"])
    assert prepared.heldout == held_out(model, corpus, facts, batch_tokens=200)
    assert prepared.pseudo == pseudo_perplexity(model, corpus, facts, positions=30, batch_tokens=200)
    assert (raw.heldout, raw.pseudo) == (prepared.heldout, prepared.pseudo)
    assert (raw.sequences, raw.tokens) == (len(corpus), int(corpus.lengths.sum()))
    assert (prepared.causal, prepared.corpus, raw.corpus) == (None, str(corpus.path), str(text))
    assert (report.architecture, report.device, report.precision) == ("bert", "cpu", "fp32")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    fractions = [fraction for fraction, _ in progress]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, pytest.approx(1.0))
    assert any("pseudo-perplexity" in phase for _, phase in progress)

    loaded = json.loads(report.to_json())
    assert loaded["corpora"][0]["heldout"] == pytest.approx(asdict(prepared.heldout))
    assert loaded["options"]["positions"] == 30
    assert loaded == json.loads(json.dumps(asdict(report)))


def test_evaluate_slides_over_whole_documents_for_causal_models(
    saved: dict[str, str], document_corpus: Corpus, text: Path, facts: TokenFacts
) -> None:
    options = EvaluateOptions(precision="fp32", device="cpu", documents="line", stride=5, bos="no")
    report = evaluate(saved["gpt2"], [str(text), str(document_corpus.path)], options)
    expected = causal_perplexity(loading.load_model(saved["gpt2"]), document_corpus, facts, stride=5)
    for measured in report.corpora:
        assert measured.causal == expected
        assert (measured.heldout, measured.pseudo) == (None, None)
        assert measured.tokens == int(document_corpus.lengths.sum())


def test_positions_zero_leaves_pseudo_perplexity_out_and_one_sequence_has_no_error(
    saved: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("the old cat sings under the mountains of letters")
    options = EvaluateOptions(precision="fp32", device="cpu", positions=0)
    report = evaluate(saved["bert"], [str(tmp_path / "one.txt")], options)
    assert report.corpora[0].pseudo is None
    assert math.isnan(report.corpora[0].heldout.loss_se)
    assert json.loads(report.to_json())["corpora"][0]["heldout"]["loss_se"] is None


def test_raw_text_of_any_name_is_read_as_it_is_said_to_be(
    saved: dict[str, str],
    text: Path,
    tmp_path: Path,
) -> None:
    lines = text.read_text().splitlines()
    (tmp_path / "wiki_00").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    refused(saved["bert"], [str(tmp_path / "wiki_00")], "--as txt")
    options = replace(FP32, positions=0)
    named = evaluate(saved["bert"], [str(tmp_path / "wiki_00")], replace(options, read_as="jsonl"))
    assert named.corpora[0].heldout == evaluate(saved["bert"], [str(text)], options).corpora[0].heldout


def test_auto_is_what_the_machine_has(saved: dict[str, str], text: Path) -> None:
    report = evaluate(saved["bert"], [str(text)], EvaluateOptions(positions=0))
    assert report.precision in ("bf16", "fp32")
    assert report.options == EvaluateOptions(positions=0)


def refused(model: str, corpora: list[str], complaint: str, options: EvaluateOptions = FP32) -> None:
    """Refused on one line, before the model is loaded or anything measured."""
    fractions: list[float] = []
    with pytest.raises(UserError, match=complaint) as caught:
        evaluate(model, corpora, options, lambda fraction, phase: fractions.append(fraction))
    assert "\n" not in str(caught.value)
    assert fractions in ([], [0.0])


def test_evaluate_checks_everything_before_it_measures(
    saved: dict[str, str], corpus: Corpus, text: Path, tmp_path: Path
) -> None:
    good, here = saved["bert"], str(corpus.path)
    refused(good, [], "nothing to evaluate on")
    refused("/no/such/model", [here], "no model directory /no/such/model")
    refused(good, [here, str(tmp_path / "missing.txt")], "missing.txt")
    refused(saved["bare"], [here, str(text)], "holds no tokenizer")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "progress.json").write_text("{}")
    refused(good, [str(tmp_path / "half")], "not complete")
    refused(good, [here], "max_length is 33 and the model takes 32", EvaluateOptions(max_length=33))
    refused(
        good,
        [here],
        "batch_tokens 8 is less than one sequence",
        EvaluateOptions(max_length=LENGTH, batch_tokens=8),
    )
    refused(
        saved["gpt2"],
        [here],
        "stride must be less than the window of 16",
        EvaluateOptions(max_length=16, stride=16),
    )
    other = train_wordpiece(["entirely different words"], 60, tmp_path / "other")
    options = PrepareOptions(tokenizer=str(other), max_length=LENGTH, workers=1, max_unknown_share=1)
    prepare([str(text)], tmp_path / "foreign", options)
    refused(good, [here, str(tmp_path / "foreign")], "the model .* has another vocabulary than the corpus")
    prepare([str(text)], tmp_path / "long", PrepareOptions(tokenizer=good, max_length=64, workers=1))
    refused(good, [here, str(tmp_path / "long")], "sequences of 64 tokens, the model takes 32")
    assert evaluate(saved["bare"], [here], FP32).corpora[0].heldout is not None


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"positions": -1}, "positions must be a number of at least 0, or all, got -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"max_length": 3}, "max_length must be at least 4"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16"),
        ({"documents": "chapter"}, "documents must be one of file, paragraph, line, got .chapter."),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        EvaluateOptions(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(saved: dict[str, str], corpus: Corpus) -> None:
    refused(saved["bert"], [str(corpus.path)], "torch finds no GPU", EvaluateOptions(device="cuda"))


# Models of any architecture


def save(model: Any, tokenizer: Path, folder: Path) -> str:
    """As transformers saves it, in float32, with the tokenizer."""
    copy.deepcopy(model).float().save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


@other_masked
@torch.no_grad()
def test_any_masked_model_is_measured_as_transformers_computes_it(
    kind: str, corpus: Corpus, text: Path, tokenizer: Path, facts: TokenFacts, tmp_path: Path
) -> None:
    reference = build(kind, facts.vocab_size)
    sums, counts = [], []
    for masked_ids, labels in masked_as_held_out(corpus, facts, seed=3):
        logits = reference(input_ids=masked_ids[None]).logits[0]
        sums.append(float(F.cross_entropy(logits, labels, reduction="sum")))
        counts.append(int((labels >= 0).sum()))
    pseudo = literal_pseudo_losses(reference, corpus, facts)
    every = [loss for losses in pseudo for loss in losses]
    assert np.std(every) > 0.1  # otherwise it would not matter which token was masked
    path = save(reference, tokenizer, tmp_path / "model")
    limit = 32 - (reference.config.pad_token_id + 1 if kind == "xlm-roberta" else 0)

    model = loading.load_for_evaluation(path, torch.float64)
    assert isinstance(model, language_model.AnyModel)
    assert language_model.max_length(model) == limit
    model.module.load_state_dict(reference.state_dict())  # of float64, before it was rounded
    heldout = held_out(model, corpus, facts, seed=3, batch_tokens=100)
    assert heldout.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
    assert heldout.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    one_by_one = pseudo_perplexity(model, corpus, facts, positions="all", batch_tokens=150)
    assert one_by_one.positions == len(every)
    assert one_by_one.loss == pytest.approx(sum(every) / len(every), rel=1e-10)
    assert one_by_one.loss_se == pytest.approx(
        error_of_ratio([sum(losses) for losses in pseudo], [len(losses) for losses in pseudo]), rel=1e-8
    )

    options = EvaluateOptions(
        precision="fp32",
        device="cpu",
        documents="line",
        max_length=LENGTH,
        positions="all",
        seed=3,
        batch_tokens=100,
    )
    report = evaluate(path, [str(corpus.path), str(text)], options)
    for measured in report.corpora:
        assert measured.heldout is not None
        assert measured.pseudo is not None
        assert measured.causal is None
        assert measured.heldout.loss == pytest.approx(heldout.loss, rel=1e-5)
        assert measured.pseudo.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert (report.architecture, report.vocabulary) == (kind, facts.vocab_size)
    refused(
        path,
        [str(corpus.path)],
        f"max_length is {limit + 1} and the model takes {limit}",
        EvaluateOptions(max_length=limit + 1),
    )


@other_causal
@torch.no_grad()
def test_any_causal_model_is_measured_as_transformers_computes_it(
    kind: str, document_corpus: Corpus, text: Path, tokenizer: Path, facts: TokenFacts, tmp_path: Path
) -> None:
    reference, size, step = build(kind, facts.vocab_size), 16, 8
    sums, counts = [], []
    for ids in each_sequence(document_corpus):
        losses = []
        for token in range(1, len(ids)):
            begin = 0 if token < size else step * math.ceil((token - size + 1) / step)
            logits = reference(input_ids=torch.from_numpy(ids[begin:token])[None]).logits[0, -1]
            losses.append(-float(logits.log_softmax(0)[int(ids[token])]))
        sums.append(sum(losses))
        counts.append(len(losses))
    path = save(reference, tokenizer, tmp_path / "model")

    model = loading.load_for_evaluation(path, torch.float64)
    model.module.load_state_dict(reference.state_dict())
    assert (type(model), language_model.max_length(model)) == (language_model.AnyModel, 32)
    causal = causal_perplexity(model, document_corpus, facts, max_length=size, batch_tokens=70)
    assert causal.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-9)
    assert causal.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-7)

    sizes = {"max_length": size, "batch_tokens": 100}
    options = EvaluateOptions(precision="fp32", device="cpu", documents="line", bos="no", **sizes)
    for measured in evaluate(path, [str(document_corpus.path), str(text)], options).corpora:
        assert measured.causal is not None
        assert (measured.heldout, measured.pseudo) == (None, None)
        assert measured.causal.loss == pytest.approx(causal.loss, rel=1e-5)
        assert measured.causal.tokens == sum(counts)


def test_whole_logits_bound_the_batch(
    corpus: Corpus,
    facts: TokenFacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = language_model.AnyModel(build("albert", facts.vocab_size), causal=False)
    teacher = LanguageModel(build("bert", facts.vocab_size, seed=1))
    expected = asdict(held_out(model, corpus, facts, teacher=teacher))
    assert expected["kl"] > 0.1
    rows: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda batch: (rows.append(batch.ids_BS.numel()), hidden(batch))[1])
    monkeypatch.setattr("fastdistil.models.scoring.LOGITS", 50 * facts.vocab_size)
    assert asdict(held_out(model, corpus, facts, teacher=teacher)) == pytest.approx(expected, rel=1e-10)
    assert LENGTH < max(rows) <= 50
    monkeypatch.setattr("fastdistil.models.scoring.LOGITS", 1)
    assert asdict(held_out(model, corpus, facts, teacher=teacher)) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(UserError, match="takes no packed batches"):
        held_out(model, corpus, facts, layout="packed")


def test_masked_or_causal_is_what_transformers_and_the_configuration_say(
    corpus: Corpus, tokenizer: Path, facts: TokenFacts, tmp_path: Path
) -> None:
    def saved_as(name: str, kind: str, **values: Any) -> str:
        transformers.AutoConfig.for_model(kind, **values).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    assert not loading.evaluation_config(saved_as("plain", "electra"))[1]
    assert not loading.evaluation_config(saved_as("masked", "electra", architectures=["ElectraForMaskedLM"]))[1]
    assert loading.evaluation_config(saved_as("causal", "electra", architectures=["ElectraForCausalLM"]))[1]
    assert not loading.evaluation_config(saved_as("one class", "xlm", architectures=["XLMWithLMHeadModel"]))[1]
    assert loading.evaluation_config(saved_as("decoder", "mistral"))[1]
    refused(
        saved_as("t5", "t5"),
        [str(corpus.path)],
        "architecture 't5' is neither a masked nor a causal language model",
    )

    for decoder in (True, False):
        config = transformers.AutoConfig.for_model(
            "electra", vocab_size=facts.vocab_size, is_decoder=decoder, **CONFIGS["electra"]
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        path = save(model, tokenizer, tmp_path / f"electra-{decoder}")
        if decoder:
            measured = evaluate(path, [str(corpus.path)], FP32).corpora[0]
            assert measured.causal is not None
        else:
            refused(path, [str(corpus.path)], "its predictions change with later tokens")
