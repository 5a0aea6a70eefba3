"""What ranks agree on, with the other rank's answer made up."""

from collections.abc import Sequence

import pytest
import torch

from fastdistil.data.batch import Counts
from fastdistil.distributed.coordinator import Coordinator, Decision, content_hash
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.world import World
from fastdistil.errors import CorruptData, UserError


class Two(World):
    """Rank 0 of two; rank 1 says what `other` is."""

    other: Sequence[int]

    def sum(self, values: Sequence[int], name: str) -> list[int]:
        return [a + b for a, b in zip(values, self.other, strict=True)]


def message_of(counts: Counts, signal: int = 0) -> list[int]:
    """What a rank says in `decide`."""

    class Listening(Two):
        def sum(self, values: Sequence[int], name: str) -> list[int]:
            heard.extend(values)
            return [2 * value for value in values]

    heard: list[int] = []
    Coordinator(two(Listening), None).decide(None, False, counts)
    return [int(signal > 0), signal, int(signal > 0), *heard[3:]]


def two(kind: type[Two] = Two) -> Two:
    one_of_two = {"rank": 0, "size": 2, "local_rank": 0, "local_size": 2, "cross_rank": 0, "cross_size": 1}
    return kind(RankInfo(**one_of_two, launcher="fastdistil", address=None, port=None), torch.device("cpu"))  # type: ignore[arg-type]


OWN = Counts(valid=96.5, tokens=100, labels=15, sequences=2, batches=2)


def test_nobody_asks_to_stop() -> None:
    world = two()
    world.other = message_of(OWN)
    assert not Coordinator(world, None).decide(None, False, OWN).stop


def test_the_other_ranks_signal_stops_both() -> None:
    world = two()
    world.other = message_of(OWN, signal=15)
    assert Coordinator(world, None).decide(None, False, OWN) == Decision(True, False, "SIGTERM on rank 1")


@pytest.mark.parametrize(
    "other",
    [
        Counts(valid=96.0, tokens=100, labels=15, sequences=2, batches=2),  # other weights, and nothing else
        Counts(valid=96.5, tokens=101, labels=15, sequences=2, batches=2),
        Counts(valid=96.5, tokens=100, labels=14, sequences=2, batches=2),
    ],
)
def test_other_batches_are_refused(other: Counts) -> None:
    world = two()
    world.other = message_of(other)
    with pytest.raises(UserError, match="an iterable of batches must give the same on every rank"):
        Coordinator(world, None).decide(None, False, OWN)


@pytest.fixture
def weights() -> list[torch.Tensor]:
    """Of several sizes, also beyond a row of the hash's columns."""
    return [torch.randn(3), torch.randn(50, 90), torch.randn(())]


def test_one_flipped_bit_changes_the_hash(weights: list[torch.Tensor]) -> None:
    reference = content_hash(weights)
    assert 0 <= reference < 2**53, "it travels as a float64"
    for tensor in weights:
        words = tensor.view(-1).view(torch.int32)
        for place in {0, len(words) // 2, len(words) - 1}:
            for bit in range(32):
                flip = 1 << bit if bit < 31 else -(1 << 31)
                words[place] ^= flip
                assert content_hash(weights) != reference, (place, bit)
                words[place] ^= flip
    assert content_hash([tensor.clone() for tensor in weights]) == reference


def test_swapped_weights_change_the_hash(weights: list[torch.Tensor]) -> None:
    reference = content_hash(weights)
    first, large, _ = weights
    assert content_hash([first.flip(0), *weights[1:]]) != reference
    assert content_hash([first, large.flip(1), weights[2]]) != reference
    assert content_hash(weights[::-1]) != reference


@pytest.mark.parametrize(("differing", "says"), [((2,), "rank 2"), ((1, 3), "rank 1, 3")])
def test_replicas_that_differ_are_named(differing: Sequence[int], says: str, weights: list[torch.Tensor]) -> None:
    class Replicas(Two):
        def gather(self, values: Sequence[float], name: str) -> list[list[float]]:
            return [[values[0] + (rank in self.other)] for rank in range(4)]

    world = two(Replicas)
    world.other = ()
    Coordinator(world, None).check_replicas(weights, 7)
    world.other = differing
    with pytest.raises(CorruptData, match=f"after update 7 the weights of {says} are not those of rank 0") as caught:
        Coordinator(world, None).check_replicas(weights, 7)
    assert caught.value.exit_code == 14
