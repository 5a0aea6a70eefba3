"""Known event streams against figures worked out by hand, and planted causes that the bottleneck must name."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdistil.profiling.flops import Work
from fastdistil.profiling.peaks import utilisation
from fastdistil.profiling.report.history import load_history
from fastdistil.profiling.report.summary import statistics_of, summarise

Event = dict[str, Any]
START = {
    "event": "start",
    "update": 0,
    "updates": 9,
    "ranks": 1,
    "engine": "alone",
    "compression": "none",
    "sync": "delayed",
    "device": "cpu",
    "precision": "fp32",
    "student_parameters": 100,
    "teacher_parameters": 200,
}
RECIPE = {
    "data": {"train": "corpus", "micro_batch_tokens": 256, "cache_dir": None},
    "loop": {"accumulation": 2, "compile": False},
}


def summed_up(tmp_path: Path, *events: Event, recipe: Event = RECIPE, **start: Any) -> Event:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    lines = [{**START, **start}, *events]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return summarise(load_history(tmp_path))


def line(update: int, steps: list[float], phases: dict[str, list[float]] | None = None, **fields: Any) -> Event:
    """A log line of 100 tokens an update."""
    tokens = 100 * len(steps)
    timed = {"updates": len(steps), "tokens": tokens, "tokens_per_s": tokens / sum(steps), "step_s": steps, "warmup": 0}
    return {"event": "train", "update": update, **timed, **({"phases": phases} if phases else {}), **fields}


def test_percentiles_by_hand() -> None:
    """Type 7: the q-quantile of n sorted samples lies at (n - 1) q between them: 4 q here, so 3.8 of 0..4 for q = 0.95."""
    statistics = statistics_of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert statistics is not None
    assert statistics["p50"] == 3.0
    assert statistics["p95"] == pytest.approx(4 + 0.8 * (5 - 4))
    assert statistics["p99"] == pytest.approx(4 + 0.96 * (5 - 4))
    assert (statistics["mean"], statistics["n"]) == (3.0, 5)
    assert statistics["sd"] == pytest.approx(2.5**0.5)  # 10 / (5 - 1)
    assert statistics_of([]) is None


def test_warm_up_is_in_no_number(tmp_path: Path) -> None:
    slow = line(3, [9.0, 9.0, 1.0], {"data": [8.0, 8.0, 0.5]}, warmup=2, flops={"student": 9e9})
    summary = summed_up(tmp_path, slow, line(5, [2.0, 3.0], {"data": [1.0, 1.0]}, flops={"student": 600.0, "teacher": 400.0}))
    assert (summary["updates"], summary["warmup"]) == (3, 2)
    assert summary["step_s"]["samples"] == [1.0, 2.0, 3.0] and summary["step_s"]["p50"] == 2.0
    assert summary["phases"]["data"]["samples"] == [0.5, 1.0, 1.0]
    assert summary["tokens_per_s"] == pytest.approx(200 / 5)  # by the line: the first holds warm-up
    assert summary["tokens_per_update"] == 100
    assert summary["flops"] == {"student": 300.0, "teacher": 200.0}


def test_phases_and_other_add_up_to_the_step(tmp_path: Path) -> None:
    """The teacher ran in the second line only: none of its time was in the first."""
    first = line(
        2, [1.0, 2.0], {"student": [0.5, 0.5], "backward": [0.25, 0.5], "communication": [0.5, 0.5], "exposed": [0.0, 0.25]}
    )
    second = line(3, [1.0], {"student": [0.25], "teacher": [0.5]})
    phases = summed_up(tmp_path, first, second)["phases"]
    assert list(phases) == ["teacher", "student", "backward", "exposed", "other"]
    assert phases["teacher"]["samples"] == [0.0, 0.0, 0.5]
    assert phases["other"]["samples"] == [0.25, 0.75, 0.25]
    shares = {name: phase["share"] for name, phase in phases.items()}
    assert shares == pytest.approx(
        {"teacher": 0.5 / 4, "student": 1.25 / 4, "backward": 0.75 / 4, "exposed": 0.25 / 4, "other": 1.25 / 4}
    )
    assert sum(shares.values()) == pytest.approx(1)


def test_communication_beside_the_phases(tmp_path: Path) -> None:
    summary = summed_up(tmp_path, line(2, [1.0, 1.0], {"communication": [0.5, 0.3], "exposed": [0.2, 0.0]}))
    assert summary["communication"]["p50"] == pytest.approx(0.4)
    assert summary["communication"]["hidden_share"] == pytest.approx(1 - 0.2 / 0.8)
    assert "communication" not in summary["phases"]


def test_rate_is_tokens_over_time(tmp_path: Path) -> None:
    """Not the mean of the lines' rates, which is 75."""
    assert summed_up(tmp_path, line(1, [1.0]), line(3, [1.0, 3.0]))["tokens_per_s"] == pytest.approx(300 / 5)


