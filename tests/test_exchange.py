"""Who kept the others waiting, from times that are known; what is not exchanged."""

import pytest
import torch

from fastdistil.buckets import MIB, BucketOptions
from fastdistil.errors import UserError
from fastdistil.exchange import Load, make_exchange
from fastdistil.recipe import World as Options
from fastdistil.recipe import load_recipe
from fastdistil.world import World


class TwoRanks:
    """This rank is the fast one: it waited for 3 of 10 s; the other worked for all of them."""

    waited_s = 0.0

    def gather(self, own: list[float], name: str) -> list[list[float]]:
        return [own, [300.0, 0.5, 10.0]]


def test_waiting_for_others_is_not_work() -> None:
    now = 0.0
    world = TwoRanks()
    load = Load(world, clock=lambda: now)  # type: ignore[arg-type]
    load.add(100, 0.25)
    now, world.waited_s = 10.0, 3.0
    with load.excluded():  # an evaluation of 50 s, of which 40 were waits
        now, world.waited_s = 60.0, 43.0
    found = load.read()
    assert found["slowest_rank"] == 1
    assert abs(found["imbalance_time"] - (10 / 8.5 - 1)) < 1e-12  # 7 and 10 s of work
    assert found["imbalance_tokens"] == 300 / 200 - 1
    assert found["rank_tokens"] == [100, 300] and found["rank_data_wait_s"] == [0.25, 0.5]
    now = 62.0
    assert abs(load.read()["imbalance_time"] - (10 / 6 - 1)) < 1e-12  # afresh: 2 s of work


def test_compression_of_gradients_in_a_changing_scale_is_refused() -> None:
    overrides = ["data.train=x", "teacher.path=x", "loop.epochs=1", "loop.precision=fp16", "compression=int8"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UserError, match=r"loop\.precision=fp16.*compression\.kind=none"):
        make_exchange(load_recipe("distilbert", overrides), World(None, torch.device("cpu")), optimizer)


def test_buckets_are_of_25_mib_unless_the_recipe_says_otherwise() -> None:
    """As torch's DDP has it: measured 6% faster than 16 MiB between two ranks on loopback."""
    assert Options().bucket_mib * MIB == BucketOptions().bucket_bytes == 25 * 2**20
    assert Options().first_bucket_mib * MIB == BucketOptions().first_bucket_bytes == 2**20
