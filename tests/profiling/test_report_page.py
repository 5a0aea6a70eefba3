"""The report in a real browser: it shows something, in light and dark; nothing overflows, down to 360 pixels; it prints.

Needs Chromium; the browser is offline here, as every request of a file: page would be.
"""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest

from fastdistil.profiling.report.report import write_report
from tests.event_streams import Stream, write_run

PROBE = """<!doctype html><title>probe</title><style>body { margin: 0 } iframe { border: 0; height: 4000px }</style>
<iframe style="width:WIDTHpx" srcdoc="PAGE"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const shown = [...page.querySelectorAll("svg.chart")].filter(chart => chart.getBoundingClientRect().width > 0);
  const cut = shown.flatMap(chart => {
    const box = chart.closest("figure").getBoundingClientRect();
    return [...chart.querySelectorAll("text")].filter(text => {
      const at = text.getBoundingClientRect();
      return at.left < box.left || at.right > box.right || at.top < box.top || at.bottom > box.bottom;
    }).map(text => text.textContent);
  });
  const sizes = shown.flatMap(chart => [...chart.querySelectorAll("text")].map(text => text.getBoundingClientRect().height));
  document.title = JSON.stringify({width: root.clientWidth, scroll: root.scrollWidth, charts: shown.length, cut: cut,
                                   smallest: Math.min(...sizes)});
});
</script>"""


@pytest.fixture(scope="module")
def chromium(need: Callable[[str, str], Never], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a headless browser with more options; gives what it prints."""
    executable = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if executable is None:
        need("chromium", "no Chromium on the path (Debian: apt install chromium): the report's page is not looked at")
    profile = tmp_path_factory.mktemp("profile")

    def run(*options: str) -> str:
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        fixed = ("--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}", *sandbox)
        done = subprocess.run([executable, *fixed, *options], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = write_run(folder / "a-run", Stream(ranks=8))
    other = write_run(folder / "another-run-with-a-name-that-is-much-longer-than-anybody-would-like", Stream(speed=1.2, seed=5))
    runs_by_name = {"one": [one], "several": [one, other]}
    for name, runs in runs_by_name.items():
        write_report(runs, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in runs_by_name}


@pytest.mark.parametrize("width", [360, 768, 1240])
@pytest.mark.parametrize("name", ["one", "several"])
def test_nothing_overflows_at_any_width(
    chromium: Callable[..., str], pages: dict[str, Path], tmp_path: Path, name: str, width: int
) -> None:
    page = html.escape(pages[name].read_text(encoding="utf-8"))
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", page), encoding="utf-8")
    printed = chromium("--virtual-time-budget=10000", "--dump-dom", f"file://{probe}")
    title = re.search(r"<title>(.*?)</title>", printed, re.DOTALL)
    assert title
    measured = json.loads(html.unescape(title[1]))
    assert measured["width"] == width
    assert measured["scroll"] <= width
    assert measured["charts"] >= 8
    assert measured["cut"] == []
    assert measured["smallest"] >= 9.99  # a line of text: letters of some 9 pixels


def test_light_and_dark_both_show_a_page(chromium: Callable[..., str], pages: dict[str, Path], tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image", reason="pillow is not installed: the picture of the page is not looked at")
    grounds = []
    for scheme in (1, 0):  # light, dark
        shot = tmp_path / f"{scheme}.png"
        chromium(
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1240,1600",
            f"--screenshot={shot}",
            f"file://{pages['one']}",
        )
        image = images.open(shot).convert("L")
        counts = image.histogram()
        ground = max(range(256), key=counts.__getitem__)
        grounds.append(ground)
        assert counts[ground] < 0.97 * image.width * image.height  # not blank
        far = sum(count for level, count in enumerate(counts) if abs(level - ground) > 100)
        assert far > 5_000  # letters and lines that stand out
    assert grounds[0] > 230
    assert grounds[1] < 40


def test_it_prints(chromium: Callable[..., str], pages: dict[str, Path], tmp_path: Path) -> None:
    chromium(f"--print-to-pdf={tmp_path / 'page.pdf'}", f"file://{pages['one']}")
    document = (tmp_path / "page.pdf").read_bytes()
    assert document.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", document)) <= 30
