"""Who may import whom. The rules are data below; `violations` applies them to the source of every module."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fastdistil": "fastdistil", "kernels": "fastdistil.kernels", "profiling": "fastdistil.profiling"}
NO_PACKAGE = ("kernels", "profiling", "benchmarks", "tests")

LEAVES = ("fastdistil.kernels", "fastdistil.profiling")
# profiling/ also holds what reads run directories: above the trainer, for the command line alone.
READERS = tuple(
    f"fastdistil.profiling.{name}"
    for name in (
        *("history", "summary", "compare", "profile", "figures", "panels", "report", "watch", "live"),
        *("measurement_files",),
        *("scale", "scale_command", "scale_networks", "scale_plot", "scale_points", "scale_predict", "scale_table", "scaling"),
    )
)
# These names belong to packages of others; ours are imported below fastdistil.
FOREIGN = {"kernels", "profiling"}
# One door per dependency: outside package -> the modules, or parents of modules, that may import it.
DOORS = {
    "triton": ("fastdistil.kernels",),
    "horovod": ("fastdistil.distributed.horovod_world", "fastdistil.launch.launcher"),
    "transformers": (
        "fastdistil.models.language_model",
        "fastdistil.models.pretrained",
        "fastdistil.data.corpus",
        "fastdistil.evaluate",
    ),
}
# Modules at the top -> the only modules that may import them. What reads a corpus needs nothing of what writes one.
TOP = {
    "fastdistil.cli": ("fastdistil.__main__",),
    "fastdistil.launch.launcher": (
        "fastdistil.cli",
        "fastdistil.api",
        "fastdistil.studies.profile",
        "fastdistil.studies.scale_runs",
    ),
    "fastdistil.launch.attempt": ("fastdistil.launch.launcher",),
    "fastdistil.launch.remote_call": ("fastdistil.launch.launcher",),
    "fastdistil.train": ("fastdistil.api", "fastdistil.cli", "fastdistil.demo", "fastdistil.studies.profile"),
    "fastdistil.data.prepare": ("fastdistil.cli", "fastdistil.demo", "fastdistil.evaluate"),
    "fastdistil.data.shards": ("fastdistil.data.prepare",),
    "fastdistil.training.cache_teacher": ("fastdistil.cli",),
    "fastdistil.data.tokenise": ("fastdistil.data.prepare", "fastdistil.data.shards"),
}


def sources() -> dict[str, str]:
    """Dotted name -> source of every module of the project; tests and benchmarks included."""
    found = {}
    for folder in (*FOLDERS, "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fastdistil" and parts[0] in NO_PACKAGE:
                continue  # seen through the links
            name = ".".join((FOLDERS.get(folder, folder), *parts)).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    return found


def imports(name: str, source: str, known: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """(dotted name of what is imported, line) of every import in a module, wherever it stands."""
    for node in ast.walk(ast.parse(source, name)):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                if level:
                    package = name.split(".")[: -level if name != "fastdistil" else 1 - level or None]
                    module = ".".join([*package, *([module] if module else [])])
                for alias in names:  # `from fastdistil import recipe` imports a module, `from ... import Recipe` a name
                    inner = f"{module}.{alias.name}"
                    yield (inner if inner in known or inner in LEAVES else str(module)), node.lineno
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield target, node.lineno


def within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def violations(known: Mapping[str, str]) -> list[str]:
    """One line for each import that breaks a rule, and one for a cycle."""
    found = []
    graph: dict[str, set[str]] = {}
    for name, source in known.items():
        product = within(name, ("fastdistil",))
        for target, line in imports(name, source, known):
            top = target.partition(".")[0]
            where = f"{name}:{line} imports {target}: "
            if top in FOREIGN:
                found.append(f"{where}that name is not ours; fastdistil.{top} is")
            if top in ("benchmarks", "tests") and not within(name, (top,)):
                found.append(f"{where}nothing imports tests or benchmarks")
            if not product:
                continue
            if top in DOORS and not within(name, DOORS[top]):
                found.append(f"{where}only {', '.join(DOORS[top])} may")
            if top != "fastdistil":
                continue
            for leaf in LEAVES:
                if within(name, (leaf,)) and name not in READERS and not within(target, (leaf,)):
                    found.append(f"{where}{leaf} imports nothing else of fastdistil")
            if target in READERS and name not in (*READERS, "fastdistil.cli"):
                found.append(f"{where}only fastdistil.cli may")
            if target in TOP and name not in TOP[target]:
                found.append(f"{where}only {', '.join(TOP[target])} may")
            # The root binds its names before anything else and imports nothing eagerly: it cannot close a cycle.
            if target != "fastdistil" and name != "fastdistil":
                graph.setdefault(name, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"import cycle: {' <- '.join(error.args[1])}")
    return found


def test_import_rules_hold() -> None:
    assert violations(sources()) == []


def test_every_folder_is_seen() -> None:
    """An empty list of violations would be worth nothing if the files were not read."""
    names = sources()
    for expected in (
        "fastdistil",
        "fastdistil.errors",
        "fastdistil.profiling.device",
        "tests.test_imports",
        "benchmarks.conftest",
    ):
        assert expected in names
    assert any(name.startswith("fastdistil.kernels.") for name in names)
    assert len(names) == len({source.path for source in os_walk()})


def os_walk() -> list["os.DirEntry[str]"]:
    """Every .py file of the five folders, counted in another way: without following links."""
    found, folders = [], [str(ROOT / folder) for folder in ("fastdistil", *NO_PACKAGE)]
    while folders:
        for entry in os.scandir(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.endswith(".py"):
                found.append(entry)
    return found


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("fastdistil.train", "import kernels", "not ours"),
        ("fastdistil.train", "import profiling.device", "not ours"),
        ("tests.test_x", "from kernels.distill import distill_kl", "not ours"),
        ("benchmarks.bench_x", "def f():\n    from profiling import spans", "not ours"),
        ("fastdistil.models.language_model", "from tests.conftest import ROOT", "nothing imports tests"),
        ("benchmarks.bench_x", "import tests.conftest", "nothing imports tests"),
        ("tests.test_x", "import benchmarks.bench_step", "nothing imports tests or benchmarks"),
        ("fastdistil.train", "import triton", "only fastdistil.kernels may"),
        ("fastdistil.profiling.device", "import triton.language as tl", "only fastdistil.kernels may"),
        ("fastdistil.kernels.x", "def f():\n    import transformers", "only fastdistil.models.language_model"),
        ("fastdistil.train", "from transformers import AutoModel", "only fastdistil.models.language_model"),
        (
            "fastdistil.data.prepare",
            "if 1:\n    from transformers import AutoTokenizer",
            "only fastdistil.models.language_model",
        ),
        (
            "fastdistil.cli",
            "import importlib\nimportlib.import_module('transformers.utils')",
            "only fastdistil.models.language_model",
        ),
        (
            "fastdistil.gradients.buckets",
            "if 1:\n    import horovod.torch as hvd",
            "only fastdistil.distributed.horovod_world, fastdistil.launch.launcher may",
        ),
        ("fastdistil.kernels.x", "from fastdistil.errors import UserError", "imports nothing else of fastdistil"),
        ("fastdistil.kernels.x", "from fastdistil import __version__", "imports nothing else of fastdistil"),
        ("fastdistil.kernels.x", "from ..errors import UserError", "imports nothing else of fastdistil"),
        ("fastdistil.kernels.x", "from fastdistil.profiling.device import cpuinfo", "imports nothing else of fastdistil"),
        ("fastdistil.profiling.x", "from fastdistil import kernels", "imports nothing else of fastdistil"),
        ("fastdistil.profiling.x", "import fastdistil.recipe", "imports nothing else of fastdistil"),
        ("fastdistil.recipe", "from fastdistil.profiling.report.history import load_history", "only fastdistil.cli may"),
        ("fastdistil.profiling.memory", "import fastdistil.profiling.report.history", "only fastdistil.cli may"),
        ("fastdistil.errors", "from fastdistil.cli import main", "only fastdistil.__main__ may"),
        ("fastdistil.errors", "from fastdistil import train", "only fastdistil.api, fastdistil.cli"),
        (
            "fastdistil.data.corpus",
            "def f():\n    from fastdistil.data.prepare import prepare",
            "only fastdistil.cli, fastdistil.demo",
        ),
        (
            "fastdistil.data.corpus",
            "from fastdistil.data.tokenise import Encoder",
            "only fastdistil.data.prepare, fastdistil.data.shards may",
        ),
        ("fastdistil.errors", "def f():\n    from fastdistil import recipe", "import cycle"),
        ("fastdistil.errors", "from .recipe import Recipe", "import cycle"),
    ],
)
def test_planted_violations_are_found(name: str, source: str, complaint: str) -> None:
    base = {"fastdistil": "", "fastdistil.train": "", "fastdistil.recipe": "import fastdistil.errors", "fastdistil.errors": ""}
    assert violations(base) == []
    found = violations({**base, name: source})
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fastdistil.kernels.distill", "import triton\nimport triton.language as tl\nfrom fastdistil.kernels.tiles import f"),
        ("fastdistil.models.language_model", "from transformers import AutoModel"),
        ("fastdistil.evaluate", "from fastdistil.data.prepare import prepare"),
        ("fastdistil.distributed.horovod_world", "import horovod.torch as hvd"),
        ("fastdistil.objective", "from fastdistil.kernels.distill import f\nfrom fastdistil.profiling import spans"),
        (
            "fastdistil.profiling.report.compare",
            "from fastdistil.errors import UserError\nfrom fastdistil.profiling import summary",
        ),
        (
            "fastdistil.install.doctor",
            "import importlib.util\nimportlib.util.find_spec('transformers')\nfrom fastdistil import __version__",
        ),
        ("tests.models.test_language_model", "import transformers, triton\nfrom fastdistil.train import train"),
    ],
)
def test_what_the_rules_allow(name: str, source: str) -> None:
    assert violations({"fastdistil": "", "fastdistil.train": "", name: source}) == []


@pytest.mark.parametrize("folder", NO_PACKAGE)
def test_folder_is_no_package(folder: str) -> None:
    """With an __init__.py the folder would be importable under its bare name, before the package of others that has it."""
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize("name", ["kernels", "profiling"])
def test_links_are_relative_and_folders_flat(name: str) -> None:
    link = ROOT / "fastdistil" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert [path for path in (ROOT / name).rglob("*.py") if path.parent != ROOT / name] == []


def loaded_by(code: str) -> set[str]:
    """The names of the heavy packages that a new Python has loaded after `code`."""
    # When the interpreter exits, so that code may end with sys.exit.
    report = """
import atexit, sys
atexit.register(lambda: print(*{"torch", "transformers", "triton", "numpy"} & set(sys.modules), file=sys.stderr))
"""
    done = subprocess.run([sys.executable, "-c", report + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_import_is_cheap() -> None:
    assert loaded_by("import fastdistil; fastdistil.__version__; dir(fastdistil)") == set()
    assert "torch" in loaded_by("import torch")


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_command_line_starts_without_torch(argument: str) -> None:
    assert loaded_by(f"import sys; sys.argv = ['fastdistil', {argument!r}]; from fastdistil.cli import main; main()") == set()


def test_unknown_attribute_is_an_attribute_error() -> None:
    import fastdistil

    assert "distil" in dir(fastdistil)
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        fastdistil.distill  # noqa: B018
