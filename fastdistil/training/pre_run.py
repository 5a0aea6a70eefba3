"""What is done once on every node before training: the recipe's commands, and copies of its corpora."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from fastdistil.data.local_copy import cached_corpus
from fastdistil.distributed.coordinator import Coordinator
from fastdistil.distributed.rank_info import RankInfo, environment_of_no_rank
from fastdistil.errors import UserError
from fastdistil.recipe import Recipe

_LAST_LINES = 5


def prepare_node(team: Coordinator, recipe: Recipe, note: Callable[[str], None]) -> Recipe:
    """Run pre_run's commands and make data.cache_dir's copies, once on each node; return the recipe with the copies' paths."""
    local_rank, barrier = team.world.local_rank, team.world.barrier
    with team.unhurried("preparing the node"):
        run_once_per_node(recipe.pre_run, local_rank, barrier, note)
        if recipe.data.cache_dir is None:
            return recipe
        directory, verify = Path(recipe.data.cache_dir), recipe.data.verify
        corpora = {"train": recipe.data.train, "heldout": recipe.data.heldout}
        copies = {
            key: str(cached_corpus(Path(path), directory, local_rank, barrier, note, verify=verify))
            for key, path in corpora.items()
            if path
        }
    return recipe.with_(data=copies)


def note_of_node(place: RankInfo | None, text: str) -> None:
    """Print a note of another node than rank 0's. Our own launcher puts the rank before what a rank says; others do not."""
    assert place is not None
    label = "" if place.launcher == "fastdistil" else f"[rank {place.rank}] "
    print(f"{label}{text}", file=sys.stderr, flush=True)


def run_once_per_node(
    commands: Sequence[str], local_rank: int, barrier: Callable[[], None], note: Callable[[str], None]
) -> None:
    """Run the shell commands in order on local rank 0, while the node's other ranks wait at `barrier`.

    They inherit the environment, have no input, and their output goes to stderr behind "pre_run: ". Raises UserError on
    local rank 0 for one that fails; the others must learn of it elsewhere (monitor.Monitor.failed).
    """
    if not commands:
        return
    if local_rank == 0:
        for command in commands:
            note(f"pre_run: {command}")
            _run(command)
    barrier()


def _run(command: str) -> None:
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        env=environment_of_no_rank(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    reader = threading.Thread(target=_pass_on, args=(process.stdout, last), daemon=True)
    reader.start()
    try:
        code = process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    reader.join(1.0)  # what it left in the background may hold its output open for ever
    if code:
        ending = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        words = f"; its last words: {' | '.join(last)}" if last else ""
        raise UserError(f"the pre_run command {command!r} failed ({ending}){words}; mend or remove it")


def _pass_on(output: IO[str], last: deque[str]) -> None:
    for line in output:
        line = line.rstrip()
        if line:
            last.append(line)
        print(f"pre_run: {line}", file=sys.stderr, flush=True)
