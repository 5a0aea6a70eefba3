"""The ranks' store: what others than the run's ranks write there is passed over, and told."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from fastdistil.distributed.diagnosis import Beat
from fastdistil.distributed.monitor import Monitor
from fastdistil.distributed.rendezvous import SharedStore
from fastdistil.errors import RankLost

SECRET = "0123456789abcdef"
STRANGERS = {
    "monitor/verdict": json.dumps([0, "rank 0 is gone (says a stranger)"]),
    "monitor/stop": "a stranger on rank 7",
    "monitor/beat/1": json.dumps(vars(Beat(10**9, "ended", "x", None, "", 0.0, "", "a stranger"))),
    "monitor/beat/0": "no JSON at all",
}


class Two:
    """Ranks 0 and 1 on one store, and a stranger who has reached its port."""

    def __init__(self, secret: str) -> None:
        self.server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
        self.stranger, self.secret = self.connect(), secret
        self.notes: list[str] = []
        self.ranks: list[Monitor] = []

    def connect(self) -> TCPStore:
        return TCPStore("127.0.0.1", self.server.port, None, False, timedelta(seconds=30), wait_for_workers=False)

    def start(self) -> None:
        for rank in (0, 1):
            store = SharedStore(self.connect(), self.secret)
            self.ranks.append(
                Monitor(store, rank, 2, timeout_s=30, beat_s=0.01, hard_exit=lambda _: None, note=self.notes.append)
            )

    def beats(self, count: int = 30) -> None:
        """Until every rank has exchanged so many more."""
        before = [rank._beats for rank in self.ranks]
        self.until(lambda: all(rank._beats >= b + count for rank, b in zip(self.ranks, before, strict=True)))

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    both = Two(getattr(request, "param", SECRET))
    yield both
    for rank in both.ranks:
        rank.close()


def listed(store: TCPStore) -> list[str]:
    return list(store.list_keys())  # type: ignore[attr-defined]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("below", ["", "scope"])
def test_a_stranger_steers_nothing_and_is_told_once(two: Two, early: bool, below: str) -> None:
    """Who can list the keys can also write where the ranks do, before they start or while they run."""
    if below and not hasattr(two.stranger, "list_keys"):
        pytest.skip("this torch lists no keys")
    if not early:
        two.start()
        two.beats()
    if below:
        probe = SharedStore(two.connect(), SECRET)
        probe.create(["probe"])
        below = listed(two.stranger)[0].partition("/")[0] + "/"
    for key, text in STRANGERS.items():
        two.stranger.set(f"{below}{key}", text)
    if early:
        two.start()
    two.beats()
    assert [rank.stop_requested for rank in two.ranks] == [None, None]
    for rank in two.ranks:
        rank.check()
    assert len(two.notes) == 1, two.notes
    assert "is no rank of this run writes to the ranks' store (" in two.notes[0] and "monitor/" in two.notes[0]
    # What ranks say is heard all the same.
    two.ranks[1].request_stop("SIGTERM")
    two.until(lambda: all(rank.stop_requested == "SIGTERM on rank 1" for rank in two.ranks))
    two.ranks[1].failed(ValueError("the window is bad"))
    two.until(lambda: two.ranks[0]._verdict is not None)
    with pytest.raises(RankLost, match="rank 1 failed: ValueError: the window is bad"):
        two.ranks[0].check()


@pytest.mark.parametrize("two", [""], indirect=True)
def test_without_a_secret_what_is_no_beat_is_passed_over(two: Two) -> None:
    two.start()
    two.beats()
    for text in ("no JSON", "[]", '{"number": 1}', "[" * 100_000, "\udcff".encode(errors="surrogateescape").decode("latin-1")):
        for key in ("monitor/verdict", "monitor/beat/0", "monitor/beat/1"):
            two.stranger.set(key, text)
        two.beats(3)
    two.beats()
    for rank in two.ranks:
        rank.check()
    assert len(two.notes) == 1


@pytest.mark.parametrize("two", [""], indirect=True)
@pytest.mark.parametrize("text", ["no JSON", "[]", "[0]"])
def test_without_a_secret_what_is_no_verdict_keeps_none_back(two: Two, text: str) -> None:
    two.start()
    two.beats()
    two.stranger.set("monitor/verdict", text)
    two.beats(3)
    two.ranks[1].failed(ValueError("the window is bad"))
    two.until(lambda: two.ranks[0]._verdict is not None)
    with pytest.raises(RankLost, match="rank 1 failed: ValueError: the window is bad"):
        two.ranks[0].check()


def test_alone_a_run_has_nothing_to_tell(two: Two) -> None:
    two.start()
    SharedStore(two.connect(), SECRET).of_engine("torch").set("address", "x")
    two.beats()
    assert two.notes == []


def test_values_are_those_of_their_key_alone() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    one, other = SharedStore(server, SECRET), SharedStore(server, SECRET[::-1])
    one.set("a", "text")
    assert one.get("a") == b"text"
    other.create(["a"])
    assert other.get_all(["a"]) == [b""]  # another run's key of that name
    if hasattr(server, "list_keys"):
        (stored_key,) = [key for key in listed(server) if server.get(key)]
        server.set(stored_key.replace("/a", "/b"), server.get(stored_key).decode())
        with pytest.raises(RuntimeError, match="b in the ranks' store was written by somebody who is no rank"):
            one.get("b")


def test_the_secret_shows_nowhere() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    SharedStore(server, SECRET).set("a", "text")
    if hasattr(server, "list_keys"):
        assert all(SECRET not in key and SECRET not in server.get(key).decode() for key in listed(server))
