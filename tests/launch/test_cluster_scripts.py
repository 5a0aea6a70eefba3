"""The scripts in cluster files, run under stand-ins for torchrun, mpirun and srun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.python_docs import docstrings
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.events import Start, read_events
from fastdistil.launch.cluster import KINDS, ClusterKind
from tests.launch.cluster_files import SCHEMAS, check, documents, shell_of, text_of


def run_script(
    script: str,
    folder: Path,
    environ: dict[str, str],
    **programs: str,
) -> "subprocess.CompletedProcess[str]":
    """A shell script with stand-ins for some programs."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# What the clusters set, and what Python is called with then: the rendezvous and fastdistil's own arguments.
@pytest.mark.parametrize(
    ("kind", "environ"),
    [
        (
            "skypilot",
            {
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NODE_RANK": "1",
                "SKYPILOT_NUM_GPUS_PER_NODE": "8",
                "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            },
        ),
        (
            "dstack",
            {
                "DSTACK_NODES_NUM": "2",
                "DSTACK_NODE_RANK": "1",
                "DSTACK_GPUS_PER_NODE": "8",
                "DSTACK_MASTER_NODE_IP": "10.0.0.1",
            },
        ),
    ],
)
def test_torchrun_is_started_on_every_node(
    kind: ClusterKind, environ: dict[str, str], recipe_text: Path, tmp_path: Path
) -> None:
    script = shell_of(kind, documents(kind, recipe=str(recipe_text))[0])
    installs = {
        "pip": f"echo pip $* >> {tmp_path}/installed",
        "python": f"echo python $* >> {tmp_path}/installed",
    }
    done = run_script(script, tmp_path, environ, python3='printf "%s\\n" "$@"', **installs)
    assert done.returncode == 0, done.stderr
    if kind == "dstack":
        built = ["pip install .[horovod]", "python -m fastdistil.install.horovod_build"]
        assert (tmp_path / "installed").read_text().splitlines() == built
    assert done.stdout.splitlines() == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=8",
        "--master-addr=10.0.0.1",
        "--master-port=29500",
        "-m",
        "fastdistil",
        "train",
        "Mine.yaml",
        "data.train=my corpus/",
        "teacher.path=bert-base-uncased",
        "runs_dir=/workspace/runs",
        'name="Distil_BERT-7"',
        "--resume",
        "auto",
    ]
    assert (tmp_path / "Mine.yaml").read_text() == recipe_text.read_text()


