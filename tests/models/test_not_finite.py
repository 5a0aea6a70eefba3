"""A teacher, a cache or an evaluation that is not finite is told as such, with the weight, layer or sequence."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from fastdistil import distil, train
from fastdistil.data.corpus import Corpus
from fastdistil.data.tokenizer import load_tokenizer, token_facts
from fastdistil.errors import NonFinite
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.models.language_model import LanguageModel
from fastdistil.models.loading import load_model
from fastdistil.models.perplexity import held_out
from fastdistil.storage import file_sha256
from fastdistil.training.cache_teacher import cache_teacher
from tests.small_run import TinyModel, events, quiet, small

SHORT = ("loop.updates=3", "evaluation.every=null", "data.heldout=null", "logging.every=3", "checkpoint.every=null")


def broken_teacher(material: Path, place: Path, change: Callable[[Any], None]) -> Path:
    model = transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher")
    with torch.no_grad():
        change(model)
    model.save_pretrained(place)
    load_tokenizer(material / "teacher").save_pretrained(place)
    return place


def nan_weight(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.weight[3] = math.nan


def inf_bias(model: Any) -> None:
    model.cls.predictions.decoder.bias[7] = math.inf


def overflow(model: Any) -> None:
    """Finite weights: the norm behind them squares what they give."""
    model.bert.encoder.layer[1].output.dense.weight.mul_(1e30)


NAMES = [
    (nan_weight, r"its weight bert\.encoder\.layer\.1\.output\.dense\.weight holds nan"),
    (inf_bias, r"its weight cls\.predictions\.\S*bias holds inf"),
    (overflow, r"the output of its bert\.encoder\.layer\.1\.output\.LayerNorm holds nan"),
]


@pytest.mark.parametrize(("change", "says"), NAMES)
def test_training_names_the_teacher(change: Callable[[Any], None], says: str, material: Path, tmp_path: Path) -> None:
    teacher = broken_teacher(material, tmp_path / "broken", change)
    more = ("loop.nonfinite=skip", "loop.nonfinite_limit=1") if change is overflow else ()
    with pytest.raises(NonFinite, match=rf"the teacher {teacher} is not finite: {says}") as caught:
        quiet(small(material, tmp_path, f"teacher.path={teacher}", *SHORT, *more))
    assert "optim.lr" not in str(caught.value) and "\n" not in str(caught.value)
    assert events(tmp_path / "run", "nonfinite")[0]["message"] == str(caught.value)


def test_a_teacher_from_python_is_named_too(tmp_path: Path) -> None:
    class Overflowing(TinyModel):
        def transform(self, hidden_ND: Tensor) -> Tensor:
            return hidden_ND * math.inf

    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 10))
    with pytest.raises(NonFinite, match=r"the teacher \(a \S*Overflowing given from Python\) is not finite: its logits"):
        distil(
            "distilbert",
            teacher=Overflowing(50, 16),
            student=TinyModel(50, 16),
            corpus=[{"input_ids": ids, "labels": ids}] * 2,
            loop={"updates": 2, "precision": "fp32"},
            runs_dir=str(tmp_path),
            device="cpu",
        )


@pytest.mark.parametrize(("change", "says"), NAMES)
def test_a_cache_is_not_made_of_it(change: Callable[[Any], None], says: str, material: Path, tmp_path: Path) -> None:
    teacher = broken_teacher(material, tmp_path / "broken", change)
    with pytest.raises(NonFinite, match=rf"the teacher {teacher} is not finite in epoch 0, sequence \d+ .*: {says}"):
        cache_teacher(small(material, tmp_path, f"teacher.path={teacher}", *SHORT), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_a_cache_that_holds_nan_is_named_and_made_again(material: Path, tmp_path: Path) -> None:
    """As one of an earlier version may."""
    cache = tmp_path / "cache"
    recipe = small(material, tmp_path, *SHORT, "objective.a_cos=0")
    cache_teacher(recipe, cache)
    shard = cache / "0-00000.npy"
    right = shard.read_bytes()
    values = np.load(shard)
    values["tail"] = math.nan
    np.save(shard, values)
    shard.with_suffix(".json").write_text(json.dumps({"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}))
    with pytest.raises(NonFinite, match=rf"the teacher's cache {cache} holds nan there; run fastdistil cache-teacher"):
        quiet(recipe.with_(teacher={"cache": str(cache)}))
    assert cache_teacher(recipe, cache).made == 1
    assert shard.read_bytes() == right
    assert quiet(recipe.with_(teacher={"cache": str(cache)}), resume="auto").updates == 3


@pytest.mark.parametrize("positions", [0, "all"])
def test_evaluate_names_the_sequence(positions: Any, material: Path, tmp_path: Path) -> None:
    """Only the longest sequences have a token at the position whose embedding is broken."""
    corpus = Corpus.open(material / "heldout")
    longest = int(corpus.lengths.max())
    assert (corpus.lengths < longest).any()

    def break_last_position(model: Any) -> None:
        model.bert.embeddings.position_embeddings.weight[longest - 1] = math.nan

    model = broken_teacher(material, tmp_path / "broken", break_last_position)
    options = EvaluateOptions(positions=positions, device="cpu", precision="fp32")
    with pytest.raises(
        NonFinite, match=r"heldout: sequence \d+ .*position_embeddings\.weight holds nan.*begins: '.+'"
    ) as caught:
        evaluate(str(model), [str(material / "heldout")], options)
    sequence = int(str(caught.value).split("sequence ")[1].split()[0])
    assert corpus.lengths[sequence] == longest


def test_evaluate_names_a_causal_models_layer(material: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=300, n_layer=2, n_embd=32, n_head=2, n_positions=48)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.h[0].mlp.c_proj.weight.data.mul_(1e30)
    model.save_pretrained(tmp_path / "gpt")
    load_tokenizer(material / "teacher").save_pretrained(tmp_path / "gpt")
    (tmp_path / "text.txt").write_text("A cup of coffee, and another one.\n")
    options = EvaluateOptions(device="cpu", precision="fp32")
    with pytest.raises(NonFinite, match=r"text\.txt: sequence 0 .*its transformer\.h\.1\.ln_1 holds nan"):
        evaluate(str(tmp_path / "gpt"), [str(tmp_path / "text.txt")], options)


def test_a_divergence_from_a_teacher_that_is_not_finite_is_no_number(material: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(material / "heldout")
    facts = token_facts(load_tokenizer(corpus.tokenizer_dir))
    teacher = load_model(str(broken_teacher(material, tmp_path / "broken", overflow)))
    student: LanguageModel = load_model(str(material / "teacher"))
    with pytest.raises(
        NonFinite, match=r"divergence of nan: of the teacher, the output of its bert\.encoder\.layer\.1\.output"
    ):
        held_out(student, corpus, facts, teacher=teacher)
    assert math.isfinite(held_out(student, corpus, facts, teacher=student).loss)


def test_a_run_whose_evaluation_is_not_finite(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops, saved; as advised it goes on without such evaluations, and its student is saved."""

    def not_finite(*_: Any, **__: Any) -> None:
        raise NonFinite("sequence 3 (from 0) has a loss or divergence of nan")

    monkeypatch.setattr(train, "held_out", not_finite)
    recipe = small(material, tmp_path, "loop.updates=3", "evaluation.every=2")
    with pytest.raises(
        NonFinite, match=r"evaluating after update 2: sequence 3 .*saved, continue with .* loop\.nonfinite=skip"
    ):
        quiet(recipe)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    result = quiet(recipe.with_(loop={"nonfinite": "skip"}), resume="auto")
    assert (result.updates, result.evaluation) == (3, None)
    assert (tmp_path / "run" / "student" / "config.json").is_file()
    assert "going on without this evaluation" in events(tmp_path / "run", "note")[-1]["message"]
