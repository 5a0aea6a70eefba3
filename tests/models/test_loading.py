"""What is wrong with a checkpoint: refused on one line by evaluation, training and --dry-run, never taken for another model."""

import argparse
import errno
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdistil.errors import DiskFull, OutOfMemory, UserError
from fastdistil.evaluate import EvaluateOptions, evaluate
from fastdistil.models import language_model, loading
from fastdistil.training.inputs import resolve
from fastdistil.training.memory_plan import make_plan
from tests.models.families import CONFIGS, batch_of, build, every_family, logits, sequences
from tests.small_run import quiet, small

Weights = dict[str, torch.Tensor]
SELF = "bert.encoder.layer.{}.attention.self."
ZERO = torch.zeros(4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    for kind in ("bert", "gpt2", "llama"):
        loading.save_pretrained(language_model.LanguageModel(build(kind)), folder / kind)
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
        loading.load_model(str(path))
    assert name in str(caught.value)


def test_an_adapter_around_its_layer_is_no_missing_weight(saved: dict[str, Path], tmp_path: Path) -> None:
    name = SELF.format(0) + "query."
    added = {name + "base_layer.weight": ZERO, name + "lora_A.default.weight": ZERO.clone()}
    path = with_weights(saved["bert"], tmp_path / "model", added, drop=name + "weight")
    assert "merge_and_unload" in refusal(lambda: loading.load_model(str(path)))


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
    model = loading.load_model(str(path), note=notes.append)
    assert len(notes) == 1
    assert "passed over" in notes[0] and "\n" not in notes[0]
    batch = batch_of(sequences())
    torch.testing.assert_close(logits(model, batch), logits(loading.load_model(str(saved[kind])), batch), rtol=0, atol=0)


def test_a_whole_checkpoint_is_loaded_without_a_note(saved: dict[str, Path]) -> None:
    for path in saved.values():
        loading.load_model(str(path), note=lambda text: pytest.fail(text))


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
    loading.load_model(str(tmp_path / "model"), note=lambda text: pytest.fail(text))


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


# Configurations that transformers refuses

STRICT: dict[str, dict[str, Any]] = {
    "heads that do not divide": {"hidden_size": 30, "num_attention_heads": 4},
    "no heads": {"num_attention_heads": 0},
    "a number in quotes": {"num_hidden_layers": "2"},
    "an int for a float": {"layer_norm_eps": 0},
    "null": {"hidden_dropout_prob": None},
    "a float for an int": {"max_position_embeddings": 48.0},
    "a list of labels": {"id2label": ["a"]},
    "an unknown activation": {"hidden_act": "gelu_newest"},
    "an activation that is none": {"hidden_act": 3},
    "a negative size": {"intermediate_size": -64},
    "no layers": {"num_hidden_layers": 0},
    "less than no layers": {"num_hidden_layers": -1},
    "less than no heads": {"num_attention_heads": -1},
    "a vocabulary of text": {"vocab_size": "300"},
    "an unknown dtype": {"dtype": "float12"},
    "a padding token that is none": {"pad_token_id": 300},
    "a list of sizes": {"hidden_size": [32]},
    "a kind that is no text": {"model_type": 7},
    "an empty kind": {"model_type": ""},
    "a width of truth": {"hidden_size": True},
    "an unfit initializer": {"initializer_range": "small"},
    "positions of nobody": {"position_embedding_type": ["absolute"]},
}


@pytest.mark.parametrize("values", STRICT.values(), ids=STRICT)
def test_a_configuration_that_makes_no_model_is_one_line(values: dict[str, Any], material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model", **values)
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        assert str(path) in refusal(call)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"7", b"null", b'"bert"', b"{}", b"\xff\xfe{", b"[" * 100_000], ids=lambda text: str(text[:8])
)
def test_a_file_that_is_no_configuration_is_one_line(text: bytes, material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model")
    (path / "config.json").write_bytes(text)
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        assert str(path) in refusal(call)


def test_a_roberta_without_padding_has_no_positions(material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model", model_type="roberta", pad_token_id=None)
    assert "pad_token_id" in refusal(lambda: dry_run(material, path, tmp_path))


@pytest.mark.parametrize("kind", ["bert", "nobody"])
def test_code_of_a_checkpoint_is_never_run_and_nobody_is_asked(
    kind: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    code = {"AutoConfig": "code.Own", "AutoModelForMaskedLM": "code.Own"}
    path = copied(material / "teacher", tmp_path / "model", model_type=kind, auto_map=code)
    (path / "code.py").write_text("raise SystemExit('the code was run')\n")
    if kind == "bert":
        measure(material, path)
        return
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        assert "runs no code that comes with a checkpoint" in refusal(call)


@pytest.mark.parametrize(
    ("quantisation", "complaint"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel|autoawq"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto|accelerate"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
        ({"quant_method": "tomorrow's"}, 'no quant_method "tomorrow\'s"'),
        ({"bits": 4}, "quant_method"),
        ({}, "quant_method"),
        ("int8", "quantised"),
    ],
    ids=str,
)
def test_a_quantised_checkpoint_without_its_package_is_one_line(
    quantisation: Any, complaint: str, material: Path, tmp_path: Path
) -> None:
    path = copied(material / "teacher", tmp_path / "model", quantization_config=quantisation)
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        line = refusal(call)
        assert re.search(complaint, line)
        assert str(path) in line


# Damaged weights


def test_weights_whose_header_has_the_length_of_a_letter_are_no_web_page(saved: dict[str, Path], tmp_path: Path) -> None:
    """A safetensors file begins with its header's length: 0x3C is "<"."""
    folder = copied(saved["bert"], tmp_path / "model")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded_length = length + (0x3C - length) % 256
    path.write_bytes(
        padded_length.to_bytes(8, "little") + data[8 : 8 + length] + b" " * (padded_length - length) + data[8 + length :]
    )
    assert path.read_bytes().lstrip().startswith(b"<")
    loading.load_model(str(folder))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 440473133\n"
PAGE = b"\n<!DOCTYPE html><html><body>Access denied</body></html>"


def pickled(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


SAFETENSORS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda data: POINTER, "is a Git LFS pointer.*git lfs pull"),
    "page": (lambda data: PAGE, "is a web page"),
    "half": (halved, "damaged"),
    "nothing": (lambda data: b"", "the file is empty"),
    "noise": (lambda data: b"\x80" * 500, "damaged"),
    "a header of no JSON": (lambda data: data[:8] + b"[" * (len(data) - 8), "damaged"),
}
PICKLES: dict[str, tuple[Callable[[Weights], bytes], str]] = {
    "pointer": (lambda tensors: POINTER, "is a Git LFS pointer.*git lfs pull"),
    "page": (lambda tensors: PAGE, "is a web page"),
    "half": (lambda tensors: halved(pickled(tensors)), "the end of the file is missing"),
    "nothing": (lambda tensors: b"", "the file is empty"),
}
UNREAD_PICKLES: dict[str, tuple[Callable[[Weights], bytes], str]] = {
    "half of an old one": (lambda tensors: halved(pickled(tensors, _use_new_zipfile_serialization=False)), "damaged"),
    "noise": (lambda tensors: b"\x80\x02" + b"\x8a" * 500, "damaged"),
    "arguments": (
        lambda tensors: pickled({**tensors, "args": argparse.Namespace(lr=1)}),
        r"argparse.Namespace.*state_dict",
    ),
    "a training state": (lambda tensors: pickled({"model": tensors, "step": 3}), "type dict under 'model', not a tensor"),
    "a step": (lambda tensors: pickled({**tensors, "step": 3}), "type int under 'step', not a tensor"),
    "a list": (lambda tensors: pickled(list(tensors.values())), "type list, not a dictionary"),
    "one tensor": (lambda tensors: pickled(ZERO), "type Tensor, not a dictionary"),
    "numbers for names": (lambda tensors: pickled(dict(enumerate(tensors.values()))), "cannot be loaded"),
}
"""What shows only when the tensors are read: --dry-run does not."""
DAMAGED = [
    *(("model.safetensors", damage, False) for damage in SAFETENSORS),
    *(("pytorch_model.bin", damage, False) for damage in PICKLES | UNREAD_PICKLES),
    *(("model.safetensors", damage, True) for damage in ("pointer", "half")),
    *(("pytorch_model.bin", damage, True) for damage in ("pointer", "half", "a training state")),
]


@pytest.mark.parametrize(("name", "damage", "sharded"), DAMAGED, ids=str)
def test_damaged_weights_are_one_line(name: str, damage: str, sharded: bool, material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model")
    weights = path / "model.safetensors"
    tensors, data = load_file(weights), weights.read_bytes()
    weights.unlink()
    make: Any
    if name == "model.safetensors":
        (make, complaint), source = SAFETENSORS[damage], data
    else:
        (make, complaint), source = (PICKLES | UNREAD_PICKLES)[damage], tensors
    if sharded:  # behind a shard that is whole
        stem, suffix = name.split(".")
        first, second = (f"{stem}-{number:05d}-of-00002.{suffix}" for number in (1, 2))
        (path / first).write_bytes(data if name == "model.safetensors" else pickled(tensors))
        places = dict.fromkeys(tensors, first) | {"another": second}
        (path / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        name = second
    (path / name).write_bytes(make(source))
    line = refusal(lambda: measure(material, path))
    assert re.search(complaint, line)
    assert str(path) in line
    if name.endswith(".bin") and damage in UNREAD_PICKLES:
        dry_run(material, path, tmp_path)
    else:
        assert refusal(lambda: dry_run(material, path, tmp_path)) == line


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": "gone.bin"}}'],
)
def test_a_damaged_index_is_one_line(text: str, material: Path, tmp_path: Path) -> None:
    path = copied(material / "teacher", tmp_path / "model")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(text)
    for call in (lambda: measure(material, path), lambda: dry_run(material, path, tmp_path)):
        assert re.search("no index of weights|gone.bin is missing", refusal(call))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), UserError),
        (EOFError(), UserError),
        (RecursionError("maximum recursion depth exceeded"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
def test_what_is_no_fault_of_the_checkpoint_stays_what_it_is(
    error: BaseException, expected: type[BaseException], saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForMaskedLM.from_pretrained", fail)
    with pytest.raises(expected):
        loading.load_model(str(saved["bert"]))


def test_an_error_of_our_own_is_not_told_as_the_users(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("fastdistil.models.language_model.LanguageModel.__init__", fail)
    with pytest.raises(TypeError, match="a bug"):
        loading.load_model(str(saved["bert"]))
