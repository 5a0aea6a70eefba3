"""The optimizer's parameter groups and the learning rate, as functions of the model and the update's number."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastdistil.recipe import Optim


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices and embeddings with decay; vectors (norms, biases) without.

    By dimension, not by name: names of norms differ between architectures ("LayerNorm", "sa_layer_norm", "ln_f"), but norm
    weights and biases are the one-dimensional parameters of all of them. A tied parameter counts once.
    """
    seen: dict[nn.Parameter, None] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen.setdefault(parameter)
    decayed = [parameter for parameter in seen if parameter.dim() >= 2]
    plain = [parameter for parameter in seen if parameter.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(modules: Iterable[nn.Module], optim: Optim) -> torch.optim.AdamW:
    """Fused AdamW: it alone honours the device-side flag that leaves weights, moments and step as they were."""
    groups = [group for group in parameter_groups(modules, optim.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def learning_rate(optim: Optim, update: int, updates: int) -> float:
    """Rate of update number `update` (from 0) of `updates`: linear warm-up from 0, then linear or cosine to 0, or constant.

    Linear is transformers' get_linear_schedule_with_warmup, the published recipe's: with a warm-up the first update has rate 0.
    """
    warmup = math.ceil(optim.warmup * updates)
    if update < warmup:
        return optim.lr * update / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (update - warmup) / max(1, updates - warmup)
    return optim.lr * ((1.0 - done) if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))
