"""The recipe's commands that run once on every node before training."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from fastdistil.distributed.rank_info import environment_of_no_rank
from fastdistil.errors import UserError

LAST_LINES = 5


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
    last: deque[str] = deque(maxlen=LAST_LINES)
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