def test_older_runs_have_what_they_recorded(tmp_path: Path) -> None:
    old = {"event": "train", "update": 1, "updates": 1, "tokens": 100, "tokens_per_s": 50.0, "data_wait_share": 0.02}
    summary = summed_up(tmp_path, {**old, "host_peak_bytes": 7})
    assert (summary["tokens_per_s"], summary["data_wait_share"]) == (50.0, 0.02)
    assert summary["memory"] == {"peak_rss_bytes": 7}
    assert [summary[name] for name in ("step_s", "phases", "mfu", "readings", "straggler", "flops")] == [None] * 6
    assert summary["energy"]["why"] == "not recorded"
    assert summary["bottleneck"]["name"] == "unknown" and "no phases" in summary["bottleneck"]["why"]
    waits = summed_up(tmp_path, {**old, "data_wait_share": 0.4})["bottleneck"]
    assert waits["name"] == "data-bound" and "40%" in waits["why"]


def mfu(student: float, peak: float = 1e12) -> Event:
    return {"student": student, "with_teacher": None, "hfu": None, "peak_flops": peak, "peak_source": "datasheet"}


def test_mfu_is_a_mean_over_time(tmp_path: Path) -> None:
    utilisation = summed_up(tmp_path, line(1, [1.0], mfu=mfu(0.5)), line(2, [3.0], mfu=mfu(0.3)))["mfu"]
    assert utilisation["student"] == pytest.approx((0.5 * 1 + 0.3 * 3) / 4)
    assert (utilisation["with_teacher"], utilisation["hfu"], utilisation["refused"]) == (None, None, [])
    assert (utilisation["peak_flops"], utilisation["peak_source"]) == (1e12, "datasheet")


def test_a_refused_mfu_says_why_and_leaves_no_mean_of_the_other_lines(tmp_path: Path) -> None:
    """As the run writes it: 0.5 of the peak, then 1.25."""
    written = [utilisation(Work(student=flops), 1.0, 1e12, "datasheet") for flops in (5e11, 1.25e12)]
    beside = {**mfu(0.3, 2e12), "peak_source": "measured"}
    lines = [line(n, [1.0], mfu={**entry, "measured": beside}) for n, entry in enumerate(written, 1)]
    mfu_summary = summed_up(tmp_path, *lines)["mfu"]
    assert (mfu_summary["student"], mfu_summary["with_teacher"], mfu_summary["hfu"]) == (None, None, None)
    assert "in 1 of 2 log lines: 125% of 1 TFLOP/s (datasheet) is more than there is" in mfu_summary["refused"][0]
    assert (mfu_summary["measured"]["student"], mfu_summary["measured"]["peak_source"], mfu_summary["measured"]["refused"]) == (
        0.3,
        "measured",
        [],
    )


def test_memory_peaks_and_last_values(tmp_path: Path) -> None:
    one = {"rss_bytes": 9, "peak_rss_bytes": 10, "retries": 0, "phase_peaks": {"teacher": 5, "student": 3}}
    two = {"rss_bytes": 7, "peak_rss_bytes": 8, "retries": 2, "phase_peaks": {"student": 4}}
    parts = {"event": "memory", "parts": {"logits": 1}, "estimate": {"logits": 2}, "peak_bytes": 11}
    memory = summed_up(tmp_path, line(1, [1.0], memory=one, warmup=1), line(2, [1.0], memory=two), parts)["memory"]
    assert memory == {
        "rss_bytes": 7,
        "peak_rss_bytes": 10,
        "retries": 2,
        "phase_peaks": {"teacher": 5, "student": 4},
        "parts": {"logits": 1},
        "estimate": {"logits": 2},
        "peak_bytes": 11,
    }


def device(seconds: float, joules: float | None, **more: Any) -> Event:
    return {"samples": 10, "seconds": seconds, "energy_j": joules, **more}


