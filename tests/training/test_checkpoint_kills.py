"""Checkpoints and directories in one piece, written by real processes that die anywhere."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistil.errors import DiskFull
from fastdistil.training import checkpoint
from tests.training.checkpoints import FILES, assert_holds, never, put, snapshot


def killed_at(point: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child process that kills itself at its `point`-th change of the file system; False if it finished."""
    child = os.fork()
    if child == 0:
        count = 0

        def plant(
            function: Callable[..., Any],
            halfway: Callable[..., Any] | None = None,
        ) -> Callable[..., Any]:
            def planted(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == point:
                    if halfway is not None:
                        halfway(*arguments)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return planted

        def half_a_file(_: Any, path: Path) -> None:
            path.write_bytes(b"\x58" * 100)

        for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, plant(getattr(os, name)))
        checkpoint.save_file = plant(checkpoint.save_file, half_a_file)
        try:
            action()
            os._exit(0)
        finally:  # a child that fell out of the test would run the rest of the suite
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_anywhere_in_a_save_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    held = set()
    point = 0
    died = True
    while died:
        point += 1
        directory = tmp_path / str(point)
        put(directory, 1)
        put(directory, 2)
        died = killed_at(point, lambda directory=directory: put(directory, 3, keep=2))
        loaded = checkpoint.latest(directory, never)
        assert loaded is not None
        held.add(loaded.update)
        assert_holds(loaded, loaded.update, loaded.update)
        for path in directory.glob("step-*"):
            checkpoint.load(path)  # whatever has a name is whole, those being removed too
        put(directory, 4, keep=2)
        assert_holds(checkpoint.latest(directory, never), 4, 4)
        assert max(path.name for path in directory.iterdir()) == "step-00000004"
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    assert held == {2, 3}
    assert point > 12  # otherwise the calls went by another road and nothing was killed


def test_killed_anywhere_in_a_replacement_one_of_the_two_is_there(tmp_path: Path) -> None:
    held = set()
    point = 0
    died = True
    while died:
        point += 1
        directory = tmp_path / str(point)
        put(directory, 3, seed=30)
        died = killed_at(point, lambda directory=directory: put(directory, 3, seed=31))
        loaded = checkpoint.latest(directory, never)
        assert loaded is not None
        held.add(loaded.state["seed"])
        assert_holds(loaded, 3, loaded.state["seed"])
        put(directory, 4)
        assert [path.name for path in sorted(directory.iterdir())] == ["step-00000003", "step-00000004"]
        assert_holds(checkpoint.load(directory / "step-00000003"), 3, loaded.state["seed"])
    assert held == {30, 31}


def test_leftovers_of_living_processes_stay(tmp_path: Path) -> None:
    living = subprocess.Popen(["sleep", "60"])
    try:
        dead = subprocess.Popen(["true"])
        dead.wait()
        names = {pid: f".step-00000001.tmp-{pid}" for pid in (living.pid, dead.pid, os.getpid())}
        for name in (*names.values(), f".other.tmp-{dead.pid}", "notes"):
            (tmp_path / name).mkdir()
        put(tmp_path, 2)
        assert {path.name for path in tmp_path.iterdir()} == {
            "step-00000002", names[living.pid], f".other.tmp-{dead.pid}", "notes"
        }  # fmt: skip
    finally:
        living.kill()
        living.wait()


def test_everything_is_on_disk_before_it_gets_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def watched_rename(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(("rename", Path(target).name))

    put(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    put(tmp_path, 2, keep=1)
    hidden = f".step-00000002.tmp-{os.getpid()}"
    named = calls.index(("rename", "step-00000002"))
    assert {name for _, name in calls[:named]} == {*FILES, hidden}
    assert calls[named - 1] == ("fsync", hidden)
    assert calls[named + 1] == ("fsync", tmp_path.name)
    assert calls[named + 2] == ("rename", f".step-00000001.tmp-{os.getpid()}")  # only now does the old one go


# --- directories in one piece ---


def test_atomic_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "run" / "student"
    for text in ("first", "second"):
        with checkpoint.atomic_directory(target) as temporary:
            assert list(temporary.iterdir()) == []
            (temporary / "deep").mkdir()
            (temporary / "deep" / "file").write_text(text)
        assert (target / "deep" / "file").read_text() == text
        assert [path.name for path in target.parent.iterdir()] == ["student"]


def export_and_fail(target: Path, error: BaseException) -> None:
    with checkpoint.atomic_directory(target) as temporary:
        (temporary / "file").write_text("second")
        raise error


def test_atomic_directory_leaves_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "student"
    with checkpoint.atomic_directory(target) as temporary:
        (temporary / "file").write_text("first")
    for error, raised in (
        (OSError(errno.ENOSPC, "full"), DiskFull),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(raised):
            export_and_fail(target, error)
    assert snapshot(tmp_path).keys() == {"student/file"}
    assert (target / "file").read_text() == "first"


def test_atomic_directory_killed_anywhere(tmp_path: Path) -> None:
    target = tmp_path / "student"

    def export(text: str) -> None:
        with checkpoint.atomic_directory(target) as temporary:
            (temporary / "file").write_text(text)

    export("first")
    point = 0
    died = True
    held = set()
    while died:
        point += 1
        died = killed_at(point, lambda: export("second"))
        with checkpoint.atomic_directory(tmp_path / "student") as temporary:
            held.add((target / "file").read_text())
            (temporary / "file").write_text("first")
        assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert held == {"first", "second"}
