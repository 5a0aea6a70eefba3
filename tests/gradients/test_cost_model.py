"""The cost model against numbers worked out by hand, published scalings, and what was measured."""

import dataclasses
import math

import pytest

from fastdistil.gradients.cost_model import (
    GLOO_FP16_S,
    MeasuredExchange,
    allreduce_s,
    candidates_for,
    choose,
    exchange_cost,
    predict,
)

DISTILBERT_BYTES = 66_400_000 * 4


def measured(**changes: object) -> MeasuredExchange:
    values: dict[str, object] = {
        "ranks": 64,
        "gradient_bytes": DISTILBERT_BYTES,
        "update_s": 2.5,
        "accumulation": 50,
        "bandwidth_bytes_per_s": 2.8e9,
        "latency_s": 1e-4,
        "engine": "torch",
        "device": "cuda",
        "compress_bytes_per_s": 1e12,
    }
    return MeasuredExchange(**{**values, **changes})  # type: ignore[arg-type]


def test_a_ring_allreduce_by_hand() -> None:
    # 4 ranks on 2 nodes: 6 steps, 2 of them between nodes; each rank sends 6/4 of 1 MB.
    seconds = allreduce_s(4, 2, 1e6, 1e9, 1e-3, local_latency_s=1e-5)
    assert seconds == pytest.approx(2e-3 + 4e-5 + 1.5e-3, rel=1e-12)
    assert allreduce_s(4, 2, 1e6, 1e9, 1e-3) == pytest.approx(6e-3 + 1.5e-3, rel=1e-12)
    assert allreduce_s(1, 1, 1e6, 1e9, 1e-3) == 0.0


@pytest.mark.parametrize(
    ("bus_gb_per_s", "micro_batches", "ranks", "full", "halved"),
    [
        (0.5, 50, 64, 70.5, 82.7),
        (1.15, 50, 64, 84.6, 91.6),
        (2.8, 50, 64, 93.0, 96.4),
        (2.8, 8, 64, 68, 81),
        (7, 1, 64, 40, 57),
    ],
)
def test_efficiency_of_distilbert_at_50_ms(
    bus_gb_per_s: float, micro_batches: int, ranks: int, full: float, halved: float
) -> None:
    """Worked out separately, without overlap and latency: percent of the updates without communication."""
    for nbytes, expected in ((DISTILBERT_BYTES, full), (DISTILBERT_BYTES / 2, halved)):
        exchange = allreduce_s(ranks, ranks, nbytes, bus_gb_per_s * 1e9, 0.0)
        efficiency = 100 * 0.05 * micro_batches / (0.05 * micro_batches + exchange)
        assert efficiency == pytest.approx(expected, abs=0.5 if expected == int(expected) else 0.1)


def test_bert_large_on_256_v100() -> None:
    """Published: Horovod at about 70% with 100 Gb/s (10 GB/s measured); steps of 0.286 to 0.32 s alone, 16 bits."""
    exchange = allreduce_s(256, 32, 340e6 * 2, 10e9, 0.0)
    assert exchange == pytest.approx(0.138, abs=0.005)
    assert 0.66 < 0.286 / (0.286 + exchange) < 0.3 / (0.3 + exchange) < 0.71


def test_what_backward_hides() -> None:
    """1.12 s of exchange; 0.36 of a micro-batch's computing hides it: U = 4 c + 1.12 - 0.36 c, or all of it."""
    run = measured(ranks=2, gradient_bytes=4 * 10**6, bandwidth_bytes_per_s=4e6 / 1.12, latency_s=0.0, accumulation=4)
    assert predict(dataclasses.replace(run, update_s=4 * 2.0 + 1.12 - 0.72), "none").exposed_s == pytest.approx(0.4)
    assert predict(dataclasses.replace(run, update_s=16.0), "none").exposed_s == 0.0


def test_compressing_hides_on_a_gpu_only() -> None:
    for device, in_the_open in (("cpu", True), ("cuda", False)):
        run = measured(accumulation=1, bandwidth_bytes_per_s=1e12, update_s=10.0, latency_s=0.0, device=device)
        prediction = predict(run, "int8")
        assert prediction.compress_s > 1e-3
        assert prediction.exposed_s == (pytest.approx(prediction.compress_s) if in_the_open else 0.0)


@pytest.mark.parametrize(("accumulation", "bandwidth"), [(50, 2.8e9), (1, 2.8e9), (1, 1e12), (8, 1e8)])
def test_the_uncompressed_prediction_is_the_measurement(accumulation: int, bandwidth: float) -> None:
    """Whether its exchange was hidden, partly, or not."""
    run = measured(accumulation=accumulation, bandwidth_bytes_per_s=bandwidth, update_s=10.0)
    assert predict(run, "none").update_s == pytest.approx(10.0, rel=1e-12)


