"""What measures a run while it trains, always on: where the updates' time goes, memory, the device, and the arithmetic done.

Spans are measured on every rank; the rest on rank 0, which writes the log: its device stands for the others'. Nothing here
waits for the device; what is read at a log line was waited for by that. What disturbs an update, the peaks of its phases and
the count of what autograd keeps, is done in the last one of the warm-up.
"""

import json
import platform
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from fastdistil import __version__
from fastdistil.distributed.coordinator import Coordinator
from fastdistil.events import DeviceFacts, DeviceReading, Environment, MemoryParts, MemoryReading, Peaks, Utilisation
from fastdistil.models import language_model
from fastdistil.profiling import peaks
from fastdistil.profiling.device import (
    Sampler,
    cpuinfo,
    device_facts,
    installed_version,
    parse_cpu_model,
    usable_cores,
    usable_memory,
)
from fastdistil.profiling.flops import Work, WorkCounter
from fastdistil.profiling.memory import MemoryMeter, SavedTensorBytes, memory_parts
from fastdistil.profiling.memory_estimate import MemoryEstimate
from fastdistil.profiling.spans import SpanName, Spans
from fastdistil.profiling.trace import Tracer
from fastdistil.recipe import Recipe
from fastdistil.training.inputs import Inputs
from fastdistil.training.memory_advice import explaining_out_of_memory
from fastdistil.training.memory_plan import estimate_memory, transformer_shape


class Instruments:
    """The measuring instruments of one rank, to be closed at its end; `tell` is called with what cannot be measured."""

    def __init__(self, recipe: Recipe, inputs: Inputs, chief: bool, tell: Callable[[str], None]) -> None:
        device = inputs.device
        self._recipe, self._inputs, self._chief = with_teacher_dtype(recipe, inputs), inputs, chief
        self.spans = Spans(device, warmup=recipe.profile.warmup)
        self.tracer = Tracer(recipe.profile.trace_steps, device, self.spans)
        self.memory = MemoryMeter(device)
        self._sampler = Sampler(device, tell=tell) if chief else None
        self._count: Callable[[Any], Work] = lambda _: Work()
        self._peaks: dict[str, dict[str, float]] = {"flops": {}, "bytes": {}}
        if chief:
            self._count_work(tell)
        self._work: list[Work] = []
        """Of each update since the last line, warm-up included."""
        self._kept = 0
        self._watched = self._parts_logged = False
        """Whether memory was watched for an update, and whether `parts` has returned what the peak is made of."""
        self._estimate = estimate_of(inputs, self._recipe)
        self.where: str = "training"
        """What is going on outside of spans, for errors."""

    def _count_work(self, tell: Callable[[str], None]) -> None:
        recipe, inputs = self._recipe, self._inputs
        try:
            self._count = WorkCounter(
                recipe.objective,
                inputs.student,
                inputs.teacher,
                inputs.projection,
                device_type=inputs.device.type,
                dtype=language_model.DTYPES[recipe.loop.precision],
                teacher_dtype=None if inputs.teacher is None else next(inputs.teacher.parameters()).dtype,
            )
        except ValueError as error:
            tell(str(error))

    def close(self) -> None:
        self.tracer.close()
        if self._sampler is not None:
            self._sampler.close()

    # Around updates

    def begin(self) -> None:
        """Begin to measure an update, before its window is asked for."""
        self.memory.watching = self._chief and not self._watched and self.spans.warmup_left <= 1
        self.spans.begin()
        self._work.append(Work())

    def end(self) -> None:
        self.spans.end(counts=not self.tracer.tracing)
        self._watched, self.memory.watching = self._watched or self.memory.watching, False

    def span(self, name: SpanName) -> AbstractContextManager[Any]:
        span = self.spans(name)
        if not self.memory.watching or name == "compression":  # which lies within others
            return span
        both = ExitStack()
        both.enter_context(self.memory.phase(name))
        both.enter_context(span)
        return both

    @contextmanager
    def micro_batch(self, batch: Any) -> Iterator[None]:
        """Measure the forward of a micro-batch, on the host."""
        if self._chief:
            self._work[-1] += self._count(batch)
        if not self.memory.watching or self._kept or self._inputs.device.type == "cuda" or self._recipe.loop.compile:
            yield
            return
        # A processor's allocator has no peaks: what autograd keeps is counted, once.
        with SavedTensorBytes(self._inputs.student, self._inputs.teacher, self._inputs.projection) as saved:
            yield
        self._kept = saved.bytes

    @contextmanager
    def aside(self, activity: str) -> Iterator[None]:
        """Name and trace an activity that is no part of updates."""
        before, self.where = self.where, activity
        with self.spans.range(activity):
            yield
        self.where = before  # not after an error: it tells where that happened

    # For the log

    def survey(self, team: Coordinator, tell: Callable[[str], None]) -> Environment:
        """All ranks call it: while rank 0 measures peaks, the others do nothing."""
        device, recipe = self._inputs.device, self._recipe
        facts = {"rank": team.world.rank, "host": socket.gethostname(), **device_facts(device, tell)}
        payloads = list(team.collect_bytes(json.dumps(facts).encode(), "devices"))  # to rank 0
        devices = tuple(DeviceFacts(**json.loads(payload)) for payload in payloads if payload)
        if self._chief:
            self.memory.peak_bytes()  # kept by the meter: measuring begins torch's own anew
            precisions = [recipe.loop.precision]
            if recipe.teacher is not None and self._inputs.teacher is not None:
                precisions.append(recipe.teacher.dtype)
            self._peaks = peaks.peaks(device, *precisions, measure=recipe.profile.measure_peaks)
        team.world.barrier("fastdistil.peaks")
        return Environment(devices=devices, peaks=Peaks(**self._peaks), **_host_facts())

    def parts(self, update: int, optimizer: torch.optim.Optimizer, residuals: Mapping[str, torch.Tensor]) -> MemoryParts | None:
        """What the peak is made of, once, when an update has been watched; else None."""
        if self._parts_logged or not self._watched:
            return None
        self._parts_logged = True
        inputs = self._inputs
        estimate = self._estimate.parts() if self._estimate is not None else None
        peak = self.memory.peak_bytes()
        # Restoring and evaluating hold other things. Without a warm-up the watched update may be the first, without moments.
        if self.memory.phase_peaks and self._recipe.profile.warmup > 1:
            peak = max(self.memory.phase_peaks.values())
        self.memory.parts = memory_parts(
            students=[module for module in (inputs.student, inputs.projection) if module is not None],
            teacher=inputs.teacher,
            optimizer=optimizer,
            residuals=residuals.values(),
            peak=peak if inputs.device.type == "cuda" else None,
            kept=self._kept or None,
        )
        return MemoryParts(update=update, parts=self.memory.parts, estimate=estimate, peak_bytes=peak)

    def read(self) -> dict[str, Any]:
        """Fields of a log line (events.Train): what was measured since the last one."""
        fields = self.spans.read()
        used_bytes = None
        if self._sampler is not None:
            fields["device"] = DeviceReading(**self._sampler.read())
            used_bytes = self._sampler.latest("memory_used_bytes")
        fields["memory"] = MemoryReading(**self.memory.read(used_bytes))
        steps, warmup = fields["step_s"], fields["warmup"]
        work, self._work = self._work[: len(steps)], self._work[len(steps) :]
        if self._chief and any(update_work.executed for update_work in work):
            fields["flops"] = sum(work, start=Work()).fields()
            if len(steps) > warmup:
                fields |= self._utilisation(sum(work[warmup:], start=Work()), sum(steps[warmup:]))
        return fields

    def _utilisation(self, work: Work, seconds: float) -> dict[str, Any]:
        """A log line's `mfu`: against the datasheet's peak, and beside it the measured one; against what there is of them."""
        against = [peaks.utilisation(work, seconds, flops, source) for source, flops in self._peaks["flops"].items()]
        shares = [Utilisation(**values) for values in against]
        if len(shares) == 2:
            return {"mfu": replace(shares[0], measured=shares[1])}
        return {"mfu": shares[0]} if shares else {}

    def naming_out_of_memory(self) -> AbstractContextManager[None]:
        """Return a context for the whole of training that explains what to do when memory runs out."""
        return explaining_out_of_memory(self._where, self.memory, self._recipe, self._estimate)

    def _where(self) -> str:
        return self.where if self.where != "training" else self.spans.failed or self.where


def with_teacher_dtype(recipe: Recipe, inputs: Inputs) -> Recipe:
    """What a teacher given as a module has, where the recipe says `auto`; fp32 for what a recipe cannot name."""
    if recipe.teacher is None or inputs.teacher is None or recipe.teacher.dtype != "auto":
        return recipe
    dtype = next(inputs.teacher.parameters()).dtype
    return recipe.with_(teacher={"dtype": {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")})


def estimate_of(inputs: Inputs, recipe: Recipe) -> MemoryEstimate | None:
    """None for modules that the estimate does not know; `recipe`: of with_teacher_dtype."""
    if not isinstance(inputs.student, language_model.LanguageModel):
        return None
    if inputs.teacher is not None and not isinstance(inputs.teacher, language_model.LanguageModel):
        return None
    train = inputs.data.train
    longest = int(train.lengths.max()) if train is not None else recipe.data.micro_batch_tokens
    teacher = transformer_shape(inputs.teacher) if inputs.teacher is not None else None
    return estimate_memory(recipe, transformer_shape(inputs.student), teacher, causal=inputs.student.causal, longest=longest)


def _host_facts() -> dict[str, Any]:
    """Return the facts about this machine and the packages."""
    packages = {name: installed_version(name) for name in ("torch", "triton", "transformers", "horovod", "numpy")}
    versions = {"fastdistil": __version__, "python": platform.python_version()}
    versions |= {name: version for name, version in packages.items() if version is not None}
    return {
        "processor": parse_cpu_model(cpuinfo()),
        "cores": usable_cores(),
        "memory_bytes": usable_memory(),
        "host": socket.gethostname(),
        "versions": versions,
    }
