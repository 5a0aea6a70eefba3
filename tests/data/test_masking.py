"""Masks: rate, distribution, shares, whole words, and that nothing but (seed, epoch, sequence, position) decides them."""

from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from math import floor, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistil.data.masking import choose_targets, mask_table, mask_tokens
from fastdistil.data.ragged import hashed, offsets, ranges, uniform, update_seed
from fastdistil.errors import UserError
from fastdistil.recipe import Mask

V = 60
SPECIAL = np.array([0, 1, 2, 3])
MASK_ID = 3
CONTINUES_FROM = 40  # tokens 40 ... 59 continue a word


@dataclass
class Facts:
    vocab_size: int = V
    mask_id: int | None = MASK_ID
    pad_id: int = 0

    def __post_init__(self):
        self.special_ids = SPECIAL
        self.continues = np.arange(V) >= CONTINUES_FROM
        self.ends = np.zeros(V, bool)
        self.marks_words = True


COUNTS = np.random.default_rng(3).integers(0, 10_000, V) ** 2


def table(counts=COUNTS, **mask):
    return mask_table(Mask(**mask), Facts(), counts)


def random_sequences(lengths, seed=0, low=4):
    """Tokens of sequences end to end: token 1, ordinary ones, token 2."""
    lengths = np.asarray(lengths)
    ids = np.random.default_rng(seed).integers(low, V, lengths.sum())
    starts = offsets(lengths)
    ids[starts[:-1]] = 1
    ids[starts[1:] - 1] = 2
    return ids, lengths, np.arange(len(lengths))


