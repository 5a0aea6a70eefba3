"""Two measurements: what the interval is worth, what is refused, what the verdict says and how the command ends."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastdistil import cli
from fastdistil.errors import FellShort, UserError
from fastdistil.profiling.report.bootstrap import block_length, ratio_of, resampled_medians
from fastdistil.profiling.report.compare import compare, load_measurement, parse_limit, run_compare, show
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.summary import summarise
from tests.profiling.measured_runs import RECIPE, Samples, noisy, run


def row(comparison: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in comparison["rows"] if entry["name"] == name)


# The interval.


@pytest.mark.parametrize(("n", "correlation", "least"), [(30, 0.0, 0.90), (100, 0.0, 0.90), (100, 0.5, 0.86)])
def test_interval_holds_the_truth_as_often_as_it_says(
    n: int, correlation: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """95 in 100; where steps resemble each other a little less, as bootstrap.py says."""
    monkeypatch.setattr("fastdistil.profiling.report.bootstrap.RESAMPLES", 2000)  # quicker, and sharp enough
    held = 0
    for seed in range(100):
        a, b = (noisy(n, 2 * seed + side, median, correlation=correlation) for side, median in ((0, 0.1), (1, 0.11)))
        ratio = ratio_of(a, b)
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        held += ratio.low <= 1.1 <= ratio.high
    assert least <= held / 100 <= 0.995


def test_single_steps_would_claim_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same correlated steps without blocks: the interval is narrower by far."""
    a, b = noisy(300, 0, correlation=0.8), noisy(300, 1, correlation=0.8)
    blocks = ratio_of(a, b)
    monkeypatch.setattr("fastdistil.profiling.report.bootstrap.block_length", lambda _: 1)
    single = ratio_of(a, b)
    assert blocks is not None and single is not None
    assert blocks.high - blocks.low > 1.5 * (single.high - single.low)  # type: ignore[operator]


