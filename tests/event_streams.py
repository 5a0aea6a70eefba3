"""Run directories as a training run leaves them, made up: recipe.yaml and events.jsonl with every field of the event log.

`write_run` makes a plausible run of any length: losses that fall, steps with a long tail, a slow rank, a throttled spell, an
evaluation and a checkpoint now and then. Equal arguments give equal bytes. `write_events` writes events that a test spells out.
For what reads runs; nothing here is measured.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

BEGUN = 1_790_000_000.0  # seconds since 1970
GIB = 2**30
PHASES = ("data", "transfer", "teacher", "student", "losses", "backward", "compression", "exposed", "optimizer")
# Of a step, on a GPU with several ranks; what is left is "other".
SHARES = dict(zip(PHASES, (0.02, 0.01, 0.13, 0.2, 0.12, 0.33, 0.03, 0.06, 0.07), strict=True))
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": None,
    "runs_dir": "runs",
    "seed": 0,
    "teacher": {"path": "bert-base-uncased", "dtype": "auto"},
    "student": {"architecture": "distilbert", "layers": [0, 2, 4, 7, 9, 11], "freeze_positions": True},
    "data": {"train": "corpus/", "micro_batch_tokens": 2560, "max_length": 512},
    "mask": {"probability": 0.15, "smoothing": 0.7},
    "objective": {"a_ce": 5.0, "a_mlm": 2.0, "a_cos": 1.0, "temperature": 2.0},
    "optim": {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "warmup": 0.05, "schedule": "linear", "clip": 5.0},
    "loop": {"epochs": 3, "accumulation": 50, "precision": "bf16"},
    "world": {"engine": "horovod", "ranks": 2, "rings": 2, "sync": "delayed"},
    "logging": {"every": 10},
}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What `write_run` makes up."""

    lines: int = 60
    """Log lines."""
    every: int = 10
    """Updates of a line."""
    ranks: int = 2
    gpu: bool = True
    speed: float = 1.0
    """Steps take 1 / speed times as long."""
    seed: int = 0
    outcome: str | None = "done"
    """The last event; None: the run goes on, or died."""
    old: bool = False
    """Without all that only a profiled run records: as written before there were these fields."""


def write_run(directory: Path, stream: Stream | None = None, recipe: Mapping[str, Any] | None = None) -> Path:
    """Write the directory; `recipe`: sections or values that replace those of RECIPE. Returns the directory."""
    stream = stream or Stream()
    sections = {"name": directory.name, "world": {**RECIPE["world"], "ranks": stream.ranks}, "logging": {"every": stream.every}}
    return write_events(directory, _events(stream), {**RECIPE, **sections, **(recipe or {})})


def write_events(directory: Path, events: Iterable[Mapping[str, Any]], recipe: Mapping[str, Any] = RECIPE) -> Path:
    """Write these events as they are. Each needs "event"; "time" is counted up from BEGUN where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    lines = [json.dumps({"time": BEGUN + index, **event}, allow_nan=False) for index, event in enumerate(events)]
    (directory / "events.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return directory


def _events(stream: Stream) -> list[dict[str, Any]]:
    random = np.random.default_rng(stream.seed)
    updates = stream.lines * stream.every
    now = BEGUN
    events = [_start(stream, updates, now)]
    if not stream.old:
        events.append(_environment(stream, now + 2.0))
    now += 30.0  # models, compilation
    for line in range(stream.lines):
        update = (line + 1) * stream.every
        step_s = _steps(random, stream, line)
        now += float(step_s.sum())
        events.append({"event": "train", "time": now, "update": update, **_line(random, stream, line, step_s)})
        if line == 0 and not stream.old:
            events.append({"event": "memory", "time": now, "update": update, **_memory(stream)})
        if (line + 1) % max(1, stream.lines // 8) == 0:
            now += 6.5
            events.append(
                {"event": "evaluation", "time": now, "update": update, "seconds": 6.5, **_evaluation(random, update / updates)}
            )
            now += 1.2
            path = f"step-{update:08d}"
            events.append({"event": "checkpoint", "time": now, "update": update, "seconds": 1.2, "path": path})
        if line == stream.lines // 2:
            events.append(
                {"event": "note", "time": now, "update": update, "message": "a shard was read twice as slowly as the others"}
            )
    if stream.outcome is not None:
        events.append({"event": stream.outcome, "time": now + 1.0, "update": updates})
    return events


def _start(stream: Stream, updates: int, now: float) -> dict[str, Any]:
    several = stream.ranks > 1
    return {
        "event": "start", "time": now, "update": 0, "updates": updates,
        "engine": "horovod" if several else "none", "ranks": stream.ranks, "nodes": 1, "rings": 2 if several else 1,
        "sync": "delayed", "compression": "int8" if several else "none", "device": "cuda:0" if stream.gpu else "cpu",
        "threads": 8, "torch": "2.13.0", "precision": "bf16" if stream.gpu else "fp32",
        "kernels": "triton" if stream.gpu else "torch",
        "student_parameters": 66_985_530, "teacher_parameters": 109_514_298,
    }  # fmt: skip


def _environment(stream: Stream, now: float) -> dict[str, Any]:
    devices = [
        {"rank": rank, "host": "node-17", "name": "NVIDIA H200", "uuid": f"GPU-{rank:08x}", "memory_bytes": 141 * GIB}
        for rank in range(stream.ranks)
    ]
    peaks = {
        "flops": {"datasheet, bf16 dense": 989e12, "measured, bf16": 742e12},
        "bytes": {"datasheet": 4.8e12, "measured": 4.1e12},
    }
    host = {"flops": {"measured, fp32": 1.2e11}, "bytes": {"measured": 2.1e10}}
    return {
        "event": "environment", "time": now, "processor": "Intel(R) Xeon(R) Platinum 8480C", "cores": 16,
        "memory_bytes": 128 * GIB, "host": "node-17",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0", "horovod": "0.28.1"},
        "devices": devices if stream.gpu else [], "peaks": peaks if stream.gpu else host,
    }  # fmt: skip


def _steps(random: np.random.Generator, stream: Stream, line: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[every] seconds: a log-normal body, a rare straggling update, a first one that compiles."""
    body = (0.24 if stream.gpu else 2.4) / stream.speed * random.lognormal(0.0, 0.03, stream.every)
    body *= np.where(random.random(stream.every) < 0.01, random.uniform(1.5, 3.0, stream.every), 1.0)
    if _throttled(stream, line):
        body *= 1.12
    if line == 0:
        body[0] *= 9.0
    return body


