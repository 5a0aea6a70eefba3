"""A whole run that takes a second: text, tokenizer, corpora, teacher, own model; a recipe over them; and what a run left."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdistil import train
from fastdistil.console import Console
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.python_docs import docstrings
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.recipe import Recipe, load_recipe

Run = Callable[..., tuple[int, str, str]]
"""Arguments of the command line -> (exit code, standard output, standard error)."""
TINY = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}


def environment_of_no_worker() -> dict[str, str]:
    """Return the environment without what pytest-xdist tells its workers: pytest-benchmark measures nothing in one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def make_material(folder: Path) -> Path:
    """Into the folder: a tokenizer, a teacher of two layers, and corpora train/, heldout/ and other/ with their .jsonl."""
    documents = [text for module in (json, os, subprocess, signal) for text in docstrings(Path(str(module.__file__)))]
    tokenizer = train_wordpiece(documents, 300, folder / "tokenizer")
    for name, chosen in (("train", documents[::2]), ("heldout", documents[1::4]), ("other", documents[3::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        options = PrepareOptions(tokenizer=str(tokenizer), max_length=48, workers=1)
        prepare([str(folder / f"{name}.jsonl")], folder / name, options)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300,
        **{key: value for key, value in TINY.items() if key != "model_type"},
    )
    teacher = transformers.BertForMaskedLM(config)
    with torch.no_grad():  # far from the tiny weights of a new model, so that half its layers do not compute the same
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.save_pretrained(folder / "teacher")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "teacher")
    return folder


def small(material: Path, runs: Path, *overrides: str) -> Recipe:
    """Eight updates with dropout, evaluation and checkpoints, as runs/run; several ranks compare their weights at each."""
    return load_recipe(
        "distilbert",
        [
            f"teacher.path={material / 'teacher'}",
            "student.every=2",
            "student.architecture=same",
            "student.freeze_positions=false",
            f"data.train={material / 'train'}",
            f"data.heldout={material / 'heldout'}",
            "data.micro_batch_tokens=256",
            "loop.updates=8",
            "loop.accumulation=2",
            "loop.precision=fp32",
            "evaluation.every=3",
            "evaluation.max_sequences=20",
            "checkpoint.every=2",
            "logging.every=1",
            "world.timeout_s=20",
            "world.check_replicas=1",
            f"runs_dir={runs}",
            "name=run",
            "device=cpu",
            *overrides,
        ],
    )


def events(run: Path, kind: str = "train", **match: Any) -> list[dict[str, Any]]:
    """Of a run's effective events, as its log has them, those of a kind whose fields have the given values."""
    begins, effective = ("start", "resume"), list[dict[str, Any]]()
    for line in (run / "events.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        if event["event"] in begins:  # what was logged for later updates is superseded
            effective = [old for old in effective if old["event"] in begins or old.get("update", 0) <= event["update"]]
        effective.append(event)
    return [event for event in effective if event["event"] == kind and all(event.get(key) == match[key] for key in match)]


def learnt(run: Path) -> list[tuple[Any, ...]]:
    """By update: losses, gradient norm, learning rate."""
    return [(e["update"], e["total"], e["soft"], e["hard"], e["cosine"], e["grad_norm"], e["lr"]) for e in events(run)]


def saved_updates(checkpoints: Path) -> list[int]:
    """The updates that have a checkpoint, in order."""
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))


def saved_state(run: Path, update: int = 8) -> dict[str, Tensor]:
    """A checkpoint's tensors, as "model.NAME", "optimizer.NAME" and "rank-R.NAME"."""
    folder = run / "checkpoints" / f"step-{update:08d}"
    return {f"{path.stem}.{name}": tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def quiet(recipe: Recipe, **more: Any) -> train.Result:
    return train.train(recipe, console=Console(quiet=True), **more)


def stop_after(update: int) -> Callable[..., bool]:
    """Return a `train_step` that hears SIGTERM when so many updates are done."""
    step = train.train_step

    def limited(run: train.Run, *arguments: Any) -> bool:
        if run.update == update:
            run.signals.requested = "SIGTERM"
        return step(run, *arguments)

    return limited


class TinyModel(nn.Module):
    """A user's own model, not of transformers: an embedding, one mixing layer, a head."""

    causal = False

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def hidden(self, batch: Any) -> Tensor:
        out: Tensor = torch.tanh(self.mix(self.embedding(batch.ids_BS))).flatten(0, 1)
        return out

    def transform(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND
