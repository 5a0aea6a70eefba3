"""What evaluation stands on: which tokens are scored, their losses in batches, and a mean with its standard error.

The tokens of a sequence depend on each other, so they are not a sample of that many: standard errors are those of a ratio of
sums over sequences (Cochran 1977, section 6.4), sequences being the sample.

Legend: N = batch * length rows, R of them chosen, D width, V vocabulary, n sequences, P pieces of text, W windows, M labels.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdistil.data.batch import Batch, BatchLayout, TokenSequences
from fastdistil.data.batches import ascending_starts
from fastdistil.data.masking import TokenFacts
from fastdistil.data.ragged import Ints, offsets, ranges
from fastdistil.errors import CorruptData, NonFinite, UserError
from fastdistil.kernels.distill import divergence_reference
from fastdistil.models import language_model
from fastdistil.models.not_finite import ROWS, first_not_finite

LOGITS = 2**27
"""Elements of the logits of a batch, for models that give them whole: 0.5 GiB in float32."""
Progress = Callable[[float], None]


# What is drawn, and where windows lie


def drawn_sequences(n: int, count: int | None, seed: int) -> Ints:
    """Indices of all n sequences, or of `count` of them drawn with the seed, ascending int64."""
    if count is None or count >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng((seed, 0)).choice(n, count, replace=False))


def drawn_positions(corpus: TokenSequences, facts: TokenFacts, count: int | Literal["all"], seed: int) -> Ints:
    """Where in the corpus, its sequences end to end, `count` tokens that are not special lie: ascending int64.

    Uniform, without replacement; all of them if there are no more.
    """
    special_V = np.zeros(facts.vocab_size, np.bool_)
    special_V[facts.special_ids] = True
    # Where sequences start in the corpus laid end to end, how many tokens it has, and how many that are not special.
    starts_n = offsets(corpus.lengths)
    total, ordinary = int(starts_n[-1]), int(corpus.counts[~special_V].sum())
    if ordinary == 0:
        raise UserError(f"the corpus has {total} tokens and none that is not special; give more text")
    if count != "all" and count < 1:
        raise UserError(f"positions must be at least 1, or all, got {count}")
    missing = ordinary if count == "all" else min(count, ordinary)
    generator, draw = np.random.default_rng((seed, 1)), missing
    while True:
        # Tokens in a random order, a few more than needed: the first ordinary ones are a sample of the ordinary ones.
        draw = min(total, int(1.1 * draw * total / ordinary) + 64)
        tokens_P = generator.choice(total, draw, replace=False)
        sequences, inverse = np.unique(np.searchsorted(starts_n, tokens_P, side="right") - 1, return_inverse=True)
        # Only their sequences are read: `here` is where each token lies among those.
        here = tokens_P - starts_n[sequences][inverse] + offsets(corpus.lengths[sequences])[inverse]
        tokens_P = tokens_P[~special_V[corpus.gather(sequences)[here]]]
        if len(tokens_P) >= missing:
            return np.sort(tokens_P[:missing])
        if draw == total:
            raise CorruptData(
                f"the corpus counts {ordinary} tokens that are not special and holds {len(tokens_P)}; prepare it again"
            )


class Windows(NamedTuple):
    """Window w sees the tokens begin ... end - 1 of its sequence and scores first ... end - 1; all int64 [W]."""

    sequence: Ints
    begin: Ints
    first: Ints
    end: Ints


def sliding_windows(lengths_n: NDArray[Any], size: int, stride: int) -> Windows:
    """Windows of `size` tokens, `stride` apart, until the end of each sequence; none for a sequence of one token."""
    # Each sequence: the tokens that one window leaves over, and how many windows cover it.
    long_n = np.maximum(lengths_n.astype(np.int64) - size, 0)
    count_n = np.where(lengths_n > 1, 1 - (-long_n // stride), 0)
    sequence_W = np.repeat(np.arange(len(lengths_n)), count_n)
    begin_W = ranges(np.zeros(len(lengths_n), np.int64), count_n) * stride
    # A sequence's first token has nothing before it; later windows score what the one before did not reach.
    first_W = np.where(begin_W == 0, 1, begin_W - stride + size)
    return Windows(sequence_W, begin_W, first_W, np.minimum(begin_W + size, lengths_n[sequence_W]))


# Scoring


def layout_of(*modules: Any) -> BatchLayout:
    """Packed, unless one of the models gives whole logits (language_model.AnyModel)."""
    return "length-grouped" if any(model is not None and model.weight is None for model in modules) else "packed"


def budget_of(model: Any, longest: int, batch_tokens: int) -> int:
    """Tokens of a batch: `batch_tokens`, or less where whole logits would take more than LOGITS, but one sequence at least."""
    if model.weight is not None:
        return batch_tokens
    return min(batch_tokens, max(longest, LOGITS // language_model.vocabulary(model)))


def device_of(model: Any) -> torch.device:
    weight: Tensor = model.weight if model.weight is not None else next(model.parameters())
    return weight.device


def sequence_sums(
    model: Any, teacher: Any | None, batch: Batch, precision: str, columns: int | None = None
) -> NDArray[np.float64]:
    """[4, n] for the n sequences of a batch: cross-entropy, labels, KL, tokens compared with the teacher."""
    # The rows that are scored: labelled ones; with a teacher all but padding, as it speaks of each.
    rows = batch.label_rows
    if teacher is not None:
        rows = batch.valid_rows if batch.valid_rows is not None else torch.arange(batch.labels_N.shape[0], device=rows.device)
    cross_entropy_R, kl_R = _row_losses(model, teacher, batch, rows, precision, columns)
    # Each row's sequence.
    if batch.packing is not None:
        owner_R = torch.searchsorted(batch.packing.cu_seqlens.long(), rows, right=True) - 1
    else:
        owner_R = rows // batch.ids_BS.shape[1]
    # The four measures of each row [4, R], then of each sequence [4, n].
    labelled_R = (batch.labels_N.index_select(0, rows) >= 0).double()
    compared_R = torch.ones_like(labelled_R) if teacher is not None else torch.zeros_like(labelled_R)
    values_R = torch.stack([cross_entropy_R, labelled_R, kl_R, compared_R]).cpu()
    sums_n = torch.zeros(4, batch.counts.sequences, dtype=torch.float64)
    # On the host, where sums have one order: the same numbers at every call.
    totals: NDArray[np.float64] = sums_n.index_add_(1, owner_R.cpu(), values_R).numpy()
    return totals


def _row_losses(
    model: Any, teacher: Any | None, batch: Batch, rows: Tensor, precision: str, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (0 in rows without a label) and KL to the teacher (0 without one) of some rows, float64 [R] each.

    `columns`: the first entries of both vocabularies, over which the KL is taken; None: all.
    """
    # The model computes as evaluation asks for, the teacher in its own dtype.
    device = batch.ids_BS.device
    autocast = torch.autocast(device.type, language_model.DTYPES[precision], enabled=precision != "fp32")
    own_dtype = torch.autocast(device.type, enabled=False)
    labels_R = batch.labels_N.index_select(0, rows)
    cross_entropy_R = torch.zeros(len(rows), dtype=torch.float64, device=device)
    kl_R = torch.zeros_like(cross_entropy_R)
    with own_dtype:
        teacher_ND = teacher.hidden(batch) if teacher is not None else None
    with autocast:
        hidden_ND = model.hidden(batch)
        # ROWS logits at a time: both sides' whole matrices are never held.
        for at in range(0, len(rows), ROWS):
            here = slice(at, at + ROWS)
            logits_RV = _logits(model, hidden_ND.index_select(0, rows[here]))
            cross_entropy_R[here] = F.cross_entropy(logits_RV, labels_R[here], reduction="none").double()
            if teacher_ND is not None:
                with own_dtype:
                    teacher_RV = _logits(teacher, teacher_ND.index_select(0, rows[here]))
                    kl_R[here] = divergence_reference(logits_RV[:, :columns], teacher_RV[:, :columns]).double()
    return cross_entropy_R, kl_R


