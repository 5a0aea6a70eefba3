"""Ranks that the command line and `distil()` start themselves: here, over ssh, elastic, and to be measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistil import events as event_log
from tests.small_run import events, learnt, quiet, small


def cli(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "fastdistil", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(root), **(environment or {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_np_starts_ranks_and_prints_once(engine: str, material: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path, f"world.engine={engine}", "loop.updates=3").to_yaml())
    done = cli("train", path, "--np", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 3 updates") == 1 and done.stdout.count("update 3/3") == 1
    assert len(events(tmp_path / "run")) == 3


def test_hosts_train_over_ssh(material: Path, tmp_path: Path) -> None:
    """Two addresses of this machine, and for ssh a shell: two nodes of a rank each, which learn what one rank does."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "$2" >> "$0.hosts"\nshift 2\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    path = tmp_path / "r.yaml"
    path.write_text(
        small(
            material,
            tmp_path / "two",
            "world.engine=torch",
            "student.dropout=0",
            "loop.updates=3",
        ).to_yaml(),
    )
    done = cli("train", path, "--hosts", "127.0.0.2:1,127.0.0.3:1", environment={"FASTDISTIL_SSH": str(ssh)})
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "ssh.hosts").read_text().split()) == ["127.0.0.2", "127.0.0.3"]
    (start,) = events(tmp_path / "two" / "run", "start")
    assert (start["ranks"], start["nodes"]) == (2, 2)
    quiet(small(material, tmp_path / "one", "student.dropout=0", "loop.updates=3", "loop.accumulation=4"))
    for of_two, of_one in zip(
        learnt(tmp_path / "two" / "run"),
        learnt(tmp_path / "one" / "run"),
        strict=True,
    ):
        assert of_two == pytest.approx(of_one, rel=2e-5)


@pytest.mark.slow
def test_scale_measures_real_ranks(material: Path, tmp_path: Path) -> None:
    """Two points, two rounds of which the second goes backwards: every run is there, with the same threads for each rank."""
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path / "runs", "world.engine=torch", "name=null").to_yaml())
    out = tmp_path / "study"
    environment = {"OMP_NUM_THREADS": "1"}
    options = ("--np", "1,2", "--rounds", 2, "--steps", 3, "--no-ceiling", "--out", out)
    done = cli("scale", path, *options, environment=environment)
    assert done.returncode == 0, done.stderr
    study = json.loads((out / "scale.json").read_text())
    one, two = study["points"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for point in (one, two):
        assert [len(seconds) for seconds in point["step_s"]] == [3, 3], "rounds, and measured updates of each"
        assert min(min(seconds) for seconds in point["step_s"]) > 0
    assert one["efficiency"] == [1, 1], "by round"
    assert len(two["efficiency"]) == 2 and min(two["efficiency"]) > 0
    assert set(two["lost_s"]) >= {"exposed", "imbalance"}
    assert "<svg" in (out / "scale.html").read_text()
    assert "tokens/s" in done.stdout


def test_distil_starts_ranks_from_python(material: Path, tmp_path: Path) -> None:
    program = tmp_path / "notebook.py"
    program.write_text(
        "import sys\n"
        "from fastdistil import distil\n"
        "from fastdistil.recipe import load_recipe\n"
        "result = distil(load_recipe(sys.argv[1]), np=2, loop={'updates': 3})\n"
        "print(result.updates, type(result.student).__name__, next(result.student.parameters()).device)\n"
    )
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path, "world.engine=torch").to_yaml())
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "FASTDISTIL_TEST_MARK": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(program), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 BertForMaskedLM cpu"
    mark = f"FASTDISTIL_TEST_MARK={tmp_path}".encode()
    assert [entry for entry in Path("/proc").glob("[0-9]*") if mark in _environment(entry)] == []


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


# Becomes sitecustomize.py of the ranks: changes what happens at the beginning of an update, once fastdistil.train is imported.
PLANT = """
import os, signal, sys, time
from importlib.abc import MetaPathFinder
from pathlib import Path

folder = Path(__file__).parent

def kill_rank_1_once(update):
    if update == 4 and os.environ["RANK"] == "1" and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

def wait_for_the_signal(update):
    if update != 5 or os.environ["WORLD_SIZE"] != "1" or not (folder / "grows").exists():
        return
    stop, arrived = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda *arguments: (arrived.append(True), stop(*arguments)))
    until_s = time.monotonic() + 120
    while not arrived and time.monotonic() < until_s:
        time.sleep(0.05)

class Plant(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fastdistil.training.export":  # fastdistil.train is being imported
            sys.meta_path.remove(self)
            from fastdistil.gradients import exchange
            several, alone = exchange.SharedGradients, exchange.LocalGradients
            for gradients, deed in ((several, kill_rank_1_once), (alone, wait_for_the_signal)):
                def begin(self, update, deed=deed, begin=gradients.begin):
                    deed(update)
                    begin(self, update)
                gradients.begin = begin

if "RANK" in os.environ:
    sys.meta_path.insert(0, Plant())
"""


@pytest.mark.parametrize("grows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_elastic_goes_on_with_the_ranks_that_remain(grows: bool, material: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in update 5: the run restarts by itself on one rank from update 4, and ends; or it is stopped in update
    6, which is not done, when the lost rank's slot is tried again, and ends with two."""
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    if grows:
        (tmp_path / "grows").touch()
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path, "world.engine=torch", "world.timeout_s=6", "student.dropout=0").to_yaml())
    root = Path(__file__).resolve().parents[2]
    options = ["--elastic", "1:2", "--grow-after", 20 if grows else 600]
    done = cli("train", path, *options, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"})
    assert done.returncode == 0, done.stderr
    starts = [e for e in event_log.read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, event_log.Start)]
    assert [(e.update, e.ranks) for e in starts] == [(0, 2), (4, 1), (5, 2)][: 2 + grows]
    assert [line[0] for line in learnt(tmp_path / "run")] == list(range(1, 9))
