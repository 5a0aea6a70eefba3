"""The installed Horovod: what its files say, what it was built with, and two ranks that try it."""

import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fastdistil.install import horovod_build, horovod_installed
from fastdistil.install.horovod_installed import Torch, installed_torch, probe, two_ranks

ROOT = Path(__file__).resolve().parents[2]


def plant(folder: Path, torch: str, metadata: str | None) -> None:
    """A torch and a Horovod by their files."""
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{torch}'\ncuda = None\nhip = None\n")
    (folder / "horovod").mkdir(exist_ok=True)
    (folder / "horovod-0.28.1.dist-info").mkdir(exist_ok=True)
    (folder / "horovod-0.28.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n",
    )
    if metadata is not None:
        (folder / "horovod/metadata.json").write_text(metadata)


def ask(folder: Path, expression: str) -> str:
    """Of a Python that has only `folder` and the standard library."""
    script = f"from fastdistil.install.horovod_installed import *; print({expression})"
    environ = {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", script],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


METADATA = '{\n"pytorch": "2.13.0+cpu",\n"dummy": "none"\n}'


@pytest.mark.parametrize(
    ("torch", "metadata", "state"),
    [
        ("2.13.0+cpu", METADATA, "ok: 0.28.1 for torch 2.13.0+cpu"),
        ("2.12.1", METADATA, "problem: 0.28.1 was built for torch 2.13.0+cpu, and torch here is 2.12.1"),
        (
            "2.13.0+cpu",
            '{"dummy": "none"}',
            "problem: 0.28.1 was built for torch none, and torch here is 2.13.0+cpu",
        ),
        ("2.13.0+cpu", None, "problem: its files are incomplete"),
        ("2.13.0+cpu", "{", "problem: its files are incomplete"),
    ],
)
def test_state_by_files(torch: str, metadata: str | None, state: str, tmp_path: Path) -> None:
    plant(tmp_path, torch, metadata)
    assert ask(tmp_path, "f'{state().status}: {state().text}'") == state


def test_state_without_anything(tmp_path: Path) -> None:
    assert ask(tmp_path, "state().status, installed_torch()") == "absent None"


def test_installed_torch_is_the_one_that_is_imported() -> None:
    import torch

    assert installed_torch() == Torch(torch.__version__, torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "gloo_built = mpi_built = lambda: True\nnccl_built = lambda: 22907",
            {"gloo": 1, "mpi": 1, "nccl": 22907},
        ),
        (
            "gloo_built = lambda: True\nmpi_built = lambda: False\nnccl_built = lambda: 0",
            {"gloo": 1, "mpi": 0, "nccl": 0},
        ),
        ("raise ImportError('libmpi.so.40: cannot open')", "ImportError: libmpi.so.40: cannot open"),
        ("import os; os._exit(3)", "it ends the process with 3"),
    ],
)
def test_probe_survives_what_it_finds(
    source: str, expected: Mapping[str, int] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod/__init__.py").touch()
    (tmp_path / "horovod/torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe() == expected


@pytest.mark.parametrize(
    ("script", "expected"),
    [("import time; time.sleep(1000)", "not done within 0.1 s"), ("1 / 0", "division by zero")],
)
def test_two_ranks_in_vain(
    script: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A check that hangs ends in time; one that fails says so."""
    (tmp_path / "horovod.py").write_text(script)
    if "time" in script:
        monkeypatch.setattr(horovod_installed, "CHECK_S", 0.1)
    assert two_ranks({"PYTHONPATH": str(tmp_path)}).endswith(expected)


def test_two_ranks_show_their_last_lines(tmp_path: Path) -> None:
    (tmp_path / "horovod.py").write_text("print('1\\n2\\n3', flush=True)\nraise SystemExit('4\\n5\\n6')")
    assert two_ranks({"PYTHONPATH": str(tmp_path)}) == "2 | 3 | 4 | 5 | 6"


def test_two_ranks_leave_no_process(tmp_path: Path) -> None:
    """A process of theirs would hold the pipe open for as long as it lives."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "horovod.py").write_text(
        "import subprocess\n"
        f"pipe = open({str(tmp_path / 'pipe')!r}, 'w')\n"
        "subprocess.Popen(['/bin/sleep', '100'], stdout=pipe, stderr=subprocess.DEVNULL)\n"
        "raise SystemExit('in vain')"
    )
    try:
        assert two_ranks({"PYTHONPATH": str(tmp_path)}) == "in vain"
        assert select.select([reader], [], [], 30)[0], "a process is left"
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_two_ranks_of_the_installed_one_add_up(need: Callable[[str, str], None]) -> None:
    state = horovod_installed.state()
    if state.status != "ok":
        need("horovod", f"Horovod: {state.text}; {horovod_build.HOW_TO_BUILD}")
    assert two_ranks(os.environ) == ""
    built = probe()
    assert isinstance(built, dict)
    assert built["gloo"]
