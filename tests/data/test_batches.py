"""Batches: every sequence once an epoch, in the right layout, the same from any starting point."""

import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data.batch import Counts, Packing, assemble
from fastdistil.data.batches import Batches, evaluation_batches
from fastdistil.data.epoch_plan import grouped_plan, packed_plan, shuffled
from fastdistil.data.sources import from_mappings, prefetched
from fastdistil.errors import UserError
from fastdistil.recipe import Data, Mask

LAYOUTS = ["packed", "length-grouped"]
SPECIAL = np.array([0, 1, 2, 3])
PAD, MASK_ID = 0, 3


@dataclass
class Facts:
    vocab_size: int
    mask_id: int | None = MASK_ID
    pad_id: int = PAD
    special_ids: np.ndarray = field(default_factory=lambda: SPECIAL)

    def __post_init__(self):
        self.continues = np.arange(self.vocab_size) % 3 == 2
        self.continues[self.special_ids] = False
        self.ends = np.zeros(self.vocab_size, bool)
        self.marks_words = True


class Memory:
    """A corpus in memory: a list of token lists."""

    def __init__(self, sequences, vocab_size=None):
        self.sequences = [np.asarray(sequence, np.int64) for sequence in sequences]
        self.lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        tokens = np.concatenate(self.sequences) if self.sequences else np.zeros(0, np.int64)
        self.counts = np.bincount(tokens, minlength=vocab_size or 0)
        self.facts = Facts(len(self.counts))

    def gather(self, sequences):
        return np.concatenate([self.sequences[i] for i in sequences])

    def __len__(self):
        return len(self.sequences)


def named(lengths):
    """Sequence i consists of the token 10 + i, so that a batch shows where its tokens come from."""
    return Memory([[10 + i] * length for i, length in enumerate(lengths)])


def texts(n, low=3, high=40, seed=0, special=0.0):
    """Random tokens between 1 and 2; `special` of the inner ones are special, too."""
    draw = np.random.default_rng(seed)
    inner = [draw.integers(4, 100, draw.integers(low, high + 1) - 2) for _ in range(n)]
    return Memory([[1, *np.where(draw.random(len(ids)) < special, 0, ids), 2] for ids in inner], 100)


def make(corpus, *, layout="packed", budget=64, bin_width=4, mask=None, causal=False, seed=1, accumulation=1, **ranks):
    data = Data(layout=layout, micro_batch_tokens=budget, bin_width=bin_width)
    return Batches(corpus, corpus.facts, data, mask or Mask(), seed=seed, accumulation=accumulation, causal=causal, **ranks)


def epoch_of(batches, epoch):
    return [batches.window(epoch, update) for update in range(batches.updates_per_epoch(epoch))]


