"""The loop: the only file that knows the order of things.

    for each update:  window of micro-batches -> teacher, student, losses, backward -> clip -> optimizer -> schedule
    now and then:     one host sync and a log line; evaluation; checkpoint; a look at signals and at PAUSE

All that an update uses besides the weights and moments is a function of (seed, update): its batches, their masks, the
dropout's random numbers, the learning rate. A continued run therefore replays exactly what an uninterrupted one does, and a
checkpoint holds no generator state and no data position beyond the number of updates.
"""

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil import checkpoint, metrics, models
from fastdistil.batches import Counts, Window
from fastdistil.errors import NonFinite, Stopped, UserError, translated
from fastdistil.evaluate import HeldOut, held_out
from fastdistil.export import export_student
from fastdistil.inputs import Inputs, load_inputs, resolve
from fastdistil.masking import update_seed
from fastdistil.objective import denominators, loss_terms
from fastdistil.optim import LossScale, learning_rate, make_optimizer
from fastdistil.recipe import Objective, Recipe, load_recipe, replace_alternatives, validated
from fastdistil.runs import PAUSE, check_same_recipe, choose_run, clear_pause, create_run, pause_requested, sole_user
from fastdistil.state import learnt_tensors, load_learnt
from fastdistil.watchdog import FiniteGuard, Signals


@dataclass(frozen=True)
class Result:
    run_dir: Path
    student: nn.Module
    """A transformers model, or your own module."""
    updates: int
    evaluation: HeldOut | None
    """Of the student on data.heldout at the end, if there is one."""
    tokens_per_second: float
    """Of the updates done by this call, without evaluations and checkpoints; 0 if there were none."""


@dataclass
class Run:
    """Everything the loop holds. `update` counts the updates done: it is the position of the run."""

    recipe: Recipe
    directory: Path
    inputs: Inputs
    optimizer: torch.optim.AdamW
    loss_scale: LossScale | None
    guard: FiniteGuard
    meter: metrics.Meter
    events: metrics.EventLog
    console: metrics.Console
    board: metrics.TensorBoard | None
    signals: Signals
    update: int = 0
    best_update: int | None = None
    best_loss: float | None = None
    tokens: int = 0
    """Of all updates done."""
    unread: list[int] = field(default_factory=list)
    """Tokens of each update since the last log line: what a bad one among them takes back."""
    logged_tokens: int = 0
    logged_s: float = 0.0
    saved_update: int | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        return {"student": self.inputs.student, "projection": self.inputs.projection}

    @property
    def interrupted(self) -> bool:
        return self.signals.requested is not None or pause_requested(self.directory)

    def autocast(self) -> AbstractContextManager[Any]:
        precision = self.recipe.loop.precision
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.inputs.device.type, models.DTYPES[precision])


def train(
    recipe: Recipe,
    *,
    recipe_name: str = "run",
    resume: str | Path | None = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    console: metrics.Console | None = None,
) -> Result:
    """Run a recipe from its first update, or from where it stopped, to its last. Raises FastdistilError.

    `teacher`, `student` (modules) and `batches` (an iterable of micro-batches, see `inputs.MappingSource`) stand in for what
    the recipe names.
    """
    recipe = resolve(recipe, own_teacher=teacher is not None)
    directory, continued = choose_run(recipe, recipe_name, resume)
    if continued:
        check_same_recipe(directory, recipe)
    console = console or metrics.Console()
    with ExitStack() as stack:
        stack.callback(console.close)
        if continued:
            stack.enter_context(sole_user(directory))
            clear_pause(directory)  # the one that stopped it; a later one is meant for this process
        with translated("loading the models and the corpus"):
            inputs = load_inputs(recipe, teacher=teacher, student=student, batches=batches, note=console.note)
        if not continued:
            create_run(directory, recipe)
            stack.enter_context(sole_user(directory))
        signals = stack.enter_context(Signals(console.note))
        run = _assemble(stack, recipe, directory, inputs, console, signals)
        if continued:
            _restore(run, None if resume == "auto" else Path(resume or directory))
        _announce(run)
        with translated("training", directory):
            _loop(run)
            return _finish(run)


