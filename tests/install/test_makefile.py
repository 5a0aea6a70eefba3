"""The Makefile's set-up, with a stand-in for Python that makes empty environments and notes what pip is asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo "$*" >> "$PIP_LOG" ;;
    PLANT
    *) exec REAL "$@" ;;
esac
"""


class Checkout:
    """A folder with what `make setup` reads, and the stand-in as `python`."""

    def __init__(self, folder: Path, plant: str = "") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        self.python, self.log = folder.parent / "python", folder.parent / "pip.log"
        self.python.write_text(PYTHON.replace("REAL", sys.executable).replace("PLANT", plant))
        self.python.chmod(0o755)

    def make(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
        command = ["make", "--no-print-directory", f"PYTHON={self.python}", *arguments]
        environ["PIP_LOG"] = str(self.log)
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=60, check=False)

    def installs(self) -> list[str]:
        """What pip was asked for since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def test_a_second_call_finds_everything_there(checkout: Checkout) -> None:
    first = checkout.make("setup")
    assert first.returncode == 0, first.stderr
    assert "making .venv with" in first.stdout and len(checkout.installs()) == 2
    again = checkout.make("setup")
    assert (again.returncode, again.stdout) == (0, "fastdistil: .venv is ready\n")
    assert checkout.installs() == []


def test_changed_requirements_are_installed_in_place(checkout: Checkout) -> None:
    checkout.make("setup")
    (checkout.folder / ".venv" / "mark").touch()
    checkout.installs()
    os.utime(checkout.folder / "constraints.txt", (2**31, 2**31))
    done = checkout.make("setup")
    assert "the requirements changed; updating .venv" in done.stdout and len(checkout.installs()) == 2
    assert (checkout.folder / ".venv" / "mark").exists()


@pytest.mark.parametrize("trouble", ["moved", "half made", "no interpreter"])
def test_an_environment_not_to_be_trusted_is_made_anew(trouble: str, checkout: Checkout) -> None:
    checkout.make("setup")
    (checkout.folder / ".venv" / "mark").touch()
    match trouble:
        case "moved":
            checkout.folder = checkout.folder.rename(checkout.folder.with_name("elsewhere"))
        case "half made":
            (checkout.folder / ".venv" / ".complete").unlink()
        case "no interpreter":
            (checkout.folder / ".venv" / "bin" / "python").unlink()
    done = checkout.make("setup")
    assert done.returncode == 0, done.stderr
    assert ".venv is incomplete or was made elsewhere; making it anew" in done.stdout
    assert not (checkout.folder / ".venv" / "mark").exists()


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("*version_info*'<'*) exit 1 ;;", "wanted Python 3.11 or newer"),
        ("*ensurepip*) exit 1 ;;", "cannot make virtual environments; install that part of it"),
    ],
)
def test_a_python_that_will_not_do_is_one_line(plant: str, says: str, tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "checkout", plant)
    done = checkout.make("setup")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert says in line and str(checkout.python) in line
    assert not (checkout.folder / ".venv").exists() and checkout.installs() == []


def test_no_python_is_one_line(checkout: Checkout) -> None:
    done = checkout.make("setup", "PYTHON=no-such-python")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert "looked for: no-such-python; found: none; install one, or name yours" in line


def test_another_index_is_given_to_pip(checkout: Checkout) -> None:
    checkout.make("setup", "TORCH_INDEX=https://host/cpu")
    installs = checkout.installs()
    assert len(installs) == 2
    assert all("-c constraints.txt --extra-index-url https://host/cpu" in line for line in installs)


def test_clean_keeps_runs(checkout: Checkout) -> None:
    checkout.make("setup")
    (checkout.folder / "runs" / "demo-1").mkdir(parents=True)
    done = checkout.make("clean")
    assert not (checkout.folder / ".venv").exists() and (checkout.folder / "runs" / "demo-1").is_dir(), done.stderr
