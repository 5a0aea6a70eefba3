"""The cost model against updates made by another hand: parameters found again, or said to be open; predictions; break-even."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastdistil.errors import UserError
from fastdistil.studies.cost_fit import Fit, Point, TimingSample, Workload, expected_max, fit
from fastdistil.studies.networks import NETWORKS, Constant, Network, load_network
from fastdistil.studies.predict import FASTEST, FOREVER, break_even, predict
from fastdistil.studies.scale import Question, _model

TRUE = {"s": 0.1, "o": 0.03, "sigma": 0.004, "a0": 0.002, "a": 3e-4, "b1": 1e-8, "b4": 4e-9, "g": 2e-11}
# Expected largest of N standard normals, from tables of order statistics.
LARGEST = {1: 0.0, 2: 0.56419, 4: 1.02938, 8: 1.42360, 16: 1.76599, 64: 2.34373}
BUCKETS, SIZE = 4, 60_000_000
TRAFFIC_INT8 = (2 * 4 + 3 * 4 + 3 * 4 + 1 + 2 * 1 + 1 + 4) / 4 * SIZE


def seconds(ranks: int, micro_batches: int, sent: float, collectives: int, rings: int = 1, touched: float = 0.0) -> float:
    """The formula written out again, for a CPU."""
    worked = micro_batches * TRUE["s"] + TRUE["o"] + TRUE["sigma"] * LARGEST[ranks] * math.sqrt(micro_batches)
    if ranks == 1:
        return worked
    exchange = collectives * TRUE["a0"] + BUCKETS * 2 * (ranks - 1) * TRUE["a"] + sent * TRUE[f"b{rings}"]
    hidden = 0.4 * 0.9 * TRUE["s"]
    return worked + touched * TRUE["g"] + max(exchange - hidden, exchange / collectives)


def timed_point(
    ranks: int, micro_batches: int, *, rings: int = 1, int8: bool = False, noise: Sequence[float] = (0.0, 0.0)
) -> Point:
    sent = 2 * (ranks - 1) / ranks * SIZE * (1 / 4 + 1 / 1024 if int8 else 1.0)
    collectives, touched = BUCKETS * (2 if int8 else 1), TRAFFIC_INT8 if int8 and ranks > 1 else 0.0
    true = seconds(ranks, micro_batches, sent, collectives, rings, touched)
    return Point(
        ranks=ranks,
        nodes=ranks,
        rings=rings,
        accumulation=micro_batches,
        exchanges=1,
        sent_bytes=sent,
        collectives=collectives if ranks > 1 else 0,
        hops=BUCKETS * 2 * (ranks - 1),
        touched_bytes=touched,
        name=f"{ranks}",
        samples=tuple(TimingSample(step_s=true * (1 + deviation)) for deviation in noise),
    )


def many(noise: Callable[[int], Sequence[float]] = lambda _: (0.0, 0.0)) -> list[Point]:
    chosen = [(1, 2), (1, 8), (2, 2), (4, 8), (8, 2), (8, 32), (16, 8)]
    points = [timed_point(ranks, count, noise=noise(number)) for number, (ranks, count) in enumerate(chosen)]
    points += [
        timed_point(4, 4, rings=4, noise=noise(20)),
        timed_point(8, 4, int8=True, noise=noise(21)),
        timed_point(2, 4, int8=True, noise=noise(22)),
    ]
    return points


def value(model: Fit, name: str) -> float | None:
    return next(parameter.value for parameter in model.parameters if parameter.name == name)


@pytest.mark.parametrize("count", [2, 8, 64])
def test_the_largest_of_n(count: int) -> None:
    assert expected_max(count) == pytest.approx(LARGEST[count], abs=1e-4)


def test_known_parameters_are_found_again() -> None:
    model = fit(many(), on_cpu=True)
    true_names = {"micro_batch_s": "s", "fixed_s": "o", "straggler_s": "sigma", "collective_s": "a0", "hop_s": "a"}
    true_names |= {"byte_s@1": "b1", "byte_s@4": "b4", "memory_byte_s": "g"}
    assert model.rank == len(model.names) == len(true_names)
    for name, true in true_names.items():
        assert value(model, name) == pytest.approx(TRUE[true], rel=1e-4), name
    assert model.residual == pytest.approx(0.0, abs=1e-6)
    assert not model.undetermined


def test_noise_shows_in_residual_and_errors() -> None:
    noise = (0.004, -0.011, 0.009, -0.002)
    model = fit(many(lambda number: noise[number % 4 :] + noise[: number % 4]), on_cpu=True)
    assert model.residual is not None
    assert 0.004 < model.residual < 0.012
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=8, exchanges=1)
    band = predict(model, work.point(4, 4))
    assert band.high_s - band.step_s > 2 * model.residual * band.step_s < 2.5 * (band.step_s - band.low_s)
    fitted = next(parameter for parameter in model.parameters if parameter.name == "micro_batch_s")
    assert fitted.value is not None
    assert fitted.sd is not None
    assert abs(fitted.value - TRUE["s"]) < 4 * fitted.sd < 0.05 * TRUE["s"]


def test_too_few_points_are_said_to_be_too_few() -> None:
    model = fit([timed_point(1, 4), timed_point(2, 4)], on_cpu=True)
    assert model.rank == 2
    # One accumulation: s and o only together. One several-rank point: what its exchange is made of stays open.
    assert {parameter.name for parameter in model.undetermined} == set(model.names)
    total = 4 * TRUE["s"] + TRUE["o"]
    ends = {parameter.name: (parameter.low, parameter.high) for parameter in model.parameters}
    assert ends["micro_batch_s"] == pytest.approx((0.0, total / 4))
    assert ends["fixed_s"] == pytest.approx((0.0, total))
    # Another accumulation decides s and o, and nothing else.
    more = fit([timed_point(1, 4), timed_point(1, 16), timed_point(2, 4)], on_cpu=True)
    assert value(more, "micro_batch_s") == pytest.approx(TRUE["s"])
    assert value(more, "fixed_s") == pytest.approx(TRUE["o"])
    assert {parameter.name for parameter in more.undetermined} == {"straggler_s", "collective_s", "hop_s", "byte_s@1"}
    with pytest.raises(UserError, match="no points"):
        fit([], on_cpu=True)


def test_what_ranks_recorded_of_their_own_work_tells_stragglers_from_the_network() -> None:
    """The same two points: the imbalance and the waits, measured, decide what the whole cannot."""
    single, double = timed_point(1, 4), timed_point(2, 4)
    worked = 4 * TRUE["s"] + TRUE["o"]
    late = TRUE["sigma"] * LARGEST[2] * 2
    step = double.samples[0].step_s
    sample = TimingSample(step_s=step, worked_s=worked, imbalance_s=late, waited_s=step - worked - late)
    model = fit([single, Point(**{**double.__dict__, "samples": (sample, sample)})], on_cpu=True)
    assert value(model, "straggler_s") == pytest.approx(TRUE["sigma"], rel=1e-4)
    assert value(model, "hop_s") is None


def test_an_open_parameter_widens_the_band_of_what_depends_on_it_only() -> None:
    model = fit([timed_point(1, 4), timed_point(1, 16), timed_point(2, 4)], on_cpu=True)
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=4, exchanges=1)
    again = predict(model, work.point(2, 2))
    true = seconds(2, 4, SIZE, BUCKETS)
    assert again.low_s == pytest.approx(true, rel=1e-3)
    assert again.high_s == pytest.approx(true, rel=1e-3)
    far = predict(model, work.point(64, 64))
    # All of it latency grows with the ranks, all of it bandwidth hardly.
    assert far.high_s > 5 * far.low_s
    assert far.low_s < seconds(64, 4, 2 * 63 / 64 * SIZE, BUCKETS) < far.high_s


def test_a_prediction_at_other_ranks_is_the_formula() -> None:
    model = fit(many(), on_cpu=True)
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=4, exchanges=1)
    prediction = predict(model, work.point(64, 64))
    assert prediction.step_s == pytest.approx(seconds(64, 4, 2 * 63 / 64 * SIZE, BUCKETS), rel=1e-5)
    assert prediction.low_s <= prediction.step_s <= prediction.high_s


def network(link: float, latency: float = 1e-9) -> Network:
    constants = {
        "link_bytes_per_s": Constant(value=link, source="made up"),
        "latency_s": Constant(value=latency, source="made up"),
    }
    return Network(title="made up", ranks_per_node=1, **constants)  # type: ignore[arg-type]


def test_another_network_replaces_bandwidth_and_latency_by_hand() -> None:
    model = fit(many(), on_cpu=True)
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=4, exchanges=1)
    prediction = predict(model, work.point(8, 8), network(1e7, 1e-3))
    sent = 2 * 7 / 8 * SIZE
    exchange = BUCKETS * TRUE["a0"] + BUCKETS * 14 * 1e-3 + sent / 1e7
    worked = 4 * TRUE["s"] + TRUE["o"]
    assert prediction.work_s == pytest.approx(worked, rel=1e-5)
    assert prediction.imbalance_s == pytest.approx(TRUE["sigma"] * LARGEST[8] * 2, rel=1e-3)
    assert prediction.exposed_s == pytest.approx(exchange - 0.36 * TRUE["s"], rel=1e-5)
    # Whether the engine's own time for a byte overlaps with the link's is not known: the band's far end has both.
    assert prediction.high_s - prediction.step_s >= sent * TRUE["b1"] * (1 - 1e-6)


def test_points_on_two_known_links_tell_a_third() -> None:
    """c = 1.1: headers and acknowledgements; the rest of a byte's time is the engine's."""
    points = [timed_point(1, 2, noise=(0.001, -0.001))]
    for link in (5e6, 2e7):
        sent = float(SIZE)
        exchange = BUCKETS * TRUE["a0"] + BUCKETS * 2 * TRUE["a"] + sent * (TRUE["b1"] + 1.1 / link)
        step = 2 * TRUE["s"] + TRUE["o"] + exchange - 0.36 * TRUE["s"]
        values = timed_point(2, 2).__dict__ | {
            "link_bytes_per_s": link,
            "samples": tuple(TimingSample(step_s=step * f) for f in (1.002, 0.998)),
        }
        points.append(Point(**values))
    model = fit(points, on_cpu=True)
    assert value(model, "link_share") == pytest.approx(1.1, rel=0.02)
    assert value(model, "byte_s@1") is None
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=2, exchanges=1)
    prediction = predict(model, work.point(2, 2), network(1e7, TRUE["a"]))
    true = 2 * TRUE["s"] + TRUE["o"] - 0.36 * TRUE["s"] + BUCKETS * (TRUE["a0"] + 2 * TRUE["a"]) + SIZE * (TRUE["b1"] + 1.1e-7)
    assert prediction.low_s < true < prediction.high_s
    assert prediction.high_s < 1.2 * prediction.low_s
    wrong = predict(model, work.point(2, 2), network(1.5e7, TRUE["a"]))
    assert not wrong.low_s < true < wrong.high_s


def test_break_even_is_where_two_predictions_differ_by_two_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRUE, "b1", 1e-11)  # an engine that is no limit itself
    model = fit(many(), on_cpu=True)
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=4, exchanges=1)
    slow = network(1e7)
    threshold = break_even(model, work, "int8", 8, 8, slow)
    assert not threshold.free
    assert threshold.most_accumulation is not None
    assert 1 < threshold.most_accumulation < FOREVER

    def saving(micro_batches: int, chosen: Network) -> float:
        at = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=micro_batches, exchanges=1)
        plain, small = (predict(model, at.point(8, 8, kind=kind), chosen).step_s for kind in ("none", "int8"))  # type: ignore[arg-type]
        return 1 - small / plain

    assert saving(threshold.most_accumulation, slow) > 0.02 >= saving(threshold.most_accumulation + 1, slow)
    assert threshold.most_bytes_per_s is not None
    assert 1e7 < threshold.most_bytes_per_s < FASTEST
    assert (
        saving(4, network(threshold.most_bytes_per_s * 0.999)) > 0.02 > saving(4, network(threshold.most_bytes_per_s * 1.001))
    )
    # No compressed point: what compressing costs is not known, and the limits are upper ones.
    unknown = fit([point for point in many() if not point.touched_bytes], on_cpu=True)
    at_most = break_even(unknown, work, "int8", 8, 8, slow)
    assert at_most.free
    assert at_most.most_accumulation is not None
    assert at_most.most_accumulation >= threshold.most_accumulation


def test_break_even_points_are_written_down() -> None:
    model = fit(many(), on_cpu=True)
    work = Workload(gradient_bytes=SIZE, buckets=BUCKETS, engine="torch", accumulation=4, exchanges=1)
    slow = network(1e7)
    _, _, values = _model(model, work, Question(ranks=(8,), networks=(("slow", slow),)), None)
    small = {entry["kind"]: entry for entry in values["break_even"]}
    threshold = break_even(model, work, "int8", 8, 8, slow)
    assert small["int8"]["most_accumulation"] == threshold.most_accumulation
    assert small["int8"]["most_bytes_per_s"] == threshold.most_bytes_per_s
    assert (small["int8"]["predicted"], small["int8"]["network_name"], small["int8"]["ranks"]) == (True, "slow", 8)
    assert values["predictions"][0]["step_s"] == predict(model, work.point(8, 8), slow).step_s


def test_named_networks_have_a_source_for_each_constant() -> None:
    names = sorted(path.stem for path in NETWORKS.glob("*.yaml"))
    assert names == ["h100-400g", "p3dn", "p4d"]
    for name in names:
        preset = load_network(name)
        for constant in (preset.link_bytes_per_s, preset.latency_s, preset.local_bytes_per_s, preset.local_latency_s):
            assert constant is not None
            assert len(constant.source) > 20


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("title: x\nranks_per_node: 1\nlatency_s: {value: 1.0e-5, source: x}\n", "link_bytes_per_s"),
        ("title: x\nranks_per_node: 1\nlatency_s: {value: 1.0e-5}\nlink_bytes_per_s: {value: 1, source: x}\n", "source"),
        ("title: x\nranks_per_node: 1\nlatency_s: {value: 2, low: 3, source: x}\n", "low <= value <= high"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_network_that_is_none_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_network(str(file))
    with pytest.raises(UserError, match="known names: h100-400g, p3dn, p4d"):
        load_network("p5")
