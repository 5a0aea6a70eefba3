"""How a log is followed while a run writes it: torn lines, lines taken back, long logs, and logs that begin anew."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil.events import EventLog, Resume, Train, read_events
from fastdistil.profiling.report import live
from fastdistil.profiling.report.live import Live
from fastdistil.runs import sole_user
from tests.profiling.followed_run import Clock, append, figures, following, kinds, page, start, strip, train


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    line = json.dumps(train(2, 2.0)) + "\n"
    followed = Live(tmp_path, Clock(), Clock())
    with (tmp_path / "events.jsonl").open("a") as log:
        for part, update in ((line[:20], 1), (line[20:-1], 1), (line[-1:], 2)):
            log.write(part)
            log.flush()
            followed.refresh()
            assert (followed.progress().update, followed.reading) == (update, False)


def test_a_torn_line_that_the_next_attempt_cuts_off_is_forgotten(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write('{"event": "train", "upd')
    followed = following(tmp_path, Clock())
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write(Resume(update=1, updates=100))
        log.write(Train(update=2, updates=1, total=0.5))
    followed.refresh()
    assert [event.update for event in kinds(followed, "train")] == [1, 2]
    assert kinds(followed, "note") == []


def test_lines_that_are_no_events_are_told_and_left_out(tmp_path: Path) -> None:
    append(tmp_path, start())
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b"\xff\x00 garbage\n[1]\n{}\n")
    append(
        tmp_path,
        train(1, 1.0),
        {"event": "train", "update": "x", "time": "then", "phases": 3, "step_s": 4},
    )
    append(
        tmp_path,
        train(2, 2.0, phases={"data": "x"}, step_s=[None, "y"], device=5, mfu="no", warmup="a"),
        train(3, 3.0),
    )
    followed = following(tmp_path, Clock())
    assert [event.update for event in kinds(followed, "train")] == [1, 3]
    for number in (2, 3, 4, 6, 7):
        assert f"line {number} of events.jsonl is not an event and was left out" in strip(followed)
        assert f"line {number} of events.jsonl is not an event and was left out" in page(followed)


def test_a_log_that_no_report_can_be_made_of_says_why(tmp_path: Path) -> None:
    append(
        tmp_path,
        start(ranks=2),
        train(1, 1.0, rank_worked_s=[1.0, 1.0]),
        train(2, 2.0, rank_worked_s=[1.0, 1.0, 1.0]),
    )
    followed = following(tmp_path, Clock(2.0))
    assert "is damaged: update 2 tells of 3 ranks, other lines of 2" in page(followed)
    assert "2 of 100 (2.0%)" in strip(followed)


@given(
    st.lists(
        st.tuples(st.sampled_from(["train", "train", "note", "evaluation", "resume"]), st.integers(0, 6)),
        max_size=25,
    ),
)
def test_what_a_resume_takes_back_is_what_the_effective_log_leaves_out(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, int]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    append(run, start())
    followed = following(run, Clock())
    at = 0
    for kind, number in drawn:
        at = number if kind == "resume" else at + (kind == "train")
        append(
            run,
            {"event": kind, "time": 1.0, "update": at, "updates": 1, "message": str(number), "total": 1.0},
        )
        if number % 2:
            followed.refresh()
    followed.refresh()
    effective = list(read_events(run / "events.jsonl", effective=True))
    assert followed.events == effective
    assert list(followed.updates) == [event.update for event in effective if isinstance(event, Train)]


def test_following_a_run_never_holds_it(tmp_path: Path) -> None:
    append(tmp_path, start())
    followed = following(tmp_path, Clock())
    with sole_user(tmp_path):
        followed.refresh()
    with sole_user(tmp_path):
        pass


def test_a_run_that_appears_later_and_one_that_is_made_anew(tmp_path: Path) -> None:
    run, clock = tmp_path / "runs" / "later", Clock(1.0)
    followed = following(run, clock)
    assert followed.status().kind == "waiting"
    waiting = followed.page()
    append(run, start(), train(1, 1.0), train(2, 2.0))
    followed.refresh()
    assert list(followed.updates) == [1, 2]
    begun = followed.page()
    (run / "events.jsonl").unlink()
    append(run, start(), train(7, 1.0))
    followed.refresh()
    assert [event.update for event in followed.events] == [0, 7]
    assert len({waiting[1], begun[1], followed.page()[1]}) == 3


def test_a_long_log_is_read_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, start(), *(train(i, float(i)) for i in range(1, 1000)))
    monkeypatch.setattr(live, "READ_S", 0.0)
    monkeypatch.setattr(live, "CHUNK_BYTES", 1000)
    followed = Live(tmp_path)
    followed.refresh()
    shares = []
    while followed.reading:
        kind, why = followed.status()
        assert kind == "reading"
        shares.append(int(why.removesuffix("% read")))
        followed.refresh()
    assert len(shares) > 50
    assert shares == sorted(shares)
    assert followed.progress().update == 999


def test_a_long_log_is_kept_in_part_with_its_sums_its_last_line_and_what_stands_out(tmp_path: Path) -> None:
    count = 5 * live.LINES
    lines = [train(i, float(i), total=2.0, grad_norm=1.0, tokens=10, skipped=int(i % 100 == 0)) for i in range(1, count + 1)]
    lines[777]["grad_norm"] = 50.0
    lines[-5]["total"] = "nan"
    append(tmp_path, start(updates=count), *lines)
    (tmp_path / "recipe.yaml").write_text("{}")
    followed = following(tmp_path, Clock(float(count)))
    while followed.reading:
        followed.refresh()
    drawn_updates = [event.update for event in kinds(followed, "train")]
    assert live.LINES / 2 <= len(drawn_updates) <= live.LINES
    assert set(np.diff(drawn_updates)) == {8}
    written, shown = figures(tmp_path, followed)
    assert f"Of {count:,} log lines {len(drawn_updates) + 1}, evenly spread, are drawn" in shown
    assert f"update {count:,}" in shown  # the last line's loss
    sums = re.compile(r'>(tokens|skipped updates)<.*?<td class="number[^>]*>([^<]*)<')
    assert sums.findall(shown) == sums.findall(written) == [("skipped updates", "15"), ("tokens", "15,000")]
    assert "between 1.000 and 50.00" in shown
    assert "not finite or not recorded: 1" in shown


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_what_is_kept_of_a_long_log_is_spread_over_all_of_it(begun: int, more: int) -> None:
    followed = Live(Path("/nowhere"))
    for update in [*range(1, begun + 1), None, *range(begun // 2 + 1, begun // 2 + more + 1)]:
        event = start(begun // 2, kind="resume") if update is None else train(update, 1.0)
        followed._take(json.dumps(event).encode())
    drawn_updates = [event.update for event in kinds(followed, "train")]
    assert drawn_updates == sorted(set(drawn_updates))
    assert len(drawn_updates) <= live.LINES
    spread = np.diff([0, *drawn_updates, begun // 2 + more])
    assert spread.max(initial=0) <= 2 * followed._stride
