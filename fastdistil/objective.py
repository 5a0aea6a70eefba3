"""The distillation objective: which rows, which terms, which denominators.

    total = a_ce soft + (a_mlm or a_clm) hard + a_cos cosine + a_mse mse

    soft    T^2 sum_i w_i D(teacher_i, student_i) / sum_i w_i      over every non-padding token (or the labelled ones)
    hard    sum over labelled tokens of -log q(label) / their number
    cosine  sum_i (1 - cos(h_i^s, h_i^t)) / n                      over every non-padding token
    mse     sum_i |h_i^s - h_i^t|^2 / (D n)

The denominators are those of the whole update, over all its micro-batches and ranks, so that the gradient does not depend on
how the update was cut; `normalisation: micro-batch` takes the mean of the micro-batches' means, as the published example
does. Models hand over hidden states, not logits: the kernels own the vocabulary.

(The example's a_mse compares logits, and so grows with the vocabulary; here it compares hidden states.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistil.batches import Batch, Counts
from fastdistil.kernels.cosine import cosine_loss_reference, mse_loss_reference
from fastdistil.kernels.linear_distill import linear_cross_entropy_reference, linear_distill_reference
from fastdistil.recipe import Objective


class LossTerms(NamedTuple):
    """Each term divided by its denominator, 0-dimensional: micro-batches of an update add up to the update's loss."""

    total: Tensor
    soft: Tensor
    hard: Tensor
    cosine: Tensor
    mse: Tensor


class Denominators(NamedTuple):
    soft: float
    hard: float
    hidden: float


def denominators(objective: Objective, update: Counts, batch: Counts, micro_batches: int) -> Denominators:
    """What this micro-batch's sums are divided by; `update` counts all micro-batches of the update on all ranks."""
    counts, times = (batch, micro_batches) if objective.normalisation == "micro-batch" else (update, 1)
    soft = counts.labels if objective.soft_rows == "masked" else counts.valid
    # A denominator of 0 belongs to a sum of 0: the term is 0, not a quotient.
    return Denominators(*(times * count if count else 1.0 for count in (soft, counts.labels, counts.tokens)))


def loss_terms(
    objective: Objective,
    student: Any,
    teacher: Any | None,
    batch: Batch,
    per: Denominators,
    projection: nn.Linear | None = None,
) -> LossTerms:
    """The objective on one micro-batch. `student`, `teacher`: models.LanguageModel or modules with its interface."""
    teacher_hidden_NE = None
    if teacher is not None and objective.needs_teacher:
        # Teacher first: its activations are freed before the student's are made. In its own dtype, whatever autocast says.
        with torch.no_grad(), torch.autocast(batch.ids_BS.device.type, enabled=False):
            teacher_hidden_NE = teacher.hidden(batch)
    student_hidden_ND = student.hidden(batch)
    zero = torch.zeros((), device=student_hidden_ND.device)
    soft, hard, cosine, mse = zero, zero, zero, zero
    a_hard = objective.a_clm if student.causal else objective.a_mlm

    if objective.a_ce and teacher_hidden_NE is not None:
        soft, hard = _vocabulary_terms(objective, student, teacher, student_hidden_ND, teacher_hidden_NE, batch)
    elif a_hard:
        features_MD = student.transform(student_hidden_ND.index_select(0, batch.label_rows))
        labels_M = batch.labels_N.index_select(0, batch.label_rows)
        hard = linear_cross_entropy_reference(features_MD, student.weight, student.bias, labels_M)

    if teacher_hidden_NE is not None and (objective.a_cos or objective.a_mse):
        s_ND, t_ND = _rows(student_hidden_ND, batch.valid_rows), _rows(teacher_hidden_NE, batch.valid_rows)
        if projection is not None:
            s_ND = projection(s_ND)
        if objective.a_cos:
            cosine = cosine_loss_reference(s_ND, t_ND)
        if objective.a_mse:
            mse = mse_loss_reference(s_ND, t_ND)

    soft, hard, cosine, mse = soft / per.soft, hard / per.hard, cosine / per.hidden, mse / per.hidden
    total = objective.a_ce * soft + a_hard * hard + objective.a_cos * cosine + objective.a_mse * mse
    return LossTerms(total, soft, hard, cosine, mse)


def _rows(hidden_ND: Tensor, rows: Tensor | None) -> Tensor:
    return hidden_ND if rows is None else hidden_ND.index_select(0, rows)


def _vocabulary_terms(
    objective: Objective, student: Any, teacher: Any, student_hidden_ND: Tensor, teacher_hidden_NE: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Sums of the soft and the hard term. Rows that enter neither are dropped before the matrix products."""
    rows = batch.label_rows if objective.soft_rows == "masked" else batch.valid_rows
    if objective.soft_rows == "masked":
        label_rows_M = torch.arange(batch.label_rows.shape[0], device=batch.label_rows.device)
    else:
        label_rows_M = batch.label_rows if rows is None else torch.searchsorted(rows, batch.label_rows)
    # With soft_rows "masked" the labelled rows count alike, as their denominator does.
    weights_N = None
    if batch.weights_N is not None and objective.soft_rows == "all":
        weights_N = _rows(batch.weights_N, rows)
    with torch.no_grad(), torch.autocast(batch.ids_BS.device.type, enabled=False):
        teacher_features_NE = teacher.transform(_rows(teacher_hidden_NE, rows))
    return linear_distill_reference(
        student.transform(_rows(student_hidden_ND, rows)),
        student.weight,
        student.bias,
        teacher_features_NE,
        teacher.weight,
        teacher.bias,
        batch.labels_N.index_select(0, batch.label_rows),
        label_rows_M,
        weights_N,
        temperature=objective.temperature,
        divergence=objective.divergence,
        beta=objective.beta,
    )
