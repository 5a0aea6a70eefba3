"""`distil()`, the Python interface: runs of a user's own modules and batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastdistil import distil
from fastdistil.errors import UserError
from tests.small_run import TinyModel, events


def test_a_module_as_teacher_gives_its_layers(material: Path, tmp_path: Path) -> None:
    teacher = transformers.AutoModelForMaskedLM.from_pretrained(material / "teacher")
    result = distil(
        "distilbert",
        teacher=teacher,
        student={"layers": [1], "architecture": "distilbert"},
        corpus=material / "train",
        data={"micro_batch_tokens": 256},
        loop={"updates": 1, "epochs": None},
        runs_dir=str(tmp_path),
        device="cpu",
    )
    assert type(result.student).__name__ == "DistilBertForMaskedLM"
    assert result.run_dir == tmp_path / "distilbert-1"
    assert "given from Python" in (result.run_dir / "recipe.yaml").read_text()


def test_the_python_interface_takes_your_own_parts(tmp_path: Path) -> None:
    """Own modules and own batches: the loss falls; an interrupted run continues; wrong modules are refused."""
    torch.manual_seed(0)
    batches = []
    for _ in range(6):
        ids = torch.randint(0, 50, (4, 10))
        labels = torch.where(torch.rand(ids.shape) < 0.2, ids, -100)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    teacher, student = TinyModel(50, 16), TinyModel(50, 16)
    keywords: dict[str, Any] = {
        "teacher": teacher,
        "corpus": batches,
        "loop": {"updates": 40, "accumulation": 3, "precision": "fp32"},
        "optim": {"lr": 0.01},
        "logging": {"every": 1},
        "runs_dir": str(tmp_path),
        "device": "cpu",
    }
    result = distil("distilbert", student=student, name="mine", **keywords)
    assert result.student is student
    losses = [e["total"] for e in events(result.run_dir, "train")]
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(UserError, match="hidden, transform, weight"):
        distil("distilbert", student=nn.Linear(3, 3), name="wrong", **keywords)
    with pytest.raises(UserError, match=r"batch 0 of your own iterable"):
        distil(
            "distilbert",
            student=TinyModel(50, 16),
            name="bad",
            **{**keywords, "corpus": [{"ids": torch.zeros(1, 1)}]},
        )


def test_updates_of_padding_only_have_no_speed_and_end(tmp_path: Path) -> None:
    """As a user's own batches may hold them."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 10))
    padding = {
        "input_ids": ids,
        "attention_mask": torch.zeros_like(ids),
        "labels": torch.full_like(ids, -100),
    }
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for name, batches in (("padding", [padding] * 3), ("mixed", [words, padding, words])):
        result = distil(
            "distilbert",
            teacher=TinyModel(50, 16),
            student=TinyModel(50, 16),
            corpus=batches,
            loop={"updates": 3, "accumulation": 1, "precision": "fp32"},
            logging={"every": 1},
            runs_dir=str(tmp_path),
            name=name,
            device="cpu",
        )
        logged = events(result.run_dir, "train")
        assert [event["tokens"] for event in logged] == ([0, 0, 0] if name == "padding" else [40, 0, 40])
        assert all(math.isfinite(float(event["total"])) for event in logged)
        assert (result.tokens_per_second > 0) == (name == "mixed")
