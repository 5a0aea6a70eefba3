"""`fastdistil watch` without a browser: what its JSON says of known runs, who may read it, how it starts and ends."""

import errno
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

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil.errors import UserError
from fastdistil.events import Evaluation, EventLog, Note, Train, read_events
from fastdistil.profiling.report import live
from fastdistil.profiling.report.live import Live
from fastdistil.profiling.report.watch import WatchServer
from fastdistil.runs import sole_user


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


def state(run: Path, clock: Clock, cursor: str = "") -> dict[str, Any]:
    changes = following(run, clock).changes(cursor)
    assert changes is not None
    json.dumps(changes, allow_nan=False)
    return changes


def following(run: Path, clock: Clock) -> Live:
    followed = Live(run, clock, clock)
    followed.refresh()
    return followed


def values(snapshot: dict[str, Any], name: str, which: str = "mean") -> list[float | None]:
    return next(series[which] for series in snapshot["curves"]["series"] if series["name"] == name)


# ---- what it says of a run


def test_time_left_and_throughput_are_those_computed_by_hand(tmp_path: Path) -> None:
    lines = [
        # 10 updates a line: 1000 tokens in 2 s, then 1000 in 4 s: 6 s for 20 updates
        train(10, 2.0, updates=10, tokens=1000, tokens_per_s=500.0),
        {"event": "evaluation", "time": 12.0, "update": 10, "seconds": 9.0, "loss": 3.0},
        {"event": "checkpoint", "time": 13.0, "update": 10, "seconds": 1.0, "path": "step-00000010"},
        train(20, 17.0, updates=10, tokens=1000, tokens_per_s=250.0),
    ]
    append(tmp_path, start(), *lines)
    snapshot = state(tmp_path, Clock(17.0))
    # 80 updates to go at 6/20 s of training and 10/20 s of evaluations and checkpoints each
    assert snapshot["progress"]["left_s"] == pytest.approx(80 * (0.3 + 0.5))
    assert snapshot["progress"]["share"] == 0.2
    assert snapshot["progress"]["tokens"] == 2000
    assert snapshot["progress"]["elapsed_s"] == 17.0
    assert snapshot["speed"]["tokens_per_s"] == pytest.approx(2000 / 6)
    assert values(snapshot, "tokens_per_s") == [500, 250]
    assert snapshot["evaluations"][0]["loss"] == 3.0
    assert [entry["kind"] for entry in snapshot["log"]] == ["start", "evaluation", "checkpoint"]


def test_rates_are_of_the_last_lines_alone(tmp_path: Path) -> None:
    slow = [train(1 + i, float(i), tokens=10, tokens_per_s=1.0) for i in range(30)]
    fast = [train(31 + i, 30.0 + i, tokens=10, tokens_per_s=100.0) for i in range(live.RECENT)]
    append(tmp_path, start(), *slow, *fast)
    snapshot = state(tmp_path, Clock(50.0))
    assert snapshot["speed"]["tokens_per_s"] == pytest.approx(100)
    assert snapshot["progress"]["left_s"] == pytest.approx(50 * 0.1)


def test_phases_leave_the_warmup_out_and_what_is_left_is_other(tmp_path: Path) -> None:
    phases = {"teacher": [9.0, 0.2, 0.4], "backward": [9.0, 0.3, 0.3], "communication": [9.0, 0.25, 0.25]}
    append(tmp_path, start(), train(3, 30.0, updates=3, warmup=1, step_s=[90.0, 0.8, 1.2], phases=phases))
    snapshot = state(tmp_path, Clock(30.0))
    assert snapshot["phases"]["step_s"] == pytest.approx(1.0)
    assert snapshot["phases"]["seconds"] == pytest.approx({"teacher": 0.3, "backward": 0.3, "other": 0.4})
    assert snapshot["phases"]["communication_s"] == pytest.approx(0.25)
    assert (snapshot["speed"]["step_p50_s"], snapshot["speed"]["steps"]) == (pytest.approx(1.0), 2)
    assert values(snapshot, "step") == [1000]


