"""Checkpoints that survive kill -9, full disks and flipped bits: safetensors + JSON, no pickle.

    checkpoints/step-00000123/
        model.safetensors  optimizer.safetensors  ...   one file per group of tensors
        state.json                                       numbers and strings, e.g. the tokens seen and the best loss
        manifest.json                                    format, update, and sha256 + bytes of every other file

A checkpoint is written under a hidden name beside its own, every file and directory fsynced, read back from the disk against
its checksums, and only then renamed; older ones are removed after that. So a name `step-*` always stands for a whole
checkpoint, whenever the process dies. What is traded: each save reads what it wrote once more.
"""

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from fastdistil.errors import CorruptData, DiskFull, UserError, translated
from fastdistil.storage import canonical, file_sha256, sync, sync_tree, text_sha256
from fastdistil.untrusted import FileFacts, PlainName, Sealed, Sha256, Whole, check, read_json, reason

FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Manifest(TypedDict):
    """manifest.json; `sha256` is of all else in it."""

    format: Whole
    update: Whole
    files: dict[PlainName, FileFacts]
    sha256: Sha256


class Deferred(NamedTuple):
    """A group that is made only when it is written, so that not all need to be in memory together."""

    nbytes: int
    make: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Loaded:
    update: int
    tensors: dict[str, dict[str, Tensor]]
    """Group ("model", "optimizer", ...) -> name -> tensor, on the device that was asked for."""
    state: dict[str, Any]
    path: Path

    def read(self, group: str) -> dict[str, Tensor]:
        """One that was not loaded, on the CPU. Its file has been checked."""
        return _tensors(self.path / f"{group}.safetensors", "cpu")


def save(
    directory: Path,
    update: int,
    tensors: Mapping[str, Mapping[str, Tensor] | Deferred],
    state: Mapping[str, Any],
    *,
    keep: int,
    protect: frozenset[int] = frozenset(),
) -> Path:
    """Write the checkpoint of `update` and then remove all but the newest `keep` up to it, except those in `protect`.

    An identical checkpoint of the same update is left as it is; a different one is replaced. Checkpoints of later updates
    (left from before a resume from an earlier one) are neither counted nor removed. Raises DiskFull, UserError (no
    permission, a file in the way, two names for one memory) or CorruptData (the disk gives back other bytes than it took);
    then every older checkpoint is as it was and nothing of the new one is left.
    """
    if keep < 1:
        raise UserError(f"wanted keep of at least 1 checkpoint, got {keep}")
    target = directory / f"step-{update:08d}"
    with _writing(target):
        directory.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(directory)
        groups = {
            f"{name}.safetensors": group if isinstance(group, Deferred) else _storable(f"{name}.safetensors", group)
            for name, group in tensors.items()
        }
        text = json.dumps(state, indent=1)  # NaN and Infinity included: Python reads them back
        _check_space(directory, len(text) + sum(_stored_bytes(group) for group in groups.values()))
        with suppress(_AlreadyThere), atomic_directory(target) as temporary:
            for name, group in groups.items():
                save_file(_storable(name, group.make()) if isinstance(group, Deferred) else group, temporary / name)
            (temporary / _STATE).write_text(text, encoding="utf-8")
            _write_manifest(temporary, update, [*groups, _STATE])
            if _same(temporary, target):
                raise _AlreadyThere
        _rotate(directory, update, keep, protect)
    return target


def load(path: Path, device: str | torch.device = "cpu", groups: Collection[str] | None = None) -> Loaded:
    """Read a checkpoint after checking every file against the manifest. `groups`: those to load; None: all.

    Raises UserError if there is none at `path` or a newer fastdistil wrote it, CorruptData if a file is missing or changed.
    """
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}; give a directory such as checkpoints/step-00000500 of a run")
    manifest = _verified(path)
    names = {name.removesuffix(".safetensors"): name for name in manifest["files"] if name.endswith(".safetensors")}
    chosen = names if groups is None else {group: names[group] for group in names if group in groups}
    tensors = {group: _tensors(path / name, str(device)) for group, name in chosen.items()}
    with translated("reading a checkpoint", path):
        try:
            state = read_json(path / _STATE)
            check(dict[str, Any], state)
        except (FileNotFoundError, ValueError) as error:
            raise CorruptData(f"{path / _STATE} is no state of a run ({reason(error)})") from error
    return Loaded(manifest["update"], tensors, state, path)


