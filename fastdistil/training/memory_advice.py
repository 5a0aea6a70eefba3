"""What to say when memory ran out: where, what held it, and what in this recipe would make room.

Advice is computed, not listed: each change that a person could make is put through the estimate of `--dry-run`, and is named
with what it saves if that is worth a twentieth of the whole.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastdistil.errors import OutOfMemory, is_out_of_memory
from fastdistil.profiling.device import has_fast_bf16
from fastdistil.profiling.memory import MemoryMeter
from fastdistil.profiling.memory_estimate import MemoryEstimate, Shape
from fastdistil.profiling.quantities import size_text
from fastdistil.recipe import Recipe, cacheable
from fastdistil.training.memory_plan import estimate_memory

WORTH = 0.05
"""Share of the estimated whole that advice must save."""
_STATIC = ("loading", "optimizer")
"""Phases whose memory does not depend on the micro-batch."""
_WANTED = re.compile(r"(?:tried|unable) to allocate ([0-9.]+) ?([A-Za-z]+)", re.IGNORECASE)
_IN_PIECES = re.compile(r"([0-9.]+) (bytes|KiB|MiB|GiB) is reserved by PyTorch but unallocated")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the estimate needs of the models and the corpus."""

    student: Shape
    teacher: Shape | None
    """None: there is none, or its cache stands in for it."""
    causal: bool
    longest: int
    """Tokens of the longest sequence."""

    def estimate(self, recipe: Recipe, *, cached: bool = False) -> MemoryEstimate:
        teacher = None if cached else self.teacher
        return estimate_memory(recipe, self.student, teacher, causal=self.causal, longest=self.longest)


@contextmanager
def naming(phase: Callable[[], str], meter: MemoryMeter, recipe: Recipe, sizes: Sizes | None = None) -> Iterator[None]:
    """What runs out of memory in the block is told with the phase, what held it, and what helps: raises OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, phase(), meter, recipe, sizes) from error


def out_of_memory(
    error: BaseException, phase: str, meter: MemoryMeter, recipe: Recipe, sizes: Sizes | None = None
) -> OutOfMemory:
    """The error to raise from `error`, for which errors.is_out_of_memory holds.

    phase: loading, transfer, teacher, student, losses, backward, optimizer, evaluation, ...; recipe: resolved; sizes: None
    while the models are not loaded, or are modules that the estimate does not know.
    """
    told = [f"out of memory in {phase}{_wanted(error)}"]
    estimate = sizes.estimate(recipe) if sizes is not None else None
    peak = meter.peak_bytes()
    told.append(f"the most in use so far was {size_text(peak)}" + _parts(meter.parts, estimate))
    advice = list(_around(error, meter))
    if phase == "evaluation":
        smaller = max(recipe.evaluation.batch_tokens // 2, 1)
        advice.append(f"evaluation.batch_tokens={smaller}")
    if sizes is not None and estimate is not None:
        worth = WORTH * _held(estimate, phase)
        saved = {change: size for change, size in _changes(recipe, sizes, phase) if size >= worth}
        for change, size in sorted(saved.items(), key=lambda item: -item[1]):
            advice.append(f"{change} (about {size_text(size)} less)")
    elif phase not in (*_STATIC, "evaluation"):
        advice.append("a lower data.micro_batch_tokens, with a higher loop.accumulation to keep the batch")
    if advice:
        told.append("what helps: " + ", or ".join(advice))
    else:
        none = "no key of the recipe would save much here: " if sizes is not None else ""
        told.append(f"{none}take a smaller student or teacher, or a device with more memory")
    return OutOfMemory("; ".join(told) + "; `--dry-run` estimates what a recipe needs")


def _changes(recipe: Recipe, sizes: Sizes, phase: str) -> Iterator[tuple[str, int]]:
    """(what to set, bytes it saves by the estimate)"""
    whole = _held(sizes.estimate(recipe), phase)

    def saved(*, cached: bool = False, **sections: Mapping[str, object] | str) -> int:
        return whole - _held(sizes.estimate(recipe.with_(**sections), cached=cached), phase)

    rows, accumulation = recipe.data.micro_batch_tokens, recipe.loop.accumulation
    fewer = max(rows // 2, sizes.longest)
    if phase not in (*_STATIC, "evaluation") and fewer < rows:
        more = accumulation * -(-rows // fewer)
        less = saved(data={"micro_batch_tokens": fewer}, loop={"accumulation": more})
        yield f"data.micro_batch_tokens={fewer} with loop.accumulation={more}", less
    half = has_fast_bf16(torch.device(recipe.device))
    if phase != "evaluation":  # of which the estimate knows only what is there all the time
        if recipe.loop.precision == "fp32" and half:
            yield "loop.precision=bf16", saved(loop={"precision": "bf16"})
        if recipe.kernels == "reference":
            yield "kernels=auto", saved(kernels="auto")
    if sizes.teacher is not None and recipe.teacher is not None:
        if recipe.teacher.dtype == "fp32" and half:
            yield "teacher.dtype=bf16", saved(teacher={"dtype": "bf16"})
        if cacheable(recipe.objective.model_dump()):
            yield "a cached teacher (`fastdistil cache-teacher`, then teacher.cache)", saved(cached=True)
    if recipe.compression.kind != "none":
        yield "compression=none", saved(compression={"kind": "none"})


def _held(estimate: MemoryEstimate, phase: str) -> int:
    """Bytes in a phase: what a micro-batch needs is free again when the optimizer steps."""
    parts = estimate.parts()
    return sum(size for name, size in parts.items() if phase not in _STATIC or name not in ("activations", "logits"))


def _around(error: BaseException, meter: MemoryMeter) -> Iterator[str]:
    """Of a GPU: memory that is neither this recipe's nor free."""
    reserved, outside = meter.read().get("reserved_bytes", 0), meter.outside_bytes()
    in_pieces = 0.0
    if (found := _IN_PIECES.search(str(error))) is not None:
        in_pieces = float(found[1]) * _UNITS[found[2]]
    options = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if in_pieces > 0.1 * reserved and "expandable_segments" not in options:
        yield (
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment "
            f"({size_text(int(in_pieces))} are reserved, in pieces that were too small)"
        )
    if outside is not None and outside > max(2**30, 0.1 * reserved):
        yield f"room on the GPU: {size_text(outside)} are held by other processes, or outside of torch's allocator"


def _parts(measured: Mapping[str, int | None], estimate: MemoryEstimate | None) -> str:
    estimated = estimate.parts() if estimate is not None else {}
    known = {name: size for name, size in measured.items() if size}
    if known and estimated:
        estimated["activations_and_logits"] = estimated["activations"] + estimated["logits"]
    if not known and not estimated:
        return ""
    shown = known or estimated
    texts = []
    for name in sorted(shown, key=lambda name: -shown[name]):
        if shown[name] >= 0.01 * sum(shown.values()):
            beside = f" (estimate {size_text(estimated[name])})" if known and name in estimated else ""
            texts.append(f"{name.replace('_', ' ')} {size_text(shown[name])}{beside}")
    return (": " if known else " (by the estimate: ") + ", ".join(texts) + ("" if known else ")")


def _wanted(error: BaseException) -> str:
    found = _WANTED.search(str(error))
    if found is None:
        return ""
    number, unit = found.groups()
    return f", for {size_text(int(number))} more" if unit.startswith("byte") else f", for {number} {unit} more"
