"""Distillation losses from logits: a temperature-scaled divergence to the teacher and the cross-entropy of the labels.

    soft = T^2 * sum_n w_n D(p_n, q_n)            p = softmax(teacher / T), q = softmax(student / T)
    hard = sum_{n labelled} -log softmax(student_n)[label_n]          (at temperature 1)

    forward KL   D = sum_v p (log p - log q)                      Hinton, Vinyals, Dean 2015, section 2
    reverse KL   D = sum_v q (log q - log p)                      Gu et al. 2024 (MiniLLM)
    JSD(beta)    D = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q     Agarwal et al. 2024 (GKD)

Both are sums over rows: whoever calls divides by the tokens of a whole update, which one batch does not know.
Legend: N rows (tokens), V vocabulary.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


class DistillTerms(NamedTuple):
    """Sums over rows, 0-dimensional, float32 or wider."""

    soft: Tensor
    hard: Tensor


def _times(p: Tensor, difference: Tensor) -> Tensor:
    """p * difference with 0 * inf = 0, as the limit has it, in the gradient too."""
    return p * torch.where(p > 0, difference, 0)


def divergence_reference(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward-kl",
    beta: float = 0.5,
) -> Tensor:
    """D(teacher, student) of each row times temperature squared, [N], float32 or wider. Differentiable in both."""
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    log_q_NV = (student_NV.to(wide) / temperature).log_softmax(-1)
    log_p_NV = (teacher_NV.to(wide) / temperature).log_softmax(-1)
    match divergence:
        case "forward-kl":
            rows_N = _times(log_p_NV.exp(), log_p_NV - log_q_NV).sum(-1)
        case "reverse-kl":
            rows_N = _times(log_q_NV.exp(), log_q_NV - log_p_NV).sum(-1)
        case "jsd":
            p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
            # From the logarithms: where p and q both underflow, log(m) would be -inf and its gradient nan.
            log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
            rows_N = (beta * _times(p_NV, log_p_NV - log_m_NV) + (1 - beta) * _times(q_NV, log_q_NV - log_m_NV)).sum(-1)
    return temperature**2 * rows_N


def cross_entropy_reference(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of -log softmax(student)[label] over rows whose label is not -100, 0-dimensional, float32 or wider."""
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    return F.cross_entropy(student_NV.to(wide), labels_N, ignore_index=-100, reduction="sum")
