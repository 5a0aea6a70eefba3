"""What a run tells of itself while it goes on: events.jsonl, the console, TensorBoard."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastdistil.distributed.coordinator import Coordinator
from fastdistil.errors import translated
from fastdistil.events import Kernel, Resume, Start, Train
from fastdistil.gradients.compressors import starts_at
from fastdistil.models import language_model
from fastdistil.profiling.trace import Tracer
from fastdistil.recipe import Objective
from fastdistil.redaction import redacted
from fastdistil.training.run_state import Run


def announce(run: Run) -> None:
    world = run.team.world
    kind = Resume if run.update else Start
    begins = kind(
        update=run.update,
        updates=run.inputs.updates,
        engine=world.engine,
        ranks=world.size,
        nodes=world.cross_size,
        rings=world.rings,
        sync=run.recipe.world.sync,
        compression=run.recipe.compression.kind,
        device=str(run.inputs.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        precision=run.recipe.loop.precision,
        kernels=run.recipe.kernels,
        student_parameters=language_model.parameter_count(run.inputs.student),
        teacher_parameters=language_model.parameter_count(run.inputs.teacher) if run.inputs.teacher is not None else 0,
    )
    run.event(begins)
    run.event(run.instruments.survey(run.team, run.console.note))
    if run.board is not None:
        run.board.text("recipe", yaml.safe_dump(redacted(run.recipe.model_dump(mode="json")), sort_keys=False))
    if not run.team.alone:
        compression = run.recipe.compression.kind
        run.console.note(f"{world.size} ranks over {world.engine}, compression {compression}")
        first = starts_at(run.recipe.compression)
        if compression not in ("none", "auto") and first >= run.inputs.updates:
            run.tell(
                f"nothing will be compressed: that begins after {first} updates (compression.warmup_updates), and the run has "
                f"{run.inputs.updates}"
            )
    run.console.start(run.inputs.updates, run.update)
    run.meter.restart()


def log(run: Run) -> None:
    """The one host sync of a log line. Raises NonFinite."""
    fields: dict[str, Any] = run.meter.read(run.guard)
    run.count()
    fields |= run.instruments.read()
    if not run.team.alone:
        fields |= run.exchange.fields() | run.load.read(fields["step_s"], fields["phases"])
    line = Train(update=run.update, lr=run.optimizer.param_groups[0]["lr"], **fields)
    if line.memory is not None and line.memory.peak_allocated_bytes is not None:
        # torch's own counter begins anew where phases are watched
        line = replace(line, device_peak_bytes=line.memory.peak_allocated_bytes)
    parts = run.instruments.parts(run.update, run.optimizer, run.exchange.tensors())
    if parts is not None:
        run.event(parts)
    run.logged_tokens += fields["tokens"]
    run.logged_s += run.meter.elapsed_s  # an update of padding alone has no tokens to tell it from
    run.event(line)
    run.console.update(run.update, {name: getattr(line, name) for name in _watched(run.recipe.objective)})
    if run.board is not None:
        run.board.write(run.update, dict(curves(line)))
    options = run.recipe.logging
    every = options.histograms if options.tensorboard else None
    if every is not None and run.update // every > run.histograms_at // every:
        run.histograms_at = run.update
        with run.aside("histograms"):
            if run.board is not None:
                run.board.histograms(run.update, histograms(run.inputs.student, run.optimizer))


def curves(line: Train) -> Iterator[tuple[str, Any]]:
    """A log line's numbers by TensorBoard's names: those of groups (phases, memory, device) below their group; of a number for
    each update, the mean."""
    for name, value in vars(line).items():
        if name in ("time", "update"):
            continue
        group, inner = (name, vars(value) if is_dataclass(value) else value)
        if not isinstance(inner, Mapping):
            group, inner = "train", {name: value}
        for key, entry in inner.items():
            numbers = isinstance(entry, Sequence) and entry and all(isinstance(number, float) for number in entry)
            yield f"{group}/{key}", mean(entry) if numbers else entry


def histograms(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The student's weights, and the first moments of their gradients: what is left of them at a log line."""
    for name, parameter in student.named_parameters():
        yield f"weights/{name}", parameter
        if "exp_avg" in (state := optimizer.state.get(parameter, {})):
            yield f"moments/{name}", state["exp_avg"]


def write_traces(tracer: Tracer, team: Coordinator, directory: Path) -> tuple[Kernel, ...]:
    """Stop tracing and write every rank's trace; return the kernels that took the most time on this one. All ranks call it."""
    data, kernels = tracer.stop()
    for rank, trace in enumerate(team.collect_bytes(data, "trace")):
        path = directory / f"rank-{rank}.json.gz"
        if not team.is_chief:
            continue
        with translated("writing a trace", path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(trace)
    return tuple(Kernel(**kernel) for kernel in kernels)


def _watched(objective: Objective) -> list[str]:
    """Return the fields of a log line that a person looks at; events.jsonl has them all."""
    weights = {
        "soft": objective.a_ce,
        "hard": objective.a_mlm + objective.a_clm,
        "cosine": objective.a_cos,
        "mse": objective.a_mse,
    }
    terms = [name for name, weight in weights.items() if weight]
    return ["total", *(terms if len(terms) > 1 else []), "grad_norm", "lr", "tokens_per_s", "data_wait_share"]
