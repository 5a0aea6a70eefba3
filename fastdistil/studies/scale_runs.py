"""The short runs of `fastdistil scale`: at several rank counts, turn about, against the linear ideal.

A point is `fastdistil train` (or pretrain) of the recipe with evaluation and checkpoints off and a log line each update, its
ranks started as --np and --hosts start them. Rounds go through all points forwards and backwards in turn, so that what drifts
does so for all. Each rank has the same threads at every point: otherwise one rank would have the cores of all.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from fastdistil import __version__
from fastdistil.errors import FastdistilError, UserError, translated
from fastdistil.launch.job import Job, choose_slots
from fastdistil.launch.launcher import launch
from fastdistil.launch.rank_process import Slot
from fastdistil.profiling.device import usable_cores
from fastdistil.profiling.report.history import load_history
from fastdistil.recipe import RECIPES, Compression, Recipe, WorldOptions, load_recipe
from fastdistil.redaction import redacted
from fastdistil.studies.cost_fit import Point, Workload
from fastdistil.studies.networks import Network
from fastdistil.studies.points import (
    MeasuredPoints,
    Mode,
    Round,
    Setting,
    choose_baseline,
    model_point,
    read_round,
)
from fastdistil.untrusted import Fields, Text, Whole, converted, read_json, real, reason

WARMUP = 2
"""First updates of each run that are not counted: allocations, connections, the order of buckets."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured, as the user asked for it."""

    recipe: str
    overrides: tuple[str, ...] = ()
    ranks: tuple[int, ...]
    hosts: str | None = None
    modes: tuple[Mode, ...] = ("weak",)
    rings: tuple[int, ...] = (1,)
    compression: tuple[str, ...] = ("none",)
    sync: tuple[str, ...] = ("delayed",)
    steps: int = 6
    rounds: int = 3
    ceiling: bool = True
    on: Network | None = None
    """The network that is measured on, where it is known."""
    out: Path


def settings(study: Study, accumulation: int) -> list[Setting]:
    """Every point once. `accumulation`: of one rank. Raises UserError."""
    distinct: list[Setting] = []
    for ranks, mode, rings, compression, sync in product(
        sorted(set(study.ranks)), study.modes, study.rings, study.compression, study.sync
    ):
        if compression not in (kinds := get_args(Compression.model_fields["kind"].annotation)):
            raise UserError(f"--compression {compression} is none of {', '.join(kinds)}")
        if sync not in (ways := get_args(WorldOptions.model_fields["sync"].annotation)):
            raise UserError(f"--sync {sync} is none of {', '.join(ways)}")
        if mode == "strong" and accumulation % ranks:
            raise UserError(
                f"--mode strong shares loop.accumulation={accumulation} among {ranks} ranks; choose one that {ranks} divides"
            )
        if ranks == 1:  # nothing travels: one point for all of them
            chosen = Setting(ranks=1, accumulation=accumulation)
        else:
            per_rank = accumulation // ranks if mode == "strong" else accumulation
            chosen = Setting(ranks=ranks, rings=rings, compression=compression, sync=sync, accumulation=per_rank, mode=mode)
        if chosen not in distinct:
            distinct.append(chosen)
    return distinct


def measure(study: Study, tell: Callable[[str], None]) -> tuple[list[MeasuredPoints], Recipe]:
    """Run all points. Raises FastdistilError as the first run that fails does."""
    with translated("making the directory of the study", study.out):
        study.out.mkdir(parents=True, exist_ok=True)
    if any(study.out.iterdir()):
        raise UserError(f"{study.out} is not empty; choose another --out")
    study = _with_demo(study, tell)
    recipe = load_recipe(study.recipe, study.overrides)
    planned = settings(study, recipe.loop.accumulation)
    for setting in planned:
        load_recipe(study.recipe, [*study.overrides, *_overrides(setting, study, study.out / "x")])
        choose_slots(setting.ranks, study.hosts)
    threads = _threads(planned, study)
    runner = _Runner(study, "train" if recipe.teacher is not None else "pretrain", threads)
    alone = Setting(ranks=1, accumulation=recipe.loop.accumulation)
    crowds = (
        sorted({setting.ranks for setting in planned if setting.ranks > 1}) if study.ceiling and study.hosts is None else []
    )
    rounds: dict[Setting, list[Round]] = {setting: [] for setting in planned}
    ceilings: dict[int, list[tuple[Round, ...]]] = {ranks: [] for ranks in crowds}
    for number in range(study.rounds):
        turns: list[Setting | int] = [*planned, *crowds]
        for position, turn in enumerate(turns if number % 2 == 0 else turns[::-1]):
            folder = study.out / f"round-{number + 1}" / f"{position + 1}"
            if isinstance(turn, int):
                ceilings[turn].append(runner.side_by_side(alone, turn, folder))
                tell(f"round {number + 1}/{study.rounds}: {turn} unconnected runs: {_rate(ceilings[turn][-1])}")
            else:
                rounds[turn].append(runner.connected(turn, folder))
                tell(f"round {number + 1}/{study.rounds}: {turn.name}: {_rate(rounds[turn][-1:])}")
    return [_measured(setting, rounds[setting], ceilings, threads, study) for setting in planned], recipe


