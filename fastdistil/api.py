"""The Python interface: `from fastdistil import distil`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.launch.launcher import launch_function
from fastdistil.recipe import Recipe, load_recipe, replace_alternatives, validated
from fastdistil.train import Result, train


def distil(
    recipe: str | Path | Recipe,
    *,
    teacher: str | Path | nn.Module | None = None,
    student: str | Path | Mapping[str, Any] | nn.Module | None = None,
    corpus: str | Path | Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None = None,
    np: int | None = None,
    hosts: str | None = None,
    **overrides: Any,
) -> Result:
    """Distil `teacher` into `student` on `corpus` as a recipe says; what is given here replaces what the recipe names.

    teacher   hub id, directory, or a module (language_model.LanguageModel, transformers model, or one with its interface)
    student   hub id, directory, a mapping of the recipe's student section, or a module
    corpus    directory written by `fastdistil prepare`, or an iterable of micro-batches (see `data.sources.MappingSource`)
    np, hosts start that many ranks, on this machine or on hosts="a:8,b:8", and wait for them; the arguments travel by value.
              Without them, a process that a launcher started as a rank is one
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
    checked = validated(values, "distil(...)")
    arguments: dict[str, Any] = {
        "recipe": checked,
        "recipe_name": name,
        "resume": resume,
        "teacher": teacher if isinstance(teacher, nn.Module) else None,
        "student": student if isinstance(student, nn.Module) else None,
        "batches": corpus if corpus is not None and not isinstance(corpus, (str, Path)) else None,
    }
    if np not in (None, 1) or hosts is not None:
        result: Result = launch_function(_train_as_rank, arguments, np=np, hosts=hosts, timeout_s=checked.world.timeout_s)
        return result
    return train(**arguments, place=find_rank_info())


def _train_as_rank(**arguments: Any) -> Result:
    return train(**arguments, place=find_rank_info())


def _named(value: object) -> str:
    """A path as it is; an object by its type, so that recipe.yaml says where it came from."""
    return str(value) if isinstance(value, (str, Path)) else f"(a {type(value).__qualname__} given from Python)"
