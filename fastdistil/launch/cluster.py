"""The one file that sets a cluster up for a recipe and starts the run there: Slurm, Kubernetes, SkyPilot, dstack.

    slurm      a batch script: srun starts the ranks, on a file system that all nodes share
    mpijob     a kubeflow.org/v2beta1 MPIJob (and a ConfigMap for a recipe of your own): mpirun starts the ranks
    skypilot   a task: torchrun on every node starts the ranks
    dstack     a multi-node task: the same

Every file names the run, so that submitting it again, or a restart after a lost node, continues that run (--resume auto).

The files are templates/*.j2. A user's values reach the ranks as they are, whatever they hold: `shlex` quotes them for the
shell, the filters `yaml` and `block` for YAML, `here_document` for a file in a script.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import yaml

from fastdistil.errors import UserError
from fastdistil.recipe import Recipe

ClusterKind = Literal["slurm", "mpijob", "skypilot", "dstack"]
KINDS: tuple[ClusterKind, ...] = ("slurm", "mpijob", "skypilot", "dstack")
_TEMPLATES = {"slurm": "slurm.sh.j2", "mpijob": "mpijob.yaml.j2", "skypilot": "skypilot.yaml.j2", "dstack": "dstack.yaml.j2"}
SAVE_S = 120
"""What a run is given to save before it is killed."""
PORT = 29500
_MAKE_SECRET = """export FASTDISTIL_STORE_SECRET="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')\""""  # noqa: S105 - none yet
"""A line of a script: the ranks it starts share what nobody else knows (rendezvous.py)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The options of `fastdistil cluster`."""

    command: Literal["train", "pretrain"]
    recipe: str
    """A name, or the path of a .yaml file."""
    overrides: Sequence[str]
    run_name: str
    nodes: int
    gpus: str
    """GPUs of a node: a number, or with a type, as H100:8. 0: one rank of the processor on each node."""
    image: str | None = None
    """A container image with fastdistil in it."""
    storage: str | None = None
    """Mounted at /workspace on every node, for the run's directory. mpijob: a persistent volume claim; skypilot: a bucket;
    dstack: a volume or a path of the host."""
    time: str | None = None
    """Limit: 90m, 8h, 2d."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise UserError(f"--nodes is at least 1, got {self.nodes}")
        if not re.fullmatch(r"([A-Za-z][A-Za-z0-9_.-]*:[1-9]|[0-9])[0-9]*", self.gpus):
            raise UserError(f"--gpus is the number of a node's GPUs, 8, or with their type, H100:8; got {self.gpus!r}")
        if self.time is not None and not re.fullmatch(r"[1-9][0-9]*[mhd]", self.time):
            raise UserError(f"--time is a number of minutes, hours or days, as 90m, 8h, 2d; got {self.time!r}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run_name):
            raise UserError(f"the run's name {self.run_name!r} is not made of letters, digits, dots and dashes; set name=NAME")
        for option, value in {"recipe": self.recipe, "--image": self.image, "--storage": self.storage}.items():
            if value is not None and not value.isprintable():
                raise UserError(f"{option} {value!r} holds a character that shows nowhere, as a line's end; leave it out")

    @property
    def gpu_type(self) -> str | None:
        return self.gpus.rpartition(":")[0] or None

    @property
    def gpu_count(self) -> int:
        return int(self.gpus.rpartition(":")[2])

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpu_count)

    @property
    def title(self) -> str:
        ranks, nodes = self.nodes * self.ranks_per_node, self.nodes
        return f"{self.run_name}: {ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"

    @property
    def minutes(self) -> int | None:
        return None if self.time is None else int(self.time[:-1]) * {"m": 1, "h": 60, "d": 1440}[self.time[-1]]

    @property
    def own_recipe(self) -> Path | None:
        """The recipe's file, if it is none of fastdistil's own."""
        return Path(self.recipe) if self.recipe.endswith((".yaml", ".yml")) else None

    @property
    def label(self) -> str:
        """The run's name as Kubernetes, SkyPilot and dstack allow names."""
        label = re.sub(r"[^a-z0-9]+", "-", self.run_name.lower()).strip("-")
        return (label if label[:1].isalpha() else f"run-{label}")[:40].strip("-")

    @property
    def install_commands(self) -> list[str]:
        """What installs a checkout on a node: the package, and Horovod where the ranks use it."""
        if "world.engine=torch" in self.overrides:
            return ["pip install ."]
        # Without GPUs no CUDA compiler is wanted, though torch may be a CUDA build.
        build = "python -m fastdistil.install.horovod_build" + ("" if self.gpu_count else " --cpu")
        return ["pip install '.[horovod]'", build]

    def arguments(self, recipe: str) -> list[str]:
        """Return the arguments of fastdistil on the cluster, where the recipe is found at `recipe`."""
        stored = self.storage is not None and not any(override.startswith("runs_dir=") for override in self.overrides)
        where = ["runs_dir=/workspace/runs"] if stored else []
        return [self.command, recipe, *self.overrides, *where, f"name={json.dumps(self.run_name)}", "--resume", "auto"]


