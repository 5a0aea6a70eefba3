"""Checkpoints: what is saved comes back, old ones go, and damage is named."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.errors import CorruptData, UserError
from fastdistil.training import checkpoint
from tests.small_run import saved_updates
from tests.training.checkpoints import FILES, assert_equal, assert_holds, flip, never, put


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
    state = {
        "lr": 0.1 + 0.2,
        "best": float("inf"),
        "text": "naïve\n",
        "list": [1, [2, None, True]],
        "big": 2**80,
    }
    path = checkpoint.save(tmp_path / "a" / "b", 7, tensors, state, keep=1)
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    loaded = checkpoint.load(path)
    assert loaded.state == state
    assert loaded.update == 7
    assert loaded.tensors["model"]["bf16"].view(torch.uint8).equal(tensors["model"].pop("bf16").view(torch.uint8))
    loaded.tensors["model"].pop("bf16")
    assert_equal(
        loaded.tensors,
        {group: {n: t.detach() for n, t in named.items()} for group, named in tensors.items()},
    )


def test_groups_that_are_not_asked_for_stay_in_their_files(tmp_path: Path) -> None:
    """Of many ranks' states one is in memory at a time; and their files have been checked all the same."""
    tensors = {name: {"x": torch.full((2,), float(number))} for number, name in enumerate(("model", "rank-0", "rank-1"))}
    path = checkpoint.save(tmp_path, 1, tensors, {}, keep=1)
    for loaded in (
        checkpoint.load(path, groups=("model",)),
        checkpoint.latest(tmp_path, never, groups=("model",)),
    ):
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
        with pytest.raises(
            UserError,
            match=r"model\.safetensors: .*(head|embedding) and (head|embedding) share memory",
        ):
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


def test_old_ones_are_removed_only_after_the_new_one_has_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    manifest["sha256"] = hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode(),
    ).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"format 2.*reads up to 1.*upgrade"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "step-00000002")