NASTY = [
    "name=it's",
    'data.train="$(touch pwned)" `touch pwned` $HOME ${HOME} $$ $(HOSTNAME) \\',
    "a\nEND_OF_RECIPE\ntouch pwned\n",
    "END_OF_RECIPE_",
    "  - {x: y} # &a *a !b %c @d | > \t é \U0001f600 \x85 \u2028 \x07",
    "",
]
CLUSTER = {
    "skypilot": {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1"},
    "dstack": {"DSTACK_NODES_NUM": "1", "DSTACK_NODE_RANK": "0", "DSTACK_MASTER_NODE_IP": "10.0.0.1"},
    "mpijob": {},
    "slurm": {},
}


def kubernetes_expands(text: str) -> str:
    """As in a container's arguments: $$ is $, and $(NAME) the value of a variable that the container has."""
    return re.sub(r"\$\$|\$\(HOSTNAME\)", lambda match: "$" if match[0] == "$$" else "pwned", text)


@pytest.mark.parametrize(
    "recipe_text",
    ["", "  \n# END_OF_RECIPE\n", "#\tx\n\tEND_OF_RECIPE\nEND_OF_RECIPE\n$(touch pwned) '\"`\n\n"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_values_reach_the_ranks_as_they_are(kind: ClusterKind, recipe_text: str, tmp_path: Path) -> None:
    """Whatever quotes, expansions, lines and marks of YAML or of a here-document they hold."""
    recipe = "distilbert"
    if recipe_text:
        path = tmp_path / "Mine.yaml"
        path.write_text(recipe_text)
        recipe = str(path)
    more = {"image": None} if kind in ("skypilot", "dstack") else {}
    overrides = NASTY if recipe_text else NASTY[:3]  # the others show nowhere, and quote the whole script
    text = text_of(kind, recipe=recipe, overrides=overrides, gpus="0", **more)
    if kind == "slurm":
        script = text
    else:
        *first, document = yaml.safe_load_all(text)
        check(document, SCHEMAS[kind], kind)
        script = shell_of(kind, document)
        if kind == "mpijob":
            assert [manifest["data"] for manifest in first] == ([{"Mine.yaml": recipe_text}] if recipe_text else [])
            script = kubernetes_expands(script)
    there = tmp_path / "there"
    there.mkdir()
    heard = tmp_path / "heard"
    hears = f'printf "%s\\0" "$FASTDISTIL_STORE_SECRET" "$@" > {heard}'
    done = run_script(
        script,
        there,
        CLUSTER[kind],
        python3=hears,
        mpirun=hears,
        srun=hears,
        pip="true",
        python="true",
        scontrol="true",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in there.iterdir()) == ["Mine.yaml"] * bool(recipe_text and more) + [
        "tools",
    ]
    if recipe_text and more:
        assert (there / "Mine.yaml").read_text() == recipe_text
    secret, *arguments = heard.read_text().removesuffix("\0").split("\0")
    assert arguments[arguments.index("train") + 2 :][: len(overrides)] == overrides
    assert bool(re.fullmatch("[0-9a-f]{32}", secret)) == (kind in ("slurm", "mpijob"))


def test_mpirun_starts_the_ranks_of_a_kubernetes_job(tmp_path: Path) -> None:
    script = shell_of("mpijob", documents("mpijob")[0])
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("job-worker-0.job.default.svc slots=8\njob-worker-1.job.default.svc slots=8\n")
    script = script.replace("/etc/mpi/hostfile", str(hostfile))
    done = run_script(script, tmp_path, {}, mpirun='echo "$MASTER_ADDR $MASTER_PORT"; printf "%s\\n" "$@"')
    assert done.returncode == 0, done.stderr
    first, *arguments = done.stdout.splitlines()
    assert first == "job-worker-0.job.default.svc 29500"
    assert arguments[arguments.index("-np") + 1] == "16"
    ranks = arguments[arguments.index("python3") :]
    assert ranks[:6] == ["python3", "-m", "fastdistil", "train", "distilbert", "data.train=my corpus/"]
    worker = documents("mpijob")[0]["spec"]["mpiReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 2
    assert worker["template"]["spec"]["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert documents("mpijob")[0]["spec"]["runPolicy"]["activeDeadlineSeconds"] == 8 * 3600


# One node of a Slurm cluster: starts the tasks of the job as processes here and gives the highest exit code of theirs.
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0
export SLURM_STEP_NODELIST=node01
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    one=$?
    [ "$one" -gt "$code" ] && code=$one
done
exit "$code"
"""
# What the batch script of a job finds.
JOB = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
    "SLURM_TASKS_PER_NODE": "2",
    "SLURM_JOB_NODELIST": "node01",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("code", "left_s", "requeued"),
    [(0, 10_000, False), (75, 10_000, False), (75, 100, True), (12, 100, False)],
)
def test_a_job_whose_time_is_up_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, left_s: int, requeued: bool
) -> None:
    """Stopped with time left, somebody has asked for a pause."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$SLURM_PROCID $OMP_NUM_THREADS $@"\nexit {code}\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.delenv("OMP_NUM_THREADS")
    script = text_of("slurm", gpus="2", nodes=1)
    script = script.replace('"$(date +%s)"', "1000000")
    environ = {**JOB, "SLURM_JOB_END_TIME": str(1_000_000 + left_s)}
    done = run_script(script, tmp_path, environ, srun=SRUN, scontrol='echo "scontrol $@"')
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    recipe = "distilbert data.train=my corpus/ teacher.path=bert-base-uncased"
    arguments = f'-m fastdistil train {recipe} name="Distil_BERT-7" --resume auto'
    assert sorted(lines)[:2] == [f"0 1 {arguments}", f"1 1 {arguments}"]
    assert (f"scontrol requeue {os.getpid()}" in lines) == requeued


def test_the_slurm_script_trains_with_two_ranks(tmp_path: Path) -> None:
    """The real command under the stand-in srun: one run, two ranks, and the student they share."""
    documents = [*docstrings(Path(subprocess.__file__)), *docstrings(Path(re.__file__))] * 4
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    train_wordpiece(documents, 300, tmp_path / "tokenizer")
    options = PrepareOptions(
        tokenizer=str(tmp_path / "tokenizer"),
        max_length=32,
        documents="paragraph",
        workers=1,
    )
    prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", options)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "teacher")
    overrides = [
        "teacher.path=teacher",
        "student.every=2",
        "student.architecture=same",
        "data.train=corpus",
        "data.micro_batch_tokens=128",
        "loop.updates=3",
        "loop.accumulation=2",
        "device=cpu",
        "world.engine=torch",
        "logging.every=1",
    ]
    script = text_of("slurm", gpus="2", nodes=1, overrides=overrides, run_name="together")
    root = str(Path(__file__).resolve().parents[2])
    done = run_script(script, tmp_path, {**JOB, "PYTHONPATH": root}, srun=SRUN, scontrol="false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the student is in runs/together/student" in done.stdout and done.stdout.count("done:") == 1
    (start,) = [event for event in read_events(tmp_path / "runs/together/events.jsonl") if isinstance(event, Start)]
    assert (start.engine, start.ranks) == ("torch", 2)
    assert (tmp_path / "runs/together/student/config.json").is_file()
