"""Batches: every sequence once an epoch, in the right layout, the same from any starting point."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data.batch import Counts, Packing, assemble
from fastdistil.data.batches import evaluation_batches
from fastdistil.errors import UserError
from fastdistil.recipe import Mask
from tests.data.memory_corpus import LAYOUTS, PAD, Memory, lengths_lists, make, named, same, texts


def epoch_of(batches, epoch):
    return [batches.window(epoch, update) for update in range(batches.updates_per_epoch(epoch))]


def rows(batch):
    """Of each sequence: its rows in the flattened batch."""
    if batch.packing is not None:
        ends = batch.packing.cu_seqlens.tolist()
        return [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    width = batch.ids_BS.shape[1]
    return [np.arange(length) + i * width for i, length in enumerate(batch.attention_mask_BS.sum(1).tolist())]


@settings(max_examples=150)
@given(
    lengths=lengths_lists,
    layout=st.sampled_from(LAYOUTS),
    budget=st.integers(30, 200),
    bin_width=st.integers(1, 40),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_sequence_is_used_once_an_epoch(lengths, layout, budget, bin_width, accumulation, ranks, epoch):
    corpus = named(lengths)
    everyone = [
        make(
            corpus,
            layout=layout,
            budget=budget,
            bin_width=bin_width,
            causal=True,
            accumulation=accumulation,
            rank=r,
            ranks=ranks,
        )
        for r in range(ranks)
    ]
    assert len({batches.updates_per_epoch(epoch) for batches in everyone}) == 1
    used, total, numbers = Counter(), Counts(), []
    for update in range(everyone[0].updates_per_epoch(epoch)):
        windows = [batches.window(epoch, update) for batches in everyone]
        for rank, (window, denominators) in enumerate(windows):
            assert denominators == sum((batch.counts for others, _ in windows for batch in others), Counts())
            for micro, batch in enumerate(window):
                assert batch.index == (epoch, (update * accumulation + micro) * ranks + rank)
                assert batch.ids_BS.numel() <= budget
                numbers.append(batch.index[1])
                ids = batch.ids_BS.flatten().numpy()
                for place in rows(batch):
                    (token,) = set(ids[place].tolist())
                    assert len(place) == lengths[token - 10]
                    used[token - 10] += 1
        total += windows[0][1]
        sizes = [len(window) for window, _ in windows]
        assert max(sizes) - min(sizes) <= 1
        if update + 1 < everyone[0].updates_per_epoch(epoch):
            assert set(sizes) == {accumulation}
        assert max(sizes) > 0
    assert used == Counter(range(len(lengths)))
    assert sorted(numbers) == list(range(len(numbers)))
    assert total == Counts(
        float(sum(lengths)),
        sum(lengths),
        sum(lengths) - len(lengths),
        len(lengths),
        len(numbers),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_window_holds_what_is_left(layout):
    corpus = named([10] * 5)
    two = [make(corpus, layout=layout, budget=10, causal=True, accumulation=2, rank=rank, ranks=2) for rank in (0, 1)]
    assert [batches.updates_per_epoch(0) for batches in two] == [2, 2]
    assert [len(batches.window(0, 0)[0]) for batches in two] == [2, 2]
    (window, counts), (nothing, other_counts) = (batches.window(0, 1) for batches in two)
    assert [batch.index for batch in window] == [(0, 4)]
    assert nothing == []
    assert counts == other_counts == Counts(10.0, 10, 9, 1, 1)
    with pytest.raises(IndexError, match="epoch 0 has 2 updates, asked for number 2"):
        two[0].window(0, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Mask(), Mask(whole_word=True), Mask(probability=0.8), None])
def test_denominators_count_what_all_ranks_hold(layout, mask):
    corpus = texts(150, special=0.5)
    kind = {"causal": True} if mask is None else {"mask": mask}
    everyone = [make(corpus, layout=layout, accumulation=2, rank=rank, ranks=3, **kind) for rank in range(3)]
    capped = 0
    for windows in zip(*(epoch_of(batches, 1) for batches in everyone), strict=True):
        held = [batch for window, _ in windows for batch in window]
        for _, counts in windows:
            assert counts.tokens == sum(int(batch.attention_mask_BS.sum()) if batch.packing is None else batch.ids_BS.numel()
                                        for batch in held)  # fmt: skip
            assert counts.labels == sum(int((batch.labels_N != -100).sum()) for batch in held)
            assert counts.sequences == sum(len(rows(batch)) for batch in held)
            assert counts.valid == counts.tokens
            capped += counts.labels < 0.8 * counts.tokens - counts.sequences
    if mask is not None and mask.probability == 0.8:
        assert capped > 0  # here sequences run out of maskable tokens, and the counts know it


def test_packed_batch_in_full():
    corpus = Memory([[11, 12, 13], [21], [31, 32, 33], [41, 42]], 50)
    (batch,) = list(evaluation_batches(corpus, corpus.facts, batch_tokens=9, causal=True))
    assert batch.ids_BS.tolist() == [[21, 41, 42, 11, 12, 13, 31, 32, 33]]
    assert batch.positions_BS.tolist() == [[0, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch.labels_N.tolist() == [-100, 42, -100, 12, 13, -100, 32, 33, -100]
    assert batch.label_rows.tolist() == [1, 3, 4, 6, 7]
    assert batch.sequence_of_label.tolist() == [3, 0, 0, 2, 2]
    assert batch.packing.cu_seqlens.tolist() == [0, 1, 3, 6, 9]
    assert batch.packing.cu_seqlens.dtype == torch.int32
    assert batch.packing.max_seqlen == 3
    assert batch.packing.groups == ((1, 0, 1), (2, 1, 1), (3, 3, 2))
    assert batch.counts == Counts(9.0, 9, 5, 4, 1)
    assert batch.attention_mask_BS is None
    assert batch.valid_rows is None
    assert batch.weights_N is None


def test_padded_batch_in_full():
    corpus = Memory([[11, 12, 13], [21], [41, 42]], 50)
    batches = evaluation_batches(
        corpus,
        corpus.facts,
        np.array([0, 2]),
        batch_tokens=9,
        causal=True,
        layout="length-grouped",
    )
    (batch,) = list(batches)
    assert batch.ids_BS.tolist() == [[41, 42, PAD], [11, 12, 13]]
    assert batch.positions_BS.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels_N.tolist() == [42, -100, -100, 12, 13, -100]
    assert batch.label_rows.tolist() == [0, 3, 4]
    assert batch.valid_rows.tolist() == [0, 1, 3, 4, 5]
    assert batch.sequence_of_label.tolist() == [2, 0, 0]
    assert batch.packing is None
    assert batch.counts == Counts(5.0, 5, 3, 2, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("whole_word", [False, True])
def test_a_masked_batch_differs_from_its_text_only_where_it_has_labels(layout, whole_word):
    corpus = texts(200)
    matches = 0
    originals = {tuple(sequence.tolist()) for sequence in corpus.sequences}
    for window, _ in epoch_of(make(corpus, layout=layout, mask=Mask(whole_word=whole_word)), 0):
        for batch in window:
            ids, labels = batch.ids_BS.flatten().numpy(), batch.labels_N.numpy()
            assert batch.label_rows.tolist() == np.flatnonzero(labels != -100).tolist()
            restored = np.where(labels != -100, labels, ids)
            matches += sum(tuple(restored[place].tolist()) in originals for place in rows(batch))
    assert matches == 200
    assert len(originals) > 190


def masks_by_text(batches, epoch):
    """The masked ids and labels of every sequence of an epoch, under the sequence's own text."""
    masked_of_text = {}
    for window, _ in epoch_of(batches, epoch):
        for batch in window:
            ids, labels = batch.ids_BS.flatten().numpy(), batch.labels_N.numpy()
            restored = np.where(labels != -100, labels, ids)
            for place in rows(batch):
                masked_of_text[tuple(restored[place].tolist())] = (
                    tuple(ids[place].tolist()),
                    tuple(labels[place].tolist()),
                )
    return masked_of_text


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_do_not_depend_on_layout_batch_or_ranks(whole_word):
    corpus = texts(120, low=8)
    mask = Mask(whole_word=whole_word)
    one = masks_by_text(make(corpus, mask=mask, budget=50), 3)
    assert len(one) == 120
    assert masks_by_text(make(corpus, mask=mask, budget=500), 3) == one
    assert masks_by_text(make(corpus, mask=mask, layout="length-grouped", accumulation=3), 3) == one
    parts = [masks_by_text(make(corpus, mask=mask, rank=rank, ranks=2), 3) for rank in (0, 1)]
    assert parts[0] | parts[1] == one
    for seed, epoch in ((1, 4), (2, 3)):
        other = masks_by_text(make(corpus, mask=mask, seed=seed), epoch)
        assert sum(other[text] != one[text] for text in one) > 80


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_window_is_the_same_without_the_ones_before(layout):
    corpus = texts(100)
    walked = make(corpus, layout=layout, accumulation=2)
    history = {(epoch, update): pair for epoch in (0, 1) for update, pair in enumerate(epoch_of(walked, epoch))}
    for epoch, update in ((1, 3), (0, 2), (1, 0)):
        window, counts = make(corpus, layout=layout, accumulation=2).window(epoch, update)
        assert counts == history[epoch, update][1]
        for one, other in zip(window, history[epoch, update][0], strict=True):
            same(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_construction_refuses_what_cannot_work(layout):
    with pytest.raises(UserError, match=r"sequence of 65 tokens and data\.micro_batch_tokens is 64"):
        make(named([3, 65]), layout=layout)
    make(named([3, 64]), layout=layout)
    with pytest.raises(UserError, match="no sequences to make batches of"):
        make(Memory([], 100), layout=layout)
    corpus = texts(5)
    corpus.facts.mask_id = None
    with pytest.raises(UserError, match="mask token"):
        make(corpus, layout=layout)
    make(corpus, layout=layout, causal=True)
    with pytest.raises(UserError, match=r"evaluation\.batch_tokens is 2"):
        evaluation_batches(corpus, corpus.facts, batch_tokens=2, causal=True, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_moves_every_tensor(layout):
    corpus = texts(4)
    (batch,) = evaluation_batches(corpus, corpus.facts, batch_tokens=200, layout=layout)
    moved = batch.to("meta")
    tensor_names = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {"ids_BS", "positions_BS", "labels_N", "label_rows", "sequence_of_label"} <= tensor_names
    assert all(getattr(moved, name).device.type == "meta" for name in tensor_names)
    if layout == "packed":
        assert moved.packing.cu_seqlens.device.type == "meta"
        assert moved.packing.groups == batch.packing.groups
    assert batch.ids_BS.device.type == "cpu"


def test_packing_wants_the_shortest_first():
    with pytest.raises(AssertionError, match="shortest"):
        Packing.of(np.array([3, 2]))


def test_assemble_is_open_to_other_labels():
    batch = assemble(
        np.array([7, 8, 7, 8]),
        np.array([2, 2]),
        np.array([1, 2]),
        np.array([5, 6]),
        index=(0, 9),
    )
    assert batch.labels_N.tolist() == [-100, 5, 6, -100]
    assert batch.index == (0, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_masks_depend_on_the_seed_alone(layout):
    corpus = texts(80)
    corpus.counts = corpus.counts * np.arange(100)  # frequencies do not matter in evaluation

    def masks(**options):
        places = set()
        for batch in evaluation_batches(
            corpus,
            corpus.facts,
            **{"batch_tokens": 100, "layout": layout} | options,
        ):
            assert batch.ids_BS.numel() <= options.get("batch_tokens", 100)
            labels = batch.labels_N[batch.label_rows].tolist()
            positions = batch.positions_BS.flatten()[batch.label_rows].tolist()
            for sequence, position, label in zip(
                batch.sequence_of_label.tolist(),
                positions,
                labels,
                strict=True,
            ):
                assert corpus.sequences[sequence][position] == label
                places.add((sequence, position))
        return places

    one = masks()
    assert len(one) > 150
    assert masks(batch_tokens=1000) == one
    assert masks(layout="packed") == one
    assert masks(seed=1) != one
    chosen = np.array([70, 3, 15])
    assert masks(sequences_n=chosen) == {(sequence, position) for sequence, position in one if sequence in chosen}
    corpus.counts = np.ones(100, np.int64)
    assert masks() == one
