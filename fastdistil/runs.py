"""The run directory: where it is, whether it may be used, and what a resumed run must agree with.

runs/<name>/ holds recipe.yaml, events.jsonl, checkpoints/ and student/, and is the product's memory: every tool reads it.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastdistil.errors import UserError, printable, translated
from fastdistil.events import RunDone, parse_event
from fastdistil.recipe import Recipe, check_version, validated
from fastdistil.storage import TEMPORARY, locked, write_atomically
from fastdistil.untrusted import read_yaml, reason

RECIPE = "recipe.yaml"
PAUSE = "PAUSE"
"""A file of this name in its directory asks a run to stop."""

# What may differ between a run and its continuation: it changes no bit of what is learnt.
_FREE_KEYS = (
    "name",
    "runs_dir",
    "logging",
    "profile",
    "checkpoint",
    "evaluation",
    "data.prefetch",
    "data.verify",
    "data.cache_dir",
    "pre_run",
    "world.engine",
    "world.rings",
    "world.topology",
    "world.sync",
    "world.bucket_mib",
    "world.first_bucket_mib",
    "world.timeout_s",
    "world.check_replicas",
    "loop.nonfinite",
    "loop.nonfinite_limit",
)


def choose_run(recipe: Recipe, recipe_name: str, resume: str | Path | None) -> tuple[Path, bool]:
    """(run directory, whether it is continued). Creates nothing. Raises UserError.

    resume None: a new run, by its name or the recipe's name and the next free number; "auto": the run of that name, or the
    newest one of the recipe, or a new one if there is none; a path: that run, or the run of that checkpoint.
    """
    runs = Path(recipe.runs_dir)
    if resume is None:
        if recipe.name is None:
            return next_free(runs, recipe_name), False
        run = runs / recipe.name
        if _in_the_way(run):
            raise UserError(f"{run} exists; continue it with --resume auto, or choose another name=...")
        return run, False
    if str(resume) == "auto":
        directory = runs / recipe.name if recipe.name is not None else _newest(runs, recipe_name)
        if directory is not None and is_run(directory):
            return directory, True
        return runs / recipe.name if recipe.name is not None else next_free(runs, recipe_name), False
    path = Path(resume)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if printable(run) != str(run):
        raise UserError(f"{resume} has a name that is not UTF-8, which checkpoints cannot be read from; rename it")
    if not is_run(run):
        raise UserError(f"{resume} is neither a run directory (no recipe.yaml) nor one of its checkpoints/step-*; see {runs}/")
    return run, True


def _numbered(runs: Path, recipe_name: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(recipe_name) + r"-(\d+)(?:-data|-teacher|-control)?$")  # a demo's stages lie beside it
    folders = runs.iterdir() if runs.is_dir() else ()
    numbers = {int(match[1]) for folder in folders if (match := pattern.match(folder.name))}
    return {number: runs / f"{recipe_name}-{number}" for number in numbers}


def next_free(runs: Path, recipe_name: str) -> Path:
    return runs / f"{recipe_name}-{max(_numbered(runs, recipe_name), default=0) + 1}"


def _newest(runs: Path, recipe_name: str) -> Path | None:
    numbered = {number: run for number, run in _numbered(runs, recipe_name).items() if is_run(run)}
    return numbered[max(numbered)] if numbered else None


def is_run(path: Path) -> bool:
    """Return whether a directory holds a run: its recipe, or checkpoints, each of which has a copy of it."""
    return has_text(path / RECIPE) or any(path.glob("checkpoints/step-*"))


def has_text(path: Path) -> bool:
    """Return whether a file holds more than what a full disk or a power cut leaves of one: nothing, or NUL bytes."""
    return path.is_file() and bool(path.read_bytes().strip(b"\0 \t\r\n"))


def _in_the_way(run: Path) -> bool:
    """Return whether something is at a new run's place that a start which failed did not leave there."""
    if not run.is_dir():
        return os.path.lexists(run)
    return any(not path.name.endswith(TEMPORARY) and (path.name != RECIPE or has_text(path)) for path in run.iterdir())


def create_run(run: Path, recipe: Recipe) -> None:
    """Make the directory and write recipe.yaml. Raises UserError, DiskFull; nothing is left then."""
    with translated("creating the run directory", run):
        try:
            run.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{run} exists; choose another name=...") from None
        except NotADirectoryError:
            raise UserError(f"{run.parent} is not a directory; choose another runs_dir") from None
        except FileNotFoundError as error:  # below /proc, for one
            raise UserError(f"{error.filename} cannot be made; choose another runs_dir") from None
        with sole_user(run, note=lambda _: None):  # who holds it next has a note of its own
            if _in_the_way(run):
                raise UserError(f"{run} exists; choose another name=...")
            for leftover in run.glob(f"{RECIPE}.*{TEMPORARY}"):
                leftover.unlink()
            try:
                write_atomically(run / RECIPE, recipe.to_yaml())
            except OSError:
                with suppress(OSError):
                    run.rmdir()
                raise


@contextmanager
def sole_user(run: Path, note: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the run against a second process. Raises UserError if there is one; `note` hears of file systems without locks."""
    busy = f"another process is at work in {run}; wait until it has stopped, or choose another name=... (cache-teacher: --out)"
    with locked(run, busy, note):
        yield


def stored_recipe(run: Path) -> Recipe:
    """Return the recipe that a run was started with. Raises UserError."""
    path = run / RECIPE
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    check_version(values, path)
    return validated(values, str(path))


def check_same_recipe(run: Path, recipe: Recipe) -> None:
    """A continued run must be the same run. Raises UserError naming what differs."""
    old, new = (_flat(r.model_dump(mode="json")) for r in (stored_recipe(run), recipe))
    differing = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(free + ".") for free in _FREE_KEYS)
    ]
    if differing:
        raise UserError(
            f"{run} was started with another recipe: {'; '.join(differing[:5])}; give it another name to start anew"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {key: value for name, inner in values.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def pause_requested(run_dir: Path) -> bool:
    return (run_dir / PAUSE).exists()


def request_pause(run_dir: Path) -> None:
    """Ask the run in `run_dir` to save, evaluate and stop. Raises UserError if there is no such run, or if it is done."""
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"no run at {run_dir}; give the directory of a run, e.g. runs/NAME")
    if _is_done(run_dir) and not _in_use(run_dir):
        raise UserError(f"{run_dir} is done: there is nothing to pause")
    with translated("asking for a pause", run_dir):
        (run_dir / PAUSE).touch()


def _is_done(run_dir: Path) -> bool:
    try:
        return isinstance(parse_event((run_dir / "events.jsonl").read_bytes().splitlines()[-1]), RunDone)
    except (OSError, IndexError, ValueError):
        return False  # what cannot be read is no reason not to pause


def _in_use(run_dir: Path) -> bool:
    try:
        with sole_user(run_dir, note=lambda _: None):  # nothing is written
            return False
    except UserError:
        return True


def clear_pause(run_dir: Path) -> None:
    with translated("clearing a pause", run_dir):
        (run_dir / PAUSE).unlink(missing_ok=True)
