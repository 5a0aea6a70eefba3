"""How much of a device a run uses: arithmetic of the step, counted, over what the device can do.

Counted are the matrix products, 2 operations for a multiplication and an addition, as everybody does; norms, softmax,
activations, rotations and the losses' own arithmetic are not. In tokens T of sequences of length L, and rows R of them that
enter the vocabulary losses:

    backbone      2 T (elements of its matrices)                     backward: as much for the inputs, and for the weights
    attention     4 (heads * head width) sum(pairs) a layer          backward: twice that
    transform     2 R (elements of the head's matrices)              backward: likewise
    vocabulary    2 R V (3 D + E)                                    D student's width, forward and backward; E the teacher's

A pair is a query and a key that it may see: L^2 of a sequence, L (L + 1) / 2 where causal, fewer in a window. So padding, and
what a mask hides, is no useful work. What is executed is more: padded rows; pairs that are computed and then hidden; and the
scores, which fused attention computes again in backward (5 products where 4 are needed). Logits are computed once
(kernels.linear_distill). Of a fused causal or windowed kernel the hidden parts of tiles on the border are not counted.

    MFU of the student       (its backbone and its vocabulary products) / time / peak
    MFU with the teacher     useful work of both
    HFU                      what is executed

The peak is of peaks.py.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations; `executed` counts what the useful ones (all others) cost as they are carried out."""

    student: int = 0
    """Backbone, head's transform and projection, forward and backward."""
    teacher: int = 0
    """Backbone and head's transform, forward."""
    student_head: int = 0
    """Products with the vocabulary matrix, forward and backward."""
    teacher_head: int = 0
    executed: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)}
        )

    def fields(self) -> dict[str, int]:
        """Return a log line's `flops`."""
        return {"student": self.student, "teacher": self.teacher, "heads": self.student_head + self.teacher_head}


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What a batch is multiplied with: operations of a model's forward, and of its backward."""

    token: int
    token_backward: int
    row: int
    """Of the head's transform."""
    row_backward: int
    pair: int
    """Of one layer's attention."""
    windows: tuple[tuple[int | None, int], ...]
    """(window or None, layers that have it): a token sees others less than that far away."""
    causal: bool
    vocabulary: int
    width: int
    trains_head: bool
    attention_dropout: bool

    @classmethod
    def of(cls, model: Any) -> "Coefficients":
        """Count a LanguageModel's. Raises ValueError for a module of another kind, whose arithmetic nobody has counted."""
        module, family = getattr(model, "module", None), getattr(model, "family", None)
        if module is None or family is None:
            raise ValueError(
                f"the arithmetic of {type(model).__name__} is not known, so that FLOPs and MFU are not recorded; "
                "they are for fastdistil.models.language_model.LanguageModel"
            )
        backbone, output = module.get_submodule(family.backbone), module.get_submodule(family.output)
        inside = {id(part) for part in backbone.modules()} | {id(output)}
        token, token_backward = _products(_matrices(backbone.modules()))
        row, row_backward = _products(_matrices(part for part in module.modules() if id(part) not in inside))
        config = module.config
        heads = int(config.num_attention_heads)
        head_width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        dropouts = [value for name, value in config.to_dict().items() if name.startswith("att") and name.endswith(_DROPOUT)]
        vocabulary, width = output.weight.shape
        return cls(
            token=token,
            token_backward=token_backward,
            row=row,
            row_backward=row_backward,
            pair=4 * heads * head_width,
            windows=tuple(Counter(map(_window, module.get_submodule(family.layers).children())).items()),
            causal=bool(model.causal),
            vocabulary=int(vocabulary),
            width=int(width),
            trains_head=bool(output.weight.requires_grad),
            attention_dropout=any(dropouts),
        )


_DROPOUT = ("dropout", "dropout_prob", "pdrop")


