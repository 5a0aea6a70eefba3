"""Inputs of the logits loss: logits, labels, weights, and options in which everything is on."""

from typing import Any

import torch
from torch import Tensor

from fastdistil.kernels.distill import distill_loss
from fastdistil.kernels.distill_options import DistillTerms

PATHS = ["torch", "triton"]
EVERYTHING: dict[str, Any] = {"temperature": 2.0, "soft": 0.7, "hard": 0.4, "beta": 0.3}


def logits(
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return 3 * torch.randn(rows, columns, dtype=dtype), 3 * torch.randn(rows, columns, dtype=dtype)


def some_labels(rows: int, columns: int) -> Tensor:
    labels = torch.arange(rows) * 7 % columns
    labels[1::3] = -100
    return labels


def some_weights(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    weights = torch.linspace(0.2, 1.7, rows, dtype=dtype)
    weights[::4] = 0
    return weights


def gradient(student: Tensor, *arguments: Any, **keywords: Any) -> tuple[DistillTerms, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    terms = distill_loss(leaf, *arguments, **keywords)
    (grad,) = torch.autograd.grad(3.0 * terms.total, leaf)
    return terms, grad
