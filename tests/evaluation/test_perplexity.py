"""Pseudo-perplexity, one masked token at a time, and the perplexity of causal models over sliding windows."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts
from fastdistil.errors import UserError
from fastdistil.models.perplexity import causal_perplexity, pseudo_perplexity
from fastdistil.models.scoring import drawn_positions
from tests.evaluation.references import (
    Mostly,
    causal_families,
    each_sequence,
    error_of_ratio,
    literal_pseudo_losses,
    masked_families,
    pair,
)

# Pseudo-perplexity


@masked_families
@torch.no_grad()
def test_pseudo_perplexity_masks_one_token_at_a_time(kind: str, corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair(kind, facts)
    losses = literal_pseudo_losses(reference, corpus, facts)
    every = [loss for inner in losses for loss in inner]
    pseudo = pseudo_perplexity(model, corpus, facts, positions="all", batch_tokens=150)
    assert pseudo.positions == len(every) == int(corpus.lengths.sum()) - 2 * len(corpus)
    assert pseudo.loss == pytest.approx(sum(every) / len(every), rel=1e-10)
    assert pseudo.pppl == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-9)
    assert pseudo.loss_se == pytest.approx(
        error_of_ratio([sum(x) for x in losses], [len(x) for x in losses]),
        rel=1e-8,
    )
    assert pseudo.sequences == len(corpus)
    assert asdict(pseudo_perplexity(model, corpus, facts, positions=10**9)) == pytest.approx(
        asdict(pseudo),
        rel=1e-10,
    )


@torch.no_grad()
def test_sampled_pseudo_perplexity_is_the_mean_over_the_sample(corpus: Corpus, facts: TokenFacts) -> None:
    reference, model = pair("bert", facts)
    # By place in the corpus: nan for special tokens.
    losses = np.full(int(corpus.lengths.sum()), np.nan)
    tokens = corpus.gather(np.arange(len(corpus)))
    losses[~np.isin(tokens, facts.special_ids)] = np.concatenate(
        literal_pseudo_losses(reference, corpus, facts),
    )
    pseudo = pseudo_perplexity(model, corpus, facts, positions=40, seed=9)
    sample = drawn_positions(corpus, facts, 40, 9)
    assert pseudo.positions == 40
    assert pseudo.loss == pytest.approx(losses[sample].mean(), rel=1e-10)
    means = [losses[drawn_positions(corpus, facts, 40, seed)].mean() for seed in range(200)]
    assert np.mean(means) == pytest.approx(np.nanmean(losses), abs=5 * np.std(means) / math.sqrt(200))
    assert asdict(pseudo_perplexity(model, corpus, facts, positions=40, seed=9)) == asdict(pseudo)


def test_pseudo_perplexity_refuses_what_it_cannot_do(corpus: Corpus, facts: TokenFacts) -> None:
    with pytest.raises(UserError, match="for masked models"):
        pseudo_perplexity(pair("gpt2", facts)[1], corpus, facts)
    model = pair("bert", facts)[1]
    with pytest.raises(UserError, match="positions must be at least 1, or all, got 0"):
        pseudo_perplexity(model, corpus, facts, positions=0)
    with pytest.raises(UserError, match="does not fit into batch_tokens 8"):
        pseudo_perplexity(model, corpus, facts, batch_tokens=8)
    maskless = replace(facts, mask_id=None)
    with pytest.raises(UserError, match="needs a tokenizer with a mask token, and this one has none"):
        pseudo_perplexity(model, corpus, maskless)


# Perplexity of causal models


@causal_families
@pytest.mark.parametrize(("size", "stride"), [(32, None), (16, None), (8, 3), (8, 7), (5, 1), (2, 1)])
@torch.no_grad()
def test_causal_perplexity_scores_each_token_once_with_what_its_window_shows(
    kind: str, size: int, stride: int | None, document_corpus: Corpus, facts: TokenFacts
) -> None:
    reference, model = pair(kind, facts)
    step = stride or size // 2
    sums, counts = [], []
    for ids in each_sequence(document_corpus):
        losses = []
        for token in range(1, len(ids)):
            # The first window that reaches this token.
            begin = 0 if token < size else step * math.ceil((token - size + 1) / step)
            context = torch.from_numpy(ids[begin:token])[None]
            assert max(1, min(token, size - step)) <= context.shape[1] < size
            losses.append(-float(reference(input_ids=context).logits[0, -1].log_softmax(0)[int(ids[token])]))
        sums.append(sum(losses))
        counts.append(len(losses))
    causal = causal_perplexity(model, document_corpus, facts, max_length=size, stride=stride, batch_tokens=70)
    assert causal.tokens == sum(counts)
    assert causal.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-9)
    assert causal.perplexity == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-8)
    assert causal.loss_se == pytest.approx(error_of_ratio(sums, counts), rel=1e-7)
    assert 1 in document_corpus.lengths
    assert (causal.sequences, causal.max_length, causal.stride) == (sum(map(bool, counts)), size, step)


def test_the_model_decides_the_window_unless_told(document_corpus: Corpus, facts: TokenFacts) -> None:
    causal = causal_perplexity(pair("gpt2", facts)[1], document_corpus, facts)
    assert (causal.max_length, causal.stride) == (32, 16)
    assert document_corpus.lengths.max() > 64


def test_causal_perplexity_refuses_what_it_cannot_do(
    document_corpus: Corpus,
    corpus: Corpus,
    facts: TokenFacts,
) -> None:
    model = pair("gpt2", facts)[1]
    with pytest.raises(UserError, match="for causal models"):
        causal_perplexity(pair("bert", facts)[1], corpus, facts)
    for size in (0, 1, 33):
        with pytest.raises(UserError, match=f"max_length must be from 2 to 32 for this model, got {size}"):
            causal_perplexity(model, document_corpus, facts, max_length=size)
    for stride in (0, 8, 9):
        with pytest.raises(UserError, match=f"stride must be from 1 to 7 .*, got {stride}"):
            causal_perplexity(model, document_corpus, facts, max_length=8, stride=stride)
    with pytest.raises(UserError, match="of 32 tokens does not fit into batch_tokens 31"):
        causal_perplexity(model, document_corpus, facts, batch_tokens=31)
    short = Mostly(0)
    short.lengths, short.tokens = np.ones(40, np.int32), short.tokens[:, :1]
    with pytest.raises(UserError, match="every text has a single token"):
        causal_perplexity(model, short, facts)
