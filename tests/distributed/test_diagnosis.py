"""Who is to blame, from what one rank knows of the others."""

import sys
import traceback
from dataclasses import replace
from typing import Any

from fastdistil.distributed.diagnosis import Beat, Verdict, View, compact_stack, judge, rank_list, silent

TIMEOUT_S, QUICK_S = 10.0, 2.0
WELL = Beat(5, "running", "forward", 7, "", 0.1, "in train.py:142 train_step", None)


def ranks(*changes: dict[str, Any] | None, seen: float = 99.9) -> dict[int, View]:
    """Each rank is WELL but for its changes; None: it was never heard of."""
    return {rank: View(seen) if change is None else View(seen, replace(WELL, **change)) for rank, change in enumerate(changes)}


def verdict(views: dict[int, View], now: float = 100.0) -> Verdict | None:
    return judge(views, now, TIMEOUT_S, QUICK_S)


def test_ranks_that_are_well() -> None:
    assert verdict(ranks({}, {"kind": "waiting", "idle_s": 50.0}, {"kind": "unhurried", "idle_s": 999.0})) is None
    assert verdict(ranks({}, {"idle_s": 9.9})) is None
    assert verdict(ranks({}, {}, seen=90.1)) is None


def test_silence_is_judged_by_the_longest() -> None:
    views = ranks({}, {}, {"kind": "unhurried"}, {"kind": "waiting"})
    views |= {2: replace(views[2], seen=88.0), 3: replace(views[3], seen=89.0)}
    assert verdict(views) == Verdict(
        2,
        "rank 2 is silent for 12 s (killed, stopped or cut off); its last phase: forward, update 7; "
        "its stack: in train.py:142 train_step",
    )
    assert silent(views, 97.9, TIMEOUT_S) is None


def test_a_rank_that_was_never_heard_of_has_the_timeout_from_the_start() -> None:
    assert verdict(ranks({}, None), 109.8) is None
    views = ranks({}, None)
    views[0] = replace(views[0], seen=110.0)
    fault = verdict(views, 110.0)
    assert fault is not None
    assert fault == Verdict(1, "rank 1 is silent for 10 s (not started, killed, stopped or cut off)")


def test_ranks_that_ended_may_be_silent() -> None:
    views = ranks({}, {"kind": "finished"}, {"kind": "ended"})
    views |= {rank: replace(views[rank], seen=0.0) for rank in (1, 2)}
    assert verdict(views) is None


def test_who_does_not_get_on_is_to_blame_and_who_waits_for_it_is_not() -> None:
    fault = verdict(ranks({"kind": "waiting", "idle_s": 30.0}, {"idle_s": 10.0, "update": None}, {"idle_s": 11.0}))
    assert fault is not None
    assert fault.rank == 2
    assert fault.text.startswith("rank 2 does not get on for 11 s; its last phase: forward, update 7; its stack: ")


def test_all_waiting_is_a_mismatch_that_names_what_each_waits_for() -> None:
    late = {"kind": "waiting", "idle_s": 12.0}
    views = ranks({**late, "waits_for": "bucket 3"}, {**late, "waits_for": "stop"}, {**late, "waits_for": "bucket 3"})
    fault = verdict(views)
    where = "(its last phase: forward, update 7; its stack: in train.py:142 train_step)"
    assert fault == Verdict(
        None, f"the ranks wait for each other for 12 s: ranks 0, 2 for bucket 3 {where}; rank 1 for stop {where}"
    )
    assert verdict({**views, 1: View(99.9, replace(WELL, kind="waiting", idle_s=9.0))}) is None
    assert verdict({**views, 3: View(99.9, replace(WELL, kind="unhurried", idle_s=99.0))}) is None


def test_waiting_for_a_rank_that_finished_is_a_mismatch_too() -> None:
    views = ranks({"kind": "waiting", "idle_s": 12.0, "waits_for": "bucket 3"}, {"kind": "finished"})
    # It waited for one that was busy for long, and is being let go: its next sign of life will say so.
    assert verdict(views) is None
    views[1] = replace(views[1], seen=89.0)  # its last one
    fault = verdict(views)
    assert fault is not None
    assert fault.text.endswith("; rank 1 finished")
    assert verdict(ranks({"kind": "finished"}, {"kind": "finished"})) is None


def test_once_a_collective_failed_silence_is_judged_sooner_and_idleness_not_at_all() -> None:
    views = ranks({"broken": "Connection closed by peer"}, {"kind": "waiting", "idle_s": 50.0}, {"idle_s": 50.0})
    assert verdict(views) is None
    views[1] = replace(views[1], seen=97.9)
    fault = verdict(views)
    assert fault is not None
    assert fault.rank == 1


def test_rank_list() -> None:
    assert rank_list([4]) == "rank 4"
    assert rank_list([1, 0]) == "ranks 0, 1"
    assert rank_list([9, 2, 0, 1, 5, 6]) == "ranks 0-2, 5, 6, 9"


def test_compact_stack_is_innermost_first_and_short() -> None:
    def inner(depth: int) -> str:
        if depth:
            return inner(depth - 1)
        frames = traceback.walk_stack(sys._getframe())
        return compact_stack((frame.f_code, line) for frame, line in frames)

    assert inner(0).startswith("in test_diagnosis.py:")
    assert " < test_diagnosis.py:" in inner(0)
    assert inner(20).count(" < ") == 11
    assert compact_stack([]) == "not known"
