"""Locks and texts written whole, also on file systems and disks that refuse."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil import storage
from fastdistil.data import range_reader
from fastdistil.data.local_copy import cached_corpus
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.errors import CorruptData, UserError
from fastdistil.install.horovod_build import locked as horovod_locked
from fastdistil.runs import sole_user
from fastdistil.training.cache_teacher import cache_teacher
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
        storage.locked(tmp_path, "somebody is here", print),
        pytest.raises(UserError, match="somebody is here"),
        storage.locked(tmp_path, "somebody is here", print),
    ):
        pass
    # What goes wrong within the block is not taken for a lock of another process.
    with pytest.raises(BlockingIOError), storage.locked(tmp_path, "somebody is here", print):
        raise BlockingIOError
    with pytest.raises(FileNotFoundError), storage.locked(tmp_path / "nothing", "somebody is here", print):
        pass


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    storage.write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            storage.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


RECORD = np.dtype([("index", np.uint16, (3,)), ("tail", np.float32)])
HEADER_BYTES = 7


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, npt.NDArray[np.void]]:
    """A file of 1,000 records of 10 bytes behind a header, and the records."""
    bits = np.random.default_rng(1).integers(0, 256, 1000 * RECORD.itemsize, np.uint8)
    path = tmp_path_factory.mktemp("records") / "records.bin"
    path.write_bytes(b"-" * HEADER_BYTES + bits.tobytes())
    return path, bits.view(RECORD)


@given(pairs=st.lists(st.tuples(st.integers(0, 990), st.integers(0, 10)), max_size=20))
def test_ranges_are_read_end_to_end(records: tuple[Path, npt.NDArray[np.void]], pairs: list[tuple[int, int]]) -> None:
    path, items = records
    starts, lengths = np.array(pairs, np.int64).reshape(-1, 2).T
    expected = b"".join(items[start : start + length].tobytes() for start, length in pairs)
    assert range_reader.RangeReader(path, RECORD, HEADER_BYTES).read(starts, lengths).tobytes() == expected


def test_a_file_that_ends_within_an_item_is_refused(records: tuple[Path, npt.NDArray[np.void]]) -> None:
    with pytest.raises(ValueError, match="10007 bytes are no whole number of items of 10 bytes"):
        range_reader.RangeReader(records[0], RECORD)


@pytest.mark.parametrize("by", [1, 9_000])
def test_a_file_that_is_cut_within_one_read_is_an_error_with_its_name(
    by: int, records: tuple[Path, npt.NDArray[np.void]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By less than a page, or by pages; the part that was read before the cut is not given out."""
    path = tmp_path / "records.bin"
    path.write_bytes(records[0].read_bytes())
    reader = range_reader.RangeReader(path, RECORD, HEADER_BYTES)
    real, calls = os.preadv, []

    def cut_after_the_first_range(descriptor: int, buffers: list[memoryview], position: int) -> int:
        calls.append(position)
        received = real(descriptor, buffers, position)
        if len(calls) == 1:
            os.truncate(path, path.stat().st_size - by)
        return received

    monkeypatch.setattr(os, "preadv", cut_after_the_first_range)
    with pytest.raises(CorruptData, match=f"{path} was shortened while it was in use: 10007 bytes .*, now {10007 - by};"):
        reader.read(np.array([0, 990]), np.array([10, 10]))
    assert calls[:2] == [HEADER_BYTES, HEADER_BYTES + 9900]


def test_reads_that_the_system_makes_in_parts_are_put_together(
    records: tuple[Path, npt.NDArray[np.void]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives 2 GiB at most; here 3 bytes."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, position: real(descriptor, [buffers[0][:3]], position))
    path, items = records
    read = range_reader.RangeReader(path, RECORD, HEADER_BYTES).read(np.array([5]), np.array([90]))
    assert read.tobytes() == items[5:95].tobytes()
