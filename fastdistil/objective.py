"""The distillation objective: which rows, which terms, which denominators.

    total = a_ce soft + (a_mlm or a_clm) hard + a_cos cosine + a_mse mse

    soft    T^2 sum_i w_i D(teacher_i, student_i) / sum_i w_i      over every non-padding token (or the labelled ones)
    hard    sum over labelled tokens of -log q(label) / their number
    cosine  sum_i (1 - cos(h_i^s, h_i^t)) / n                      over every non-padding token
    mse     sum_i |h_i^s - h_i^t|^2 / (D n)

One pass over the vocabulary makes soft, hard and their gradient, so the coefficients a / denominator go into the ops, and each
op's `total` is already what is differentiated.

The denominators are those of the whole update, over all its micro-batches and ranks, so that the gradient does not depend on
how the update was cut; `normalisation: micro-batch` takes the mean of the micro-batches' means, as the published example
does. Models hand over hidden states, not logits: the kernels own the vocabulary.

(The example's a_mse compares logits, and so grows with the vocabulary; here it compares hidden states.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistil.data.batch import Batch, Counts
from fastdistil.kernels.backend import Backend
from fastdistil.kernels.cosine import HiddenOptions, cosine_loss
from fastdistil.kernels.distill_options import DistillOptions, DistillTerms, Head, SparseTeacher
from fastdistil.kernels.linear_distill import linear_distill_loss
from fastdistil.profiling.spans import Span, unmeasured
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


def denominators(objective: Objective, update: Counts, batch: Counts) -> Denominators:
    """What this micro-batch's sums are divided by; `update` counts all micro-batches of the update on all ranks."""
    counts, times = (batch, update.batches) if objective.normalisation == "micro-batch" else (update, 1)
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
    *,
    columns: int | None = None,
    backend: Backend = "auto",
    span: Span = unmeasured,
) -> LossTerms:
    """The objective on one micro-batch. `student`, `teacher`: language_model.LanguageModel or modules with its interface.

    Only `total` carries a gradient. `columns`: the first entries of both vocabularies, in which student and teacher are
    compared and labels predicted, as if there were no others; None: all, equally many. `backend`: which implementation of the
    losses (recipe key `kernels`). `span`: measures the forwards of teacher and student up to their last hidden states, and the
    losses, which hold both heads and, where they are fused, the head's backward.
    """
    teacher_hidden_NE = None
    if teacher is not None and objective.needs_teacher:
        # Teacher first: its activations are freed before the student's are made. In its own dtype, whatever autocast says.
        with span("teacher"), torch.no_grad(), torch.autocast(batch.ids_BS.device.type, enabled=False):
            teacher_hidden_NE = teacher.hidden(batch)
    with span("student"):
        student_hidden_ND = student.hidden(batch)
    with span("losses"):
        states = student_hidden_ND, teacher_hidden_NE
        return _losses(objective, student, teacher, *states, batch, per, projection, columns, backend)


def _losses(
    objective: Objective,
    student: Any,
    teacher: Any | None,
    student_hidden_ND: Tensor,
    teacher_hidden_NE: Tensor | None,
    batch: Batch,
    per: Denominators,
    projection: nn.Linear | None,
    columns: int | None,
    backend: Backend,
) -> LossTerms:
    zero = torch.zeros((), device=student_hidden_ND.device)
    total, soft, hard, cosine, mse = zero, zero, zero, zero, zero
    a_hard = objective.a_clm if student.causal else objective.a_mlm

    options = DistillOptions(
        temperature=objective.temperature,
        divergence=objective.divergence,
        beta=objective.beta,
        soft=objective.a_ce / per.soft,
        hard=a_hard / per.hard,
        columns=columns if objective.a_ce else None,
    )
    if objective.a_ce and (teacher_hidden_NE is not None or batch.cached_indices_NK is not None):
        terms = _vocabulary_terms(objective, options, student, teacher, student_hidden_ND, teacher_hidden_NE, batch, backend)
        total, soft, hard = terms.total, terms.soft / per.soft, terms.hard / per.hard
    elif a_hard:
        features_MD = student.transform(student_hidden_ND.index_select(0, batch.label_rows))
        labels_M = batch.labels_N.index_select(0, batch.label_rows)
        head = Head(features_MD, student.weight, student.bias)
        terms = linear_distill_loss(head, None, labels_M, options=options, backend=backend)
        total, hard = terms.total, terms.hard / per.hard

    if teacher_hidden_NE is not None and (objective.a_cos or objective.a_mse):
        if projection is not None:
            student_hidden_ND = projection(student_hidden_ND)
        weighed = HiddenOptions(cosine=objective.a_cos / per.hidden, mse=objective.a_mse / per.hidden)
        states = ([student_hidden_ND], [teacher_hidden_NE])
        hidden = cosine_loss(*states, batch.valid_rows, options=weighed, backend=backend)
        total, cosine, mse = total + hidden.total, hidden.cosine / per.hidden, hidden.mse / per.hidden

    return LossTerms(total, soft, hard, cosine, mse)


def _rows(hidden_ND: Tensor, rows: Tensor | None) -> Tensor:
    return hidden_ND if rows is None else hidden_ND.index_select(0, rows)


def _vocabulary_terms(
    objective: Objective,
    options: DistillOptions,
    student: Any,
    teacher: Any | None,
    student_hidden_ND: Tensor,
    teacher_hidden_NE: Tensor | None,
    batch: Batch,
    backend: Backend,
) -> DistillTerms:
    """Soft and hard term. Rows that enter neither are dropped before the heads, transforms included."""
    rows = batch.label_rows if objective.soft_rows == "masked" else batch.valid_rows
    # With soft_rows "masked" the labelled rows count alike, as their denominator does.
    weights_N = None
    if batch.weights_N is not None and objective.soft_rows == "all":
        weights_N = _rows(batch.weights_N, rows)
    features_ND, labels_N = student.transform(_rows(student_hidden_ND, rows)), _rows(batch.labels_N, rows)
    head = Head(features_ND, student.weight, student.bias)
    if teacher_hidden_NE is None:
        assert batch.cached_indices_NK is not None and batch.cached_log_probabilities_NK is not None
        listed = SparseTeacher(batch.cached_indices_NK, batch.cached_log_probabilities_NK, batch.cached_tail_N)
        listed = listed if rows is None else listed.rows(rows)
        return linear_distill_loss(head, listed, labels_N, weights_N, options=options, backend=backend)
    assert teacher is not None
    with torch.no_grad(), torch.autocast(batch.ids_BS.device.type, enabled=False):
        teacher_features_NE = teacher.transform(_rows(teacher_hidden_NE, rows))
    bias_V = None if teacher.bias is None else teacher.bias.detach()
    teacher_head = Head(teacher_features_NE, teacher.weight.detach(), bias_V)
    return linear_distill_loss(head, teacher_head, labels_N, weights_N, options=options, backend=backend)