def _loop(run: Run) -> None:
    every = run.recipe.evaluation.every, run.recipe.checkpoint.every, run.recipe.logging.every
    evaluate_every, save_every, log_every = every
    with run.inputs.source.windows(run.update, run.inputs.updates) as windows:
        asked = time.perf_counter()
        for window, counts in windows:
            waited_s = time.perf_counter() - asked
            if not train_step(run, window, counts, waited_s):
                _stop(run)
            last = run.update == run.inputs.updates
            if run.update % log_every == 0 or last:
                _log(run)
            if evaluate_every and run.update % evaluate_every == 0 and not last:
                _evaluate(run)
            if save_every and run.update % save_every == 0 and not last:
                _save(run)
            asked = time.perf_counter()


def train_step(run: Run, window: Window, update_counts: Counts, waited_s: float) -> bool:
    """One update: all micro-batches of the window, then the optimizer. Waits for nothing on the device.

    False if a signal or PAUSE arrived meanwhile: then the window is dropped and the update has not happened.
    """
    inputs, objective = run.inputs, run.recipe.objective
    torch.manual_seed(update_seed(run.recipe.seed, run.update))  # so that a continued run draws the same
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for on_host in window:
        if run.interrupted:
            run.optimizer.zero_grad(set_to_none=True)
            return False
        batch = on_host.to(inputs.device, non_blocking=True)
        per = denominators(objective, update_counts, batch.counts, len(window))
        with run.autocast():
            terms = loss_terms(
                objective, inputs.student, inputs.teacher, batch, per, inputs.projection, path=run.recipe.kernels
            )
        torch.autograd.backward(terms.total if run.loss_scale is None else terms.total * run.loss_scale.scale)
        for name, term in terms._asdict().items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    grad_norm, found_inf = _apply_gradients(run, sums)
    run.update += 1
    run.unread.append(update_counts.tokens)
    run.meter.add(sums, grad_norm, update_counts.tokens, waited_s, found_inf)
    return True


def _apply_gradients(run: Run, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Clip and step, unless a loss or the gradient is not finite. Returns the norm before clipping, and that flag."""
    optim = run.recipe.optim
    if run.loss_scale is not None:
        run.loss_scale.unscale(run.parameters)
    clip = optim.clip if optim.clip is not None else float("inf")
    grad_norm = nn.utils.clip_grad_norm_(run.parameters, clip, foreach=True)
    if run.loss_scale is None:
        found_inf = run.guard.check(sums, grad_norm, run.update + 1)
    else:
        sums["loss_scale"] = run.loss_scale.scale
        overflow, judged = run.loss_scale.update(grad_norm)
        found_inf = torch.maximum(run.guard.check(sums, judged, run.update + 1), overflow)
    # The fused optimizer leaves weights, moments and step as they were where found_inf is 1: no wait for the host.
    run.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    run.optimizer.grad_scale = None  # type: ignore[attr-defined]
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(optim, run.update, run.inputs.updates)
    run.optimizer.step()
    return grad_norm, found_inf


def _assemble(
    stack: ExitStack, recipe: Recipe, directory: Path, inputs: Inputs, console: metrics.Console, signals: Signals
) -> Run:
    if recipe.loop.deterministic:
        # cuBLAS reads it when it is first used, which is later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        stack.callback(torch.use_deterministic_algorithms, False)
    board = metrics.TensorBoard(directory / "tensorboard", console.note) if recipe.logging.tensorboard else None
    events = metrics.EventLog(directory / "events.jsonl")
    stack.callback(events.close)
    if board is not None:
        stack.callback(board.close)
    optimizer = make_optimizer([m for m in (inputs.student, inputs.projection) if m is not None], recipe.optim)
    loss_scale = LossScale(inputs.device) if recipe.loop.precision == "fp16" else None
    guard = FiniteGuard(recipe.loop.nonfinite, recipe.loop.nonfinite_limit, describe=inputs.source.describe)
    inputs.student.train()
    meter = metrics.Meter()
    return Run(recipe, directory, inputs, optimizer, loss_scale, guard, meter, events, console, board, signals)


def _announce(run: Run) -> None:
    run.events.write(
        "resume" if run.update else "start",
        update=run.update,
        updates=run.inputs.updates,
        engine="alone",
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


def _log(run: Run) -> None:
    """The one host sync of a log line."""
    with _rolling_back(run):
        fields: dict[str, Any] = run.meter.read(run.guard)
    _count(run)
    fields["lr"] = run.optimizer.param_groups[0]["lr"]
    run.logged_tokens += fields["tokens"]
    run.logged_s += fields["tokens"] / fields["tokens_per_s"]
    run.events.write("train", update=run.update, **fields)
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


@contextmanager
def _rolling_back(run: Run) -> Iterator[None]:
    """Around a read of the guard. On NonFinite, save: the state is as before the bad update, or (skip) without the skipped."""
    try:
        yield
    except NonFinite as error:
        if error.update is not None:
            good = error.update - 1
            run.unread = run.unread[: len(run.unread) - (run.update - good)]
            run.update = good
        _count(run)
        _write_checkpoint(run, skipped=0)  # whoever continues after this may skip as many again
        run.events.write("nonfinite", update=run.update, message=str(error))
        raise NonFinite(f"{error}; saved after update {run.update}, continue with {_command(run)}") from error


def _count(run: Run) -> None:
    """What was read is no longer to be taken back."""
    run.tokens += sum(run.unread)
    run.unread.clear()


def _evaluate(run: Run) -> HeldOut | None:
    """Evaluate on the held-out corpus; a new best is saved and kept."""
    inputs, evaluation = run.inputs, run.recipe.evaluation
    if inputs.heldout is None or inputs.facts is None:
        return None
    with _rolling_back(run):
        # The device's queue is waited for here, where it counts as training; and what is evaluated is what its number says.
        run.guard.read()
    begun = time.perf_counter()
    with run.meter.excluded():
        found = held_out(
            inputs.student,
            inputs.heldout,
            inputs.facts,
            teacher=inputs.teacher,
            max_sequences=evaluation.max_sequences,
            batch_tokens=evaluation.batch_tokens,
            layout=run.recipe.data.layout,
            device=inputs.device,
            precision=run.recipe.loop.precision,
        )
    run.events.write("evaluation", update=run.update, seconds=time.perf_counter() - begun, **asdict(found))
    run.console.note(
        f"update {run.update}: held-out loss {found.loss:.4f} ± {found.loss_se:.4f}, perplexity {found.perplexity:.2f}"
    )
    if run.board is not None:
        run.board.write(run.update, {f"evaluation/{name}": value for name, value in asdict(found).items()})
    if math.isfinite(found.loss) and (run.best_loss is None or found.loss < run.best_loss):
        run.best_loss, run.best_update = found.loss, run.update
        run.saved_update = None
        _save(run)
    return found


def _save(run: Run) -> None:
    if run.saved_update == run.update:
        return
    with _rolling_back(run):
        skipped = run.guard.read()
    _count(run)
    with run.meter.excluded():
        _write_checkpoint(run, skipped)


def _write_checkpoint(run: Run, skipped: int) -> None:
    begun = time.perf_counter()
    tensors = learnt_tensors(run.modules, run.optimizer)
    state = {
        "tokens": run.tokens,
        "best_update": run.best_update,
        "best_loss": run.best_loss,
        "corpus": run.inputs.source.identity,
        "skipped": skipped,
        "loss_scale": run.loss_scale.state() if run.loss_scale is not None else None,
    }
    protect = frozenset() if run.best_update is None else frozenset({run.best_update})
    keep = run.recipe.checkpoint.keep
    path = checkpoint.save(run.directory / "checkpoints", run.update, tensors, state, keep=keep, protect=protect)
    run.events.write("checkpoint", update=run.update, seconds=time.perf_counter() - begun, path=path.name)


def _restore(run: Run, path: Path | None) -> None:
    """Continue from a checkpoint directory, or from the newest whole one of the run (None or a run directory)."""
    if path is not None and path.parent.name == "checkpoints":
        loaded = checkpoint.load(path, run.inputs.device)
    else:
        newest = checkpoint.latest(run.directory / "checkpoints", run.console.note, run.inputs.device)
        if newest is None:
            run.console.note(f"{run.directory} has no checkpoint yet: starting at its first update")
            return
        loaded = newest
    if loaded.state["corpus"] != run.inputs.source.identity:
        raise UserError(
            f"{loaded.path} was trained on another corpus than {run.recipe.data.train}; give back that corpus, or start anew"
        )
    load_learnt(loaded.tensors, run.modules, run.optimizer)
    if run.loss_scale is not None:
        run.loss_scale.load_state(loaded.state["loss_scale"])
    loop = run.recipe.loop
    run.guard = FiniteGuard(
        loop.nonfinite,
        loop.nonfinite_limit,
        done=loaded.update,
        skipped=loaded.state["skipped"],
        describe=run.inputs.source.describe,
    )
    run.update, run.tokens = loaded.update, loaded.state["tokens"]
    run.best_update, run.best_loss = loaded.state["best_update"], loaded.state["best_loss"]
    run.console.note(f"continuing {run.directory} after update {run.update}")


def _stop(run: Run) -> None:
    """Save the last update's state, evaluate when paused, and leave."""
    why = run.signals.requested or PAUSE
    _save(run)
    if why == PAUSE:
        _evaluate(run)
        clear_pause(run.directory)
    run.events.write("stopped", update=run.update, why=why)
    raise Stopped(f"{why}: saved {run.directory} after update {run.update}; continue with {_command(run)}")


def _command(run: Run) -> str:
    """What continues this run, whatever it was started with; --resume auto does too, beside the same arguments."""
    command = "train" if run.recipe.teacher is not None else "pretrain"
    return f"fastdistil {command} {run.directory / 'recipe.yaml'} --resume {run.directory}"


def _finish(run: Run) -> Result:
    found = _evaluate(run)
    _save(run)
    speed = run.logged_tokens / run.logged_s if run.logged_s else 0.0
    with translated("saving the student", run.directory):
        export_student(run.inputs, run.recipe, run.directory / "student", found, updates=run.update, tokens=run.tokens)
    run.events.write("done", update=run.update, tokens=run.tokens, tokens_per_second=speed)
    student = run.inputs.student
    module = student.module if isinstance(student, models.LanguageModel) else student
    return Result(run.directory, module.eval(), run.update, found, speed)


def distil(
    recipe: str | Path | Recipe,
    *,
    teacher: str | Path | nn.Module | None = None,
    student: str | Path | Mapping[str, Any] | nn.Module | None = None,
    corpus: str | Path | Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None = None,
    **overrides: Any,
) -> Result:
    """Distil `teacher` into `student` on `corpus` as a recipe says; what is given here replaces what the recipe names.

    teacher   hub id, directory, or a module (models.LanguageModel, transformers model, or one with its interface)
    student   hub id, directory, a mapping of the recipe's student section, or a module
    corpus    directory written by `fastdistil prepare`, or an iterable of micro-batches (see `inputs.MappingSource`)
    overrides sections as mappings or plain keys: optim={"lr": 1e-4}, name="mine"

    Raises FastdistilError; its exit_code tells what happened.
    """
    name = "run" if isinstance(recipe, Recipe) else Path(recipe).stem
    start = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    values = start.model_dump()
    if teacher is not None:
        values["teacher"] = {**(values["teacher"] or {}), "path": _named(teacher)}
    if isinstance(student, Mapping):
        values["student"] = dict(student)
    elif student is not None:
        values["student"] = {"path": _named(student)}
    if corpus is not None:
        values["data"]["train"] = _named(corpus)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            replace_alternatives(values, key, value)
        values[key] = {**(values.get(key) or {}), **value} if isinstance(value, Mapping) else value
    return train(
        validated(values, "distil(...)"),
        recipe_name=name,
        resume=resume,
        teacher=teacher if isinstance(teacher, nn.Module) else None,
        student=student if isinstance(student, nn.Module) else None,
        batches=corpus if corpus is not None and not isinstance(corpus, (str, Path)) else None,
    )


def _named(given: object) -> str:
    """A path as it is; an object by its type, so that recipe.yaml says where it came from."""
    return str(given) if isinstance(given, (str, Path)) else f"(a {type(given).__qualname__} given from Python)"