class WorkCounter:
    """The arithmetic of micro-batches of one run: `counter(batch)`, tens of microseconds on the host.

    objective: a recipe's; student, teacher: LanguageModel (None: no teacher, or a cached one); projection: of the
    hidden-state terms. device_type: "cpu" or "cuda", dtype: of the student's products; they decide what is executed, not what
    is useful. Raises ValueError as Coefficients.of does.
    """

    def __init__(
        self,
        objective: Any,
        student: Any,
        teacher: Any | None,
        projection: nn.Linear | None = None,
        *,
        device_type: str,
        dtype: torch.dtype,
        teacher_dtype: torch.dtype | None = None,
    ) -> None:
        self._objective = objective
        self._student = Coefficients.of(student)
        self._teacher = Coefficients.of(teacher) if teacher is not None and objective.needs_teacher else None
        self._projection = 0
        if projection is not None and self._teacher is not None and (objective.a_cos or objective.a_mse):
            self._projection = 6 * projection.weight.numel()
        self._attention = _attention_kind(device_type, dtype, dropout=self._student.attention_dropout)
        self._teacher_attention = _attention_kind(device_type, teacher_dtype or dtype, dropout=False)

    def __call__(self, batch: Any) -> Work:
        """Count one data.batch.Batch, best on the host: of a padded one the lengths are read from its mask."""
        objective, student_ops, teacher_ops = self._objective, self._student, self._teacher
        tokens, places = int(batch.counts.tokens), batch.ids_BS.numel()
        lengths = _lengths(batch)
        padded = tuple(batch.ids_BS.shape) if batch.packing is None else None
        soft = bool(objective.a_ce) and (teacher_ops is not None or batch.cached_indices_NK is not None)
        hard = objective.a_clm if student_ops.causal else objective.a_mlm
        rows = int(batch.counts.labels) if not soft or objective.soft_rows == "masked" else tokens
        rows = rows if soft or hard else 0

        student = tokens * (student_ops.token + student_ops.token_backward + self._projection) + rows * (
            student_ops.row + student_ops.row_backward
        )
        executed = student + (places - tokens) * (student_ops.token + student_ops.token_backward + self._projection)
        student += 3 * student_ops.pair * _visible(student_ops, lengths)
        backward = 2.0 if self._attention == "plain" else 2.5
        executed += int((1 + backward) * student_ops.pair * _computed(student_ops, lengths, padded, self._attention))
        student_head = 2 * rows * student_ops.vocabulary * student_ops.width * (3 if student_ops.trains_head else 2)
        teacher = teacher_head = 0
        if teacher_ops is not None:
            teacher_rows = rows if soft else 0
            teacher = tokens * teacher_ops.token + teacher_rows * teacher_ops.row
            executed += teacher + (places - tokens) * teacher_ops.token
            teacher += teacher_ops.pair * _visible(teacher_ops, lengths)
            executed += teacher_ops.pair * _computed(teacher_ops, lengths, padded, self._teacher_attention)
            teacher_head = 2 * teacher_rows * teacher_ops.vocabulary * teacher_ops.width
        return Work(
            student=student,
            teacher=teacher,
            student_head=student_head,
            teacher_head=teacher_head,
            executed=executed + student_head + teacher_head,
        )


def _matrices(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the matrices of linear layers, GPT-2's (Conv1D) among them; not of embeddings, which are looked up."""
    return [part.weight for part in modules if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"]  # type: ignore[misc]


def _products(matrices: Sequence[Tensor]) -> tuple[int, int]:
    """(forward, backward) of one row: backward makes the input's gradient, and the weight's where it is trained."""
    forward = 2 * sum(matrix.numel() for matrix in matrices)
    return forward, forward + 2 * sum(matrix.numel() for matrix in matrices if matrix.requires_grad)


def _window(layer: nn.Module) -> int | None:
    """Return the window of a layer's attention; modules call it `sliding_window` and give it to our attention as it is."""
    for part in layer.modules():
        window = getattr(part, "sliding_window", None)
        if isinstance(window, int):
            return window
    return None


def _attention_kind(device_type: str, dtype: torch.dtype, *, dropout: bool) -> str:
    """How models/attention.py computes a packed batch: "varlen" (one call, nothing that is hidden), "grouped" (a fused kernel
    for each length; a window is a mask over all pairs), "plain" (grouped, by the written-out formula: all pairs, no scores
    computed again)."""
    if device_type == "cuda":
        return "varlen" if dtype in (torch.bfloat16, torch.float16) and not dropout else "grouped"
    return "plain" if dropout else "grouped"


def _lengths(batch: Any) -> list[tuple[int, int]]:
    """(length, sequences)"""
    if batch.packing is not None:
        return [(length, count) for length, _, count in batch.packing.groups]
    return list(Counter(batch.attention_mask_BS.sum(1).tolist()).items())


def _visible(model: Coefficients, lengths: Sequence[tuple[int, int]]) -> int:
    """Pairs that count, over all layers."""
    return sum(
        layers * sum(count * visible_pairs(length, model.causal, window) for length, count in lengths)
        for window, layers in model.windows
    )


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """(query, key) pairs of one sequence that attention may use; a window w: those less than w places apart."""
    reach = length if window is None else min(window, length)
    # Each place sees itself and the reach - 1 places before it, as far as there are any.
    before = (reach - 1) * length - reach * (reach - 1) // 2
    return length + before * (1 if causal else 2)


def _computed(model: Coefficients, lengths: Sequence[tuple[int, int]], padded: tuple[int, ...] | None, attention: str) -> int:
    """Pairs whose scores are computed, over all layers."""
    layers = sum(count for _, count in model.windows)
    if padded is not None:
        rows, length = padded
        return layers * rows * length * length
    if attention == "varlen":
        return _visible(model, lengths)
    if attention == "plain":
        return layers * sum(count * length * length for length, count in lengths)
    pairs = 0
    for window, layers in model.windows:
        for length, count in lengths:
            masked = window is not None and length > window
            pairs += layers * count * (length * length if masked else visible_pairs(length, model.causal, None))
    return pairs
