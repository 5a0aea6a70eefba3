"""Stand-ins for the launcher's tests: a rank that does what its line of a plan says, and for ssh a shell."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fastdistil.launch.job import Job, choose_slots

# A rank: appends its environment to `starts`, then does what the plan says for it ("default" otherwise).
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
from fastdistil.launch.rank_process import tie_to_launcher

tie_to_launcher(os.environ)
folder, *arguments = sys.argv[1:]
folder = Path(folder)
rank = os.environ["RANK"]
mine = {"pid": os.getpid(), "arguments": arguments, "cwd": os.getcwd(), "environ": dict(os.environ)}
with open(folder / "starts.jsonl", "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # another rank's line may be half written
    file.write(json.dumps(mine) + "\\n")
    file.flush()
    file.seek(0)
    starts = [json.loads(line) for line in file]
plan = json.loads((folder / "plan.json").read_text())
start = sum(earlier["environ"]["RANK"] == rank for earlier in starts)
plans = plan.get(rank, plan["default"])
deed = plans[min(start, len(plans)) - 1] if isinstance(plans, list) else plans

def saved(number, frame):
    print(f"saved by {signal.Signals(number).name}", flush=True)
    sys.stdout.flush()
    os._exit(75)

def wait():
    signal.signal(signal.SIGTERM, saved)
    signal.signal(signal.SIGINT, saved)
    signal.signal(signal.SIGHUP, saved)
    (folder / f"ready-{rank}").touch()
    while True:
        signal.pause()

def wait_for(name):
    deadline = time.monotonic() + 120
    while not (folder / name).exists():
        assert time.monotonic() < deadline, name
        time.sleep(0.01)

exec(deed)
"""
# A shell instead of another machine; what it is asked to run comes as ssh's does, as one string after the host's name.
FAKE_SSH = """#!/bin/sh
echo "$*" >> "$SSH_FOLDER/commands"
[ "$1" = -- ] || exit 64
shift
echo "$1" >> "$SSH_FOLDER/hosts"
[ -e "$SSH_FOLDER/down-$1" ] && { echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; }
shift
exec sh -c "$*"
"""


class Ranks:
    """A plan for the stand-in ranks, and what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "stand_in.py"
        self.program.write_text(STAND_IN)

    def command(self, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(self.program), str(self.folder), *arguments)

    def plan(self, default: str | list[str] = "pass", **deeds: str | list[str]) -> None:
        named = {name.removeprefix("rank"): deed for name, deed in deeds.items()}
        (self.folder / "plan.json").write_text(json.dumps({"default": default, **named}))

    def job(self, np: int | None = 2, hosts: str | None = None, **more: Any) -> Job:
        slots, ranks = choose_slots(np, hosts)
        return Job(command=self.command(), slots=slots, ranks=ranks, **{"timeout_s": 5.0, **more})

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sizes(self) -> list[int]:
        """Ranks of each start of the run."""
        return [int(start["environ"]["WORLD_SIZE"]) for start in self.starts if start["environ"]["RANK"] == "0"]

    def wait_for(self, condition: Callable[[], object], event: str = "the ranks") -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {event}"
            time.sleep(0.01)

    def ready(self, count: int) -> None:
        self.wait_for(lambda: len(list(self.folder.glob("ready-*"))) >= count)

    def alive(self) -> list[int]:
        return [start["pid"] for start in self.starts if running(start["pid"])]


def running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
