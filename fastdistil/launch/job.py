"""What the launcher is asked to run: a command, the slots that its ranks get, and how it goes on without a lost one."""

import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastdistil.errors import UserError
from fastdistil.launch.rank_process import Slot
from fastdistil.untrusted import shown

MOST_RANKS = 2**16
"""More are a mistake: each is a process, and rank 0 holds a connection to each."""


BUG = 1


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """How a run goes on without a lost rank."""

    min_ranks: int
    again: Callable[[], tuple[str, ...]]
    """The ranks' command of a further start: it continues the run."""
    progress: Callable[[], object]
    """Something that changes when the run has a new checkpoint."""
    grow_after_s: float = 60.0
    """On this machine alone: how long a lost slot is left before it is tried again; twice as long each further time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `launch` runs."""

    command: tuple[str, ...]
    """The command of every rank."""
    slots: tuple[Slot, ...]
    ranks: int
    """At most; slots beyond it are spare."""
    timeout_s: float
    """The recipe's world.timeout_s."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables of the ranks, beside the launcher's own."""
    elastic: Elastic | None = None


def parse_hosts(text: str) -> tuple[Slot, ...]:
    """`a:8,b:8` as slots, `a` being `a:1`. Raises UserError."""
    slots: list[Slot] = []
    for part in text.split(","):
        host, colon, count = part.strip().partition(":")
        if not re.fullmatch(r"(?!-)[\w.@%+-]+", host) or (colon and not _is_count(count)):
            raise UserError(
                f"--hosts {shown(text)}: {shown(part)} is not HOST or HOST:RANKS with 1 to {MOST_RANKS:,} ranks; "
                "wanted e.g. a:8,b:8"
            )
        name = None if host in _own_names() else host
        if any(slot.host == name for slot in slots):
            raise UserError(f"--hosts {shown(text)} names {shown(host)} twice; give it once, with all its ranks")
        slots += [Slot(name, index) for index in range(int(count or 1))]
        if len(slots) > MOST_RANKS:
            raise UserError(f"--hosts {shown(text)} has room for more than {MOST_RANKS:,} ranks; give fewer")
    return tuple(slots)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_RANKS)) and 1 <= int(text) <= MOST_RANKS


def _own_names() -> set[str]:
    name = socket.gethostname()
    return {"localhost", "127.0.0.1", name, name.partition(".")[0], socket.getfqdn()}


def choose_slots(np: int | None, hosts: str | None) -> tuple[tuple[Slot, ...], int]:
    """(slots, ranks to start) for np and hosts as users give them. Raises UserError."""
    if np is not None and not 1 <= np <= MOST_RANKS:
        raise UserError(f"the number of ranks is 1 to {MOST_RANKS:,}, got {shown(np)}")
    if hosts is None:
        return tuple(Slot(None, index) for index in range(np or 1)), np or 1
    slots = parse_hosts(hosts)
    if np is not None and np > len(slots):
        raise UserError(f"{np} ranks are more than the {len(slots)} that {hosts} has room for; write e.g. a:8,b:8")
    return slots, np or len(slots)


def parse_elastic(text: str) -> tuple[int, int]:
    """`2:8` as (2, 8). Raises UserError."""
    low, _, high = text.partition(":")
    if not (_is_count(low) and _is_count(high) and int(low) <= int(high)):
        raise UserError(f"--elastic {shown(text)} is not MIN:MAX with 1 <= MIN <= MAX, e.g. 2:8")
    return int(low), int(high)
