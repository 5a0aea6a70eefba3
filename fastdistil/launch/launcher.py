"""Starts the ranks of a run, here or on several hosts, and says how it ended: `launch` for the command line,
`launch_function` for Python.

The launcher takes no part in training and does not load torch. Which environment a rank gets and how it is watched,
attempt.py says; how it is started, rank_process.py; what it says, rank_output.py.

Elastic: when a rank is lost, the others end by themselves (exit code 12); the run is then started again from its last
checkpoint in the slots that remain. On this machine alone a lost slot is tried again later: the run is stopped as by SIGTERM,
which saves it, and started with more ranks.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastdistil.distributed.rank_info import find_rank_info
from fastdistil.errors import UserError
from fastdistil.launch.attempt import INTERRUPTED, LOST, SAVED, Attempt, Interrupts, run_ranks
from fastdistil.launch.elastic import RESTARTS, AbsentSlots, worth_a_restart
from fastdistil.launch.job import BUG, Job, choose_slots
from fastdistil.launch.rank_output import RankOutput
from fastdistil.launch.rank_process import Launch


def _refuse_ranks_of_ranks(environ: Mapping[str, str]) -> None:
    place = find_rank_info(environ)
    if place is not None and place.size > 1:
        raise UserError(
            f"this process is rank {place.rank} of {place.size} already, started by {place.launcher}; leave out np and hosts"
        )


def launch(job: Job) -> int:
    """Run a job to its end. Returns the command's exit code; what the ranks could not say themselves is printed."""
    code, _ = _run(job)
    return code


def _run(job: Job) -> tuple[int, Attempt]:
    _refuse_ranks_of_ranks(os.environ)
    output = RankOutput(sys.stderr)
    logs = Path(tempfile.mkdtemp(prefix="fastdistil-"))
    code = BUG
    try:
        with Interrupts() as interrupts:
            code, attempt = _run_elastic(job, output, logs, interrupts)
            return code, attempt
    finally:
        if code in (0, SAVED, INTERRUPTED) or not any(log.stat().st_size for log in logs.iterdir()):
            shutil.rmtree(logs, ignore_errors=True)
        else:
            output.say(f"what the other ranks printed is in {logs}")


def _run_elastic(job: Job, output: RankOutput, logs: Path, interrupts: Interrupts) -> tuple[int, Attempt]:
    elastic, command = job.elastic, job.command
    absent = AbsentSlots(job, output)
    idle, progress = 0, elastic.progress() if elastic is not None else None
    while True:
        slots = absent.present()
        begin = Launch(command=command, slots=slots, timeout_s=job.timeout_s, logs=logs, environ={**os.environ, **job.environ})
        attempt = run_ranks(begin, output, interrupts, enough=absent.some_are_back)
        code, why = attempt.exit_code(), attempt.why()
        if why is not None:
            output.say(why)
        grown = absent.stopped_to_grow and interrupts.stop_signal is None and code in (LOST, SAVED, INTERRUPTED)
        if elastic is None or interrupts.stop_signal is not None or not (grown or worth_a_restart(attempt, code)):
            return code, attempt
        if not grown:
            absent.add(attempt)
        idle, progress = (idle + 1, progress) if elastic.progress() == progress else (0, elastic.progress())
        absent.take_back()
        remaining = len(absent.present())
        if remaining < elastic.min_ranks:
            output.say(f"{remaining} ranks remain, fewer than --elastic's {elastic.min_ranks}; continue with --resume auto")
            return LOST, attempt
        if idle >= RESTARTS:
            output.say(f"given up after {idle} starts in a row without a new checkpoint; continue with --resume auto")
            return LOST, attempt
        output.say(f"going on with {remaining} rank{'s' if remaining > 1 else ''} from the last checkpoint")
        command = elastic.again()


def launch_function(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, np: int | None, hosts: str | None, timeout_s: float
) -> Any:
    """Call `function(**arguments)` in new ranks and return rank 0's result, its tensors on the CPU.

    Functions and classes of a notebook or script travel by value. An error of a rank is raised here as it was there; a rank
    that died without one is a RankLost. No process is left behind, whatever happens.
    """
    from fastdistil.launch.remote_call import read_answer, write_call

    slots, ranks = choose_slots(np, hosts)
    # Other hosts see it where they see the run: below the working directory.
    shared = Path.cwd() if any(slot.host for slot in slots) else None
    folder = Path(tempfile.mkdtemp(prefix="fastdistil-call-", dir=shared))
    try:
        write_call(folder, function, arguments)
        command = (sys.executable, "-m", "fastdistil.launch", str(folder))
        path = os.pathsep.join(entry for entry in sys.path if entry)  # what can be imported here can be there
        job = Job(command=command, slots=slots, ranks=ranks, timeout_s=timeout_s, environ={"PYTHONPATH": path})
        code, attempt = _run(job)
        rank = attempt.cause.rank if attempt.cause is not None else 0
        return read_answer(folder, code, rank, attempt.why())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
