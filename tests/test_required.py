"""FASTDISTIL_REQUIRE: what it lists makes a test fail that would else be skipped, for each of its names."""

import os
import sys
from pathlib import Path

import pytest

from tests.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]
# A name that FASTDISTIL_REQUIRE takes -> a test that needs it.
NEEDED_BY = {
    "horovod": "tests/distributed/test_world.py::test_a_topology_that_would_silently_be_flat_is_refused",
    "mpi": "tests/distributed/test_rank_info.py::test_mpirun_itself",
    "chromium": "tests/profiling/test_report_page.py",
    "root-network": "tests/distributed/test_network.py::test_both_caps_hold_together",
}
# Runs pytest as on a machine that has neither programs nor Horovod.
PYTEST = """
import sys
import pytest
sys.modules["horovod"] = None
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("required", [("horovod", "mpi"), ("chromium", "root-network")])
def test_what_is_required_fails_and_nothing_else(required: tuple[str, ...], tmp_path: Path, fork_server: ForkServer) -> None:
    (tmp_path / "program.py").write_text(PYTEST)
    (tmp_path / "no-programs").mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ |= {"PATH": str(tmp_path / "no-programs"), "FASTDISTIL_REQUIRE": ", ".join(required), "PYTHONPATH": str(ROOT)}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path / 'inner'}"]
    command = [sys.executable, str(tmp_path / "program.py"), *options, *NEEDED_BY.values()]
    process = fork_server.popen(command, environ, cwd=ROOT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == pytest.ExitCode.TESTS_FAILED, out + err
    failed = {name for name in NEEDED_BY if f"FASTDISTIL_REQUIRE lists {name}: " in out}
    assert failed == set(required), out
    assert "skipped" in out.splitlines()[-1] and "passed" not in out.splitlines()[-1], out
