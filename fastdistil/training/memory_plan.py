"""What a recipe would need, without running it: parameters, memory, disk, updates. `fastdistil train --dry-run` prints it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import torch

from fastdistil.data.sources import CorpusSource
from fastdistil.data.tokenizer import load_tokenizer, token_facts
from fastdistil.kernels.linear_distill import workspace_bytes
from fastdistil.models import language_model, loading, students
from fastdistil.models.compiling import check_compiler
from fastdistil.models.vocabularies import check_heldout, check_tokenizers, shared_columns, teacher_rows
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
from fastdistil.training.inputs import check_cached, check_models, epochs_of, make_batches, open_cache, open_corpus


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
    recipe: Recipe, note: Callable[[str], None], *, teacher_config: Any = None, vocabulary: int | None = None
) -> MemoryPlan:
    """What a resolved recipe needs, from configurations and the corpus's size alone. Raises UserError.

    `vocabulary` stands in for a corpus, `teacher_config` for a teacher, that do not exist yet.
    """
    check_cached(recipe, own_models=False)
    check_compiler(recipe)
    cached = recipe.teacher is not None and recipe.teacher.cache is not None
    corpus = open_corpus(recipe.data.train, "size", "data.train") if vocabulary is None else None
    tokenizer = load_tokenizer(str(corpus.tokenizer_dir)) if corpus is not None else None
    facts = token_facts(tokenizer) if tokenizer is not None else None
    special_ids = students.special_ids(tokenizer) if tokenizer is not None else students.NO_IDS
    vocabulary = facts.vocab_size if facts is not None else vocabulary or 0
    if teacher_config is None and recipe.teacher is not None:
        teacher_config = loading.load_config(recipe.teacher.path)
    if corpus is not None:
        check_tokenizers(recipe, corpus, note)
        if recipe.data.heldout is not None:
            check_heldout(recipe, corpus, open_corpus(recipe.data.heldout, "size", "data.heldout"))
    student_config = students.student_config(recipe.student, teacher_config, vocabulary, special_ids)
    student_model = loading.without_weights(student_config)
    teacher_model = loading.without_weights(teacher_config) if teacher_config is not None else None
    rows_t, corpora = teacher_rows(recipe, teacher_model), [(corpus, facts)] if corpus is not None and facts is not None else []
    columns = shared_columns(recipe, rows_t, language_model.shape(student_model)[0], corpora, student_model.causal, note)
    check_models(recipe, teacher_model, student_model, corpus)
    if recipe.student.dropout is not None:
        students.set_dropout(student_model.module, recipe.student.dropout)
    student = transformer_shape(student_model)
    teacher = transformer_shape(teacher_model) if teacher_model is not None and not cached else None
    updates = recipe.loop.updates
    if corpus is not None and facts is not None:
        batches = make_batches(recipe, corpus, facts, student_model.causal)
        if cached:
            assert rows_t is not None
            open_cache(recipe, corpus, student_model.causal, rows_t, columns, epochs_of(recipe, batches))
        updates = CorpusSource(batches, "", torch.device("cpu")).updates(recipe.loop)
    longest = int(corpus.lengths.max()) if corpus is not None else 512
    return MemoryPlan(
        recipe=recipe,
        student=student,
        teacher=teacher,
        memory=estimate_memory(recipe, student, teacher, causal=student_model.causal, longest=longest),
        disk=estimate_disk(student, keep=recipe.checkpoint.keep),
        tokens=corpus.manifest.tokens if corpus is not None else None,
        sequences=len(corpus) if corpus is not None else None,
        updates=updates,
    )


def show_plan(
    recipe: Recipe, directory: Path, console: rich.console.Console, *, teacher_config: Any = None, vocabulary: int | None = None
) -> None:
    """Print a resolved recipe and `make_plan`'s estimates for it; `directory`: where the run would live. Raises UserError."""
    console.print(recipe.to_yaml(), markup=False, end="", soft_wrap=True)
    plan = make_plan(recipe, console.print, teacher_config=teacher_config, vocabulary=vocabulary)
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
    """Of each rank's compressor; `auto` has not chosen one yet."""
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
