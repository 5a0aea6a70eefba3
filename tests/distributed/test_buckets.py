"""Gradients through buckets, with real ranks: against one process that does all the work, and against plain sums."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdistil.objective import denominators, loss_terms
from fastdistil.recipe import Recipe, load_recipe
from fastdistil.training.inputs import load_inputs

GRADIENTS = """
import os, sys
from pathlib import Path
import torch
from fastdistil.gradients.buckets import BucketOptions, Buckets
from fastdistil.gradients.compressors import make_compressor
from fastdistil.training.inputs import load_inputs
from fastdistil.objective import denominators, loss_terms
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import Compression, WorldOptions as Options, load_recipe
from fastdistil.distributed.coordinator import content_hash
from fastdistil.distributed.coordinator import join

recipe, engine, rings, folder = load_recipe(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)
world = join(find_rank_info(os.environ), Options(engine=engine, rings=rings, timeout_s=60), torch.device("cpu"))
recipe = recipe.with_(loop={"accumulation": 8 // world.size}, world={"ranks": world.size})
inputs = load_inputs(recipe, rank=world.rank, ranks=world.size)
none = make_compressor(Compression(), ranks=world.size, rank=world.rank, engine=engine, seed=0)
for dtype, path in ((torch.float32, "torch"), (torch.float64, "reference")):
    student, teacher = inputs.student.to(dtype), inputs.teacher.to(dtype)
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    options = BucketOptions(bucket_bytes=16 * 1024, first_bucket_bytes=1024)
    buckets = Buckets(list(named.values()), world, compressor=none, uncompressed=none, options=options)
    with inputs.source.windows(0, 1) as windows:
        window, counts = next(windows)
    assert len(window) == 8 // world.size and len(buckets.buckets) > 2 * rings, len(buckets.buckets)
    buckets.zero()
    for number, batch in enumerate(window):
        if number == len(window) - 1:
            buckets.arm(0)
        per = denominators(recipe.objective, counts, batch.counts)
        terms = loss_terms(recipe.objective, student, teacher, batch, per, backend=path)
        terms.total.backward()
    buckets.finish({"total": terms.total})
    gradients = {name: p.grad for name, p in named.items()}
    same = world.gather([float(content_hash(list(gradients.values())))], "hash")
    assert same == [same[0]] * world.size, "ranks hold different sums"
    if world.is_chief:
        torch.save({name: gradient.clone() for name, gradient in gradients.items()}, folder / f"{str(dtype)[6:]}.pt")
    buckets.close()
world.close()
"""


@pytest.fixture(scope="module")
def recipe(material: Path) -> Recipe:
    """Eight micro-batches an update, no dropout, all terms of the loss."""
    return load_recipe(
        "distilbert",
        [
            f"teacher.path={material / 'teacher'}",
            "student.every=2",
            "student.architecture=same",
            "student.freeze_positions=true",
            "student.dropout=0",
            f"data.train={material / 'train'}",
            "data.micro_batch_tokens=128",
            "loop.updates=8",
            "loop.accumulation=8",
            "loop.precision=fp32",
            "teacher.dtype=fp32",
            "device=cpu",
            "kernels=torch",
        ],
    )


@pytest.fixture(scope="module")
def truth(recipe: Recipe) -> dict[torch.dtype, dict[str, torch.Tensor]]:
    """One process, eight micro-batches, autograd's own accumulation."""
    gradients = {}
    inputs = load_inputs(recipe)
    for dtype, path in ((torch.float32, "torch"), (torch.float64, "reference")):
        student, teacher = inputs.student.to(dtype), inputs.teacher.to(dtype)  # type: ignore[union-attr]
        student.zero_grad(set_to_none=True)
        with inputs.source.windows(0, 1) as windows:
            window, counts = next(windows)
        assert len(window) == counts.batches == 8
        for batch in window:
            per = denominators(recipe.objective, counts, batch.counts)
            loss_terms(recipe.objective, student, teacher, batch, per, backend=path).total.backward()  # type: ignore[arg-type]
        gradients[dtype] = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return gradients


@pytest.mark.parametrize(("ranks", "rings"), [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_ranks_and_micro_batches_are_interchangeable(
    engine: str,
    ranks: int,
    rings: int,
    recipe: Recipe,
    truth: dict[torch.dtype, dict[str, torch.Tensor]],
    run_ranks: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """1 rank x 8 micro-batches, 2 x 4 and 4 x 2: the same gradient."""
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    run_ranks(GRADIENTS, ranks, tmp_path / "recipe.yaml", engine, rings, tmp_path)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        gradients = torch.load(tmp_path / f"{str(dtype)[6:]}.pt")
        expected = truth[dtype]
        assert gradients.keys() == expected.keys()
        flat = torch.cat([gradient.flatten().double() for gradient in expected.values()])
        assert flat.norm() > 1e-3 and flat.count_nonzero() > len(flat) / 4  # otherwise this would pass on zeros
        difference = torch.cat([(gradients[name] - expected[name]).flatten().double() for name in expected])
        assert difference.norm() <= tolerance * flat.norm(), dtype


EDGES = """
import json, os, sys
import torch
from torch import nn
from fastdistil.gradients.buckets import BucketOptions, Buckets
from fastdistil.gradients.compressors import make_compressor
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import Compression, WorldOptions as Options
from fastdistil.distributed.coordinator import join

engine, every = sys.argv[1], sys.argv[2] == "every"
rings = 2 if engine == "torch" else 1
world = join(find_rank_info(os.environ), Options(engine=engine, rings=rings, timeout_s=60), torch.device("cpu"))
if engine == "torch":
    world._small = world._groups[0]  # as on a GPU: scalars posted between a rank's buckets would meet another's bucket
rank = world.rank
torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.inner = nn.Linear(24, 24)
        self.only_rank_1 = nn.Linear(24, 24)
        self.nowhere = nn.Linear(5, 5)
        self.frozen = nn.Parameter(torch.ones(24), requires_grad=False)

    def forward(self, ids, with_branch):
        hidden = torch.tanh(self.inner(self.embedding(ids))) * self.frozen
        if with_branch:
            hidden = hidden + self.only_rank_1(hidden)
        return (hidden @ self.embedding.weight.t()).square().sum()  # tied

def micro_batches(of_rank):  # rank 0: 3, rank 1: 2, rank 2: none
    generator = torch.Generator().manual_seed(of_rank)
    return [torch.randint(0, 40, (6,), generator=generator) for _ in range((3, 2, 0)[of_rank])]

model = Model().double()
named = {name: p for name, p in model.named_parameters() if p.requires_grad}
none = make_compressor(Compression(), ranks=3, rank=rank, engine=engine, seed=0)
options = BucketOptions(bucket_bytes=4096, first_bucket_bytes=512, every_micro_batch=every)
buckets = Buckets(list(named.values()), world, compressor=none, uncompressed=none, options=options)
collectives = []
for update in range(3):
    own = micro_batches(rank)
    buckets.zero()
    before = world.counters.gradient_collectives
    for number in range(3):
        last = number == 2
        if last or every:
            buckets.arm(update)
        if number < len(own):
            model(own[number], rank == 1).backward()
            if last and rank == 0:
                early = world.counters.gradient_collectives - before  # of all, left while backward was under way
        if every and not last:
            buckets.finish(last=False)
        collectives.append(world.counters.gradient_collectives - before)
    total = buckets.finish({"count": torch.tensor(float(len(own)))})["count"]
    collectives.append(world.counters.gradient_collectives - before)
    # The truth: this process does everybody's work.
    copy = Model().double()
    copy.load_state_dict(model.state_dict())
    for other in range(3):
        for ids in micro_batches(other):
            copy(ids, other == 1).backward()
    for (name, p), q in zip(model.named_parameters(), copy.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-12), (name, update)
            assert p.grad.abs().sum() > 0, name
    assert total == 5
    buckets.reorder()
layout = buckets.layout()
print(json.dumps({"collectives": collectives, "buckets": len(buckets.buckets), "order": layout["order"],
                  "early": early if rank == 0 else None, "names": list(named)}))
world.close()
"""


@pytest.mark.parametrize("sync", ["delayed", "every"])
def test_ranks_with_fewer_batches_and_parameters_without_gradient(
    engine: str, sync: str, run_ranks: Callable[..., list[str]]
) -> None:
    """An incomplete window, a rank without any batch, tied, frozen and unused parameters, one used by a single rank."""
    everyone = [json.loads(out) for out in run_ranks(EDGES, 3, engine, sync)]
    for report in everyone:
        n = report["buckets"]
        assert n > 5
        if sync == "delayed":
            # Nothing in the first two micro-batches; one collective a bucket in the last.
            assert [report["collectives"][i : i + 2] for i in (0, 4, 8)] == [[0, 0]] * 3
            assert report["collectives"][3::4] == [n] * 3
        else:
            assert report["collectives"][3::4] == [3 * n] * 3
        assert report["order"] == everyone[0]["order"]
    assert everyone[0]["early"] > 0
    # Backward reaches the inner layer before the embedding; what is used nowhere comes last.
    order = [everyone[0]["names"][number] for number in everyone[0]["order"]]
    assert order.index("inner.weight") < order.index("embedding.weight") < order.index("nowhere.weight")


FIFTY = """
import json, os, sys
import torch
from torch import nn
from fastdistil.gradients.buckets import BucketOptions, Buckets
from fastdistil.gradients.compressors import make_compressor
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import Compression, WorldOptions as Options
from fastdistil.distributed.world import sent_bytes
from fastdistil.distributed.coordinator import join

world = join(find_rank_info(os.environ), Options(engine=sys.argv[1], rings=2, timeout_s=60), torch.device("cpu"))
none = make_compressor(Compression(), ranks=2, rank=world.rank, engine=sys.argv[1], seed=0)
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
options = BucketOptions(bucket_bytes=2**14, first_bucket_bytes=2**12)
buckets = Buckets(list(model.parameters()), world, compressor=none, uncompressed=none, options=options)
for update in range(2):
    buckets.zero()
    start, each = world.counters.copy(), []
    for number in range(50):
        before = world.counters.copy()
        if number == 49:
            buckets.arm(update)
        model(torch.randn(4, 64)).sum().backward()
        if number == 49:
            buckets.finish({"loss": torch.zeros(())})
        each.append(world.counters.since(before))
    declared = sum(sent_bytes("allreduce", bucket.flat.nbytes, 2) for bucket in buckets.buckets)
    update_counts = world.counters.since(start)
    print(json.dumps({"each": each, "update": update_counts, "buckets": len(buckets.buckets), "declared": declared}))
    buckets.reorder()
world.close()
"""


def test_nothing_travels_in_49_of_50_micro_batches(engine: str, run_ranks: Callable[..., list[str]]) -> None:
    for out in run_ranks(FIFTY, 2, engine):
        for report in map(json.loads, out.splitlines()):
            collectives = [counters["gradient_collectives"] for counters in report["each"]]
            assert collectives == [0] * 49 + [report["buckets"]]
            assert [counters["gradient_bytes"] + counters["control_messages"] for counters in report["each"][:49]] == [0] * 49
            assert report["update"]["gradient_bytes"] == sum(report["update"]["ring_bytes"]) == report["declared"]
            assert min(report["update"]["ring_bytes"]) > report["declared"] / 4  # both rings carry
            assert 0 < report["update"]["control_bytes"] < 1024
