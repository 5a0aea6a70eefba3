"""The run directory when its start fails or its recipe is lost, and what a continued run must agree with."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdistil import cli, distil, train
from fastdistil.data.sources import CorpusSource
from fastdistil.errors import CorruptData, DiskFull, Stopped, UserError
from fastdistil.runs import choose_run, create_run, stored_recipe
from fastdistil.training import checkpoint, teacher_identity
from fastdistil.training.cache_teacher import cache_teacher
from tests.small_run import TinyModel, quiet, small, stop_after

SHORT = ("loop.updates=2", "evaluation.every=null", "data.heldout=null")


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_start_blocks_no_later_one(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(material, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(DiskFull):
            create_run(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()
    # What a killed start leaves, or one of an earlier version on a full disk.
    for name, content in (("recipe.yaml.7.tmp", "half of"), ("recipe.yaml", ""), ("recipe.yaml", "\0\0\0")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(content)
        for resume in (None, "auto"):
            assert choose_run(recipe, "distilbert", resume) == (tmp_path / "run", False)
    create_run(tmp_path / "run", recipe)
    assert stored_recipe(tmp_path / "run") == recipe
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    for resume in (None, "auto"):  # an unnamed run is not looked for in what holds none
        (tmp_path / "mine-1").mkdir(exist_ok=True)
        assert choose_run(recipe.with_(name=None), "mine", resume) == (tmp_path / "mine-2", False)
    with pytest.raises(UserError, match="exists"):
        create_run(tmp_path / "run", recipe)


@pytest.mark.parametrize("content", [None, "", "\0" * 80], ids=["missing", "empty", "zeros"])
def test_a_lost_recipe_is_the_checkpoints(
    content: str | None, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(material, tmp_path, *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stop_after(1))
        with pytest.raises(Stopped):
            quiet(recipe)
    path = tmp_path / "run" / "recipe.yaml"
    before = path.read_text()
    if content is None:
        path.unlink()
        assert quiet(recipe, resume="auto").updates == 2
    else:  # as the run that stopped advised
        path.write_text(content)
        monkeypatch.setattr(sys, "argv", ["fastdistil", "train", str(path), "--resume", str(path.parent)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
    assert path.read_text() == before


def test_a_recipe_that_no_checkpoint_holds_is_asked_for(material: Path, tmp_path: Path) -> None:
    recipe = small(material, tmp_path)
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"model": {"a": torch.zeros(1)}}, {}, keep=1)
    with pytest.raises(UserError, match=r"run/recipe\.yaml is lost, and .* no copy"):
        quiet(recipe, resume="auto")


def changed(teacher: Path, name: str, value: float) -> None:
    file = teacher / "model.safetensors"
    stamp = file.stat()
    tensors = load_file(file)
    tensors[name].view(-1)[0] += value
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + int(value != 0)))


def copied_teacher(material: Path, place: Path) -> Path:
    for file in (material / "teacher").iterdir():
        place.mkdir(exist_ok=True)
        (place / file.name).write_bytes(file.read_bytes())
    return place


def test_another_teacher_of_the_same_shapes_is_refused(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of thousands differs, or a number of the configuration. The same teacher again, copied, is the same."""
    teacher = copied_teacher(material, tmp_path / "teacher")
    recipe = small(material, tmp_path, *SHORT, f"teacher.path={teacher}")
    quiet(recipe)
    hashed: list[str] = []
    fingerprint = teacher_identity.teacher_fingerprint
    monkeypatch.setattr(teacher_identity, "teacher_fingerprint", lambda *of: (hashed.append(of[0]), fingerprint(*of))[1])
    quiet(recipe, resume="auto")
    assert not hashed  # its files are as they were
    os.utime(teacher / "model.safetensors", ns=(1, 1))
    quiet(recipe, resume="auto")
    assert hashed == [str(teacher)]
    changed(teacher, "bert.encoder.layer.1.output.dense.bias", 1.0)
    with pytest.raises(UserError, match=rf"another teacher than the one at teacher\.path={teacher}"):
        quiet(recipe, resume="auto")
    changed(teacher, "bert.encoder.layer.1.output.dense.bias", -1.0)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    with pytest.raises(UserError, match="another teacher"):
        quiet(recipe, resume="auto")


def test_files_that_no_model_is_read_from_make_no_other_teacher(material: Path, tmp_path: Path) -> None:
    teacher = copied_teacher(material, tmp_path / "teacher")
    recipe = small(material, tmp_path, *SHORT, f"teacher.path={teacher}")
    quiet(recipe)
    for name in ("training_args.bin", "optimizer.bin", "adapter.safetensors"):
        (teacher / name).write_bytes(b"of a trainer")
    quiet(recipe, resume="auto")


