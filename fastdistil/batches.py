"""Token shards -> batches on the host: packed or length-grouped, masked, and any of them at once, without the ones before.

An epoch is a plan: all sequences in an order drawn from (seed, epoch), cut into batches. Batch b of an epoch belongs to

    update b // (accumulation * ranks),  micro-batch b // ranks % accumulation of it,  rank b % ranks,

so an update is a window of consecutive batches, whose counts over all ranks are known before its first forward. Every sequence
is used once an epoch. The last window may hold fewer batches, and then some ranks hold one less than others, perhaps none at
all: whoever averages must divide by the window's counts, not by the number of ranks or micro-batches.

Two layouts. packed: sequences end to end in one row of at most `micro_batch_tokens`, positions restarting, no padding, the
shortest first so that those of one length lie side by side. length-grouped: padded rows of nearly equal length, and all ranks
take theirs from the same length at the same time, so that none waits for another's longer rows.

Shapes: n sequences, T tokens, B rows of S, N = B * S, M labels, V vocabulary.
"""

import bisect
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, Self, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistil.errors import UserError
from fastdistil.masking import (
    ORDER,
    SETS,
    Facts,
    Ints,
    MaskTable,
    choose_targets,
    hashed,
    mask_table,
    mask_tokens,
    maskable_counts,
    offsets,
    target_counts,
)
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

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.valid + other.valid, self.tokens + other.tokens, self.labels + other.labels, self.sequences + other.sequences
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
    """int64: 0, 1, ... in every sequence, plus the position offset; None: the model's own."""
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
    position_offset: int = 0,
    index: tuple[int, int] = (0, 0),
    sequence_of_label_M: Ints | None = None,
) -> Batch:
    """A batch of n sequences whose tokens lie end to end in seen_T; token targets_M[i] has the label labels_M[i].

    Lengths must be at least 1, and ascend in the packed layout.
    """
    starts_n, tokens = offsets(lengths_n)[:-1], len(seen_T)
    positions_T = np.arange(tokens) - np.repeat(starts_n, lengths_n)
    counts = Counts(float(tokens), tokens, len(targets_M), len(lengths_n))
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
        # With an offset (RoBERTa) the position before the first one is padding's.
        positions_BS=spread(positions_T + position_offset, max(position_offset - 1, 0)),
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
    position_offset: int

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
        return assemble(
            seen_T,
            lengths_n,
            targets_M,
            labels_M,
            layout=self.layout,
            pad_id=self.facts.pad_id,
            position_offset=self.position_offset,
            index=index,
            sequence_of_label_M=np.repeat(sequences_n, lengths_n)[targets_M] if clusters else None,
        )


@dataclass(frozen=True)
class Plan:
    """One epoch: batch b holds the sequences order_n[starts[b] : starts[b + 1]]."""

    order_n: NDArray[Any]
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sequences(self, first: int, last: int) -> Ints:
        """Those of the batches first ... last - 1."""
        return self.order_n[self.starts[first] : self.starts[last]].astype(np.int64)


def shuffled(n: int, *, seed: int, epoch: int) -> Ints:
    """The epoch's order of n sequences, int64 [n]. The hashes have no ties, so any sort gives the same."""
    return np.argsort(hashed(seed, ORDER, epoch, np.arange(n)), kind="stable")


def packed_plan(lengths_n: NDArray[Any], order_n: Ints, budget: int) -> Plan:
    """Next-fit: a batch ends where the next sequence would not fit. The loop is over batches."""
    ends_n = np.cumsum(lengths_n[order_n], dtype=np.int64)
    starts, used = [0], 0
    while starts[-1] < len(order_n):
        starts.append(int(ends_n.searchsorted(used + budget, side="right")))
        used = int(ends_n[starts[-1] - 1])
    return Plan(_narrow(order_n), np.array(starts, np.int64))


