"""A run's state into checkpoints and back: saving, continuing, and what is saved when an update was not finite.

Every function here is called by all ranks; rank 0 alone reads and writes. What learns becomes flat names and tensors
(`learnt_tensors`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistil.data.batch import Batch
from fastdistil.errors import CorruptData, NonFinite, UserError, translated
from fastdistil.events import Checkpoint, Note, RunNotFinite
from fastdistil.models import language_model
from fastdistil.models.not_finite import first_not_finite
from fastdistil.recipe import CompressionKind
from fastdistil.runs import RECIPE, has_text, is_run
from fastdistil.storage import write_atomically
from fastdistil.training import checkpoint
from fastdistil.training.guards import FiniteGuard
from fastdistil.training.run_state import Run
from fastdistil.training.teacher_identity import continue_with_teacher, identify_teacher
from fastdistil.untrusted import Amount, Fields, Whole, check, reason


class ScaleState(Fields):
    """State of the loss scale (optim.LossScale)."""

    scale: Amount
    good: Amount
    bad: Amount


class LayoutState(Fields):
    """Layout of the buckets (buckets.Buckets.layout)."""

    order: list[Whole]
    cuts: list[list[Whole]] | None = None
    made_for: list[Whole] | None = None


class ExchangeState(Fields):
    """State of the exchange of gradients."""

    kind: CompressionKind
    ranks: Annotated[int, Field(strict=True, ge=1, le=2**16)]
    layout: LayoutState | None


Nanoseconds = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


class TeacherState(Fields):
    """Identity of the teacher (teacher_identity.identify_teacher)."""

    fingerprint: str
    files: list[tuple[str, Whole, Nanoseconds]]


class SavedState(Fields):
    """What a checkpoint of this version, or an earlier one, holds beside tensors."""

    tokens: Whole
    best_update: Whole | None
    best_loss: Annotated[float, Field(strict=True)] | None
    corpus: str
    skipped: Whole
    loss_scale: ScaleState | None
    exchange: ExchangeState | None = None
    teacher: TeacherState | None = None
    recipe: str | None = None


def save(run: Run) -> None:
    if run.saved_update == run.update:
        return
    with rolling_back(run):
        skipped = run.guard.read()
    count(run)
    with run.aside("checkpoint"):
        _write_checkpoint(run, skipped)


def _write_checkpoint(run: Run, skipped: int) -> None:
    begun = time.perf_counter()
    residuals = run.exchange.tensors()
    owed = run.team.fetch_each(residuals, "residuals") if residuals else iter(())
    if not run.team.is_chief:
        run.saved_update = run.update
        for _ in owed:
            pass
        return
    tensors: dict[str, Any] = dict(learnt_tensors(run.modules, run.optimizer))
    if residuals:
        size = sum(tensor.nbytes for tensor in residuals.values())
        for rank in range(run.team.world.size):  # one rank's at a time in memory
            tensors[f"rank-{rank}"] = checkpoint.Deferred(size, lambda: next(owed))
    state = {
        "tokens": run.tokens,
        "best_update": run.best_update,
        "best_loss": run.best_loss,
        "corpus": run.inputs.source.identity,
        "teacher": run.teacher,
        "recipe": run.recipe.to_yaml(),  # of a run whose recipe.yaml is lost, see runs.restore_recipe
        "skipped": skipped,
        "loss_scale": run.loss_scale.state() if run.loss_scale is not None else None,
        "exchange": run.exchange.state(),
    }
    protect = frozenset() if run.best_update is None else frozenset({run.best_update})
    keep = run.recipe.checkpoint.keep
    path = checkpoint.save(run.directory / "checkpoints", run.update, tensors, state, keep=keep, protect=protect)
    run.event(Checkpoint(update=run.update, seconds=time.perf_counter() - begun, path=path.name))
    run.saved_update = run.update


def restore(run: Run, path: Path | None, teacher: nn.Module | None) -> None:
    """Continue from a checkpoint directory, or from the newest whole one of the run (None or a run directory).

    teacher: the module that was given from Python, if one was.
    """
    checkpoints: list[checkpoint.Loaded] = []

    def read() -> dict[str, Any] | None:
        loaded = _newest(run, path)
        if loaded is None:
            run.console.note(f"{run.directory} has no checkpoint yet: starting at its first update")
            run.teacher = identify_teacher(run.recipe, teacher)
            return None
        _check_loaded(run, loaded)
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
    load_learnt(run.team.share(checkpoints[0].tensors if checkpoints else None, "restore"), run.modules, run.optimizer)
    for message in run.exchange.restore(state.get("exchange"), lambda rank: checkpoints[0].read(f"rank-{rank}"), run.team):
        run.tell(message)
    if run.loss_scale is not None:
        run.loss_scale.load_state(state["loss_scale"])
    loop = run.recipe.loop
    run.guard = FiniteGuard(
        loop.nonfinite,
        loop.nonfinite_limit,
        done=state["update"],
        skipped=state["skipped"],
        describe=run.inputs.source.describe,
    )
    run.update, run.tokens = state["update"], state["tokens"]
    run.saved_update = run.update  # with what several ranks owed, which is in memory from here on
    run.best_update, run.best_loss = state["best_update"], state["best_loss"]
    run.console.note(f"continuing {run.directory} after update {run.update}")


def _check_loaded(run: Run, loaded: checkpoint.Loaded) -> None:
    """Raise CorruptData unless a checkpoint holds all that a run continues from."""
    try:
        check(SavedState, loaded.state)
        if missing := [group for group in LEARNT if group not in loaded.tensors]:
            raise ValueError(f"{missing[0]}.safetensors is missing")
        if run.loss_scale is not None and loaded.state["loss_scale"] is None:
            raise ValueError("loss_scale is null")
    except ValueError as error:
        raise CorruptData(f"{loaded.path} holds no state of this run ({reason(error)}); start anew") from error


def _newest(run: Run, path: Path | None) -> checkpoint.Loaded | None:
    # What ranks owe is read as it is sent to them, one rank's at a time.
    if path is not None and path.parent.name == "checkpoints":
        return checkpoint.load(path, run.inputs.device, LEARNT)
    return checkpoint.latest(run.directory / "checkpoints", run.console.note, run.inputs.device, LEARNT)


@contextmanager
def rolling_back(run: Run) -> Iterator[None]:
    """Around a read of the guard. On NonFinite, save: the state is as before the bad update, or (skip) without the skipped."""
    try:
        yield
    except NonFinite as error:
        if error.update is not None:
            good = error.update - 1
            run.unread = run.unread[: len(run.unread) - (run.update - good)]
            run.update = good
        count(run)
        if run.saved_update != run.update:  # else it is there, perhaps with what several ranks owed
            with run.aside("checkpoint"):
                _write_checkpoint(run, skipped=0)  # whoever continues after this may skip as many again
        with run.aside("finding what is not finite"):
            teacher = _blame_teacher(run, error.first)
        if teacher:
            message = f"{error.cause}; {teacher}; saved after update {run.update}"
        else:
            message = f"{error}; saved after update {run.update}, continue with {resume_command(run)}"
        run.event(RunNotFinite(update=run.update, message=message))
        raise NonFinite(message) from error


def give_up_evaluation(run: Run, error: NonFinite) -> None:
    """Go on without an evaluation that was not finite where updates that are not are skipped; else save and raise NonFinite."""
    message = f"evaluating after update {run.update}: {error}"
    if run.recipe.loop.nonfinite == "skip":
        run.tell(f"{message}; going on without this evaluation (loop.nonfinite=skip)")
        return
    save(run)
    run.event(RunNotFinite(update=run.update, message=message))
    way_out = f"continue with {resume_command(run)} loop.nonfinite=skip, which leaves such evaluations out"
    raise NonFinite(f"{message}; saved, {way_out}") from error


def _blame_teacher(run: Run, update: int | None) -> str:
    """What the teacher, or its cache, has to do with an update that was not finite; empty where it has nothing.

    All ranks call this, each looks at its own batches, and all get the first rank's answer that is one.
    """
    reason_here = _teacher_on_own_batches(run, update) or ""
    if run.team.alone:
        return reason_here
    answers = [answer.decode() for answer in run.team.collect_bytes(reason_here.encode(), "nonfinite")]
    return run.team.chief_does("blame", lambda: next(filter(None, answers), ""))


def _teacher_on_own_batches(run: Run, update: int | None) -> str | None:
    config, teacher, source = run.recipe.teacher, run.inputs.teacher, run.inputs.source
    batches: list[Batch] = []
    if update is not None and source.replayable and (teacher is not None or config is not None):
        with source.windows(update - 1, update) as windows:
            window, _ = next(windows, ([], None))
        batches = [batch.to(run.inputs.device) for batch in window]
    if config is not None and config.cache is not None:
        if any(batch.cached_log_probabilities_NK is not None and _has_nan(batch) for batch in batches):
            return f"the teacher's cache {config.cache} holds nan there; run fastdistil cache-teacher with this recipe again"
        return None
    if teacher is None or not run.recipe.objective.needs_teacher:
        return None
    on_batches = (first_not_finite(teacher, batch) for batch in batches)
    reason = next(filter(None, on_batches), None) if batches else first_not_finite(teacher, None)
    name = config.path if config is not None else "given from Python"
    advice = "give one that is finite there, or another teacher.dtype, and start anew under another name=..."
    return None if reason is None else f"the teacher {name} is not finite: {reason}; {advice}"


def _has_nan(batch: Batch) -> bool:
    values = (batch.cached_log_probabilities_NK, batch.cached_tail_N)
    return any(bool(tensor.isnan().any()) for tensor in values if tensor is not None)


@contextmanager
def saving_what_is_sound(run: Run) -> Iterator[None]:
    """Save the last update where the corpus or cache is damaged while it is in use: what was learnt before it is sound.

    A rank alone; of several the others would have to save too, and they go by its end.
    """
    try:
        yield
    except CorruptData as error:
        if run.team.world.size > 1 or run.update == run.saved_update:
            raise
        save(run)
        run.event(Note(update=run.update, message=str(error)))
        raise CorruptData(f"{error}; saved after update {run.update}, continue with {resume_command(run)}") from error


def count(run: Run) -> None:
    """What was read is no longer to be taken back."""
    run.tokens += sum(run.unread)
    run.unread.clear()


def resume_command(run: Run) -> str:
    """What continues this run, whatever it was started with; --resume auto does too, beside the same arguments."""
    command = "train" if run.recipe.teacher is not None else "pretrain"
    return f"fastdistil {command} {run.directory / 'recipe.yaml'} --resume {run.directory}"


Modules = Mapping[str, nn.Module | None]
"""Name -> module that is trained; None where the run has none."""


MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a weight."""


LEARNT = ("model", "optimizer")
"""The groups of `learnt_tensors`."""


def learnt_tensors(modules: Modules, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
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


def load_learnt(tensors: Mapping[str, Mapping[str, Tensor]], modules: Modules, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `learnt_tensors` gave, in place. Raises UserError if it is of other modules, CorruptData for moments that
    belong to no weight."""
    for part, module in modules.items():
        if module is not None:
            language_model.load_own_state(module, _below(tensors["model"], part))
    states: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {f"{index}.{key}": (index, key) for index in range(len(parameters)) for key in MOMENTS}
    for name, tensor in tensors["optimizer"].items():
        index, key = places.get(name, (0, ""))
        if not key or tensor.shape != (() if key == "step" else parameters[index].shape):
            raise CorruptData(
                f"the checkpoint's optimizer holds {name} of shape {list(tensor.shape)}, which belongs to no weight; start anew"
            )
        states.setdefault(index, {})[key] = tensor
    if any(len(moments) != len(MOMENTS) for moments in states.values()):
        raise CorruptData(f"the checkpoint's optimizer lacks one of {', '.join(MOMENTS)} of a weight; start anew")
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
