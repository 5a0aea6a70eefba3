"""Distillation losses from hidden states: both vocabulary heads and the losses of `distill.py` in one place.

    student logits = student_features_ND @ student_weight_VD.T + student_bias_V          (teacher likewise, width E)
    soft, hard as in distill.py; soft over all N rows, hard over the labelled ones.

Legend: N rows, M of them labelled, D student width, E teacher width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastdistil.kernels.distill import DistillTerms, Divergence, cross_entropy_reference, divergence_reference


def linear_distill_reference(
    student_features_ND: Tensor,
    student_weight_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_features_NE: Tensor,
    teacher_weight_VE: Tensor,
    teacher_bias_V: Tensor | None,
    labels_M: Tensor,
    label_rows_M: Tensor,
    weights_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward-kl",
    beta: float = 0.5,
) -> DistillTerms:
    """Sums over rows of the divergence to the teacher and of the labels' cross-entropy.

    labels_M (int64) belong to the rows label_rows_M (int64) of the features; weights_N (float) weigh the soft term. Logits
    are whole here; the student's follow autocast, the teacher's keep the dtype of its features. Sums are float32 or wider.
    """
    student_NV = linear(student_features_ND, student_weight_VD, student_bias_V)
    with torch.autocast(student_NV.device.type, enabled=False):
        teacher_NV = linear(teacher_features_NE, teacher_weight_VE, teacher_bias_V)
    rows_N = divergence_reference(student_NV, teacher_NV, temperature=temperature, divergence=divergence, beta=beta)
    soft = rows_N.sum() if weights_N is None else (rows_N * weights_N).sum()
    hard = cross_entropy_reference(student_NV.index_select(0, label_rows_M), labels_M)
    return DistillTerms(soft, hard)


def linear_cross_entropy_reference(features_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_M: Tensor) -> Tensor:
    """Sum of the labels' cross-entropy from hidden states: the hard term alone, for rows that carry a label."""
    return cross_entropy_reference(linear(features_MD, weight_VD, bias_V), labels_M)