def rows(batch):
    """Of each sequence: its rows in the flattened batch."""
    if batch.packing is not None:
        ends = batch.packing.cu_seqlens.tolist()
        return [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    width = batch.ids_BS.shape[1]
    return [np.arange(length) + i * width for i, length in enumerate(batch.attention_mask_BS.sum(1).tolist())]


def same(one, other):
    assert one.index == other.index
    assert one.counts == other.counts
    for name in ("ids_BS", "positions_BS", "labels_N", "label_rows"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=60)


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
    assert total == Counts(float(sum(lengths)), sum(lengths), sum(lengths) - len(lengths), len(lengths), len(numbers))


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
    batches = evaluation_batches(corpus, corpus.facts, np.array([0, 2]), batch_tokens=9, causal=True, layout="length-grouped")
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
                masked_of_text[tuple(restored[place].tolist())] = (tuple(ids[place].tolist()), tuple(labels[place].tolist()))
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
    again = grouped_plan(lengths, shuffled(6000, seed=3, epoch=1), budget, bin_width=width, ranks=ranks, seed=3, epoch=1)
    assert not np.array_equal(again.order_n, plan.order_n)


def test_leftovers_of_a_bin_are_dealt_to_all_ranks_alike():
    lengths = np.array([8] * 4 + [16] * 4)
    plan = grouped_plan(lengths, shuffled(8, seed=0, epoch=0), 32, bin_width=8, ranks=4, seed=0, epoch=0)
    assert [sorted(lengths[plan.sequences(b, b + 1)].tolist()) for b in range(len(plan))] == [[8, 16]] * 4


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
    batch = assemble(np.array([7, 8, 7, 8]), np.array([2, 2]), np.array([1, 2]), np.array([5, 6]), index=(0, 9))
    assert batch.labels_N.tolist() == [-100, 5, 6, -100]
    assert batch.index == (0, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_masks_depend_on_the_seed_alone(layout):
    corpus = texts(80)
    corpus.counts = corpus.counts * np.arange(100)  # frequencies do not matter in evaluation

    def masks(**options):
        places = set()
        for batch in evaluation_batches(corpus, corpus.facts, **{"batch_tokens": 100, "layout": layout} | options):
            assert batch.ids_BS.numel() <= options.get("batch_tokens", 100)
            labels = batch.labels_N[batch.label_rows].tolist()
            positions = batch.positions_BS.flatten()[batch.label_rows].tolist()
            for sequence, position, label in zip(batch.sequence_of_label.tolist(), positions, labels, strict=True):
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


class Counting:
    """Batches that count how many windows were asked for."""

    def __init__(self, updates, prefetch=2, fail_at=None):
        self.data, self.updates, self.fail_at = Data(prefetch=prefetch), updates, fail_at
        self.made = 0
        self.changed = threading.Condition()

    def updates_per_epoch(self, epoch):
        return self.updates

    def window(self, epoch, update):
        with self.changed:
            self.made += 1
            self.changed.notify_all()
        if (epoch, update) == self.fail_at:
            raise UserError("the shard is gone; bring it back")
        return [], Counts(tokens=100 * epoch + update)

    def wait_until_made(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: self.made >= count, timeout=60)


def test_prefetched_windows_are_the_ones_asked_for():
    corpus = texts(60)
    direct = make(corpus, accumulation=2)
    expected = [(epoch, update) for epoch in (1, 2) for update in range(direct.updates_per_epoch(epoch))][2:]
    with prefetched(make(corpus, accumulation=2), 1, 2, epochs=3) as windows:
        items = list(windows)
    assert [(item.epoch, item.update) for item in items] == expected
    for item in items:
        window, counts = direct.window(item.epoch, item.update)
        assert item.denominators == counts
        for one, other in zip(item.window, window, strict=True):
            same(one, other)


def test_prefetching_is_bounded():
    source = Counting(200, prefetch=3)
    with prefetched(source) as windows:
        for taken in range(1, 101):
            assert next(windows).denominators.tokens == taken - 1
            source.wait_until_made(taken + 3)
            assert source.made <= taken + 4  # three ready, one in the making
    assert not making_windows()


def making_windows():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastdistil-batches")]


def test_what_the_thread_raises_reaches_the_consumer_in_its_turn():
    with prefetched(Counting(10, fail_at=(1, 2))) as windows:
        for _ in range(12):
            next(windows)
        for _ in range(2):
            with pytest.raises(UserError, match="the shard is gone"):
                next(windows)


def test_closing_ends_the_thread_wherever_it_is():
    full = Counting(10, prefetch=1)
    with prefetched(full) as windows:
        full.wait_until_made(2)  # one ready, one that waits for room
        assert making_windows()
    assert not making_windows()
    assert list(windows) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefetched_batches_are_page_locked_for_a_gpu():
    corpus = texts(60)
    direct = make(corpus)
    with prefetched(make(corpus), epochs=1, pin_for=torch.device("cuda", 0)) as windows:
        for item in windows:
            for batch, plain in zip(item.window, direct.window(item.epoch, item.update)[0], strict=True):
                assert batch.ids_BS.is_pinned()
                assert batch.packing.cu_seqlens.is_pinned()
                moved = batch.to("cuda", non_blocking=True)
                assert moved.packing.cu_seqlens.is_cuda
                torch.cuda.synchronize()
                same(moved.to("cpu"), plain)


def test_own_masked_batches():
    mapping = {
        "input_ids": torch.tensor([[5, 3, 7], [3, 9, 0]], dtype=torch.int32),
        "attention_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "labels": [[-100, 6, -100], [8, -100, -100]],
        "weights": np.array([[1, 0.5, 0], [2, 1, 9]]),
        "token_type_ids": None,
    }
    (batch,) = from_mappings([mapping], causal=False, vocab_size=10)
    assert batch.ids_BS.tolist() == [[5, 3, 7], [3, 9, 0]]
    assert batch.ids_BS.dtype == batch.labels_N.dtype == batch.attention_mask_BS.dtype == torch.int64
    assert batch.labels_N.tolist() == [-100, 6, -100, 8, -100, -100]
    assert batch.label_rows.tolist() == [1, 3]
    assert batch.valid_rows.tolist() == [0, 1, 2, 3, 4]
    assert batch.positions_BS.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.weights_N.dtype == torch.float32
    assert batch.counts == Counts(4.5, 5, 2, 2, 1)  # the weight on padding does not count
    assert batch.packing is None
    (bare,) = from_mappings([{"input_ids": [[5, 6]]}], causal=False)
    assert bare.counts == Counts(2.0, 2, 0, 1, 1)
    assert bare.valid_rows is None
    assert bare.attention_mask_BS.tolist() == [[1, 1]]


def test_own_causal_batches_are_shifted_and_know_both_paddings():
    mapping = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
    }
    (batch,) = from_mappings([mapping], causal=True)
    assert batch.labels_N.tolist() == [6, 7, -100, -100, -100, -100, 9, -100]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0], [0, 0, 0, 1]]
    assert batch.counts == Counts(5.0, 5, 3, 2, 1)
    labels = torch.tensor([[-100, -100, 7, -100], [-100, -100, 8, 9]])
    (batch,) = from_mappings([mapping | {"labels": labels}], causal=True)
    assert batch.labels_N.tolist() == [-100, 7, -100, -100, -100, -100, 9, -100]
    assert batch.label_rows.tolist() == [1, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"wanted a mapping with input_ids, got list"),
        ({"input_ids": None}, r"wanted a mapping with input_ids"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has the shape \(2,\), wanted \[B, S\]"),
        ({"input_ids": torch.ones(1, 2)}, r"input_ids has the type torch\.float32, wanted integers"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.int64)}, r"input_ids are empty"),
        ({"input_ids": [[1, 10]]}, r"input_ids hold 10, the vocabulary has 10 ids"),
        ({"input_ids": [[1, -1]]}, r"input_ids hold -1; token ids are at least 0"),
        ({"input_ids": [[1, 2], [3]]}, r"expected sequence of length 2"),
        ({"input_ids": [[object(), 2]]}, r"object"),
        ({"labels": [[1, 2, 3]]}, r"labels has the shape \(1, 3\), wanted that of input_ids, \(1, 2\)"),
        ({"labels": [[1, 10]]}, r"labels hold 10"),
        ({"labels": [[1, -1]]}, r"labels hold -1"),
        ({"attention_mask": [[1, 2]]}, r"attention_mask must hold only 0 and 1"),
        ({"attention_mask": [[1, 0]], "labels": [[1, 2]]}, r"labels are given where attention_mask is 0"),
        ({"weights": [[1.0, -1.0]]}, r"weights must be finite and at least 0"),
        ({"weights": [[1.0, float("nan")]]}, r"weights must be finite"),
        ({"weights": [[1.0]]}, r"weights has the shape \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_own_batches_are_checked(change, message, causal):
    good = {"input_ids": [[1, 2]]}
    bad = [1, 2] if change is None else good | change
    batches = from_mappings([good, bad], causal=causal, vocab_size=10)
    assert next(batches).counts.tokens == 2
    with pytest.raises(UserError, match=r"batch 1 of your own iterable: .*" + message) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
