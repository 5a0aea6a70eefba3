"""`fastdistil train` and `fastdistil pretrain`: a run in this process, on several ranks, or only its plan."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import rich.console

from fastdistil.errors import UserError
from fastdistil.recipe import Recipe, load_recipe


class RankOptions(NamedTuple):
    """How many ranks are started, and where, as the command line has it."""

    np: int | None
    hosts: str | None
    elastic: str | None
    grow_after_s: float


def start(command: str, name: str, overrides: list[str], resume: str | None, options: RankOptions, *, dry_run: bool) -> None:
    """Run the recipe `name` with its overrides. Raises FastdistilError, or SystemExit with the code of a launcher."""
    from fastdistil.training.saving import restore_recipe

    if resume is not None and Path(name).name == "recipe.yaml":
        restore_recipe(Path(name).parent, note=lambda text: print(text, file=sys.stderr))
    recipe = load_recipe(name, overrides)
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    several = options.hosts is not None or options.elastic is not None
    if command == "train" and name == "demo":
        if several or options.np is not None:
            raise UserError("the demo trains several small models one after another, with one rank; give a recipe to --np")
        _demo(recipe, resume, dry_run)
        return
    if command == "train" and recipe.teacher is None:
        raise UserError(f"recipe {name} has no teacher; set teacher.path=..., or use `fastdistil pretrain`")
    if command == "pretrain" and recipe.teacher is not None:
        raise UserError(f"recipe {name} has a teacher ({recipe.teacher.path}); use `fastdistil train`, or set teacher=null")
    if dry_run:
        _plan(recipe, stem, resume)
    elif several or options.np not in (None, 1):
        sys.exit(_launch([command, name], recipe, stem, overrides, resume, options))  # the launcher has said why
    else:
        _train(recipe, stem, resume)


def _demo(recipe: Recipe, resume: str | None, dry_run: bool) -> None:
    from fastdistil.demo import plan_demo, run_demo

    if dry_run:
        plan_demo(recipe, rich.console.Console())
    else:
        run_demo(recipe, resume)


def _plan(recipe: Recipe, stem: str, resume: str | None) -> None:
    """Print what a run would do and need; `stem`: what its directory is named after."""
    from fastdistil.runs import choose_run
    from fastdistil.training.inputs import resolve
    from fastdistil.training.memory_plan import show_plan

    show_plan(resolve(recipe), choose_run(recipe, stem, resume)[0], rich.console.Console())


def _train(recipe: Recipe, stem: str, resume: str | None) -> None:
    """Train in this process, alone or as the rank that a launcher made of it."""
    from fastdistil.distributed.rank_info import find_rank_info
    from fastdistil.train import train

    place = find_rank_info(os.environ)
    result = train(recipe, recipe_name=stem, resume=resume, place=place)
    if place is None or place.rank == 0:
        print(
            f"done: {result.updates} updates, {result.tokens_per_second:,.0f} tokens/s; "
            f"the student is in {result.run_dir / 'student'}"
        )


def _launch(
    command: list[str], recipe: Recipe, stem: str, overrides: list[str], resume: str | None, options: RankOptions
) -> int:
    """Start ranks that run this same command without the options that start ranks; return the exit code."""
    from fastdistil.launch.job import Elastic, Job, choose_slots, parse_elastic
    from fastdistil.launch.launcher import launch
    from fastdistil.runs import choose_run, is_run

    program = (sys.executable, "-m", "fastdistil", *command)
    resuming = ("--resume", resume) if resume else ()
    elastic, np = None, options.np
    if options.elastic is not None:
        min_ranks, max_ranks = parse_elastic(options.elastic)
        np = max_ranks if np is None else np
        if not min_ranks <= np <= max_ranks:
            raise UserError(f"--np {np} is outside --elastic {options.elastic}; leave it out to start with {max_ranks}")
        # The directory is chosen here, so that every start continues the same run.
        directory, _ = choose_run(recipe, stem, resume)
        overrides = [*overrides, f"name={json.dumps(directory.name)}", f"runs_dir={json.dumps(str(directory.parent))}"]

        def again() -> tuple[str, ...]:
            # Once there is a run, a rank 0 that does not find it (on another host's own disk) must not begin anew.
            return (*program, *overrides, "--resume", str(directory) if is_run(directory) else "auto")

        elastic = Elastic(
            min_ranks=min_ranks,
            again=again,
            progress=lambda: max((path.name for path in directory.glob("checkpoints/step-*")), default=""),
            grow_after_s=options.grow_after_s,
        )
    slots, ranks = choose_slots(np, options.hosts)
    first = (*program, *overrides, *resuming)
    return launch(Job(command=first, slots=slots, ranks=ranks, timeout_s=recipe.world.timeout_s, elastic=elastic))