def test_energy_by_hand(tmp_path: Path) -> None:
    """150 W over 2 + 3 updates of 2 s; the line after an evaluation is left out, whatever the sampler saw of it."""
    first = line(2, [2.0, 2.0], device=device(4.0, 600.0))
    second = line(5, [2.0, 2.0, 2.0], device=device(6.0, 900.0))
    evaluated = line(6, [2.0], device=device(2.1, 9e9))
    events = [first, second, {"event": "evaluation", "update": 5, "seconds": 60.0, "loss": 1.0}, evaluated]
    energy = summed_up(tmp_path, *events)["energy"]
    assert energy["j_per_update"] == pytest.approx(1500 / 5)
    assert energy["j_per_million_tokens"] == pytest.approx(1e6 * 1500 / 500)
    assert energy["seconds"] == 10
    saved = {"event": "checkpoint", "update": 5, "seconds": 1.0, "path": "step-5"}
    assert summed_up(tmp_path, saved, evaluated)["energy"]["why"] == "all 1 log lines held more than updates"
    assert summed_up(tmp_path, evaluated, {**saved, "update": 6})["energy"]["j_per_update"] is None, "2 s are not enough"


def test_energy_is_not_of_the_samples_windows(tmp_path: Path) -> None:
    """Looks come when they come: lines of 2 s each, of which the sampler saw 1.5 s, 2.7 s, nothing, at 300 W."""
    lines = [line(number, [2.0], device=device(s, 300.0 * s if s else None)) for number, s in enumerate([1.5, 2.7, 0, 1.5], 1)]
    energy = summed_up(tmp_path, *lines)["energy"]
    assert energy["j_per_update"] == pytest.approx(600.0)
    assert energy["j_per_million_tokens"] == pytest.approx(1e6 * 600 / 100)


def test_energy_of_several_ranks_is_over_rank_0s_tokens(tmp_path: Path) -> None:
    shared = line(3, [2.0, 2.0, 2.0], device=device(6.0, 600.0), rank_tokens=[120, 180])
    assert summed_up(tmp_path, shared, ranks=2)["energy"]["j_per_million_tokens"] == pytest.approx(1e6 * 600 / 120)


def test_energy_of_a_moment_is_not_told(tmp_path: Path) -> None:
    energy = summed_up(tmp_path, line(2, [2.0, 2.0], device=device(4.0, 600.0)))["energy"]
    assert energy["j_per_update"] is None and energy["why"].startswith("not enough time to tell: 4.0 s")


def test_readings(tmp_path: Path) -> None:
    one = device(
        1.0, None, utilisation=0.5, sm_clock_mhz=1000, sm_clock_min_mhz=900, temperature_c=60, throttled={"hw_slowdown": 0.5}
    )
    two = device(3.0, None, utilisation=0.9, sm_clock_mhz=1200, sm_clock_min_mhz=1100, temperature_c=50, throttled={})
    readings = summed_up(tmp_path, line(1, [1.0], device=one), line(2, [3.0], device={**two, "samples": 30}))["readings"]
    assert readings["utilisation"] == pytest.approx((0.5 + 3 * 0.9) / 4)
    assert (readings["sm_clock_mhz"], readings["sm_clock_min_mhz"], readings["temperature_c"], readings["samples"]) == (
        1100,
        900,
        60,
        40,
    )
    assert readings["throttled"] == pytest.approx({"hw_slowdown": 0.5 * 10 / 40})


def test_nobody_knows_of_throttling_where_nobody_looked(tmp_path: Path) -> None:
    blind, sampled = (line(n, [1.0], device=device(1.0, None, throttled=t)) for n, t in ((1, None), (2, {"hw_slowdown": 0.5})))
    assert summed_up(tmp_path, blind)["readings"]["throttled"] is None
    assert summed_up(tmp_path, line(1, [1.0], device=device(1.0, None, throttled={})))["readings"]["throttled"] == {}
    readings = summed_up(tmp_path, blind, sampled)["readings"]
    assert (readings["throttled"], readings["throttled_samples"]) == ({"hw_slowdown": 0.5}, 10)


