"""A run that is written event by event and followed, as `fastdistil watch` does it: in this process, and served."""

import html
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdistil.profiling.report.live import Live
from fastdistil.profiling.report.report import as_html, read_runs
from fastdistil.profiling.report.watch import WatchServer


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
    return {
        "event": kind,
        "time": time,
        "update": update,
        "updates": 100,
        "engine": "torch",
        "ranks": 1,
        **fields,
    }


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
