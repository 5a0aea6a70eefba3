"""Weak scaling at the demo's sizes: 2 ranks of one thread against 1, beside the ceiling that two unconnected runs reach.

Every side is `fastdistil train` on the same corpus: one rank; two runs side by side that know nothing of each other (the
ceiling: they share caches, memory and clock as ranks do, and exchange nothing); two ranks. The three take turns, in opposite
order every other round, so that a machine that gets slower or faster meanwhile favours none. FASTDISTIL_SCALING_ROUNDS sets
the number of rounds.

Ranks wait for the slowest once an update; unconnected runs never do. What that alone costs on a machine whose cores are not
equally fast at every moment is worked out from the unconnected runs' own updates: "in lockstep".
"""

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from .ranks import alone, environment, has_horovod, in_lockstep, reserved_port, together, tokens_per_s, train_command

ROUNDS = int(os.environ.get("FASTDISTIL_SCALING_ROUNDS", "5"))
UPDATES, ACCUMULATION = 6, 8
SIDES = ("one", "side_by_side", "two_ranks")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first, the median, the third; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["torch", "horovod"])
def test_weak_scaling(benchmark: Any, engine: str, demo_material: Path, tmp_path: Path) -> None:
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed; build it with `make horovod`")
    benchmark.group = f"weak scaling, demo sizes, accumulation {ACCUMULATION}"

    def command(name: str, *more: str) -> list[str]:
        return train_command(
            demo_material, tmp_path / name, f"loop.accumulation={ACCUMULATION}", f"loop.updates={UPDATES}", *more
        )

    def speed(side: str) -> float:
        """Tokens a second, of all its processes together."""
        for run in ("a", "b"):
            shutil.rmtree(tmp_path / run, ignore_errors=True)
        match side:
            case "one":
                together([(command("a"), alone())])
            case "side_by_side":
                together([(command(name), alone()) for name in ("a", "b")])
            case _:
                with reserved_port() as port:
                    together([(command("a", f"world.engine={engine}"), environment(rank, 2, port)) for rank in range(2)])
        return sum(tokens_per_s(run) for run in (tmp_path / "a", tmp_path / "b") if run.exists())

    speeds_by_side: dict[str, list[float]] = {side: [] for side in SIDES}
    ratios: list[float] = []
    lockstep: list[float] = []

    def measure() -> None:
        for number in range(ROUNDS):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                speeds_by_side[side].append(speed(side))
                if side == "side_by_side":
                    lockstep.append(in_lockstep([tmp_path / name for name in ("a", "b")]) / speeds_by_side[side][-1])
            ratios.append(speeds_by_side["two_ranks"][-1] / speeds_by_side["side_by_side"][-1])
            speeds = ", ".join(f"{side} {series[-1]:,.0f} tokens/s" for side, series in speeds_by_side.items())
            print(f"\nround {number}: {speeds}, two ranks at {ratios[-1]:.3f} of side by side, lockstep {lockstep[-1]:.3f}")

    benchmark.pedantic(measure, rounds=1)
    one, ceiling, two = (statistics.median(speeds_by_side[side]) for side in SIDES)
    first, median, third = quartiles(ratios)
    facts = {
        "rounds": ROUNDS,
        "efficiency": two / (2 * one),
        "ceiling": ceiling / (2 * one),
        "of_ceiling": median,
        "of_ceiling_quartiles": [first, third],
        "of_ceiling_by_round": ratios,
        "lockstep_of_ceiling": statistics.median(lockstep),
        "lockstep_of_ceiling_by_round": lockstep,
    }
    benchmark.extra_info.update(engine=engine, ranks=2, unit="tokens/s, by round", **speeds_by_side, **facts)
    print(
        f"{engine}: {facts['efficiency']:.3f} of linear, the ceiling is {facts['ceiling']:.3f}; of it {median:.3f} in the "
        f"median of {ROUNDS} rounds, quartiles {first:.3f} and {third:.3f}; side by side in lockstep would reach "
        f"{facts['lockstep_of_ceiling']:.3f}"
    )
