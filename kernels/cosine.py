"""Losses of hidden states: one minus the cosine to the teacher's, and the mean squared error.

    cosine = sum_n 1 - s_n . t_n / (|s_n| |t_n|)        (torch's cosine_embedding_loss with target 1; Sanh et al. 2019)
    mse    = sum_n |s_n - t_n|^2 / D                    (mean over the width, sum over rows)

Legend: N rows (tokens), D width.
"""

import torch
from torch import Tensor

# torch's cosine_embedding_loss adds it to each squared norm.
_EPSILON = 1e-12


def cosine_loss_reference(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Sum over rows of 1 - cosine, 0-dimensional, float32 or wider. Two zero vectors give 1, as in torch."""
    wide = torch.promote_types(student_ND.dtype, torch.float32)
    s, t = student_ND.to(wide), teacher_ND.to(wide)
    norms_N = ((s * s).sum(-1) + _EPSILON) * ((t * t).sum(-1) + _EPSILON)
    return (1 - (s * t).sum(-1) / norms_N.sqrt()).sum()


def mse_loss_reference(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Sum over rows of the squared error's mean over the width, 0-dimensional, float32 or wider."""
    wide = torch.promote_types(student_ND.dtype, torch.float32)
    return (student_ND.to(wide) - teacher_ND.to(wide)).square().mean(-1).sum()
