"""Ranks that must start with the same recipe and data, or none: each on a thread, with a connection of its own."""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from fastdistil.distributed.monitor import Monitor, agree_equal
from fastdistil.distributed.rendezvous import SharedStore
from fastdistil.errors import RankLost, UserError

Call = Callable[[SharedStore, int, Monitor], None]


def on_ranks(size: int, call: Call, absent: tuple[int, ...] = ()) -> list[BaseException | None]:
    """What `call` raises on each rank, each on a thread, with a connection and a monitor of its own."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    raised: list[BaseException | None] = [None] * size

    def connect() -> SharedStore:
        store = dist.TCPStore(
            "127.0.0.1",
            server.port,
            None,
            False,
            timedelta(seconds=30),
            wait_for_workers=False,
        )
        return SharedStore(store, "secret")

    def one(rank: int) -> None:
        monitor = Monitor(connect(), rank, size, timeout_s=2, beat_s=0.05, hard_exit=lambda _: None)
        try:
            call(connect(), rank, monitor)
        except (RankLost, UserError) as error:
            raised[rank] = error
            if isinstance(error, UserError):
                monitor.failed(error)
        monitor.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return raised


def test_equal_ranks_agree_more_than_once() -> None:
    def call(store: SharedStore, rank: int, monitor: Monitor) -> None:
        agree_equal(store, rank, 3, {"recipe": "a"}, monitor)
        agree_equal(store, rank, 3, {"recipe": "a", "corpus": "c"}, monitor)
        monitor.finished()

    assert on_ranks(3, call) == [None] * 3


def test_unequal_ranks_all_learn_who_differs_and_in_what() -> None:
    def call(store: SharedStore, rank: int, monitor: Monitor) -> None:
        corpus = {} if rank == 3 else {"corpus": "x"}
        agree_equal(
            store,
            rank,
            5,
            {"recipe": "b" if rank in (1, 3, 4) else "a", "version": "1", **corpus},
            monitor,
        )

    raised = on_ranks(5, call)
    expected = "another recipe on ranks 1, 3, 4, another corpus on rank 3 than on rank 0; start every rank with the same"
    assert all(isinstance(error, UserError) and expected in str(error) for error in raised), raised


def test_ranks_that_do_not_come_to_the_agreement() -> None:
    raised = on_ranks(
        5,
        lambda store, rank, monitor: agree_equal(store, rank, 5, {"recipe": "a"}, monitor),
        absent=(2, 3),
    )
    assert all(isinstance(raised[rank], RankLost) for rank in (0, 1, 4)), raised
    words = "ranks 2, 3 are silent for 2 s (not started, killed, stopped or cut off)"
    assert {str(raised[rank]) for rank in (0, 1, 4)} == {words}
