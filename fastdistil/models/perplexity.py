"""How well a model predicts a prepared corpus that it has not seen, with standard errors.

    held_out            masked models: the mean cross-entropy of 15% of the tokens, chosen uniformly, the same ones at every
                        call (80% of them masked, 10% replaced, 10% kept); causal models: of every next token; KL to a teacher
    pseudo_perplexity   masked models: one token masked at a time, exp(-mean log P(token | all others))
                        (Salazar et al. 2020, equation 3)
    causal_perplexity   causal models: every token of a whole document once, through sliding windows

Perplexity is exp(loss). Standard errors have sequences as their sample (see `scoring.ratio`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastdistil.data.batch import Batch, BatchLayout, TokenSequences, assemble
from fastdistil.data.batches import evaluation_batches
from fastdistil.data.masking import TokenFacts
from fastdistil.data.ragged import Ints, offsets, ranges
from fastdistil.errors import UserError
from fastdistil.models import language_model
from fastdistil.models.scoring import (
    Progress,
    budget_of,
    by_sequence,
    device_of,
    drawn_positions,
    drawn_sequences,
    evaluating,
    layout_of,
    ratio,
    require_finite,
    score_pieces,
    sequence_sums,
    sliding_windows,
)
from fastdistil.models.vocabularies import check_rows, facts_within
from fastdistil.recipe import Mask


@dataclass(frozen=True)
class HeldOut:
    """What `held_out` measured, in nats a token. A standard error of one single sequence is nan."""

    loss: float
    loss_se: float
    perplexity: float
    labels: int
    """TokenSequences that had to be predicted."""
    sequences: int
    kl: float | None
    """Mean over all tokens of KL(teacher || model) at temperature 1; None without a teacher."""
    kl_se: float | None
    kl_tokens: int


@dataclass(frozen=True)
class PseudoPerplexity:
    loss: float
    """Mean of -log P(token | all others)."""
    loss_se: float
    pppl: float
    positions: int
    """TokenSequences that were masked, one at a time."""
    sequences: int
    """Different sequences that they lie in."""


@dataclass(frozen=True)
class CausalPerplexity:
    loss: float
    loss_se: float
    perplexity: float
    tokens: int
    """Every token but the first of each document, which nothing comes before."""
    sequences: int
    """Documents of at least two tokens."""
    max_length: int
    stride: int


@torch.no_grad()
def held_out(
    model: Any,
    corpus: TokenSequences,
    facts: TokenFacts,
    *,
    teacher: Any | None = None,
    columns: int | None = None,
    seed: int = 0,
    probability: float = 0.15,
    max_sequences: int | None = None,
    batch_tokens: int = 8192,
    layout: BatchLayout | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> HeldOut:
    """Loss on held-out sequences, all or `max_sequences` drawn with the seed, and KL to a teacher that sees the same.

    `model` and `teacher`: LanguageModel, AnyModel or modules with their interface, on one device; training
    mode is off meanwhile. `columns`: the first entries of both vocabularies, over which the KL is taken (None:
    all, equally many); the loss is always over all of the model's. `layout` None: packed where the models can. `precision`
    (fp32, bf16, fp16) is autocast's for the model; the teacher computes in its own dtype. The same seed gives the same masks
    and sequences whatever the batch size. Raises UserError: no tokens to predict, sequences too long for the model, another
    vocabulary, no mask token; NonFinite where a loss or KL is not finite.
    """
    if not 0 < probability < 1:
        raise UserError(f"probability must lie between 0 and 1, got {probability:g}")
    chosen_n = drawn_sequences(len(corpus), max_sequences, seed)
    if (
        teacher is not None
        and columns is None
        and (v_t := language_model.vocabulary(teacher)) != (v_m := language_model.vocabulary(model))
    ):
        raise UserError(f"the teacher's vocabulary has {v_t} entries, the model's {v_m}; say which they share with columns")
    for scorer in (teacher, model):
        if scorer is not None:
            facts = checked_facts(scorer, corpus, corpus.lengths[chosen_n], facts)
    longest = int(corpus.lengths[chosen_n].max(initial=0))
    batches = evaluation_batches(
        corpus,
        facts,
        chosen_n,
        batch_tokens=min(budget_of(scorer, longest, batch_tokens) for scorer in (model, teacher) if scorer is not None),
        causal=bool(model.causal),
        mask=Mask(probability=probability, smoothing=0.0),
        seed=seed,
        layout=layout if layout is not None else layout_of(model, teacher),
    )
    total = int(corpus.lengths[chosen_n].sum())
    in_order_n = chosen_n[np.argsort(corpus.lengths[chosen_n], kind="stable")]  # as evaluation_batches has them
    done, first, parts = 0, 0, []
    with evaluating(model, teacher):
        for batch in batches:
            batch = batch.to(device_of(model))
            parts.append(sequence_sums(model, teacher, batch, precision, columns))
            sequences_n = in_order_n[first : first + batch.counts.sequences]
            require_finite(parts[-1], sequences_n, model, teacher, batch, precision)
            first += batch.counts.sequences
            done += batch.counts.tokens
            if progress is not None:
                progress(done / total)
    sums = np.concatenate(parts, axis=1)
    labels = int(sums[1].sum())
    if labels == 0:
        raise UserError(f"no token to predict in {len(chosen_n)} sequences of {total} tokens in all; give more or longer text")
    loss, loss_se = ratio(sums[0], sums[1])
    kl, kl_se = ratio(sums[2], sums[3]) if teacher is not None else (None, None)
    return HeldOut(loss, loss_se, _exp(loss), labels, len(chosen_n), kl, kl_se, int(sums[3].sum()))


@torch.no_grad()
def pseudo_perplexity(
    model: Any,
    corpus: TokenSequences,
    facts: TokenFacts,
    *,
    positions: int | Literal["all"] = 2000,
    seed: int = 0,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> PseudoPerplexity:
    """Mask one token at a time: `positions` of them, drawn without replacement from all tokens that are not special.

    A token costs a forward of its whole sequence. Raises UserError as `held_out` does, and for causal models.
    """
    if model.causal:
        raise UserError("pseudo-perplexity is for masked models; a causal model has a perplexity of its own (positions: 0)")
    facts = checked_facts(model, corpus, corpus.lengths, facts)
    if facts.mask_id is None:
        raise UserError("pseudo-perplexity needs a tokenizer with a mask token, and this one has none; use the model's own")
    tokens_P = drawn_positions(corpus, facts, positions, seed)
    starts_n = offsets(corpus.lengths)
    sequences_P = np.searchsorted(starts_n, tokens_P, side="right") - 1
    places_P = tokens_P - starts_n[sequences_P]
    mask_id, layout = facts.mask_id, layout_of(model)

    def make(chosen: Ints) -> Batch:
        sequences = sequences_P[chosen]
        lengths = corpus.lengths[sequences]
        ids_T = corpus.gather(sequences)
        targets = offsets(lengths)[:-1] + places_P[chosen]
        labels = ids_T[targets]
        ids_T[targets] = mask_id
        return assemble(ids_T, lengths, targets, labels, layout=layout, pad_id=facts.pad_id, sequence_of_label_M=sequences)

    scored = score_pieces(model, corpus.lengths[sequences_P], make, batch_tokens, precision, progress)
    sums, counts = by_sequence(*scored)
    loss, loss_se = ratio(sums, counts)
    return PseudoPerplexity(loss, loss_se, _exp(loss), int(counts.sum()), len(counts))


@torch.no_grad()
def causal_perplexity(
    model: Any,
    corpus: TokenSequences,
    facts: TokenFacts,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> CausalPerplexity:
    """Every token but the first of each sequence is predicted once, in windows of `max_length` tokens, `stride` apart.

    A window scores the tokens that those before it have not, so behind the first window a token sees at least
    max_length - stride others. max_length: None for the model's; stride: None for half of it. The corpus should be prepared
    with whole documents and without special tokens, but for the BOS of models that were trained with one. Raises UserError as
    `held_out` does, and for masked models.
    """
    if not model.causal:
        raise UserError("sliding-window perplexity is for causal models; a masked one has held-out loss and pseudo-perplexity")
    limit = language_model.max_length(model)
    size = max_length if max_length is not None else limit or int(corpus.lengths.max())
    step = stride if stride is not None else max(size // 2, 1)
    if size < 2 or (limit is not None and size > limit):
        raise UserError(f"max_length must be from 2 to {limit or 'the longest text'} for this model, got {size}")
    if not 1 <= step < size:
        raise UserError(f"stride must be from 1 to {size - 1} (max_length - 1), got {step}: every token needs one before it")
    facts = checked_facts(model, corpus, np.minimum(corpus.lengths, size), facts)
    windows, layout = sliding_windows(corpus.lengths, size, step), layout_of(model)

    def make(chosen: Ints) -> Batch:
        sequence, begin, first, end = (column[chosen] for column in windows)
        distinct, inverse = np.unique(sequence, return_inverse=True)
        text, starts = corpus.gather(distinct), offsets(corpus.lengths[distinct])[:-1]
        ids_T = text[ranges(starts[inverse] + begin, end - begin)]
        targets = ranges(offsets(end - begin)[:-1] + first - 1 - begin, end - first)
        clusters = np.repeat(sequence, end - first)
        labels = ids_T[targets + 1]
        return assemble(ids_T, end - begin, targets, labels, layout=layout, pad_id=facts.pad_id, sequence_of_label_M=clusters)

    lengths_W = windows.end - windows.begin
    sums, counts = by_sequence(*score_pieces(model, lengths_W, make, batch_tokens, precision, progress))
    loss, loss_se = ratio(sums, counts)
    return CausalPerplexity(loss, loss_se, _exp(loss), int(counts.sum()), len(counts), size, step)


def checked_facts(model: Any, corpus: TokenSequences, lengths_n: NDArray[Any], facts: TokenFacts) -> TokenFacts:
    """What of the tokenizer concerns the model. Raises UserError where the corpus is not for it."""
    longest, limit = int(lengths_n.max(initial=0)), language_model.max_length(model)
    check_rows("the model", language_model.vocabulary(model), corpus, facts, bool(model.causal))
    if limit is not None and longest > limit:
        raise UserError(
            f"the corpus has sequences of {longest} tokens, the model takes {limit}; prepare it with --max-length {limit}"
        )
    return facts_within(facts, language_model.vocabulary(model))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan
