"""What to say when memory ran out: where, what held it, and the recipe keys that make the largest part of it smaller."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastdistil.errors import OutOfMemory, is_out_of_memory
from fastdistil.profiling.device import has_fast_bf16
from fastdistil.profiling.memory import MemoryMeter
from fastdistil.profiling.memory_estimate import MemoryEstimate
from fastdistil.profiling.quantities import size_text
from fastdistil.recipe import Recipe, cacheable

_STATIC = ("loading", "optimizer")
"""Phases in which nothing of a micro-batch is held."""
_OF_A_MICRO_BATCH = ("activations", "logits", "activations_and_logits")
_IN_PIECES = re.compile(r"([0-9.]+) ([KMG])iB is reserved by PyTorch but unallocated")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_WANTED = re.compile(r"(?:tried|unable) to allocate ([0-9.]+) ?([A-Za-z]+)", re.IGNORECASE)


@contextmanager
def explaining_out_of_memory(
    phase: Callable[[], str], meter: MemoryMeter, recipe: Recipe, estimate: MemoryEstimate | None = None
) -> Iterator[None]:
    """What runs out of memory in the block is told with the phase, what held it, and what helps: raises OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, phase(), meter, recipe, estimate) from error


def out_of_memory(
    error: BaseException, phase: str, meter: MemoryMeter, recipe: Recipe, estimate: MemoryEstimate | None = None
) -> OutOfMemory:
    """The error to raise from `error`, for which errors.is_out_of_memory holds.

    phase: loading, transfer, teacher, student, losses, backward, optimizer, evaluation, ...; recipe: resolved; estimate: None
    while the models are not loaded, or are modules that it does not know.
    """
    measured = {name: size for name, size in meter.parts.items() if size}
    parts = measured or (estimate.parts() if estimate is not None else {})
    shown = [f"{name.replace('_', ' ')} {size_text(parts[name])}" for name in sorted(parts, key=lambda name: -parts[name])]
    usage = f"the most in use so far was {size_text(meter.peak_bytes())}"
    if shown:
        usage += f": {', '.join(shown)}" if measured else f" (by the estimate: {', '.join(shown)})"
    # What a micro-batch needs is not always measured (on a CPU, say): the estimate knows whether it is the largest.
    unmeasured = phase not in _STATIC and "activations_and_logits" not in measured
    ways = list(_ways(phase, estimate.parts() if unmeasured and estimate is not None else parts, recipe))
    reserved, outside, in_pieces = meter.read().get("reserved_bytes", 0), meter.outside_bytes(), _IN_PIECES.search(str(error))
    options = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if in_pieces and float(in_pieces[1]) * _UNITS[in_pieces[2]] > 0.1 * reserved and "expandable_segments" not in options:
        said = f"{in_pieces[1]} {in_pieces[2]}iB are reserved, in pieces that were too small"
        ways.append(f"PYTORCH_ALLOC_CONF=expandable_segments:True in the environment ({said})")
    if outside is not None and outside > max(2**30, 0.1 * reserved):
        ways.append(f"room on the GPU: {size_text(outside)} are held by other processes, or outside of torch's allocator")
    request = _WANTED.search(str(error))
    more = f", for {_size(*request.groups())} more" if request is not None else ""
    helps = ", or ".join(ways)
    return OutOfMemory(
        f"out of memory in {phase}{more}; {usage}; what helps: {helps}; `--dry-run` estimates what a recipe needs"
    )


def _size(number: str, unit: str) -> str:
    return size_text(int(number)) if unit.startswith("byte") else f"{number} {unit}"


def _ways(phase: str, parts: dict[str, int], recipe: Recipe) -> Iterator[str]:
    """What makes the largest part smaller, and in a micro-batch's phases fewer of its tokens whatever is largest."""
    if phase == "evaluation":
        yield f"evaluation.batch_tokens={max(recipe.evaluation.batch_tokens // 2, 1)}"
        return
    if phase not in _STATIC:
        yield "a lower data.micro_batch_tokens, with a higher loop.accumulation to keep the batch"
    else:  # what a micro-batch needs is free
        parts = {name: size for name, size in parts.items() if name not in _OF_A_MICRO_BATCH}
    largest = max(parts, key=parts.__getitem__, default="")
    half = has_fast_bf16(torch.device(recipe.device))
    if largest in _OF_A_MICRO_BATCH:
        if recipe.loop.precision == "fp32" and half:
            yield "loop.precision=bf16"
        if recipe.kernels == "reference":
            yield "kernels=auto"
    elif largest == "residuals":
        yield "compression=none"
    elif largest == "teacher_weights" and recipe.teacher is not None:
        if recipe.teacher.dtype == "fp32" and half:
            yield "teacher.dtype=bf16"
        if cacheable(recipe.objective.model_dump()):
            yield "teacher.cache, which `fastdistil cache-teacher` writes"
        yield "a smaller teacher (teacher.path)"
    elif not largest and recipe.teacher is not None:  # nothing is known yet: while the models are loaded
        if recipe.teacher.dtype == "fp32" and half:
            yield "teacher.dtype=bf16"
        yield "a smaller student or teacher (keys of student, teacher.path), or a device with more memory"
    else:
        yield "a smaller student (keys of student), or a device with more memory"
