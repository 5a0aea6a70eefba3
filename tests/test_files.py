"""Locks and texts written whole, also on file systems and disks that refuse."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fastdistil import files
from fastdistil.build_horovod import locked as horovod_locked
from fastdistil.cache_teacher import cache_teacher
from fastdistil.errors import UserError
from fastdistil.node_setup import cached_corpus
from fastdistil.prepare import PrepareOptions, prepare
from fastdistil.runs import sole_user
from tests.small_run import small


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, request.param)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_work_goes_on_without_locks_and_says_so(
    without_locks: None, material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every holder of a lock: a run, prepare, a teacher's cache, a node's copy of a corpus, Horovod's wheels."""
    notes: list[str] = []
    with sole_user(tmp_path, notes.append):
        pass
    options = PrepareOptions(tokenizer=str(material / "tokenizer"), max_length=48, workers=1)
    prepare([str(material / "other.jsonl")], tmp_path / "corpus", options, lambda progress: notes.append(progress.note))
    recipe = small(material, tmp_path, "loop.updates=1", "objective.a_cos=0")
    cache_teacher(recipe, tmp_path / "cache", lambda fraction, text: notes.append(text))
    cached_corpus(tmp_path / "corpus", tmp_path / "node", 0, lambda: None, notes.append)
    assert sum("has no locks" in note and "start no other one" in note for note in notes) == 4, notes
    with horovod_locked(tmp_path / "wheels" / "lock"):
        assert "has no locks" in capfd.readouterr().out


def test_who_holds_a_lock_is_told_from_other_errors(tmp_path: Path) -> None:
    with (
        files.locked(tmp_path, "somebody is here", print),
        pytest.raises(UserError, match="somebody is here"),
        files.locked(tmp_path, "somebody is here", print),
    ):
        pass
    # What goes wrong within the block is not taken for a lock of another process.
    with pytest.raises(BlockingIOError), files.locked(tmp_path, "somebody is here", print):
        raise BlockingIOError
    with pytest.raises(FileNotFoundError), files.locked(tmp_path / "nothing", "somebody is here", print):
        pass


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    files.write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
