"""Which teacher a run learns from: part of what a continued run must agree with, so each checkpoint holds it.

The fingerprint is made of every byte of the teacher. Files that have the name, size and time of those it was made of are not
read again, so that only a run's first start, and one after the teacher was copied, takes that long.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.errors import UserError
from fastdistil.models.loading import load_config
from fastdistil.models.pretrained import weight_files
from fastdistil.recipe import Recipe
from fastdistil.storage import canonical, file_sha256, text_sha256


def identify_teacher(recipe: Recipe, module: nn.Module | None) -> dict[str, Any] | None:
    """Return the teacher's fingerprint and, of a directory, its files, as JSON has it; None for a recipe without a teacher.

    module: the teacher itself where it was given from Python.
    """
    if module is not None:
        return {"fingerprint": module_fingerprint(module), "files": []}
    if recipe.teacher is None:
        return None
    path = recipe.teacher.path
    return {"fingerprint": teacher_fingerprint(path, load_config(path)), "files": _stamps(path)}


def continue_with_teacher(recipe: Recipe, module: nn.Module | None, saved: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `identify_teacher` does, for a run that had the teacher `saved`. Raises UserError for another one."""
    if recipe.teacher is not None and module is None and saved["files"] and saved["files"] == _stamps(recipe.teacher.path):
        return saved
    identity = identify_teacher(recipe, module)
    if identity is not None and identity["fingerprint"] != saved["fingerprint"]:
        place, differs = "this one", "its weights differ"
        if recipe.teacher is not None and module is None:
            place = f"the one at teacher.path={recipe.teacher.path}"
            differs = "its weights or config.json differ" if saved["files"] else "its commit on the hub differs"
        raise UserError(
            f"the run was trained with another teacher than {place}: {differs}; "
            "give back that teacher, or start anew under another name=..."
        )
    return identity


def module_fingerprint(module: nn.Module) -> str:
    """Return the sha256 of a module's parameters and persistent buffers: names, shapes, dtypes, values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def teacher_fingerprint(path: str, config: Any) -> str:
    """Return what changes when the teacher does: its files' sha256, or for a hub id its name and commit."""
    if not Path(path).is_dir():
        return text_sha256(canonical([path, getattr(config, "_commit_hash", None)]))
    return _files_fingerprint(path, tuple((name, size, time_ns) for name, size, time_ns in _stamps(path)))


@lru_cache(maxsize=4)
def _files_fingerprint(path: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Hash a teacher's files, once a process while their stamps stay as they are."""
    return text_sha256(canonical([[name, file_sha256(Path(path, name))] for name, _, _ in stamps]))


def _stamps(path: str) -> list[list[Any]]:
    """Return name, bytes and time (ns) of the files that decide what a directory computes; none for a hub id."""
    folder = Path(path)
    files = sorted([*weight_files(folder), *folder.glob("config.json")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
