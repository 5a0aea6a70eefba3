"""Checkpoints on disks that lie, are full, refuse, or hold other things in the way."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Never

import pytest
import torch

from fastdistil.errors import CorruptData, DiskFull, UserError
from fastdistil.training import checkpoint
from tests.small_run import saved_updates
from tests.training.checkpoints import assert_holds, flip, never, put, snapshot


def test_a_disk_that_gives_back_other_bytes_is_caught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(tmp_path, 1)
    before = snapshot(tmp_path)

    def lying_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "optimizer.safetensors":
            flip(path, -1)

    monkeypatch.setattr(os, "fsync", lying_fsync)
    with pytest.raises(CorruptData, match=r"optimizer\.safetensors"):
        put(tmp_path, 2, keep=1)
    assert snapshot(tmp_path) == before


def test_unreadable_sectors_count_as_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)

    def broken(path: Path) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    original = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", broken)
    warnings: list[str] = []
    assert_holds(checkpoint.latest(tmp_path, warnings.append), 1, 1)
    assert "cannot be read" in warnings[0]


@pytest.fixture
def small_disk(tmp_path: Path, need: Callable[[str, str], Never]) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        need("root-network", "mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_foreseen(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    put(directory, 1)
    before = snapshot(small_disk)
    with pytest.raises(DiskFull, match=r"needs 4\.0 MB in .*, 0\.2 MB are free") as caught:
        checkpoint.save(directory, 2, {"model": {"w": torch.zeros(1_000_000)}}, {}, keep=1)
    assert caught.value.exit_code == 13
    assert snapshot(small_disk) == before
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("full", ["tensors", "state"])
def test_a_disk_that_fills_up_in_the_middle(
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: str,
) -> None:
    directory = small_disk / "checkpoints"
    put(directory, 1)
    before = snapshot(small_disk)
    monkeypatch.setattr(checkpoint, "_check_space", lambda *_: None)
    tensors, state = ({"w": torch.zeros(1_000_000)}, {}) if full == "tensors" else ({}, {"text": "x" * 1_000_000})
    with pytest.raises(DiskFull, match=r"full while writing .*step-00000002"):
        checkpoint.save(directory, 2, {"model": tensors}, state, keep=1)
    assert snapshot(small_disk) == before
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_refusals_at_any_call_harm_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
) -> None:
    put(tmp_path, 1, seed=1)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:

        def refuse(place: object, *_: object) -> None:
            if isinstance(place, int) or ".tmp-" in str(place):
                raise OSError(code, os.strerror(code), str(place))
            original(place, *_)

        original = getattr(os, call)
        patch.setattr(os, call, refuse)
        for update in (1, 2):  # a replacement and a new one
            with pytest.raises(DiskFull):
                put(tmp_path, update, seed=5)
            assert snapshot(tmp_path) == before
            assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_files_in_the_way_are_errors_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for directory in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(UserError, match=r"wanted a directory at .*/file.*, found a file; move it"):
            put(directory, 1)
    (tmp_path / "step-00000001").write_text("precious")
    with pytest.raises(UserError, match=r"wanted a directory at .*step-00000001, found a file"):
        put(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "step-00000001"]
    assert (tmp_path / "step-00000001").read_text() == "precious"


def test_a_read_only_place_is_an_error_of_one_line(tmp_path: Path, need: Callable[[str, str], Never]) -> None:
    place = tmp_path / "disk"
    put(place, 1)
    if os.geteuid() == 0:  # whom permissions do not bind
        bound = subprocess.run(["mount", "--bind", str(place), str(place)], capture_output=True, check=False)
        if bound.returncode:
            need("root-network", "root may not mount here")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
    else:
        place.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"no permission while writing .*step-00000002"):
            put(place, 2)
        assert_holds(checkpoint.latest(place, never), 1, 1)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(place)], check=True)
        else:
            place.chmod(0o700)


def test_symbolic_links_are_replaced_not_followed(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", 1)
    before = snapshot(tmp_path / "elsewhere")
    runs = tmp_path / "checkpoints"
    runs.mkdir()
    (runs / "step-00000001").symlink_to(elsewhere)
    assert_holds(checkpoint.latest(runs, never), 1, 1)
    put(runs, 1, seed=7)
    assert not (runs / "step-00000001").is_symlink()
    (runs / "step-00000002").symlink_to(elsewhere)
    (runs / "step-00000003").symlink_to(tmp_path / "dangling")
    put(runs, 3)
    put(runs, 4, keep=1)
    assert [path.name for path in runs.iterdir()] == ["step-00000004"]
    assert snapshot(tmp_path / "elsewhere") == before
    (tmp_path / "link").symlink_to(runs)
    put(tmp_path / "link", 5)
    assert saved_updates(runs) == [4, 5]
