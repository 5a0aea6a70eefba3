"""The report's page, parsed: its rows, text and charts, and what holds for every page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastdistil.profiling.report import report

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Parses a page; `rows`: the cells of each table row, `text`: what a reader sees, `tags`: all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.seen: list[str] = []
        self.html = html
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, text: str) -> None:
        if "style" in self.open:
            return
        self.seen.append(text)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    def section(self, key: str) -> str:
        match = re.search(rf'<section id="{key}">.*?</section>', self.html, re.DOTALL)
        assert match
        return match[0]

    def begins(self, label: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].startswith(label))

    def row(self, label: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == label)


def page_of(*runs: Path) -> Page:
    return Page(report.as_html(report.read_runs(runs)))


def charts_of(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def figures_of(*runs: Path) -> list[dict[str, Any]]:
    return [run["figures"] for run in json.loads(report.json_text(report.read_runs(runs)))["runs"]]


def check_page(page: Page) -> None:
    assert page.html.startswith("<!doctype html>") or page.html.lstrip().startswith("<!doctype html>")
    for chart in charts_of(page.html):
        if chart.get("class") == "chart":
            assert chart.get("role") == "img"
            assert chart.get("aria-label")
    assert not re.search(r"\b(nan|None|inf|Infinity|undefined|Markup)\b", page.text)
    for number in re.findall(r'(?:x|y|width|height|d|viewBox|points)="([^"]*)"', page.html):
        assert not re.search(r"nan|inf|None|e[+-]", number), number
    assert "://" not in page.html
    assert "url(" not in page.html
    assert "@import" not in page.html
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "srcset", "action", "background")]
    assert all(value.startswith("#") for name, value in attributes if name == "href")
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in attributes if name == "href"} <= set(ids)
