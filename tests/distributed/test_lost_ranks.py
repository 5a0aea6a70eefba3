"""A lost rank is told in one way, whatever the moment: rank 0's store goes away under rank 1, which is this process."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from fastdistil.distributed import coordinator, rendezvous
from fastdistil.distributed.monitor import Monitor
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.distributed.world import World
from fastdistil.errors import RankLost
from fastdistil.recipe import load_recipe

GONE = "rank 0 is gone (its connection is closed: killed or crashed)"
TIMEOUT_S = 2.0


class Rank0:
    """Rank 0 as the others see it: its store. `end` closes it, as the end of its process does."""

    def __init__(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(listening.getsockname()[1])
        self._store: Any = TCPStore(
            "127.0.0.1", self.port, None, True, timedelta(seconds=30), False, master_listen_fd=listening.detach()
        )

    def end(self) -> None:
        self._store = None

    def place(self) -> RankInfo:
        numbers = {"rank": 1, "size": 2, "local_rank": 1, "local_size": 2, "cross_rank": 0, "cross_size": 1}
        return RankInfo(**numbers, launcher="fastdistil", address="127.0.0.1", port=self.port)  # type: ignore[arg-type]


@pytest.fixture
def rank0(monkeypatch: pytest.MonkeyPatch) -> Rank0:
    monkeypatch.setattr(coordinator, "Monitor", partial(Monitor, beat_s=0.05, hard_exit=lambda _: None))
    return Rank0()


def before(owner: Any, name: str, deed: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`deed` is done just before `what.name` is called."""
    call = getattr(owner, name)

    def first(*positional: Any, **named: Any) -> Any:
        deed()
        return call(*positional, **named)

    monkeypatch.setattr(owner, name, first)


def joined_words(rank0: Rank0) -> str:
    settings = ["device=cpu", "data.train=none", "teacher.path=none", f"world.timeout_s={TIMEOUT_S}", "world.engine=torch"]
    with pytest.raises(RankLost) as caught, coordinator.joined(rank0.place(), load_recipe("distilbert", settings), print):
        pytest.fail("they never met")
    return str(caught.value)


def test_before_its_first_sign_of_life(rank0: Rank0, monkeypatch: pytest.MonkeyPatch) -> None:
    before(coordinator, "agree_equal", rank0.end, monkeypatch)
    assert joined_words(rank0) == GONE


def test_while_the_ranks_agree(rank0: Rank0, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdistil.distributed import monitor

    before(monitor, "_await_keys", rank0.end, monkeypatch)
    assert joined_words(rank0) == GONE


def test_before_another_connection_to_it(rank0: Rank0, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor has its connection; what needs the store next finds nobody."""
    real_monitor = coordinator.Monitor

    def monitor(*positional: Any, **named: Any) -> Monitor:
        here = real_monitor(*positional, **named)
        rank0.end()
        return here

    monkeypatch.setattr(coordinator, "Monitor", monitor)
    assert joined_words(rank0) == GONE


@contextmanager
def refuses() -> Iterator[None]:
    raise RuntimeError("Connection reset by peer")
    yield


def test_while_the_engine_connects(rank0: Rank0, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(place: RankInfo, options: Any, device: torch.device, met: Any) -> World:
        from fastdistil.distributed.world import starting

        watch = met(rendezvous.open_store(place, 5.0))
        rank0.end()
        with starting(watch, 1), refuses():
            raise AssertionError

    monkeypatch.setattr(coordinator, "agree_equal", lambda *_: None)
    monkeypatch.setattr(coordinator, "join", join)
    assert joined_words(rank0) == GONE


def test_before_this_rank_ever_reached_it(rank0: Rank0) -> None:
    rank0.end()
    place = rank0.place()
    with pytest.raises(RankLost, match=rf"rank 0 is gone \(no connection to it at 127\.0\.0\.1:{place.port} within 1 s"):
        rendezvous.open_store(place, 1.0)
