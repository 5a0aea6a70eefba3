"""What the losses of distill.py, sparse_distill.py and linear_distill.py take and return, as types.

Legend: N rows (tokens), V vocabulary, K listed tokens.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


class DistillTerms(NamedTuple):
    """0-dimensional sums over rows, float32 or wider. `total` is differentiable; the others are for the log."""

    total: Tensor
    soft: Tensor
    hard: Tensor


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What the loss is. Raises ValueError for values that no loss has."""

    temperature: float = 1.0
    divergence: Divergence = "forward-kl"
    beta: float = 0.5
    """The teacher's weight in the mixture of the generalised JSD, between 0 and 1."""
    soft: float = 1.0
    """Coefficient of the soft term in `total`; likewise hard."""
    hard: float = 1.0
    ignore_index: int = -100
    """Label of a row that has none."""
    student_scale: float = 1.0
    """Multiplies the logits before anything else (Cohere's logit_scale)."""
    teacher_scale: float = 1.0
    student_softcap: float | None = None
    """cap * tanh(logits / cap), after the scale (Gemma 2's final_logit_softcapping)."""
    teacher_softcap: float | None = None
    columns: int | None = None
    """Only the first `columns` of both vocabularies exist: the others (padding, tokens that one side lacks)
    have probability 0 on both sides and gradient 0, as if their logits were -inf. None: all, and both sides
    must be equally wide."""

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {self.divergence!r}")
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie between 0 and 1, got {self.beta}; 0 and 1 are the KL divergences")
        for name in ("student_softcap", "teacher_softcap"):
            cap = getattr(self, name)
            if cap is not None and not 0 < cap < math.inf:
                raise ValueError(f"{name} must be positive and finite, or None for none; got {cap}")
        for name in ("soft", "hard", "student_scale", "teacher_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be at least 1, or None for all; got {self.columns}")

    def width(self, student_V: int, teacher_V: int | None = None) -> int:
        """Return how many columns exist; teacher_V is None where there are no teacher's logits.

        Raises ValueError when the sides differ and nothing was said about it.
        """
        teacher_V = student_V if teacher_V is None else teacher_V
        if self.columns is None:
            if student_V != teacher_V:
                raise ValueError(
                    f"the student's vocabulary has {student_V} columns and the teacher's {teacher_V}; where the first "
                    f"{min(student_V, teacher_V)} mean the same tokens say so: columns={min(student_V, teacher_V)}"
                )
            return student_V
        if self.columns > min(student_V, teacher_V):
            raise ValueError(
                f"columns is {self.columns}; the student has {student_V}, the teacher {teacher_V}: give at most that"
            )
        return self.columns


_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)


def take_rows(tensor: _MaybeTensor, rows: slice | Tensor) -> _MaybeTensor:
    """Return some rows of a tensor, None of None: a view for a slice, a copy for numbers (int64)."""
    if tensor is None:
        return tensor
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


class Head(NamedTuple):
    """Hidden states and the vocabulary head after them, of a student or a teacher: logits = hidden @ weight.T + bias."""

    hidden: Tensor
    """Float [N, width], one row a token."""
    weight: Tensor
    """Float [V, width], as nn.Linear has it."""
    bias: Tensor | None = None
    """Float [V]."""


def times(p: Tensor, difference: Tensor) -> Tensor:
    """Return p * difference with 0 * inf = 0, as the limit has it, in the gradient too."""
    return p * torch.where(p > 0, difference, 0)


class SparseTeacher(NamedTuple):
    """A teacher's distribution at the loss's temperature. No token may be listed twice in a row."""

    indices_NK: Tensor
    """int64 or int32, below the vocabulary's width, in unused slots too."""
    log_probabilities_NK: Tensor
    """Float, natural logarithm; -inf: the slot is unused."""
    tail_N: Tensor | None
    """Float, probability mass of all tokens not listed. None: what is not listed is not learnt from."""

    def rows(self, rows: slice | Tensor) -> "SparseTeacher":
        indices, log_probabilities, tail = self
        return SparseTeacher(take_rows(indices, rows), take_rows(log_probabilities, rows), take_rows(tail, rows))

    def normalised(self, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (log p_NK, p_r [N]) that sum to 1 in each row; nan where there is no mass."""
        log_p_NK = self.log_probabilities_NK.to(wide)
        log_total_N = log_p_NK.logsumexp(-1)
        if self.tail_N is None:
            return log_p_NK - log_total_N[:, None], torch.zeros_like(log_total_N)
        log_tail_N = self.tail_N.to(wide).log()
        log_total_N = torch.logaddexp(log_total_N, log_tail_N)
        return log_p_NK - log_total_N[:, None], (log_tail_N - log_total_N).exp()


class Targets(NamedTuple):
    """Labels of the rows, and their weights in the soft term; None: no labels, or weights of 1."""

    labels_N: Tensor | None = None
    """int64."""
    weights_N: Tensor | None = None
    """Float."""

    def rows(self, rows: slice | Tensor) -> "Targets":
        return Targets(take_rows(self.labels_N, rows), take_rows(self.weights_N, rows))


# ---- as arguments of an op ----

_SCHEMA_TYPES: dict[Any, str] = {float: "float", int: "int", float | None: "float?", int | None: "int?"}
OPTIONS_SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES.get(field.type, 'str')} o_{field.name}" for field in dataclasses.fields(DistillOptions)
)


OPTIONS = len(dataclasses.fields(DistillOptions))
"""Arguments that they are."""


def pack(options: DistillOptions) -> tuple[Any, ...]:
    """Return the options as the arguments of an op, in the order of OPTIONS_SCHEMA."""
    return dataclasses.astuple(options)


def unpack(values: tuple[Any, ...]) -> DistillOptions:
    names = [field.name for field in dataclasses.fields(DistillOptions)]
    return DistillOptions(**dict(zip(names, values, strict=True)))


# ---- low precision ----

# The largest gradient at weight 1: 1/V of a vocabulary of 2^18 is then a normal number, and weights up to 500 do not overflow.
_FLOAT16_HEADROOM = 64.0


def low_precision_unit(options: DistillOptions, dtype: torch.dtype) -> tuple[DistillOptions, float]:
    """(options to compute a gradient in `dtype` with, what to multiply it with afterwards, in float32).

    float16 ends at 6e-8: a gradient of 1/V over 16384 tokens would be 0 before a loss scale reaches it. So
    there the coefficients of the gradient are divided by the largest, and multiplied by a constant that
    leaves room for weights; the quotient is folded into backward.
    """
    unit = max(abs(options.soft) * options.temperature, abs(options.hard)) / _FLOAT16_HEADROOM
    if dtype != torch.float16 or unit == 0:
        return options, 1.0
    return dataclasses.replace(options, soft=options.soft / unit, hard=options.hard / unit), unit
