"""Where ranks meet before an engine runs: a torch TCPStore that rank 0 serves at the place's address.

It starts the engines, and carries the monitor's beats. Nothing here loads an engine.
"""

import itertools
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fastdistil.errors import RankLost, UserError
from fastdistil.ranks import Place
from fastdistil.verdicts import gone

T = TypeVar("T")
Connect = Callable[[], Any]
"""Opens one more client connection to the store, a torch.distributed.Store."""
_meetings = itertools.count()
ANSWER_S = 5.0
"""Beyond the time that torch may take to connect: for an answer."""


def open_store(place: Place, timeout_s: float) -> Connect:
    """Serve the store in rank 0, at the place's own address alone; returns what opens a client.

    Raises UserError (no address, a port in use), RankLost (rank 0 is not there, or another program answers).
    """
    if place.address is None or place.port is None:
        raise UserError(
            f"{place.launcher} does not say where rank 0 is; set MASTER_ADDR and MASTER_PORT, or set world.engine=horovod"
        )
    address, port, timeout = place.address, place.port, timedelta(seconds=timeout_s)
    # A launcher's own store outlives us: what was agreed in it before, in another attempt or earlier in this process, is over.
    prefix = "" if place.serve_store else f"{place.attempt}/{next(_meetings)}"
    served = []
    if place.rank == 0 and place.serve_store:
        served.append(_serve(place, address, port, timeout))

    def connect() -> Any:
        kept = served  # the server lives as long as somebody may connect
        assert kept or place.rank or not place.serve_store
        try:
            # torch limits the time to connect, not the time that a connected stranger takes to answer.
            store = _within(
                timeout_s + ANSWER_S,
                lambda: TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False),
            )
            return PrefixStore(prefix, store) if prefix else store
        except TimeoutError as error:
            raise RankLost(
                f"rank {place.rank}: what listens at {address}:{port} does not answer as rank 0 does: rank 0 stands still, or "
                "another program has that port; choose another (MASTER_PORT), or start with --np, which finds a free one"
            ) from error
        except (dist.DistError, RuntimeError) as error:
            why = f"no connection to it at {address}:{port} within {timeout_s:g} s: not started, killed or behind a firewall"
            raise RankLost(f"{gone(0, why).text}; look at rank 0's messages") from error

    connect()
    return connect


def own_address(name: str, nodes: int) -> str:
    """Of this machine, by a name that the other nodes know it by. Raises UserError where that leads them nowhere."""
    address = socket.gethostbyname(name)
    if nodes > 1 and address.startswith("127.") and name != "localhost" and name != address:
        raise UserError(
            f"rank 0's name {name} is {address} on its own machine (/etc/hosts), where other nodes cannot reach it; set "
            "MASTER_ADDR to the address by which they do"
        )
    return address


def _serve(place: Place, address: str, port: int, timeout: timedelta) -> Any:
    try:
        listening = socket.create_server((own_address(address, place.cross_size), port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"rank 0 cannot serve at {address}:{port}: {error.strerror}; choose another port (MASTER_PORT), or start with "
            "--np, which finds a free one"
        ) from error
    return TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listening.detach())


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError if it does neither in time: its thread is left behind."""
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 (raised below, on the caller's thread)
            raised.append(error)

    thread = threading.Thread(target=run, name="fastdistil-connects", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError
    return found[0]


def choose_interface(place: Place) -> None:
    """Gloo takes the interface that this host's name resolves to, often the wrong one: take the one towards rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.address, place.port))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("HOROVOD_GLOO_IFACE", name)
            return
