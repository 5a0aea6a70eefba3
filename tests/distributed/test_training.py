"""Whole runs with several ranks: what they learn, how they stop, how they continue, and what they say when one is lost."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistil import events as event_log
from fastdistil.recipe import Recipe, load_recipe
from tests.distributed.conftest import Start
from tests.small_run import assert_same_bits, events, learnt, quiet, saved_state, saved_updates, small

DRIVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from fastdistil import train
from fastdistil.errors import FastdistilError
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe
how, at, on, resume = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] or None
place = find_rank_info(os.environ)
step = train.train_step
def counted(run, window, counts, waited_s):
    if run.update + 1 == at and place.rank in (on, on if how != "KILL-ALL" else place.rank):
        if how.startswith("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "STOP":
            time.sleep(1.5)  # longer than between two words to the others: they know where this is
        if how in ("TERM", "INT", "STOP", "ELSEWHERE"):
            os.kill(os.getpid(), getattr(signal, "SIG" + how, signal.SIGTERM))
        if how == "RAISE":
            raise RuntimeError("planted")
        if how == "SLEEP":
            time.sleep(600)
        if how == "PAUSE":
            (run.directory / "PAUSE").touch()
        if how == "FLIP":
            happened = step(run, window, counts, waited_s)
            run.parameters[-1].detach().view(-1).view(torch.int32)[3] ^= 1
            return happened
    return step(run, window, counts, waited_s)
train.train_step = counted
if how == "ELSEWHERE" and place.rank == on:
    os.chdir(Path(sys.argv[1]).parent / "elsewhere")
if how == "LATE":  # rank 0 signals the other, which waits for it to leave, while it writes the student
    from fastdistil.distributed import coordinator
    leaving, leave, export = Path(sys.argv[1]).parent / "leaving", coordinator._leave, train.export_student
    def left(*given):
        if place.rank == on:
            leaving.with_suffix(".part").write_text(str(os.getpid()))
            leaving.with_suffix(".part").rename(leaving)
        leave(*given)
    def exported(*given, **named):
        while not leaving.exists():
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(int(leaving.read_text()), number)
        export(*given, **named)
    coordinator._leave, train.export_student = left, exported
code = 0
try:
    train.train(load_recipe(sys.argv[1]), resume=resume, place=place)
except FastdistilError as error:
    print(f"fastdistil: {error}", file=sys.stderr)
    code = error.exit_code
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as the command line does when a rank was lost: threads may hang in a collective
"""


Ended = tuple[int, str]


