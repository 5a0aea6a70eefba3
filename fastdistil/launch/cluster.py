"""The one file that sets a cluster up for a recipe and starts the run there: Slurm, Kubernetes, SkyPilot, dstack.

    slurm      a batch script: srun starts the ranks, on a file system that all nodes share
    mpijob     a kubeflow.org/v2beta1 MPIJob (and a ConfigMap for a recipe of your own): mpirun starts the ranks
    skypilot   a task: torchrun on every node starts the ranks
    dstack     a multi-node task: the same

Every file names the run, so that submitting it again, or a restart after a lost node, continues that run (--resume auto).

A user's values reach the ranks as they are, whatever they hold: `shlex` quotes them for the shell, `_quoted` and `_block` for
YAML, `_here_document` for a file in a script.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import yaml

from fastdistil.errors import UserError
from fastdistil.recipe import Recipe

ClusterKind = Literal["slurm", "mpijob", "skypilot", "dstack"]
KINDS: tuple[ClusterKind, ...] = ("slurm", "mpijob", "skypilot", "dstack")
SAVE_S = 120
"""What a run is given to save before it is killed."""
PORT = 29500
CONTINUED = " \\\n  "
"""Between the parts of a shell's command on several lines."""
MAKE_SECRET = """export FASTDISTIL_STORE_SECRET="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')\""""  # noqa: S105 - none yet
"""A line of a script: the ranks it starts share what nobody else knows (rendezvous.py)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is asked for."""

    command: Literal["train", "pretrain"]
    recipe: str
    """A name, or the path of a .yaml file."""
    overrides: Sequence[str]
    run_name: str
    nodes: int
    gpus: str
    """Of a node: a number, or with a type, as H100:8. 0: one rank of the processor on each node."""
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

    def arguments(self, recipe: str) -> list[str]:
        """Of fastdistil, on the cluster, where the recipe is found at `recipe`."""
        stored = self.storage is not None and not any(override.startswith("runs_dir=") for override in self.overrides)
        where = ["runs_dir=/workspace/runs"] if stored else []
        return [self.command, recipe, *self.overrides, *where, f"name={json.dumps(self.run_name)}", "--resume", "auto"]


def local_paths(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, value) of what the recipe reads from this machine's disk, as far as it is there."""
    teacher, student, data = recipe.teacher, recipe.student, recipe.data
    named = {"student.path": student.path, "data.train": data.train, "data.heldout": data.heldout}
    if teacher is not None:
        named |= {"teacher.path": teacher.path, "teacher.cache": teacher.cache}
    return [(key, path) for key, path in named.items() if path and Path(path).exists()]


def cluster_file(kind: ClusterKind, cluster: Cluster) -> str:
    """The file's text. Raises UserError for what the kind cannot have."""
    match kind:
        case "slurm":
            return _slurm(cluster)
        case "mpijob":
            return _mpijob(cluster)
        case "skypilot":
            return _skypilot(cluster)
        case "dstack":
            return _dstack(cluster)
        case other:
            assert_never(other)


def _slurm(cluster: Cluster) -> str:
    if cluster.storage is not None:
        raise UserError(
            "--for slurm takes no --storage: the run lies where the job is submitted, on the file system shared by all"
        )
    ranks = cluster.ranks_per_node
    options = [
        f"--job-name={cluster.label}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={ranks}",
        *([f"--gpus-per-node={cluster.gpus}"] if cluster.gpu_count else []),
        *([f"--time={cluster.minutes}"] if cluster.minutes else []),
        "--exclusive",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{SAVE_S}",
    ]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"]
    if cluster.image is not None:  # Pyxis' options: the image, with the directory of the job inside
        srun.append(f"--container-image={shlex.quote(cluster.image)}")
        srun += ['--container-mounts="$PWD:$PWD"', '--container-workdir="$PWD"']
    python = "python3" if cluster.image else sys.executable
    directives = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""#!/bin/bash
# {cluster.title}. Submit with sbatch, from a directory that all nodes share.
# Before the job's time ends its ranks get SIGTERM, save and stop; the job is then queued again and goes on.
{directives}
set -u

# Threads of a rank on the host.
threads=$(( ${{SLURM_CPUS_ON_NODE:-{ranks}}} / {ranks} ))
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}}"

{MAKE_SECRET}

# A rank that is lost is not Slurm's concern: the others notice, and end by themselves.
{" ".join(srun)} \\
    {shlex.join([python, "-m", "fastdistil", *cluster.arguments(cluster.recipe)])}
code=$?

