"""Gradients that travel once an update against after every micro-batch, on a link of 1 Gbit/s. Needs root (network.py).

Both sides are `fastdistil train` at the demo's sizes, two ranks of one thread as two hosts, on the same corpus, turn about. The
ratio of their tokens/s is a fact of the run, not asserted; the bytes are: of eight micro-batches one sends, so an eighth.
"""

import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .network import Network, missing
from .ranks import environment, has_horovod, tokens_per_s, train_command

LINK_MBIT = 1000.0
ROUNDS, UPDATES, ACCUMULATION = 3, 4, 8
RANKS = 2


class Seen(NamedTuple):
    tokens_per_s: float
    gradient_bytes: int
    """Of one rank in one update, as the run counted them."""
    tx_share: float
    """What rank 1 sent by its network device's count, over what the run counted for it. Rank 0 also sends the weights."""
    wait_share: float
    """Of rank 0's time: waiting for gradients."""


def train(command: list[str], run: Path) -> Seen:
    with Network(RANKS, link_mbit=LINK_MBIT) as network:
        ranks = []
        for rank in range(RANKS):
            hosts = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": str(RANKS)}
            names = environment(rank, RANKS, 29500, network.address(0), **hosts)
            ranks.append(network.run(rank, command, names, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        errors = [rank.communicate(timeout=500)[1] for rank in ranks]
        for rank, error in zip(ranks, errors, strict=True):
            assert rank.returncode == 0, error[-2000:]
        sent = network.tx_bytes(1)
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["event"] == "train"]
    seconds = sum(line["tokens"] / line["tokens_per_s"] for line in updates[1:])
    counted = sum(line["gradient_bytes"] + line["control_bytes"] for line in updates)
    waited = sum(line["exchange_wait_s"] for line in updates[1:])
    return Seen(tokens_per_s(run), updates[-1]["gradient_bytes"], sent / counted, waited / seconds)


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(group="delayed synchronisation, demo sizes, accumulation 8, 1 Gbit/s")
def test_delayed_against_every_micro_batch(benchmark: Any, demo_material: Path, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    engine = "horovod" if has_horovod() else "torch"
    sides = ("delayed", "every-micro-batch")

    def command(sync: str) -> list[str]:
        lengths = [f"loop.accumulation={ACCUMULATION}", f"loop.updates={UPDATES}"]
        return train_command(demo_material, tmp_path / sync, *lengths, f"world.engine={engine}", f"world.sync={sync}")

    measurements: dict[str, list[Seen]] = {sync: [] for sync in sides}

    def turn() -> None:
        for sync in sides:
            shutil.rmtree(tmp_path / sync, ignore_errors=True)
            measurements[sync].append(train(command(sync), tmp_path / sync))

    benchmark.pedantic(turn, rounds=ROUNDS)
    speed = {
        sync: statistics.median(measurement.tokens_per_s for measurement in repeats) for sync, repeats in measurements.items()
    }
    ratio = statistics.median(
        delayed.tokens_per_s / every.tokens_per_s
        for delayed, every in zip(*(measurements[sync] for sync in sides), strict=True)
    )
    once, often = (measurements[sync][-1].gradient_bytes for sync in sides)
    assert often == ACCUMULATION * once
    waited = {
        sync: statistics.median(measurement.wait_share for measurement in repeats) for sync, repeats in measurements.items()
    }
    # What the ratio would be if both computed equally fast: other work on the machine disturbs it less.
    by_waiting = (1 - waited["delayed"]) / (1 - waited["every-micro-batch"])
    runs = {sync: [measurement._asdict() for measurement in repeats] for sync, repeats in measurements.items()}
    benchmark.extra_info.update(engine=engine, link_mbit=LINK_MBIT, times_faster=ratio, by_waiting=by_waiting, runs=runs)
    print(f"\n{engine}, {LINK_MBIT:.0f} Mbit/s, {ROUNDS} rounds turn about")
    print(f"  delayed is {ratio:.2f} times as fast; by the time spent waiting {by_waiting:.2f}")
    for sync in sides:
        last = measurements[sync][-1]
        print(
            f"  {sync}: {speed[sync]:,.0f} tokens/s, {waited[sync]:.1%} of the time waiting for gradients, "
            f"{last.gradient_bytes:,} bytes a rank and update, on the wire {last.tx_share:.3f} of what was counted"
        )