def test_a_rank_that_works_longer_than_the_others_is_slow(tmp_path: Path) -> None:
    lines = [
        train(2, 2.0, updates=2, rank_worked_s=[2.0, 2.2, 3.0], rank_tokens=[10, 10, 20], slowest_rank=2),
        train(4, 4.0, updates=2, rank_worked_s=[2.0, 2.0, 3.0], rank_tokens=[10, 10, 20], slowest_rank=1),
    ]
    append(tmp_path, start(ranks=3), *lines)
    ranks = state(tmp_path, Clock(4.0))["ranks"]
    assert [rank["worked_s"] for rank in ranks] == pytest.approx([1.0, 1.05, 1.5])
    mean = 3.55 / 3  # as the summary's straggler
    assert [rank["of_mean"] for rank in ranks] == pytest.approx([1 / mean, 1.05 / mean, 1.5 / mean])
    assert [rank["slow"] for rank in ranks] == [False, False, True]
    assert [rank["tokens_share"] for rank in ranks] == pytest.approx([0.25, 0.25, 0.5])
    assert [rank["slowest_share"] for rank in ranks] == [0.0, 0.5, 0.5]
    assert all(rank["data_wait_s"] is None for rank in ranks)  # not recorded: not guessed


def test_what_was_not_recorded_is_not_there(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    snapshot = state(tmp_path, Clock(1.0))
    assert [series["name"] for series in snapshot["curves"]["series"]] == ["total"]
    assert snapshot["phases"] is snapshot["ranks"] is snapshot["device"] is snapshot["speed"]["mfu"] is None
    assert snapshot["memory"] == {}
    assert snapshot["progress"]["left_s"] is None


def test_terms_without_weight_are_not_shown(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0, soft=1.0, hard=2.0, mse=3.0))
    (tmp_path / "recipe.yaml").write_text("objective: {a_ce: 5.0, a_mlm: 0.0, a_clm: 1.0, a_cos: 1.0, a_mse: 0.0}\n")
    shown = {series["name"] for series in state(tmp_path, Clock())["curves"]["series"]}
    assert shown == {"total", "soft", "hard"}


def test_numbers_that_are_not_finite_are_gaps_and_said(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("start", update=0, updates=9)
        log.write("train", update=1, updates=1, total=2.0, tokens=8, tokens_per_s=float("nan"))
        log.write("train", update=2, updates=1, total=float("nan"), tokens=8, tokens_per_s=float("inf"))
        log.write("nonfinite", update=1, message="the loss of update 2 is not finite")
    snapshot = state(tmp_path, Clock())
    assert values(snapshot, "total") == [2.0, None]
    assert snapshot["speed"]["latest"]["total"] == "nan"
    assert (snapshot["status"]["kind"], snapshot["status"]["message"]) == ("nonfinite", "the loss of update 2 is not finite")


def test_what_json_has_no_word_for_is_told_as_text(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0, total=float("nan"), mfu={"student": float("inf")}))  # Python writes NaN, Infinity
    snapshot = state(tmp_path, Clock())
    assert (snapshot["speed"]["latest"]["total"], snapshot["speed"]["mfu"]) == ("nan", {"student": "inf"})


# ---- how it goes on


def test_only_what_is_new_is_sent(tmp_path: Path) -> None:
    clock = Clock(3.0)
    append(tmp_path, start(), *(train(i, float(i)) for i in (1, 2)))
    followed = following(tmp_path, clock)
    first = followed.changes()
    assert first is not None
    assert first["reset"] is True
    followed.refresh()
    assert followed.changes(first["cursor"]) is None
    append(tmp_path, train(3, 3.0), {"event": "note", "time": 3.0, "update": 3, "message": "hello"})
    followed.refresh()
    second = followed.changes(first["cursor"])
    assert second is not None
    assert second["reset"] is False
    assert (second["curves"]["from"], second["curves"]["updates"]) == (2, [3])
    assert [entry["text"] for entry in second["log"]] == ["hello"]
    for broken in ("", "x", first["cursor"].replace(".", "-"), "9" * 5000, f"{first['cursor'][:8]}.1.{'9' * 5000}.0.0"):
        again = followed.changes(broken)
        assert again is not None
        assert len(again["curves"]["updates"]) in (0, 3)
    unknown = followed.changes("00000000.1.2.0.1.9.x.running.0")
    assert unknown is not None
    assert unknown["reset"] is True
    assert unknown["curves"]["updates"] == [1, 2, 3]


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    clock = Clock()
    append(tmp_path, start(), train(1, 1.0))
    line = json.dumps(train(2, 2.0)) + "\n"
    followed = Live(tmp_path, clock, clock)
    with (tmp_path / "events.jsonl").open("a") as log:
        for part, update in ((line[:20], 1), (line[20:-1], 1), (line[-1:], 2)):
            log.write(part)
            log.flush()
            followed.refresh()
            changes = followed.changes()
            assert changes is not None
            assert (changes["progress"]["update"], changes["status"]["kind"] != "reading") == (update, True)


