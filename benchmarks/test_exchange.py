"""What carrying gradients costs: our buckets beside one raw allreduce and beside torch's DDP; and the layer without a wire.

66 million float32 parameters in DistilBERT's shapes, 2 ranks of one thread, over loopback. Every side runs the same backward
(of a sum, so that it costs little) and ends with the sums in place; sides take turns in one process.
"""

from typing import Any

import pytest

from .ranks import has_horovod, run_program

SIDES = """
import json, os, statistics, sys, time
import torch
import torch.distributed as dist
from torch import nn
from fastdistil.gradients.buckets import Buckets
from fastdistil.gradients.compressors import make_compressor
from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.recipe import Compression, WorldOptions as Options
from fastdistil.distributed.coordinator import join

engine, rounds = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
world = join(find_rank_info(os.environ), Options(engine=engine), torch.device("cpu"))
shapes = [(30522, 768), (512, 768)] + 6 * (4 * [(768, 768)] + [(3072, 768), (768, 3072)] + 4 * [(768,)]) + [(768, 768)]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    def forward(self):
        return sum(weight.sum() for weight in self.weights)

ours = Model()
none = make_compressor(Compression(), ranks=2, rank=world.rank, engine=engine, seed=0)
buckets = Buckets(list(ours.parameters()), world, compressor=none, uncompressed=none)
buckets.zero(); buckets.arm(0); ours().backward(); buckets.finish(); buckets.reorder()

def with_buckets():
    buckets.arm(1)
    ours().backward()
    buckets.finish({"loss": torch.zeros(())})

raw_model = Model()
flat = torch.zeros(sum(p.numel() for p in raw_model.parameters()))
start = 0
for p in raw_model.parameters():
    p.grad = flat[start : start + p.numel()].view_as(p); start += p.numel()
if engine == "horovod":
    import horovod.torch as hvd
    exchange = lambda: hvd.allreduce_(flat, name="raw", op=hvd.Sum)
    dist.init_process_group("gloo", store=dist.PrefixStore("ddp", world.connect()), rank=world.rank, world_size=2)
else:
    exchange = lambda: dist.all_reduce(flat)

def raw():
    raw_model().backward()
    exchange()

ddp = nn.parallel.DistributedDataParallel(Model(), gradient_as_bucket_view=True)

def with_ddp():
    ddp().backward()

sides = {"raw": raw, "buckets": with_buckets, "ddp": with_ddp}
times = {name: [] for name in sides}
for number in range(rounds + 2):
    for name, side in sides.items():
        world.barrier()
        begun = time.perf_counter()
        side()
        if number >= 2:
            times[name].append(time.perf_counter() - begun)
nothing = []
for _ in range(5):
    begun = time.perf_counter(); raw_model().backward(); nothing.append(time.perf_counter() - begun)
found = {name: statistics.median(each) for name, each in times.items()}
print(json.dumps({**found, "backward_alone": statistics.median(nothing), "parameters": flat.numel(), "times": times}))
if engine == "horovod":
    dist.destroy_process_group()
world.close()
"""


@pytest.mark.parametrize("engine", ["torch", "horovod"])
def test_buckets_beside_raw_allreduce_and_ddp(benchmark: Any, engine: str) -> None:
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed; build it with `make horovod`")
    benchmark.group = "66M float32 gradients, 2 ranks, loopback"
    reports = benchmark.pedantic(lambda: run_program(SIDES, 2, engine, 15), rounds=1)
    slower = max(reports, key=lambda report: report["buckets"])  # both ranks take part in each: they differ by little
    slower["buckets_against_raw"] = slower["raw"] / slower["buckets"]
    slower["buckets_against_ddp"] = slower["ddp"] / slower["buckets"]
    benchmark.extra_info.update(engine=engine, ranks=2, unit="s, median of 15", **slower)
    print(
        f"\n{engine}: raw {slower['raw'] * 1e3:.0f} ms, buckets {slower['buckets'] * 1e3:.0f} ms "
        f"({slower['buckets_against_raw']:.2f} times as fast as raw, {slower['buckets_against_ddp']:.2f} as DDP), "
        f"DDP {slower['ddp'] * 1e3:.0f} ms, backward alone {slower['backward_alone'] * 1e3:.0f} ms"
    )


LAYER = """
import json, statistics, sys, time
import torch
from fastdistil.data.batches import Batches
from fastdistil.gradients.exchange import LocalGradients, SharedGradients
from fastdistil.training.optim import make_optimizer
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.recipe import load_recipe
from fastdistil.distributed.world import World
import transformers
from fastdistil.data.sources import from_mappings
from fastdistil.models.language_model import LanguageModel
from fastdistil.objective import denominators, loss_terms
from torch import nn

torch.set_num_threads(2)
# The demo's sizes: a teacher of 4 layers, a student of 2, 1,024 tokens a micro-batch, 50 micro-batches.
QUIET = dict(vocab_size=8000, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
recipe = load_recipe("distilbert", ["data.train=none", "teacher.path=none", "loop.accumulation=50", "loop.epochs=1"])

class NoWire(World):
    engine = "torch"  # of two ranks, whose collectives are over when they begin

one_of_two = dict(rank=0, size=2, local_rank=0, local_size=2, cross_rank=0, cross_size=1)
place = RankInfo(**one_of_two, launcher="fastdistil", address=None, port=None)
teacher = LanguageModel(transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=4, **QUIET)))
teacher.eval().requires_grad_(False)
ids = torch.randint(5, 8000, (8, 128))
labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
(batch,) = from_mappings([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}], causal=False)
counts = batch.counts

def side(several):
    student = LanguageModel(transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=2, **QUIET))).train()
    optimizer = make_optimizer([student], recipe.optim)
    shared = SharedGradients(optimizer, recipe, NoWire(place, torch.device("cpu")))
    exchange = shared if several else LocalGradients(optimizer, recipe)
    update = 0
    def step():
        nonlocal update
        exchange.begin(update)
        for number in range(50):
            per = denominators(recipe.objective, counts, counts)
            exchange.backward(loss_terms(recipe.objective, student, teacher, batch, per).total, number, 50)
        exchange.finish({"total": torch.zeros(())})
        nn.utils.clip_grad_norm_(student.parameters(), 5.0, foreach=True)
        optimizer.step()
        exchange.done(update, torch.zeros(()))
        update += 1
    return step

sides = {"one rank": side(False), "buckets": side(True)}
times = {name: [] for name in sides}
for number in range(int(sys.argv[1]) + 1):
    for name, step in sides.items():
        begun = time.perf_counter()
        step()
        if number:
            times[name].append(time.perf_counter() - begun)
print(json.dumps({**{name: statistics.median(each) for name, each in times.items()}, "times": times}))
"""


def test_the_layer_without_a_wire(benchmark: Any) -> None:
    """Flat buffers, hooks, bookkeeping: everything but the wire, against autograd's own gradients on one rank."""
    benchmark.group = "an update of 50 micro-batches, demo sizes"
    (figures,) = benchmark.pedantic(lambda: run_program(LAYER, 1, 3), rounds=1)
    figures["overhead"] = figures["buckets"] / figures["one rank"] - 1
    benchmark.extra_info.update(unit="s, median of 3", **figures)
    print(
        f"\nan update: {figures['one rank']:.2f} s on one rank, {figures['buckets']:.2f} s through buckets: "
        f"{figures['overhead']:+.2%}"
    )
