"""README.md says what is there: its commands, options, keys, recipes, exit codes and files; its Python runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import fastdistil
from fastdistil import cli
from fastdistil.errors import EXIT_CODES
from fastdistil.recipe import Recipe, all_keys, load_recipe, named_recipes

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SPANS = [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", PROSE)]
COMMANDS: dict[str, Any] = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def options_of(command: str) -> set[str]:
    parameters = COMMANDS[command].params
    names = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    return {"--help", *(name for name in names if name.startswith("--"))}


def called() -> Iterator[list[str]]:
    """Every call of fastdistil, from the blocks and from the text, as words without comments."""
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    for text in (*lines, *SPANS):
        if text.startswith("fastdistil "):
            yield shlex.split(text.replace("[", "").replace("]", ""), comments=True)[1:]


def test_calls_name_commands_and_options_that_there_are() -> None:
    calls = list(called())
    assert len(calls) > 30
    for command, *arguments in calls:
        if command.startswith("--"):
            assert command in ("--help", "--install-completion"), command
            continue
        assert command in COMMANDS, command
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert options <= options_of(command), (command, arguments)


def test_the_table_of_commands_holds_all_of_them_and_their_options() -> None:
    rows = dict(re.findall(r"^\| `fastdistil ([\w-]+)[^`]*` \| (.*) \|$", TEXT, re.MULTILINE))
    assert rows.keys() == COMMANDS.keys()
    for command, row in rows.items():
        named = {span.split()[0].partition("=")[0] for span in re.findall(r"`(--[^`]+)`", row)}
        assert named <= options_of(command), command


def test_recipe_keys_exist() -> None:
    keys, sections = set(all_keys(Recipe)), {key.partition(".")[0] for key in all_keys(Recipe) if "." in key}
    words = [word for span in SPANS for word in span.split()] + [word for call in called() for word in call]
    named = [match[1] for word in words if (match := re.match(r"([a-z_]+\.[a-z_0-9]+)(=|$)", word))]
    named = [key for key in named if key.partition(".")[0] in sections and not key.endswith((".py", ".yaml", ".jsonl"))]
    assert len(set(named)) > 25
    for key in named:
        assert key in keys or any(other.startswith(f"{key}.") for other in keys), key


def test_recipes_are_listed() -> None:
    (listed,) = re.findall(r"fastdistil/recipes/\*\.yaml`: ([\w, -]+)\)", PROSE)
    assert {*listed.split(", "), "demo-teacher"} == set(named_recipes())


def test_exit_codes_are_those_of_the_errors() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \| [a-z]", TEXT, re.MULTILINE)}
    assert table == {0, *EXIT_CODES}


def test_files_exist() -> None:
    named = re.findall(r"(?:fastdistil|benchmarks|tests|kernels|profiling)/[\w./{},*-]*\w", TEXT)
    assert len(named) > 10
    for path in named:
        choices = re.fullmatch(r"(.*)\{([\w,]+)\}(.*)", path)
        expanded = [choices[1] + middle + choices[3] for middle in choices[2].split(",")] if choices else [path]
        for name in expanded:
            assert list(ROOT.glob(name)), name


def test_the_first_python_example(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for language, block in BLOCKS if language == "python" and "distil(" in block]
    distil = fastdistil.distil
    small = load_recipe("distilbert", ["student.layers=null", "student.architecture=same", "student.every=2"])

    def short(recipe: str, *, teacher: str, corpus: str, student: dict[str, int]) -> Any:
        assert (recipe, teacher, corpus) == ("distilbert", "bert-base-uncased", "corpus")
        fitting = {"loop": {"updates": 1, "accumulation": 1}, "data": {"micro_batch_tokens": 256}, "runs_dir": str(tmp_path)}
        local = {"teacher": str(material / "teacher"), "corpus": material / "train", "device": "cpu"}
        return distil(small, student=student, **local, **fitting)

    monkeypatch.setattr(fastdistil, "distil", short)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["result"].student.config.num_hidden_layers == 1


def test_the_example_of_the_losses() -> None:
    (example,) = [block for language, block in BLOCKS if language == "python" and "linear_distill_loss(" in block]
    names: dict[str, Any] = {"hidden": torch.randn(6, 8, requires_grad=True), "teacher_hidden": torch.randn(6, 8)}
    names |= {name: torch.randn(11, 8) for name in ("weight", "teacher_weight")}
    names |= {name: torch.randn(11) for name in ("bias", "teacher_bias")}
    names |= {"labels_N": torch.tensor([3, -100, 10, 0, -100, 1]), "tokens": 6, "labels": 4}
    exec(compile(example, "README.md", "exec"), names)
    assert names["hidden"].grad.abs().max() > 0
    assert names["terms"].soft > 0 and names["terms"].hard > 0
