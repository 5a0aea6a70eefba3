"""The loop: the only file that knows the order of things.

    for each update:  window of micro-batches -> teacher, student, losses, backward
                      in the last backward the gradients travel between ranks -> clip -> schedule -> optimizer
    now and then:     one host sync and a log line; evaluation; checkpoint; a look at signals and at PAUSE

All that an update uses besides the weights and moments is a function of (seed, update): its batches, their masks, the
dropout's random numbers, the learning rate. A continued run therefore replays exactly what an uninterrupted one does, and a
checkpoint holds no generator state and no data position beyond the number of updates.

Several ranks run this same loop, each on its own micro-batches, and take every decision alike. Rank 0 alone reads and writes
the run directory.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.console import Console
from fastdistil.data.batch import Batch, Counts, Window
from fastdistil.data.corpus import Corpus
from fastdistil.data.ragged import update_seed
from fastdistil.distributed.coordinator import Coordinator, joined
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.errors import CorruptData, NonFinite, Stopped, translated
from fastdistil.events import Evaluation, EventLog, Note, RunDone, RunNotFinite, RunStopped, Trace
from fastdistil.gradients.exchange import make_exchange
from fastdistil.models import language_model
from fastdistil.models.perplexity import HeldOut, held_out
from fastdistil.objective import LossTerms, denominators, loss_terms
from fastdistil.profiling.memory import MemoryMeter
from fastdistil.recipe import Recipe
from fastdistil.runs import check_same_recipe, choose_run, clear_pause, create_run, sole_user, stored_recipe
from fastdistil.training import metrics
from fastdistil.training.export import export_student
from fastdistil.training.guards import FiniteGuard, Signals
from fastdistil.training.inputs import Inputs, load_inputs, resolve
from fastdistil.training.instruments import Instruments, estimate_of, with_teacher_dtype
from fastdistil.training.memory_advice import explaining_out_of_memory
from fastdistil.training.metrics import Imbalance
from fastdistil.training.optim import LossScale, learning_rate, make_optimizer
from fastdistil.training.pre_run import note_of_node, prepare_node
from fastdistil.training.reporting import announce, log, write_traces
from fastdistil.training.run_state import Run
from fastdistil.training.saving import blame_teacher, learnt_tensors, restore, restore_recipe, save
from fastdistil.training.teacher_identity import identify_teacher


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


def train(
    recipe: Recipe,
    *,
    recipe_name: str = "run",
    resume: str | Path | None = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    console: Console | None = None,
    place: RankInfo | None = None,
) -> Result:
    """Run a recipe from its first update, or from where it stopped, to its last. Raises FastdistilError.

    `teacher`, `student` (modules) and `batches` (an iterable of micro-batches, see `sources.MappingSource`) stand in for
    what the recipe names. `place`: which of several ranks this process is; all of them make this call.
    """
    recipe = resolve(recipe, own_teacher=teacher is not None)
    with ExitStack() as last, ExitStack() as stack:
        console = console or Console(quiet=place is not None and place.rank > 0)
        stack.callback(console.close)
        team = stack.enter_context(joined(place, recipe, console.note))
        chosen = team.chief_does("run", lambda: _choose(recipe, recipe_name, resume, team.world.size, console.note))
        directory, continued = Path(chosen["directory"]), chosen["continued"]
        recipe = recipe.with_(world={"ranks": chosen["ranks"]})
        local = prepare_node(team, recipe, console.note if team.is_chief else partial(note_of_node, place))
        if continued and team.is_chief:
            stack.enter_context(sole_user(directory, console.note))
            clear_pause(directory)  # the one that stopped it; a later one is meant for this process
        loading = partial(explaining_out_of_memory, lambda: "loading", MemoryMeter(team.world.device))
        with translated("loading the models and the corpus"), loading(recipe), team.unhurried("loading"):
            rank, ranks = team.world.rank, team.world.size
            provided = {"teacher": teacher, "student": student, "batches": batches}
            inputs = load_inputs(local, **provided, note=console.note, rank=rank, ranks=ranks)  # type: ignore[arg-type]
        team.require_equal({"corpus": inputs.source.identity, "models": _shapes(inputs)})
        if not continued:
            team.chief_does("create", lambda: create_run(directory, recipe))
            if team.is_chief:
                stack.enter_context(sole_user(directory, console.note))
        signals = Signals(console.note)
        with translated("starting", directory), loading(recipe, estimate_of(inputs, with_teacher_dtype(recipe, inputs))):
            run = _assemble(stack, recipe, directory, inputs, team, console, signals)
            console.when_lost(lambda message: run.event(Note(update=run.update, message=message)))
            stack.callback(console.close)  # before the log
            if continued:
                with team.unhurried("restoring"):
                    restore(run, None if resume == "auto" else Path(resume or directory), teacher)
            else:
                with team.unhurried("starting"):
                    if team.is_chief:
                        run.teacher = identify_teacher(recipe, teacher)
                    team.share({"model": learnt_tensors(run.modules, run.optimizer)["model"]}, "start")
            announce(run)
        # Until the ranks have left together: a signal that comes while rank 0 still saves must not end the others. While a
        # large teacher is identified, a signal ends the process as it does while loading.
        last.enter_context(signals)
        with translated("training", directory), run.instruments.naming_out_of_memory(), _saving_what_is_sound(run):
            _loop(run)
            return _finish(run)


def _choose(
    recipe: Recipe, recipe_name: str, resume: str | Path | None, ranks: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """The run's directory, whether it is continued, and the ranks that its updates are counted for."""
    directory, continued = choose_run(recipe, recipe_name, resume)
    counted_for = recipe.world.ranks or ranks
    if continued:
        restore_recipe(directory, note)
        counted_for = recipe.world.ranks or stored_recipe(directory).world.ranks or 1
        check_same_recipe(directory, recipe.with_(world={"ranks": counted_for}))
    return {"directory": str(directory), "continued": continued, "ranks": counted_for}