def _tensors(path: Path, device: str) -> dict[str, Tensor]:
    """Read the tensors of a file. Raises CorruptData where it is none of safetensors', or missing."""
    with translated("reading a checkpoint", path):
        try:
            return load_file(path, device=device)
        except (FileNotFoundError, SafetensorError, ValueError) as error:
            raise CorruptData(f"{path} holds no tensors ({reason(error)})") from error


def latest(
    directory: Path,
    warn: Callable[[str], None],
    device: str | torch.device = "cpu",
    groups: Collection[str] | None = None,
) -> Loaded | None:
    """The newest whole checkpoint, or None if there is none at all; corrupt ones are passed over, each with a warning.

    Raises CorruptData if there are some and all are corrupt.
    """
    paths = _present(directory)
    reasons = []
    for update in sorted(paths, reverse=True):
        try:
            loaded = load(paths[update], device, groups)
            if loaded.update != update:
                raise CorruptData(f"{paths[update]} is named for update {update} but holds update {loaded.update}")
            return loaded
        except CorruptData as error:
            reasons.append(str(error))
            warn(f"{error}; passed over for the one before it")
    if paths:
        raise CorruptData(
            f"all {len(paths)} checkpoints in {directory} are corrupt (the newest: {reasons[0]}); "
            "start the run again under another name"
        )
    return None


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` when the block ends well, and vanishes when it does not.

    At any instant `target` is the old directory or the new one, whole. (Between the two renames of a replacement it has, for
    an instant, only its hidden name `.NAME.old-PID`; a process that dies right there leaves it so, and the next call, as well
    as `latest`, finds it.) If `target` is a symbolic link, the link is replaced and what it points to is left alone.
    Raises UserError if `target` is a file.
    """
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise UserError(f"wanted a directory at {target}, found a file; move it or choose another name")
        _clear_leftovers(target.parent, target.name)
        temporary = _hidden(target, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            _check_from_disk(temporary)
            _replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _check_from_disk(directory: Path) -> None:
    """Check a directory against its manifest, if it has one, with its pages dropped from memory so that the disk answers."""
    if not (directory / _MANIFEST).exists():
        return
    if hasattr(os, "posix_fadvise"):
        for path in directory.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _verified(directory)


class _AlreadyThere(Exception):
    """The checkpoint on disk is bit for bit the one being written."""


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    with translated(f"writing {target}"):
        try:
            yield
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"wanted a directory at {error.filename or target}, found a file; move it") from error
        except SafetensorError as error:
            # The library tells the operating system's refusals in text only.
            refused = re.search(r"os error (\d+)", str(error))
            if refused is None:
                raise
            code = int(refused[1])
            raise OSError(code, os.strerror(code), str(target)) from error


def _storable(file: str, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies where needed. Raises UserError if two names share memory: they would come back untied."""
    if not _FILE.fullmatch(file):
        raise UserError(f"{file!r} cannot name a file of a checkpoint; use letters, digits, '_', '-'")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in group.items()}
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in contiguous.items()
        if tensor.nbytes
    )
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise UserError(f"{file}: {name} and {other} share memory (tied weights?); save it under one name only")
    return contiguous


def _stored_bytes(group: Mapping[str, Tensor] | Deferred) -> int:
    if isinstance(group, Deferred):
        return group.nbytes
    header_bytes = 8 + sum(len(name) + 128 for name in group)
    return header_bytes + sum(tensor.nbytes for tensor in group.values())


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DiskFull(
            f"a checkpoint needs {needed / 1e6:,.1f} MB in {directory}, {free / 1e6:,.1f} MB are free; "
            "free space, lower checkpoint.keep, or choose another runs_dir"
        )


def _write_manifest(directory: Path, update: int, names: list[str]) -> None:
    files = {name: {"sha256": file_sha256(directory / name), "bytes": (directory / name).stat().st_size} for name in names}
    values = {"format": FORMAT, "update": update, "files": files}
    manifest = {**values, "sha256": _own_sha256(values)}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    """Sum up all in the manifest but this sum. Every format keeps this rule, so that a newer one is told from a broken one."""
    return text_sha256(canonical({key: value for key, value in manifest.items() if key != "sha256"}))


def _read_manifest(directory: Path) -> Manifest:
    path = directory / _MANIFEST
    try:
        manifest: Manifest = read_json(path)
        check(Sealed, manifest)
    except FileNotFoundError as error:
        raise CorruptData(f"{path} is missing: {directory} is not a whole checkpoint") from error
    except ValueError as error:
        raise CorruptData(f"{path} is not a manifest ({reason(error)})") from error
    actual, expected = _own_sha256(manifest), manifest["sha256"]
    if actual != expected:
        raise CorruptData(f"{path} is corrupt: expected sha256 {expected}, found {actual}")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{directory} is a checkpoint of format {manifest['format']}, this fastdistil reads up to {FORMAT}; "
            "upgrade fastdistil"
        )
    try:
        check(Manifest, manifest)
    except ValueError as error:
        raise CorruptData(f"{path} is not a manifest ({reason(error)})") from error
    return manifest


def _verified(directory: Path) -> Manifest:
    with translated("checking a checkpoint", directory):
        manifest = _read_manifest(directory)
        for name, expected in manifest["files"].items():
            path = directory / name
            if not path.is_file():
                raise CorruptData(f"{path} is missing: expected {expected['bytes']} bytes")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CorruptData(f"{path} is corrupt: expected {expected['bytes']} bytes, found {size}")
            try:
                actual_sha256 = file_sha256(path)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise CorruptData(f"{path} cannot be read: {error.strerror}") from error
            if actual_sha256 != expected["sha256"]:
                raise CorruptData(f"{path} is corrupt: expected sha256 {expected['sha256']}, found {actual_sha256}")
        return manifest


def _same(one: Path, other: Path) -> bool:
    """Return whether `other` is a whole checkpoint with the contents of `one`."""
    if not other.is_dir():
        return False
    try:
        return _read_manifest(one) == _verified(other)
    except (CorruptData, UserError):
        return False


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def _replace(temporary: Path, target: Path) -> None:
    aside = _hidden(target, "old")
    replacing = os.path.lexists(target)
    if replacing:
        target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        if replacing:
            aside.rename(target)
        raise
    sync(target.parent)
    if replacing:
        _remove(aside)


def _rotate(directory: Path, update: int, keep: int, protect: frozenset[int]) -> None:
    past = sorted((number, path) for number, path in _present(directory).items() if number <= update)
    for number, path in past[:-keep]:
        if number not in protect and not path.name.startswith("."):
            # Under its own name a half-removed checkpoint would pass for a corrupt one.
            path.rename(_hidden(path, "tmp"))
            _remove(_hidden(path, "tmp"))
    sync(directory)


def _present(directory: Path) -> dict[int, Path]:
    """Update -> directory, with those that a dying process left under their `.old` name."""
    paths: dict[int, Path] = {}
    if not directory.is_dir():
        return paths
    for path in directory.iterdir():
        hidden = _HIDDEN.fullmatch(path.name)
        visible = path.name if hidden is None else hidden["name"] if hidden["kind"] == "old" else ""
        step = _STEP.fullmatch(visible)
        if step and path.is_dir() and (hidden is None or int(step[1]) not in paths):
            paths[int(step[1])] = path
    return paths


def _clear_leftovers(directory: Path, only: str | None = None) -> None:
    """Remove what dead processes left unfinished here; put back a directory that one had only moved aside."""
    for path in sorted(directory.iterdir()):
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden is None or (_STEP.fullmatch(hidden["name"]) is None if only is None else hidden["name"] != only):
            continue
        if _alive(int(hidden["pid"])):
            continue
        visible = directory / hidden["name"]
        if hidden["kind"] == "old" and not os.path.lexists(visible):
            path.rename(visible)
        else:
            _remove(path)


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # an earlier process with our number, e.g. 1 in a container: we have nothing open here
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
