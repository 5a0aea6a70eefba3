"""Ranks for benchmarks: programs and training runs on this machine, one torch thread each, runs at the demo's sizes."""

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from fastdistil.console import Console
from fastdistil.demo import make_corpus
from fastdistil.recipe import RECIPES, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RANK_THREADS = 1


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else is given inside the block: bound, but not listened at, so that a rank 0 can."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def environment(rank: int, size: int, port: int, address: str = "127.0.0.1", **more: str) -> dict[str, str]:
    """As a launcher sets it for one rank of several."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    names |= {"GROUP_WORLD_SIZE": 1, "MASTER_PORT": port, "OMP_NUM_THREADS": RANK_THREADS}
    variables = {name: str(value) for name, value in names.items()}
    return {
        **os.environ,
        **variables,
        "MASTER_ADDR": address,
        "FASTDISTIL_LAUNCHER": "fastdistil",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def alone(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(RANK_THREADS), "PYTHONPATH": str(ROOT), **more}


def together(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], timeout_s: float = 600) -> list[str]:
    """Run all at once; what each printed. Raises RuntimeError if one fails; none outlives the call."""
    processes = [
        subprocess.Popen(command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, env in commands
    ]
    try:
        ended = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, err) in zip(processes, ended, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with {process.returncode}: {err[-2000:]}")
    return [out for out, _ in ended]


def run_program(program: str, ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """A program's last line of output, JSON, by rank."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with reserved_port() as port:
        outputs = together([(command, environment(rank, ranks, port)) for rank in range(ranks)])
    return [json.loads(out.splitlines()[-1]) for out in outputs]


def make_demo_material(folder: Path) -> Path:
    """Into the folder: the demo's text as train/, and a teacher of its sizes, untrained: what it says costs the same."""
    train, _ = make_corpus(folder, Console(quiet=True))
    assert train == folder / "train", train
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = load_recipe("demo-teacher").student.config or {}
    config = transformers.BertConfig(**{key: sizes[key] for key in sizes if key != "model_type"}, vocab_size=len(tokenizer))
    transformers.BertForMaskedLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def train_command(material: Path, run: Path, *settings: str) -> list[str]:
    """`fastdistil train` of the demo's student in the directory `run`: nothing but updates, a log line each."""
    common = [
        f"teacher.path={material / 'teacher'}",
        f"data.train={material / 'train'}",
        "student.every=2",
        "data.micro_batch_tokens=2048",
        "loop.precision=fp32",
        "data.heldout=null",
        "checkpoint.every=null",
        "logging.every=1",
        f"runs_dir={run.parent}",
        f"name={run.name}",
    ]
    return [sys.executable, "-m", "fastdistil", "train", str(RECIPES / "demo.yaml"), *common, *settings]


def updates_of(run: Path) -> list[tuple[int, float]]:
    """(tokens, seconds) of a run's updates, a log line each, without the first: it holds what happens once."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "train"][1:]
    return [(line["tokens"], line["tokens"] / line["tokens_per_s"]) for line in lines]


def tokens_per_s(run: Path) -> float:
    return statistics.median([tokens / seconds for tokens, seconds in updates_of(run)])


def in_lockstep(runs: Sequence[Path]) -> float:
    """Tokens a second of all, had each update of one waited for that of the slowest: what ranks do, and these runs did not."""
    paired = zip(*(updates_of(run) for run in runs), strict=True)
    return statistics.median(
        [sum(tokens for tokens, _ in samples) / max(seconds for _, seconds in samples) for samples in paired]
    )


def has_horovod() -> bool:
    done = subprocess.run([sys.executable, "-c", "import horovod.torch"], capture_output=True, check=False)
    return done.returncode == 0
