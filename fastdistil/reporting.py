"""What a run tells of itself while it goes on: events.jsonl, the console, TensorBoard."""

from typing import Any

import torch

from fastdistil import models
from fastdistil.loop_state import Run
from fastdistil.recipe import Objective
from fastdistil.saving import count, rolling_back


def announce(run: Run) -> None:
    world = run.team.world
    run.event(
        "resume" if run.update else "start",
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
        student_parameters=models.parameter_count(run.inputs.student),
        teacher_parameters=models.parameter_count(run.inputs.teacher) if run.inputs.teacher is not None else 0,
    )
    run.console.start(run.inputs.updates, run.update)
    run.meter.restart()
    run.load.restart()


def log(run: Run) -> None:
    """The one host sync of a log line."""
    with rolling_back(run):
        fields: dict[str, Any] = run.meter.read(run.guard)
    count(run)
    if not run.team.alone:
        fields |= run.exchange.fields() | run.load.read()
    fields["lr"] = run.optimizer.param_groups[0]["lr"]
    run.logged_tokens += fields["tokens"]
    run.logged_s += fields["tokens"] / fields["tokens_per_s"]
    run.event("train", update=run.update, **fields)
    run.console.update(run.update, {name: fields[name] for name in _watched(run.recipe.objective)})
    if run.board is not None:
        run.board.write(run.update, {f"train/{name}": value for name, value in fields.items()})


def _watched(objective: Objective) -> list[str]:
    """Of a log line's fields, those that a person looks at; events.jsonl has them all."""
    weights = {
        "soft": objective.a_ce,
        "hard": objective.a_mlm + objective.a_clm,
        "cosine": objective.a_cos,
        "mse": objective.a_mse,
    }
    terms = [name for name, weight in weights.items() if weight]
    return ["total", *(terms if len(terms) > 1 else []), "grad_norm", "lr", "tokens_per_s", "data_wait_share"]
