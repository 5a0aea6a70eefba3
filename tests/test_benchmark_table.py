"""benchmarks/table.py on a benchmark's JSON."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_a_result(tmp_path: Path) -> None:
    sides = [
        {"side": "ours", "median_s": 0.5, "share_of_copy": 0.81, "peak_bytes": 3 * 2**20},
        {"side": "eager", "median_s": 1.25, "backward_s": 0.75, "share_of_products": 0.333},
    ]
    benchmarks = [{"group": "logits bf16", "extra_info": side} for side in sides] + [{"group": None, "extra_info": {}}]
    (tmp_path / "x.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, "benchmarks/table.py", str(tmp_path / "x.json")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[:6] == [
        "**logits bf16**",
        "",
        "| side | ms | of it backward | speed | of the ceiling | extra memory |",
        "|---|---|---|---|---|---|",
        "| ours | 500.0 |  | 2.50x | 81% of copy bandwidth | 3 MiB |",
        "| eager | 1250.0 | 750.0 | 1.00x | 33% of matrix rate |  |",
    ]


def test_a_comparison_without_sides(tmp_path: Path) -> None:
    """Of its figures, those that are not series."""
    figures = {
        "engine": "torch",
        "of_ceiling": 0.98765,
        "quartiles": [0.97, 0.99],
        "by_round": [1, 2, 3],
        "ms": {"1": 12.5, "2": 7},
    }
    benchmarks = [{"group": "weak scaling", "name": "test_weak_scaling[torch]", "extra_info": figures}]
    (tmp_path / "x.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, "benchmarks/table.py", str(tmp_path / "x.json")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.rstrip().splitlines() == [
        "**weak scaling: test_weak_scaling[torch]**",
        "",
        "| | |",
        "|---|---|",
        "| engine | torch |",
        "| of_ceiling | 0.9877 |",
        "| quartiles | 0.97, 0.99 |",
        "| ms 1 | 12.5 |",
        "| ms 2 | 7 |",
    ]
