"""The same surroundings for every test: no network, no parallel tokenizers, one torch thread, signals that are heard."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Never

# Before anything imports the libraries that read them; inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton's kernels run on the CPU, slowly. TRITON_INTERPRET=0 tests them on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

from fastdistil import cli
from tests.fork_server import ForkServer
from tests.small_run import Run, make_material

# Under nohup SIGHUP is ignored, and what is ignored is so in every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Property tests draw the same examples at every call, and a busy machine fails none of them.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums in one order whatever the machine, here and in child processes, and the same random numbers in every test alone.

    Threads are put back afterwards: benchmarks may follow.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what a library draws from it
    torch.manual_seed(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real texts: the folder FASTDISTIL_DATA, by default ../shared/data. Skips where neither is there."""
    named = os.environ.get("FASTDISTIL_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"FASTDISTIL_DATA names {named}, which is not a directory")
        pytest.skip(
            "no data folder: set FASTDISTIL_DATA to a directory with gutenberg/, wikitext-2/, imdb/, bert-base-uncased/"
        )
    return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See small_run.make_material."""
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the entry point with arguments, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        assert getattr(sys.stdout, "errors", "") == "strict"
        monkeypatch.setattr(sys, "argv", ["fastdistil", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts Python programs without the seconds of their imports, see fork_server.py."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def need() -> Callable[[str, str], Never]:
    """`need("horovod", reason)` skips the test with the reason; where FASTDISTIL_REQUIRE lists the name, it fails instead.

    FASTDISTIL_REQUIRE: names separated by commas (horovod, mpi, chromium, root-network), set where a skip would hide a
    broken machine.
    """
    required = {name.strip() for name in os.environ.get("FASTDISTIL_REQUIRE", "").split(",")}

    def skip_or_fail(name: str, reason: str) -> Never:
        if name in required:
            pytest.fail(f"FASTDISTIL_REQUIRE lists {name}: {reason}")
        pytest.skip(reason)

    return skip_or_fail
