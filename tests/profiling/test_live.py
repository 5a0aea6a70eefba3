"""What the live page says of a run: its progress, whether it is alive, and the report below."""

from pathlib import Path
from typing import Any

import pytest

from fastdistil.events import EventLog, RunNotFinite, Start, Train, as_fields, read_events
from fastdistil.profiling.report import live
from fastdistil.profiling.report.live import Live
from fastdistil.runs import sole_user
from tests.event_streams import BEGUN, Stream, write_run
from tests.profiling.followed_run import Clock, append, figures, following, page, start, strip, train

# ---- what it says of a run


def test_time_left_is_that_computed_by_hand(tmp_path: Path) -> None:
    lines = [
        # 10 updates a line: 1000 tokens in 2 s, then 1000 in 4 s: 6 s for 20 updates
        train(10, 2.0, updates=10, tokens=1000, tokens_per_s=500.0),
        {"event": "evaluation", "time": 12.0, "update": 10, "seconds": 9.0, "loss": 3.0},
        {"event": "checkpoint", "time": 13.0, "update": 10, "seconds": 1.0, "path": "step-00000010"},
        train(20, 17.0, updates=10, tokens=1000, tokens_per_s=250.0),
    ]
    append(tmp_path, start(), *lines)
    clock = Clock(17.0)
    followed = following(tmp_path, clock)
    progress = followed.progress()
    # 80 updates to go at 6/20 s of training and 10/20 s of evaluations and checkpoints each
    assert progress.left_s == pytest.approx(80 * (0.3 + 0.5))
    assert (progress.update, progress.share, progress.elapsed_s) == (20, 0.2, 17.0)
    assert "1 min 04 s" in strip(followed)
    clock.now += 5.0  # it goes on meanwhile
    assert "59.0 s" in strip(followed)


def test_rates_are_of_the_last_lines_alone(tmp_path: Path) -> None:
    slow = [train(1 + i, float(i), tokens=10, tokens_per_s=1.0) for i in range(30)]
    fast = [train(31 + i, 30.0 + i, tokens=10, tokens_per_s=100.0) for i in range(live.RECENT)]
    append(tmp_path, start(), *slow, *fast)
    assert following(tmp_path, Clock(50.0)).progress().left_s == pytest.approx(50 * 0.1)


def test_a_rank_that_works_longer_than_the_others_is_slow(tmp_path: Path) -> None:
    append(tmp_path, start(ranks=3), train(2, 2.0, updates=2, rank_worked_s=[2.0, 2.2, 3.0]))
    followed = following(tmp_path, Clock(4.0))
    append(tmp_path, train(4, 4.0, updates=2, rank_worked_s=[2.0, 2.0, 3.0]))
    followed.refresh()
    # 1, 1.05 and 1.5 s an update, of a mean of 1.1833: as the summary's straggler
    assert (
        followed.ranks_text()
        == "3 ranks, work of each 1.000 s to 1.500 s an update; slow: rank 2 (\N{MULTIPLICATION SIGN}1.27)"
    )
    append(tmp_path / "even", start(ranks=2), train(1, 1.0, rank_worked_s=[1.0, 1.01]))
    assert following(tmp_path / "even", Clock()).ranks_text().endswith("; even")


def test_what_was_not_recorded_is_not_there(tmp_path: Path) -> None:
    append(tmp_path, start(ranks=2), train(1, 1.0))
    followed = following(tmp_path, Clock(1.0))
    assert (followed.ranks_text(), followed.progress().left_s) == ("", None)
    assert "not recorded" in page(followed)


def test_numbers_that_are_not_finite_are_said(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write(Start(update=0, updates=9))
        log.write(Train(update=1, updates=1, total=2.0, tokens=8, tokens_per_s=float("nan")))
        log.write(Train(update=2, updates=1, total=float("nan"), tokens=8, tokens_per_s=float("inf")))
        log.write(RunNotFinite(update=1, message="the loss of update 2 is not finite"))
    followed = following(tmp_path, Clock())
    assert "loss nan" in strip(followed)
    assert followed.status() == ("nonfinite", "the loss of update 2 is not finite")
    assert followed.progress().left_s is None


# ---- the report below it


@pytest.mark.parametrize(
    "stream",
    [
        Stream(lines=40),
        Stream(lines=40, ranks=8, outcome=None),
        Stream(lines=20, ranks=1, gpu=False, old=True),
    ],
)
def test_the_page_is_the_report_of_the_run(tmp_path: Path, stream: Stream) -> None:
    run = write_run(tmp_path / "run", stream)
    written, shown = figures(run, following(run, Clock(BEGUN)))
    assert shown == written


def test_the_page_of_a_continued_run_is_the_report_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Stream(lines=40, outcome=None))
    followed = following(run, Clock(BEGUN))
    later = [line for line in read_events(run / "events.jsonl") if (line.update or 0) > 150][:30]
    append(
        run,
        start(150, BEGUN + 1e4, "resume", ranks=1),
        *({"event": line.kind, **as_fields(line), "time": BEGUN + 1e4 + i} for i, line in enumerate(later)),
    )
    followed.refresh()
    written, shown = figures(run, followed)
    assert shown == written


