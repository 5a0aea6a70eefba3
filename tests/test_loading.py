"""What is wrong with a checkpoint: refused on one line by evaluation, training and --dry-run, never taken for another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdistil import models
from fastdistil.errors import UserError
from fastdistil.estimate import make_plan
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.inputs import resolve
from tests.small_run import quiet, small
from tests.test_models import CONFIGS, batch_of, build, every_family, logits, sequences

Weights = dict[str, torch.Tensor]
SELF = "bert.encoder.layer.{}.attention.self."
ZERO = torch.zeros(4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    for kind in ("bert", "gpt2", "llama"):
        models.save_pretrained(models.LanguageModel(build(kind)), folder / kind)
    return {kind: folder / kind for kind in ("bert", "gpt2", "llama")}


def copied(source: Path, folder: Path, **config: Any) -> Path:
    """A checkpoint with other values in its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def with_weights(source: Path, folder: Path, added: Weights, *, drop: str = "", pickled: bool = False) -> Path:
    copied(source, folder)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name != drop} | added
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dry_run(material: Path, path: Path, runs: Path) -> None:
    make_plan(resolve(small(material, runs, f"teacher.path={path}")), lambda text: None)


def measure(material: Path, path: Path) -> None:
    evaluate(str(path), [str(material / "heldout")], EvaluateOptions(positions=0, precision="fp32"))


def refusal(call: Callable[[], object]) -> str:
    """The one line with which a call refuses."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Weights that the architecture has no place for

NEEDED = {
    "relative positions": ("bert", SELF.format(1) + "distance_embedding.weight", "no place for"),
    "a layer": ("bert", "bert.encoder.layer.4.output.dense.weight", "in layers behind the 4 that config.json has"),
    "a layer of GPT-2": ("gpt2", "transformer.h.4.attn.c_attn.weight", "in layers behind the 4"),
    "a layer of LLaMA": ("llama", "model.layers.17.mlp.up_proj.weight", "in layers behind the 4"),
    "an adapter": ("bert", SELF.format(0) + "query.lora_A.default.weight", "merge the adapter first .*merge_and_unload"),
    "an adapter of GPT-2": ("gpt2", "transformer.h.0.attn.c_attn.lora_B.default.weight", "merge the adapter first"),
    "another adapter": ("llama", "model.layers.0.mlp.down_proj.ia3_l.default", "merge the adapter first"),
    "biases": ("llama", "model.layers.0.self_attn.q_proj.bias", "no place for"),
    "norms": ("llama", "model.layers.0.self_attn.q_norm.weight", "no place for"),
    "task embeddings": ("bert", "bert.embeddings.task_type_embeddings.weight", "no place for"),
    "an unheard-of part": ("gpt2", "transformer.h.0.mixture.weight", "no place for"),
}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("kind", "name", "complaint"), NEEDED.values(), ids=NEEDED)
def test_weights_without_a_place_are_refused_by_name(
    kind: str, name: str, complaint: str, pickled: bool, saved: dict[str, Path], tmp_path: Path
) -> None:
    path = with_weights(saved[kind], tmp_path / "model", {name: ZERO}, pickled=pickled)
    with pytest.raises(UserError, match=complaint) as caught:
        models.load_model(str(path))
    assert name in str(caught.value)


def test_an_adapter_around_its_layer_is_no_missing_weight(saved: dict[str, Path], tmp_path: Path) -> None:
    name = SELF.format(0) + "query."
    added = {name + "base_layer.weight": ZERO, name + "lora_A.default.weight": ZERO.clone()}
    path = with_weights(saved["bert"], tmp_path / "model", added, drop=name + "weight")
    assert "merge_and_unload" in refusal(lambda: models.load_model(str(path)))


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_the_directory_of_an_adapter_is_called_one(
    beside_a_model: bool, saved: dict[str, Path], material: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    if beside_a_model:
        copied(saved["bert"], path)
    else:
        path.mkdir()
        save_file({"base_model.model.query.lora_A.weight": ZERO}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "bert-base-uncased"}')
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        assert "holds an adapter (adapter_config.json)" in refusal(call)


HARMLESS = {
    "bert": [
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
        "bert.pooler.dense.weight",
        "bert.embeddings.position_ids",
        "classifier.bias",
    ],
    "gpt2": [
        "transformer.h.0.attn.bias",
        "transformer.h.1.attn.masked_bias",
        "multiple_choice_head.summary.weight",
        "v_head.summary.bias",
    ],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight", "mtp.layers.0.mlp.up_proj.weight"],
}


@pytest.mark.parametrize("kind", HARMLESS)
@torch.no_grad()
def test_weights_that_no_logit_needs_are_passed_over_and_said(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    path = with_weights(saved[kind], tmp_path / "model", {name: ZERO.clone() for name in HARMLESS[kind]})
    notes: list[str] = []
    model = models.load_model(str(path), note=notes.append)
    assert len(notes) == 1
    assert "passed over" in notes[0] and "\n" not in notes[0]
    batch = batch_of(sequences())
    torch.testing.assert_close(logits(model, batch), logits(models.load_model(str(saved[kind])), batch), rtol=0, atol=0)


def test_a_whole_checkpoint_is_loaded_without_a_note(saved: dict[str, Path]) -> None:
    for path in saved.values():
        models.load_model(str(path), note=lambda text: pytest.fail(text))


def test_names_of_old_checkpoints_are_no_strangers(saved: dict[str, Path], tmp_path: Path) -> None:
    """Norms were called gamma and beta once: transformers renames them."""
    copied(saved["bert"], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    new_names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in tensors.items():
        for new, former in new_names.items():
            name = name.replace(new, former)
        old[name] = tensor
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    models.load_model(str(tmp_path / "model"), note=lambda text: pytest.fail(text))


@every_family
def test_transformers_hides_no_weight_of_these_families(kind: str) -> None:
    """It leaves names on lists of its own out of its report: for what we train, no more than GPT-2's causal masks."""
    model = build(kind)
    assert set(model._keys_to_ignore_on_load_unexpected or ()) <= {"attn.bias", "crossattention.bias"}
    assert not model._keys_to_ignore_on_load_missing
    assert kind in CONFIGS


def test_evaluation_and_students_look_at_weights_too(material: Path, tmp_path: Path) -> None:
    path = with_weights(material / "teacher", tmp_path / "model", {SELF.format(0) + "distance_embedding.weight": ZERO})
    assert "distance_embedding" in refusal(lambda: measure(material, path))
    student = small(material, tmp_path / "runs", f"student.path={path}", "student.every=null")
    assert "distance_embedding" in refusal(lambda: quiet(student))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "alibi"])
def test_positions_that_transformers_no_longer_has_are_refused(kind: str, material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model", position_embedding_type=kind)
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        assert f"position_embedding_type={kind}" in refusal(call)


def test_absolute_positions_may_be_spelt_out(material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model", position_embedding_type="absolute")
    dry_run(material, path, tmp_path)