def chi_square_is_plausible(observed, expected):
    """Pearson's statistic against its mean and deviation, cells of less than 5 pooled; both sides may err by 5 deviations."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    return statistic < freedom + 5 * sqrt(2 * freedom)


def test_hash_is_splitmix64():
    # The first outputs of the published generator for the seed 1234567: its state grows by a constant.
    states = (1234567 + np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert hashed(states).tolist() == published


def test_uniform_never_touches_its_ends():
    ends = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert 0.0 < ends[0] < 2.0**-52
    assert 1.0 - 2.0**-52 < ends[1] < 1.0


def test_order_of_counters_matters():
    assert hashed(1, 2) != hashed(2, 1)
    assert len({update_seed(seed, update, rank) for seed in (0, 1) for update in range(10) for rank in (0, 1)}) == 40
    assert 0 <= update_seed(2**63 - 1, 10**9) < 2**63


def test_rate_is_exact_on_average_and_within_one_of_it_in_every_sequence():
    ids, lengths, sequences = random_sequences(np.random.default_rng(1).integers(5, 90, 4000))
    targets = choose_targets(table(), ids, lengths, sequences, seed=7, epoch=2)
    targets_per_seq = np.diff(np.searchsorted(targets, offsets(lengths)))
    aim = 0.15 * lengths
    assert np.all((targets_per_seq == np.floor(aim)) | (targets_per_seq == np.ceil(aim)))
    fraction = aim - np.floor(aim)
    deviation = sqrt((fraction * (1 - fraction)).sum())
    assert abs(targets_per_seq.sum() - aim.sum()) < 4 * deviation
    assert deviation < 0.005 * aim.sum()  # the bound is a tight one
    assert len(np.unique(targets)) == len(targets)
    assert np.all(np.diff(targets) > 0)
    assert not np.isin(ids[targets], SPECIAL).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_sets_of_targets_are_drawn_as_by_weighted_draws_without_replacement(smoothing):
    tokens, draws, k = np.arange(4, 14), 20_000, 3
    counts = np.ones(V, np.int64)
    counts[tokens] = 4 ** np.arange(10)
    counts[tokens[0]] = 0  # a token that the corpus never counted weighs as one seen once
    # 12 tokens with the special ones, of which 3 are drawn whatever the uniform.
    ids = np.tile(np.concatenate([[1], tokens, [2]]), draws)
    drawn = choose_targets(
        table(counts, probability=0.25, smoothing=smoothing), ids, np.full(draws, 12), np.arange(draws), seed=1, epoch=0
    )
    sets = Counter(map(tuple, (drawn.reshape(draws, k) % 12 - 1).tolist()))

    def probabilities(weights):
        exact = Counter()
        for first, second, third in permutations(range(10), 3):
            remaining_weight = 1.0
            chance = 1.0
            for token in (first, second, third):
                chance *= weights[token] / remaining_weight
                remaining_weight -= weights[token]
            exact[tuple(sorted((first, second, third)))] += chance
        return exact

    weights = np.maximum(counts[tokens], 1.0) ** -smoothing
    exact = probabilities(weights / weights.sum())
    assert sum(exact.values()) == pytest.approx(1.0)
    cells = sorted(exact)
    observed = [sets[cell] for cell in cells]
    assert sum(observed) == draws
    assert chi_square_is_plausible(observed, [draws * exact[cell] for cell in cells])
    # The test can tell: slightly different weights are refused.
    other = np.maximum(counts[tokens], 1.0) ** -(smoothing + 0.05)
    wrong = probabilities(other / other.sum())
    assert not chi_square_is_plausible(observed, [draws * wrong[cell] for cell in cells])


def test_no_smoothing_underflows():
    counts = np.full(V, 10**12)
    counts[10] = 1
    ids = np.array([1, 10, 20, 21, 22, 2])
    targets = choose_targets(
        table(counts, probability=0.5, smoothing=300.0), ids, np.array([6]), np.array([0]), seed=0, epoch=0
    )
    assert len(targets) == 3
    assert 1 in targets  # the rare token wins surely


def test_shares_and_random_ids():
    ids, lengths, sequences = random_sequences(np.full(3000, 60))
    shares = table(mask=0.7, keep=0.1, random=0.2)
    masked_ids, targets = mask_tokens(shares, ids, lengths, sequences, seed=1, epoch=0)
    untargeted = np.setdiff1d(np.arange(len(ids)), targets)
    assert np.array_equal(masked_ids[untargeted], ids[untargeted])
    total = len(targets)
    masked = (masked_ids[targets] == MASK_ID).sum()
    changed = masked_ids[targets][(masked_ids[targets] != MASK_ID) & (masked_ids[targets] != ids[targets])]
    same = total - masked - len(changed)
    ordinary = V - len(SPECIAL)
    for count, share in ((masked, 0.7), (len(changed), 0.2 * (1 - 1 / ordinary)), (same, 0.1 + 0.2 / ordinary)):
        assert abs(count - share * total) < 4 * sqrt(total * share * (1 - share))
    assert not np.isin(changed, SPECIAL).any()
    # Of the random ids those that hit the token itself cannot be seen; given the others, each token is as likely as it is
    # absent from the targets that drew.
    drew = targets[(masked_ids[targets] != MASK_ID) & (masked_ids[targets] != ids[targets])]
    draws_per_token = np.bincount(ids[drew], minlength=V)
    expected = (len(drew) - draws_per_token) / (ordinary - 1)
    expected[SPECIAL] = 0
    assert chi_square_is_plausible(np.bincount(changed, minlength=V), expected)


@pytest.mark.parametrize(("shares", "action"), [((1, 0, 0), "mask"), ((0, 1, 0), "keep"), ((0, 0, 1), "random")])
def test_a_share_of_one_leaves_nothing_to_the_others(shares, action):
    ids, lengths, sequences = random_sequences(np.full(200, 40))
    only = table(mask=shares[0], keep=shares[1], random=shares[2])
    masked_ids, targets = mask_tokens(only, ids, lengths, sequences, seed=1, epoch=0)
    assert len(targets) > 1000
    match action:
        case "mask":
            assert np.all(masked_ids[targets] == MASK_ID)
        case "keep":
            assert np.array_equal(masked_ids, ids)
        case "random":
            assert not np.isin(masked_ids[targets], SPECIAL).any()
            assert (masked_ids[targets] != ids[targets]).mean() > 0.9


def split(values, lengths):
    return np.split(values, offsets(lengths)[1:-1])


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    whole_word=st.booleans(),
    special=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
def test_a_sequence_gets_its_mask_whatever_lies_around_it(lengths, whole_word, special, seed, epoch, order):
    ids, lengths, _ = random_sequences(lengths)
    if not special:  # then only the lengths say that a word does not go on in the next sequence
        ids = np.where(ids < 4, V - 1, ids)
    sequences = np.arange(len(lengths)) * 1_000_003  # far apart, as in a large corpus
    one = table(whole_word=whole_word, probability=0.4)
    together = split(mask_tokens(one, ids, lengths, sequences, seed=seed, epoch=epoch)[0], lengths)
    chosen = order.sample(range(len(lengths)), order.randint(1, len(lengths)))
    pieces = split(ids, lengths)
    apart = split(
        mask_tokens(
            one, np.concatenate([pieces[i] for i in chosen]), lengths[chosen], sequences[chosen], seed=seed, epoch=epoch
        )[0],
        lengths[chosen],
    )
    for i, piece in zip(chosen, apart, strict=True):
        assert np.array_equal(piece, together[i])


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_of_another_epoch_seed_or_sequence_are_independent(whole_word):
    ids, lengths, sequences = random_sequences(np.full(2000, 50))
    one = table(whole_word=whole_word, smoothing=0.0)
    base = set(choose_targets(one, ids, lengths, sequences, seed=1, epoch=0).tolist())
    others = [
        choose_targets(one, ids, lengths, sequences, seed=1, epoch=1),
        choose_targets(one, ids, lengths, sequences, seed=2, epoch=0),
        choose_targets(one, ids, lengths, sequences + 2000, seed=1, epoch=0),
    ]
    for other in others:
        # Two independent draws of 15.6% of the ordinary tokens have that share in common.
        assert 0.13 < len(base & set(other.tolist())) / len(base) < 0.185
    assert base == set(choose_targets(one, ids, lengths, sequences, seed=1, epoch=0).tolist())


def words_of(ids, start):
    """A literal reading of WordPiece: [first, last + 1) of every word of one sequence whose tokens begin at `start`."""
    words = []
    for i, token in enumerate(ids.tolist()):
        if token in SPECIAL:
            words.append(None)
        elif token >= CONTINUES_FROM and words and words[-1] is not None:
            words[-1][1] = start + i + 1
        else:
            words.append([start + i, start + i + 1])
    return [tuple(word) for word in words if word is not None]


def test_whole_words_are_masked_whole_at_the_same_rate():
    ids, lengths, sequences = random_sequences(np.random.default_rng(2).integers(3, 90, 6000))
    ids[np.random.default_rng(4).integers(0, len(ids), 3000)] = 0  # special tokens inside sequences end words, too
    targets = choose_targets(table(whole_word=True), ids, lengths, sequences, seed=5, epoch=1)
    chosen = np.zeros(len(ids), bool)
    chosen[targets] = True
    starts, longer = offsets(lengths), 0
    errors = []
    for piece, start, length in zip(split(ids, lengths), starts, lengths.tolist(), strict=False):
        words = words_of(piece, int(start))
        for first, last in words:
            assert chosen[first:last].all() == chosen[first:last].any()
            longer += (last - first > 1) and bool(chosen[first])
        sizes = [last - first for first, last in words]
        maskable = sum(sizes)
        if maskable > 0.15 * length + 1:
            got = int(chosen[start : start + length].sum())
            errors.append(got - 0.15 * length)
            assert abs(got - 0.15 * length) <= max(sizes) + 1
    assert longer > 1000
    assert not np.isin(ids[targets], SPECIAL).any()
    assert abs(np.mean(errors)) < 4 * np.std(errors) / sqrt(len(errors))
    assert np.std(errors) / sqrt(len(errors)) < 0.05 * 0.15 * lengths.mean()


def test_a_word_is_drawn_with_the_mean_weight_of_its_tokens():
    draws = 20_000
    counts = np.ones(V, np.int64)
    counts[[10, 11, 12, 41, 42, 43]] = [2, 8, 4, 32, 2, 4]
    words = [[10, 41, 42], [11], [12, 43]]
    ids = np.tile(np.concatenate([[1], *words, [2]]), draws)
    # One target of 8 tokens: the first word of the race crosses it, and is taken with probability 1 / its length.
    one = table(counts, whole_word=True, smoothing=1.0, probability=0.125)
    targets = choose_targets(one, ids, np.full(draws, 8), np.arange(draws), seed=1, epoch=0)
    firsts = np.bincount(targets % 8, minlength=8)[[1, 4, 5]]
    means = np.array([np.mean([1 / counts[token] for token in word]) for word in words])
    chances = means / means.sum() / np.array([len(word) for word in words])
    observed = np.append(firsts, draws - firsts.sum())
    assert chi_square_is_plausible(observed, draws * np.append(chances, 1 - chances.sum()))
    sums = np.array([sum(1 / counts[token] for token in word) for word in words])
    wrong = sums / sums.sum() / np.array([len(word) for word in words])
    assert not chi_square_is_plausible(observed, draws * np.append(wrong, 1 - wrong.sum()))


@pytest.mark.parametrize("whole_word", [False, True])
def test_no_more_targets_than_maskable_tokens(whole_word):
    ids = np.array([1, 10, 0, 0, 0, 0, 0, 0, 0, 2, 1, 2, 1])
    targets = choose_targets(
        table(probability=0.9, whole_word=whole_word), ids, np.array([10, 2, 1]), np.arange(3), seed=0, epoch=0
    )
    assert targets.tolist() == [1]
    assert floor(0.9 * 10) > 1


def test_whole_words_of_a_sequence_are_all_masked_when_the_target_says_so():
    ids = np.array([10, 41, 42, 11, 12, 43])
    for sequence in range(20):
        targets = choose_targets(
            table(probability=0.999999, whole_word=True), ids, np.array([6]), np.array([sequence]), seed=0, epoch=0
        )
        assert targets.tolist() == list(range(6))


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match="mask token, and this one has none"):
        mask_table(Mask(), Facts(mask_id=None), COUNTS)
    with pytest.raises(UserError, match=rf"59 token ids and the tokenizer has {V}; prepare"):
        mask_table(Mask(), Facts(), COUNTS[1:])
    unmarked = Facts()
    unmarked.marks_words = False
    with pytest.raises(UserError, match=r"mask\.whole_word needs a vocabulary that marks"):
        mask_table(Mask(whole_word=True), unmarked, COUNTS)
    mask_table(Mask(), unmarked, COUNTS)


def test_ranges_is_one_arange_after_another():
    starts, lengths = np.array([5, 0, 9, 9]), np.array([2, 0, 3, 1])
    assert ranges(starts, lengths).tolist() == [5, 6, 9, 10, 11, 9]
