"""Compressed buckets over real ranks and both engines: the same sum on all ranks, the declared bytes, nothing lost; and how the
ranks' states get into checkpoints and back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_run import assert_same_bits, learnt, saved_state, saved_updates, small

PROGRAM = """
import json, os, sys
import torch
from torch import nn
from fastdistil.gradients.buckets import BucketOptions, Buckets
from fastdistil.gradients.compressors import make_compressor, starts_at
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import Compression, WorldOptions as Options
from fastdistil.distributed.coordinator import content_hash
from fastdistil.distributed.coordinator import join

engine = sys.argv[1]
world = join(find_rank_info(os.environ), Options(engine=engine, rings=2, timeout_s=60), torch.device("cpu"))
KINDS = [dict(kind="none"), dict(kind="fp16"), dict(kind="int8", block=64), dict(kind="top-k", density=0.1),
         dict(kind="powersgd", rank=2)]
if engine == "torch":
    KINDS.append(dict(kind="bf16"))
found = []
for given in KINDS:
    config = Compression(warmup_updates=1, **given)
    make = lambda config: make_compressor(config, ranks=world.size, rank=world.rank, engine=engine, seed=3)
    compressor, uncompressed = make(config), make(Compression())
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((70, 33), (33,), (128, 64), (5,))]
    options = BucketOptions(bucket_bytes=8192, first_bucket_bytes=1024)
    start = starts_at(config)
    buckets = Buckets(parameters, world, compressor=compressor, uncompressed=uncompressed, starts_at=start, options=options)
    received = [torch.zeros_like(p) for p in parameters]
    sent = [torch.zeros_like(p) for p in parameters]
    updates = start + 25
    for update in range(updates):
        buckets.zero()
        before = world.counters.copy()
        buckets.arm(update)
        generator = torch.Generator().manual_seed(1000 * update)
        everyone = [[1e-4 * torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(world.size)]
        sum((p * own).sum() for p, own in zip(parameters, everyone[world.rank])).backward()
        buckets.finish({"loss": torch.zeros(())})
        counted = world.counters.since(before)
        wire = compressor if update >= start else uncompressed
        declared = sum(wire.wire_bytes(bucket.layout) for bucket in buckets.buckets)
        requests = sum(wire.requests(bucket.layout) for bucket in buckets.buckets)
        # A byte of each collective is a matter of rounding where the ranks do not divide it.
        rounded = requests if world.size == 3 else 0
        assert 0 <= declared - counted["gradient_bytes"] <= rounded, (given, update, counted, declared)
        assert counted["gradient_collectives"] == requests, (given, update, counted, requests)
        same = world.gather([float(content_hash([p.grad for p in parameters]))], "hash")
        assert same == [same[0]] * world.size, (given, update)
        for total, p in zip(received, parameters):
            total += p.grad
        for number, total in enumerate(sent):
            total += sum(each[number] for each in everyone)
        buckets.reorder()
    # What arrived over all updates is what was sent, but for what is still owed, which error feedback keeps bounded.
    error = torch.cat([(a - b).flatten() for a, b in zip(received, sent)]).norm()
    one = 1e-4 * (sum(p.numel() for p in parameters) * world.size) ** 0.5
    found.append([given["kind"], float(error / one), declared, float(torch.cat([a.flatten() for a in sent]).norm() / one)])
    buckets.close()
print(json.dumps(found))
world.close()
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_compressor_over_real_ranks(engine: str, ranks: int, run_ranks: Callable[..., list[str]]) -> None:
    everyone = [json.loads(out.splitlines()[-1]) for out in run_ranks(PROGRAM, ranks, engine)]
    assert all(report == everyone[0] for report in everyone)
    owed = {kind: error for kind, error, _, _ in everyone[0]}
    bytes_sent = {kind: declared for kind, _, declared, _ in everyone[0]}
    norms = {kind: norm for kind, _, _, norm in everyone[0]}
    assert all(norm > 4 for norm in norms.values())  # 25 updates of noise: 5 times one
    # In units of one update's gradient: what is owed does not grow with the updates.
    assert owed["none"] < 1e-5 and owed["fp16"] < 0.01 and owed["int8"] < 0.05
    for kind, error in owed.items():
        assert error < (4 if kind == "powersgd" else 5), (kind, error)
    assert bytes_sent["int8"] < 0.3 * bytes_sent["none"]
    assert bytes_sent["fp16"] * 2 == pytest.approx(bytes_sent["none"], rel=1e-3)


STATES = """
import json, os, sys
import torch
from fastdistil.distributed import world as collectives
from fastdistil.distributed.coordinator import Coordinator, join
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import WorldOptions as Options

collectives._MOVED_BYTES = 4000  # so that a state goes in parts
world = join(find_rank_info(os.environ), Options(engine=sys.argv[1], timeout_s=60), torch.device("cpu"))
team, rank, size = Coordinator(world, None), world.rank, world.size
sent = received = 0
move, broadcast = world._move, world._broadcast

def counted(own, nbytes, *rest):
    global sent, received
    sent, received = sent + own.nbytes, received + nbytes
    handle = move(own, nbytes, *rest)
    return collectives.Handle(handle.name, handle.done, lambda: checked(handle.finish(), nbytes), handle.wait)

def checked(tensor, nbytes):
    assert tensor.nbytes == nbytes, "the engine gave other bytes than were to be moved"
    return tensor

world._move, world._broadcast = counted, None  # nothing goes to all

def state(of):
    draws = torch.Generator().manual_seed(of)
    numbers = torch.randn(3001, generator=draws)
    return {"residual": numbers, "server": numbers[:30].view(5, 6).double(), "half": numbers[:7].bfloat16(),
            "used": numbers[:99] > 0, "scalar": numbers[0].clone(), "none": numbers[:0], "across": numbers[:6].view(2, 3).t()}

own = state(rank)
nbytes = sum(each.nbytes for each in own.values())
fetched = list(team.fetch_each(own, "states"))
if world.is_chief:
    assert len(fetched) == size
    for other, found in enumerate(fetched):
        assert all(torch.equal(found[name], value) for name, value in state(other).items()), other
assert (sent, received) == ((0, (size - 1) * nbytes) if rank == 0 else (nbytes, 0)), (sent, received, nbytes)
sent = received = 0
asked = []
team.send_each(lambda of: asked.append(of) or state(10 + of), own, "states")
assert all(torch.equal(own[name], value) for name, value in state(10 + rank).items())
assert (sent, received) == (((size - 1) * nbytes, 0) if rank == 0 else (0, nbytes)), (sent, received, nbytes)
assert asked == (list(range(size)) if rank == 0 else [])
world.close()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_sends_its_state_once_and_gets_no_others(engine: str, ranks: int, run_ranks: Callable[..., list[str]]) -> None:
    run_ranks(STATES, ranks, engine)


POISONED = """
import os, sys
from fastdistil import train
from fastdistil.errors import NonFinite
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import load_recipe

place, real, calls = find_rank_info(), train.loss_terms, 0

def poisoned(*arguments, **keywords):
    global calls
    calls += 1
    terms = real(*arguments, **keywords)
    # On one rank, in one of the two micro-batches of update 5: the other rank's own gradient is finite.
    bad = sys.argv[2] == "bad" and place.rank == 1 and calls == 10
    return terms._replace(total=terms.total * (float("nan") if bad else 1.0))

train.loss_terms = poisoned
try:
    train.train(load_recipe(sys.argv[1]), resume=sys.argv[3] or None, place=place)
    assert sys.argv[2] == "well"
except NonFinite as error:
    assert sys.argv[2] == "bad" and "update 5" in str(error), error
"""


def test_what_is_owed_is_rolled_back_with_the_weights(
    material: Path, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    """A bad update is noticed three later: what is saved is the state before it, and so a run that is continued without it is
    the run that never met it."""
    extra = ["compression={kind: top-k, density: 0.1, warmup_updates: 2}", "world.engine=torch", "evaluation.every=null"]
    for name, checkpoints in (("whole", "checkpoint.every=4"), ("cut", "checkpoint.every=null")):
        recipe = small(material, tmp_path / name, *extra, checkpoints, "logging.every=8", "checkpoint.keep=9")
        (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())
    run_ranks(POISONED, 2, tmp_path / "whole.yaml", "well", "")
    run_ranks(POISONED, 2, tmp_path / "cut.yaml", "bad", "")
    reference, cut = (tmp_path / name / "run" for name in ("whole", "cut"))
    assert saved_updates(cut / "checkpoints") == [4]
    state = saved_state(cut, 4)
    assert sum(name.startswith("rank-1.") and name.endswith(".residual") for name in state) > 0
    assert_same_bits(state, saved_state(reference, 4))
    run_ranks(POISONED, 2, tmp_path / "cut.yaml", "well", "auto")
    assert_same_bits(saved_state(cut), saved_state(reference))
    assert [line[0] for line in learnt(cut)] == [8]