def _logits(model: Any, hidden_RD: Tensor) -> Tensor:
    """[R, V], float32 or wider."""
    logits_RV: Tensor = model.transform(hidden_RD)
    if model.weight is not None:
        logits_RV = F.linear(logits_RV, model.weight, model.bias)
    return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


def score_pieces(
    model: Any,
    lengths_P: NDArray[Any],
    make: Callable[[Ints], Batch],
    batch_tokens: int,
    precision: str,
    progress: Progress | None,
) -> tuple[Ints, NDArray[np.float64]]:
    """Pieces of text in batches, the shortest first: (sequence, cross-entropy) of every label. `make` builds a batch, whose
    layout must be `layout_of(model)`.
    """
    if len(lengths_P) == 0:
        raise UserError("no token to predict: every text has a single token; give more or longer text")
    if int(lengths_P.max()) > batch_tokens:
        raise UserError(f"a text of {int(lengths_P.max())} tokens does not fit into batch_tokens {batch_tokens}; raise it")
    # Pieces of like length share a batch; it begins at starts[i] of the order.
    shortest_first = np.argsort(lengths_P, kind="stable")
    lengths_P = lengths_P[shortest_first]
    starts = ascending_starts(lengths_P, budget_of(model, int(lengths_P[-1]), batch_tokens), layout_of(model))
    done_P = offsets(lengths_P)
    clusters, losses = [], []
    with evaluating(model):
        for a, b in itertools.pairwise(starts):
            batch = make(shortest_first[a:b])
            assert batch.sequence_of_label is not None
            clusters.append(batch.sequence_of_label.numpy())
            batch = batch.to(device_of(model))
            losses.append(_row_losses(model, None, batch, batch.label_rows, precision)[0].cpu().numpy())
            require_finite(losses[-1][None], clusters[-1], model, None, batch, precision)
            if progress is not None:
                progress(float(done_P[b] / done_P[-1]))
    return np.concatenate(clusters), np.concatenate(losses)