def _throttled(stream: Stream, line: int) -> bool:
    return stream.gpu and 0.55 < line / stream.lines < 0.68


def _line(random: np.random.Generator, stream: Stream, line: int, step_s: np.ndarray[Any, Any]) -> dict[str, Any]:
    done = (line + 1) / stream.lines
    fall = math.exp(-4 * done)
    soft, hard = 0.35 + 3.2 * fall + random.normal(0, 0.02), 2.1 + 6.5 * fall + random.normal(0, 0.04)
    cosine = 0.08 + 0.5 * fall + random.normal(0, 0.003)
    mse = 0.15 + 0.9 * fall + random.normal(0, 0.005)
    norm = 0.9 + 3 * fall + abs(random.normal(0, 0.15))
    per_update = 2560 * 50 * stream.ranks if stream.gpu else 12_800 * stream.ranks
    tokens, seconds = per_update * stream.every, float(step_s.sum())
    fields: dict[str, Any] = {
        "total": 5 * soft + 2 * hard + cosine, "soft": soft, "hard": hard, "cosine": cosine, "mse": mse,
        "grad_norm": norm, "grad_norm_max": norm * (1.2 + abs(random.normal(0, 0.4))),
        "updates": stream.every, "skipped": 0, "tokens": tokens, "skipped_in_all": 0, "tokens_per_s": tokens / seconds,
        "data_wait_share": SHARES["data"], "host_peak_bytes": 9 * GIB,
        "lr": 5e-4 * min(done / 0.05, (1 - done) / 0.95),
    }  # fmt: skip
    if stream.gpu:
        fields |= {"device_allocated_bytes": 9 * GIB, "device_peak_bytes": 41 * GIB}
    if stream.ranks > 1:
        fields |= _ranks(random, stream, tokens, seconds)
    return fields if stream.old else fields | _profiled(random, stream, line, step_s, tokens)