def _rate(runs: Iterable[Round]) -> str:
    return f"{sum(run.tokens_per_s for run in runs):,.0f} tokens/s"


def _measured(
    setting: Setting, rounds: Sequence[Round], ceilings: dict[int, list[tuple[Round, ...]]], threads: int, study: Study
) -> MeasuredPoints:
    slots = choose_slots(setting.ranks, study.hosts)[0][: setting.ranks]
    hosts = {slot.host for slot in slots}
    most = max(sum(slot.host == host for slot in slots) for host in hosts)
    on_cpu = (rounds[0].start.device or "cpu").startswith("cpu")
    cores = rounds[0].environment.cores or usable_cores()
    return MeasuredPoints(
        setting=setting,
        nodes=len(hosts),
        rounds=tuple(rounds),
        ceiling=tuple(ceilings.get(setting.ranks, ())),
        oversubscribed=on_cpu and most * threads > cores,
        link_bytes_per_s=study.on.bandwidth(setting.rings, len(hosts)) if study.on is not None and len(hosts) > 1 else None,
    )


def _threads(planned: Sequence[Setting], study: Study) -> int:
    """Return the threads of each rank, the same at all points.

    Hosts are taken to have this machine's cores where OMP_NUM_THREADS is not set.
    """
    omp_threads = os.environ.get("OMP_NUM_THREADS", "")
    if omp_threads.isdecimal() and int(omp_threads):
        return int(omp_threads)
    cores, most = usable_cores(), 1
    for setting in planned:
        slots = choose_slots(setting.ranks, study.hosts)[0][: setting.ranks]
        here = max(sum(slot.host == other.host for slot in slots) for other in slots)
        most = max(most, here) if here <= cores else most
    return max(1, int(cores // most))


def _overrides(setting: Setting, study: Study, run: Path) -> list[str]:
    """Return the overrides, to follow the user's, that make a short run of a point."""
    return [
        f"loop.updates={WARMUP + study.steps}",
        f"loop.accumulation={setting.accumulation}",
        "data.heldout=null",
        "evaluation.every=null",
        "checkpoint.every=null",
        "logging.every=1",
        "logging.tensorboard=false",
        f"profile.warmup={WARMUP}",
        "profile.trace_steps=null",
        *(["world.engine=alone"] if setting.ranks == 1 else []),
        f"world.rings={setting.rings}",
        f"world.sync={setting.sync}",
        f"compression.kind={setting.compression}",
        "compression.warmup_updates=0",
        f"runs_dir={json.dumps(str(run.parent.resolve()))}",
        f"name={json.dumps(run.name)}",
    ]


class _Runner:
    """Starts runs and reads them; of a run the recipe and the events stay."""

    def __init__(self, study: Study, command: str, threads: int) -> None:
        self._study, self._threads = study, threads
        recipe = load_recipe(study.recipe, study.overrides)
        self._timeout_s = recipe.world.timeout_s
        # Ranks print progress on standard output; what goes wrong comes on standard error.
        quiet = ("sh", "-c", 'exec "$@" >/dev/null', "sh")
        self._start = (*quiet, sys.executable, "-m", "fastdistil", command, study.recipe, *study.overrides)

    def connected(self, setting: Setting, folder: Path) -> Round:
        slots, ranks = choose_slots(setting.ranks, self._study.hosts)
        return self._run(setting, slots[:ranks], folder / "run")

    def side_by_side(self, setting: Setting, count: int, folder: Path) -> tuple[Round, ...]:
        results: dict[int, Round | BaseException] = {}

        def run(index: int) -> None:
            try:
                results[index] = self._run(setting, (Slot(None, index),), folder / f"run-{index + 1}")
            except BaseException as error:  # noqa: BLE001 (raised below, by the thread that waits for this one)
                results[index] = error

        # Threads that end with this process, and their runs with them (rank_process.tie_to_launcher).
        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rounds = []
        for index in range(count):
            if isinstance(result := results[index], BaseException):
                raise result
            rounds.append(result)
        return tuple(rounds)

    def _run(self, setting: Setting, slots: Sequence[Slot], run: Path) -> Round:
        command = (*self._start, *_overrides(setting, self._study, run))
        environ = {"OMP_NUM_THREADS": str(self._threads)}
        launched_s = time.time()
        job = Job(command=command, slots=tuple(slots), ranks=len(slots), timeout_s=self._timeout_s, environ=environ)
        code = launch(job)
        if code in (75, 130):
            raise KeyboardInterrupt
        if code:
            kinds = {kind.exit_code: kind for kind in FastdistilError.__subclasses__()}
            raise kinds.get(code, FastdistilError)(
                f"the run of {setting.name} failed (exit code {code}); its last words are above"
            )
        if not (run / "events.jsonl").is_file():
            raise UserError(f"{run} is not here; with --hosts give an --out that rank 0's host shares with this machine")
        for name in ("checkpoints", "student"):
            shutil.rmtree(run / name, ignore_errors=True)
        return read_round(load_history(run), WARMUP, launched_s)


def _with_demo(study: Study, tell: Callable[[str], None]) -> Study:
    """The recipe demo has a corpus and a teacher made for it: untrained, for what it says costs the same."""
    if study.recipe != "demo":
        return study
    from fastdistil.console import Console
    from fastdistil.demo import make_corpus

    folder = study.out / "demo"
    tell("demo: collecting text from this Python installation, training a tokenizer, making a teacher")
    train, _ = make_corpus(folder, Console(quiet=True))
    overrides = [f"data.train={json.dumps(str(train.resolve()))}", "data.heldout=null", "loop.updates=1"]
    overrides += [f"runs_dir={json.dumps(str(folder.resolve()))}", "name=teacher", "checkpoint.every=null"]
    quiet = ("sh", "-c", 'exec "$@" >/dev/null', "sh")
    command = (*quiet, sys.executable, "-m", "fastdistil", "pretrain", "demo-teacher", *overrides)
    if launch(Job(command=command, slots=(Slot(None, 0),), ranks=1, timeout_s=60.0)):
        raise UserError("the demo's teacher could not be made; what went wrong is above")
    demo_overrides = (f"teacher.path={json.dumps(str((folder / 'teacher' / 'student').resolve()))}", overrides[0])
    return replace(study, recipe=str(RECIPES / "demo.yaml"), overrides=(*demo_overrides, *study.overrides))


# --- what is written down


def baseline_of(points: Sequence[MeasuredPoints], point: MeasuredPoints, ranks: int | None) -> MeasuredPoints:
    """The point that `point` is held against: of its mode."""
    same = [other for other in points if other.setting.mode in (None, point.setting.mode)]
    return choose_baseline(same, ranks)


def workload(points: Sequence[MeasuredPoints], accumulation: int) -> Workload:
    """What updates of the study exchange. Without several ranks, buckets are not known: one is taken."""
    several = [point for point in points if point.setting.ranks > 1]
    plain = [point for point in several if point.setting.compression == "none" and point.setting.sync == "delayed"]
    chosen = (plain or several or points)[0]
    start, line, ranks = chosen.rounds[0].start, chosen.rounds[0].last_line, chosen.setting.ranks
    size = 4 * (start.student_parameters or 0)
    if plain:  # what travelled is known better than what may be frozen
        size = round(real(line.gradient_bytes) * ranks / (2 * (ranks - 1)))
    return Workload(
        gradient_bytes=size,
        buckets=line.buckets or 1,
        engine=start.engine or "alone",
        accumulation=accumulation,
        exchanges=1,
    )


def model_points(points: Sequence[MeasuredPoints], baseline: int | None) -> list[Point]:
    """Return what the cost model sees of the points that it is fitted to."""
    return [model_point(point, baseline_of(points, point, baseline)) for point in points if point.modelled]


def as_json(study: Study, recipe: Recipe, points: Sequence[MeasuredPoints], baseline: int | None) -> dict[str, Any]:
    """The whole study; `load_points` reads what the model needs of it back."""
    start = points[0].rounds[0].start
    environment = points[0].rounds[0].environment
    return {
        "fastdistil": __version__,
        "recipe": study.recipe,
        "overrides": redacted(list(study.overrides)),
        "device": {
            "kind": start.device,
            "name": points[0].rounds[0].device,
            "cores": environment.cores,
            "memory_bytes": environment.memory_bytes,
            "threads_per_rank": start.threads,
        },
        "dtype": start.precision,
        "shape": {
            "micro_batch_tokens": recipe.data.micro_batch_tokens,
            "student_parameters": start.student_parameters,
            "teacher_parameters": start.teacher_parameters,
        },
        "counts": {"rounds": study.rounds, "updates": study.steps, "warmup": WARMUP},
        "points": [_point_json(point) for point in points],
        "workload": asdict(workload(points, recipe.loop.accumulation)),
        "model_points": [asdict(point) for point in model_points(points, baseline)],
    }


def _point_json(point: MeasuredPoints) -> dict[str, Any]:
    start = point.rounds[0].start
    return {
        "name": point.setting.name,
        **asdict(point.setting),
        "nodes": point.nodes,
        "unit": "s",
        "device": start.device,
        "device_name": point.rounds[0].device,
        "dtype": start.precision,
        "engine": start.engine,
        "oversubscribed": point.oversubscribed,
        "in_fit": point.modelled,
        "link_bytes_per_s": point.link_bytes_per_s,
        "updates": [len(run.updates) for run in point.rounds],
        "step_s": [[update.step_s for update in run.updates] for run in point.rounds],
        "tokens": [[update.tokens for update in run.updates] for run in point.rounds],
        "exposed_s": [[update.exposed_s for update in run.updates] for run in point.rounds],
        "slowest_rank": point.slowest and point.slowest[0],
        "rank_worked_s": [[update.worked_s for update in run.updates] for run in point.rounds],
        "compression_s": [[update.compression_s for update in run.updates] for run in point.rounds],
        "startup_s": [run.startup_s for run in point.rounds],
        "ceiling_tokens_per_s": [[run.tokens_per_s for run in runs] for runs in point.ceiling],
    }


class _Device(Fields, extra="ignore"):
    kind: Text | None
    name: Text | None
    threads_per_rank: Whole | None


class _Shape(Fields, extra="ignore"):
    micro_batch_tokens: Whole
    student_parameters: Whole
    teacher_parameters: Whole


class _Study(Fields):
    """What is read of a scale.json."""

    device: _Device
    dtype: Text | None
    shape: _Shape
    workload: Workload
    model_points: tuple[Point, ...]


def load_points(path: Path) -> tuple[list[Point], Workload, dict[str, Any]]:
    """(points of the model, workload, what it ran on: device, dtype and shape) of a scale.json. Raises UserError."""
    with translated("reading a study", path):
        try:
            study = converted(_Study, read_json(path))
            for number, point in enumerate(study.model_points):
                _check_point(point, f"model_points.{number}")
        except FileNotFoundError as error:
            raise UserError(f"no study at {path}; give the scale.json that `fastdistil scale` wrote") from error
        except ValueError as error:
            raise UserError(f"{path} is not a scale.json of this version ({reason(error)})") from error
    return list(study.model_points), study.workload, study.model_dump(include={"device", "dtype", "shape"})


def _check_point(point: Point, place: str) -> None:
    """Raise ValueError for numbers that no update has together."""
    if not point.samples:
        raise ValueError(f"{place}: wanted at least one sample")
    if point.nodes > point.ranks:
        raise ValueError(f"{place}: {point.ranks} ranks on {point.nodes} nodes")
    if point.ranks > 1 and min(point.collectives, point.hops, point.sent_bytes) < 1:
        raise ValueError(f"{place}: {point.ranks} ranks, and nothing that travels (collectives, hops, sent_bytes)")
