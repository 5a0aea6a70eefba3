"""The page of `fastdistil watch` in Debian's Chromium, while another process writes the run."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Never, Self

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from fastdistil.profiling.report.watch import WatchServer
from tests.profiling.followed_run import append, serving, start, train

PATIENCE_S = 60
WIDE, NARROW = 1200, 380

# Writes each event that it reads to the run's log, as training does, and holds the run meanwhile.
WRITER = """
import sys
from pathlib import Path
from fastdistil.events import EventLog, parse_event
from fastdistil.runs import sole_user
run = Path(sys.argv[1])
with sole_user(run), EventLog(run / "events.jsonl") as log:
    for line in sys.stdin:
        log.write(parse_event(line.encode()))
        print("written", flush=True)
"""


@pytest.fixture(scope="module")
def browser(need: Callable[[str, str], Never], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        need("chromium", "no chromium with chromedriver on PATH; on Debian: apt install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    # The sandbox wants a user that is not root; /dev/shm is small in containers.
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", *root):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(driver))  # by its path: nothing is looked for, nothing downloaded
    try:
        yield chrome
    finally:
        chrome.quit()


@contextmanager
def page(browser: Chrome, server: WatchServer, width: int = WIDE, **media: str) -> Iterator[Chrome]:
    """Open it; whatever the browser complains of (scripts, the content security policy) fails the test."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": False,
    })  # fmt: skip
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")
    browser.get(server.url)
    try:
        until(browser, lambda: browser.execute_script("return document.querySelector('#verdict')"))
        yield browser
        assert browser.get_log("browser") == []
    finally:
        browser.get("about:blank")  # it must not ask a server that has ended


def until(browser: Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())


def text(browser: Chrome, name: str) -> str:
    """What an element says; nothing while the page is being loaded and has none."""
    script = "return (document.getElementById(arguments[0]) ?? document.querySelector(arguments[0]))?.textContent ?? ''"
    return str(browser.execute_script(script, name))


def until_text(browser: Chrome, name: str, expected: str) -> None:
    until(browser, lambda: expected in text(browser, name))


class Writer:
    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", WRITER, str(run)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self, *events: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for event in events:
            event.pop("time", None)
            print(json.dumps(event), file=self.process.stdin, flush=True)
            assert self.process.stdout.readline() == "written\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def rich_line(update: int) -> dict[str, Any]:
    """A line with everything that is shown, of four ranks on a GPU."""
    phases = {
        name: [0.05] for name in ("data", "teacher", "student", "losses", "backward", "exposed", "optimizer", "communication")
    }
    return train(
        update,
        0.0,
        soft=0.5,
        hard=1.5,
        cosine=0.1,
        tokens=1000,
        tokens_per_s=2000.0,
        grad_norm=1.0,
        lr=1e-4,
        step_s=[0.5],
        phases=phases,
        warmup=0,
        rank_worked_s=[0.4, 0.4, 0.6, 0.4],
        rank_tokens=[250, 250, 250, 250],
        rank_data_wait_s=[0.01] * 4,
        slowest_rank=2,
        memory={"rss_bytes": 2**33, "allocated_bytes": 2**34, "reserved_bytes": 2**35, "used_bytes": 2**35, "retries": 1},
        device={
            "utilisation": 0.9,
            "sm_clock_mhz": 1700,
            "power_w": 650.5,
            "temperature_c": 61,
            "throttled": {"a_reason_with_a_name_that_is_long": 0.5},
        },
        mfu={"student": 0.31, "peak_flops": 989e12, "peak_source": "datasheet"},
    )


def rich_run(run: Path) -> None:
    now = time.time()
    lines = [{**rich_line(i), "time": now - 30 + i} for i in range(1, 31)]
    long = "a_word_without_any_place_to_break_it_" * 8
    append(
        run,
        start(time=now - 32, ranks=4, nodes=1, rings=2, device="cuda:0", precision="bf16", student_parameters=66_000_000),
        *lines[:20],
        {"event": "evaluation", "time": now - 9.5, "update": 20, "seconds": 2.0, "loss": 2.5, "loss_se": 0.1, "kl": 0.1},
        {"event": "note", "time": now - 9, "update": 20, "message": long},
        *lines[20:],
    )


# ---- it goes on by itself


