"""A corpus in memory, and batches of it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from fastdistil.data.batches import Batches
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


def make(
    corpus,
    *,
    layout="packed",
    budget=64,
    bin_width=4,
    mask=None,
    causal=False,
    seed=1,
    accumulation=1,
    **ranks,
):
    data = Data(layout=layout, micro_batch_tokens=budget, bin_width=bin_width)
    return Batches(
        corpus,
        corpus.facts,
        data,
        mask or Mask(),
        seed=seed,
        accumulation=accumulation,
        causal=causal,
        **ranks,
    )


def same(one, other):
    assert one.index == other.index
    assert one.counts == other.counts
    for name in ("ids_BS", "positions_BS", "labels_N", "label_rows"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=60)