def test_blocks_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps that do not depend on each other blocks of any length say the same; a step taken ten times over would not."""
    a, b = noisy(300, 0), noisy(300, 1)
    widths = []
    for length in (1, 10):
        monkeypatch.setattr("fastdistil.profiling.report.bootstrap.block_length", lambda _, length=length: length)
        ratio = ratio_of(a, b)
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        widths.append(ratio.high - ratio.low)
    assert 0.7 < widths[1] / widths[0] < 1.5


@pytest.mark.parametrize("n", [6, 7, 40, 301])
def test_order_statistics_are_those_of_resamples(n: int) -> None:
    """Two-sample Kolmogorov-Smirnov: of 10,000 medians each, further apart than 0.0272 once in 1,000 times."""
    steps = np.array(noisy(n, 0))
    drawn = resampled_medians(steps, np.random.default_rng(1))
    resampled = np.median(steps[np.random.default_rng(2).integers(n, size=(len(drawn), n))], axis=1)
    places = np.concatenate([drawn, resampled])
    below = [np.searchsorted(np.sort(medians), places, side="right") for medians in (drawn, resampled)]
    assert np.abs(below[0] - below[1]).max() / len(drawn) < 0.0272


def test_block_length() -> None:
    """Against the formula with the true covariances of an AR(1) series: rho^k, all lags."""
    rho, n = 0.7, 4000
    lags = np.arange(1, 200)
    spectrum, slope = 1 + 2 * (rho**lags).sum(), 2 * (lags * rho**lags).sum()
    ideal = (2 * slope**2 / (4 / 3 * spectrum**2) * n) ** (1 / 3)
    median_length = np.median([block_length(noisy(n, seed, noise=1e-3, correlation=rho)) for seed in range(20)])
    assert 0.7 * ideal < median_length < 1.4 * ideal
    assert np.median([block_length(noisy(n, seed)) for seed in range(20)]) == 1
    assert block_length(np.ones(50)) == 1
    assert block_length(np.tile([1.0, 2.0], 50)) >= 1


def test_ratio_of_few_samples_has_no_interval() -> None:
    ratio = ratio_of([1.0] * 5, [2.0] * 50)
    assert ratio is not None and (ratio.value, ratio.low, ratio.high) == (2.0, None, None)
    assert ratio_of([], [1.0]) is None and ratio_of([0.0] * 9, [1.0] * 9) is None


def test_the_same_samples_give_the_same_answer() -> None:
    assert ratio_of(noisy(40, 0), noisy(40, 1)) == ratio_of(noisy(40, 0), noisy(40, 1))


# Runs.


def test_a_run_against_itself(tmp_path: Path) -> None:
    comparison = compare(run(tmp_path / "a", noisy(40, 0)), tmp_path / "a", fail_above=0.0)
    step = row(comparison, "step")
    assert step["ratio"] == 1 and step["interval"][0] < 1 < step["interval"][1] and step["n"] == [40, 40]
    assert step["a"] == pytest.approx(float(np.median(noisy(40, 0))))
    assert row(comparison, "tokens/s")["ratio"] == 1
    assert comparison["verdict"]["slower"] == [] and comparison["differences"] == comparison["warnings"] == []


def test_a_shift_is_detected(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", noisy(40, 0)), run(tmp_path / "b", noisy(40, 1, 0.11))
    comparison = compare(a, b, fail_above=0.05)
    assert comparison["verdict"]["slower"] == ["step"]
    assert row(comparison, "step")["interval"][0] > 1.05
    assert row(comparison, "student")["ratio"] == pytest.approx(row(comparison, "step")["ratio"])
    low, high = row(comparison, "tokens/s")["interval"]
    assert low < 1 / 1.1 < high < 1
    assert compare(a, b, fail_above=0.2)["verdict"]["slower"] == []
    assert compare(b, a, fail_above=0.05)["verdict"]["slower"] == []  # faster


def test_a_shift_within_the_noise_is_no_verdict(tmp_path: Path) -> None:
    """The one number says 8%, the interval from less than 5%: not certain."""
    a, b = run(tmp_path / "a", noisy(12, 0, noise=0.1)), run(tmp_path / "b", noisy(12, 1, 0.11, noise=0.1))
    comparison = compare(a, b, fail_above=0.05)
    assert row(comparison, "step")["ratio"] > 1.05 > row(comparison, "step")["interval"][0]
    assert comparison["verdict"]["slower"] == []


def test_losses_at_the_last_update_of_both(tmp_path: Path) -> None:
    comparison = compare(run(tmp_path / "a", noisy(10, 0)), run(tmp_path / "b", noisy(8, 1)))
    assert comparison["losses"] == {"update": 8, "a": {"update": 8, "total": 1.25}, "b": {"update": 8, "total": 1.25}}
    assert comparison["verdict"] is None


@pytest.mark.parametrize(
    ("start", "recipe", "complaint"),
    [
        ({"device": "cuda:0"}, RECIPE, "device: cpu against cuda:0"),
        ({"precision": "bf16"}, RECIPE, "dtype: fp32 against bf16"),
        ({"ranks": 2}, RECIPE, "ranks: 1 against 2"),
        ({"student_parameters": 101}, RECIPE, "student_parameters: 100 against 101"),
        ({}, {**RECIPE, "data": {"micro_batch_tokens": 512}}, "micro_batch_tokens: 256 against 512"),
        ({}, {**RECIPE, "loop": {"accumulation": 4}}, "accumulation: 2 against 4"),
    ],
)
def test_other_work_is_refused(tmp_path: Path, start: Any, recipe: Any, complaint: str) -> None:
    a, b = run(tmp_path / "a", noisy(10, 0)), run(tmp_path / "b", noisy(10, 1), recipe, **start)
    with pytest.raises(UserError, match=complaint):
        compare(a, b)
    comparison = compare(a, b, anyway=True)
    assert complaint.partition(":")[0] in [difference["key"] for difference in comparison["differences"]]


def test_other_differences_are_listed(tmp_path: Path) -> None:
    other = {**RECIPE, "teacher": {"path": "b"}, "name": "x", "loop": {"accumulation": 2, "updates": 7}, "optim": {"lr": 1.0}}
    comparison = compare(run(tmp_path / "a", noisy(10, 0)), run(tmp_path / "b", noisy(10, 1), other, engine="torch"))
    assert comparison["differences"] == [
        {"key": "engine", "a": "alone", "b": "torch"},
        {"key": "optim.lr", "a": "not recorded", "b": 1.0},
        {"key": "teacher.path", "a": "a", "b": "b"},
    ]


def on_devices(directory: Path, steps: Samples, *devices: dict[str, Any]) -> Path:
    """A run of two ranks, each on one of these."""
    device_rows = [{"rank": rank, "uuid": str(directory), **facts} for rank, facts in enumerate(devices)]
    run(directory, steps, device="cuda:0", ranks=2)
    with (directory / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "environment", "devices": device_rows}) + "\n")
    return directory


def test_another_ranks_device_is_other_work(tmp_path: Path) -> None:
    h200, a100 = {"name": "NVIDIA H200"}, {"name": "NVIDIA A100"}
    a, b = on_devices(tmp_path / "a", noisy(10, 0), h200, h200), on_devices(tmp_path / "b", noisy(10, 1), h200, a100)
    with pytest.raises(UserError, match=r"devices: NVIDIA H200 against \['NVIDIA H200', 'NVIDIA A100'\]"):
        compare(a, b)
    c = on_devices(tmp_path / "c", noisy(10, 1), a100, a100)
    with pytest.raises(UserError, match="work: device: NVIDIA H200 against NVIDIA A100; --anyway"):  # said once
        compare(a, c)


def test_what_a_device_may_do_is_listed(tmp_path: Path) -> None:
    facts = {"name": "NVIDIA H200", "power_limit_w": 700.0, "sm_clock_max_mhz": 1980, "slice": False, "driver": "570",
             "pcie_generation": 5, "pcie_width": 16}  # fmt: skip
    other = {**facts, "power_limit_w": 350.0, "driver": "580", "pcie_width": 8}
    a, b = on_devices(tmp_path / "a", noisy(10, 0), facts, facts), on_devices(tmp_path / "b", noisy(10, 1), other, other)
    assert compare(a, b)["differences"] == [
        {"key": "power_limit_w", "a": 700.0, "b": 350.0},
        {"key": "driver", "a": "570", "b": "580"},
        {"key": "pcie_width", "a": 16, "b": 8},
    ]
    mixed = on_devices(tmp_path / "c", noisy(10, 1), facts, {**facts, "power_limit_w": 350.0})
    assert compare(a, mixed)["differences"] == [{"key": "power_limit_w", "a": 700.0, "b": [700.0, 350.0]}]
    assert compare(a, on_devices(tmp_path / "d", noisy(10, 1), facts, facts))["differences"] == []  # other ones of the same


def test_what_cannot_be_told_apart_is_a_warning(tmp_path: Path) -> None:
    comparison = compare(run(tmp_path / "a", noisy(10, 0)), run(tmp_path / "b", noisy(10, 1), precision=None))
    assert comparison["warnings"] == ["whether both did the same work cannot be told by dtype: not recorded"]


def test_too_few_steps_are_no_gate(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", noisy(5, 0)), run(tmp_path / "b", noisy(50, 1))
    assert row(compare(a, b), "step")["interval"] is None
    with pytest.raises(UserError, match="5 and 50 measured samples, wanted 6 each"):
        compare(a, b, fail_above=0.05)


def held_down(**reasons: float) -> dict[str, Any]:
    return {"samples": 10, "seconds": 1.0, "throttled": reasons}


@pytest.mark.parametrize("reason", ["hw_slowdown", "sw_thermal_slowdown", "HwThermalSlowdown", "hw_power_brake_slowdown"])
def test_a_gpu_that_slowed_itself_down_opens_no_gate(tmp_path: Path, reason: str) -> None:
    a = run(tmp_path / "a", noisy(40, 0))
    b = run(tmp_path / "b", noisy(40, 1), readings=held_down(**{reason: 0.5}))
    with pytest.raises(UserError, match="nothing to judge by: B ran on a GPU that slowed itself down"):
        compare(a, b, fail_above=0.05)
    assert "B ran on a GPU that slowed itself down" in compare(a, b)["warnings"][0]


@pytest.mark.parametrize(
    "reasons",
    [{"sw_power_cap": 1.0}, {"hw_slowdown": 0.001}],  # a GPU at work runs into its power limit
)
def test_a_gpu_at_work_is_judged(tmp_path: Path, reasons: dict[str, float]) -> None:
    b = run(tmp_path / "b", noisy(40, 1, 0.2), readings=held_down(**reasons))
    comparison = compare(run(tmp_path / "a", noisy(40, 0)), b, fail_above=0.05)
    assert comparison["verdict"]["slower"] == ["step"] and not comparison["warnings"]


def test_medians_are_of_what_the_ratio_is_of(tmp_path: Path) -> None:
    """2500 steps, the first 1500 of them twice as slow: both are of the last 2000."""
    a, b = run(tmp_path / "a", [1.0] * 10), run(tmp_path / "b", [4.0] * 1500 + [2.0] * 1000)
    step = row(compare(a, b), "step")
    assert (step["b"], step["ratio"], step["n"]) == (3.0, 3.0, [10, 2000])  # the middle of 1000 and 1000


def test_a_profile_file_is_as_good_as_its_run(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", noisy(20, 0)), run(tmp_path / "b", noisy(20, 1, 0.11))
    (tmp_path / "b.json").write_text(json.dumps(summarise(load_history(b))), encoding="utf-8")
    from_file, from_run = compare(a, tmp_path / "b.json"), compare(a, b)
    assert from_file["rows"] == from_run["rows"] and from_file["losses"] == from_run["losses"]


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    for name, text, complaint in (
        ("none.json", None, "nothing at"),
        ("torn.json", "{", "is not JSON"),
        ("bytes.json", "\xff", "is not JSON"),
        ("other.json", "{}", "neither a profile.json"),
        ("list.json", "[]", "neither a profile.json"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=complaint):
            load_measurement(tmp_path / name)
    with pytest.raises(UserError, match="is no run"):
        load_measurement(tmp_path)


def test_limits() -> None:
    assert parse_limit("5%") == 0.05 and parse_limit("0.5%") == 0.005
    for text in ("5", "0.05", "%", "-1%", "nan%", "a lot"):
        with pytest.raises(UserError, match=r"wanted a percentage, e\.g\. 5%"):
            parse_limit(text)


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdistil", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_exit_codes(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", noisy(40, 0)), run(tmp_path / "b", noisy(40, 1, 0.11))
    code, out, err = command(a, a, "--fail-above", "5%")
    assert code == 0 and "not shown to be slower than A by more than 5.0%" in out and not err
    code, out, err = command(a, b, "--fail-above", "5%")
    assert code == 3 and err.startswith("fastdistil: B is slower than A by more than 5.0%, for certain: step by 9")
    assert err.count("\n") == 1 and "95% interval" in out  # the table is there all the same
    assert command(a, b, "--fail-above", "20%")[0] == 0
    assert command(a, b)[0] == 0
    other = run(tmp_path / "c", noisy(40, 1), precision="bf16")
    code, _, err = command(a, other)
    assert code == 2 and "did not measure the same work: dtype: fp32 against bf16; --anyway" in err
    assert command(a, other, "--anyway")[0] == 0
    assert command(a, b, "--fail-above", "5")[0] == 2
    hot = run(tmp_path / "d", noisy(40, 0), readings=held_down(hw_slowdown=0.5))
    code, _, err = command(a, hot, "--fail-above", "5%", "--json")
    assert code == 2 and "nothing to judge by" in err and command(a, hot)[0] == 0


def test_json_alone_on_standard_output(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", noisy(40, 0)), run(tmp_path / "b", noisy(40, 1, 0.11))
    code, out, _ = command(a, b, "--fail-above", "5%", "--json")
    assert code == 3 and json.loads(out) == compare(a, b, fail_above=0.05)


def test_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", [0.1] * 20), run(tmp_path / "b", [0.1005] * 20, engine="torch")
    show(compare(a, b), Console(width=200))
    out = capsys.readouterr().out
    assert f"A: {a}: name a, device cpu, dtype fp32, ranks 1" in out
    assert "differs: engine: alone against torch" in out
    assert "losses of A and B at update 20: total 0.5 and 0.5" in out
    step = next(line for line in out.splitlines() if "step" in line)
    assert [cell.strip() for cell in step.split("│")[1:-1]] == [
        "step",
        "100.0 ms",
        "100.5 ms",
        "+0.5%",
        "+0.5% to +0.5%",
        "20 and 20",
    ]
    with pytest.raises(FellShort, match=r"more than 0\.1%"):
        run_compare(a, b, fail_above="0.1%", anyway=False, as_json=False, console=Console(width=200))
