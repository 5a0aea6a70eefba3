"""A run's state into checkpoints and back, and what the teacher has to do with an update that was not finite.

Every function here is called by all ranks; rank 0 alone reads and writes. What learns becomes flat names and tensors
(`learnt_tensors`).
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.distributed.coordinator import Coordinator
from fastdistil.errors import CorruptData, UserError, translated
from fastdistil.events import Checkpoint
from fastdistil.models import language_model
from fastdistil.models.not_finite import first_not_finite
from fastdistil.recipe import CompressionKind, Recipe
from fastdistil.runs import RECIPE, has_text, is_run
from fastdistil.storage import write_atomically
from fastdistil.training import checkpoint
from fastdistil.training.guards import FiniteGuard
from fastdistil.training.inputs import Inputs
from fastdistil.training.run_state import Run
from fastdistil.training.teacher_identity import continue_with_teacher, identify_teacher
from fastdistil.untrusted import Amount, Fields, Whole, check, reason


class _ScaleState(Fields):
    """State of the loss scale (optim.LossScale)."""

    scale: Amount
    good: Amount
    bad: Amount


class _LayoutState(Fields):
    """Layout of the buckets (buckets.Buckets.layout)."""

    order: list[Whole]
    cuts: list[list[Whole]] | None = None
    made_for: list[Whole] | None = None


class _ExchangeState(Fields):
    """State of the exchange of gradients."""

    kind: CompressionKind
    ranks: Annotated[int, Field(strict=True, ge=1, le=2**16)]
    layout: _LayoutState | None


_Nanoseconds = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


class _TeacherState(Fields):
    """Identity of the teacher (teacher_identity.identify_teacher)."""

    fingerprint: str
    files: list[tuple[str, Whole, _Nanoseconds]]


class _SavedState(Fields):
    """What a checkpoint of this version, or an earlier one, holds beside tensors."""

    tokens: Whole
    best_update: Whole | None
    best_loss: Annotated[float, Field(strict=True)] | None
    corpus: str
    skipped: Whole
    loss_scale: _ScaleState | None
    exchange: _ExchangeState | None = None
    teacher: _TeacherState | None = None
    recipe: str | None = None


def save(run: Run, *, skipped: int | None = None) -> None:
    """Write a checkpoint of the last update, unless there is one.

    `skipped`: the updates that were, for whoever continues; None: the guard is read, which raises NonFinite.
    """
    if run.saved_update == run.update:  # perhaps with what several ranks owed
        return
    if skipped is None:
        skipped = run.guard.read()
    run.count()
    with run.aside("checkpoint"):
        begun = time.perf_counter()
        learnt = learnt_tensors(run.modules, run.optimizer) if run.team.is_chief else {}
        tensors = _tensors_to_write(run.team, learnt, run.exchange.tensors())
        if run.team.is_chief:
            state = {
                "tokens": run.tokens,
                "best_update": run.best_update,
                "best_loss": run.best_loss,
                "corpus": run.inputs.source.identity,
                "teacher": run.teacher,
                "recipe": run.recipe.to_yaml(),  # of a run whose recipe.yaml is lost, see restore_recipe
                "skipped": skipped,
                "loss_scale": run.loss_scale.state() if run.loss_scale is not None else None,
                "exchange": run.exchange.state(),
            }
            keep, protect = run.recipe.checkpoint.keep, frozenset(() if run.best_update is None else (run.best_update,))
            path = checkpoint.save(run.directory / "checkpoints", run.update, tensors, state, keep=keep, protect=protect)
            run.event(Checkpoint(update=run.update, seconds=time.perf_counter() - begun, path=path.name))
    run.saved_update = run.update


def _tensors_to_write(team: Coordinator, learnt: Mapping[str, Any], residuals: Mapping[str, Tensor]) -> dict[str, Any]:
    """The groups of a checkpoint: what was learnt, and what each rank owes, fetched when it is written.

    Ranks other than 0 send what they owe before this returns.
    """
    if not residuals:
        return dict(learnt)
    residuals_by_rank = team.fetch_each(residuals, "residuals")
    if not team.is_chief:
        for _ in residuals_by_rank:
            pass
        return {}
    size = sum(tensor.nbytes for tensor in residuals.values())
    return {
        **learnt,
        **{f"rank-{rank}": checkpoint.Deferred(size, lambda: next(residuals_by_rank)) for rank in range(team.world.size)},
    }


def restore(run: Run, path: Path | None, teacher: nn.Module | None) -> None:
    """Continue from a checkpoint directory, or from the newest whole one of the run (None or a run directory).

    teacher: the module that was given from Python, if one was.
    """
    checkpoints: list[checkpoint.Loaded] = []

    def read() -> dict[str, Any] | None:
        loaded = _newest(run.directory, path, run.inputs.device, run.console.note)
        if loaded is None:
            run.console.note(f"{run.directory} has no checkpoint yet: starting at its first update")
            run.teacher = identify_teacher(run.recipe, teacher)
            return None
        _check_loaded(loaded, scaled=run.loss_scale is not None)
        if loaded.state["corpus"] != run.inputs.source.identity:
            raise UserError(
                f"{loaded.path} was trained on another corpus than {run.recipe.data.train}; "
                "give back that corpus, or start anew"
            )
        if (saved := loaded.state.get("teacher")) is not None:
            run.teacher = continue_with_teacher(run.recipe, teacher, saved)
        elif run.recipe.teacher is not None:
            run.console.note(f"{loaded.path} does not say which teacher it was trained with: continuing with this one")
            run.teacher = identify_teacher(run.recipe, teacher)
        checkpoints.append(loaded)
        return {"update": loaded.update, **loaded.state}

    state = run.team.chief_does("restore", read)
    if state is None:
        return
    _load_learnt(run.team.share(checkpoints[0].tensors if checkpoints else None, "restore"), run.modules, run.optimizer)
    for message in run.exchange.restore(state.get("exchange"), lambda rank: checkpoints[0].read(f"rank-{rank}"), run.team):
        run.tell(message)
    if run.loss_scale is not None:
        run.loss_scale.load_state(state["loss_scale"])
    loop = run.recipe.loop
    run.guard = FiniteGuard(
        loop.nonfinite,
        loop.nonfinite_limit,
        skipped=state["skipped"],
        describe=run.inputs.source.describe,
    )
    run.update, run.tokens = state["update"], state["tokens"]
    run.saved_update = run.update  # with what several ranks owed, which is in memory from here on
    run.best_update, run.best_loss = state["best_update"], state["best_loss"]
    run.console.note(f"continuing {run.directory} after update {run.update}")


def _check_loaded(loaded: checkpoint.Loaded, *, scaled: bool) -> None:
    """Raise CorruptData unless a checkpoint holds all that a run continues from; `scaled`: it scales its losses."""
    try:
        check(_SavedState, loaded.state)
        if missing := [group for group in _LEARNT if group not in loaded.tensors]:
            raise ValueError(f"{missing[0]}.safetensors is missing")
        if scaled and loaded.state["loss_scale"] is None:
            raise ValueError("loss_scale is null")
    except ValueError as error:
        raise CorruptData(f"{loaded.path} holds no state of this run ({reason(error)}); start anew") from error


def _newest(run: Path, path: Path | None, device: torch.device, note: Callable[[str], None]) -> checkpoint.Loaded | None:
    # What ranks owe is read as it is sent to them, one rank's at a time.
    if path is not None and path.parent.name == "checkpoints":
        return checkpoint.load(path, device, _LEARNT)
    return checkpoint.latest(run / "checkpoints", note, device, _LEARNT)


def blame_teacher(recipe: Recipe, inputs: Inputs, team: Coordinator, update: int | None) -> str:
    """What the teacher, or its cache, has to do with an update that was not finite; empty where it has nothing.

    All ranks call this, each looks at its own batches, and all get the first rank's answer that is one.
    """
    reason_here = _teacher_on_own_batches(recipe, inputs, update) or ""
    if team.alone:
        return reason_here
    answers = [answer.decode() for answer in team.collect_bytes(reason_here.encode(), "nonfinite")]
    return team.chief_does("blame", lambda: next(filter(None, answers), ""))


def _teacher_on_own_batches(recipe: Recipe, inputs: Inputs, update: int | None) -> str | None:
    config, teacher, source = recipe.teacher, inputs.teacher, inputs.source
    batches: list[Batch] = []
    if update is not None and source.replayable and (teacher is not None or config is not None):
        with source.windows(update - 1, update) as windows:
            window, _ = next(windows, ([], None))
        batches = [batch.to(inputs.device) for batch in window]
    if config is not None and config.cache is not None:
        if any(batch.cached_log_probabilities_NK is not None and _has_nan(batch) for batch in batches):
            return f"the teacher's cache {config.cache} holds nan there; run fastdistil cache-teacher with this recipe again"
        return None
    if teacher is None or not recipe.objective.needs_teacher:
        return None
    on_batches = (first_not_finite(teacher, batch) for batch in batches)
    reason = next(filter(None, on_batches), None) if batches else first_not_finite(teacher, None)
    name = config.path if config is not None else "given from Python"
    advice = "give one that is finite there, or another teacher.dtype, and start anew under another name=..."
    return None if reason is None else f"the teacher {name} is not finite: {reason}; {advice}"


def _has_nan(batch: Batch) -> bool:
    values = (batch.cached_log_probabilities_NK, batch.cached_tail_N)
    return any(bool(tensor.isnan().any()) for tensor in values if tensor is not None)


_Modules = Mapping[str, nn.Module | None]
"""Name -> module that is trained; None where the run has none."""


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a weight."""


_LEARNT = ("model", "optimizer")
"""The groups of `learnt_tensors`."""


def learnt_tensors(modules: _Modules, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """{"model": weights, "optimizer": moments and steps}; a tied weight once."""
    weights = {
        f"{part}.{name}": tensor
        for part, module in modules.items()
        if module is not None
        for name, tensor in language_model.own_state(module).items()
    }
    moments = {
        f"{index}.{name}": value for index, values in optimizer.state_dict()["state"].items() for name, value in values.items()
    }
    return {"model": weights, "optimizer": moments}


def _load_learnt(tensors: Mapping[str, Mapping[str, Tensor]], modules: _Modules, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `learnt_tensors` gave, in place. Raises UserError if it is of other modules, CorruptData for moments that
    belong to no weight."""
    for part, module in modules.items():
        if module is not None:
            language_model.load_own_state(module, _below(tensors["model"], part))
    states: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {f"{index}.{key}": (index, key) for index in range(len(parameters)) for key in _MOMENTS}
    for name, tensor in tensors["optimizer"].items():
        index, key = places.get(name, (0, ""))
        if not key or tensor.shape != (() if key == "step" else parameters[index].shape):
            raise CorruptData(
                f"the checkpoint's optimizer holds {name} of shape {list(tensor.shape)}, which belongs to no weight; start anew"
            )
        states.setdefault(index, {})[key] = tensor
    if any(len(moments) != len(_MOMENTS) for moments in states.values()):
        raise CorruptData(f"the checkpoint's optimizer lacks one of {', '.join(_MOMENTS)} of a weight; start anew")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def restore_recipe(run: Path, note: Callable[[str], None]) -> None:
    """Write a run's recipe.yaml anew from its newest whole checkpoint if it is lost. Raises UserError, CorruptData."""
    path = run / RECIPE
    if has_text(path) or not is_run(run):
        return
    loaded = checkpoint.latest(run / "checkpoints", note, groups=())
    text = loaded.state.get("recipe") if loaded is not None else None
    if loaded is None or not isinstance(text, str):
        raise UserError(f"{path} is lost, and the run's checkpoints hold no copy of it; write the run's recipe to that file")
    with translated("writing the run's recipe", path):
        write_atomically(path, text)
    note(f"{path} was lost: written anew from {loaded.path.name}")