def _shapes(inputs: Inputs) -> str:
    modules = {"student": inputs.student, "teacher": inputs.teacher, "projection": inputs.projection}
    named = [(part, name, p) for part, module in modules.items() if module is not None for name, p in module.named_parameters()]
    return " ".join(f"{part}.{name}{tuple(parameter.shape)}" for part, name, parameter in named)


def _loop(run: Run) -> None:
    log_every, evaluate_every = run.recipe.logging.every, run.recipe.evaluation.every
    save_every = run.recipe.checkpoint.every
    tracer = run.instruments.tracer
    with run.inputs.source.windows(run.update, run.inputs.updates) as windows:
        first = True
        while True:
            if run.update < run.inputs.updates and tracer.begins(run.update + 1):
                tracer.wait()
                with run.aside("trace"):
                    tracer.start()
            run.team.phase("data", run.update + 1)
            run.instruments.begin()
            requested_s = time.perf_counter()
            with run.instruments.span("data"):
                next_window = next(windows, None)
            if next_window is None:
                break
            window, counts = next_window
            # The first one compiles what runs on a GPU, or everything, for as long as that takes.
            compiles = first and (run.recipe.loop.compile or run.inputs.device.type == "cuda")
            with run.team.unhurried("first update") if compiles else nullcontext():
                happened = train_step(run, window, counts, time.perf_counter() - requested_s)
            if not happened:
                _stop(run)
            first = False
            run.instruments.end()
            last = run.update == run.inputs.updates
            if tracer.ends(run.update, last=last):
                _finish_trace(run)
            if (check := run.recipe.world.check_replicas) and run.update % check == 0:
                run.team.check_replicas(run.parameters, run.update)
            if run.update % log_every == 0 or last:
                log(run)
            if evaluate_every and run.update % evaluate_every == 0 and not last:
                _evaluate(run)
            if save_every and run.update % save_every == 0 and not last:
                save(run)


@contextmanager
def _saving_what_is_sound(run: Run) -> Iterator[None]:
    """Save what was learnt before a corpus or cache was seen to be damaged, or before an update that was not finite.

    Where a corpus is damaged only a rank alone saves: of several the others would have to save too, and they go by its end.
    """
    try:
        yield
    except CorruptData as error:
        if not run.team.alone or run.update == run.saved_update:
            raise
        try:
            save(run)
        except NonFinite as not_finite:  # of an update since the last log line
            raise _save_before(run, not_finite) from error
        run.event(Note(update=run.update, message=str(error)))
        raise CorruptData(f"{error}; saved after update {run.update}, {run.way_on}") from error
    except NonFinite as error:
        if error.first is None:  # of an evaluation, which has saved
            raise
        raise _save_before(run, error) from error


def _save_before(run: Run, error: NonFinite) -> NonFinite:
    """Save the state as it was before the bad update, or without the skipped ones; return the error that says so."""
    if error.update is not None:  # else the bad updates were skipped
        run.take_back(error.update)
    save(run, skipped=0)  # whoever continues after this may skip as many again
    with run.aside("finding what is not finite"):
        teacher = blame_teacher(run.recipe, run.inputs, run.team, error.first)
    saved = f"saved after update {run.update}"
    message = f"{error.cause}; {teacher}; {saved}" if teacher else f"{error}; {saved}, {run.way_on}"
    run.event(RunNotFinite(update=run.update, message=message))
    return NonFinite(message)


