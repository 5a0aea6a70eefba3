"""What ranks agree on, with the other rank's answer made up."""

from collections.abc import Sequence

import pytest
import torch

from fastdistil.data.batch import Counts
from fastdistil.distributed.coordinator import Coordinator, Decision
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.world import World
from fastdistil.errors import UserError


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
