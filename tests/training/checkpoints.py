"""Checkpoints whose contents follow from a number, what they must hold, and how they are damaged."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from fastdistil.training import checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def some_tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "w": torch.randn(17, 9, generator=generator),
            "b": torch.randn(5, generator=generator).bfloat16(),
        },
        "optimizer": {
            "w.exp_avg": torch.randn(17, 9, generator=generator),
            "step": torch.tensor(float(seed)),
        },
    }


def put(directory: Path, update: int, seed: int | None = None, keep: int = 9, **more: Any) -> Path:
    """Save a checkpoint whose contents follow from `seed` (default: the update)."""
    seed = update if seed is None else seed
    return checkpoint.save(
        directory,
        update,
        some_tensors(seed),
        {"seed": seed, "best": 1.5},
        keep=keep,
        **more,
    )


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
