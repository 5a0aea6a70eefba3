"""Checkpoints against real processes that die, real full disks and flipped bits."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Never

import pytest
import torch

from fastdistil.errors import CorruptData, DiskFull, UserError
from fastdistil.training import checkpoint
from tests.small_run import saved_updates

Tensors = dict[str, dict[str, torch.Tensor]]
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def some_tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(17, 9, generator=generator), "b": torch.randn(5, generator=generator).bfloat16()},
        "optimizer": {"w.exp_avg": torch.randn(17, 9, generator=generator), "step": torch.tensor(float(seed))},
    }


def put(directory: Path, update: int, seed: int | None = None, keep: int = 9, **more: Any) -> Path:
    """Save a checkpoint whose contents follow from `seed` (default: the update)."""
    seed = update if seed is None else seed
    return checkpoint.save(directory, update, some_tensors(seed), {"seed": seed, "best": 1.5}, keep=keep, **more)


def assert_holds(loaded: checkpoint.Loaded | None, update: int, seed: int) -> None:
    assert loaded is not None
    assert loaded.update == update
    assert loaded.state == {"seed": seed, "best": 1.5}
    assert_equal(loaded.tensors, some_tensors(seed))


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for group, tensors in expected.items():
        assert actual[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert actual[group][name].dtype == tensor.dtype
            assert torch.equal(actual[group][name], tensor), (group, name)


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def never(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def test_round_trip_of_every_kind_of_tensor(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "model": {
            "transposed": base.T,
            "strided": base[:, ::2].clone()[:, ::2],
            "bf16": torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.bfloat16),
            "bytes": torch.arange(256, dtype=torch.uint8),
            "scalar": torch.tensor(2**62 + 1),
            "empty": torch.empty(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "optimizer": {"first half": (flat := torch.arange(10.0))[:5], "second half": flat[5:]},
    }
    state = {"lr": 0.1 + 0.2, "best": float("inf"), "text": "naïve\n", "list": [1, [2, None, True]], "big": 2**80}
    path = checkpoint.save(tmp_path / "a" / "b", 7, tensors, state, keep=1)
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    loaded = checkpoint.load(path)
    assert loaded.state == state
    assert loaded.update == 7
    assert loaded.tensors["model"]["bf16"].view(torch.uint8).equal(tensors["model"].pop("bf16").view(torch.uint8))
    loaded.tensors["model"].pop("bf16")
    assert_equal(loaded.tensors, {group: {n: t.detach() for n, t in named.items()} for group, named in tensors.items()})


def test_groups_that_are_not_asked_for_stay_in_their_files(tmp_path: Path) -> None:
    """Of many ranks' states one is in memory at a time; and their files have been checked all the same."""
    tensors = {name: {"x": torch.full((2,), float(number))} for number, name in enumerate(("model", "rank-0", "rank-1"))}
    path = checkpoint.save(tmp_path, 1, tensors, {}, keep=1)
    for loaded in (checkpoint.load(path, groups=("model",)), checkpoint.latest(tmp_path, never, groups=("model",))):
        assert loaded is not None
        assert loaded.tensors.keys() == {"model"}
        for name in tensors:
            assert_equal({name: loaded.read(name)}, {name: tensors[name]})
    flip(path / "rank-1.safetensors", -1)
    with pytest.raises(CorruptData, match=r"rank-1\.safetensors"):
        checkpoint.load(path, groups=("model",))