def grouped_plan(
    lengths_n: NDArray[Any], order_n: Ints, budget: int, *, bin_width: int, ranks: int, seed: int, epoch: int
) -> Plan:
    """Batches whose padded size is at most `budget`, in sets of `ranks` from one bin of `bin_width` token lengths.

    What is left of a bin joins the next longer one. Each set is dealt out like cards, so its batches differ by one sequence at
    most, and the sets are shuffled. A last set of fewer sequences than ranks gives one to each of the first ranks, at the end.
    """
    bins_n = (lengths_n[order_n] - 1) // bin_width
    order_n = order_n[np.argsort(bins_n.astype(np.min_scalar_type(bins_n.max())), kind="stable")]
    bin_ends = np.cumsum(np.bincount(bins_n))
    bin_ends = bin_ends[np.diff(bin_ends, prepend=0) > 0]
    tops = np.maximum.reduceat(lengths_n[order_n], np.r_[0, bin_ends[:-1]])
    sets, at = [], 0
    for end, top in zip(bin_ends.tolist(), tops.tolist(), strict=True):
        size = budget // top * ranks
        full = (end - at) // size
        sets.append(at + size * np.arange(full))
        at += full * size
    if at < len(order_n):
        sets.append(np.array([at]))
    set_starts = np.concatenate(sets)
    sizes = np.diff(set_starts, append=len(order_n))
    shuffle = np.argsort(hashed(seed, SETS, epoch, np.arange(len(sizes))) // 2 + (sizes < ranks) * np.uint64(2**63))
    place = np.empty_like(shuffle)
    place[shuffle] = np.arange(len(shuffle))
    within_n = np.arange(len(order_n)) - np.repeat(set_starts, sizes)
    batch_n = np.repeat(place * ranks, sizes) + within_n % ranks
    return Plan(_narrow(order_n[np.argsort(batch_n, kind="stable")]), offsets(np.bincount(batch_n)))


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
        position_offset: int = 0,
    ) -> None:
        assert 0 <= rank < ranks, (rank, ranks)
        _check_fits(corpus, corpus.lengths, data.micro_batch_tokens, "data.micro_batch_tokens")
        table = None if causal else mask_table(mask, facts, corpus.counts)
        self.corpus, self.data, self.seed = corpus, data, seed
        self.accumulation, self.rank, self.ranks = accumulation, rank, ranks
        self._maker = _Maker(corpus, facts, table, data.layout, seed, position_offset)
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
        each = self.accumulation * self.ranks
        first, last = update * each, min((update + 1) * each, len(plan))
        window = [self._maker.make(plan.sequences(b, b + 1), (epoch, b)) for b in range(first + self.rank, last, self.ranks)]
        if self.ranks == 1:
            return window, sum((batch.counts for batch in window), Counts())
        return window, self._count(plan, epoch, first, last)

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
                        lengths_n, order_n, budget, bin_width=width, ranks=self.ranks, seed=self.seed, epoch=epoch
                    )
                case other:
                    assert_never(other)
            self._plan = (epoch, plan)
            self._updates[epoch] = -(-len(plan) // (self.accumulation * self.ranks))
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
        return Counts(float(tokens), tokens, labels, len(lengths_n))


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
    position_offset: int = 0,
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
    maker = _Maker(corpus, facts, table, layout, seed, position_offset)
    chosen_n = chosen_n[np.argsort(lengths_n, kind="stable")]
    lengths_n = corpus.lengths[chosen_n]
    if layout == "packed":
        starts = packed_plan(lengths_n, np.arange(len(chosen_n)), batch_tokens).starts.tolist()
    else:
        starts = [0]
        while (first := starts[-1]) < len(chosen_n):
            ends = range(first + 1, len(chosen_n) + 1)
            fitting = bisect.bisect_right(ends, batch_tokens, key=lambda end: (end - starts[-1]) * int(lengths_n[end - 1]))
            starts.append(first + fitting)
    return (maker.make(chosen_n[a:b], (0, i), clusters=True) for i, (a, b) in enumerate(pairwise(starts)))


class Made(NamedTuple):
    epoch: int
    update: int
    window: Window
    denominators: Counts


class Prefetched:
    """Iterates over (epoch, update, window, denominators), made ahead in a thread; a context manager. See `prefetched`."""

    def __init__(
        self, batches: Batches, epoch: int, update: int, epochs: int | None, windows: int, pin_for: torch.device | None
    ) -> None:
        self._batches, self._windows, self._pin_for = batches, windows, pin_for
        self._ready: deque[Made] = deque()
        self._changed = threading.Condition()
        self._closed = self._done = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(epoch, update, epochs), name="fastdistil-batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._done or self._closed)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Drop what was made and wait until the thread is gone: at most until it has finished one window."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self, epoch: int, update: int, epochs: int | None) -> None:
        try:
            if self._pin_for is not None:
                # The current device is a property of the thread; without this, pinning would open a context on device 0.
                torch.cuda.set_device(self._pin_for)
            while epochs is None or epoch < epochs:
                for number in range(update, self._batches.updates_per_epoch(epoch)):
                    window, denominators = self._batches.window(epoch, number)
                    if self._pin_for is not None:
                        window = [batch.pin_memory() for batch in window]
                    if not self._put(Made(epoch, number, window, denominators)):
                        return
                epoch, update = epoch + 1, 0
        except BaseException as error:  # noqa: BLE001  (whatever it is, the consumer has to hear of it)
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, made: Made) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._windows or self._closed)
            if not self._closed:
                self._ready.append(made)
                self._changed.notify_all()
            return not self._closed


def prefetched(
    batches: Batches, epoch: int = 0, update: int = 0, *, epochs: int | None = None, pin_for: torch.device | None = None
) -> Prefetched:
    """Windows from (epoch, update) on, `data.prefetch` of them made ahead in a background thread.

    epochs: stop before this epoch; None: go on until closed. pin_for: a CUDA device; batches are page-locked, so that
    `Batch.to(device, non_blocking=True)` does not wait. What the thread raises is raised again by the iterator, in its turn.
    """
    return Prefetched(batches, epoch, update, epochs, batches.data.prefetch, pin_for)