def test_many_micro_batches_and_a_fair_network_need_nothing() -> None:
    # 2 * 63/64 * 265.6 MB at 2.8 GB/s: 187 ms of 2.5 s, 16 ms hidden. 16 bits would save half of 187: 3.7%.
    assert choose(measured()).kind == "fp16"
    # At 10 GB/s 8 bits would save three quarters of 52 ms, 1.6%: not worth it.
    choice = choose(measured(bandwidth_bytes_per_s=10e9))
    assert choice.kind == "none"
    assert "52.4 ms of a 2,500 ms update at 10 GB/s" in choice.reason
    assert "int8 would save" in choice.reason
    # Wholly hidden: nothing would be faster.
    assert choose(measured(accumulation=1, bandwidth_bytes_per_s=1e12)).reason.endswith("nothing would be faster")


def test_a_slow_network_pays_for_int8() -> None:
    slow = measured(bandwidth_bytes_per_s=0.1e9, update_s=10.0)
    choice = choose(slow)
    assert choice.kind == "int8"
    assert "int8 takes" in choice.reason
    assert "saves" in choice.reason
    by_kind = {kind: predict(slow, kind) for kind in candidates_for("torch")}
    # The bytes: a quarter and the scales, against one.
    assert by_kind["int8"].exchange_s == pytest.approx(by_kind["none"].exchange_s * (0.25 + 1 / 1024), rel=1e-3)
    assert by_kind["fp16"].exchange_s == pytest.approx(by_kind["none"].exchange_s / 2, rel=1e-3)


def test_latency_counts_for_every_collective() -> None:
    slow = measured(latency_s=1e-2, buckets=10)
    quick = dataclasses.replace(slow, latency_s=0.0)
    for kind, collectives in (("none", 10), ("fp16", 10), ("int8", 20)):
        slower = predict(slow, kind).exchange_s - predict(quick, kind).exchange_s  # type: ignore[arg-type]
        assert slower == pytest.approx(collectives * 1e-2)


def test_float16_over_gloo_is_slow() -> None:
    """Measured between two ranks: 130 to 245 ms for 16.8M elements, where float32 took 37 to 66 on loopback."""
    loopback = measured(
        ranks=2,
        gradient_bytes=4 * 2**24,
        bandwidth_bytes_per_s=1.3e9,
        engine="horovod",
        device="cpu",
        compress_bytes_per_s=1e10,
    )
    assert 0.130 < predict(loopback, "fp16").exchange_s < 0.245
    assert 0.037 < predict(loopback, "none").exchange_s < 0.066
    assert choose(dataclasses.replace(loopback, accumulation=1, update_s=0.2)).kind not in ("fp16", "bf16")
    # 8.4M elements where a flow has 500 Mbit/s: 293 ms measured, 547 ms in float32.
    capped = dataclasses.replace(loopback, gradient_bytes=4 * 2**23, bandwidth_bytes_per_s=62.5e6)
    assert predict(capped, "fp16").exchange_s == pytest.approx(0.293, rel=0.1)
    assert predict(capped, "none").exchange_s == pytest.approx(0.547, rel=0.1)
    assert math.isclose(predict(loopback, "fp16").exchange_s, GLOO_FP16_S * 2**23, rel_tol=0.01)


def test_candidates() -> None:
    assert candidates_for("horovod") == ("none", "fp16", "int8")
    assert candidates_for("torch") == ("none", "fp16", "bf16", "int8")


def test_a_topology_of_allreduce_leaves_what_travels_by_one() -> None:
    slow = measured(accumulation=1, bandwidth_bytes_per_s=5e7)
    assert choose(slow).kind == "int8"
    assert choose(slow, allreduce_only=True).kind == "fp16"


def test_what_int8_touches_by_hand() -> None:
    """Two ranks, two blocks of 1,024: each rank sums one of them."""
    residual_bytes = (2 + 3) * 4 * 2048
    codes, codes_of_part = 2048 + 8, 1024 + 4
    rounded = 3 * 4 * 2048 + codes + 3 * 4 * 1024 + codes_of_part
    summed, decoded = 2 * codes_of_part + 4 * 1024, codes + 4 * 2048
    assert exchange_cost("int8", 2, 4 * 2048, "torch").touched_bytes == residual_bytes + rounded + summed + decoded
    assert exchange_cost("none", 2, 4 * 2048, "torch").touched_bytes == 0
