"""Weak scaling at the demo's sizes: 2 ranks of one thread against 1, beside the ceiling that two unconnected runs reach.

Every side is `fastdistil train` on the same corpus: one rank; two runs side by side that know nothing of each other (the
ceiling: they share caches, memory and clock as ranks do, and exchange nothing); two ranks. The three take turns.
"""

import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastdistil.demo import make_corpus
from fastdistil.metrics import Console
from fastdistil.recipe import RECIPES, load_recipe

from .ranks import alone, environment, free_port, has_horovod, together, tokens_per_s

ROUNDS, UPDATES, ACCUMULATION = 3, 6, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's text, and a teacher of its sizes, untrained: what it says costs the same."""
    folder = tmp_path_factory.mktemp("scaling")
    train, _ = make_corpus(folder, Console(quiet=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = load_recipe("demo-teacher").student.config or {}
    config = transformers.BertConfig(**{key: sizes[key] for key in sizes if key != "model_type"}, vocab_size=len(tokenizer))
    transformers.BertForMaskedLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    assert train == folder / "train", train
    return folder


@pytest.mark.parametrize("engine", ["torch", "horovod"])
def test_weak_scaling(benchmark: Any, engine: str, corpus: Path, tmp_path: Path) -> None:
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed; build it with `make horovod`")
    benchmark.group = "weak scaling, demo sizes, accumulation 8"

    def command(name: str, *more: str) -> list[str]:
        settings = [
            f"teacher.path={corpus / 'teacher'}",
            f"data.train={corpus / 'train'}",
            "student.every=2",
            "data.micro_batch_tokens=2048",
            f"loop.accumulation={ACCUMULATION}",
            f"loop.updates={UPDATES}",
            "loop.precision=fp32",
            "data.heldout=null",
            "checkpoint.every=null",
            "logging.every=1",
            f"runs_dir={tmp_path}",
            f"name={name}",
        ]
        return [sys.executable, "-m", "fastdistil", "train", str(RECIPES / "demo.yaml"), *settings, *more]

    def measure() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"one": [], "side_by_side": [], "two_ranks": []}
        for number in range(ROUNDS):
            for run in ("a", "b", "c", "d"):
                shutil.rmtree(tmp_path / run, ignore_errors=True)
            together([(command("a"), alone())])
            together([(command(name), alone()) for name in ("b", "c")])
            port = free_port()
            ranks = [(command("d", f"world.engine={engine}"), environment(rank, 2, port)) for rank in range(2)]
            together(ranks)
            found["one"].append(tokens_per_s(tmp_path / "a"))
            found["side_by_side"].append(tokens_per_s(tmp_path / "b") + tokens_per_s(tmp_path / "c"))
            found["two_ranks"].append(tokens_per_s(tmp_path / "d"))
            print(f"\nround {number}: " + ", ".join(f"{name} {each[-1]:,.0f} tokens/s" for name, each in found.items()))
        return found

    found = benchmark.pedantic(measure, rounds=1)
    one, ceiling, two = (statistics.median(found[name]) for name in ("one", "side_by_side", "two_ranks"))
    of_ceiling = statistics.median(
        [two / ceiling for two, ceiling in zip(found["two_ranks"], found["side_by_side"], strict=True)]
    )
    facts = {"efficiency": two / (2 * one), "ceiling": ceiling / (2 * one), "of_ceiling": of_ceiling}
    benchmark.extra_info.update(engine=engine, unit=f"tokens/s, {ROUNDS} interleaved rounds", **found, **facts)
    print(
        f"{engine}: {facts['efficiency']:.3f} of linear, the ceiling is {facts['ceiling']:.3f}: "
        f"{of_ceiling:.3f} of it (median of rounds)"
    )