def test_a_torn_line_that_the_next_attempt_cuts_off_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    append(tmp_path, start(), train(1, 1.0))
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write('{"event": "train", "upd')
    followed = following(tmp_path, clock)
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("resume", update=1, updates=100)
        log.write("train", update=2, updates=1, total=0.5)
    followed.refresh()
    changes = followed.changes()
    assert changes is not None
    assert changes["curves"]["updates"] == [1, 2]
    assert "unreadable" not in {entry["kind"] for entry in changes["log"]}


def test_lines_that_are_no_events_are_told_and_left_out(tmp_path: Path) -> None:
    append(tmp_path, start())
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b"\xff\x00 garbage\n[1]\n{}\n")
    append(tmp_path, train(1, 1.0), {"event": "train", "update": "x", "time": "then", "phases": 3, "step_s": 4})
    append(tmp_path, train(2, 2.0, phases={"data": "x"}, step_s=[None, "y"], device=5, memory=[1], mfu="no", warmup="a"))
    snapshot = state(tmp_path, Clock())
    assert snapshot["curves"]["updates"] == [1, 2]
    assert [entry["text"] for entry in snapshot["log"] if entry["kind"] == "unreadable"] == [
        f"line {number} of events.jsonl is not an event and was left out" for number in (2, 3, 4, 6)
    ]


@given(st.lists(st.tuples(st.sampled_from(["train", "train", "note", "evaluation", "resume"]), st.integers(0, 6)), max_size=25))
def test_what_a_resume_takes_back_is_what_the_effective_log_leaves_out(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, int]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    append(run, start())
    followed = following(run, Clock())
    cursor, updates = "", []
    at = 0
    for kind, number in drawn:
        at = number if kind == "resume" else at + (kind == "train")
        append(run, {"event": kind, "time": 1.0, "update": at, "updates": 1, "message": str(number), "total": 1.0})
        if number % 2:  # a page that misses some
            followed.refresh()
            changes = followed.changes(cursor)
            assert changes is not None
            updates = updates[: 0 if changes["reset"] else changes["curves"]["from"]] + changes["curves"]["updates"]
            cursor = changes["cursor"]
    followed.refresh()
    last = followed.changes(cursor)
    if last is not None:
        updates = updates[: 0 if last["reset"] else last["curves"]["from"]] + last["curves"]["updates"]
    effective = list(read_events(run / "events.jsonl", effective=True))
    snapshot = followed.changes()
    assert snapshot is not None
    assert updates == snapshot["curves"]["updates"] == [event.update for event in effective if isinstance(event, Train)]
    assert [entry["update"] for entry in snapshot["evaluations"]] == [
        event.update for event in effective if isinstance(event, Evaluation)
    ]
    assert [entry["text"] for entry in snapshot["log"] if entry["kind"] == "note"] == [
        event.message for event in effective if isinstance(event, Note)
    ]