def train_step(run: Run, window: Window, update_counts: Counts, waited_s: float) -> bool:
    """One update: all micro-batches of the window, then the optimizer. Waits for nothing on the device.

    False if a signal or PAUSE arrived meanwhile, here or on another rank: then the window is dropped and the update has not
    happened.
    """
    exchange, tokens, world = run.exchange, 0, run.team.world
    torch.manual_seed(update_seed(run.recipe.seed, run.update, world.rank))  # so that a continued run draws the same
    exchange.begin(run.update)
    sums = dict.fromkeys(LossTerms._fields, torch.zeros((), device=run.inputs.device))
    # A rank may have a micro-batch less than others, even none: it takes part in what they exchange all the same.
    rounds = -(-update_counts.batches // world.size)
    agreed = False
    for number in range(rounds):
        leaves = exchange.leaves_in(number, rounds)
        # All agree once before gradients leave. Who hears of a stop asks at once, and everybody hears within a micro-batch.
        if (leaves or run.stop_wanted) and not agreed:
            if run.agree_to_stop(update_counts):
                exchange.drop()
                return False
            agreed = True
        agreed = agreed and not leaves
        if number < len(window):
            tokens += window[number].counts.tokens
            for name, term in _forward_backward(run, window[number], update_counts, number, rounds)._asdict().items():
                sums[name] = sums[name] + term.detach()
        else:
            exchange.backward(None, number, rounds)
    run.team.phase("exchange", run.update + 1)
    sums = exchange.finish(sums)
    run.team.phase("optimizer", run.update + 1)
    with run.instruments.span("optimizer"):
        grad_norm, found_inf = _apply_gradients(run, sums)
    run.update += 1
    for message in exchange.done(run.update, found_inf):
        run.tell(message)
    run.unread.append(update_counts.tokens)
    run.meter.add(sums, grad_norm, update_counts.tokens, waited_s, found_inf)
    run.load.add(tokens, waited_s)
    return True


def _forward_backward(run: Run, on_host: Batch, update_counts: Counts, number: int, rounds: int) -> LossTerms:
    """Micro-batch `number` of an update's `rounds`."""
    inputs, objective, span = run.inputs, run.recipe.objective, run.instruments.span
    run.team.phase("forward", run.update + 1)
    with span("transfer"):
        batch = on_host.to(inputs.device, non_blocking=True)
    per = denominators(objective, update_counts, batch.counts)
    models = inputs.student, inputs.teacher
    options: dict[str, Any] = {"columns": inputs.columns, "backend": run.recipe.kernels, "span": span}
    with run.instruments.micro_batch(on_host), run.autocast():
        terms = loss_terms(objective, *models, batch, per, inputs.projection, **options)
    run.team.phase("backward", run.update + 1)
    with span("backward"):
        run.exchange.backward(terms.total if run.loss_scale is None else terms.total * run.loss_scale.scale, number, rounds)
    return terms


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
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(optim, run.update, run.inputs.updates)
    # The fused optimizer leaves weights, moments and step as they were where found_inf is 1: no wait for the host.
    run.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    run.optimizer.grad_scale = None  # type: ignore[attr-defined]
    run.optimizer.step()
    return grad_norm, found_inf


def _assemble(
    stack: ExitStack,
    recipe: Recipe,
    directory: Path,
    inputs: Inputs,
    team: Coordinator,
    console: Console,
    signals: Signals,
) -> Run:
    if recipe.loop.deterministic:
        # cuBLAS reads it when it is first used, which is later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        stack.callback(torch.use_deterministic_algorithms, False)
    events = board = None
    if team.is_chief:
        events = stack.enter_context(EventLog(directory / "events.jsonl"))
        if recipe.logging.tensorboard:
            board = metrics.TensorBoard(directory / "tensorboard", console.note)
            stack.callback(board.close)
    optimizer = make_optimizer([m for m in (inputs.student, inputs.projection) if m is not None], recipe.optim)
    loss_scale = LossScale(inputs.device) if recipe.loop.precision == "fp16" else None
    guard = FiniteGuard(recipe.loop.nonfinite, recipe.loop.nonfinite_limit, describe=inputs.source.describe)
    inputs.student.train()
    instruments = Instruments(recipe, inputs, team.is_chief, console.note)
    stack.callback(instruments.close)
    return Run(
        recipe=recipe,
        directory=directory,
        inputs=inputs,
        team=team,
        exchange=make_exchange(recipe, team.world, optimizer, instruments.spans),
        optimizer=optimizer,
        loss_scale=loss_scale,
        guard=guard,
        meter=metrics.Meter(),
        events=events,
        console=console,
        board=board,
        signals=signals,
        load=Imbalance(team.world),
        instruments=instruments,
    )


def _evaluate(run: Run) -> HeldOut | None:
    """Evaluate on the held-out corpus; a new best is saved and kept. None where there is none, or where one was given up."""
    if (heldout := run.inputs.data.heldout) is None:
        return None
    # The device's queue is waited for here, where it counts as training; and what is evaluated is what its number says.
    run.guard.read()
    begun = time.perf_counter()
    try:
        with run.aside("evaluation"):
            measured = run.team.chief_does("evaluation", lambda: _measure(run.recipe, run.inputs, heldout))
    except NonFinite as error:
        message = f"evaluating after update {run.update}: {error}"
        if run.recipe.loop.nonfinite == "skip":
            run.tell(f"{message}; going on without this evaluation (loop.nonfinite=skip)")
            return None
        save(run)
        run.event(RunNotFinite(update=run.update, message=message))
        raise NonFinite(f"{message}; saved, {run.way_on} loop.nonfinite=skip, which leaves such evaluations out") from error
    losses = HeldOut(**measured)
    run.event(Evaluation(update=run.update, seconds=time.perf_counter() - begun, **measured))
    run.console.note(
        f"update {run.update}: held-out loss {losses.loss:.4f} ± {losses.loss_se:.4f}, perplexity {losses.perplexity:.2f}"
    )
    if run.board is not None:
        run.board.write(run.update, {f"evaluation/{name}": value for name, value in measured.items()})
    if math.isfinite(losses.loss) and (run.best_loss is None or losses.loss < run.best_loss):
        run.best_loss, run.best_update = losses.loss, run.update
        if not run.exchange.owes:  # what it owes lies in the checkpoint that it was continued from
            run.saved_update = None
        save(run)
    return losses


def _measure(recipe: Recipe, inputs: Inputs, heldout: Corpus) -> dict[str, Any]:
    """Return the fields of HeldOut, for the student on the held-out corpus."""
    losses = held_out(
        inputs.student,
        heldout,
        heldout.facts,
        teacher=inputs.teacher,
        columns=inputs.columns,
        max_sequences=recipe.evaluation.max_sequences,
        batch_tokens=recipe.evaluation.batch_tokens,
        layout=recipe.data.layout,
        precision=recipe.loop.precision,
    )
    return asdict(losses)


def _finish_trace(run: Run) -> None:
    tracer, directory = run.instruments.tracer, run.directory / "trace"
    tracer.wait()
    with run.aside("trace"):
        kernels = write_traces(tracer, run.team, directory)
    first, last = run.recipe.profile.trace_steps or (0, 0)
    last = min(last, run.update)
    run.event(Trace(update=run.update, first=first, last=last, kernels=kernels))
    most = f"; most of the time in {kernels[0].name} ({kernels[0].share:.0%})" if kernels else ""
    run.tell(f"traced updates {first} to {last}{most}: open {directory}/*.json.gz in ui.perfetto.dev")


def _stop(run: Run) -> None:
    """Save the last update's state, evaluate when paused, and leave."""
    assert run.stopping is not None
    why = run.stopping.why
    save(run)
    if run.stopping.paused:
        _evaluate(run)
        if run.team.is_chief:
            clear_pause(run.directory)
    run.event(RunStopped(update=run.update, why=why))
    raise Stopped(f"{why}: saved {run.directory} after update {run.update}; {run.way_on}")


def _finish(run: Run) -> Result:
    heldout = _evaluate(run)
    save(run)
    speed = run.logged_tokens / run.logged_s if run.logged_s else 0.0
    if run.team.is_chief:
        with translated("saving the student", run.directory), run.team.unhurried("saving"):
            counts = {"updates": run.update, "tokens": run.tokens}
            export_student(run.inputs, run.recipe, run.directory / "student", heldout, **counts, note=run.tell)
    run.console.close()  # if it is gone, the log says so before its last line
    run.event(RunDone(update=run.update, tokens=run.tokens, tokens_per_second=speed))
    student = run.inputs.student
    module = student.module if isinstance(student, language_model.LanguageModel) else student
    return Result(run.directory, module.eval(), run.update, heldout, speed)
