"""Does training notice how large the corpus is? Tokens a second and host memory on 1 MB and on 1 GB of text.

The large corpus is the small one's shards repeated a thousand times. Both are trained on in processes of their own, turn
about: the same model, the same number of updates. Memory is told twice: anonymous pages, which are this process's own, and
all resident pages, among them those of mapped files, which the system takes back when it needs them.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdistil.data.corpus import Manifest
from fastdistil.data.prepare import PrepareOptions, prepare
from fastdistil.data.tokenizer import train_wordpiece
from fastdistil.storage import file_sha256

ROOT = Path(__file__).resolve().parent.parent
TIMES = 1000
ROUNDS = 3
TRAIN = """
import json, sys
from fastdistil.console import Console
from fastdistil.events import read_events
from fastdistil.profiling.memory import host_memory
from fastdistil.recipe import load_recipe
from fastdistil.train import train
recipe = load_recipe("bert-small", sys.argv[1:])
result = train(recipe, console=Console(quiet=True))
memory = host_memory()
steps = [e for e in read_events(result.run_dir / "events.jsonl") if e.kind == "train"][1:]
print(json.dumps({
    "tokens_per_s": sum(e.tokens for e in steps) / sum(e.tokens / e.tokens_per_s for e in steps),
    "data_wait_share": max(e.data_wait_share for e in steps),
    "anonymous_bytes": memory.anonymous_bytes,
    "peak_rss_bytes": memory.peak_rss_bytes,
}))
"""


def repeated(small: Path, large: Path) -> None:
    """A prepared corpus with the small one's only shard as every one of its TIMES shards' worth of tokens, in one file."""
    manifest = Manifest.read(small / "manifest.json")
    large.mkdir()
    (large / "tokenizer").symlink_to(small / "tokenizer")
    for name in manifest.files:
        content = (small / name).read_bytes()
        if name.startswith(("tokens-", "lengths-")):
            with (large / name).open("wb") as file:
                for _ in range(TIMES):
                    file.write(content)
        elif name == "counts.bin":
            (np.frombuffer(content, np.int64) * TIMES).tofile(large / name)
    files = {
        name: {**values, "bytes": (large / name).stat().st_size, "sha256": file_sha256(large / name)}
        for name, values in manifest.files.items()
    }
    (shard,) = manifest.shards
    grown = dataclasses.replace(
        manifest,
        sequences=manifest.sequences * TIMES,
        tokens=manifest.tokens * TIMES,
        documents=manifest.documents * TIMES,
        shards=[{key: value * TIMES for key, value in shard.items()}],
        files=files,
    )
    (large / "manifest.json").write_text(grown.to_json())


def trained(corpus: Path, runs: Path) -> dict[str, float]:
    overrides = [
        "student.config.num_hidden_layers=2",
        "student.config.hidden_size=128",
        "student.config.intermediate_size=512",
        "student.config.max_position_embeddings=128",
        f"data.train={corpus}",
        "data.micro_batch_tokens=4096",
        "loop.updates=40",
        "logging.every=10",
        "checkpoint.every=null",
        "device=cpu",
        f"runs_dir={runs}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *overrides], env=environment, capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.benchmark(group="corpus size")
def test_one_megabyte_and_one_gigabyte(benchmark: Any, tmp_path: Path) -> None:
    text = "\n".join(
        path.read_text("utf-8", errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    )
    (tmp_path / "text.txt").write_text(text[:1_000_000], encoding="utf-8")
    tokenizer = train_wordpiece([text[:1_000_000]], 4000, tmp_path / "tokenizer")
    prepare([str(tmp_path / "text.txt")], tmp_path / "small", PrepareOptions(tokenizer=str(tokenizer), max_length=128))
    repeated(tmp_path / "small", tmp_path / "large")

    results_by_size: dict[str, list[dict[str, float]]] = {"small": [], "large": []}

    def round_of_both() -> None:
        for name, results in results_by_size.items():
            results.append(trained(tmp_path / name, tmp_path / "runs"))

    benchmark.pedantic(round_of_both, rounds=ROUNDS, iterations=1)
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in results_by_size.items()
    }
    ratios = {
        key: medians["large"][key] / medians["small"][key] for key in ("tokens_per_s", "anonymous_bytes", "peak_rss_bytes")
    }
    benchmark.extra_info.update({"medians": medians, "large_over_small": ratios})
    for name, values in medians.items():
        print(
            f"\n{name}: {values['tokens_per_s']:,.0f} tokens/s, data wait at most {values['data_wait_share']:.2%}, "
            f"{values['anonymous_bytes'] / 2**20:,.0f} MiB anonymous, "
            f"{values['peak_rss_bytes'] / 2**20:,.0f} MiB resident at the peak"
        )
    print("1 GB over 1 MB: " + ", ".join(f"{key} {value:.3f}" for key, value in ratios.items()))
