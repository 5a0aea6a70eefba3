"""Runs that are stopped and continued, with every compression and by more ranks; and what takes longer than the timeout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdistil.console import Console
from fastdistil.recipe import Recipe
from fastdistil.train import train
from tests.small_run import assert_same_bits, events, learnt, saved_state, small

# Recipes one after the other, each in a world of its own; with an update to stop at, rank 1 gets SIGTERM in it.
RUNS = """
import os, signal, sys
from fastdistil import train
from fastdistil.errors import Stopped
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe

stop_in, resume = int(sys.argv[1]), sys.argv[2] or None
step = train.train_step
def met_by_signal(run, *arguments):
    if run.update + 1 == stop_in and run.team.world.rank == run.team.world.size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(run, *arguments)
train.train_step = met_by_signal
for argument in sys.argv[3:]:
    os.environ["MASTER_PORT"], path = argument.split(":", 1)
    try:
        train.train(load_recipe(path), resume=resume, place=find_rank_info())
        assert not stop_in
    except Stopped:
        assert stop_in
os._exit(0)
"""

Continue = Callable[..., None]


@pytest.fixture
def run_recipes(run_ranks: Callable[..., list[str]], reserve_port: Callable[[], int], tmp_path: Path) -> Continue:
    """run_recipes(recipes, ranks, stop_in=0, resume="")"""

    def run(recipes: list[Recipe], ranks: int, stop_in: int = 0, resume: str = "") -> None:
        arguments = []
        for number, recipe in enumerate(recipes):
            path = tmp_path / f"asked-{number}.yaml"
            path.write_text(recipe.to_yaml())
            arguments.append(f"{reserve_port()}:{path}")
        run_ranks(RUNS, ranks, stop_in, resume, *arguments)

    return run


COMPRESSIONS = {
    "torch": {
        "top-k": "density: 0.1, warmup_updates: 2",
        "powersgd": "rank: 2, warmup_updates: 2",
        "fp16": "warmup_updates: 2",
        "bf16": "warmup_updates: 2",
    },
    "horovod": {"fp16": "warmup_updates: 2"},
}


def test_each_compression_continues_bit_for_bit(engine: str, material: Path, tmp_path: Path, run_recipes: Continue) -> None:
    """Stopped in the fourth compressed update: weights, moments, and what each rank still owes."""
    kinds = COMPRESSIONS[engine]

    def recipes(name: str) -> list[Recipe]:
        common = [f"world.engine={engine}", "evaluation.every=null", "checkpoint.every=null"]
        return [
            small(material, tmp_path / name / kind, f"compression={{kind: {kind}, {options}}}", *common)
            for kind, options in kinds.items()
        ]

    run_recipes(recipes("whole"), 2)
    run_recipes(recipes("cut"), 2, stop_in=6)
    run_recipes(recipes("cut"), 2, resume="auto")
    for kind in kinds:
        reference, cut = (tmp_path / name / kind / "run" for name in ("whole", "cut"))
        (resumed,) = events(cut, "resume")
        assert resumed["update"] == 5
        sent = [line["gradient_bytes"] for line in events(reference)]
        assert sent[0] == sent[1] and max(sent[2:]) < 0.6 * sent[0], (kind, sent)
        for rank in range(2):  # otherwise there was nothing to forget
            owed = [tensor for name, tensor in saved_state(cut, 5).items() if name.startswith(f"rank-{rank}.")]
            assert any(tensor.count_nonzero() for tensor in owed), (kind, rank)
        assert learnt(reference) == learnt(cut), kind
        assert_same_bits(saved_state(reference), saved_state(cut))


def test_two_ranks_continue_what_one_began(material: Path, tmp_path: Path, run_recipes: Continue) -> None:
    """An update keeps its four micro-batches, now two a rank; compression begins when there is somebody to send to."""
    alone = ["student.dropout=0", "loop.accumulation=4", "evaluation.every=null", "checkpoint.every=null"]
    ranks = [*alone, "world.engine=torch"]
    int8 = "compression={kind: int8, block: 64, warmup_updates: 1}"
    cut = [small(material, tmp_path / "none", *ranks), small(material, tmp_path / "int8", int8, *ranks)]
    train(small(material, tmp_path / "whole", *alone), console=Console(quiet=True))
    run_recipes(cut, 1, stop_in=4)
    run_recipes(cut, 2, resume="auto")
    for kind, precision in (("none", 2e-5), ("int8", 2e-3)):
        run = tmp_path / kind / "run"
        (resumed,) = events(run, "resume")
        assert (resumed["update"], resumed["ranks"], resumed["compression"]) == (3, 2, kind)
        for of_whole, of_cut in zip(learnt(tmp_path / "whole" / "run"), learnt(run), strict=True):
            assert of_cut == pytest.approx(of_whole, rel=precision)
        sent = [line.get("gradient_bytes") for line in events(run)]
        assert sent[:3] == [None] * 3
        # Two ranks' first update goes uncompressed: it shows in which order gradients get ready.
        share = {size / sent[3] for size in sent[4:]}
        assert share == {1.0} if kind == "none" else 0.25 < min(share) <= max(share) < 0.3
    one_rank, two_ranks, begun = (
        saved_state(tmp_path / name / "run", at) for name, at in (("whole", 8), ("none", 8), ("none", 3))
    )
    moved = 0.0
    for name, tensor in one_rank.items():
        torch.testing.assert_close(two_ranks[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        moved = max(moved, (tensor - begun[name]).abs().max().item() if name.startswith("model.") else 0.0)
    assert moved > 1e-4


SLOW = """
import os, sys, time
from fastdistil import train
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe

recipe = load_recipe(sys.argv[1])
evaluate = train.held_out
def slow(*arguments, **options):
    time.sleep(2.25 * recipe.world.timeout_s)
    return evaluate(*arguments, **options)
train.held_out = slow
train.train(recipe, place=find_rank_info())
os._exit(0)
"""


def test_an_evaluation_may_take_longer_than_the_timeout(
    engine: str, material: Path, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    """Rank 0 alone evaluates; the other waits for it in a collective, and neither is found lost."""
    recipe = small(material, tmp_path, f"world.engine={engine}", "world.timeout_s=4", "loop.updates=2", "evaluation.every=null")
    (tmp_path / "asked.yaml").write_text(recipe.to_yaml())
    run_ranks(SLOW, 2, tmp_path / "asked.yaml")
    (evaluation,) = events(tmp_path / "run", "evaluation")
    assert evaluation["update"] == 2 and evaluation["seconds"] > 2 * recipe.world.timeout_s
    assert len(events(tmp_path / "run", "done")) == 1