def test_ranks_that_restore_a_recipe_together_do_not_meet(material: Path, tmp_path: Path) -> None:
    """Each rank of torchrun runs the command, and all write the same text."""
    run = quiet(small(material, tmp_path, *SHORT)).run_dir
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").unlink()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom fastdistil.storage import write_atomically\n"
        "pids = [os.fork() for _ in range(3)]\n"
        "for _ in range(200): write_atomically(Path(sys.argv[1]), sys.argv[2])\n"
        "0 in pids and os._exit(0)\n"
        "sys.exit(any(os.waitpid(pid, 0)[1] for pid in pids))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run / "recipe.yaml"), text], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (run / "recipe.yaml").read_text() == text
    assert [path.name for path in run.glob("*.tmp")] == []


@pytest.mark.parametrize(("key", "value"), [("recipe", 7), ("teacher", {"fingerprint": 3}), ("teacher", [])])
def test_a_state_of_other_types_is_refused(key: str, value: object, material: Path, tmp_path: Path) -> None:
    recipe = small(material, tmp_path, *SHORT)
    folder = quiet(recipe).run_dir / "checkpoints" / "step-00000002"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, key: value}))
    checkpoint._write_manifest(folder, 2, sorted(path.name for path in folder.iterdir() if path.name != "manifest.json"))
    with pytest.raises(CorruptData, match=key):
        quiet(recipe, resume="auto")
    (folder.parents[1] / "recipe.yaml").unlink()
    with pytest.raises((CorruptData, UserError)):
        quiet(recipe, resume="auto")


def test_another_teacher_from_python_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 10))
    batches = [{"input_ids": ids, "labels": ids}] * 4
    teacher, other = TinyModel(50, 16), TinyModel(50, 16)

    def run(teacher: TinyModel, resume: str | None) -> None:
        distil(
            "distilbert",
            teacher=teacher,
            student=TinyModel(50, 16),
            corpus=batches,
            loop={"updates": 2, "precision": "fp32"},
            runs_dir=str(tmp_path),
            name="run",
            device="cpu",
            resume=resume,
        )

    run(teacher, None)
    run(teacher, "auto")
    with pytest.raises(UserError, match="another teacher than this one"):
        run(other, "auto")


def test_a_checkpoint_that_names_no_teacher_goes_on_with_a_note(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small(material, tmp_path, *SHORT)
    quiet(recipe)
    loaded = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000002")
    state = {key: value for key, value in loaded.state.items() if key not in ("teacher", "recipe")}
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, loaded.tensors, state, keep=1)
    train.train(recipe, resume="auto")
    assert "does not say which teacher" in capsys.readouterr().out


def shortened(path: Path, by: int) -> None:
    """As a copy or a clean-up of somebody else's does it: in place, so that who has opened the file sees it."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - by)


@pytest.mark.parametrize("by", [2, 10_000])
@pytest.mark.parametrize("target", ["corpus", "cache"])
def test_a_shard_that_is_shortened_in_use_is_told(
    target: str, by: int, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a token, or by pages: in a memory map the one would read as zeros, and the other end this process."""
    place = tmp_path / "train"
    shutil.copytree(material / "train", place)
    overrides = [*SHORT, f"data.train={place}", "objective.a_cos=0"]
    if target == "cache":
        cache_teacher(small(material, tmp_path, *overrides), tmp_path / "cache")
        overrides.append(f"teacher.cache={tmp_path / 'cache'}")
    shard = place / "tokens-00000.bin" if target == "corpus" else tmp_path / "cache" / "0-00000.npy"
    undamaged = shard.read_bytes()
    real = CorpusSource.windows

    @contextmanager
    def one_window_then_shortened(self: CorpusSource, first: int, end: int) -> Iterator[Any]:
        def all_windows() -> Iterator[Any]:
            with real(self, first, first + 1) as windows:
                yield from windows
            shortened(shard, by)
            with real(self, first + 1, end) as windows:
                yield from windows

        yield all_windows()

    recipe = small(material, tmp_path, *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(CorpusSource, "windows", one_window_then_shortened)
        message = rf"{shard} was shortened while it was in use: \d+ bytes .* saved after update 1, continue with"
        with pytest.raises(CorruptData, match=message):
            quiet(recipe)
    shard.write_bytes(undamaged)
    assert quiet(recipe, resume="auto").updates == 2
