"""Models as files: what transformers loads of ours, and what cannot be loaded is one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from fastdistil.errors import UserError
from fastdistil.models import loading, students
from fastdistil.models.language_model import LanguageModel
from tests.models.families import (
    DEPTH,
    VOCABULARY,
    auto,
    batch_of,
    build,
    config_of,
    every_family,
    logits,
    own_logits,
    sequences,
)


@every_family
@torch.no_grad()
def test_a_saved_student_loads_without_fastdistil(kind: str, tmp_path: Path) -> None:
    teacher = LanguageModel(build(kind).bfloat16())
    student = students.fewer_layers(teacher.module, [0, 3]).eval()
    loading.save_pretrained(student, tmp_path)
    plain, report = auto(kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "fastdistil" not in (tmp_path / "config.json").read_text()
    assert plain.dtype == torch.float32
    texts = sequences()
    truth = own_logits(plain.double(), texts)
    again = loading.load_model(str(tmp_path))
    torch.testing.assert_close(logits(student.eval().double(), batch_of(texts)), truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(again.double(), batch_of(texts)), truth, rtol=0, atol=1e-10)


def test_a_module_of_your_own_is_saved_as_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    module = nn.Linear(3, 2)
    loading.save_pretrained(module, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], module.weight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    loading.save_pretrained(LanguageModel(build("bert")), folder)
    return folder


def test_loading_is_quiet_and_in_evaluation_mode(
    tmp_path: Path,
    said: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also where the files hold more than the model needs, as published BERT checkpoints do."""
    torch.manual_seed(0)
    transformers.BertForPreTraining(config_of("bert")).save_pretrained(tmp_path)
    transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert "UNEXPECTED" in "".join(said)
    said.clear()
    capfd.readouterr()
    model = loading.load_model(str(tmp_path), torch.bfloat16)
    loading.save_pretrained(model, tmp_path / "again")
    assert (said, *capfd.readouterr()) == ([], "", "")
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def damaged(folder: Path, saved: Path, damage: str) -> Path:
    shutil.copytree(saved, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "empty":
            weights.write_bytes(b"")
        case "noise":
            weights.write_bytes(b"\xff" * 1000)
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "no json":
            config.write_text("{")
        case "unheard-of":
            config.write_text(json.dumps({**values, "model_type": "unheard-of"}))
        case "t5":
            config.write_text(json.dumps({"model_type": "t5"}))
        case "vocabulary":
            config.write_text(json.dumps({**values, "vocab_size": VOCABULARY + 1}))
        case "deeper":
            config.write_text(json.dumps({**values, "num_hidden_layers": DEPTH + 1}))
        case "no head":
            torch.manual_seed(0)
            shutil.rmtree(folder)
            transformers.BertModel(config_of("bert")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("truncated", "weights at .* are damaged: .*; copy them again"),
        ("empty", "damaged"),
        ("noise", "damaged"),
        ("no weights", "cannot be loaded: .*no file named"),
        ("no config", r"no model at .*config\.json"),
        ("no json", "not a valid JSON file"),
        ("unheard-of", "unheard-of"),
        ("t5", "architecture 't5' is not supported"),
        ("vocabulary", "another shape for 2 of the weights"),
        ("deeper", "lacks 16 of the weights"),
        ("no head", "lacks .* of the weights of BertForMaskedLM .*language-model head"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    damage: str,
    complaint: str,
    saved: Path,
    tmp_path: Path,
    said: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = damaged(tmp_path / "model", saved, damage)
    said.clear()
    capfd.readouterr()
    with pytest.raises(UserError, match=complaint) as caught:
        loading.load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert (said, *capfd.readouterr()) == ([], "", "")


@pytest.mark.parametrize(
    "path",
    ["/no/such/folder", "./nothing-here", "no-such-model", "nobody/no-such-model", "not a/hub id"],
)
def test_a_model_that_is_nowhere_is_one_line(path: str) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="no model") as caught:
        loading.load_model(path)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)


def test_verbosity_is_left_as_it_was(saved: Path) -> None:
    library = transformers.utils.logging
    before, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_info()
    try:
        loading.load_model(str(saved))
        assert library.get_verbosity() == library.INFO
        assert library.is_progress_bar_enabled() == bars
    finally:
        library.set_verbosity(before)
