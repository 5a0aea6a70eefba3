"""Token shards -> batches on the host: packed or length-grouped, masked, and any of them at once, without the ones before.

An epoch is a plan: all sequences in an order drawn from (seed, epoch), cut into batches. Batch b of an epoch belongs to

    update b // (accumulation * ranks),  micro-batch b // ranks % accumulation of it,  rank b % ranks,

where ranks are those that an update is counted for (`update_ranks`): a run continued by fewer or more ranks keeps its updates,
and only deals their batches out to others. So an update is a window of consecutive batches, whose counts over all ranks are
known before its first forward. Every sequence is used once an epoch. The last window may hold fewer batches, and then some
ranks hold one less than others, perhaps none at all: whoever averages must divide by the window's counts, not by the number of
ranks or micro-batches.

Two layouts. packed: sequences end to end in one row of at most `micro_batch_tokens`, positions restarting, no padding, the
shortest first so that those of one length lie side by side. length-grouped: padded rows of nearly equal length, and all ranks
take theirs from the same length at the same time, so that none waits for another's longer rows.

Shapes: n sequences, T tokens, B rows of S, N = B * S, M labels, V vocabulary.
"""

import bisect
import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistil.data.batch import Batch, BatchLayout, Counts, TokenSequences, Window, assemble
from fastdistil.data.epoch_plan import EpochPlan, grouped_plan, packed_plan, shuffled
from fastdistil.data.masking import (
    MaskTable,
    TokenFacts,
    choose_targets,
    mask_table,
    mask_tokens,
    maskable_counts,
    target_counts,
)
from fastdistil.data.ragged import Ints, offsets
from fastdistil.data.teacher_cache import Cached, TeacherCache
from fastdistil.errors import UserError
from fastdistil.recipe import Data, Mask


@dataclass(frozen=True)
class _Maker:
    """Sequences -> one batch of them."""

    corpus: TokenSequences
    facts: TokenFacts
    table: MaskTable | None
    """None for causal models: every token but a sequence's first is a label of the one before."""
    layout: BatchLayout
    seed: int
    cache: TeacherCache | None = None

    def make(self, sequences_n: Ints, index: tuple[int, int], clusters: bool = False) -> Batch:
        lengths_n = self.corpus.lengths[sequences_n]
        if self.layout == "packed":
            shortest_first = np.argsort(lengths_n, kind="stable")
            sequences_n, lengths_n = sequences_n[shortest_first], lengths_n[shortest_first]
        # The tokens end to end, what the model sees of them, and the labels: where they are and what.
        ids_T = self.corpus.gather(sequences_n)
        if self.table is None:
            # Every token but a sequence's last predicts the next one.
            seen_T = ids_T
            targets_M = np.delete(np.arange(len(ids_T)), offsets(lengths_n)[1:] - 1)
            labels_M = ids_T[targets_M + 1]
        else:
            seen_T, targets_M = mask_tokens(self.table, ids_T, lengths_n, sequences_n, seed=self.seed, epoch=index[0])
            labels_M = ids_T[targets_M]
        batch = assemble(
            seen_T,
            lengths_n,
            targets_M,
            labels_M,
            layout=self.layout,
            pad_id=self.facts.pad_id,
            index=index,
            sequence_of_label_M=np.repeat(sequences_n, lengths_n)[targets_M] if clusters else None,
        )
        return batch if self.cache is None else _with_cached(batch, self.cache.rows(index[0], sequences_n))


def _with_cached(batch: Batch, cached: Cached) -> Batch:
    """Padding rows list token 0 with probability 1; no term reads them."""

    def spread(values_T: NDArray[Any], padding: float) -> Tensor:
        tensor = torch.from_numpy(values_T)
        if batch.valid_rows is None:
            return tensor
        return tensor.new_full((batch.ids_BS.numel(), *tensor.shape[1:]), padding).index_copy_(0, batch.valid_rows, tensor)

    return dataclasses.replace(
        batch,
        cached_indices_NK=spread(cached.indices_TK, 0),
        cached_log_probabilities_NK=spread(cached.log_probabilities_TK, 0.0),
        cached_tail_N=None if cached.tail_T is None else spread(cached.tail_T, 0.0),
    )