@pytest.fixture
def train_ranks(start_ranks: Start, tmp_path: Path) -> Callable[..., list[Ended]]:
    """Runs a recipe on several ranks, one of which meets something; (exit code, standard error) by rank."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(recipe: Recipe, ranks: int, how: str = "", at: int = 0, on: int = 1, resume: str = "") -> list[Ended]:
        path = tmp_path / "asked.yaml"
        path.write_text(recipe.to_yaml())
        processes = start_ranks([sys.executable, str(driver), str(path), how, str(at), str(on), resume], ranks)
        ended: dict[int, str] = {}
        for rank, process in enumerate(processes):
            if not (how == "STOP" and rank == on):
                ended[rank] = process.communicate(timeout=120)[1]
        for rank, process in enumerate(processes):
            if rank not in ended:
                assert process.poll() is None
                process.kill()
                ended[rank] = process.communicate()[1]
        return [(process.returncode, ended[rank]) for rank, process in enumerate(processes)]

    return run


def all_well(ended: list[Ended]) -> None:
    for code, err in ended:
        assert code == 0, err


def test_two_ranks_learn_what_one_does(
    engine: str, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """2 ranks x 2 micro-batches against 1 x 4, dropout off; and what events.jsonl tells of the exchange."""
    two = small(material, tmp_path / "two", "student.dropout=0", f"world.engine={engine}", "world.rings=2")
    all_well(train_ranks(two, 2))
    all_well(train_ranks(small(material, tmp_path / "one", "student.dropout=0", "loop.accumulation=4"), 1))
    both = learnt(tmp_path / "two" / "run"), learnt(tmp_path / "one" / "run")
    assert [line[0] for line in both[0]] == list(range(1, 9))
    for of_two, of_one in zip(*both, strict=True):
        assert of_two == pytest.approx(of_one, rel=2e-5)
    evaluations = [events(tmp_path / name / "run", "evaluation") for name in ("two", "one")]
    assert [e["update"] for e in evaluations[0]] == [3, 6, 8]
    for of_two, of_one in zip(*evaluations, strict=True):
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-4)
    (start,) = events(tmp_path / "two" / "run", "start")
    assert (start["engine"], start["ranks"], start["rings"], start["sync"]) == (engine, 2, 2, "delayed")
    for line in events(tmp_path / "two" / "run"):
        assert line["engine"] == engine and line["gradient_collectives"] == line["buckets"]
        assert line["gradient_bytes"] == sum(line["ring_bytes"]) > 0 and min(line["ring_bytes"]) > 0
        assert 0 < line["control_bytes"] < 1024
        assert sum(line["rank_tokens"]) == line["tokens"] and 0 <= line["imbalance_tokens"] < 1
    # The stored recipe remembers what an update was counted for; the run directory is one run's.
    assert load_recipe(str(tmp_path / "two" / "run" / "recipe.yaml")).world.ranks == 2
    assert (tmp_path / "two" / "run" / "student" / "config.json").exists()


def test_every_micro_batch_learns_the_same_and_sends_more(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    for name, sync in (("delayed", "delayed"), ("every", "every-micro-batch")):
        recipe = small(material, tmp_path / name, "world.engine=torch", f"world.sync={sync}", "loop.updates=3")
        all_well(train_ranks(recipe, 2))
    lines = {name: events(tmp_path / name / "run") for name in ("delayed", "every")}
    for delayed, every in zip(lines["delayed"], lines["every"], strict=True):
        assert every["total"] == pytest.approx(delayed["total"], rel=1e-5)
        assert every["gradient_bytes"] == 2 * delayed["gradient_bytes"]


def test_auto_measures_decides_once_and_says_why(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    recipe = small(material, tmp_path, "compression={kind: auto, warmup_updates: 3}", "world.engine=torch", "world.rings=2")
    all_well(train_ranks(recipe, 2))
    (note,) = events(tmp_path / "run", "note")
    assert note["message"].startswith("compression auto: ") and " ms" in note["message"]
    lines = events(tmp_path / "run")
    assert [line["compression"] for line in lines[:3]] == ["auto"] * 3
    (kind,) = {line["compression"] for line in lines[4:]}
    assert f"auto: {kind}:" in note["message"]
    # What was measured with is not counted as gradients.
    assert [line["gradient_collectives"] for line in lines[:4]] == [line["buckets"] for line in lines[:4]]


def test_every_rank_writes_its_trace(material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]) -> None:
    """Of two updates: each names its own rank and holds that rank's collectives."""
    options = ["world.engine=torch", "loop.updates=4", "evaluation.every=null", "profile.warmup=1"]
    all_well(train_ranks(small(material, tmp_path, "profile.trace_steps=[2,3]", *options), 2))
    folder = tmp_path / "run" / "trace"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    for rank in range(2):
        trace = json.loads(gzip.decompress((folder / f"rank-{rank}.json.gz").read_bytes()))
        assert trace["distributedInfo"]["rank"] == rank
        assert any("allreduce" in event["name"] for event in trace["traceEvents"] if "name" in event)


DIFFERING = """
import os, sys
import torch
from fastdistil import distil
from fastdistil.errors import FastdistilError
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe
torch.manual_seed(find_rank_info().rank)
batches = [{"input_ids": torch.randint(5, 300, (2, 8 + int(torch.randint(0, 8, ())))), "labels": None} for _ in range(8)]
code = 0
try:
    distil(load_recipe(sys.argv[1]), corpus=batches)
except FastdistilError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
sys.stderr.flush()
os._exit(code)
"""


