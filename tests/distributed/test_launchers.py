"""`fastdistil train` as the rank of other launchers, each for real: what two ranks learn is what one rank does."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest

from tests.distributed.conftest import require_horovod
from tests.small_run import events, learnt, quiet, small

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"],
    "mpirun": MPIRUN,
    "horovodrun over Gloo": ["horovodrun", "-np", "2", "--gloo"],
    "horovodrun over MPI": ["horovodrun", "-np", "2", "--mpi", "--mpi-args=--allow-run-as-root --oversubscribe"],
}


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("torchrun", "torch"),
        ("mpirun", "horovod"),
        pytest.param("torchrun", "horovod", marks=pytest.mark.slow),
        pytest.param("mpirun", "torch", marks=pytest.mark.slow),
        pytest.param("horovodrun over Gloo", "horovod", marks=pytest.mark.slow),
        pytest.param("horovodrun over MPI", "horovod", marks=pytest.mark.slow),
    ],
)
def test_the_ranks_of_a_launcher_train_together(
    launcher: str, engine: str, material: Path, tmp_path: Path, need: Callable[[str, str], Never]
) -> None:
    if engine == "horovod":
        require_horovod(need)
    if "mpi" in launcher.lower() and shutil.which("mpirun") is None:
        need("mpi", "no mpirun on this machine; on Debian: apt install openmpi-bin")
    recipe = small(material, tmp_path / "two", f"world.engine={engine}", "student.dropout=0", "loop.updates=3")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [*LAUNCHERS[launcher], sys.executable, "-m", "fastdistil", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done: 3 updates") == 1, done.stdout
    (start,) = events(tmp_path / "two" / "run", "start")
    assert (start["engine"], start["ranks"]) == (engine, 2)
    quiet(small(material, tmp_path / "one", "student.dropout=0", "loop.updates=3", "loop.accumulation=4"))
    for of_two, of_one in zip(learnt(tmp_path / "two" / "run"), learnt(tmp_path / "one" / "run"), strict=True):
        assert of_two == pytest.approx(of_one, rel=2e-5)
