"""README.md's tables of measurements hold the figures of benchmarks/results/."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")

# The rows of the table of losses, in its order: group of benchmarks, eager side, side of fastdistil.
STEP = "step, 8 x 128 tokens"
LOSSES = [
    ("linear forward+backward bf16 N=2048 V=30522 D=768 E=768", "eager", "fastdistil"),
    ("linear forward+backward fp32 N=2048 V=30522 D=768 E=768", "eager", "fastdistil"),
    ("logits bf16 N=512 V=30522", "eager", "fastdistil"),
    ("logits fp32 N=512 V=30522", "eager", "fastdistil"),
    ("sparse bf16 N=512 V=30522 K=32", "eager", "fastdistil"),
    ("cosine fp32 N=2048 D=768 L=6", "eager", "fastdistil"),
    ("cosine bf16 N=2048 D=768 L=6", "eager", "fastdistil"),
    ("cross-entropy bf16 N=512 V=30522 D=768", "eager", "fastdistil"),
    (STEP, "eager fp32 (the example)", "fastdistil bf16"),
    (STEP, "eager bf16 autocast (the example)", "fastdistil bf16"),
    (STEP, "eager fp32 (the example)", "fastdistil fp32"),
]


def measured(path: str) -> list[dict[str, Any]]:
    benchmarks: list[dict[str, Any]] = json.loads((RESULTS / path).read_text(encoding="utf-8"))["benchmarks"]
    return benchmarks


def cells_of(header: str) -> list[list[str]]:
    """Return the rows of the table of README.md with that header, without the first column."""
    (table,) = re.findall(rf"^{re.escape(header)}\n\|[-|]+\|\n((?:\|.*\|\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in table.splitlines()]


def numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(cell)]


def rounded(measurements: list[float], decimals: int) -> list[Any]:
    """Return what a table may print for these: half a unit of the last place around each."""
    return [pytest.approx(value, rel=0, abs=0.5 * 10**-decimals + 1e-9) for value in measurements]


def test_the_table_of_the_losses() -> None:
    rows = cells_of("| what | eager torch | fastdistil | ratio | ratio, freed memory kept |")
    results = [
        {
            (entry["group"], entry["extra_info"].get("side")): entry["extra_info"]
            for entry in measured(f"epyc-avx512-2-cores/{file}")
        }
        for file in ("kernels.json", "kernels-memory-kept.json")
    ]
    for (group, *sides), (*printed, ratio, ratio_of_kept) in zip(LOSSES, rows, strict=True):
        for side, cell in zip(sides, printed, strict=True):
            figures = results[0][group, side]
            assert numbers(cell) == rounded([figures["median_s"] * 1e3, figures["peak_bytes"] / 2**20], 0), (group, side)
        for result, cell in zip(results, (ratio, ratio_of_kept), strict=True):
            eager_s, ours_s = (result[group, side]["median_s"] for side in sides)
            assert numbers(cell) == rounded([eager_s / ours_s], 2), group


def test_the_table_of_the_exchange() -> None:
    exchange, per_flow, shared, _, scaling = cells_of("| what | torch, Gloo | Horovod, Gloo |")
    rings = {entry["name"]: entry["extra_info"]["ms"] for entry in measured("xeon-avx512-2-cores/rings.json")}
    by_engine = {
        entry["extra_info"].get("engine"): entry["extra_info"] for entry in measured("xeon-avx512-2-cores/exchange.json")
    }
    for column, engine in enumerate(("torch", "horovod")):
        figures = by_engine[engine]
        seconds = [figures[name] for name in ("buckets", "raw", "ddp")]
        assert numbers(exchange[column]) == rounded([1e3 * value for value in seconds], 0)
        for link, row in (("flow", per_flow), ("link", shared)):
            by_rings = rings[f"test_rings[{engine}-cpu-{link}]"]
            assert numbers(row[column]) == rounded([by_rings[count] for count in ("1", "2", "4")], 0)
        (weak,) = measured(f"xeon-avx512-2-cores/weak-scaling-{engine}.json")
        share, rounds = weak["extra_info"]["of_ceiling"], weak["extra_info"]["of_ceiling_by_round"]
        total_share, count, *extremes = numbers(scaling[column])
        assert (count, [total_share, *extremes]) == (len(rounds), rounded([share, min(rounds), max(rounds)], 3))