def test_straggler_by_hand(tmp_path: Path) -> None:
    """Ranks work 3, 4 and 5 s of 6: the mean is 4, rank 2 is a quarter above it, and was the slowest in two lines of three."""
    works = [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1.0, 2.0, 1.0]]
    lines = [line(n, [2.0], rank_worked_s=worked) for n, worked in enumerate(works, 1)]
    straggler = summed_up(tmp_path, *lines, ranks=3)["straggler"]
    assert straggler["worked_s"] == [3.0, 4.0, 5.0]
    assert (straggler["rank"], straggler["slowest_in"], straggler["lines"], straggler["seconds"]) == (2, 2, 3, 6.0)
    assert straggler["share"] == pytest.approx(0.25)


def test_device_dtype_and_shape_are_told(tmp_path: Path) -> None:
    environment = {"event": "environment", "processor": "A processor", "devices": [{"rank": 0, "name": "A GPU"}]}
    summary = summed_up(tmp_path, environment, line(1, [1.0]))
    assert (summary["device"], summary["dtype"]) == ("A processor", "fp32")
    assert (summary["micro_batch_tokens"], summary["accumulation"], summary["student_parameters"]) == (256, 2, 100)
    assert summed_up(tmp_path, environment, device="cuda:0")["device"] == "A GPU"
    assert summed_up(tmp_path)["device"] == "cpu"


def test_it_is_json(tmp_path: Path) -> None:
    summary = summed_up(
        tmp_path, line(1, [1.0], {"data": [0.5]}, rank_worked_s=[1.0, 2.0], device=device(1.0, 2.0), mfu=mfu(0.1))
    )
    assert json.loads(json.dumps(summary)) == summary


# Planted causes.

BALANCED = {"data": 0.02, "teacher": 0.25, "student": 0.15, "losses": 0.1, "backward": 0.4, "optimizer": 0.03}


def steps(shares: dict[str, float], n: int = 6, step_s: float = 1.0, **fields: Any) -> list[Event]:
    return [line(u + 1, [step_s], {name: [step_s * share] for name, share in shares.items()}, **fields) for u in range(n)]


def bottleneck(tmp_path: Path, events: list[Event], **more: Any) -> Event:
    cause: Event = summed_up(tmp_path, *events, **more)["bottleneck"]
    return cause


def test_compute_bound_has_nothing_to_gain(tmp_path: Path) -> None:
    cause = bottleneck(tmp_path, steps(BALANCED))
    assert (cause["name"], cause["key"]) == ("compute-bound", None)
    assert "90% of the step is the models' own work" in cause["why"] and "nothing to gain" in cause["why"]


def test_work_far_below_the_peak_is_not_compute_bound(tmp_path: Path) -> None:
    cause = bottleneck(tmp_path, steps(BALANCED, mfu={**mfu(0.01), "with_teacher": 0.02}))
    assert (cause["name"], cause["key"]) == ("unknown", "data.micro_batch_tokens")
    assert "at 2% of the device's peak" in cause["why"]
    assert bottleneck(tmp_path, steps(BALANCED, mfu={**mfu(0.3), "with_teacher": 0.4}))["name"] == "compute-bound"


def test_unknown_where_time_is_in_no_phase(tmp_path: Path) -> None:
    cause = bottleneck(tmp_path, steps({**BALANCED, "backward": 0.1}))
    assert cause["name"] == "unknown" and "other is the largest" in cause["why"]


def test_slow_loader_is_data_bound(tmp_path: Path) -> None:
    cause = bottleneck(tmp_path, steps({**BALANCED, "data": 0.4, "backward": 0.05}))
    assert (cause["name"], cause["key"]) == ("data-bound", "data.cache_dir")
    assert "40% of the step waits for data (data p50 400 ms, p95 400 ms of steps of p50 1,000 ms)" in cause["why"]
    recipe = {**RECIPE, "data": {"train": "(a list given from Python)"}}
    assert bottleneck(tmp_path, steps({**BALANCED, "data": 0.4, "backward": 0.05}), recipe=recipe)["key"] == "data.train"
    now_and_then = [*steps({**BALANCED, "data": 0.0}, 9), *steps({**BALANCED, "data": 0.7, "backward": 0.0}, 3, 4.0)]
    assert bottleneck(tmp_path, now_and_then)["key"] == "data.prefetch"


