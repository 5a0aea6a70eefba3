"""Held-out losses and divergences against transformers' own forward and against loops over single tokens."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts
from fastdistil.errors import UserError
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.perplexity import held_out, pseudo_perplexity
from fastdistil.models.scoring import drawn_sequences
from tests.evaluation.references import (
    LENGTH,
    build,
    causal_families,
    each_sequence,
    error_of_ratio,
    masked_as_held_out,
    masked_families,
    padded,
    pair,
)


@masked_families
@torch.no_grad()
def test_held_out_loss_is_that_of_transformers_on_padded_batches(
    kind: str,
    corpus: Corpus,
    facts: TokenFacts,
) -> None:
    reference, model = pair(kind, facts)
    sequences = masked_as_held_out(corpus, facts, seed=3)
    ids, labels = (
        padded([masked_ids for masked_ids, _ in sequences], facts.pad_id),
        padded([label for _, label in sequences], -100),
    )
    out = reference(input_ids=ids, attention_mask=(ids != facts.pad_id).long(), labels=labels)
    losses = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    sums, counts = losses.sum(1).tolist(), (labels >= 0).sum(1).tolist()
    assert len(set(counts)) > 2
    truth = sum(sums) / sum(counts)

    heldout = held_out(model, corpus, facts, seed=3, batch_tokens=100)
    assert heldout.loss == pytest.approx(truth, rel=1e-10)
    assert heldout.loss == pytest.approx(float(out.loss), rel=1e-5)
    assert heldout.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    assert heldout.perplexity == pytest.approx(math.exp(truth), rel=1e-9)
    assert (heldout.labels, heldout.sequences) == (sum(counts), len(corpus))
    assert (heldout.kl, heldout.kl_se, heldout.kl_tokens) == (None, None, 0)


@causal_families
@torch.no_grad()
def test_held_out_loss_of_causal_models_is_that_of_every_next_token(
    kind: str,
    corpus: Corpus,
    facts: TokenFacts,
) -> None:
    reference, model = pair(kind, facts)
    sums, counts = [], []
    for ids in each_sequence(corpus):
        tokens = torch.from_numpy(ids)
        sums.append(
            float(
                F.cross_entropy(
                    reference(input_ids=tokens[None]).logits[0, :-1],
                    tokens[1:],
                    reduction="sum",
                ),
            ),
        )
        counts.append(len(ids) - 1)
    heldout = held_out(model, corpus, facts, batch_tokens=64)
    assert heldout.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
    assert heldout.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    assert heldout.labels == sum(counts)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2"])
@torch.no_grad()
def test_kl_is_that_of_the_two_distributions_at_every_token(
    kind: str,
    corpus: Corpus,
    facts: TokenFacts,
) -> None:
    (reference, model), (reference_t, teacher) = pair(kind, facts), pair(kind, facts, seed=1)
    if model.causal:
        sequences = [(torch.from_numpy(ids), torch.tensor([])) for ids in each_sequence(corpus)]
    else:
        sequences = masked_as_held_out(corpus, facts, seed=2)
    sums, counts = [], []
    for masked_ids, _ in sequences:
        log_q, log_p = (m(input_ids=masked_ids[None]).logits[0].log_softmax(-1) for m in (reference, reference_t))
        sums.append(float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)))
        counts.append(len(masked_ids))
    heldout = held_out(model, corpus, facts, teacher=teacher, seed=2)
    assert heldout.kl == pytest.approx(sum(sums) / sum(counts), rel=1e-10)
    assert heldout.kl > 0.1
    assert heldout.kl_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-8)
    assert heldout.kl_tokens == sum(counts) == int(corpus.lengths.sum())
    alone = held_out(model, corpus, facts, seed=2)
    assert heldout.loss == pytest.approx(alone.loss, rel=1e-12)
    assert (heldout.labels, heldout.loss_se) == (alone.labels, pytest.approx(alone.loss_se, rel=1e-12))


def test_kl_of_a_model_to_itself_is_nothing(corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("bert", facts)[1]
    heldout = held_out(model, corpus, facts, teacher=model)
    assert heldout.kl == pytest.approx(0, abs=1e-14)


def test_the_same_numbers_whatever_the_batches(corpus: Corpus, facts: TokenFacts) -> None:
    model, teacher = pair("bert", facts)[1], pair("bert", facts, seed=1)[1]
    first = asdict(held_out(model, corpus, facts, teacher=teacher, seed=1))
    assert asdict(held_out(model, corpus, facts, teacher=teacher, seed=1)) == first
    for batch_tokens, layout in ((LENGTH, "packed"), (100, "length-grouped"), (10**6, "length-grouped")):
        again = held_out(
            model,
            corpus,
            facts,
            teacher=teacher,
            seed=1,
            batch_tokens=batch_tokens,
            layout=layout,
        )
        assert asdict(again) == pytest.approx(first, rel=1e-10)
    assert held_out(model, corpus, facts, seed=2).loss != pytest.approx(first["loss"], rel=1e-3)


def test_rows_are_scored_in_chunks(
    corpus: Corpus,
    facts: TokenFacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, teacher = pair("bert", facts)[1], pair("bert", facts, seed=1)[1]
    unchunked = asdict(held_out(model, corpus, facts, teacher=teacher))
    rows: list[int] = []
    transform = model.transform
    monkeypatch.setattr(model, "transform", lambda hidden: (rows.append(len(hidden)), transform(hidden))[1])
    monkeypatch.setattr("fastdistil.models.scoring.ROWS", 7)
    assert asdict(held_out(model, corpus, facts, teacher=teacher)) == pytest.approx(unchunked, rel=1e-12)
    assert set(rows[:-1]) == {7}
    assert sum(rows) == int(corpus.lengths.sum())


def test_some_sequences_have_the_masks_that_they_have_among_all(corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair("bert", facts)
    heldout = held_out(model, corpus, facts, seed=3, max_sequences=4)
    drawn = drawn_sequences(len(corpus), 4, 3)
    sums, labels = 0.0, 0
    for number, (masked_ids, label_ids) in enumerate(masked_as_held_out(corpus, facts, seed=3)):
        if number in drawn:
            with torch.no_grad():
                sums += float(
                    F.cross_entropy(
                        reference(input_ids=masked_ids[None]).logits[0],
                        label_ids,
                        reduction="sum",
                    ),
                )
            labels += int((label_ids >= 0).sum())
    assert (heldout.sequences, heldout.labels) == (4, labels)
    assert heldout.loss == pytest.approx(sums / labels, rel=1e-10)


class Unigram(nn.Module):
    """A model of one's own, whose loss can be counted: it predicts the same distribution everywhere."""

    causal, bias = False, None

    def __init__(self, log_probabilities_V: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(log_probabilities_V[:, None])
        self.modes: list[bool] = []
        self.autocast: list[bool] = []

    def hidden(self, batch: Batch) -> Tensor:
        self.modes.append(self.training)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.ones(batch.ids_BS.numel(), 1, dtype=self.weight.dtype)

    def transform(self, hidden_ND: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return hidden_ND


def test_a_module_of_your_own(corpus: Corpus, facts: TokenFacts) -> None:
    log_probabilities = torch.randn(facts.vocab_size, dtype=torch.float64).log_softmax(0)
    model = Unigram(log_probabilities)
    labels = torch.cat(
        [targets[targets >= 0] for _, targets in masked_as_held_out(corpus, facts, seed=0, probability=0.4)],
    )
    heldout = held_out(model, corpus, facts, probability=0.4)
    assert heldout.labels == len(labels) > 0.3 * corpus.lengths.sum()
    assert heldout.loss == pytest.approx(-float(log_probabilities[labels].mean()), rel=1e-12)
    ordinary = ~torch.isin(
        torch.from_numpy(corpus.gather(np.arange(len(corpus)))),
        torch.from_numpy(facts.special_ids),
    )
    tokens = torch.from_numpy(corpus.gather(np.arange(len(corpus))))[ordinary]
    pseudo = pseudo_perplexity(model, corpus, facts, positions="all")
    assert pseudo.loss == pytest.approx(-float(log_probabilities[tokens].mean()), rel=1e-12)


def test_each_part_returns_to_its_mode(corpus: Corpus, facts: TokenFacts) -> None:
    model = Unigram(torch.zeros(facts.vocab_size, dtype=torch.float64))
    model.frozen, model.live = nn.Dropout(0.5).eval(), nn.Dropout(0.5)
    held_out(model, corpus, facts)
    assert model.training
    assert model.live.training
    assert not model.frozen.training
    assert set(model.modes) == {False}
    with pytest.raises(ZeroDivisionError):
        held_out(model, corpus, facts, progress=lambda done: 1 // 0)
    assert model.training
    assert not model.frozen.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision: str, corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("bert", facts)[1].float()
    exact = held_out(model, corpus, facts, teacher=model)
    half = held_out(model, corpus, facts, teacher=model, precision=precision)
    assert half.loss == pytest.approx(exact.loss, rel=0.01)
    assert half.loss != exact.loss
    assert 0 < half.kl < 0.01


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_is_for_the_model_and_not_for_its_teacher(
    outside: bool,
    corpus: Corpus,
    facts: TokenFacts,
) -> None:
    model, teacher, plain = (Unigram(torch.zeros(facts.vocab_size)) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        held_out(model, corpus, facts, teacher=teacher, precision="bf16")
        held_out(plain, corpus, facts, precision="fp32")
    assert (set(model.autocast), set(teacher.autocast), set(plain.autocast)) == ({True}, {False}, {False})


def test_gradients_are_not_recorded(corpus: Corpus, facts: TokenFacts) -> None:
    model = Unigram(torch.zeros(facts.vocab_size, dtype=torch.float64))
    held_out(model, corpus, facts)
    pseudo_perplexity(model, corpus, facts, positions=3)
    assert model.weight.grad is None
    assert torch.is_grad_enabled()


def test_what_cannot_be_held_out_is_refused(corpus: Corpus, facts: TokenFacts) -> None:
    model = pair("bert", facts)[1]
    with pytest.raises(UserError, match="probability must lie between 0 and 1, got 1"):
        held_out(model, corpus, facts, probability=1.0)
    with pytest.raises(UserError, match=f"sequence of {LENGTH} tokens"):
        held_out(model, corpus, facts, batch_tokens=LENGTH - 1)
    with pytest.raises(UserError, match="prepare the corpus with the model's own tokenizer"):
        held_out(LanguageModel(build("bert", facts.vocab_size - 1)), corpus, facts)
    model.module.config.max_position_embeddings = LENGTH - 1
    with pytest.raises(UserError, match=f"sequences of {LENGTH} tokens, the model takes {LENGTH - 1}"):
        held_out(model, corpus, facts)
