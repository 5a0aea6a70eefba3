"""Who may import whom. The rules are data below; `violations` applies them to the source of every module."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.event_streams import Stream, write_run

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fastdistil": "fastdistil", "kernels": "fastdistil.kernels", "profiling": "fastdistil.profiling"}
NO_PACKAGE = ("kernels", "profiling", "benchmarks", "tests")

# These names belong to packages of others; ours are imported below fastdistil.
FOREIGN = {"kernels", "profiling"}
# One door per dependency: outside package -> the modules, or rooms, that may import it.
DOORS = {
    "triton": ("kernels",),
    "horovod": ("distributed.horovod_world",),
    "torch.distributed": ("distributed",),
    "transformers": ("models", "data.tokenizer", "data.transformers_calls"),
}
# A room is a folder, or a file beside the folders. Room -> what its modules may import besides the room itself: rooms, or
# single modules of them; "*": all that is not listed below it. Nothing else is allowed, and there are no exceptions.
ROOMS = {
    "errors": "",
    "untrusted": "",
    "signals": "",
    "redaction": "",
    "streams": "errors",
    "storage": "errors",
    "recipe": "errors untrusted",
    "events": "errors untrusted",
    "runs": "errors untrusted storage recipe events",
    "kernels": "",
    "profiling": "",
    "profiling.report": "errors untrusted redaction recipe events profiling",
    "data": "errors untrusted storage recipe",
    "models": "errors recipe data kernels profiling.device",
    "objective": "recipe data kernels profiling",
    "install": "errors storage profiling",
    "distributed": "errors recipe runs.PAUSE install.horovod_build",
    "gradients": "errors recipe distributed kernels profiling",
    "launch": ("errors untrusted signals streams recipe distributed.rank_info distributed.diagnosis profiling.device"),
    "evaluate": "errors recipe data models",
    "console": "errors streams data",
    "training": (
        "errors untrusted signals redaction storage recipe events runs kernels profiling data models objective distributed "
        "gradients console"
    ),
    "train": (
        "errors untrusted signals redaction storage recipe events runs kernels profiling data models objective distributed "
        "gradients console training"
    ),
    "api": "errors recipe distributed launch train",
    "demo": "errors recipe runs console data models training train",
    "start": "errors recipe runs distributed launch training train demo",
    "studies": (
        "errors untrusted redaction recipe events runs profiling profiling.report gradients distributed launch console train "
        "demo"
    ),
    "cli": "errors signals streams recipe runs profiling.report data install launch evaluate console training start studies",
    "__main__": "cli",
    "": "api",  # the root binds its names before anything else, and imports lazily
}
# Following and reporting a run, starting ranks and printing a recipe load no torch.
NO_TORCH = (
    "errors",
    "untrusted",
    "signals",
    "redaction",
    "streams",
    "storage",
    "recipe",
    "events",
    "runs",
    "launch",
    "profiling.report",
)
OPEN_TO_ALL = "fastdistil.__version__"


def sources() -> dict[str, str]:
    """Dotted name -> source of every module of the project; tests and benchmarks included."""
    texts = {}
    for folder in (*FOLDERS, "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fastdistil" and parts[0] in NO_PACKAGE:
                continue  # seen through the links
            name = ".".join((FOLDERS.get(folder, folder), *parts)).removesuffix(".__init__")
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def imports(name: str, source: str) -> Iterator[tuple[str, int]]:
    """(dotted name of the module, or of the name in it, line) of every import in a module, wherever it stands."""
    for node in ast.walk(ast.parse(source, name)):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                if level:
                    package = name.split(".")[: -level if name != "fastdistil" else 1 - level or None]
                    module = ".".join([*package, *([module] if module else [])])
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield target, node.lineno


def within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def room_of(name: str) -> str:
    """Return the room of a module of fastdistil, by the longest name in ROOMS; a module of no room is its own."""
    inner = name.removeprefix("fastdistil").removeprefix(".")
    rooms = [room for room in ROOMS if room and within(inner, (room,))]
    return max(rooms, key=len, default=inner)


def allowed(name: str, target: str) -> bool:
    """Whether a module of fastdistil may import another one, or the name `target` of one."""
    inner, room = target.removeprefix("fastdistil").removeprefix("."), room_of(name)
    if room == room_of(target) or (target == OPEN_TO_ALL and room not in ("kernels", "profiling")):
        return True
    return any(
        inner == entry or (inner.startswith(f"{entry}.") and (entry not in ROOMS or room_of(target) == entry))
        for entry in ROOMS.get(room, "").split()
    )


def violations(sources: Mapping[str, str]) -> list[str]:
    """One line for each import that breaks a rule, and one for a cycle."""
    lines = []
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        product = within(name, ("fastdistil",))
        inner = name.removeprefix("fastdistil.")
        for target, line in imports(name, source):
            top = target.partition(".")[0]
            where = f"{name}:{line} imports {target}: "
            if top in FOREIGN:
                lines.append(f"{where}that name is not ours; fastdistil.{top} is")
            if top in ("benchmarks", "tests") and not within(name, (top,)):
                lines.append(f"{where}nothing imports tests or benchmarks")
            if not product:
                continue
            for package, doors in DOORS.items():
                if within(target, (package,)) and not within(inner, doors):
                    lines.append(f"{where}only {', '.join(doors)} may")
            if top != "fastdistil":
                continue
            if not allowed(name, target):
                lines.append(
                    f"{where}{room_of(name) or 'the root'} may import {ROOMS.get(room_of(name)) or 'nothing of fastdistil'}"
                )
            module = target if target in sources else target.rpartition(".")[0]
            if "fastdistil" not in (module, name):
                graph.setdefault(name, set()).add(module)
        if product and room_of(name) in NO_TORCH:
            lines += [f"{name}:{line} imports torch when it is loaded" for line in eager_torch(source)]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        lines.append(f"import cycle: {' <- '.join(error.args[1])}")
    return lines


def eager_torch(source: str) -> Iterator[int]:
    """The lines of a module that import torch when the module is."""
    for node in ast.parse(source).body:
        match node:
            case ast.Import(names=names) if any(within(alias.name, ("torch",)) for alias in names):
                yield node.lineno
            case ast.ImportFrom(module=str(module)) if within(module, ("torch",)):
                yield node.lineno


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
    entries, folders = [], [str(ROOT / folder) for folder in ("fastdistil", *NO_PACKAGE)]
    while folders:
        for entry in os.scandir(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.endswith(".py"):
                entries.append(entry)
    return entries


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("fastdistil.train", "import kernels", "not ours"),
        ("fastdistil.train", "import profiling.device", "not ours"),
        ("tests.test_x", "from kernels.distill import distill_kl", "not ours"),
        ("benchmarks.bench_x", "def f():\n    from profiling import spans", "not ours"),
        ("fastdistil.models.x", "from tests.conftest import ROOT", "nothing imports tests"),
        ("benchmarks.bench_x", "import tests.conftest", "nothing imports tests"),
        ("tests.test_x", "import benchmarks.bench_step", "nothing imports tests or benchmarks"),
        ("fastdistil.train", "import triton", "only kernels may"),
        ("fastdistil.profiling.device", "import triton.language as tl", "only kernels may"),
        ("fastdistil.kernels.x", "def f():\n    import transformers", "only models, data.tokenizer"),
        ("fastdistil.train", "from transformers import AutoModel", "only models, data.tokenizer"),
        ("fastdistil.data.prepare", "if 1:\n    from transformers import AutoTokenizer", "only models, data.tokenizer"),
        ("fastdistil.cli", "import importlib\nimportlib.import_module('transformers.utils')", "only models, data.tokenizer"),
        ("fastdistil.gradients.buckets", "if 1:\n    import horovod.torch as hvd", "only distributed.horovod_world may"),
        ("fastdistil.gradients.exchange", "import torch.distributed as dist", "only distributed may"),
        ("fastdistil.training.x", "from torch import distributed", "only distributed may"),
        ("fastdistil.kernels.x", "from fastdistil.errors import UserError", "kernels may import nothing of fastdistil"),
        ("fastdistil.kernels.x", "from fastdistil import __version__", "kernels may import nothing of fastdistil"),
        ("fastdistil.kernels.x", "from ..errors import UserError", "kernels may import nothing of fastdistil"),
        ("fastdistil.kernels.x", "from fastdistil.profiling.device import cpuinfo", "kernels may import nothing"),
        ("fastdistil.profiling.x", "from fastdistil import kernels", "profiling may import nothing of fastdistil"),
        ("fastdistil.profiling.x", "import fastdistil.recipe", "profiling may import nothing of fastdistil"),
        ("fastdistil.profiling.memory", "import fastdistil.profiling.report.history", "profiling may import nothing"),
        (
            "fastdistil.profiling.report.x",
            "from fastdistil.training.metrics import Meter",
            "profiling.report may import errors",
        ),
        ("fastdistil.data.corpus", "def f():\n    from fastdistil.models.loading import load_model", "data may import errors"),
        ("fastdistil.models.scoring", "from fastdistil.training import inputs", "models may import errors"),
        ("fastdistil.distributed.coordinator", "from fastdistil.runs import create_run", "distributed may import errors"),
        ("fastdistil.launch.attempt", "from fastdistil.distributed.monitor import Monitor", "launch may import errors"),
        ("fastdistil.training.x", "from fastdistil import evaluate", "training may import errors"),
        ("fastdistil.studies.profile", "import fastdistil.cli", "studies may import errors"),
        ("fastdistil.unheard_of", "from fastdistil.errors import UserError", "unheard_of may import nothing of fastdistil"),
        ("fastdistil.launch.x", "from pathlib import Path\nfrom torch import Tensor", "imports torch when it is loaded"),
        ("fastdistil.profiling.report.x", "import torch.nn", "imports torch when it is loaded"),
        ("fastdistil.errors", "from .errors2 import X", "errors may import nothing of fastdistil"),
        ("fastdistil.data.a", "from fastdistil.data import a", "import cycle"),
    ],
)
def test_planted_violations_are_found(name: str, source: str, complaint: str) -> None:
    base = {"fastdistil": "", "fastdistil.train": "", "fastdistil.recipe": "import fastdistil.errors", "fastdistil.errors": ""}
    assert violations(base) == []
    lines = violations({**base, name: source})
    assert len(lines) == 1, lines
    assert complaint in lines[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("fastdistil.kernels.distill", "import triton\nimport triton.language as tl\nfrom fastdistil.kernels.tiles import f"),
        ("fastdistil.models.language_model", "from transformers import AutoModel"),
        ("fastdistil.evaluate", "from fastdistil.data.prepare import prepare"),
        ("fastdistil.distributed.horovod_world", "import horovod.torch as hvd\nimport torch.distributed as dist"),
        ("fastdistil.distributed.coordinator", "from fastdistil.runs import PAUSE"),
        ("fastdistil.launch.attempt", "def f():\n    import torch\nfrom fastdistil.distributed.rank_info import RankInfo"),
        ("fastdistil.objective", "from fastdistil.kernels.distill import f\nfrom fastdistil.profiling import spans"),
        (
            "fastdistil.profiling.report.compare",
            "from fastdistil.errors import UserError\nfrom fastdistil.profiling.report import summary",
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
def test_links_are_relative(name: str) -> None:
    link = ROOT / "fastdistil" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_every_room_of_the_trainer_says_in_one_sentence_what_it_is() -> None:
    folders = [path for path in (ROOT / "fastdistil").iterdir() if path.is_dir() and not path.is_symlink()]
    rooms = [path for path in folders if any(path.glob("*.py"))]
    assert len(rooms) == 8
    for room in rooms:
        tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1 and (ast.get_docstring(tree) or "").count(".") == 1, room


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


def loaded_by_command(*arguments: object) -> set[str]:
    argv = ["fastdistil", *map(str, arguments)]
    return loaded_by(f"import sys; sys.argv = {argv!r}; from fastdistil.cli import main; main()")


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_command_line_starts_without_torch(argument: str) -> None:
    assert loaded_by_command(argument) == set()


def test_runs_are_reported_and_compared_without_torch(tmp_path: Path) -> None:
    run, other = (write_run(tmp_path / name, Stream(seed=seed)) for seed, name in enumerate(("a", "b")))
    assert loaded_by_command("report", "--help") == set()
    assert loaded_by_command("report", run, other, "--out", tmp_path / "report.html") <= {"numpy"}
    assert loaded_by_command("compare", run, other, "--anyway") <= {"numpy"}
    assert (tmp_path / "report.html").is_file()


def test_unknown_attribute_is_an_attribute_error() -> None:
    import fastdistil

    assert "distil" in dir(fastdistil)
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        fastdistil.distill  # noqa: B018
