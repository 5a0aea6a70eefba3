"""Sequences of unequal length laid end to end, and random numbers that are hashes of the counters that name them.

Whoever asks for the number of (seed, purpose, epoch, sequence, position) gets the same one in whatever order, batch or process
it asks, so nothing needs the state of a generator.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Hashes = NDArray[np.uint64]

# One stream for every use of randomness: no two uses share a number.
ORDER, SETS, TARGETS, RACE, CROSSING, ACTION, RANDOM_ID, DROPOUT = range(1, 9)


def hashed(*counters: ArrayLike) -> Hashes:
    """Chained splitmix64 (Steele, Lea, Flood 2014) of integers, broadcast together; uint64 [at least 1].

    For fixed other counters it is a bijection of the last one, so sorting by it has no ties.
    """
    state: Hashes = np.zeros(1, np.uint64)
    for counter in counters:
        state = state ^ np.atleast_1d(np.asarray(counter)).astype(np.uint64)
        state += np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(30)
        state *= np.uint64(0xBF58476D1CE4E5B9)
        state ^= state >> np.uint64(27)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def uniform(hashes: Hashes) -> Floats:
    """The upper 52 bits as a number strictly between 0 and 1 (53 would round up to 1)."""
    halves: Floats = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return halves


def update_seed(seed: int, update: int, rank: int = 0) -> int:
    """Return a seed for the generators that an update's dropout comes from: 63 bits, so that a resumed run draws the same."""
    return int(hashed(seed, DROPOUT, update, rank)[0] >> np.uint64(1))


def offsets(lengths_n: NDArray[Any]) -> Ints:
    """0 and the running sum, int64 [n + 1]: where each sequence starts and the last one ends."""
    result = np.zeros(len(lengths_n) + 1, np.int64)
    np.cumsum(lengths_n, out=result[1:])
    return result


def ranges(starts_n: Ints, lengths_n: NDArray[Any]) -> Ints:
    """start, start + 1, ... of every range laid end to end, int64 [sum of lengths]."""
    # 0, 1, 2, ... over all ranges, plus what each range's start is beyond its place there.
    ends = offsets(lengths_n)
    return np.repeat(starts_n - ends[:-1], lengths_n) + np.arange(ends[-1])
