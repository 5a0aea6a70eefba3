"""The optimizer's parameter groups and the learning rate, as functions of the model and the update's number."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastdistil.recipe import Optim


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices and embeddings with decay; vectors (norms, biases) without.

    By dimension, not by name: names of norms differ between architectures ("LayerNorm", "sa_layer_norm", "ln_f"), but norm
    weights and biases are the one-dimensional parameters of all of them. A tied parameter counts once.
    """
    unique: dict[nn.Parameter, None] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                unique.setdefault(parameter)
    decayed = [parameter for parameter in unique if parameter.dim() >= 2]
    plain = [parameter for parameter in unique if parameter.dim() < 2]
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


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018), all on the device: no wait, and its state is three numbers.

    torch's GradScaler does the same and hides its flag; here an overflow is what the norm of the unscaled gradient says.
    """

    START, GROWTH_AFTER, PERSISTENT = 2.0**16, 2000, 50

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(self.START, device=device)
        self._good = torch.zeros((), device=device)
        self._bad = torch.zeros((), device=device)

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / self.scale)

    def update(self, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt the scale to the unscaled gradient's norm; return (1.0 if it overflowed, the norm as a guard should see it).

        An overflow is how the scale is found, not a failure, and so it is 0 for the guard; after PERSISTENT overflows in a row
        no scale helps, and the guard sees the norm itself.
        """
        overflow = grad_norm.isfinite().logical_not()
        self._good = torch.where(overflow, 0.0, self._good + 1)
        self._bad = torch.where(overflow, self._bad + 1, 0.0)
        grown = torch.where(self._good == self.GROWTH_AFTER, self.scale * 2, self.scale)
        self.scale = torch.where(overflow, self.scale / 2, grown)
        self._good = torch.where(self._good == self.GROWTH_AFTER, 0.0, self._good)
        return overflow.float(), torch.where(overflow & (self._bad < self.PERSISTENT), 0.0, grad_norm)

    def state(self) -> dict[str, float]:
        """Waits for the device."""
        scale, good, bad = torch.stack([self.scale, self._good, self._bad]).tolist()
        return {"scale": scale, "good": good, "bad": bad}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.scale = torch.full_like(self.scale, state["scale"])
        self._good = torch.full_like(self._good, state["good"])
        self._bad = torch.full_like(self._bad, state["bad"])
