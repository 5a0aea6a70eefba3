"""Where windows come from: a thread that makes them ahead, or a user's own batches."""

import threading

import numpy as np
import pytest
import torch

from fastdistil.data.batch import Counts
from fastdistil.data.sources import from_mappings, prefetched
from fastdistil.errors import UserError
from fastdistil.recipe import Data
from tests.data.memory_corpus import make, same, texts


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
