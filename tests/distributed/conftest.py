"""Real ranks: processes on this machine, each told its place as a launcher does."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from fastdistil.corpus import train_wordpiece
from fastdistil.prepare import PrepareOptions, prepare
from fastdistil.pythondocs import docstrings

ROOT = Path(__file__).resolve().parents[2]

Start = Callable[..., list["subprocess.Popen[str]"]]
RunRanks = Callable[..., list[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    names |= {"GROUP_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {
        **os.environ,
        **{name: str(value) for name, value in names.items()},
        "MASTER_ADDR": "127.0.0.1",
        "FASTDISTIL_LAUNCHER": "fastdistil",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def start_ranks() -> Iterator[Start]:
    """start_ranks(command, ranks) -> processes; all of them are gone when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], ranks: int, port: int | None = None, **environment: str) -> list["subprocess.Popen[str]"]:
        port = port or free_port()
        processes = [
            subprocess.Popen(
                command,
                env=rank_environment(rank, ranks, port) | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(ranks)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def run_ranks(start_ranks: Start, tmp_path: Path) -> RunRanks:
    """run_ranks(program, ranks, *arguments) -> what each rank printed. Fails if one does not end well."""

    def run(program: str, ranks: int, *arguments: object, timeout_s: float = 120) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(program)
        processes = start_ranks([sys.executable, str(path), *map(str, arguments)], ranks)
        ended = [process.communicate(timeout=timeout_s) for process in processes]
        for rank, (process, (_, err)) in enumerate(zip(processes, ended, strict=True)):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}: {err[-3000:]}"
        return [out for out, _ in ended]

    return run


@pytest.fixture(params=["torch", "horovod"])
def engine(request: pytest.FixtureRequest, need: Callable[[str, str], None]) -> str:
    if request.param == "horovod":
        require_horovod(need)
    return str(request.param)


def require_horovod(need: Callable[[str, str], None]) -> None:
    try:
        import horovod  # noqa: F401
    except ImportError:
        need("horovod", "Horovod is not installed; build it with `make horovod`")


@pytest.fixture
def horovod(need: Callable[[str, str], None]) -> None:
    require_horovod(need)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a teacher of two layers, and corpora train/, heldout/ and other/."""
    folder = tmp_path_factory.mktemp("material")
    documents = [text for module in (json, os, subprocess, socket) for text in docstrings(Path(str(module.__file__)))]
    tokenizer = train_wordpiece(documents, 300, folder / "tokenizer")
    for name, chosen in (("train", documents[::2]), ("heldout", documents[1::4]), ("other", documents[3::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        options = PrepareOptions(tokenizer=str(tokenizer), max_length=48, workers=1)
        prepare([str(folder / f"{name}.jsonl")], folder / name, options)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        max_position_embeddings=48,
    )
    teacher = transformers.BertForMaskedLM(config)
    with torch.no_grad():  # far from the tiny weights of a new model, so that half its layers do not compute the same
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.save_pretrained(folder / "teacher")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "teacher")
    return folder
