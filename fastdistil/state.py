"""What a checkpoint holds of the things that learn, as flat names and tensors, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil import models

Modules = Mapping[str, nn.Module | None]
"""Name -> module that is trained; None where the run has none."""
LEARNT = ("model", "optimizer")
"""The groups of `learnt_tensors`."""


def learnt_tensors(modules: Modules, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """{"model": weights, "optimizer": moments and steps}; a tied weight once."""
    weights = {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in models.own_state(module).items()
    }
    moments = {
        f"{index}.{name}": value for index, values in optimizer.state_dict()["state"].items() for name, value in values.items()
    }
    return {"model": weights, "optimizer": moments}


def load_learnt(tensors: Mapping[str, Mapping[str, Tensor]], modules: Modules, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `learnt_tensors` gave, in place. Raises UserError if it is of other modules."""
    for part, module in modules.items():
        if module is not None:
            models.load_own_state(module, _below(tensors["model"], part))
    states: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors["optimizer"].items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
