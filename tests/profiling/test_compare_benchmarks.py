"""Two files of pytest-benchmark, compared benchmark by benchmark, and which of them are no comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistil.errors import UserError
from fastdistil.profiling.report.compare import compare
from tests.profiling.measured_runs import noisy, run
from tests.small_run import environment_of_no_worker

BENCHMARKS = """
import time
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_work(benchmark, n):
    benchmark.pedantic(sum, args=(range(2000 * n),), rounds=15)

def test_{extra}(benchmark):
    benchmark.pedantic(sum, args=(range(10),), rounds=5)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two real files of pytest-benchmark: two benchmarks are in both, one only in each."""
    folder = tmp_path_factory.mktemp("benchmarks")
    files = []
    for extra in ("old", "new"):
        (folder / "test_bench.py").write_text(BENCHMARKS.replace("{extra}", extra), encoding="utf-8")
        out = folder / f"{extra}.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_bench.py", f"--benchmark-json={out}"]
        environ = environment_of_no_worker()
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        files.append(out)
    return files[0], files[1]


def slowed(path: Path, out: Path, factor: float, name: str = "test_work[2]") -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    for benchmark in content["benchmarks"]:
        if benchmark["name"] == name:
            benchmark["stats"]["data"] = [factor * seconds for seconds in benchmark["stats"]["data"]]
    out.write_text(json.dumps(content), encoding="utf-8")
    return out


def test_benchmarks_by_full_name(measured: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = measured
    comparison = compare(old, new)
    assert [entry["name"] for entry in comparison["rows"]] == ["test_bench.py::test_work[1]", "test_bench.py::test_work[2]"]
    assert comparison["rows"][0]["n"] == [15, 15]
    assert comparison["only_in"] == {"a": ["test_bench.py::test_old"], "b": ["test_bench.py::test_new"]}
    twice = compare(old, slowed(old, tmp_path / "slow.json", 2.0), fail_above=0.05)
    ratios = {entry["name"]: entry["ratio"] for entry in twice["rows"]}
    assert ratios["test_bench.py::test_work[1]"] == 1 and ratios["test_bench.py::test_work[2]"] == pytest.approx(2)
    assert twice["verdict"]["slower"] == ["test_bench.py::test_work[2]"]
    assert twice["verdict"]["unjudged"] == ["test_bench.py::test_old"]  # 5 rounds


def test_benchmarks_of_another_machine_are_refused(measured: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(measured[0].read_text(encoding="utf-8"))
    content["machine_info"]["cpu"]["brand_raw"] = "Another processor"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"processor: .* against Another processor"):
        compare(measured[0], other)
    assert compare(measured[0], other, anyway=True)["differences"][0]["key"] == "processor"


def test_our_own_machine_info_is_what_must_agree(measured: tuple[Path, Path], tmp_path: Path) -> None:
    files = []
    for threads in (1, 2):
        content = json.loads(measured[0].read_text(encoding="utf-8"))
        gpus = [{"name": "A GPU", "sm_clock_mhz": 1000 + threads}]
        facts = {
            "processor": "P",
            "usable_cores": 2,
            "torch_threads": threads,
            "gpus": gpus,
            "versions": {"torch": f"2.{threads}"},
        }
        content["machine_info"]["fastdistil"] = facts
        files.append(tmp_path / f"{threads}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="same work: torch_threads: 1 against 2; --anyway"):
        compare(*files)
    keys = [difference["key"] for difference in compare(*files, anyway=True)["differences"]]
    assert keys == ["torch_threads", "versions.torch"]  # clocks differ from moment to moment


def test_benchmarks_that_cannot_be_compared(measured: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(measured[0].read_text(encoding="utf-8"))
    bare, none = tmp_path / "bare.json", tmp_path / "none.json"
    none.write_text(json.dumps({**content, "benchmarks": content["benchmarks"][2:]}), encoding="utf-8")
    for benchmark in content["benchmarks"]:
        del benchmark["stats"]["data"]
    bare.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"bare\.json has no single timings; make it with --benchmark-json"):
        compare(measured[0], bare)
    with pytest.raises(UserError, match="no benchmark in common"):
        compare(none, measured[1])
    with pytest.raises(UserError, match="holds a run"):
        compare(run(tmp_path / "a", noisy(10, 0)), measured[1])
