"""Checks of a student on a probe of a few tokens: what was copied computes what it did, and transformers computes the same.

They find what no comparison of weights can: a layer that takes something from its number, an option that was lost on the way,
sizes that fit one implementation of attention and not another.

Legend: T tokens of the probe, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdistil.data.batch import Batch, assemble
from fastdistil.errors import FastdistilError, UserError, is_out_of_memory
from fastdistil.models.language_model import LanguageModel, max_length, shape
from fastdistil.models.loading import load_model
from fastdistil.models.scoring import evaluating

_PROBE_LENGTHS = (5, 11)
"""Tokens of the two sequences of a probe."""


def check_copied_parts(teacher: LanguageModel, student: LanguageModel, layers: list[int], *, head: bool) -> None:
    """Refuse a student of whose parts one computes something else than the part of the teacher it was copied from.

    Layer i of the student is fed what enters layer layers[i] of the teacher, and what is behind the layers is fed what leaves
    the teacher's last one. `head`: the head was copied, too. Raises UserError, naming the part.
    """
    batch = _probe(teacher)
    with _float32(teacher):
        truth = _trace(teacher, batch).to(student.weight.device)
    trace = _trace(student, batch.to(student.weight.device), [truth.entering[layer] for layer in layers], truth.leaving[-1])
    parts = [("embeddings", trace.entering[0], truth.entering[0], truth.entering[0])]
    for place, layer in enumerate(layers):
        name = f"layer {place}, copied from the teacher's layer {layer},"
        entering, leaving = truth.entering[layer], truth.leaving[layer]
        parts.append((name, trace.leaving[place], leaving, leaving - entering))
        _check_windows(name, _layers(student)[place], _layers(teacher)[layer])
    parts.append(("last norm", trace.hidden_TD, truth.hidden_TD, truth.hidden_TD))
    if head:
        parts.append(("head", trace.logits_TV, truth.logits_TV, truth.logits_TV))
    # A model that was cast as a whole has rotary frequencies of that precision; a new one has not. TF32 rounds as float16.
    rounds_more = teacher.weight.is_cuda and torch.backends.cuda.matmul.allow_tf32
    tolerance = max(2e-2 if rounds_more else 1e-3, 2 * torch.finfo(teacher.weight.dtype).eps)
    for name, output, original, scale in parts:
        difference = float((output - original).norm() / scale.norm().clamp_min(1e-30))
        if bool(original.isfinite().all()) and not difference <= tolerance:  # a broken teacher is not this check's to find
            raise _computes_otherwise(name, f"relative difference {difference:.2g} on the same input")


def check_transformers_agrees(student: LanguageModel) -> None:
    """Refuse a student that transformers' own code cannot run, or to which it gives other logits. Raises UserError."""
    kind = student.module.config.model_type
    batch = _probe(student)
    with _explained(f"the student is no {kind} model that transformers runs"):
        reference_SV = _reference_logits(student.module, batch)
    difference = _difference(_logits(student, batch), reference_SV)
    if difference is not None:
        raise UserError(
            f"the student's logits are not those that transformers computes for the same {kind} model (difference "
            f"{difference:.2g}); change student.config, or take another architecture"
        )


def check_saved(student: LanguageModel, directory: Path) -> None:
    """Load a saved student as its user will, and compare logits with those of the student in memory, on its device.

    Raises UserError naming the directory, in which nothing is changed.
    """
    advice = "its files stay there, and the run's last checkpoint holds its weights"
    device = student.weight.device
    plain = LanguageModel(student.module).to(device)  # not compiled
    batch = _probe(plain)
    problem = f"the student saved at {directory} cannot be run by transformers"
    try:
        saved: nn.Module = load_model(str(directory)).module
    except UserError as error:
        raise UserError(f"{problem} ({error}); {advice}") from error
    with _explained(problem, advice):
        # Both on one device, which rounds and sums alike: a GPU may compute float32 products in TF32.
        reference_SV = _reference_logits(saved.to(device), batch)
    difference = _difference(_logits(plain, batch), reference_SV)
    if difference is not None:
        raise UserError(
            f"the student saved at {directory}, loaded with transformers, gives other logits than the one that was trained "
            f"(difference {difference:.2g}); {advice}"
        )


@contextmanager
def _explained(problem: str, advice: str = "change student.config or the checkpoint it comes from") -> Iterator[None]:
    """Turn what transformers' code of a model raises into one line; our own code stands outside of the block."""
    try:
        yield
    except (OSError, FastdistilError):
        raise
    except Exception as error:  # shapes, types, indices: whatever does not fit
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{problem} ({reason}); {advice}") from error


