"""Spans against a clock that the test turns, and around real work."""

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastdistil.profiling.spans import Spans
from fastdistil.profiling.trace import Tracer

CPU = torch.device("cpu")


def clock(*marks: float) -> Callable[[], float]:
    return iter(marks).__next__


def test_what_is_inside_another_span_is_taken_out_of_it_and_all_add_up() -> None:
    #                begin data      backward compression     exposed      end
    spans = Spans(CPU, clock=clock(0.0, 0.0, 1.0, 2.0, 3.0, 3.5, 6.0, 6.0, 8.0, 10.0))
    spans.begin()
    with spans("data"):
        pass
    with spans("backward"), spans("compression"):
        pass
    with spans("exposed"):
        pass
    spans.end()
    timings = spans.read()
    assert timings == {
        "step_s": [10.0],
        "warmup": 0,
        "phases": {"data": [1.0], "backward": [3.5], "compression": [0.5], "exposed": [2.0]},
    }


def test_spans_of_a_name_add_up_within_an_update_and_not_between_updates() -> None:
    spans = Spans(CPU, clock=itertools.count(0.0).__next__)
    for micro_batches in (3, 1):
        spans.begin()
        for _ in range(micro_batches):
            with spans("student"):
                pass
        spans.end()
    assert spans.read()["phases"] == {"student": [3.0, 1.0]}
    assert spans.read() == {"step_s": [], "warmup": 0, "phases": {}}


def test_what_lies_between_updates_and_a_dropped_window_count_nowhere() -> None:
    spans = Spans(CPU, clock=clock(0, 1, 2, 100, 101, 104))
    spans.begin()
    spans("teacher").__enter__()  # the window was dropped in it
    spans.begin()
    spans.end()  # 2 to 100
    spans.begin()
    spans.end()
    assert spans.read()["step_s"] == [98, 3]


def test_communication_is_from_the_first_departure_until_the_last_was_waited_for() -> None:
    spans = Spans(CPU, clock=clock(0, 10, 14, 20, 21, 30))
    spans.begin()
    spans.departed()  # 10
    spans.departed()  # is on its way already
    spans.awaited()  # 14
    spans.departed()  # 20: of the next micro-batch
    spans.awaited()  # 21
    spans.end()
    assert spans.read()["phases"] == {"communication": [5.0]}


def test_the_first_updates_are_marked_as_warm_up() -> None:
    spans = Spans(CPU, warmup=3)
    counts = []
    for updates in (2, 2, 2):
        for _ in range(updates):
            spans.begin()
            spans.end()
        counts.append(spans.read()["warmup"])
    assert counts == [2, 1, 0]


def test_an_update_that_does_not_count_takes_those_before_it_along() -> None:
    spans = Spans(CPU)
    tallies = []
    for counts in (True, True, False, True), (True,):
        for counted in counts:
            spans.begin()
            spans.end(counts=counted)
        timings = spans.read()
        tallies.append((len(timings["step_s"]), timings["warmup"]))
    assert tallies == [(4, 3), (1, 0)]


class FakeEvent:
    """CUDA's, with a device's clock that the test turns."""

    now_ms = 0.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self) -> None:
        self.at_ms = FakeEvent.now_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at_ms - self.at_ms


def test_on_a_gpu_events_are_read_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", 0)
    spans = Spans(torch.device("cuda"))
    for _ in range(3):
        spans.begin()
        with spans("teacher"):
            FakeEvent.now_ms += 250.0
        spans.departed()
        FakeEvent.now_ms += 250.0
        spans.awaited()
        spans.end()
        timings = spans.read()
        assert timings["step_s"] == [0.5]
        assert timings["phases"] == {"teacher": [0.25], "communication": [0.25]}
    assert FakeEvent.made == 6


class Ranges:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def range_push(self, name: str) -> None:
        self.heard.append(name)

    def range_pop(self) -> None:
        self.heard.append("/")


def test_ranges_hear_of_every_span() -> None:
    ranges = Ranges()
    spans = Spans(CPU, ranges=ranges)
    spans.begin()
    with spans("backward"), spans("compression"):
        pass
    spans.end()
    with pytest.raises(KeyError), spans.range("evaluation"):
        raise KeyError
    assert ranges.heard == ["backward", "compression", "/", "/", "evaluation", "/"]
    assert not spans.read()["phases"].keys() - {"backward", "compression"}


def updates(spans: Spans, tracer: Tracer, count: int) -> Iterator[tuple[int, tuple[bytes, list[dict[str, Any]]]]]:
    """Those after which there is a trace."""
    a = torch.randn(64, 64)
    for update in range(1, count + 1):
        if tracer.begins(update):
            tracer.start()
        spans.begin()
        with spans("teacher"):
            a @ a
        with spans("student"):
            torch.softmax(a, 0)
        spans.end()
        if tracer.ends(update, last=update == count):
            yield update, tracer.stop()


def test_a_trace_holds_the_updates_asked_for_and_their_spans() -> None:
    spans = Spans(CPU)
    traces = dict(updates(spans, Tracer([2, 3], CPU, spans), 5))
    assert list(traces) == [3]
    data, kernels = traces[3]
    names = [event.get("name") for event in json.loads(gzip.decompress(data))["traceEvents"]]
    assert names.count("teacher") == names.count("student") == 2  # of updates 2 and 3
    assert names.count("aten::mm") == 2
    assert {"aten::mm", "aten::_softmax"} <= {kernel["name"] for kernel in kernels}
    assert not {"teacher", "student"} & {kernel["name"] for kernel in kernels}
    (mm,) = [kernel for kernel in kernels if kernel["name"] == "aten::mm"]
    assert mm["calls"] == 2 and 0 < mm["share"] < 1
    assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1, abs=0.02)
    assert spans.ranges is None


def test_which_updates_are_traced() -> None:
    spans = Spans(CPU)
    assert not dict(updates(spans, Tracer(None, CPU, spans), 3))
    assert list(dict(updates(spans, Tracer([2, 9], CPU, spans), 3))) == [3], "the run ends before"
    continued = Tracer([2, 9], CPU, spans)
    assert continued.begins(5) and not continued.tracing
