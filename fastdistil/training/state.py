"""What a checkpoint holds of the things that learn, as flat names and tensors, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.errors import CorruptData
from fastdistil.models import language_model

Modules = Mapping[str, nn.Module | None]
"""Name -> module that is trained; None where the run has none."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a weight."""
LEARNT = ("model", "optimizer")
"""The groups of `learnt_tensors`."""


def learnt_tensors(modules: Modules, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """{"model": weights, "optimizer": moments and steps}; a tied weight once."""
    weights = {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in language_model.own_state(module).items()
    }
    moments = {
        f"{index}.{name}": value for index, values in optimizer.state_dict()["state"].items() for name, value in values.items()
    }
    return {"model": weights, "optimizer": moments}


def load_learnt(tensors: Mapping[str, Mapping[str, Tensor]], modules: Modules, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `learnt_tensors` gave, in place. Raises UserError if it is of other modules, CorruptData for moments that
    belong to no weight."""
    for part, module in modules.items():
        if module is not None:
            language_model.load_own_state(module, _below(tensors["model"], part))
    states: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {f"{index}.{key}": (index, key) for index in range(len(parameters)) for key in MOMENTS}
    for name, tensor in tensors["optimizer"].items():
        index, key = places.get(name, (0, ""))
        if not key or tensor.shape != (() if key == "step" else parameters[index].shape):
            raise CorruptData(
                f"the checkpoint's optimizer holds {name} of shape {list(tensor.shape)}, which belongs to no weight; start anew"
            )
        states.setdefault(index, {})[key] = tensor
    if any(len(moments) != len(MOMENTS) for moments in states.values()):
        raise CorruptData(f"the checkpoint's optimizer lacks one of {', '.join(MOMENTS)} of a weight; start anew")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