def from_mappings(
    iterable: Iterable[Mapping[str, Any]], *, causal: bool, vocab_size: int | None = None, position_offset: int = 0
) -> Iterator[Batch]:
    """Batches from the user's own mappings of tensors (or what torch.as_tensor takes), each [B, S].

    input_ids: integers. attention_mask: 1 for tokens, 0 for padding on either side; absent: all are tokens. labels: -100
    where there is none. Masked models: the token to guess in this place; absent: no labels. Causal models: the token in this
    place, as in input_ids (shifted here; absent: all of them); a row's first token has nothing to be predicted from.
    weights: floats of at least 0. Other keys are ignored. Raises UserError, naming the batch, for anything else.
    """
    for number, mapping in enumerate(iterable):
        try:
            batch = _from_mapping(mapping, number, causal, vocab_size, position_offset)
        except (TypeError, ValueError, RuntimeError) as error:  # all three come out of torch.as_tensor
            raise UserError(f"batch {number} of your own iterable: {' '.join(str(error).split())}") from error
        yield batch


def _from_mapping(mapping: Any, number: int, causal: bool, vocab_size: int | None, offset: int) -> Batch:
    if not isinstance(mapping, Mapping) or mapping.get("input_ids") is None:
        raise ValueError(f"wanted a mapping with input_ids, got {type(mapping).__name__}; yield dicts of tensors [B, S]")
    ids_BS = _matrix(mapping, "input_ids", None)
    if ids_BS.numel() == 0:
        raise ValueError(f"input_ids are empty, shape {tuple(ids_BS.shape)}; leave out empty batches")
    given = {key: mapping.get(key) is not None for key in ("attention_mask", "labels", "weights")}
    mask_BS = _matrix(mapping, "attention_mask", ids_BS) if given["attention_mask"] else torch.ones_like(ids_BS)
    valid_BS = mask_BS == 1
    if not bool((valid_BS | (mask_BS == 0)).all()):
        raise ValueError("attention_mask must hold only 0 and 1")
    default_BS = ids_BS.masked_fill(~valid_BS, NO_LABEL) if causal else torch.full_like(ids_BS, NO_LABEL)
    labels_BS = _matrix(mapping, "labels", ids_BS) if given["labels"] else default_BS
    _check_ids(ids_BS, "input_ids", vocab_size)
    _check_ids(labels_BS[labels_BS != NO_LABEL], "labels", vocab_size)
    if bool(((labels_BS != NO_LABEL) & ~valid_BS).any()):
        raise ValueError("labels are given where attention_mask is 0; set them to -100 there")
    if causal:
        labels_BS = torch.cat([labels_BS[:, 1:], torch.full_like(labels_BS[:, :1], NO_LABEL)], 1)
        labels_BS = labels_BS.masked_fill(~valid_BS, NO_LABEL)
    weights_N = _matrix(mapping, "weights", ids_BS, floating=True).flatten() if given["weights"] else None
    positions_BS = (valid_BS.cumsum(1) - 1 + offset).masked_fill(~valid_BS, max(offset - 1, 0))
    valid_rows = valid_BS.flatten().nonzero().flatten()
    label_rows = (labels_BS.flatten() != NO_LABEL).nonzero().flatten()
    tokens = len(valid_rows)
    valid = float(tokens) if weights_N is None else float(weights_N[valid_rows].double().sum())
    return Batch(
        ids_BS=ids_BS,
        positions_BS=positions_BS,
        attention_mask_BS=mask_BS,
        packing=None,
        labels_N=labels_BS.flatten(),
        valid_rows=None if tokens == ids_BS.numel() else valid_rows,
        label_rows=label_rows,
        weights_N=weights_N,
        counts=Counts(valid, tokens, len(label_rows), int(valid_BS.any(1).sum())),
        index=(0, number),
    )


def _matrix(mapping: Mapping[str, Any], key: str, like_BS: Tensor | None, floating: bool = False) -> Tensor:
    """mapping[key] as int64 or float32 [B, S] on the host."""
    tensor = torch.as_tensor(mapping[key]).cpu()
    if tensor.dim() != 2 or (like_BS is not None and tensor.shape != like_BS.shape):
        wanted = "[B, S]" if like_BS is None else f"that of input_ids, {tuple(like_BS.shape)}"
        raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, wanted {wanted}")
    if floating:
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError(f"{key} must be finite and at least 0")
        return tensor.to(torch.float32)
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{key} has the type {tensor.dtype}, wanted integers")
    return tensor.to(torch.int64)


def _check_ids(ids: Tensor, key: str, vocab_size: int | None) -> None:
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"{key} hold {int(ids.min())}; token ids are at least 0 (and only labels may be -100)")
    if ids.numel() and vocab_size is not None and int(ids.max()) >= vocab_size:
        raise ValueError(f"{key} hold {int(ids.max())}, the vocabulary has {vocab_size} ids; use the model's own tokenizer")


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


def _narrow(order_n: Ints) -> NDArray[Any]:
    return order_n.astype(np.int32) if len(order_n) < 2**31 else order_n
