"""`fastdistil watch` without a browser: what it says of known runs, who may read it, how it starts and ends."""

import errno
import html
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil.errors import UserError
from fastdistil.events import EventLog, Resume, RunNotFinite, Start, Train, as_fields, read_events
from fastdistil.profiling.report import live
from fastdistil.profiling.report.live import Live
from fastdistil.profiling.report.report import as_html, read_runs
from fastdistil.profiling.report.watch import WatchServer
from fastdistil.runs import sole_user
from tests.event_streams import BEGUN, Stream, write_run


class Clock:
    """Both clocks of a Live, moved by hand."""

    def __init__(self, now: float = 10_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def append(run: Path, *events: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "events.jsonl").open("a") as log:
        log.writelines(json.dumps(event) + "\n" for event in events)


def start(update: int = 0, time: float = 0.0, kind: str = "start", **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, "update": update, "updates": 100, "engine": "torch", "ranks": 1, **fields}


def train(update: int, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": "train", "time": time, "update": update, "updates": 1, "total": 1.0 / update, **fields}


def following(run: Path, clock: Clock) -> Live:
    followed = Live(run, clock, clock)
    followed.refresh()
    return followed


def strip(followed: Live) -> str:
    return html.unescape(followed.strip().decode())


def page(followed: Live) -> str:
    return html.unescape(followed.page()[0].decode())


def figures(run: Path, followed: Live) -> tuple[str, str]:
    """(page of a file, page of a run that is followed) from their first heading on: what differs is how they are loaded."""
    written = html.unescape(as_html(read_runs([run])))
    return written[written.index("<h1>") :], (shown := page(followed))[shown.index("<h1>") :]


def kinds(followed: Live, *kinds: str) -> list[Any]:
    return [event for event in followed.events if event.kind in kinds]


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
    "stream", [Stream(lines=40), Stream(lines=40, ranks=8, outcome=None), Stream(lines=20, ranks=1, gpu=False, old=True)]
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


def test_the_page_is_made_again_only_when_there_is_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_pages_of_a_run_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---- how it goes on


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
    append(tmp_path, train(1, 1.0), {"event": "train", "update": "x", "time": "then", "phases": 3, "step_s": 4})
    append(tmp_path, train(2, 2.0, phases={"data": "x"}, step_s=[None, "y"], device=5, mfu="no", warmup="a"), train(3, 3.0))
    followed = following(tmp_path, Clock())
    assert [event.update for event in kinds(followed, "train")] == [1, 3]
    for number in (2, 3, 4, 6, 7):
        assert f"line {number} of events.jsonl is not an event and was left out" in strip(followed)
        assert f"line {number} of events.jsonl is not an event and was left out" in page(followed)


def test_a_log_that_no_report_can_be_made_of_says_why(tmp_path: Path) -> None:
    append(tmp_path, start(ranks=2), train(1, 1.0, rank_worked_s=[1.0, 1.0]), train(2, 2.0, rank_worked_s=[1.0, 1.0, 1.0]))
    followed = following(tmp_path, Clock(2.0))
    assert "is damaged: update 2 tells of 3 ranks, other lines of 2" in page(followed)
    assert "2 of 100 (2.0%)" in strip(followed)


@given(st.lists(st.tuples(st.sampled_from(["train", "train", "note", "evaluation", "resume"]), st.integers(0, 6)), max_size=25))
def test_what_a_resume_takes_back_is_what_the_effective_log_leaves_out(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, int]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    append(run, start())
    followed = following(run, Clock())
    at = 0
    for kind, number in drawn:
        at = number if kind == "resume" else at + (kind == "train")
        append(run, {"event": kind, "time": 1.0, "update": at, "updates": 1, "message": str(number), "total": 1.0})
        if number % 2:
            followed.refresh()
    followed.refresh()
    effective = list(read_events(run / "events.jsonl", effective=True))
    assert followed.events == effective
    assert list(followed.updates) == [event.update for event in effective if isinstance(event, Train)]


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
        ({"event": "stopped", "update": 1, "why": "SIGTERM"}, "stopped", "saved (SIGTERM); continue with --resume"),
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


# ---- who may read it


@contextmanager
def serving(directory: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[WatchServer]:
    with WatchServer(directory, host, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: WatchServer, path: str = "/strip", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_the_page_and_its_strip_are_served_with_headers_that_keep_others_out(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with serving(tmp_path) as server:
        assert server.token is None
        for path, kind in {"/": "text/html", "/strip": "text/html", "/watch.js": "text/javascript"}.items():
            status, headers, body = ask(server, path)
            assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
            assert body
            policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["connect-src"] == "'self'"
            assert headers["x-content-type-options"] == "nosniff"
        tag = ask(server, "/")[1]["etag"]
        assert ask(server, "/", **{"If-None-Match": tag})[0] == 304
        append(tmp_path, {"event": "done", "update": 100, "time": 2.0})
        status, headers, _ = ask(server, "/", **{"If-None-Match": tag})
        assert (status, headers["etag"] != tag) == (200, True)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
def test_only_get_is_answered(tmp_path: Path, method: str) -> None:
    with serving(tmp_path) as server:
        status, headers, _ = ask(server, "/", method)
        assert (status, headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "path",
    [
        "/events.jsonl",
        "/recipe.yaml",
        "/static/",
        "/../recipe.yaml",
        "/%2e%2e/recipe.yaml",
        "//etc/passwd",
        "/watch.js/",
        "/watch.py",
    ],
)
def test_nothing_else_is_served(tmp_path: Path, path: str) -> None:
    append(tmp_path, start())
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with serving(tmp_path) as server:
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9000", 200),  # ssh -L 9000:localhost:8642
        ("127.0.0.1", 200),
        ("[::1]:8642", 200),
        ("LOCALHOST", 200),
        ("rebound.example:8642", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("10.0.0.7", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_pointed_here_is_refused(tmp_path: Path, host: str, status: int) -> None:
    with serving(tmp_path) as server:
        assert ask(server, "/", Host=host)[0] == status
        assert ask(server, "/strip", Host=host)[0] == status


def test_another_address_asks_for_the_token(tmp_path: Path) -> None:
    append(tmp_path, start())
    with serving(tmp_path, "0.0.0.0") as server:
        token = parse_qs(urlsplit(server.url).query)["token"][0]
        assert token == server.token
        assert len(token) >= 32
        cookie = {"Cookie": f"fastdistil-watch-{server.port}={token}"}
        for path in ("/", "/watch.js", "/strip", "/nothing"):
            assert ask(server, path)[0] == 403
            assert ask(server, f"{path}?token=")[0] == 403
            assert ask(server, f"{path}?token={token[:-1]}")[0] == 403
            assert ask(server, f"{path}?token=%F0%9F%98%80%ED%A0%80")[0] == 403
            assert ask(server, path, Cookie=f"fastdistil-watch-{server.port}=x; {cookie['Cookie'][:-1]}")[0] == 403
        status, headers, _ = ask(server, f"/?token={token}")
        assert (status, headers["location"]) == (303, "/")
        set_cookie = headers["set-cookie"]
        assert set_cookie.startswith(cookie["Cookie"])
        assert "HttpOnly" in set_cookie
        assert "SameSite=Lax" in set_cookie
        assert ask(server, "/", **cookie)[0] == 200
        assert ask(server, "/strip", **cookie)[0] == 200
        assert ask(server, "/strip", Host="rebound.example", **cookie)[0] == 403
    with WatchServer(tmp_path, "0.0.0.0") as other:
        assert other.token != token


def test_two_requests_in_one_connection_and_a_body_that_nobody_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer:
        hidden = b"GET /strip HTTP/1.1\r\nHost: localhost\r\n\r\n"
        peer.sendall(b"GET /watch.js HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(hidden), hidden))
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"Content-Type: text/html" not in answer


ODD_REQUESTS = {
    "no version": (b"GET /\r\n", 400),  # HTTP/0.9, whose answer has no status
    "no path": (b"GET\r\n\r\n", 400),
    "an empty line": (b"\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400),
    "version 2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "version 1.x": (b"GET / HTTP/1.x\r\nHost: localhost\r\n\r\n", 400),
    "four words": (b"GET / HTTP/1.1 x\r\nHost: localhost\r\n\r\n", 400),
    "no address": (b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "another's address": (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a proxy's": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "NUL": (b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "not ASCII": ("GET /\u2100 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 400),
    "percents": (b"GET /%zz%00%ff%?since=%ff%00% HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "brackets": (b"GET //[/../ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a long path": (b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 70_000), 414),
    "a long header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %b\r\n\r\n" % (b"a" * 70_000), 431),
    "many headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (b"X: y\r\n" * 300), 431),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 403),
    "a host of bytes": (b"GET / HTTP/1.1\r\nHost: \xff\x00[\r\n\r\n", 403),
    "no method": (b"__class__ / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "a long query": (b"GET /strip?since=%b HTTP/1.0\r\nHost: localhost\r\n\r\n" % (b"9" * 5_000), 200),
    "a cookie of bytes": (b"GET / HTTP/1.0\r\nHost: localhost\r\nCookie: \xff=\x01;;==\r\n\r\n", 200),
}


def test_odd_requests_are_answered_with_a_status_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with serving(tmp_path) as server:
        for name, (request, status) in ODD_REQUESTS.items():
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
                peer.sendall(request)
                assert peer.recv(65536).startswith(b"HTTP/1.1 %d " % status), name
        assert ask(server)[0] == 200
    assert capsys.readouterr().err == ""


def test_a_page_that_reads_no_more_is_no_error_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with WatchServer(tmp_path) as server:
        for error in (TimeoutError("timed out"), BrokenPipeError()):
            try:
                raise error
            except OSError:
                server.handle_error(None, ("127.0.0.1", 1))
    assert capsys.readouterr().err == ""


# ---- how it is started and ended


def test_a_port_in_use_is_an_error_that_names_a_free_one(tmp_path: Path) -> None:
    with WatchServer(tmp_path) as first, pytest.raises(UserError, match=r"--port (\d+) is free") as caught:
        WatchServer(tmp_path, port=first.port)
    named = re.search(r"--port (\d+)", str(caught.value))
    assert named is not None
    with WatchServer(tmp_path, port=int(named[1])) as second:
        assert second.port == int(named[1])


def test_addresses_and_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no address of this machine"):
        WatchServer(tmp_path, "192.0.2.1")
    with pytest.raises(UserError, match="is no address"):
        WatchServer(tmp_path, "no such host.invalid")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="not a directory"):
        WatchServer(file)


def test_ipv6(tmp_path: Path) -> None:
    try:
        server = WatchServer(tmp_path, "::1")
    except UserError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            pytest.skip("this machine has no IPv6")
        raise
    with server:
        assert server.url == f"http://[::1]:{server.port}/"
        assert server.token is None


def test_the_command_prints_its_url_serves_and_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    command = [sys.executable, "-m", "fastdistil", "watch", str(tmp_path), "--port", "0"]
    # As a terminal starts it; a shell that runs the tests in the background has its children ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/$", first.strip())[1])  # type: ignore[index]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/strip")
            assert b"1 of 100 (1.0%)" in connection.getresponse().read()
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in mapped  # following a run costs its machine little
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)  # an open connection does not hold it
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_the_command_tells_of_a_port_in_use(tmp_path: Path) -> None:
    with WatchServer(tmp_path) as first:
        command = [sys.executable, "-m", "fastdistil", "watch", str(tmp_path), "--port", str(first.port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"})
    assert ended.returncode == 2
    assert re.fullmatch(rf"fastdistil: port {first.port} cannot be had .*--port \d+ is free\n", ended.stderr)