def test_iterables_that_differ_between_ranks_are_refused(material: Path, tmp_path: Path, start_ranks: Start) -> None:
    (tmp_path / "program.py").write_text(DIFFERING)
    recipe = small(material, tmp_path, "world.engine=torch", "data.heldout=null", "evaluation.every=null")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "r.yaml")]
    for process in start_ranks(command, 2):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "the ranks have different batches" in err, err


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_killed_run_continues_bit_for_bit(
    compression: str, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """Weights, moments, and what compression still owes on each rank."""
    extra = [f"compression={{kind: {compression}, warmup_updates: 2, block: 64}}", "world.engine=torch"]
    all_well(train_ranks(small(material, tmp_path / "whole", *extra), 2))
    recipe = small(material, tmp_path / "cut", *extra)
    codes = [code for code, _ in train_ranks(recipe, 2, "KILL-ALL", 6)]
    assert codes == [-signal.SIGKILL] * 2
    assert saved_updates(tmp_path / "cut" / "run" / "checkpoints")[-1] == 4
    all_well(train_ranks(recipe, 2, resume="auto"))
    reference, cut = (saved_state(tmp_path / name / "run") for name in ("whole", "cut"))
    assert any(name.startswith("rank-1.") for name in reference) == (compression == "int8")
    assert_same_bits(reference, cut)
    assert learnt(tmp_path / "whole" / "run") == learnt(tmp_path / "cut" / "run")


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_number_of_ranks_continues_the_same_updates(
    ranks: int, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """The batches of an update, the schedule and the number of updates stay; with dropout off so do the losses."""
    extra = ["student.dropout=0", "world.engine=torch"]
    all_well(train_ranks(small(material, tmp_path / "whole", *extra), 2))
    recipe = small(material, tmp_path / "cut", *extra)
    train_ranks(recipe, 2, "KILL-ALL", 5)
    fewer = small(material, tmp_path / "cut", "student.dropout=0") if ranks == 1 else recipe
    all_well(train_ranks(fewer, ranks, resume="auto"))
    for of_whole, of_cut in zip(learnt(tmp_path / "whole" / "run"), learnt(tmp_path / "cut" / "run"), strict=True):
        assert of_cut == pytest.approx(of_whole, rel=2e-5)


def test_what_compression_owes_is_shared_among_other_ranks(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    extra = ["compression={kind: int8, warmup_updates: 1, block: 64}", "world.engine=torch"]
    recipe = small(material, tmp_path, *extra)
    train_ranks(recipe, 2, "KILL-ALL", 5)
    all_well(train_ranks(recipe, 3, resume="auto"))
    (note,) = events(tmp_path / "run", "note")
    assert note["message"] == "what 2 ranks had not sent yet is shared among 3"
    assert len(events(tmp_path / "run")) == 8


def test_one_rank_pays_what_two_owed(material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]) -> None:
    """Top-k of 1% owes nearly all of an update: with it the next one's gradient is as large as the sum of several."""
    norms = {}
    for kind in ("none", "top-k"):
        extra = [f"compression={{kind: {kind}, warmup_updates: 1}}", "student.dropout=0", "evaluation.every=null"]
        train_ranks(small(material, tmp_path / kind, *extra, "world.engine=torch"), 2, "KILL-ALL", 5)
        all_well(train_ranks(small(material, tmp_path / kind, *extra), 1, resume="auto"))
        norms[kind] = {line["update"]: line["grad_norm"] for line in events(tmp_path / kind / "run")}
    (note,) = events(tmp_path / "top-k" / "run", "note")
    assert note["message"] == "what 2 ranks had not sent yet joins this rank's next update"
    assert events(tmp_path / "none" / "run", "note") == []
    assert norms["top-k"][5] > 1.8 * norms["none"][5]
    assert norms["top-k"][6] < 1.5 * norms["none"][6]


@pytest.mark.parametrize(
    ("how", "on"),
    [
        ("TERM", 1),
        pytest.param("TERM", 0, marks=pytest.mark.slow),
        pytest.param("INT", 1, marks=pytest.mark.slow),
        ("PAUSE", 0),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_update(
    how: str, on: int, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    recipe = small(material, tmp_path, "world.engine=torch", "evaluation.every=null")
    ended = train_ranks(recipe, 2, how, 4, on)
    for code, err in ended:
        assert code == 75, err
        assert "after update 3" in err and "--resume" in err
        assert how in err
    assert saved_updates(tmp_path / "run" / "checkpoints")[-1] == 3
    assert [e["update"] for e in events(tmp_path / "run", "evaluation")] == ([3] if how == "PAUSE" else [])
    all_well(train_ranks(recipe, 2, resume="auto"))
    assert [line[0] for line in learnt(tmp_path / "run")] == list(range(1, 9))


def test_a_signal_while_rank_0_still_saves_harms_nothing(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    all_well(train_ranks(small(material, tmp_path, "world.engine=torch", "world.timeout_s=20"), 2, "LATE"))
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert events(tmp_path / "run", "done")


@pytest.mark.parametrize(
    ("how", "on", "says"),
    [
        ("KILL", 1, "rank 1 is silent for"),
        ("KILL", 0, "rank 0 is gone"),
        ("STOP", 1, "rank 1 is silent for"),
        pytest.param("STOP", 0, "rank 0 is silent for", marks=pytest.mark.slow),
        pytest.param("SLEEP", 1, "rank 1 does not get on for", marks=pytest.mark.slow),
        ("RAISE", 1, "rank 1 failed: RuntimeError: planted"),
    ],
)
def test_a_lost_rank_is_named_and_the_others_end(
    how: str, on: int, says: str, engine: str, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """With exit code 12, the lost rank's last phase and its stack; the last checkpoint is whole."""
    if how in ("SLEEP", "STOP") and engine == "horovod" and on == 0:
        pytest.skip("the same as with torch, which is tried")
    recipe = small(material, tmp_path, f"world.engine={engine}", "world.timeout_s=6", "evaluation.every=null")
    ended = train_ranks(recipe, 2, how, 4, on)
    code, err = ended[1 - on]
    assert code == 12, err
    # Whoever is killed last said where it was some moments before, which may be in a <listcomp> or a <lambda>.
    update, function = (r"(, update \d)?", r"[\w<>]+") if how == "KILL" else (", update 4", "counted")
    assert re.search(rf"{says}.*; its last phase: \w+{update}; its stack: in \S+:\d+ {function} < ", err), err
    assert saved_updates(tmp_path / "run" / "checkpoints")[-1] == 2
    all_well(train_ranks(recipe, 2, resume="auto"))


def test_a_weight_that_differs_in_one_bit_is_found_at_the_next_comparison(
    engine: str, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """Rank 1's lowest bit, after update 3: all ranks end at update 4, and no checkpoint holds it."""
    recipe = small(material, tmp_path, f"world.engine={engine}", "world.check_replicas=2", "evaluation.every=null")
    for code, err in train_ranks(recipe, 2, "FLIP", 3):
        assert code == 14, err
        assert "after update 4 the weights of rank 1 are not those of rank 0" in err, err
    assert [line[0] for line in learnt(tmp_path / "run")] == [1, 2, 3]
    assert saved_updates(tmp_path / "run" / "checkpoints") == [2]


def test_rank_0_alone_uses_the_run_directory(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rank 1 runs a file is in its way. The run saves, is stopped, goes on and writes the student."""
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "runs").write_text("in the way")
    compression = "compression={kind: int8, warmup_updates: 1, block: 64}"  # of which every rank's state is saved
    recipe = small(material, Path("runs"), "world.engine=torch", compression)
    assert [code for code, _ in train_ranks(recipe, 2, "ELSEWHERE", 4)] == [75, 75]
    run = tmp_path / "runs" / "run"
    assert any(name.startswith("rank-1.") for name in saved_state(run, 3))
    all_well(train_ranks(recipe, 2, "ELSEWHERE", resume="auto"))
    assert [line[0] for line in learnt(run)] == list(range(1, 9))
    assert (run / "student" / "model.safetensors").is_file()
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]


@pytest.mark.parametrize("difference", ["recipe", "corpus"])
def test_ranks_that_differ_are_named(difference: str, material: Path, tmp_path: Path, start_ranks: Start) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from fastdistil import train\n"
        "from fastdistil.errors import FastdistilError\n"
        "from fastdistil.distributed.rank_info import find_rank_info\n"
        "from fastdistil.recipe import load_recipe\n"
        "place = find_rank_info()\n"
        "try:\n"
        "    train.train(load_recipe(sys.argv[1 + place.rank]), place=place)\n"
        "except FastdistilError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    os._exit(error.exit_code)\n"
    )
    one = small(material, tmp_path, "world.engine=torch", f"data.train={tmp_path / 'corpus'}")
    other = one.with_(optim={"lr": 1e-3}) if difference == "recipe" else one
    paths = []
    for rank, recipe in enumerate((one, other)):
        paths.append(str(tmp_path / f"{rank}.yaml"))
        Path(paths[-1]).write_text(recipe.to_yaml())
    # The same path, and other text behind it, as on two nodes.
    if difference == "corpus":
        text = program.read_text().replace("try:\n", "os.chdir(sys.argv[3 + place.rank])\ntry:\n")
        program.write_text(text)
        for path in paths:
            Path(path).write_text(one.with_(data={"train": "corpus"}).to_yaml())
        for folder, corpus in (("a", "train"), ("b", "other")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "corpus").symlink_to(material / corpus)
    else:
        (tmp_path / "corpus").symlink_to(material / "train")
    command = [sys.executable, str(program), *paths, str(tmp_path / "a"), str(tmp_path / "b")]
    for process in start_ranks(command, 2):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert f"another {difference} on rank 1 than on rank 0" in err


def cli(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "fastdistil", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(root), **(environment or {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_np_starts_ranks_and_prints_once(engine: str, material: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path, f"world.engine={engine}", "loop.updates=3").to_yaml())
    done = cli("train", path, "--np", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 3 updates") == 1 and done.stdout.count("update 3/3") == 1
    assert len(events(tmp_path / "run")) == 3


def test_hosts_train_over_ssh(material: Path, tmp_path: Path) -> None:
    """Two addresses of this machine, and for ssh a shell: two nodes of a rank each, which learn what one rank does."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "$2" >> "$0.hosts"\nshift 2\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path / "two", "world.engine=torch", "student.dropout=0", "loop.updates=3").to_yaml())
    done = cli("train", path, "--hosts", "127.0.0.2:1,127.0.0.3:1", environment={"FASTDISTIL_SSH": str(ssh)})
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "ssh.hosts").read_text().split()) == ["127.0.0.2", "127.0.0.3"]
    (start,) = events(tmp_path / "two" / "run", "start")
    assert (start["ranks"], start["nodes"]) == (2, 2)
    quiet(small(material, tmp_path / "one", "student.dropout=0", "loop.updates=3", "loop.accumulation=4"))
    for of_two, of_one in zip(learnt(tmp_path / "two" / "run"), learnt(tmp_path / "one" / "run"), strict=True):
        assert of_two == pytest.approx(of_one, rel=2e-5)


@pytest.mark.slow
def test_scale_measures_real_ranks(material: Path, tmp_path: Path) -> None:
    """Two points, two rounds of which the second goes backwards: every run is there, with the same threads for each rank."""
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path / "runs", "world.engine=torch", "name=null").to_yaml())
    out = tmp_path / "study"
    environment = {"OMP_NUM_THREADS": "1"}
    options = ("--np", "1,2", "--rounds", 2, "--steps", 3, "--no-ceiling", "--out", out)
    done = cli("scale", path, *options, environment=environment)
    assert done.returncode == 0, done.stderr
    study = json.loads((out / "scale.json").read_text())
    one, two = study["points"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for point in (one, two):
        assert [len(seconds) for seconds in point["step_s"]] == [3, 3], "rounds, and measured updates of each"
        assert min(min(seconds) for seconds in point["step_s"]) > 0
    assert one["efficiency"] == [1, 1], "by round"
    assert len(two["efficiency"]) == 2 and min(two["efficiency"]) > 0
    assert set(two["lost_s"]) >= {"exposed", "imbalance"}
    assert "<svg" in (out / "scale.html").read_text()
    assert "tokens/s" in done.stdout


def test_distil_starts_ranks_from_python(material: Path, tmp_path: Path) -> None:
    program = tmp_path / "notebook.py"
    program.write_text(
        "import sys\n"
        "from fastdistil import distil\n"
        "from fastdistil.recipe import load_recipe\n"
        "result = distil(load_recipe(sys.argv[1]), np=2, loop={'updates': 3})\n"
        "print(result.updates, type(result.student).__name__, next(result.student.parameters()).device)\n"
    )
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path, "world.engine=torch").to_yaml())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "FASTDISTIL_TEST_MARK": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(program), str(path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 BertForMaskedLM cpu"
    mark = f"FASTDISTIL_TEST_MARK={tmp_path}".encode()
    assert [entry for entry in Path("/proc").glob("[0-9]*") if mark in _environment(entry)] == []


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_data_is_cached_once_and_commands_run_once_a_node(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    extra = ["world.engine=torch", "loop.updates=2", f"data.cache_dir={tmp_path / 'local'}"]
    recipe = small(material, tmp_path, *extra).with_(pre_run=[f"echo once >> {tmp_path / 'said'}"])
    all_well(train_ranks(recipe, 2))
    assert (tmp_path / "said").read_text() == "once\n"
    assert list((tmp_path / "local").rglob("manifest.json"))
    # The stored recipe names the corpus, not this node's copy.
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).data.train == str(material / "train")


def test_elastic_goes_on_with_the_ranks_that_remain(material: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in update 5: the run restarts by itself on one rank from update 4, and ends."""
    plant = tmp_path / "sitecustomize.py"
    plant.write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('WORLD_SIZE') == '2':\n"
        "    from importlib.abc import MetaPathFinder\n"
        "    class Plant(MetaPathFinder):\n"
        "        def find_spec(self, name, path, target=None):\n"
        "            if name == 'fastdistil.training.export':  # fastdistil.train is being imported\n"
        "                sys.meta_path.remove(self)\n"
        "                from fastdistil.gradients import exchange\n"
        "                begin = exchange.SharedGradients.begin\n"
        "                def counted(own, update):\n"
        "                    if update == 4:\n"
        "                        os.kill(os.getpid(), signal.SIGKILL)\n"
        "                    begin(own, update)\n"
        "                exchange.SharedGradients.begin = counted\n"
        "    sys.meta_path.insert(0, Plant())\n"
    )
    path = tmp_path / "r.yaml"
    path.write_text(small(material, tmp_path, "world.engine=torch", "world.timeout_s=6").to_yaml())
    root = Path(__file__).resolve().parents[2]
    done = cli("train", path, "--elastic", "1:2", environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"})
    assert done.returncode == 0, done.stderr
    starts = [e for e in event_log.read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, event_log.Start)]
    assert [(e.update, e.ranks) for e in starts] == [(0, 2), (4, 1)]
    assert [line[0] for line in learnt(tmp_path / "run")] == list(range(1, 9))
