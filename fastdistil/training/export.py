"""The finished student as a directory that transformers loads without fastdistil, with a card that says how it was made."""

from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from fastdistil import __version__
from fastdistil.data.corpus import Corpus
from fastdistil.data.tokenizer import difference_as_loaded, save_tokenizer
from fastdistil.errors import printable
from fastdistil.models import language_model, loading
from fastdistil.models.perplexity import HeldOut
from fastdistil.models.student_checks import check_saved
from fastdistil.recipe import Recipe
from fastdistil.redaction import redacted
from fastdistil.training.checkpoint import atomic_directory
from fastdistil.training.inputs import Inputs


def export_student(
    inputs: Inputs,
    recipe: Recipe,
    target: Path,
    heldout_scores: HeldOut | None,
    *,
    updates: int,
    tokens: int,
    note: Callable[[str], None] = print,
) -> None:
    """Write weights, configuration, tokenizer and README.md to `target`, all or nothing, and load them as a user will.

    The tokenizer is read again as users read it; where that gives other ids than the corpus has, `note` and README.md say so.
    Raises UserError where transformers cannot load or run the student, or computes something else.
    """
    with atomic_directory(target) as directory:
        loading.save_pretrained(inputs.student, directory)
        card = _model_card(inputs, recipe, heldout_scores, updates, tokens)
        if (corpus := inputs.data.first) is not None:
            save_tokenizer(corpus.tokenizer, directory)
            if (difference := difference_as_loaded(corpus.tokenizer, directory, _texts(corpus))) is not None:
                advice = (
                    f"AutoTokenizer makes another tokenizer of these files than the model was trained with ({difference}); "
                    "load them with PreTrainedTokenizerFast.from_pretrained"
                )
                note(f"the student's tokenizer: {advice}")
                card += f"\n## Tokenizer\n\n{advice}.\n"
        (directory / "README.md").write_text(printable(card), encoding="utf-8")
    if isinstance(inputs.student, language_model.LanguageModel):
        check_saved(inputs.student, target)


def _texts(corpus: Corpus) -> list[str]:
    """Some texts of a corpus, as its tokens spell them."""
    return [str(corpus.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in corpus.sample(20)]


def _model_card(inputs: Inputs, recipe: Recipe, heldout: HeldOut | None, updates: int, tokens: int) -> str:
    public = redacted(recipe.model_dump(mode="json"))
    teacher = f"distilled from `{public['teacher']['path']}`" if recipe.teacher is not None else "trained without a teacher"
    tag = "text-generation" if inputs.student.causal else "fill-mask"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {tag}",
        "tags: [fastdistil, distillation]",
        "---",
        "",
        f"# {_target_name(recipe)}",
        "",
        (
            f"A language model {teacher} with fastdistil {__version__} (torch {torch.__version__}, {inputs.device.type}, "
            f"{recipe.loop.precision}): {language_model.parameter_count(inputs.student):,} parameters, {updates:,} updates, "
            f"{tokens:,} training tokens."
        ),
        "",
        "## Measured on held-out text",
        "",
    ]
    if heldout is None:
        lines += ["Nothing was measured: the recipe names no held-out corpus.", ""]
    else:
        kind = "next-token" if inputs.student.causal else "masked-token"
        lines += [
            f"| {kind} loss | perplexity | predicted tokens | KL to the teacher |",
            "|---|---|---|---|",
            f"| {heldout.loss:.4f} ± {heldout.loss_se:.4f} | {heldout.perplexity:.2f} | {heldout.labels:,} | "
            + (f"{heldout.kl:.4f} ± {heldout.kl_se:.4f} |" if heldout.kl is not None else "not measured |"),
            "",
            f"Corpus: `{public['data']['heldout']}`, {heldout.sequences:,} sequences; ± is one standard error.",
            "",
        ]
    text = yaml.safe_dump(public, sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "## Recipe", "", "```yaml", text.rstrip(), "```", ""])


def _target_name(recipe: Recipe) -> str:
    return recipe.name or "student"