def test_numbers_change_without_a_reload_from_a_run_that_appears_later_to_its_end(browser: Chrome, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "later"
    with serving(run) as server, page(browser, server):
        browser.execute_script("window.loaded_once = true")
        assert text(browser, "verdict") == "waiting for the run"
        with Writer(run) as writer:
            writer.write(start(ranks=4))
            until_text(browser, "verdict", "starting")
            writer.write(rich_line(1), rich_line(2), rich_line(3))
            until_text(browser, "update", "3 of 100 (3.0%)")
            assert text(browser, "verdict") == "running"
            assert "tokens/s 2000" in text(browser, "log")
            assert "slow: rank 2" in text(browser, "ranks")
            writer.write({"event": "evaluation", "update": 3, "seconds": 0.5, "loss": 1.234, "perplexity": 3.43})
            until_text(browser, "log", "loss 1.234")
            until_text(browser, "learning", "1.234")
            writer.write({**rich_line(4), "total": 0.777})
            until_text(browser, "log", "0.777")
            until_text(browser, "learning", "0.777")
            # Continued from update 2: what came after it is taken back.
            writer.write(start(2, kind="resume", ranks=2), train(3, 0.0, total=0.5))
            until_text(browser, "log", "continued after update 2 with 2 ranks")
            until_text(browser, "update", "3 of 100")
            assert "1.234" not in text(browser, "log")
            until(browser, lambda: "1.234" not in text(browser, "learning"))
            writer.write({"event": "done", "update": 100})
            until_text(browser, "verdict", "done")
            assert text(browser, "left") == "none"
            until_text(browser, "h1", "done")
        assert text(browser, "verdict") == "done"  # and the process may go
        assert browser.execute_script("return window.loaded_once") is True


def test_what_a_reader_does_stays_while_the_page_goes_on(browser: Chrome, tmp_path: Path) -> None:
    rich_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with serving(tmp_path) as server, page(browser, server, NARROW):
        until_text(browser, "update", "30 of 100")
        browser.execute_script(
            "document.querySelector('details').open = true;"
            "const scroll = document.querySelector('#speed .scroll'); scroll.focus(); scroll.scrollLeft = 50; scrollTo(0, 700)"
        )
        stays = "return [document.querySelector('details').open, document.activeElement.closest('section')?.id,"
        stays += " document.activeElement.scrollLeft, scrollY]"
        before = browser.execute_script(stays)
        assert before[:3] == [True, "speed", 50]
        assert before[3] > 0
        append(tmp_path, {**rich_line(31), "total": 0.777, "time": time.time()})
        until_text(browser, "learning", "0.777")
        assert browser.execute_script(stays) == before
        append(tmp_path, {"event": "done", "update": 100, "time": time.time()})
        until_text(browser, "h1", "done")
        assert browser.execute_script(stays)[:3] == before[:3]


def test_a_killed_run_is_said_to_be_gone_and_one_elsewhere_to_be_silent(browser: Chrome, tmp_path: Path) -> None:
    with serving(tmp_path / "here") as server, Writer(tmp_path / "here") as writer:
        writer.write(start(), train(1, 0.0), train(2, 0.0))
        with page(browser, server):
            until_text(browser, "verdict", "running")
            writer.process.kill()
            until_text(browser, "verdict", "its process is gone")
            assert "--resume" in text(browser, "why")
    # Nobody here holds this one: all that can be told is that nothing more comes.
    now = time.time()
    append(tmp_path / "elsewhere", start(time=now - 3), *(train(i, now - 3 + i) for i in (1, 2, 3)))
    with serving(tmp_path / "elsewhere") as server, page(browser, server):
        until_text(browser, "verdict", "running")
        until_text(browser, "verdict", "silent")
        assert "with 1.0 s between log lines before" in text(browser, "why")
        append(tmp_path / "elsewhere", train(4, time.time()))
        until_text(browser, "verdict", "running")


def test_a_server_that_is_gone_is_said_and_found_again(browser: Chrome, tmp_path: Path) -> None:
    append(tmp_path, start(), {"event": "done", "update": 100, "time": 1.0})
    with WatchServer(tmp_path) as free:
        port = free.port
    command = [sys.executable, "-m", "fastdistil", "watch", str(tmp_path), "--port", str(port)]

    def lost() -> bool:
        return browser.find_element(By.ID, "lost").is_displayed()

    for round_ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert str(port) in process.stdout.readline()
                if round_ == 0:
                    browser.get(f"http://127.0.0.1:{port}/")
                    until(browser, lambda: browser.find_elements(By.ID, "verdict"))
                    until_text(browser, "verdict", "done")
                until(browser, lambda: not lost())
            finally:
                process.kill()
        until(browser, lost)
    browser.get("about:blank")
    browser.get_log("browser")


# ---- what it looks like, and to whom


@pytest.mark.parametrize(
    ("width", "media"),
    [(WIDE, {}), (NARROW, {}), (NARROW, {"prefers_color_scheme": "dark"})],
    ids=["wide", "narrow", "narrow-dark"],
)
def test_nothing_overflows_and_the_picture_is_not_blank(
    browser: Chrome, tmp_path: Path, width: int, media: dict[str, str]
) -> None:
    rich_run(tmp_path)
    with serving(tmp_path) as server, page(browser, server, width, **media):
        until_text(browser, "update", "30 of 100")
        until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#memory svg.chart"))
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        sticking_out = browser.execute_script(
            "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table, svg')"
            " && (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5))"
            ".map(e => `${e.tagName} ${e.id} ${e.textContent.slice(0, 40)}`)"
        )
        assert sticking_out == []
        picture = tmp_path / "page.png"
        assert browser.save_screenshot(str(picture))
        rows = scanlines(picture.read_bytes())
        assert len(rows) == 1600
        assert len(set(rows)) > 400
        dark = sum(rows[0][1:4]) < 3 * 64
        assert dark == ("prefers_color_scheme" in media)


def scanlines(png: bytes) -> list[bytes]:
    """Filtered, as they are stored; the first pixel of the first row stands as it is. In colour, without a palette."""
    at, packed, width = 8, b"", 0
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        if kind == b"IHDR":
            width = struct.unpack(">I", png[at + 8 : at + 12])[0] * {2: 3, 6: 4}[png[at + 17]]
        if kind == b"IDAT":
            packed += png[at + 8 : at + 8 + size]
        at += size + 12
    raw = zlib.decompress(packed)
    return [raw[i : i + width + 1] for i in range(0, len(raw), width + 1)]


def test_colours_follow_the_readers_wishes(browser: Chrome, tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    grounds = []
    with serving(tmp_path) as server:
        for media in ({}, {"prefers_color_scheme": "dark"}):
            with page(browser, server, **media):
                grounds.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_what_a_run_says_is_text_and_nothing_is_loaded_from_elsewhere(browser: Chrome, tmp_path: Path) -> None:
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    run = tmp_path / "<b onclick=1>name"
    line = train(
        1, 1.0, phases={evil: [0.1]}, step_s=[0.2], device={"throttled": {evil: 1.0}}, mfu={"student": 0.1, "peak_source": evil}
    )
    append(
        run,
        start(device=evil, engine=evil, ranks=2, precision=evil),
        line,
        {"event": "note", "update": 1, "time": 1.0, "message": evil},
        {"event": "stopped", "update": 1, "time": 1.0, "why": evil},
    )
    with serving(run) as server, page(browser, server):
        until_text(browser, "log", evil)
        assert run.name in text(browser, "h1")
        assert evil in text(browser, "why")
        assert evil in text(browser, "header")
        assert evil in text(browser, "speed")
        assert browser.execute_script("return window.hacked") is None
        assert browser.find_elements(By.CSS_SELECTOR, "img, [onclick], main script") == []
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded
        assert all(name.startswith(server.url) for name in loaded)


def test_the_token_leaves_the_address_and_stays_with_the_browser(browser: Chrome, tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with serving(tmp_path, "0.0.0.0") as server:
        address = f"http://127.0.0.1:{server.port}/"
        browser.get(f"{address}?token={server.token}")
        until_text(browser, "update", "1 of 100")
        assert browser.current_url == address
        browser.refresh()
        until_text(browser, "update", "1 of 100")
        browser.delete_all_cookies()
        browser.refresh()
        until(browser, lambda: "with its token" in browser.find_element(By.TAG_NAME, "body").text)
    browser.get_log("browser")
