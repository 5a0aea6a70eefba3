"""One micro-batch: the tensors that models and losses see, and the counts that divide sums over it.

Shapes: n sequences, T tokens, B rows of S, N = B * S, M labels.
"""

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistil.data.ragged import Ints, offsets

NO_LABEL = -100
BatchLayout = Literal["packed", "length-grouped"]


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
        return Counts(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))


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
        """Describe sequences laid end to end; their lengths must ascend."""
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


class TokenSequences(Protocol):
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
    layout: BatchLayout = "packed",
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