def local_paths(recipe: Recipe) -> list[tuple[str, str]]:
    """Return (key, value) of what the recipe reads from this machine's disk, as far as it is there."""
    teacher, student, data = recipe.teacher, recipe.student, recipe.data
    named = {"student.path": student.path, "data.train": data.train, "data.heldout": data.heldout}
    if teacher is not None:
        named |= {"teacher.path": teacher.path, "teacher.cache": teacher.cache}
    return [(key, path) for key, path in named.items() if path and Path(path).exists()]


def cluster_file(kind: ClusterKind, cluster: Cluster) -> str:
    """Return the file's text. Raises UserError for what the kind cannot have."""
    _check(kind, cluster)
    recipe = cluster.own_recipe
    recipe_name = recipe.name if recipe else cluster.recipe
    if kind == "slurm":  # the nodes read it where it lies
        recipe_path = cluster.recipe
    else:
        recipe_path = f"/etc/fastdistil/{recipe_name}" if recipe and kind == "mpijob" else recipe_name
    environment = jinja2.Environment(  # noqa: S701 - no HTML; the filters quote
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": shlex.quote, "yaml": _quoted, "block": _block, "here_document": _here_document}
    return environment.get_template(_TEMPLATES[kind]).render(
        cluster=cluster,
        arguments=shlex.join(cluster.arguments(recipe_path)),
        executable=sys.executable,
        recipe_name=recipe_name,
        recipe_text=None if recipe is None or kind == "slurm" else recipe.read_text(encoding="utf-8"),
        save_s=SAVE_S,
        port=PORT,
        make_secret=_MAKE_SECRET,
        stored=lambda mount: _stored(cluster, mount),
    )


def _check(kind: ClusterKind, cluster: Cluster) -> None:
    """Raise UserError for what the kind cannot have."""
    recipe = cluster.own_recipe
    if kind == "slurm" and cluster.storage is not None:
        raise UserError(
            "--for slurm takes no --storage: the run lies where the job is submitted, on the file system shared by all"
        )
    if kind == "mpijob" and cluster.image is None:
        raise UserError("--for mpijob needs --image: a container image with fastdistil, Open MPI and an SSH server")
    if kind == "mpijob" and cluster.gpu_type is not None:
        raise UserError(
            f"--for mpijob takes the number of a node's GPUs, --gpus {cluster.gpu_count}; choose a type by node labels"
        )
    if kind == "mpijob" and recipe is not None and not re.fullmatch(r"[\w.-]+", recipe.name, re.ASCII):
        raise UserError(
            f"Kubernetes takes no file named {recipe.name!r}; rename it with letters, digits, dots and dashes alone"
        )
    if kind == "skypilot" and cluster.gpu_count and cluster.gpu_type is None:
        raise UserError(f"--for skypilot needs the GPUs' type: --gpus H100:{cluster.gpu_count}")
    if kind == "skypilot" and cluster.time is not None:
        raise UserError("--for skypilot takes no --time: a SkyPilot task has no limit")


def _here_document(text: str, name: str) -> str:
    """Return the lines of a shell script that write the text, and an end of its last line, to the file `name`."""
    text, end = text.removesuffix("\n"), "END_OF_RECIPE"
    while end in text.split("\n"):
        end += "_"
    return f"cat > {shlex.quote(name)} <<'{end}'\n{text}\n{end}"


def _quoted(text: str) -> str:
    """Return a text as a double-quoted string of YAML, on one line."""
    return str(yaml.safe_dump(text, default_style='"', width=sys.maxsize, allow_unicode=True)).rstrip("\n")


def _block(text: str, width: int) -> str:
    """Return a text as a literal block of YAML, or quoted where a block would not read back the same.

    The text ends with a line's end, or gets one.
    """
    lines = text.removesuffix("\n").split("\n")
    text = "\n".join(lines) + "\n"
    block = "|\n" + "\n".join(" " * width + line if line else "" for line in lines)
    try:
        same = yaml.safe_load(f"key: {block}\n") == {"key": text}
    except yaml.YAMLError:
        same = False
    return block if same else _quoted(text)


def _stored(cluster: Cluster, mount: str) -> str:
    if cluster.storage is not None:
        return "The run's directory is below /workspace/runs."
    return f"The run's directory is lost with the first node unless it lies on a mount: --storage names {mount}."
