"""Which sequences lie in which batch of an epoch: all of them once, in an order drawn from (seed, epoch).

Shapes: n sequences.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdistil.data.ragged import ORDER, SETS, Ints, hashed, offsets


@dataclass(frozen=True)
class EpochPlan:
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


def packed_plan(lengths_n: NDArray[Any], order_n: Ints, budget: int) -> EpochPlan:
    """Next-fit: a batch ends where the next sequence would not fit. The loop is over batches."""
    ends_n = np.cumsum(lengths_n[order_n], dtype=np.int64)
    starts, used = [0], 0
    while starts[-1] < len(order_n):
        starts.append(int(ends_n.searchsorted(used + budget, side="right")))
        used = int(ends_n[starts[-1] - 1])
    return EpochPlan(_narrow(order_n), np.array(starts, np.int64))


def grouped_plan(
    lengths_n: NDArray[Any], order_n: Ints, budget: int, *, bin_width: int, ranks: int, seed: int, epoch: int
) -> EpochPlan:
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
    return EpochPlan(_narrow(order_n[np.argsort(batch_n, kind="stable")]), offsets(np.bincount(batch_n)))


def _narrow(order_n: Ints) -> NDArray[Any]:
    return order_n.astype(np.int32) if len(order_n) < 2**31 else order_n