def test_slow_link_is_communication_bound(tmp_path: Path) -> None:
    events = steps({**BALANCED, "exposed": 0.3, "backward": 0.1}, rank_worked_s=[0.7, 0.7])
    cause = bottleneck(tmp_path, events, ranks=2)
    assert (cause["name"], cause["key"]) == ("communication-bound", "compression.kind")
    assert "30% of the step waits for other ranks" in cause["why"]
    assert bottleneck(tmp_path, events, ranks=2, sync="every-micro-batch")["key"] == "world.sync"
    assert bottleneck(tmp_path, events, ranks=2, compression="int8")["key"] == "loop.accumulation"


def test_little_data_waited_for_long_is_probably_latency(tmp_path: Path) -> None:
    """200 kB take 1.6 ms at 1 Gbit/s. Of steps of 10 ms 3 ms are waited for, not twice as long: it may be bandwidth."""
    shares = {**BALANCED, "exposed": 0.3, "backward": 0.1}
    for per_update, key in ((200_000, "loop.accumulation"), (2_000_000, "compression.kind")):
        events = steps(shares, rank_worked_s=[0.7, 0.7], gradient_bytes=per_update)
        dominant = bottleneck(tmp_path, events, ranks=2)
        assert (dominant["name"], dominant["key"]) == ("communication-bound", key)
        reason = "200,000 bytes an update take 1.6 ms at 1 Gbit/s, so it is probably latency"
        assert (reason in dominant["why"]) == (key == "loop.accumulation")
    quick = steps(shares, step_s=0.01, rank_worked_s=[0.007, 0.007], gradient_bytes=200_000)
    assert bottleneck(tmp_path, quick, ranks=2)["key"] == "compression.kind"
    # 4 ms, of which 3 ms are for the slower rank.
    late = steps({**shares, "exposed": 0.4}, step_s=0.01, rank_worked_s=[0.006, 0.009], gradient_bytes=200_000)
    causes = {cause["name"]: cause for cause in summed_up(tmp_path, *late, ranks=2)["causes"]}
    assert causes["communication-bound"]["key"] == "compression.kind"


def test_slow_rank_is_named_and_not_the_network(tmp_path: Path) -> None:
    """Rank 0 waits 0.3 of each second for rank 2, and 0.02 for the network."""
    events = steps({**BALANCED, "exposed": 0.32, "backward": 0.1}, rank_worked_s=[0.68, 0.68, 0.98, 0.68], rank_tokens=[25] * 4)
    summary = summed_up(tmp_path, *events, ranks=4)
    assert summary["bottleneck"]["name"] == "straggler"
    devices = [{"rank": rank, "host": f"node-{rank}"} for rank in (3, 2, 1, 0)]
    placed = bottleneck(tmp_path, [{"event": "environment", "devices": devices}, *events], ranks=4)
    assert placed["why"].startswith("rank 2 on node-2 works 30% more")
    assert "rank 2 works 30% more than the mean rank, the slowest in 6 of 6 log lines" in summary["bottleneck"]["why"]
    network = next(cause for cause in summary["causes"] if cause["name"] == "communication-bound")
    assert network["share"] == pytest.approx(0.02) and "30% of the step waits for slower ranks" in network["why"]


def test_why_a_rank_is_slow(tmp_path: Path) -> None:
    shares = {**BALANCED, "exposed": 0.32, "backward": 0.1}
    waits = steps(shares, rank_worked_s=[0.4, 1.0], rank_data_wait_s=[0.0, 0.6], rank_tokens=[50, 50])
    assert bottleneck(tmp_path, waits, ranks=2)["key"] == "data.cache_dir"
    loaded = steps(shares, rank_worked_s=[0.4, 1.0], rank_data_wait_s=[0.0, 0.0], rank_tokens=[30, 70])
    assert bottleneck(tmp_path, loaded, ranks=2)["key"] == "data.layout"


def test_ranks_that_take_turns_are_no_stragglers(tmp_path: Path) -> None:
    shares = {**BALANCED, "exposed": 0.3, "backward": 0.1}
    turns = [steps(shares, 1, rank_worked_s=[1.0, 0.5] if n % 2 else [0.5, 1.0])[0] for n in range(6)]
    summary = summed_up(tmp_path, *turns, ranks=2)
    assert not [cause for cause in summary["causes"] if cause["name"] == "straggler"]
    # Of 6 s rank 0 waited 1.8, 1.5 of them in the three lines in which rank 1 worked longer.
    assert summary["straggler"]["rank_0_waited_s"] == pytest.approx(1.5)
    network = next(cause for cause in summary["causes"] if cause["name"] == "communication-bound")
    assert network["share"] == pytest.approx(0.3 - 1.5 / 6)


