"""The plan of an epoch: which sequences share a batch, and which rank gets it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil.data.epoch_plan import grouped_plan, packed_plan, shuffled
from tests.data.memory_corpus import lengths_lists


@given(lengths=lengths_lists, budget=st.integers(30, 100))
def test_packing_is_next_fit(lengths, budget):
    expected, batch = [], []
    for i, length in enumerate(lengths):
        if sum(lengths[j] for j in batch) + length > budget:
            expected.append(batch)
            batch = []
        batch.append(i)
    expected.append(batch)
    plan = packed_plan(np.array(lengths, np.int32), np.arange(len(lengths)), budget)
    assert [plan.sequences(b, b + 1).tolist() for b in range(len(plan))] == expected


def test_shuffling_is_a_permutation_of_seed_and_epoch():
    orders = [tuple(shuffled(500, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    for order in orders:
        assert sorted(order) == list(range(500))
        # Nothing of the corpus's order is left: the correlation of 500 places has a deviation of 0.045.
        assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 0.2
    assert tuple(shuffled(500, seed=1, epoch=1)) == orders[3]


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_get_one_bin_and_equal_rows_in_the_same_step(ranks):
    lengths, width, budget = np.random.default_rng(0).integers(1, 65, 6000), 8, 512
    order = shuffled(6000, seed=3, epoch=0)
    plan = grouped_plan(lengths, order, budget, bin_width=width, ranks=ranks, seed=3, epoch=0)
    mixed = padded = 0
    steps = [range(b, min(b + ranks, len(plan))) for b in range(0, len(plan), ranks)]
    for step in steps:
        batches = [lengths[plan.sequences(b, b + 1)] for b in step]
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
        bins = {int(length - 1) // width for batch in batches for length in batch}
        mixed += len(bins) > 1
        assert max(bins) - min(bins) <= 1  # leftovers only join their neighbour
        assert all(batch.max() * len(batch) <= budget for batch in batches)
        padded += sum(int(batch.max()) * len(batch) for batch in batches)
    assert mixed <= 64 // width
    assert padded - lengths.sum() < 6000 * width / 2  # half a bin's width of padding on average
    # The sets are shuffled: the widths of following steps have nothing to do with each other.
    widths = [int(lengths[plan.sequences(step[0], step[0] + 1)].max()) for step in steps]
    assert abs(np.corrcoef(widths[1:], widths[:-1])[0, 1]) < 0.3
    again = grouped_plan(
        lengths,
        shuffled(6000, seed=3, epoch=1),
        budget,
        bin_width=width,
        ranks=ranks,
        seed=3,
        epoch=1,
    )
    assert not np.array_equal(again.order_n, plan.order_n)


def test_leftovers_of_a_bin_are_dealt_to_all_ranks_alike():
    lengths = np.array([8] * 4 + [16] * 4)
    plan = grouped_plan(lengths, shuffled(8, seed=0, epoch=0), 32, bin_width=8, ranks=4, seed=0, epoch=0)
    assert [sorted(lengths[plan.sequences(b, b + 1)].tolist()) for b in range(len(plan))] == [[8, 16]] * 4
