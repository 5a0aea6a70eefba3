"""Runs whose step times are made up: noise, and how far each step resembles the one before."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = {"data": {"micro_batch_tokens": 256}, "loop": {"accumulation": 2}, "teacher": {"path": "a"}}
START = {
    "event": "start",
    "update": 0,
    "ranks": 1,
    "engine": "alone",
    "device": "cpu",
    "precision": "fp32",
    "student_parameters": 100,
    "teacher_parameters": 200,
}
Samples = np.ndarray[tuple[int], np.dtype[np.float64]]


def noisy(n: int, seed: int, median: float = 0.1, noise: float = 0.02, correlation: float = 0.0) -> Samples:
    """Log-normal steps, each resembling the one before."""
    random = np.random.default_rng(seed)
    kicks = random.normal(size=n + 100)
    walk = np.zeros(n + 100)
    for i in range(1, n + 100):
        walk[i] = correlation * walk[i - 1] + kicks[i]
    samples: Samples = median * np.exp(noise * walk[100:] * np.sqrt(1 - correlation**2))
    return samples


def run(directory: Path, steps: Samples | list[float], recipe: Any = RECIPE, readings: Any = None, **start: Any) -> Path:
    """A run directory with one log line an update."""
    directory.mkdir()
    (directory / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    lines = [{**START, **start}]
    for number, seconds in enumerate(map(float, steps), 1):
        phases = {"student": [0.4 * seconds], "backward": [0.5 * seconds]}
        line = {"event": "train", "update": number, "updates": 1, "tokens": 100, "tokens_per_s": 100 / seconds}
        more = {"step_s": [seconds], "warmup": 0, "phases": phases, "total": 10 / number}
        lines.append({**line, **more, **({"device": readings} if readings else {})})
    (directory / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return directory