def test_ranks_that_take_turns_within_a_log_line_are_not_the_network(tmp_path: Path) -> None:
    """Two ranks alternate 1 s and 2 s of work, 10 ms of network: of 4.02 s rank 0 waits 1.02, 1.00 of them for rank 1."""
    phases = {"student": [1.0, 2.0], "exposed": [1.01, 0.01]}
    events = [line(2 * n, [2.01, 2.01], phases, rank_worked_s=[3.0, 3.0], rank_0_waited_s=1.0) for n in (1, 2, 3)]
    summary = summed_up(tmp_path, *events, ranks=2)
    network = next(cause for cause in summary["causes"] if cause["name"] == "communication-bound")
    assert network["share"] == pytest.approx(0.02 / 4.02)
    assert summary["bottleneck"]["name"] == "unknown"
    assert "25% of the step waits for slower ranks, which take turns" in summary["bottleneck"]["why"]


def test_waits_too_short_for_a_straggler_are_told_all_the_same(tmp_path: Path) -> None:
    """Of a second rank 0 waits 0.15: rank 1 works that much longer each time, 0.075 more than the mean; or both do, in turn."""
    phases = {"student": [0.85], "exposed": [0.15]}
    always = [line(n, [1.0], phases, rank_worked_s=[0.85, 1.0], rank_0_waited_s=0.15) for n in range(1, 7)]
    cause = summed_up(tmp_path, *always, ranks=2)["bottleneck"]
    assert cause["name"] == "unknown" and "15% of the step waits for slower ranks: rank 1 works 8% more" in cause["why"]
    turns = [line(n, [1.0], phases, rank_worked_s=[0.9, 0.9], rank_0_waited_s=0.15) for n in range(1, 7)]
    cause = summed_up(tmp_path, *turns, ranks=2)["bottleneck"]
    assert cause["name"] == "unknown" and "slower ranks, which take turns" in cause["why"]


def test_slow_transfer_is_not_the_loaders(tmp_path: Path) -> None:
    shares = {**BALANCED, "data": 0.08, "transfer": 0.2, "backward": 0.15}
    summary = summed_up(tmp_path, *steps(shares))
    assert (summary["bottleneck"]["name"], summary["bottleneck"]["key"]) == ("transfer-bound", None)
    assert {cause["name"]: cause["share"] for cause in summary["causes"]}["data-bound"] == pytest.approx(0.08)
    cached = {**RECIPE, "teacher": {"cache": "cache/"}}
    assert bottleneck(tmp_path, steps(shares), recipe=cached)["key"] == "teacher.top_k"


def test_heavy_teacher_is_teacher_bound(tmp_path: Path) -> None:
    """A cache stands in for it only where nothing but the likely tokens is learnt from."""
    events = steps({"teacher": 0.6, "student": 0.1, "losses": 0.05, "backward": 0.2})
    soft = {"a_ce": 5.0, "a_mlm": 2.0, "a_cos": 0.0, "a_mse": 0.0, "divergence": "forward-kl"}
    cause = bottleneck(tmp_path, events, recipe={**RECIPE, "objective": soft})
    assert (cause["name"], cause["key"]) == ("teacher-bound", "teacher.cache")
    for other in ({"a_cos": 1.0}, {"a_mse": 1.0}, {"divergence": "jsd"}, {"a_ce": 0.0}):
        refused = bottleneck(tmp_path, events, recipe={**RECIPE, "objective": {**soft, **other}})
        assert (refused["name"], refused["key"]) == ("teacher-bound", None), other
        assert "no cache can stand in" in refused["why"]
    assert "the teacher's forward is 60% of the step, the student's forward, losses and backward 35%" in cause["why"]


