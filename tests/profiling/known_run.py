"""A run of six updates whose figures can be computed by hand."""

import math
from typing import Any

from tests.event_streams import BEGUN, GIB

RECIPE = {
    "teacher": {"path": "bert-base-uncased"},
    "student": {"architecture": "distilbert"},
    "data": {"train": "corpus/", "micro_batch_tokens": 50},
    "loop": {"accumulation": 1},
}
START = {
    "event": "start", "update": 0, "updates": 6, "engine": "torch", "ranks": 2, "nodes": 1, "rings": 2, "sync": "delayed",
    "compression": "none", "device": "cuda:0", "threads": 1, "torch": "2.13.0", "precision": "bf16", "kernels": "triton",
    "student_parameters": 1000, "teacher_parameters": 3000,
}  # fmt: skip


def line(update: int, rate: float, step_s: list[float], **fields: Any) -> dict[str, Any]:
    """A log line of 200 tokens, half of them rank 0's."""
    shares = {"data": 0.25, "backward": 0.5}
    return {
        "event": "train", "update": update, "updates": 2, "skipped": 0, "tokens": 200, "tokens_per_s": rate, "step_s": step_s,
        "phases": {name: [share * value for value in step_s] for name, share in shares.items()},
        "rank_tokens": [100, 100], "lr": 1e-4, "grad_norm": 1.0, "grad_norm_max": 2.0, **fields,
    }  # fmt: skip


KERNELS = [
    {"name": "gemm<T>", "calls": 1200, "ms": 750.0, "share": 0.75},
    {"name": "softmax", "calls": 7, "ms": 250.0, "share": 0.25},
]


def held_out(loss: float) -> dict[str, Any]:
    return {"loss": loss, "loss_se": 0.1, "perplexity": math.exp(loss), "labels": 400}


def known_events() -> list[dict[str, Any]]:
    """Three lines of two updates; the first update is warm-up. Their figures are KNOWN in test_report.py."""

    def fields(
        gradient: int,
        imbalance: float,
        worked: list[float],
        gib: int,
        share: float,
        joules: float,
    ) -> dict[str, Any]:
        return {
            "gradient_bytes": gradient, "ring_bytes": [gradient * 3 // 4, gradient // 4], "control_bytes": gradient // 50,
            "control_messages": 6, "gradient_collectives": 4, "exchange_wait_s": gradient / 1e4, "imbalance_time": imbalance,
            "imbalance_tokens": 0.0, "rank_worked_s": worked,
            "memory": {"peak_allocated_bytes": gib * GIB, "peak_rss_bytes": GIB, "fragmented_bytes": GIB // gib, "retries": 0},
            "device": {"samples": 10, "seconds": 200 / joules, "utilisation": share, "energy_j": joules, "throttled": {}},
            "mfu": {"student": share, "with_teacher": None, "hfu": None, "peak_flops": 1e12, "peak_source": "measured, bf16"},
        }  # fmt: skip

    return [
        {**START, "time": BEGUN},
        line(2, 20.0, [8.0, 2.0], warmup=1, total=9.0, soft=3.0),
        line(4, 50.0, [1.0, 3.0], total=7.0, soft=2.0, **fields(2000, 0.1, [3.0, 3.5], 4, 0.2, 50.0)),
        line(6, 100.0, [1.0, 1.0], total=5.0, soft=1.0, **fields(4000, 0.3, [1.0, 2.5], 2, 0.5, 100.0)),
        {"event": "evaluation", "update": 1, "seconds": 2.0, **held_out(1.0)},
        {"event": "evaluation", "update": 6, "seconds": 3.0, **held_out(2.0)},
        {"event": "memory", "update": 2, "time": BEGUN + 90, "peak_bytes": 4 * GIB,
         "parts": {"activations_and_logits": 4 * GIB}, "estimate": {"logits": GIB, "activations": GIB}},
        {"event": "trace", "update": 6, "first": 4, "last": 5, "kernels": KERNELS},
        {"event": "note", "update": 6, "time": BEGUN + 100, "message": "look here"},
        {"event": "done", "update": 6, "time": BEGUN + 101},
    ]  # fmt: skip