def require_finite(
    sums: NDArray[np.float64], sequences_n: Ints, model: Any, teacher: Any | None, batch: Batch, precision: str
) -> None:
    """Raise NonFinite, naming the first sequence and the part of a model, where a batch's measures [measures, n] are not.

    sequences_n: where in the corpus the columns of `sums` belong.
    """
    # The sequences with any measure that is not finite, and the first one's measures.
    bad = ~np.isfinite(sums).all(0)
    if not bad.any():
        return
    sequence, column = int(sequences_n[bad.argmax()]), sums[:, bad.argmax()]
    reason = first_not_finite(model, batch, precision)
    if reason is None and teacher is not None and (reason := first_not_finite(teacher, batch)) is not None:
        reason = f"of the teacher, {reason}"
    error = NonFinite(
        f"sequence {sequence} (from 0) has a loss or divergence of {column[~np.isfinite(column)][0]}"
        + (f": {reason}" if reason is not None else ""),
        "no mean over such values is one" if reason is None else "copy the model again, or take another precision",
    )
    error.sequence = sequence
    raise error


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in the mode it was in."""
    before = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    try:
        for part, _ in before:
            part.training = False
        yield
    finally:
        for part, training in before:
            part.training = training


# Statistics


def ratio(sums_n: NDArray[Any], counts_n: NDArray[Any]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error with sequences as the sample: nan for fewer than two.

        R = sum x_i / sum m_i        se(R)^2 = n / (n - 1) * sum (x_i - R m_i)^2 / (sum m_i)^2

    Sequences without a token in the mean tell nothing and do not count.
    """
    sums, counts = sums_n[counts_n > 0], counts_n[counts_n > 0]
    total, n = counts.sum(), len(counts)
    mean = sums.sum() / total
    if n < 2:
        return float(mean), math.nan
    return float(mean), float(np.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / total)


def by_sequence(clusters_M: Ints, losses_M: NDArray[np.float64]) -> tuple[NDArray[np.float64], Ints]:
    """Sum and number of the labels of each sequence that has any."""
    _, inverse, counts = np.unique(clusters_M, return_inverse=True, return_counts=True)
    return np.bincount(inverse, losses_M).astype(np.float64), counts.astype(np.int64)