def test_idle_gpu_is_launch_bound(tmp_path: Path) -> None:
    events = steps(BALANCED, device=device(1.0, None, utilisation=0.6))
    dominant = bottleneck(tmp_path, events, device="cuda:0")
    assert (dominant["name"], dominant["key"]) == ("launch-bound", "loop.compile")
    assert "no kernel runs 40% of the time, 2% of it in waits" in dominant["why"]
    compiled = {**RECIPE, "loop": {**RECIPE["loop"], "compile": True}}
    assert bottleneck(tmp_path, events, device="cuda:0", recipe=compiled)["key"] == "data.micro_batch_tokens"
    assert bottleneck(tmp_path, events)["name"] == "compute-bound"  # a CPU launches no kernels
    # While gradients are waited for, their kernels run: that wait takes nothing off the time without any.
    waiting = steps({**BALANCED, "exposed": 0.05}, device=device(1.0, None, utilisation=0.85))
    causes = {cause["name"]: cause["share"] for cause in summed_up(tmp_path, *waiting, device="cuda:0")["causes"]}
    assert causes["launch-bound"] == pytest.approx(0.15 - 0.02)
    busy = steps(BALANCED, device=device(1.0, None, utilisation=0.97))
    assert bottleneck(tmp_path, busy, device="cuda:0")["name"] == "compute-bound"


def test_a_gpu_that_idles_during_checkpoints_is_not_launch_bound(tmp_path: Path) -> None:
    """Three lines of 60 s at 97%; the 20 s of a checkpoint after each of them are in the next one's: 0.97 x 60 / 80."""
    shares = (0.97, 0.7275, 0.7275)
    hot = {"throttled": {"hw_thermal_slowdown": 0.2}, "temperature_c": 90}
    events = steps(BALANCED, 3, 60.0)
    saved = [{"event": "checkpoint", "update": u, "seconds": 20.0, "path": "a"} for u in (1, 2, 3)]
    mixed = [{**event, "device": device(80.0, None, utilisation=u)} for event, u in zip(events, shares, strict=True)]
    mixed[2]["device"] |= hot
    summary = summed_up(tmp_path, *(event for pair in zip(mixed, saved, strict=True) for event in pair), device="cuda:0")
    assert (summary["readings"]["utilisation"], summary["readings"]["samples"]) == (0.97, 10)
    assert summary["bottleneck"]["name"] == "compute-bound", "3% without a kernel"
    # What a GPU does to itself must not be missed.
    assert (summary["readings"]["temperature_c"], summary["readings"]["throttled"]) == (90, {"hw_thermal_slowdown": 0.2})
    none = summed_up(tmp_path, saved[0], mixed[1], device="cuda:0")
    assert none["readings"]["utilisation"] is None and none["bottleneck"]["name"] == "compute-bound"
    assert none["readings"]["why"] == "all 1 log lines held more than updates"


def test_optimizer_is_memory_bound(tmp_path: Path) -> None:
    cause = bottleneck(tmp_path, steps({**BALANCED, "optimizer": 0.35, "backward": 0.1}))
    assert (cause["name"], cause["key"]) == ("memory-bound", "loop.accumulation")


def test_time_beside_the_updates(tmp_path: Path) -> None:
    aside = [{"event": "evaluation", "update": u, "seconds": s, "loss": 1.0} for u, s in ((1, 2.0), (2, 4.0))]
    summary = summed_up(tmp_path, line(2, [1.0, 1.0]), *aside, {"event": "checkpoint", "update": 2, "seconds": 0.5})
    assert (summary["evaluation"]["n"], summary["evaluation"]["p50"]) == (2, 3.0)
    assert (summary["checkpoint"]["n"], summary["checkpoint"]["samples"]) == (1, [0.5])
    assert summed_up(tmp_path, line(1, [1.0]))["evaluation"] is None


def test_few_flop_a_byte_are_memory_bound(tmp_path: Path) -> None:
    """Two micro-batches read 2 x 100 + 200 weights of 4 bytes and write 100 gradients of 4: 4000 bytes for 8000 FLOP.

    The device needs 1e6 / 1e4 = 100 FLOP a byte; reading takes 0.4 s of the second.
    """
    peaks = {"event": "environment", "peaks": {"flops": {"measured": 1e6}, "bytes": {"measured": 1e4}}}
    figures = {"flops": {"student": 6000.0, "teacher": 2000.0}, "mfu": mfu(0.006, peak=1e6)}
    cause = bottleneck(tmp_path, [peaks, *steps(BALANCED, **figures)])
    assert (cause["name"], cause["key"]) == ("memory-bound", "data.micro_batch_tokens")
    assert (
        "at most 2 FLOP a byte of weights, the device needs 100" in cause["why"] and "40% of the step or more" in cause["why"]
    )
    larger = {**figures, "flops": {"student": 6e5, "teacher": 2e5}}
    assert bottleneck(tmp_path, [peaks, *steps(BALANCED, **larger)])["name"] == "compute-bound"
