"""Whole runs with several ranks: what they learn, what they write, and what must be the same on all of them."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdistil.recipe import load_recipe
from tests.distributed.conftest import Start
from tests.distributed.driver import Ended, all_well
from tests.small_run import events, learnt, saved_state, saved_updates, small


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
        recipe = small(
            material,
            tmp_path / name,
            "world.engine=torch",
            f"world.sync={sync}",
            "loop.updates=3",
        )
        all_well(train_ranks(recipe, 2))
    lines = {name: events(tmp_path / name / "run") for name in ("delayed", "every")}
    for delayed, every in zip(lines["delayed"], lines["every"], strict=True):
        assert every["total"] == pytest.approx(delayed["total"], rel=1e-5)
        assert every["gradient_bytes"] == 2 * delayed["gradient_bytes"]


def test_auto_measures_decides_once_and_says_why(
    material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    recipe = small(
        material,
        tmp_path,
        "compression={kind: auto, warmup_updates: 3}",
        "world.engine=torch",
        "world.rings=2",
    )
    all_well(train_ranks(recipe, 2))
    (note,) = events(tmp_path / "run", "note")
    assert note["message"].startswith("compression auto: ") and " ms" in note["message"]
    lines = events(tmp_path / "run")
    assert [line["compression"] for line in lines[:3]] == ["auto"] * 3
    (kind,) = {line["compression"] for line in lines[4:]}
    assert f"auto: {kind}:" in note["message"]
    # What was measured with is not counted as gradients.
    assert [line["gradient_collectives"] for line in lines[:4]] == [line["buckets"] for line in lines[:4]]


def test_every_rank_writes_its_trace(
    material: Path,
    tmp_path: Path,
    train_ranks: Callable[..., list[Ended]],
) -> None:
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


def test_iterables_that_differ_between_ranks_are_refused(
    material: Path,
    tmp_path: Path,
    start_ranks: Start,
) -> None:
    (tmp_path / "program.py").write_text(DIFFERING)
    recipe = small(material, tmp_path, "world.engine=torch", "data.heldout=null", "evaluation.every=null")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "r.yaml")]
    for process in start_ranks(command, 2):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "the ranks have different batches" in err, err


def test_a_weight_that_differs_in_one_bit_is_found_at_the_next_comparison(
    engine: str, material: Path, tmp_path: Path, train_ranks: Callable[..., list[Ended]]
) -> None:
    """Rank 1's lowest bit, after update 3: all ranks end at update 4, and no checkpoint holds it."""
    recipe = small(
        material,
        tmp_path,
        f"world.engine={engine}",
        "world.check_replicas=2",
        "evaluation.every=null",
    )
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
def test_ranks_that_differ_are_named(
    difference: str,
    material: Path,
    tmp_path: Path,
    start_ranks: Start,
) -> None:
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
