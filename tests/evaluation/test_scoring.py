"""What a measurement is made from: the sequences and positions drawn, the windows, and the standard errors."""

import math

import numpy as np
import pytest

from fastdistil.data.corpus import Corpus
from fastdistil.data.masking import TokenFacts
from fastdistil.errors import CorruptData, UserError
from fastdistil.models.scoring import drawn_positions, drawn_sequences, ratio, sliding_windows
from tests.evaluation.references import Mostly


def test_drawn_sequences_are_a_function_of_the_seed() -> None:
    some = drawn_sequences(1000, 100, 4)
    assert np.array_equal(some, drawn_sequences(1000, 100, 4))
    assert len(np.unique(some)) == 100
    assert np.all(np.diff(some) > 0)
    assert 400 < some.mean() < 600
    assert not np.array_equal(some, drawn_sequences(1000, 100, 5))
    assert np.array_equal(drawn_sequences(7, None, 0), np.arange(7))
    assert np.array_equal(drawn_sequences(7, 8, 0), np.arange(7))


def test_positions_are_drawn_uniformly_from_the_ordinary_tokens(corpus: Corpus, facts: TokenFacts) -> None:
    special = np.isin(corpus.gather(np.arange(len(corpus))), facts.special_ids)
    ordinary, sample_size, draws = int((~special).sum()), 12, 3000
    times = np.zeros(len(special))
    for seed in range(draws):
        drawn = drawn_positions(corpus, facts, sample_size, seed)
        assert len(np.unique(drawn)) == len(drawn) == sample_size
        times[drawn] += 1
    assert not times[special].any()
    expected = draws * sample_size / ordinary
    deviations = (times[~special] - expected) / math.sqrt(expected * (1 - sample_size / ordinary))
    assert abs(deviations.std() - 1) < 0.25
    assert np.abs(deviations).max() < 5
    assert np.array_equal(drawn_positions(corpus, facts, "all", 0), np.flatnonzero(~special))
    assert np.array_equal(drawn_positions(corpus, facts, ordinary, 7), np.flatnonzero(~special))
    assert len(drawn_positions(corpus, facts, ordinary - 1, 7)) == ordinary - 1


def test_positions_are_found_among_many_special_tokens(facts: TokenFacts) -> None:
    rare = Mostly(int(facts.special_ids[0]))
    rare.counts = rare.counts[: facts.vocab_size]
    for sample_size in (1, 9, 10):
        drawn = drawn_positions(rare, facts, sample_size, 0)
        assert len(drawn) == sample_size
        assert set(drawn) <= set(range(360, 370))
    rare.counts[-1] += 5
    with pytest.raises(CorruptData, match="counts 15 tokens that are not special and holds 10"):
        drawn_positions(rare, facts, 11, 0)
    empty = Mostly(int(facts.special_ids[0]))
    empty.counts, empty.tokens = np.zeros(facts.vocab_size, np.int64), np.zeros((40, 50), np.int64)
    with pytest.raises(UserError, match="none that is not special"):
        drawn_positions(empty, facts, 1, 0)


def test_windows_tile_what_they_score() -> None:
    lengths = np.array([1, 2, 7, 8, 9, 30, 1, 31])
    for size, stride in ((8, 4), (8, 1), (8, 7), (3, 2), (100, 50)):
        windows = sliding_windows(lengths, size, stride)
        for number, length in enumerate(lengths.tolist()):
            mine = windows.sequence == number
            scored = [t for a, b in zip(windows.first[mine], windows.end[mine], strict=True) for t in range(a, b)]
            assert scored == list(range(1, length))
            assert all(windows.first[mine] > windows.begin[mine])
            assert all(windows.end[mine] - windows.begin[mine] <= size)


def test_the_error_of_a_ratio_by_hand() -> None:
    mean, error = ratio(np.array([2.0, 6.0, 0.0]), np.array([1, 2, 0]))
    # R = 8/3; residuals 2 - 8/3 = -2/3 and 6 - 16/3 = 2/3; sqrt(2/1 * 8/9) / 3 = 4/9
    assert mean == pytest.approx(8 / 3)
    assert error == pytest.approx(4 / 9)
    assert math.isnan(ratio(np.array([2.0, 0.0]), np.array([1, 0]))[1])


def test_the_error_covers_the_truth_as_often_as_it_says() -> None:
    """Tokens of a sequence share most of their loss: counting them as independent would be wrong by far."""
    generator = np.random.default_rng(0)
    inside = naive_inside = 0
    for _ in range(600):
        counts = generator.integers(5, 60, 80)
        shared = generator.normal(3.0, 1.0, 80)
        tokens = [generator.normal(level, 0.5, count) for level, count in zip(shared, counts, strict=True)]
        mean, error = ratio(np.array([x.sum() for x in tokens]), counts)
        inside += abs(mean - 3.0) < 1.96 * error
        together = np.concatenate(tokens)
        naive_inside += abs(mean - 3.0) < 1.96 * together.std() / math.sqrt(len(together))
    assert 0.92 < inside / 600 < 0.97
    assert naive_inside / 600 < 0.5