def test_long_curves_keep_their_spikes(tmp_path: Path) -> None:
    count = 5 * live.POINTS
    lines = [train(i, float(i), grad_norm=1.0) for i in range(1, count + 1)]
    lines[777]["grad_norm"] = 50.0
    lines[1000]["grad_norm"] = "nan"
    append(tmp_path, start(), *lines)
    followed = following(tmp_path, Clock(float(count)))
    while followed.reading:
        followed.refresh()
    changes = followed.changes()
    assert changes is not None
    curves = changes["curves"]
    assert curves["stride"] == 8
    assert curves["updates"] == [*range(8, count + 1, 8)]
    assert len(curves["updates"]) <= live.POINTS
    largest = values(changes, "grad_norm", "largest")
    assert [i for i, value in enumerate(largest) if value == 50.0] == [777 // 8]
    assert values(changes, "grad_norm")[777 // 8] == pytest.approx((7 + 50) / 8)
    assert values(changes, "grad_norm")[1000 // 8] == 1.0
    # The last bucket grows with what comes.
    append(tmp_path, train(count + 1, 1.0, grad_norm=2.0), train(count + 2, 1.0, grad_norm=4.0))
    followed.refresh()
    more = followed.changes(changes["cursor"])
    assert more is not None
    assert (more["curves"]["from"], more["curves"]["updates"]) == (count // 8, [count + 2])
    assert values(more, "grad_norm") == [3.0]


def test_a_long_log_is_read_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, start(), *(train(i, float(i)) for i in range(1, 1000)))
    monkeypatch.setattr(live, "READ_S", 0.0)
    monkeypatch.setattr(live, "CHUNK_BYTES", 1000)
    followed = Live(tmp_path)
    followed.refresh()
    shares = []
    while followed.reading:
        changes = followed.changes()
        assert changes is not None
        assert changes["status"]["kind"] == "reading"
        assert "curves" not in changes
        shares.append(changes["status"]["share"])
        followed.refresh()
    assert len(shares) > 50
    assert shares == sorted(shares)
    changes = followed.changes()
    assert changes is not None
    assert changes["progress"]["update"] == 999


# ---- whether it is alive


def test_silence_is_several_usual_intervals_and_no_less_than_a_pause_it_made_before(tmp_path: Path) -> None:
    clock = Clock(60.0)
    append(tmp_path, start(), *(train(i, 10.0 * i) for i in range(1, 7)))
    followed = following(tmp_path, clock)

    def status() -> dict[str, Any]:
        followed.refresh()
        changes = followed.changes()
        assert changes is not None
        entry: dict[str, Any] = changes["status"]
        return entry

    clock.now = 60 + 49.0
    assert status()["kind"] == "running"
    clock.now = 60 + 51.0
    assert status()["kind"] == "silent"
    assert (status()["heard"], status()["last_interval_s"], status()["usual_interval_s"]) == (60.0, 10.0, 10.0)
    # An evaluation of 100 s: from then on, 200 s are no silence.
    append(tmp_path, {"event": "evaluation", "time": 160.0, "update": 6, "seconds": 100.0}, train(7, 170.0))
    clock.now = 170.0
    assert status()["kind"] == "running"
    clock.now = 170 + 199.0
    assert status()["kind"] == "running"
    clock.now = 170 + 201.0
    assert status()["kind"] == "silent"


def test_the_clock_of_the_runs_machine_does_not_matter_while_it_is_followed(tmp_path: Path) -> None:
    clock = Clock(1e6)
    append(tmp_path, start(time=0.0), train(1, 1.0), train(2, 2.0))  # an hour-glass far behind ours
    followed = following(tmp_path, clock)
    changes = followed.changes()
    assert changes is not None
    assert changes["status"]["kind"] == "silent"  # nothing better is known of what was there before
    append(tmp_path, train(3, 3.0))
    followed.refresh()
    changes = followed.changes()
    assert changes is not None
    assert (changes["status"]["kind"], changes["status"]["heard"]) == ("running", 1e6)


@pytest.mark.parametrize(
    ("ending", "kind", "message"),
    [
        ({"event": "done", "update": 100}, "done", ""),
        ({"event": "stopped", "update": 1, "why": "SIGTERM"}, "stopped", "SIGTERM"),
        ({"event": "nonfinite", "update": 1, "message": "loss nan"}, "nonfinite", "loss nan"),
    ],
)
def test_an_end_is_said_for_ever_and_taken_back_by_a_resume(
    tmp_path: Path, ending: dict[str, Any], kind: str, message: str
) -> None:
    clock = Clock(2.0)
    append(tmp_path, start(), train(1, 1.0), {"time": 2.0, **ending})
    clock.now = 1e5
    status = state(tmp_path, clock)["status"]
    assert (status["kind"], status["message"]) == (kind, message)
    append(tmp_path, start(1, time=1e5, kind="resume", ranks=2))
    snapshot = state(tmp_path, clock)
    assert snapshot["status"]["kind"] == "starting"
    assert snapshot["progress"]["attempt_from"] == 1
    assert "2 ranks" in snapshot["log"][-1]["text"]


def test_a_process_that_lets_go_of_the_run_without_a_last_word_has_died(tmp_path: Path) -> None:
    clock = Clock(2.0)
    append(tmp_path, start(), train(1, 1.0), train(2, 2.0))
    followed = Live(tmp_path, clock, clock)
    with sole_user(tmp_path):
        followed.refresh()
        changes = followed.changes()
        assert changes is not None
        assert (changes["status"]["kind"], changes["status"]["locked"]) == ("running", True)
    followed.refresh()
    changes = followed.changes(changes["cursor"])
    assert changes is not None
    assert changes["status"]["kind"] == "died"
    append(tmp_path, {"event": "done", "update": 2, "time": 2.0})
    followed.refresh()
    changes = followed.changes(changes["cursor"])
    assert changes is not None
    assert changes["status"]["kind"] == "done"


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
    changes = followed.changes()
    assert changes is not None
    assert changes["status"]["kind"] == "waiting"
    append(run, start(), train(1, 1.0), train(2, 2.0))
    followed.refresh()
    changes = followed.changes(changes["cursor"])
    assert changes is not None
    assert changes["curves"]["updates"] == [1, 2]
    (run / "events.jsonl").unlink()
    append(run, start(), train(7, 1.0))
    followed.refresh()
    changes = followed.changes(changes["cursor"])
    assert changes is not None
    assert (changes["reset"], changes["curves"]["updates"]) == (True, [7])


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


def ask(
    server: WatchServer, path: str = "/api/state", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
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


def test_the_page_and_its_state_are_served_with_headers_that_keep_others_out(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with serving(tmp_path) as server:
        assert server.token is None
        for path, kind in {"/": "text/html", "/watch.css": "text/css", "/watch.js": "text/javascript"}.items():
            status, headers, body = ask(server, path)
            assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
            assert body
            assert ask(server, path, **{"If-None-Match": headers["etag"]})[0] == 304
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
        status, _, body = ask(server)
        snapshot = json.loads(body)
        assert (status, snapshot["progress"]["update"]) == (200, 1)
        status, _, body = ask(server, f"/api/state?since={snapshot['cursor']}")
        assert (status, body) == (204, b"")


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
        assert ask(server, "/api/state", Host=host)[0] == status


def test_another_address_asks_for_the_token(tmp_path: Path) -> None:
    append(tmp_path, start())
    with serving(tmp_path, "0.0.0.0") as server:
        token = parse_qs(urlsplit(server.url).query)["token"][0]
        assert token == server.token
        assert len(token) >= 32
        cookie = {"Cookie": f"fastdistil-watch-{server.port}={token}"}
        for path in ("/", "/watch.js", "/api/state", "/nothing"):
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
        assert ask(server, "/api/state", **cookie)[0] == 200
        assert ask(server, "/api/state", Host="rebound.example", **cookie)[0] == 403
    with WatchServer(tmp_path, "0.0.0.0") as other:
        assert other.token != token


def test_two_requests_in_one_connection_and_a_body_that_nobody_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer:
        hidden = b"GET /watch.css HTTP/1.1\r\nHost: localhost\r\n\r\n"
        peer.sendall(b"GET /watch.js HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(hidden), hidden))
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"text/css" not in answer


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
    "a cursor of digits": (b"GET /api/state?since=%b HTTP/1.0\r\nHost: localhost\r\n\r\n" % (b"9" * 5_000), 200),
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
            connection.request("GET", "/api/state")
            assert json.loads(connection.getresponse().read())["progress"]["update"] == 1
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
