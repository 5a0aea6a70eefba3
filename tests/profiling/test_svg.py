"""Ticks, columns and geometry of the charts, against the numbers that they show."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fastdistil.profiling import quantities
from fastdistil.profiling.report import svg as charts
from fastdistil.profiling.report.svg import Axis, Bar, ChartSeries, Layer

finite = st.floats(-1e15, 1e15, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-9)
BAD = re.compile(r"\b(nan|inf|infinity|none)\b", re.IGNORECASE)


def drawn(svg: str) -> ElementTree.Element:
    """The chart, parsed; nothing in it is a number that is none."""
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert not BAD.search(svg), BAD.search(svg)
    assert "://" not in svg
    return root


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


@given(finite, finite, st.integers(2, 12))
@example(0.0, 0.0, 5)
@example(5e-324, 1e-9, 5)
@example(-3.0, 0.7, 5)
def test_nice_ticks_enclose_in_equal_steps_of_1_2_or_5(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))
    assume(high == low or high - low > 1e-9 * max(abs(low), abs(high)))
    ticks = charts.nice_ticks(low, high, count)
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= count + 3
    gaps = np.diff(ticks)
    assert gaps.min() > 0
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)
    leading = gaps.mean() / 10 ** math.floor(math.log10(gaps.mean()) + 1e-6)
    assert min(abs(leading - digit) for digit in (1, 2, 5)) < 1e-4


@pytest.mark.parametrize("ends", [(math.nan, 1.0), (0.0, math.inf), (2.0, 1.0)])
def test_nice_ticks_refuse_what_has_no_range(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite low <= high"):
        charts.nice_ticks(*ends)


@given(st.floats(1e-12, 1e12), st.floats(charts.COLUMN_WIDTH, 1e9))
def test_log_ticks_are_round_within_the_range_and_not_too_many(low: float, factor: float) -> None:
    high = low * max(factor, 20.0)
    ticks = charts.log_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert ticks == sorted(ticks)
    assert low * (1 - 1e-6) <= ticks[0]
    assert ticks[-1] <= high * (1 + 1e-6)
    for tick in ticks:
        assert min(abs(tick / 10 ** math.floor(math.log10(tick) + 1e-6) - digit) for digit in (1, 2, 5)) < 1e-4


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300),
    st.integers(1, 40),
)
def test_columns_keep_extremes_means_and_count(values: list[float], count: int) -> None:
    y = np.array(values)
    x = np.arange(len(values), dtype=np.float64)
    columns = charts.gather(x, y, 0.0, float(x[-1]), count)
    assert len(columns.x) <= count
    assert (np.diff(columns.x) > 0).all()
    if not np.isfinite(y).any():
        assert np.isnan(columns.mean).all()
        return
    assert np.nanmax(columns.high) == np.nanmax(y)
    assert np.nanmin(columns.low) == np.nanmin(y)
    width = (x[-1] - 0.0) / count or 1.0
    for index, mean in enumerate(columns.mean):  # each column anew, by its definition
        column = min(int(columns.x[index] / width), count - 1)
        members = [b for a, b in zip(x, y, strict=True) if min(int(a / width), count - 1) == column and math.isfinite(b)]
        assert mean == pytest.approx(np.mean(members), abs=1e-6) if members else math.isnan(mean)


def test_a_line_lies_where_its_values_say() -> None:
    x, y = np.array([0.0, 50.0, 100.0]), np.array([0.0, 5.0, 10.0])
    root = drawn(
        charts.line_chart([ChartSeries(name="loss", x=x, y=y)], x=Axis(label="update"), y=Axis(label="loss"), title="t")
    )
    (line,) = of_class(root, "line")
    (x0, y0), (x1, y1), (x2, y2) = points(line.get("d", ""))
    grid = sorted({float(re.findall(r" ([\d.]+)H", path.get("d", ""))[0]) for path in of_class(root, "grid")})
    assert (y0, y2) == (grid[-1], grid[0])  # 0 and 10 are the outermost ticks
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert x2 > x0


def test_tick_labels_are_the_values_of_their_places() -> None:
    x, y = np.array([0.0, 1.0]), np.array([0.0, 0.004])
    root = drawn(
        charts.line_chart([ChartSeries(name="s", x=x, y=y)], x=Axis(label="u"), y=Axis(label="step", unit="s"), title="t")
    )
    labels = [(text.text, float(text.get("y", "nan"))) for text in of_class(root, "tick") if text.get("text-anchor") == "end"]
    assert [text for text, _ in labels[:5]] == ["0", "1", "2", "3", "4"]  # milliseconds
    heights = [height for _, height in labels[:5]]
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], atol=0.11)
    assert "step, ms" in [text.text for text in of_class(root, "label")]


def test_updates_have_no_ticks_between_them() -> None:
    x = np.array([1.0, 2.0])
    root = drawn(
        charts.line_chart([ChartSeries(name="s", x=x, y=x)], x=Axis(label="update"), y=Axis(label="v"), title="t", width=740)
    )
    labels = [text.text for text in of_class(root, "tick") if text.get("text-anchor") != "end" or text.get("y") == "193"]
    assert labels == ["1", "2"]


def test_a_single_spike_among_many_is_drawn() -> None:
    y = np.full(200_000, 1.0)
    y[123_456] = 9.0
    x = np.arange(len(y), dtype=np.float64)
    root = drawn(
        charts.line_chart([ChartSeries(name="step", x=x, y=y)], x=Axis(label="u"), y=Axis(label="s", zero=True), title="t")
    )
    (band,) = of_class(root, "band")
    (line,) = of_class(root, "line")
    highest = min(points(band.get("d", "")), key=lambda point: point[1])
    level = points(line.get("d", ""))[0][1]
    bottom = max(float(re.findall(r" ([\d.]+)H", path.get("d", ""))[0]) for path in of_class(root, "grid"))
    assert (bottom - highest[1]) / (bottom - level) == pytest.approx(9.0, rel=0.02)
    left, right = points(line.get("d", ""))[0][0], points(line.get("d", ""))[-1][0]
    assert (highest[0] - left) / (right - left) == pytest.approx(123_456 / 200_000, abs=0.01)
    assert len(ElementTree.tostring(root)) < 40_000


def test_values_that_are_not_finite_are_gaps() -> None:
    x = np.arange(6, dtype=np.float64)
    y = np.array([1.0, 2.0, math.nan, math.inf, 3.0, 4.0])
    root = drawn(charts.line_chart([ChartSeries(name="loss", x=x, y=y)], x=Axis(label="u"), y=Axis(label="loss"), title="t"))
    (line,) = of_class(root, "line")
    assert line.get("d", "").count("M") == 2
    assert len(points(line.get("d", ""))) == 4
    with pytest.raises(ValueError, match="nothing to draw"):
        charts.line_chart([ChartSeries(name="a", x=x, y=np.full(6, math.nan))], x=Axis(label="u"), y=Axis(label="v"), title="t")


def test_a_logarithmic_axis_places_decades_evenly_and_leaves_zero_out() -> None:
    x, y = np.arange(4, dtype=np.float64), np.array([1.0, 10.0, 0.0, 100.0])
    axis = Axis(label="loss", log=True)
    root = drawn(charts.line_chart([ChartSeries(name="loss", x=x, y=y)], x=Axis(label="u"), y=axis, title="t"))
    (line,) = of_class(root, "line")
    one, ten, hundred = (height for _, height in points(line.get("d", "")))
    assert one - ten == pytest.approx(ten - hundred, abs=0.11)


def test_error_bars_reach_from_low_to_high() -> None:
    x, y = np.array([1.0, 2.0]), np.array([4.0, 2.0])
    series = ChartSeries(name="loss", x=x, y=y, low=y - 1, high=y + 1)
    root = drawn(charts.line_chart([series], x=Axis(label="u"), y=Axis(label="loss", zero=True), title="t"))
    (bars,) = of_class(root, "error")
    (low0, high0), *_ = [(float(a), float(b)) for a, b in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", bars.get("d", ""))]
    (line,) = of_class(root, "line")
    (_, at4), (_, at2) = points(line.get("d", ""))
    assert (low0 - high0) == pytest.approx(at2 - at4, abs=0.2)  # both are 2 of the axis
    assert (low0 + high0) / 2 == pytest.approx(at4, abs=0.1)


def test_series_are_told_apart_by_colour_and_by_dash() -> None:
    x = np.arange(3, dtype=np.float64)
    series = [ChartSeries(name=f"run {style}", x=x, y=x + style, style=style) for style in range(3)]
    root = drawn(charts.line_chart(series, x=Axis(label="u"), y=Axis(label="v"), title="t"))
    assert [line.get("class") for line in of_class(root, "line")] == ["line s0", "line s1", "line s2"]


def test_readings_under_the_pointer_say_the_numbers() -> None:
    x, y = np.array([10.0, 20.0]), np.array([0.25, 0.5])
    axis = Axis(label="step", unit="s")
    root = drawn(charts.line_chart([ChartSeries(name="run", x=x, y=y)], x=Axis(label="update"), y=axis, title="t"))
    titles = [rect.findtext("title") for rect in of_class(root, "hover")]
    assert titles == ["update 10\nrun: 250.0 ms", "update 20\nrun: 500.0 ms"]


def test_a_stack_is_as_high_as_the_sum_of_its_parts() -> None:
    x = np.array([1.0, 2.0, 3.0])
    layers = [Layer(name="data", values=np.array([1.0, 1.0, 1.0])), Layer(name="backward", values=np.array([2.0, 3.0, 1.0]))]
    root = drawn(charts.stacked_chart(x, layers, x_axis=Axis(label="u"), y_axis=Axis(label="s"), title="t"))
    data, backward = (points(layer.get("d", "")) for layer in of_class(root, "layer"))
    bottom = max(height for _, height in data)
    unit = bottom - min(height for _, height in data)
    tops = [bottom - height for _, height in backward[:6:2]]
    assert [top / unit for top in tops] == pytest.approx([3.0, 4.0, 2.0], rel=0.02)
    assert charts.stack_top(x, [layer.values for layer in layers], 360) == 4.0


def test_a_stack_of_many_updates_is_the_mean_of_its_columns() -> None:
    x = np.arange(10_000, dtype=np.float64)
    values = np.tile([1.0, 3.0], 5_000)
    assert charts.stack_top(x, [values], 360) == pytest.approx(2.0, rel=0.05)
    drawn(
        charts.stacked_chart(x, [Layer(name="data", values=values)], x_axis=Axis(label="u"), y_axis=Axis(label="s"), title="t")
    )


def test_a_histogram_counts_every_value() -> None:
    values = np.concatenate([np.full(90, 1.0), np.full(9, 1.5), [40.0]])
    svg = charts.histogram(values, x=Axis(label="step", unit="s"), marks=[("p50", 1.0)], domain=(0.5, 2.0), title="t")
    titles = [str(bar.findtext("title")) for bar in of_class(drawn(svg), "bar")]
    counts = [int(re.findall(r": ([\d,]+) updates", text)[0]) for text in titles]
    assert counts == [90, 9, 1]
    assert "and more, up to 40.00 s" in titles[-1]


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=50))
def test_histograms_of_any_values_are_well_formed(values: list[float]) -> None:
    root = drawn(charts.histogram(np.array(values), x=Axis(label="step", unit="s"), marks=[("p50", values[0])], title="t"))
    heights = [float(bar.get("height", "nan")) for bar in of_class(root, "bar")]
    assert min(heights) > 0


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar(name="measured", parts=[("logits", 3e9), ("activations", 1e9)]), Bar(name="estimated", parts=[("logits", 2e9)])]
    root = drawn(charts.bar_chart(bars, x=Axis(label="bytes", unit="bytes"), title="t", marks=[("peak", 4e9)]))
    widths = [float(rect.get("width", "nan")) for rect in of_class(root, "area")]
    assert widths == pytest.approx([3 * widths[1], widths[1], 2 * widths[1]], rel=0.01)
    (mark,) = of_class(root, "mark")
    first, second, _ = of_class(root, "area")
    end = float(second.get("x", "nan")) + widths[1]
    assert float(re.findall(r"M([\d.]+)", mark.get("d", ""))[0]) == pytest.approx(end, abs=0.2)
    assert float(second.get("x", "nan")) == pytest.approx(float(first.get("x", "nan")) + widths[0], abs=0.2)


def test_ranks_are_bars_and_the_slowest_is_pointed_at() -> None:
    svg = charts.rank_chart(np.array([1.0, 2.0, 1.5]), y=Axis(label="work", unit="s", zero=True), mark=1, title="t")
    bars = of_class(drawn(svg), "bar")
    heights = [float(bar.get("height", "nan")) for bar in bars]
    assert heights == pytest.approx([heights[1] / 2, heights[1], heights[1] * 0.75], rel=0.01)
    assert ["slowest" in bar.get("class", "") for bar in bars] == [False, True, False]


def test_names_cannot_break_out_of_a_chart() -> None:
    name = '</title><script>alert(1)</script>&"\x00\x1b[31m\ud800'
    x = np.arange(3, dtype=np.float64)
    series = [ChartSeries(name=name, x=x, y=x)]
    root = drawn(charts.line_chart(series, x=Axis(label=name), y=Axis(label=name, unit=name), title=name))
    assert not [element for element in root.iter() if element.tag == "script"]
    ElementTree.fromstring(charts.patch(name))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.30 ms"),
        (4.2e-5, "s", "42.00 µs"),
        (1.0, "s", "1.000 s"),
        (300.0, "s", "5.000 min"),
        (0.4123, "share", "41.2%"),
        (3 * 2**30, "bytes", "3.000 GiB"),
        (2.0, "nats", "2.000 nats"),
        (7.0, "", "7.000"),
        (96, "bytes/update", "96 B/update"),
        (412_300.0, "tokens/s", "412.3 k tokens/s"),
        (1_040_595.0, "tokens/s", "1.041 M tokens/s"),
        (9.89e14, "flop/s", "989.0 TFLOP/s"),
        (1200, "", "1,200"),
        (0.00005, "", "5e-5"),
        (0, "s", "0 s"),
        (1023.99, "", "1,024"),
        (math.nan, "s", "not finite"),
    ],
)
def test_quantities_are_readable(value: float, unit: str, text: str) -> None:
    assert quantities.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0997, "s", "100 ms"),
        (0.9996, "s", "1.0 s"),
        (0.00996, "s", "10 ms"),
        (0.894, "s", "894 ms"),
        (9996.0, "J", "10 kJ"),
        (0.00123, "", "0.0012"),
    ],
)
def test_numbers_are_rounded_before_their_format_is_chosen(value: float, unit: str, text: str) -> None:
    assert quantities.quantity(value, unit, digits=2) == text
