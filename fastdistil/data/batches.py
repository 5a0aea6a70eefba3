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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistil.data.epoch_plan import Plan, grouped_plan, packed_plan, shuffled
from fastdistil.data.masking import (
    Facts,
    Ints,
    MaskTable,
    choose_targets,
    mask_table,
    mask_tokens,
    maskable_counts,
    offsets,
    target_counts,
)
from fastdistil.data.teacher_cache import Cached, TeacherCache
from fastdistil.errors import UserError
from fastdistil.recipe import Data, Mask

NO_LABEL = -100
Layout = Literal["packed", "length-grouped"]


@dataclass(frozen=True)
class Counts:
    """What sums over tokens are divided by; counts of several batches add up."""

    valid: float = 0.0
    """Sum of the weights of all tokens: their number where there are no weights."""
    tokens: int = 0
    labels: int = 0
    sequences: int = 0
    batches: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.valid + other.valid,
            self.tokens + other.tokens,
            self.labels + other.labels,
            self.sequences + other.sequences,
            self.batches + other.batches,
        )


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row lie."""

    cu_seqlens: Tensor
    """int32 [n + 1]: the first row of each sequence, and T."""
    max_seqlen: int
    groups: tuple[tuple[int, int, int], ...]
    """(length, first row, sequences), in ascending order: sequences of one length lie side by side."""

    @classmethod
    def of(cls, lengths_n: NDArray[Any]) -> "Packing":
        """Of sequences laid end to end; their lengths must ascend."""
        assert np.all(np.diff(lengths_n) >= 0), "a packed row starts with its shortest sequence"
        distinct, repeats = np.unique(lengths_n, return_counts=True)
        firsts = offsets(distinct * repeats)[:-1]
        cu_seqlens = torch.from_numpy(offsets(lengths_n).astype(np.int32))
        return cls(cu_seqlens, int(distinct[-1]), tuple(zip(distinct.tolist(), firsts.tolist(), repeats.tolist(), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch; all tensors lie on one device."""

    ids_BS: Tensor
    """int64: what the models see, masked and padded. B is 1 in the packed layout."""
    positions_BS: Tensor | None
    """int64: 0, 1, ... in every sequence, and 0 for padding; None: the model's own."""
    attention_mask_BS: Tensor | None
    """int64, 1 for tokens and 0 for padding; None when packed."""
    packing: Packing | None
    labels_N: Tensor
    """int64: the token to predict in this row (causal models: the next one of the same sequence), -100 where there is none."""
    valid_rows: Tensor | None
    """int64 [tokens], ascending: the rows that are not padding; None: all are tokens."""
    label_rows: Tensor
    """int64 [M], ascending: the rows that have a label."""
    weights_N: Tensor | None
    """float32: weights of the soft loss; None: all 1."""
    counts: Counts
    index: tuple[int, int]
    """(epoch, number of the batch in it)"""
    sequence_of_label: Tensor | None = None
    """int64 [M], in evaluation: the sequence of each label, to cluster standard errors by."""
    cached_indices_NK: Tensor | None = None
    """int64: with `teacher.cache`, the tokens that the teacher's distribution is known for; see kernels.sparse_distill."""
    cached_log_probabilities_NK: Tensor | None = None
    """float32, at the objective's temperature."""
    cached_tail_N: Tensor | None = None
    """float32: the teacher's mass on all other tokens; None: they are not learnt from."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which `to(device, non_blocking=True)` does not wait."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.packing is not None:
            changed["packing"] = dataclasses.replace(self.packing, cu_seqlens=change(self.packing.cu_seqlens))
        return dataclasses.replace(self, **changed)


Window = list[Batch]


class Tokens(Protocol):
    """Where the sequences come from; corpus.Corpus is one."""

    @property
    def lengths(self) -> NDArray[Any]: ...
    @property
    def counts(self) -> Ints: ...
    def gather(self, sequences: Ints) -> Ints: ...
    def __len__(self) -> int: ...


def assemble(
    seen_T: Ints,
    lengths_n: NDArray[Any],
    targets_M: Ints,
    labels_M: Ints,
    *,
    layout: Layout = "packed",
    pad_id: int = 0,
    index: tuple[int, int] = (0, 0),
    sequence_of_label_M: Ints | None = None,
) -> Batch:
    """A batch of n sequences whose tokens lie end to end in seen_T; token targets_M[i] has the label labels_M[i].

    Lengths must be at least 1, and ascend in the packed layout.
    """
    starts_n, tokens = offsets(lengths_n)[:-1], len(seen_T)
    positions_T = np.arange(tokens) - np.repeat(starts_n, lengths_n)
    counts = Counts(float(tokens), tokens, len(targets_M), len(lengths_n), 1)
    clusters = None if sequence_of_label_M is None else torch.from_numpy(sequence_of_label_M)
    shape = (1, tokens) if layout == "packed" else (len(lengths_n), int(lengths_n.max()))
    rows_T = None
    if layout == "length-grouped":
        rows_T = np.repeat(np.arange(shape[0]) * shape[1], lengths_n) + positions_T

    def spread(values_T: NDArray[Any], padding: int) -> Tensor:
        if rows_T is None:
            return torch.from_numpy(values_T).view(shape)
        values_N = np.full(shape[0] * shape[1], padding, np.int64)
        values_N[rows_T] = values_T
        return torch.from_numpy(values_N).view(shape)

    label_rows_M = targets_M if rows_T is None else rows_T[targets_M]
    labels_N = np.full(shape[0] * shape[1], NO_LABEL, np.int64)
    labels_N[label_rows_M] = labels_M
    return Batch(
        ids_BS=spread(seen_T, pad_id),
        positions_BS=spread(positions_T, 0),
        attention_mask_BS=None if rows_T is None else spread(np.ones(tokens, np.int64), 0),
        packing=Packing.of(lengths_n) if rows_T is None else None,
        labels_N=torch.from_numpy(labels_N),
        valid_rows=None if rows_T is None else torch.from_numpy(rows_T),
        label_rows=torch.from_numpy(label_rows_M),
        weights_N=None,
        counts=counts,
        index=index,
        sequence_of_label=clusters,
    )


@dataclass(frozen=True)
class _Maker:
    """Sequences -> one batch of them."""

    corpus: Tokens
    facts: Facts
    table: MaskTable | None
    """None for causal models: every token but a sequence's first is a label of the one before."""
    layout: Layout
    seed: int
    cache: TeacherCache | None = None

    def make(self, sequences_n: Ints, index: tuple[int, int], clusters: bool = False) -> Batch:
        lengths_n = self.corpus.lengths[sequences_n]
        if self.layout == "packed":
            shortest_first = np.argsort(lengths_n, kind="stable")
            sequences_n, lengths_n = sequences_n[shortest_first], lengths_n[shortest_first]
        ids_T = self.corpus.gather(sequences_n)
        if self.table is None:
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
        given = torch.from_numpy(values_T)
        if batch.valid_rows is None:
            return given
        return given.new_full((batch.ids_BS.numel(), *given.shape[1:]), padding).index_copy_(0, batch.valid_rows, given)

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
        corpus: Tokens,
        facts: Facts,
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
        self.corpus, self.data, self.seed = corpus, data, seed
        self.rank, self.ranks = rank, ranks
        self.update_ranks = update_ranks or ranks
        self.update_batches = accumulation * self.update_ranks
        self._maker = _Maker(corpus, facts, table, data.layout, seed)
        self._maskable_n = None
        if table is not None and ranks > 1 and not mask.whole_word:
            self._maskable_n = _all_maskable(corpus, table)
        self._lock = threading.Lock()
        self._plan: tuple[int, Plan] | None = None
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
        first, last = update * self.update_batches, min((update + 1) * self.update_batches, len(plan))
        window = [self._maker.make(plan.sequences(b, b + 1), (epoch, b)) for b in range(first + self.rank, last, self.ranks)]
        if self.ranks == 1:
            return window, sum((batch.counts for batch in window), Counts())
        return window, self._count(plan, epoch, first, last)

    def learn_from(self, cache: TeacherCache) -> None:
        """From here on batches carry what the teacher said of their tokens."""
        self._maker = dataclasses.replace(self._maker, cache=cache)

    def make(self, epoch: int, sequences_n: Ints) -> Batch:
        """One batch of these sequences as the epoch has them. Their size is the caller's affair."""
        return self._maker.make(sequences_n, (epoch, 0))

    def _make_plan(self, epoch: int) -> Plan:
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

    def _count(self, plan: Plan, epoch: int, first: int, last: int) -> Counts:
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
    corpus: Tokens,
    facts: Facts,
    sequences_n: Ints | None = None,
    *,
    batch_tokens: int,
    causal: bool = False,
    mask: Mask | None = None,
    seed: int = 0,
    layout: Layout = "packed",
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


def ascending_starts(lengths_n: NDArray[Any], budget: int, layout: Layout) -> list[int]:
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


def _check_fits(corpus: Tokens, lengths_n: NDArray[Any], budget: int, key: str) -> None:
    if len(lengths_n) == 0:
        raise UserError(f"no sequences to make batches of (the corpus holds {len(corpus)}); prepare it from more text")
    longest = int(lengths_n.max())
    if longest > budget:
        raise UserError(
            f"the corpus holds a sequence of {longest} tokens and {key} is {budget}; "
            f"set {key} to {longest} or more, or prepare the corpus with a max_length of {budget} or less"
        )


def _all_maskable(corpus: Tokens, table: MaskTable, chunk: int = 8192) -> NDArray[np.int32]:
    """Tokens of every sequence that may be masked, int32 [n]."""
    parts = []
    for first in range(0, len(corpus), chunk):
        sequences = np.arange(first, min(first + chunk, len(corpus)))
        parts.append(maskable_counts(table, corpus.gather(sequences), corpus.lengths[sequences]).astype(np.int32))
    return np.concatenate(parts)
