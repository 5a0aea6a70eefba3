"""The stand-ins of stand_ins.py as fixtures, and a recipe in a file."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.stand_ins import FAKE_SSH, Ranks


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    # A launcher that is killed leaves its directory of logs; not outside of this test's.
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    stand_in = Ranks(tmp_path)
    stand_in.plan()
    yield stand_in
    for pid in stand_in.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for ssh in use; the folder holds `hosts`, who was called, and may hold `down-HOST`."""
    folder = tmp_path / "ssh"
    folder.mkdir()
    program = folder / "ssh"
    program.write_text(FAKE_SSH)
    program.chmod(0o755)
    monkeypatch.setenv("FASTDISTIL_SSH", str(program))
    monkeypatch.setenv("SSH_FOLDER", str(folder))
    return folder


@pytest.fixture
def recipe_text(tmp_path: Path) -> Path:
    path = tmp_path / "Mine.yaml"
    path.write_text("# mine\nteacher: {path: bert-base-uncased}\n\nstudent: {every: 2}\nloop: {epochs: 1}\n")
    return path