class Batches:
    """All batches of all epochs for one rank, a pure function of (seed, epoch, update).

    The last epoch's plan is kept, 4 bytes a sequence. With several ranks the denominators need the labels of the others'
    batches: causal models and ordinary masks count them from lengths and a table of maskable tokens (one pass over the corpus
    at construction, 4 bytes a sequence); whole-word masks must be drawn, so each rank chooses all ranks' targets.

    Raises UserError: empty corpus, a sequence longer than the budget, no mask token, counts of another vocabulary.
    """

    def __init__(
        self,
        corpus: TokenSequences,
        facts: TokenFacts,
        data: Data,
        mask: Mask,
        *,
        seed: int,
        accumulation: int,
        causal: bool,
        rank: int = 0,
        ranks: int = 1,
        update_ranks: int | None = None,
    ) -> None:
        assert 0 <= rank < ranks, (rank, ranks)
        _check_fits(corpus, corpus.lengths, data.micro_batch_tokens, "data.micro_batch_tokens")
        table = None if causal else mask_table(mask, facts, corpus.counts)
        # Of the run: which batches are this rank's.
        self.corpus, self.data, self.seed = corpus, data, seed
        self.rank, self.ranks = rank, ranks
        self.update_ranks = update_ranks or ranks
        self.update_batches = accumulation * self.update_ranks
        self._maker = _Maker(corpus, facts, table, data.layout, seed)
        # For the counts of the other ranks' batches.
        self._maskable_n = None
        if table is not None and ranks > 1 and not mask.whole_word:
            self._maskable_n = _all_maskable(corpus, table)
        # The last epoch's plan, and the number of updates of each epoch planned so far. Threads share them.
        self._lock = threading.Lock()
        self._plan: tuple[int, EpochPlan] | None = None
        self._updates: dict[int, int] = {}

    def updates_per_epoch(self, epoch: int) -> int:
        """Windows of this epoch, the last one perhaps incomplete; with the packed layout it may differ between epochs."""
        with self._lock:
            if epoch not in self._updates:
                self._make_plan(epoch)
            return self._updates[epoch]

    def window(self, epoch: int, update: int) -> tuple[Window, Counts]:
        """(this rank's micro-batches of the update, its counts over all ranks). The list may be empty at an epoch's end."""
        with self._lock:
            plan = self._make_plan(epoch)
        if not 0 <= update < self._updates[epoch]:
            raise IndexError(f"epoch {epoch} has {self._updates[epoch]} updates, asked for number {update}")
        # The update's batches are first ... last - 1; this rank takes every ranks-th.
        first, last = update * self.update_batches, min((update + 1) * self.update_batches, len(plan))
        window = [self._maker.make(plan.sequences(b, b + 1), (epoch, b)) for b in range(first + self.rank, last, self.ranks)]
        if self.ranks == 1:
            return window, sum((batch.counts for batch in window), Counts())
        return window, self._count(plan, epoch, first, last)

    def learn_from(self, cache: TeacherCache) -> None:
        """Let batches carry, from here on, what the teacher said of their tokens."""
        self._maker = dataclasses.replace(self._maker, cache=cache)

    def make(self, epoch: int, sequences_n: Ints) -> Batch:
        """One batch of these sequences as the epoch has them. Their size is the caller's affair."""
        return self._maker.make(sequences_n, (epoch, 0))

    def _make_plan(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan[0] != epoch:
            self._plan = None
            lengths_n, budget = self.corpus.lengths, self.data.micro_batch_tokens
            order_n = shuffled(len(self.corpus), seed=self.seed, epoch=epoch)
            match self.data.layout:
                case "packed":
                    plan = packed_plan(lengths_n, order_n, budget)
                case "length-grouped":
                    width = self.data.bin_width
                    plan = grouped_plan(
                        lengths_n, order_n, budget, bin_width=width, ranks=self.update_ranks, seed=self.seed, epoch=epoch
                    )
                case other:
                    assert_never(other)
            self._plan = (epoch, plan)
            self._updates[epoch] = -(-len(plan) // self.update_batches)
        return self._plan[1]

    def _count(self, plan: EpochPlan, epoch: int, first: int, last: int) -> Counts:
        sequences_n = plan.sequences(first, last)
        lengths_n, table = self.corpus.lengths[sequences_n], self._maker.table
        tokens = int(lengths_n.sum())
        if table is None:
            labels = tokens - len(lengths_n)
        elif self._maskable_n is not None:
            maskable_n = self._maskable_n[sequences_n]
            labels = int(target_counts(table, lengths_n, maskable_n, sequences_n, seed=self.seed, epoch=epoch).sum())
        else:
            ids_T = self.corpus.gather(sequences_n)
            labels = len(choose_targets(table, ids_T, lengths_n, sequences_n, seed=self.seed, epoch=epoch))
        return Counts(float(tokens), tokens, labels, len(lengths_n), last - first)


def evaluation_batches(
    corpus: TokenSequences,
    facts: TokenFacts,
    sequences_n: Ints | None = None,
    *,
    batch_tokens: int,
    causal: bool = False,
    mask: Mask | None = None,
    seed: int = 0,
    layout: BatchLayout = "packed",
) -> Iterator[Batch]:
    """The given sequences (None: all) once, sorted by length, in batches of at most `batch_tokens`, padding included.

    Masks are those of epoch 0 of `seed`, with equal weights for all tokens: they depend neither on token frequencies nor on
    batch_tokens. `Batch.sequence_of_label` is set. Raises UserError as `Batches` does.
    """
    chosen_n = np.arange(len(corpus)) if sequences_n is None else sequences_n
    lengths_n = corpus.lengths[chosen_n]
    _check_fits(corpus, lengths_n, batch_tokens, "evaluation.batch_tokens")
    uniform_mask = (mask or Mask()).model_copy(update={"smoothing": 0.0})
    table = None if causal else mask_table(uniform_mask, facts, corpus.counts)
    maker = _Maker(corpus, facts, table, layout, seed)
    chosen_n = chosen_n[np.argsort(lengths_n, kind="stable")]
    lengths_n = corpus.lengths[chosen_n]
    starts = ascending_starts(lengths_n, batch_tokens, layout)
    return (maker.make(chosen_n[a:b], (0, i), clusters=True) for i, (a, b) in enumerate(pairwise(starts)))


def ascending_starts(lengths_n: NDArray[Any], budget: int, layout: BatchLayout) -> list[int]:
    """Where the batches of sequences begin whose lengths ascend, and n: `budget` tokens at most, padding included."""
    if layout == "packed":
        starts: list[int] = packed_plan(lengths_n, np.arange(len(lengths_n)), budget).starts.tolist()
        return starts
    starts = [0]
    while (first := starts[-1]) < len(lengths_n):
        ends = range(first + 1, len(lengths_n) + 1)
        fitting = bisect.bisect_right(ends, budget, key=lambda end: (end - starts[-1]) * int(lengths_n[end - 1]))
        starts.append(first + fitting)
    return starts


def _check_fits(corpus: TokenSequences, lengths_n: NDArray[Any], budget: int, key: str) -> None:
    if len(lengths_n) == 0:
        raise UserError(f"no sequences to make batches of (the corpus holds {len(corpus)}); prepare it from more text")
    longest = int(lengths_n.max())
    if longest > budget:
        raise UserError(
            f"the corpus holds a sequence of {longest} tokens and {key} is {budget}; "
            f"set {key} to {longest} or more, or prepare the corpus with a max_length of {budget} or less"
        )


def _all_maskable(corpus: TokenSequences, table: MaskTable, chunk: int = 8192) -> NDArray[np.int32]:
    """Count the tokens of every sequence that may be masked, int32 [n]."""
    parts = []
    for first in range(0, len(corpus), chunk):
        sequences = np.arange(first, min(first + chunk, len(corpus)))
        parts.append(maskable_counts(table, corpus.gather(sequences), corpus.lengths[sequences]).astype(np.int32))
    return np.concatenate(parts)
