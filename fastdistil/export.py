"""The finished student as a directory that transformers loads without fastdistil, with a card that says how it was made."""

from pathlib import Path

import torch

from fastdistil import __version__, models
from fastdistil.checkpoint import atomic_directory
from fastdistil.errors import printable
from fastdistil.evaluate import HeldOut
from fastdistil.inputs import Inputs
from fastdistil.recipe import Recipe


def export_student(inputs: Inputs, recipe: Recipe, target: Path, found: HeldOut | None, *, updates: int, tokens: int) -> None:
    """Write weights, configuration, tokenizer and README.md to `target`, all or nothing."""
    with atomic_directory(target) as directory:
        models.save_pretrained(inputs.student, directory)
        if inputs.tokenizer is not None:
            inputs.tokenizer.save_pretrained(directory)
        card = printable(model_card(inputs, recipe, found, updates, tokens))
        (directory / "README.md").write_text(card, encoding="utf-8")


def model_card(inputs: Inputs, recipe: Recipe, found: HeldOut | None, updates: int, tokens: int) -> str:
    teacher = f"distilled from `{recipe.teacher.path}`" if recipe.teacher is not None else "trained without a teacher"
    tag = "text-generation" if inputs.student.causal else "fill-mask"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {tag}",
        "tags: [fastdistil, distillation]",
        "---",
        "",
        f"# {target_name(recipe)}",
        "",
        (
            f"A language model {teacher} with fastdistil {__version__} (torch {torch.__version__}, {inputs.device.type}, "
            f"{recipe.loop.precision}): {models.parameter_count(inputs.student):,} parameters, {updates:,} updates, "
            f"{tokens:,} training tokens."
        ),
        "",
        "## Measured on held-out text",
        "",
    ]
    if found is None:
        lines += ["Nothing was measured: the recipe names no held-out corpus.", ""]
    else:
        kind = "next-token" if inputs.student.causal else "masked-token"
        lines += [
            f"| {kind} loss | perplexity | predicted tokens | KL to the teacher |",
            "|---|---|---|---|",
            f"| {found.loss:.4f} ± {found.loss_se:.4f} | {found.perplexity:.2f} | {found.labels:,} | "
            + (f"{found.kl:.4f} ± {found.kl_se:.4f} |" if found.kl is not None else "not measured |"),
            "",
            f"Corpus: `{recipe.data.heldout}`, {found.sequences:,} sequences; ± is one standard error.",
            "",
        ]
    return "\n".join([*lines, "## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""])


def target_name(recipe: Recipe) -> str:
    return recipe.name or "student"