def test_the_page_is_made_again_only_when_there_is_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append(tmp_path, start(), train(1, 1.0))
    followed = following(tmp_path, Clock())
    first = followed.page()
    monkeypatch.setattr(live, "as_html", None)  # nothing to make
    followed.refresh()
    assert followed.page() == first
    monkeypatch.undo()
    append(tmp_path, train(2, 2.0, total=0.25))
    followed.refresh()
    body, version = followed.page()
    assert version != first[1]
    assert b"0.25" in body


def test_the_pages_of_a_run_take_a_small_share_of_the_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    append(tmp_path, start(), train(1, 1.0))
    followed = following(tmp_path, clock)

    def slowly(*_: object, **__: object) -> str:
        clock.now += 3.0
        return f"made at {clock.now}"

    monkeypatch.setattr(live, "as_html", slowly)
    pages = []
    for second in range(200):
        clock.now += 1.0
        append(tmp_path, train(2 + second, clock.now))
        followed.refresh()
        pages.append(followed.page()[0])
    assert len(set(pages)) == 4  # 3 s every 60 s
    append(tmp_path, {"event": "done", "update": 201, "time": clock.now})  # its end is not waited for
    followed.refresh()
    assert followed.page()[0] != pages[-1]


# ---- whether it is alive


def test_silence_is_several_usual_intervals_and_no_less_than_a_pause_it_made_before(tmp_path: Path) -> None:
    clock = Clock(60.0)
    append(tmp_path, start(), *(train(i, 10.0 * i) for i in range(1, 7)))
    followed = following(tmp_path, clock)

    def kind() -> str:
        followed.refresh()
        return followed.status().kind

    clock.now = 60 + 49.0
    assert kind() == "running"
    clock.now = 60 + 51.0
    assert kind() == "silent"
    assert followed.status().why.startswith("no event for 51.0 s, with 10.0 s between log lines before")
    # An evaluation of 100 s: from then on, 200 s are no silence.
    append(tmp_path, {"event": "evaluation", "time": 160.0, "update": 6, "seconds": 100.0}, train(7, 170.0))
    clock.now = 170.0
    assert kind() == "running"
    clock.now = 170 + 199.0
    assert kind() == "running"
    clock.now = 170 + 201.0
    assert kind() == "silent"


def test_the_clock_of_the_runs_machine_does_not_matter_while_it_is_followed(tmp_path: Path) -> None:
    clock = Clock(1e6)
    append(tmp_path, start(time=0.0), train(1, 1.0), train(2, 2.0))  # an hour-glass far behind ours
    followed = following(tmp_path, clock)
    assert followed.status().kind == "silent"  # nothing better is known of what was there before
    append(tmp_path, train(3, 3.0))
    followed.refresh()
    assert followed.status().kind == "running"
    assert "0.0 s ago" in strip(followed)


@pytest.mark.parametrize(
    ("ending", "kind", "why"),
    [
        ({"event": "done", "update": 100}, "done", ""),
        (
            {"event": "stopped", "update": 1, "why": "SIGTERM"},
            "stopped",
            "saved (SIGTERM); continue with --resume",
        ),
        ({"event": "nonfinite", "update": 1, "message": "loss nan"}, "nonfinite", "loss nan"),
    ],
)
def test_an_end_is_said_for_ever_and_taken_back_by_a_resume(
    tmp_path: Path, ending: dict[str, Any], kind: str, why: str
) -> None:
    clock = Clock(2.0)
    append(tmp_path, start(), train(1, 1.0), {"time": 2.0, **ending})
    clock.now = 1e5
    followed = following(tmp_path, clock)
    assert followed.status() == (kind, why)
    append(tmp_path, start(1, time=1e5, kind="resume", ranks=2))
    followed.refresh()
    assert followed.status().kind == "starting"
    assert followed.progress().begun == 1
    assert "continued after update 1 with 2 ranks" in strip(followed)


def test_a_process_that_lets_go_of_the_run_without_a_last_word_has_died(tmp_path: Path) -> None:
    clock = Clock(2.0)
    append(tmp_path, start(), train(1, 1.0), train(2, 2.0))
    followed = Live(tmp_path, clock, clock)
    with sole_user(tmp_path):
        followed.refresh()
        assert followed.status().kind == "running"
    followed.refresh()
    assert followed.status().kind == "died"
    append(tmp_path, {"event": "done", "update": 2, "time": 2.0})
    followed.refresh()
    assert followed.status().kind == "done"