@dataclass(frozen=True)
class _Trace:
    """What passed through a model."""

    entering: list[Tensor]
    """Hidden states that enter each layer, as `leaving` has those that leave it."""
    leaving: list[Tensor]
    hidden_TD: Tensor
    logits_TV: Tensor

    def to(self, device: torch.device) -> "_Trace":
        entering, leaving = ([tensor.to(device) for tensor in tensors] for tensors in (self.entering, self.leaving))
        return _Trace(entering, leaving, self.hidden_TD.to(device), self.logits_TV.to(device))


@torch.no_grad()
def _trace(model: LanguageModel, batch: Batch, entering: list[Tensor] | None = None, last: Tensor | None = None) -> _Trace:
    """Run a model and keep what enters and leaves its layers; `entering` and `last` take the place of what would go on."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    layers = _layers(model)

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        inputs.append(args[0] if args else keywords["hidden_states"])
        if entering is None:
            return None
        hidden = entering[len(inputs) - 1]
        return ((hidden, *args[1:]), keywords) if args else (args, {**keywords, "hidden_states": hidden})

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if last is None or len(outputs) < len(layers):
            return None
        return (last, *output[1:]) if isinstance(output, tuple) else last

    with ExitStack() as stack, evaluating(model):
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        hidden_TD = model.hidden(batch)
        logits_TV = _head(model, hidden_TD)
    return _Trace(inputs, outputs, hidden_TD, logits_TV)


def _probe(model: LanguageModel) -> Batch:
    """Two short sequences of tokens from all over the vocabulary, none of them padding."""
    vocabulary, longest = shape(model)[0], max_length(model)
    lengths = np.array([length if longest is None else min(length, longest) for length in _PROBE_LENGTHS])
    tokens = np.setdiff1d(np.arange(vocabulary), [model.module.config.pad_token_id or 0])
    if not len(tokens):
        tokens = np.zeros(1, np.int64)
    ids_T = tokens[7919 * np.arange(1, lengths.sum() + 1) % len(tokens)]
    nothing = np.zeros(0, np.int64)
    return assemble(ids_T, lengths, nothing, nothing).to(model.weight.device)


def _layers(model: LanguageModel) -> list[nn.Module]:
    return list(model.module.get_submodule(model.family.layers).children())


def _head(model: LanguageModel, hidden_TD: Tensor) -> Tensor:
    bias = model.bias
    logits_TV = model.transform(hidden_TD) @ model.weight.T.to(hidden_TD.dtype)
    return logits_TV if bias is None else logits_TV + bias


@torch.no_grad()
def _logits(model: LanguageModel, batch: Batch) -> Tensor:
    with evaluating(model):
        return _head(model, model.hidden(batch))


@torch.no_grad()
def _reference_logits(module: Any, batch: Batch) -> Tensor:
    """Return transformers' own logits of a probe's last sequence alone, [S, V]."""
    assert batch.packing is not None
    with evaluating(module):
        logits_SV: Tensor = module(input_ids=batch.ids_BS[:, -batch.packing.max_seqlen :]).logits[0]
    return logits_SV


def _difference(logits_TV: Tensor, reference_SV: Tensor) -> float | None:
    """Return how far a probe's logits are from those of its last sequence alone; None: no farther than rounding takes them."""
    # Numbers for what is none: NaN in the same places is no difference, NaN on one side is a large one.
    packed_SV, alone_SV = (
        logits.nan_to_num(nan=1e9, posinf=2e9, neginf=-2e9) for logits in (logits_TV[-len(reference_SV) :], reference_SV)
    )
    difference = float((packed_SV - alone_SV).abs().max() / alone_SV.abs().max().clamp_min(1.0))
    exact = logits_TV.device.type == "cpu" or not torch.backends.cuda.matmul.allow_tf32
    return difference if difference > (1e-4 if exact else 2e-2) else None


def _check_windows(name: str, student: nn.Module, teacher: nn.Module) -> None:
    """Compare attention windows, which may be longer than a probe. Raises UserError."""

    def windows(layer: nn.Module) -> list[object]:
        return [part.sliding_window for part in layer.modules() if hasattr(part, "sliding_window")]

    if windows(student) != windows(teacher):
        raise _computes_otherwise(name, f"an attention window of {windows(student)} tokens for {windows(teacher)}")


def _computes_otherwise(name: str, how: str) -> UserError:
    return UserError(
        f"student.layers: the student's {name} does not compute what it does in the teacher ({how}); "
        "take other layers, or start from student.config or student.path"
    )


@contextmanager
def _float32(model: LanguageModel) -> Iterator[None]:
    """Let a model of another precision compute in float32; a module's weights are cast while it runs, and no longer."""
    stored: dict[nn.Parameter, Tensor] = {}

    def cast(module: nn.Module, args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                stored[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, args: Any = None, output: Any = None) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in stored:
                parameter.data = stored.pop(parameter)

    with ExitStack() as stack:
        for module in model.modules():
            if any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(cast).remove)
                stack.callback(module.register_forward_hook(restore).remove)
                stack.callback(restore, module)
        yield
