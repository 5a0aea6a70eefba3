"""What a recipe would need, without running it: parameters, memory, disk, updates. `fastdistil train --dry-run` prints it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import torch
from torch import nn

from fastdistil.kernels.linear_distill import workspace_bytes
from fastdistil.models import language_model
from fastdistil.profiling.memory_estimate import (
    DiskEstimate,
    MemoryEstimate,
    Shape,
    estimate_disk,
    estimate_training_memory,
    whole_logits_bytes,
)
from fastdistil.profiling.quantities import size_text
from fastdistil.recipe import Recipe
from fastdistil.training.inputs import Data, check_recipe, load_models, open_data, window_source


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A recipe with what it would need."""

    recipe: Recipe
    student: Shape
    teacher: Shape | None
    """None: there is none, or its cache stands in for it."""
    memory: MemoryEstimate
    disk: DiskEstimate
    tokens: int | None
    """Of the corpus, as `sequences`; None where there is no corpus yet."""
    sequences: int | None
    updates: int | None
    """None: not known without a corpus."""


def make_plan(
    recipe: Recipe, note: Callable[[str], None], *, data: Data | None = None, teacher: nn.Module | None = None
) -> MemoryPlan:
    """What a resolved recipe needs, from configurations and the corpus's size alone. Raises UserError.

    `data`, `teacher` (without weights) stand in for those that do not exist yet.
    """
    check_recipe(recipe, ["teacher"] if teacher is not None else [])
    if data is None:
        data = open_data(recipe.with_(data={"verify": "size"}), note)
    models = load_models(recipe, data, note, teacher=teacher, shapes_only=("teacher", "student"))
    student = transformer_shape(models.student)
    teacher_shape = transformer_shape(models.teacher) if models.teacher is not None else None
    corpus, updates = data.train, recipe.loop.updates
    if corpus is not None:
        updates = window_source(recipe, data, models, note).updates(recipe.loop)
    longest = int(corpus.lengths.max()) if corpus is not None else 512
    return MemoryPlan(
        recipe=recipe,
        student=student,
        teacher=teacher_shape,
        memory=estimate_memory(recipe, student, teacher_shape, causal=models.causal, longest=longest),
        disk=estimate_disk(student, keep=recipe.checkpoint.keep),
        tokens=corpus.manifest.tokens if corpus is not None else None,
        sequences=len(corpus) if corpus is not None else None,
        updates=updates,
    )


def show_plan(
    recipe: Recipe,
    directory: Path,
    console: rich.console.Console,
    *,
    data: Data | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """Print a resolved recipe and `make_plan`'s estimates for it; `directory`: where the run would live. Raises UserError."""
    console.print(recipe.to_yaml(), markup=False, end="", soft_wrap=True)
    plan = make_plan(recipe, console.print, data=data, teacher=teacher)
    table = rich.table.Table(
        "estimate", "", title=f"{directory} (nothing was started)", title_justify="left", show_header=False
    )
    if plan.tokens is not None:
        table.add_row("corpus", f"{plan.tokens:,} tokens in {plan.sequences:,} sequences")
    if plan.updates is not None:
        cut = f"{recipe.loop.accumulation} micro-batches of up to {recipe.data.micro_batch_tokens:,} tokens"
        table.add_row("updates", f"{plan.updates:,} of {cut}")
    table.add_row("student parameters", f"{plan.student.parameters:,}")
    cached = recipe.teacher is not None and recipe.teacher.cache is not None
    placeholder = "cached" if cached else "none"
    table.add_row("teacher parameters", f"{plan.teacher.parameters:,}" if plan.teacher is not None else placeholder)
    for name, size in vars(plan.memory).items():
        table.add_row(f"memory: {name.replace('_', ' ')}", size_text(size))
    table.add_row("memory: total", size_text(plan.memory.total))
    table.add_row("disk: one checkpoint", size_text(plan.disk.checkpoint))
    table.add_row("disk: run at its fullest", size_text(plan.disk.total))
    console.print(table)


def estimate_memory(recipe: Recipe, student: Shape, teacher: Shape | None, *, causal: bool, longest: int) -> MemoryEstimate:
    """Bytes that a resolved recipe needs with these models; `teacher`: None where it does not run; `longest`: tokens of the
    longest sequence."""
    rows = recipe.data.micro_batch_tokens
    only_labels = not recipe.objective.a_ce or recipe.objective.soft_rows == "masked"
    logit_rows = int(rows * recipe.mask.probability) if only_labels and not causal else rows
    return estimate_training_memory(
        student=student,
        teacher=teacher,
        rows=rows,
        compute_dtype=language_model.DTYPES[recipe.loop.precision],
        teacher_dtype=language_model.DTYPES[recipe.teacher.dtype] if recipe.teacher is not None else torch.float32,
        on_gpu=recipe.device == "cuda",
        sequence_length=longest,
        logits=_logits_bytes(recipe, logit_rows, student, teacher),
        residuals=_residual_bytes(recipe, student.parameters),
    )


def _residual_bytes(recipe: Recipe, parameters: int) -> int:
    """Return the bytes of the residuals of each rank's compressor; `auto` has not chosen one yet."""
    config, ranks = recipe.compression, recipe.world.ranks or 1
    if config.kind in ("none", "auto") or not config.error_feedback or ranks == 1:
        return 0
    # int8 reduces in two phases, and keeps what the second leaves out of its own part, too.
    return 4 * parameters + (4 * parameters // ranks if config.kind == "int8" else 0)


def _logits_bytes(recipe: Recipe, rows: int, student: Shape, teacher: Shape | None) -> int:
    dtype = language_model.DTYPES[recipe.loop.precision]
    if recipe.kernels == "reference":
        return whole_logits_bytes(rows, student.vocabulary, dtype)
    itemsizes = dtype.itemsize
    if teacher is not None and recipe.teacher is not None and recipe.objective.a_ce:
        itemsizes += language_model.DTYPES[recipe.teacher.dtype].itemsize
    return workspace_bytes(rows, student.vocabulary, student.hidden, itemsizes, torch.device(recipe.device))


def transformer_shape(model: language_model.LanguageModel) -> Shape:
    """What memory estimates need to know of a model."""
    config: Any = model.module.config
    hidden = int(config.hidden_size)
    inner = (
        getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or getattr(config, "n_inner", None)
    )
    dropouts = {name: value for name, value in config.to_dict().items() if "dropout" in name or name.endswith("pdrop")}
    attention = {name for name in dropouts if name.startswith("att")}
    return Shape(
        parameters=language_model.parameter_count(model),
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        intermediate=int(inner or 4 * hidden),
        heads=int(config.num_attention_heads),
        vocabulary=int(config.vocab_size),
        dropout=any(value for name, value in dropouts.items() if name not in attention),
        attention_dropout=any(dropouts[name] for name in attention),
        gelu_written_out=config.model_type == "gpt2",
        gated=config.model_type in ("modernbert", "llama", "qwen2", "qwen3"),
    )
