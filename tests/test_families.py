"""Whole tiny runs of each model family and of each shipped recipe: trained, saved, continued, loaded again, evaluated."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.models.language_model import FAMILIES
from fastdistil.recipe import Recipe, load_recipe, named_recipes
from tests.small_run import assert_same_bits, events, quiet, saved_state, small

WIDTH, POSITIONS, VOCABULARY = 32, 64, 300
SIZES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": POSITIONS}
GROUPED_QUERIES = {**SIZES, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": {**SIZES, "type_vocab_size": 1, "pad_token_id": 0},
    "distilbert": {"dim": WIDTH, "hidden_dim": 48, "n_heads": 2, "max_position_embeddings": POSITIONS},
    "modernbert": {**SIZES, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    "gpt2": {"n_embd": WIDTH, "n_head": 2, "n_positions": POSITIONS},
    "llama": GROUPED_QUERIES,
    "qwen2": GROUPED_QUERIES,
    "qwen3": {**GROUPED_QUERIES, "head_dim": 16},
}
# Recipe -> its teacher's family and layers, its student's class and layers.
SHIPPED = {
    "bert-small": (None, 0, "BertForMaskedLM", 4),
    "distil-small": ("bert", 4, "BertForMaskedLM", 2),
    "distilbert": ("bert", 12, "DistilBertForMaskedLM", 6),
    "distilroberta": ("roberta", 12, "RobertaForMaskedLM", 6),
    "distilgpt2": ("gpt2", 12, "GPT2LMHeadModel", 6),
}


def make_teacher(kind: str, layers: int, folder: Path) -> Path:
    torch.manual_seed(1)
    depth = {FAMILIES[kind].depth: layers}
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **CONFIGS[kind], **depth)
    auto: Any = transformers.AutoModelForCausalLM if FAMILIES[kind].causal else transformers.AutoModelForMaskedLM
    auto.from_config(config).save_pretrained(folder)
    return folder


def check_whole_run(recipe: Recipe, material: Path, frozen: str | None = None) -> Any:
    """Run two updates, then the second one again from the first one's checkpoint; return the student as transformers loads it.

    frozen: what is in the names of the only weights that do not move.
    """
    result = quiet(recipe)
    first, second = (saved_state(result.run_dir, update) for update in (1, 2))
    weights = [name for name in first if name.startswith("model.")]
    assert len(weights) > 10
    for name in weights:
        assert torch.equal(first[name], second[name]) == (frozen is not None and frozen in name), name
    quiet(recipe, resume=result.run_dir / "checkpoints" / "step-00000001")
    assert_same_bits(saved_state(result.run_dir, 2), second)
    (resumed,) = events(result.run_dir, "resume")
    assert resumed["update"] == 1

    options = EvaluateOptions(device="cpu", precision="fp32", positions=20)
    (measured,) = evaluate(str(result.run_dir / "student"), [str(material / "heldout")], options).corpora
    loss = measured.heldout if measured.causal is None else measured.causal
    assert loss is not None and 0 < loss.loss < 2 * math.log(VOCABULARY)
    auto: Any = transformers.AutoModelForMaskedLM if measured.causal is None else transformers.AutoModelForCausalLM
    student = auto.from_pretrained(result.run_dir / "student")
    assert_same_bits(student.state_dict(), result.student.state_dict())
    return student


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_trains(kind: str, material: Path, tmp_path: Path) -> None:
    overrides = ["loop.updates=2", "checkpoint.every=1", "checkpoint.keep=9", "student.every=null", "student.layers=[0,2]"]
    if FAMILIES[kind].causal:
        overrides += ["objective.a_mlm=0", "objective.a_clm=2"]
    teacher = make_teacher(kind, 3, tmp_path / "teacher")
    student = check_whole_run(small(material, tmp_path, f"teacher.path={teacher}", *overrides), material)
    assert (student.config.model_type, student.config.num_hidden_layers) == (kind, 2)


@pytest.mark.parametrize("name", SHIPPED)
def test_each_recipe_trains_as_it_is_shipped(name: str, material: Path, tmp_path: Path) -> None:
    """But for its texts, the widths of its models, and how long it takes."""
    family, teacher_layers, student_class, student_layers = SHIPPED[name]
    overrides = [f"data.train={material / 'train'}", f"data.heldout={material / 'heldout'}", "data.micro_batch_tokens=512"]
    overrides += ["loop.updates=2", "loop.accumulation=2", "checkpoint.every=1", "checkpoint.keep=9", "logging.every=1"]
    overrides += [f"runs_dir={tmp_path}", "device=cpu"]
    if family is not None:
        overrides.append(f"teacher.path={make_teacher(family, teacher_layers, tmp_path / 'teacher')}")
    else:
        narrow = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2}
        overrides += [f"student.config.{key}={size}" for key, size in narrow.items()]
    recipe = load_recipe(name, overrides)
    frozen = {"gpt2": "wpe"}.get(family or "", "position_embeddings") if recipe.student.freeze_positions else None
    student = check_whole_run(recipe, material, frozen)
    assert (type(student).__name__, student.config.num_hidden_layers) == (student_class, student_layers)


def test_no_shipped_recipe_is_forgotten() -> None:
    assert {*SHIPPED, "demo", "demo-teacher"} == set(named_recipes()), "the demo's two are run by test_demo.py"