def _ranks(random: np.random.Generator, stream: Stream, tokens: int, seconds: float) -> dict[str, Any]:
    gradient = 4 * 66_985_530 * stream.every // 4
    share = [tokens // stream.ranks] * stream.ranks
    return {
        "engine": "horovod", "compression": "int8", "buckets": 11, "gradient_collectives": 11 * stream.every,
        "gradient_bytes": gradient, "ring_bytes": [gradient - gradient // 2, gradient // 2],
        "control_messages": 3 * stream.every, "control_bytes": 96 * stream.every,
        "exchange_wait_s": SHARES["exposed"] * seconds,
        "imbalance_tokens": abs(random.normal(0.01, 0.004)), "imbalance_time": abs(random.normal(0.05, 0.01)),
        "slowest_rank": stream.ranks - 1, "rank_tokens": share,
        "rank_data_wait_s": [SHARES["data"] * seconds] * stream.ranks,
    }  # fmt: skip


def _profiled(
    random: np.random.Generator, stream: Stream, line: int, step_s: np.ndarray[Any, Any], tokens: int
) -> dict[str, Any]:
    seconds = float(step_s.sum())
    alone = {"compression": 0.0, "exposed": 0.0} if stream.ranks == 1 else {}
    parts = {**SHARES, **alone} if stream.gpu else {**SHARES, **alone, "transfer": 0.0, "losses": 0.2}
    phases = {name: list(share * step_s * random.normal(1.0, 0.02, len(step_s))) for name, share in parts.items() if share}
    if stream.ranks > 1:
        phases["communication"] = list(0.22 * step_s)
    worked = [0.9 * seconds * (1 + 0.06 * (rank == stream.ranks - 1) + random.normal(0, 0.004)) for rank in range(stream.ranks)]
    several = {"rank_0_waited_s": max(worked) - worked[0]} if stream.ranks > 1 else {}
    work = {"student": 6 * 43e6 * tokens, "teacher": 2 * 86e6 * tokens, "heads": 8 * 768 * 30522 * tokens}
    work = {name: value / stream.ranks for name, value in work.items()}
    peak = 989e12 if stream.gpu else 1.2e11
    useful = (work["student"] + 0.75 * work["heads"]) / seconds / peak
    everything = sum(work.values()) / seconds / peak
    slow = 1.0 if stream.gpu else 0.004  # a processor does less: its made-up work shrinks with it
    return {
        "step_s": list(step_s),
        "warmup": 3 if line == 0 else 0,
        "phases": phases,
        "rank_worked_s": worked,
        **several,
        "memory": _memory_now(random, stream),
        "device": _device(random, stream, line, seconds),
        "flops": {name: value * slow for name, value in work.items()},
        "mfu": {
            "student": useful * slow, "with_teacher": everything * slow, "hfu": None if not stream.gpu else everything * 1.05,
            "peak_flops": peak, "peak_source": "datasheet, bf16 dense" if stream.gpu else "measured, fp32",
        },
    }  # fmt: skip


def _memory_now(random: np.random.Generator, stream: Stream) -> dict[str, Any]:
    fields: dict[str, Any] = {"rss_bytes": int((8 + random.normal(0, 0.05)) * GIB), "peak_rss_bytes": 9 * GIB}
    if stream.gpu:
        allocated, reserved = int((9 + random.normal(0, 0.2)) * GIB), 46 * GIB
        fields |= {
            "allocated_bytes": allocated, "reserved_bytes": reserved, "peak_allocated_bytes": 41 * GIB,
            "peak_reserved_bytes": reserved, "fragmented_bytes": 5 * GIB, "used_bytes": 48 * GIB,
            "outside_bytes": 2 * GIB, "retries": 0, "ooms": 0,
            "phase_peaks": {
                "teacher": 18 * GIB, "student": 33 * GIB, "losses": 37 * GIB, "backward": 41 * GIB, "optimizer": 12 * GIB,
            },
        }  # fmt: skip
    return fields


def _device(random: np.random.Generator, stream: Stream, line: int, seconds: float) -> dict[str, Any]:
    samples = max(1, int(seconds * 5))
    if not stream.gpu:
        return {"samples": samples, "seconds": seconds, "utilisation": 0.93, "clock_mhz": 2600 + random.normal(0, 20)}
    hot = _throttled(stream, line)
    clock = (1710 if hot else 1965) + random.normal(0, 6)
    power = (698 if hot else 655) + random.normal(0, 8)
    return {
        "samples": samples, "seconds": seconds, "utilisation": 0.97 + random.normal(0, 0.005), "sm_clock_mhz": clock,
        "sm_clock_min_mhz": clock - abs(random.normal(60, 20)), "memory_clock_mhz": 3201, "power_w": power,
        "temperature_c": (79 if hot else 68) + random.normal(0, 0.7) - 25 * math.exp(-line / 4),
        "pcie_tx_bytes_per_s": 2.1e8, "pcie_rx_bytes_per_s": 3.4e8, "nvlink_tx_bytes_per_s": None,
        "energy_j": power * seconds, "throttled": {"sw_thermal": 0.8, "sw_power_cap": 0.2} if hot else {},
    }  # fmt: skip


def _memory(stream: Stream) -> dict[str, Any]:
    weights = {"student_weights": 66_985_530 * 4, "teacher_weights": 109_514_298 * 2, "gradients": 66_985_530 * 4}
    held = {**weights, "optimizer": 66_985_530 * 8, "residuals": 66_985_530 * 4}
    parts, estimate = {**held, "activations_and_logits": 38 * GIB}, {**held, "logits": 2 * GIB, "activations": 31 * GIB}
    return {"parts": parts, "estimate": estimate, "peak_bytes": sum(parts.values())}


def _evaluation(random: np.random.Generator, done: float) -> dict[str, Any]:
    loss = 2.05 + 5 * math.exp(-4 * done) + random.normal(0, 0.01)
    return {
        "loss": loss, "loss_se": 0.021, "perplexity": math.exp(loss), "labels": 31_204, "sequences": 2048,
        "kl": 0.21 + 0.9 * math.exp(-3 * done), "kl_se": 0.004, "kl_tokens": 208_411,
    }  # fmt: skip
