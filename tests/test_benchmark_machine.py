"""What the benchmarks' result files say of the machine, through a real pytest --benchmark-json."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.small_run import environment_of_no_worker

ROOT = Path(__file__).resolve().parents[1]


def test_a_result_file_knows_its_machine(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(benchmark):\n    benchmark.pedantic(sum, args=([1],), rounds=30)\n")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.conftest", "test_one.py", f"--benchmark-json={out}"]
    environ = {**environment_of_no_worker(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    machine = content["machine_info"]["fastdistil"]
    assert {"processor", "flags", "usable_cores", "torch_threads", "versions", "gpus"} <= machine.keys()
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    assert set(machine["flags"]) == words & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve"}
    clock = psutil.cpu_freq()
    assert machine["clock_max_mhz"] == ((clock.max or None) if clock is not None else None)
    assert "clock_mhz" in machine
    stats = content["benchmarks"][0]["stats"]
    assert [stats["p95"], stats["p99"]] == pytest.approx(np.percentile(stats["data"], [95, 99]).tolist())
