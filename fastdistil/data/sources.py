"""Where the windows of a run come from: a prepared corpus, made ahead in a background thread, or the user's own mappings.

A window is the micro-batches of one rank in one update.
Shapes: B rows of S, N = B * S.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdistil.data.batch import NO_LABEL, Batch, Counts, Window
from fastdistil.data.batches import Batches
from fastdistil.errors import UserError
from fastdistil.recipe import Loop


class Made(NamedTuple):
    epoch: int
    update: int
    window: Window
    denominators: Counts


@contextmanager
def prefetched(
    batches: Batches, epoch: int = 0, update: int = 0, *, epochs: int | None = None, pin_for: torch.device | None = None
) -> Iterator[Iterator[Made]]:
    """Iterator over the windows from (epoch, update) on, `data.prefetch` of them made ahead in a thread, and one in the making.

    epochs: stop before this epoch; None: go on until closed. pin_for: a CUDA device; batches are page-locked, so that
    `Batch.to(device, non_blocking=True)` does not wait. What the thread raises is raised by the iterator, in its turn and from
    then on. Leaving waits until the thread has finished one window at most.
    """
    windows = _windows(batches, epoch, update, epochs, pin_for)  # runs in the thread: an epoch's plan takes a while, too
    pool = ThreadPoolExecutor(1, "fastdistil-batches")
    futures = deque(pool.submit(next, windows, None) for _ in range(batches.data.prefetch + 1))

    def take() -> Made | None:
        window = futures[0].result() if futures else None
        if window is not None:
            futures.popleft()
            futures.append(pool.submit(next, windows, None))
        return window

    try:
        yield iter(take, None)
    finally:
        futures.clear()
        pool.shutdown(cancel_futures=True)


def _windows(batches: Batches, epoch: int, update: int, epochs: int | None, pin_for: torch.device | None) -> Iterator[Made]:
    if pin_for is not None:
        # The current device is a property of the thread; without this, pinning would open a context on device 0.
        torch.cuda.set_device(pin_for)
    while epochs is None or epoch < epochs:
        for number in range(update, batches.updates_per_epoch(epoch)):
            window, denominators = batches.window(epoch, number)
            if pin_for is not None:
                window = [batch.pin_memory() for batch in window]
            yield Made(epoch, number, window, denominators)
        epoch, update = epoch + 1, 0


class WindowSource(Protocol):
    """Where the windows of a run come from."""

    identity: str
    """Changes when the data does: a continued run must find the same."""
    replayable: bool
    """Whether `windows` gives the same windows when it is called again."""

    def updates(self, loop: Loop) -> int: ...
    def windows(self, first: int, end: int) -> Any:
        """Context manager over an iterator of (window, counts of the update): updates first ... end - 1."""

    def describe(self, update: int) -> str:
        """Names the batches of update number `update` (from 1)."""


class CorpusSource:
    """Windows of a prepared corpus."""

    def __init__(self, batches: Batches, identity: str, device: torch.device) -> None:
        self.identity, self.replayable = identity, True
        self.batches, self._device = batches, device

    def updates(self, loop: Loop) -> int:
        """Exactly as many as `loop.epochs` has; a part of an epoch is rounded to whole updates, at least 1."""
        if loop.updates is not None:
            return loop.updates
        assert loop.epochs is not None
        full_epochs, part = divmod(loop.epochs, 1.0)
        total = sum(self.batches.updates_per_epoch(epoch) for epoch in range(int(full_epochs)))
        if part:
            total += round(part * self.batches.updates_per_epoch(int(full_epochs)))
        return max(1, total)

    def place(self, update: int) -> tuple[int, int]:
        """(epoch, update in it) of the update number `update`, from 0."""
        epoch = 0
        while update >= (size := self.batches.updates_per_epoch(epoch)):
            update, epoch = update - size, epoch + 1
        return epoch, update

    def epochs(self, loop: Loop) -> int:
        """Epochs that a run reads from, the last one perhaps in part."""
        return self.place(self.updates(loop) - 1)[0] + 1

    @contextmanager
    def windows(self, first: int, end: int) -> Iterator[Iterator[tuple[Window, Counts]]]:
        if first >= end:
            yield iter(())
            return
        pin_for = self._device if self._device.type == "cuda" else None
        with prefetched(self.batches, *self.place(first), pin_for=pin_for) as entries:
            yield ((entry.window, entry.denominators) for entry in itertools.islice(entries, end - first))

    def describe(self, update: int) -> str:
        epoch, number = self.place(update - 1)
        per_update = self.batches.update_batches
        return f"epoch {epoch}, batches {number * per_update} to {number * per_update + per_update - 1}"


class MappingSource:
    """Windows of your own iterable of micro-batches.

    They are made when the step asks for them, so your iterable may keep it waiting (a DataLoader has workers of its own).
    Each is a mapping of tensors [B, S]: input_ids, and optionally attention_mask, labels and weights (see
    `from_mappings`). An iterable that can be iterated anew (a list, a DataLoader) gives epochs, and must give the same
    batches each time for a continued run to be the same run: what was used before is iterated over again and dropped. Several
    ranks all iterate over all of it, and each trains on its own.
    """

    def __init__(
        self,
        mappings: Iterable[Mapping[str, Any]],
        causal: bool,
        vocabulary: int,
        update_batches: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.identity = f"{type(mappings).__qualname__} given from Python"
        self.replayable = isinstance(mappings, Sized)
        self._mappings, self._causal, self._vocabulary = mappings, causal, vocabulary
        self._update_batches, self._rank, self._ranks = update_batches, rank, ranks

    def updates(self, loop: Loop) -> int:
        if loop.updates is not None:
            return loop.updates
        if not isinstance(self._mappings, Sized):
            raise UserError("loop.epochs needs batches with a length; set loop.updates for an iterable without one")
        assert loop.epochs is not None
        per_epoch = -(-len(self._mappings) // self._update_batches)
        return max(1, round(loop.epochs * per_epoch))

    @contextmanager
    def windows(self, first: int, end: int) -> Iterator[Iterator[tuple[Window, Counts]]]:
        yield itertools.islice(self._all(), first, end)

    def _all(self) -> Iterator[tuple[Window, Counts]]:
        while True:
            batches = from_mappings(self._mappings, causal=self._causal, vocab_size=self._vocabulary)
            window: list[Batch] = []
            empty = True
            for batch in batches:
                window.append(batch)
                if len(window) == self._update_batches:
                    empty = False
                    yield self._own(window)
                    window = []
            if window:
                empty = False
                yield self._own(window)
            if empty:
                raise UserError("your iterable of batches ended before loop.updates; give one that can be iterated again")

    def _own(self, window: Window) -> tuple[Window, Counts]:
        return window[self._rank :: self._ranks], sum((batch.counts for batch in window), Counts())

    def describe(self, update: int) -> str:
        first = (update - 1) * self._update_batches
        return f"micro-batches {first} to {first + self._update_batches - 1} of your iterable"


def from_mappings(iterable: Iterable[Mapping[str, Any]], *, causal: bool, vocab_size: int | None = None) -> Iterator[Batch]:
    """Batches from the user's own mappings of tensors (or what torch.as_tensor takes), each [B, S].

    input_ids: integers. attention_mask: 1 for tokens, 0 for padding on either side; absent: all are tokens. labels: -100
    where there is none. Masked models: the token to guess in this place; absent: no labels. Causal models: the token in this
    place, as in input_ids (shifted here; absent: all of them); a row's first token has nothing to be predicted from.
    weights: floats of at least 0. Other keys are ignored. Raises UserError, naming the batch, for anything else.
    """
    for number, mapping in enumerate(iterable):
        try:
            batch = _from_mapping(mapping, number, causal, vocab_size)
        except (TypeError, ValueError, RuntimeError) as error:  # all three come out of torch.as_tensor
            raise UserError(f"batch {number} of your own iterable: {' '.join(str(error).split())}") from error
        yield batch


def _from_mapping(mapping: Any, number: int, causal: bool, vocab_size: int | None) -> Batch:
    if not isinstance(mapping, Mapping) or mapping.get("input_ids") is None:
        raise ValueError(f"wanted a mapping with input_ids, got {type(mapping).__name__}; yield dicts of tensors [B, S]")
    ids_BS = _matrix(mapping, "input_ids", None)
    if ids_BS.numel() == 0:
        raise ValueError(f"input_ids are empty, shape {tuple(ids_BS.shape)}; leave out empty batches")
    present = {key: mapping.get(key) is not None for key in ("attention_mask", "labels", "weights")}
    mask_BS = _matrix(mapping, "attention_mask", ids_BS) if present["attention_mask"] else torch.ones_like(ids_BS)
    valid_BS = mask_BS == 1
    if not bool((valid_BS | (mask_BS == 0)).all()):
        raise ValueError("attention_mask must hold only 0 and 1")
    default_BS = ids_BS.masked_fill(~valid_BS, NO_LABEL) if causal else torch.full_like(ids_BS, NO_LABEL)
    labels_BS = _matrix(mapping, "labels", ids_BS) if present["labels"] else default_BS
    _check_ids(ids_BS, "input_ids", vocab_size)
    _check_ids(labels_BS[labels_BS != NO_LABEL], "labels", vocab_size)
    if bool(((labels_BS != NO_LABEL) & ~valid_BS).any()):
        raise ValueError("labels are given where attention_mask is 0; set them to -100 there")
    if causal:
        labels_BS = torch.cat([labels_BS[:, 1:], torch.full_like(labels_BS[:, :1], NO_LABEL)], 1)
        labels_BS = labels_BS.masked_fill(~valid_BS, NO_LABEL)
    weights_N = _matrix(mapping, "weights", ids_BS, floating=True).flatten() if present["weights"] else None
    positions_BS = (valid_BS.cumsum(1) - 1).masked_fill(~valid_BS, 0)
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
        counts=Counts(valid, tokens, len(label_rows), int(valid_BS.any(1).sum()), 1),
        index=(0, number),
    )


def _matrix(mapping: Mapping[str, Any], key: str, like_BS: Tensor | None, floating: bool = False) -> Tensor:
    """mapping[key] as int64 or float32 [B, S] on the host."""
    tensor = torch.as_tensor(mapping[key]).cpu()
    if tensor.dim() != 2 or (like_BS is not None and tensor.shape != like_BS.shape):
        expected_shape = "[B, S]" if like_BS is None else f"that of input_ids, {tuple(like_BS.shape)}"
        raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, wanted {expected_shape}")
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