# 75: stopped and saved. Because time is up, or because somebody asked for a pause?
if [ "$code" -eq 75 ] && [ "$(date +%s)" -ge "$(( ${{SLURM_JOB_END_TIME:-9999999999}} - {SAVE_S + 60} ))" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _mpijob(cluster: Cluster) -> str:
    if cluster.image is None:
        raise UserError("--for mpijob needs --image: a container image with fastdistil, Open MPI and an SSH server")
    if cluster.gpu_type is not None:
        raise UserError(
            f"--for mpijob takes the number of a node's GPUs, --gpus {cluster.gpu_count}; choose a type by node labels"
        )
    recipe = cluster.own_recipe
    if recipe is not None and not re.fullmatch(r"[\w.-]+", recipe.name, re.ASCII):
        raise UserError(
            f"Kubernetes takes no file named {recipe.name!r}; rename it with letters, digits, dots and dashes alone"
        )
    mounted = f"/etc/fastdistil/{recipe.name}" if recipe is not None else cluster.recipe
    mpirun = [
        "mpirun --allow-run-as-root --bind-to none --map-by slot",
        # Open MPI would kill a second after SIGTERM.
        f"--mca odls_base_sigkill_timeout {SAVE_S}",
        f"-np {cluster.nodes * cluster.ranks_per_node} -x PATH -x MASTER_ADDR -x MASTER_PORT -x FASTDISTIL_STORE_SECRET",
        # Kubernetes puts values in for $(NAME), also in a script, and writes $ for $$.
        shlex.join(["python3", "-m", "fastdistil", *cluster.arguments(mounted)]).replace("$", "$$"),
    ]
    script = [
        "# Rank 0 runs in the first worker.",
        f"""export MASTER_ADDR="$(head -n 1 /etc/mpi/hostfile | cut -d ' ' -f 1 | cut -d : -f 1)" MASTER_PORT={PORT}""",
        MAKE_SECRET,
        f"exec {CONTINUED.join(mpirun)}",
    ]
    mounts = [("shm", "/dev/shm", "emptyDir: {medium: Memory}")]  # noqa: S108 - a mount point
    if cluster.storage is not None:
        mounts.append(("storage", "/workspace", f"persistentVolumeClaim: {{claimName: {_quoted(cluster.storage)}}}"))
    if recipe is not None:
        mounts.append(("recipe", "/etc/fastdistil", f"configMap: {{name: {_quoted(cluster.label)}}}"))
    pod = f"""
          terminationGracePeriodSeconds: {SAVE_S + 30}
          volumes:
{_indented([line for name, _, source in mounts for line in (f"- name: {name}", f"  {source}")], 12)}
          containers:
            - name: fastdistil
              image: {_quoted(cluster.image)}
              volumeMounts:
{_indented([f"- {{name: {name}, mountPath: {path}}}" for name, path, _ in mounts], 16)}"""
    deadline = f"\n    activeDeadlineSeconds: {60 * cluster.minutes}" if cluster.minutes else ""
    gpus = f"\n              resources: {{limits: {{nvidia.com/gpu: {cluster.gpu_count}}}}}" if cluster.gpu_count else ""
    return f"""# {cluster.title}. Needs the MPI operator (v2beta1).
# Start with kubectl apply -f FILE. {_stored(cluster, "a persistent volume claim")}
{_config_map(cluster)}apiVersion: kubeflow.org/v2beta1
kind: MPIJob
metadata:
  name: {_quoted(cluster.label)}
spec:
  slotsPerWorker: {cluster.ranks_per_node}
  mpiImplementation: OpenMPI
  runPolicy:
    cleanPodPolicy: Running
    # How often the job is started again when ranks were lost or stopped; it goes on from its last checkpoint.
    backoffLimit: 6{deadline}
  mpiReplicaSpecs:
    Launcher:
      replicas: 1
      template:
        spec:{pod}
              command: [/bin/sh, -c]
              args:
                - {_block(script, 18)}
    Worker:
      replicas: {cluster.nodes}
      template:
        spec:{pod}
              command: [/usr/sbin/sshd, -De]{gpus}
"""


def _config_map(cluster: Cluster) -> str:
    if cluster.own_recipe is None:
        return ""
    lines = cluster.own_recipe.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return f"""apiVersion: v1
kind: ConfigMap
metadata:
  name: {_quoted(cluster.label)}
data:
  {_quoted(cluster.own_recipe.name)}: {_block(lines, 4)}
---
"""


def _installs(cluster: Cluster) -> list[str]:
    """From a checkout, on every node: the package, and Horovod where the ranks use it."""
    if "world.engine=torch" in cluster.overrides:
        return ["pip install ."]
    # Without GPUs no CUDA compiler is wanted, though torch may be a CUDA build.
    return ["pip install '.[horovod]'", "python -m fastdistil.install.horovod_build" + ("" if cluster.gpu_count else " --cpu")]


def _skypilot(cluster: Cluster) -> str:
    if cluster.gpu_count and cluster.gpu_type is None:
        raise UserError(f"--for skypilot needs the GPUs' type: --gpus H100:{cluster.gpu_count}")
    if cluster.time is not None:
        raise UserError("--for skypilot takes no --time: a SkyPilot task has no limit")
    resources = [
        *([f"accelerators: {cluster.gpus}"] if cluster.gpu_count else ["cpus: 4+"]),
        *([f"image_id: {_quoted('docker:' + cluster.image)}"] if cluster.image else []),
        "network_tier: best",
        "# A preempted or failed job is started again, and goes on from its last checkpoint.",
        "job_recovery: {max_restarts_on_errors: 6}",
    ]
    mount = f"file_mounts:\n  /workspace: {{source: {_quoted(cluster.storage)}, mode: MOUNT}}\n" if cluster.storage else ""
    checkout = "" if cluster.image else "# fastdistil's checkout, from which the nodes install it.\nworkdir: .\n"
    setup = "" if cluster.image else "setup: |\n" + "".join(f"  {line}\n" for line in _installs(cluster))
    run = _torchrun(
        cluster,
        '"$SKYPILOT_NUM_NODES"',
        '"$SKYPILOT_NODE_RANK"',
        '"$SKYPILOT_NUM_GPUS_PER_NODE"',
        '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
    )
    return f"""# {cluster.title}.
# Start with sky jobs launch FILE. {_stored(cluster, "a bucket, e.g. s3://NAME")}
name: {_quoted(cluster.label)}
{checkout}num_nodes: {cluster.nodes}
resources:
{_indented(resources, 2)}
{mount}{setup}run: {_block(run, 2)}
"""


def _dstack(cluster: Cluster) -> str:
    resources = [f"gpu: {cluster.gpus}"] if cluster.gpu_count else ["cpu: 4.."]
    source = (
        f"image: {_quoted(cluster.image)}\n"
        if cluster.image
        else 'python: "3.12"\n# fastdistil\'s checkout, from which the nodes install it.\nrepos:\n  - .\n'
    )
    volume = f"volumes:\n  - {_quoted(cluster.storage + ':/workspace')}\n" if cluster.storage else ""
    limit = f"max_duration: {cluster.time}\n" if cluster.time else ""
    install = [] if cluster.image else ["set -e", *_installs(cluster)]
    ranks = _torchrun(
        cluster, '"$DSTACK_NODES_NUM"', '"$DSTACK_NODE_RANK"', '"$DSTACK_GPUS_PER_NODE"', '"$DSTACK_MASTER_NODE_IP"'
    )
    run = [*install, *ranks]
    return f"""# {cluster.title}; its fleet needs placement: cluster.
# Start with dstack apply -f FILE. {_stored(cluster, "a volume's name or a directory of the hosts")}
type: task
name: {_quoted(cluster.label)}
nodes: {cluster.nodes}
{source}shell: bash
commands:
  - {_block(run, 4)}
resources:
{_indented([*resources, "shm_size: 16GB"], 2)}
{volume}{limit}# Started again after an interruption, it goes on from its last checkpoint.
retry:
  on_events: [no-capacity, interruption]
  duration: 1d
stop_duration: {SAVE_S + 60}s
"""


def _torchrun(cluster: Cluster, nodes: str, node: str, gpus: str, address: str) -> list[str]:
    """Lines of a shell script that starts a node's ranks; the arguments are the shell's expressions for them."""
    path = cluster.own_recipe
    here = path.name if path is not None else cluster.recipe
    write = _here_document(here, path.read_text(encoding="utf-8")) if path is not None else []
    per_node = gpus if cluster.gpu_count else "1"
    return [
        *write,
        f"exec python3 -m torch.distributed.run --nnodes={nodes} --node-rank={node} --nproc-per-node={per_node} \\",
        f"  --master-addr={address} --master-port={PORT} \\",
        f"  -m fastdistil {shlex.join(cluster.arguments(here))}",
    ]


def _here_document(name: str, text: str) -> list[str]:
    """Return the lines of a shell script that write the text, and an end of its last line, to the file."""
    lines, end = text.removesuffix("\n").split("\n"), "END_OF_RECIPE"
    while end in lines:
        end += "_"
    return [f"cat > {shlex.quote(name)} <<'{end}'", *lines, end]


def _quoted(text: str) -> str:
    """Return a text as a double-quoted string of YAML, on one line."""
    return str(yaml.safe_dump(text, default_style='"', width=sys.maxsize, allow_unicode=True)).rstrip("\n")


def _block(lines: Sequence[str], width: int) -> str:
    """Return lines as a literal block of YAML, indented by `width`, or quoted where a block would not read back the same."""
    text = "\n".join(lines) + "\n"
    block = "|\n" + _indented(text.removesuffix("\n").split("\n"), width)
    try:
        same = yaml.safe_load(f"key: {block}\n") == {"key": text}
    except yaml.YAMLError:
        same = False
    return block if same else _quoted(text)


def _stored(cluster: Cluster, mount: str) -> str:
    if cluster.storage is not None:
        return "The run's directory is below /workspace/runs."
    return f"The run's directory is lost with the first node unless it lies on a mount: --storage names {mount}."


def _indented(lines: Sequence[str], width: int) -> str:
    return "\n".join(" " * width + line if line else "" for line in lines)