def test_tied_tensors_are_refused_by_name(tmp_path: Path) -> None:
    weight = torch.zeros(4, 4)
    for other in (weight, weight.view(16), weight[1:2]):
        with pytest.raises(UserError, match=r"model\.safetensors: .*(head|embedding) and (head|embedding) share memory"):
            checkpoint.save(tmp_path, 1, {"model": {"embedding": weight, "head": other}}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_rotation_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for update in (10, 20, 30, 40):
        put(tmp_path, update, keep=2, protect=frozenset({10}))
    assert saved_updates(tmp_path) == [10, 30, 40]
    put(tmp_path, 50, keep=1)
    assert saved_updates(tmp_path) == [50]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000050"]


def test_rotation_after_going_back_keeps_what_was_just_written(tmp_path: Path) -> None:
    for update in (10, 20, 30):
        put(tmp_path, update)
    put(tmp_path, 15, keep=1)
    assert saved_updates(tmp_path) == [15, 20, 30]


def test_old_ones_are_removed_only_after_the_new_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    listings = []

    def rotate(directory: Path, *arguments: Any) -> None:
        listings.append(sorted(path.name for path in directory.iterdir()))
        assert_holds(checkpoint.load(directory / "step-00000002"), 2, 2)
        original(directory, *arguments)

    original = checkpoint._rotate
    monkeypatch.setattr(checkpoint, "_rotate", rotate)
    put(tmp_path, 2, keep=1)
    assert listings == [["step-00000001", "step-00000002"]]
    assert saved_updates(tmp_path) == [2]


def test_saving_again_is_a_no_op_if_identical_and_replaces_if_not(tmp_path: Path) -> None:
    path = put(tmp_path, 5)
    before = (path / "model.safetensors").stat().st_ino
    put(tmp_path, 5)
    assert (path / "model.safetensors").stat().st_ino == before
    put(tmp_path, 5, seed=99)
    assert_holds(checkpoint.latest(tmp_path, never), 5, 99)
    flip(path / "model.safetensors", -1)
    put(tmp_path, 5, seed=99)
    assert_holds(checkpoint.latest(tmp_path, never), 5, 99)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


# --- damage ---


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_flipped_bit_in_any_file_is_named(tmp_path: Path, name: str, where: float) -> None:
    path = put(tmp_path, 3)
    size = (path / name).stat().st_size
    flip(path / name, min(int(where * size), size - 1), bit=2)
    with pytest.raises(CorruptData, match=name) as caught:
        checkpoint.load(path)
    assert caught.value.exit_code == 14
    if name != "manifest.json":
        expected = json.loads((path / "manifest.json").read_text())["files"][name]["sha256"]
        digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
        assert f"expected sha256 {expected}, found {digest}" in str(caught.value)


def test_any_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    path = put(tmp_path, 3)
    for offset in range(0, (path / "manifest.json").stat().st_size, 3):
        flip(path / "manifest.json", offset, offset % 8)
        with pytest.raises(CorruptData, match=r"manifest\.json"):
            checkpoint.load(path)
        flip(path / "manifest.json", offset, offset % 8)
    assert_holds(checkpoint.load(path), 3, 3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "longer", "missing", "empty"])
def test_a_file_of_another_length_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = put(tmp_path, 3)
    content = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes({"truncated": content[:-1], "longer": content + b"x", "empty": b""}[damage])
    with pytest.raises(CorruptData, match=name) as caught:
        checkpoint.load(path)
    if damage in ("truncated", "longer") and name != "manifest.json":
        size = len(content) + (1 if damage == "longer" else -1)
        assert f"expected {len(content)} bytes, found {size}" in str(caught.value)


def test_latest_falls_back_and_says_so(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere", never) is None
    assert checkpoint.latest(tmp_path, never) is None
    for update in (1, 2, 3):
        put(tmp_path, update)
    flip(tmp_path / "step-00000003" / "optimizer.safetensors", 100)
    (tmp_path / "step-00000002" / "state.json").unlink()
    warnings: list[str] = []
    assert_holds(checkpoint.latest(tmp_path, warnings.append), 1, 1)
    assert len(warnings) == 2
    assert "step-00000003/optimizer.safetensors" in warnings[0]
    assert "step-00000002/state.json" in warnings[1]
    flip(tmp_path / "step-00000001" / "manifest.json", 30)
    with pytest.raises(CorruptData, match="all 3 checkpoints"):
        checkpoint.latest(tmp_path, warnings.append)


def test_latest_does_not_trust_a_name(tmp_path: Path) -> None:
    put(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-00000012").write_text("a file")
    warnings: list[str] = []
    assert_holds(checkpoint.latest(tmp_path, warnings.append), 1, 1)
    assert ["00010" in warnings[0], "holds update 1" in warnings[1]] == [True, True]


def test_a_checkpoint_of_a_newer_format_is_for_a_newer_version(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptData, match=r"manifest\.json"):
        checkpoint.load(path)
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"format 2.*reads up to 1.*upgrade"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "step-00000002")


# --- processes that die ---


def killed_at(point: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child process that kills itself at its `point`-th change of the file system; False if it finished."""
    child = os.fork()
    if child == 0:
        count = 0

        def plant(function: Callable[..., Any], halfway: Callable[..., Any] | None = None) -> Callable[..., Any]:
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


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- disks that refuse ---


def test_a_disk_that_gives_back_other_bytes_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False)
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
def test_a_disk_that_fills_up_in_the_middle(small_disk: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
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
def test_refusals_at_any_call_harm_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
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
    for error, raised in ((OSError(errno.ENOSPC, "full"), DiskFull), (KeyboardInterrupt(), KeyboardInterrupt)):
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
