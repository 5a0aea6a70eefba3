"""Where ranks meet before an engine runs: a torch TCPStore that rank 0 serves at the place's address.

It starts the engines, and carries the monitor's beats. Nothing here loads an engine.

The store has no password: whoever reaches the port can read and write. So ranks that share a secret (FASTDISTIL_STORE_SECRET,
which our launcher makes for every start) name their keys after it and sign what they write; what anybody else writes is passed
over, and told. It keeps others from steering a run, not from disturbing it, and not from reading.
"""

import hmac
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fastdistil.distributed.diagnosis import gone
from fastdistil.distributed.rank_info import RankInfo
from fastdistil.errors import RankLost, UserError

T = TypeVar("T")


class SharedStore:
    """One connection to the ranks' store, in which a rank finds what ranks with the same secret wrote.

    `scope` comes before all keys, where the store is not the run's alone. Without a secret nothing is signed. Errors are
    torch's RuntimeErrors.
    """

    def __init__(self, store: Any, secret: str = "", scope: str = "") -> None:
        self._secret = secret.encode()
        names = [hmac.digest(self._secret, b"scope", "sha256").hex()[:16]] if secret else []
        self._scope = "/".join([*names, *filter(None, [scope])])
        self._everything, self._store = store, PrefixStore(self._scope, store) if self._scope else store
        self._foreign: set[str] = set()
        # A launcher's own store, where all keys have a scope, has others' by rights.
        self._alone = bool(secret) and not scope and hasattr(store, "list_keys")

    def of_engine(self, name: str) -> Any:
        """Return a torch.distributed.Store for an engine's own keys, which are not signed."""
        return PrefixStore(name, self._store)

    def set(self, key: str, text: str) -> None:
        self._store.set(key, self._signed(key, text))

    def set_first(self, key: str, text: str) -> None:
        """Write unless a rank has done so before."""
        signed = self._signed(key, text)
        if self._text(key, self._store.compare_set(key, "", signed)) is None:
            self._store.set(key, signed)

    def create(self, keys: Iterable[str]) -> None:
        """Make keys that are not there empty: `get_all` would wait for them."""
        for key in keys:
            self._store.compare_set(key, "", "")

    def get(self, key: str) -> bytes:
        """Wait for a value and return it. Raises RuntimeError for one that no rank wrote."""
        text = self._text(key, self._store.get(key))
        if text is None:
            raise RuntimeError(f"{key} in the ranks' store was written by somebody who is no rank of this run")
        return text

    def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values, empty where no rank wrote one."""
        values = self._store.multi_get(list(keys))
        return [self._text(key, value) or b"" for key, value in zip(keys, values, strict=True)]

    def add(self, key: str, number: int) -> int:
        return int(self._store.add(key, number))

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all keys are there, without waiting."""
        return bool(self._store.check(list(keys)))

    def foreign_keys(self) -> list[str]:
        """Return the keys that others than this run's ranks wrote, as far as torch can list them."""
        others = self._everything.list_keys() if self._alone else []
        return sorted(self._foreign.union(key for key in others if not key.startswith(f"{self._scope}/")))

    def _signed(self, key: str, text: str) -> str:
        return self._tag(key, text.encode()).decode() + text

    def _text(self, key: str, value: bytes) -> bytes | None:
        """Return the text of a signed value, or of an empty one; None where no rank wrote it."""
        length = len(self._tag("", b""))
        tag, text = value[:length], value[length:]
        if not value or hmac.compare_digest(tag, self._tag(key, text)):
            return text
        self._foreign.add(key)
        return None

    def _tag(self, key: str, text: bytes) -> bytes:
        if not self._secret:
            return b""
        return hmac.digest(self._secret, f"{self._scope}/{key}\0".encode() + text, "sha256").hex().encode()


Connect = Callable[[], SharedStore]
"""Opens one more client connection to the store."""
_store_numbers = itertools.count()
ANSWER_S = 5.0
"""Beyond the time that torch may take to connect: for an answer."""


def open_store(place: RankInfo, timeout_s: float) -> Connect:
    """Serve the store in rank 0, at the place's own address alone; returns what opens a client.

    Raises UserError (no address, a port in use), RankLost (rank 0 is not there, or another program answers).
    """
    if place.address is None or place.port is None:
        raise UserError(
            f"{place.launcher} does not say where rank 0 is; set MASTER_ADDR and MASTER_PORT, or set world.engine=horovod"
        )
    address, port, timeout = place.address, place.port, timedelta(seconds=timeout_s)
    # A launcher's own store outlives us: what was agreed in it before, in another attempt or earlier in this process, is over.
    scope = "" if place.serve_store else f"{place.attempt}/{next(_store_numbers)}"
    served = []
    if place.rank == 0 and place.serve_store:
        served.append(_serve(place, address, port, timeout))

    def connect() -> SharedStore:
        servers = served  # the server lives as long as somebody may connect
        assert servers or place.rank or not place.serve_store
        try:
            # torch limits the time to connect, not the time that a connected stranger takes to answer.
            store = _within(
                timeout_s + ANSWER_S,
                lambda: TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False),
            )
            return SharedStore(store, place.secret, scope)
        except (TimeoutError, dist.DistError, RuntimeError) as error:
            raise RankLost(_not_reached(address, port, timeout_s)) from error

    connect()
    return connect


def _not_reached(address: str, port: int, timeout_s: float) -> str:
    """Say why rank 0 cannot be reached there. How torch fails depends on the moment; whether anybody listens does not."""
    try:
        with socket.create_connection((address, port), ANSWER_S):
            pass
    except OSError:
        why = f"no connection to it at {address}:{port} within {timeout_s:g} s: not started, killed or behind a firewall"
        return f"{gone(0, why).text}; look at rank 0's messages"
    why = f"what listens at {address}:{port} does not answer as rank 0 does: it stands still, or another program has that port"
    return f"{gone(0, why).text}; choose another port (MASTER_PORT), or start with --np, which finds a free one"


def own_address(name: str, nodes: int) -> str:
    """Return this machine's address, by a name that the other nodes know it by.

    Raises UserError where that leads them nowhere.
    """
    address = socket.gethostbyname(name)
    if nodes > 1 and address.startswith("127.") and name != "localhost" and name != address:
        raise UserError(
            f"rank 0's name {name} is {address} on its own machine (/etc/hosts), where other nodes cannot reach it; set "
            "MASTER_ADDR to the address by which they do"
        )
    return address


def _serve(place: RankInfo, address: str, port: int, timeout: timedelta) -> Any:
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
    results: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 (raised below, on the caller's thread)
            raised.append(error)

    thread = threading.Thread(target=run, name="fastdistil-connects", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not results:
        raise TimeoutError
    return results[0]


def choose_interface(place: RankInfo) -> None:
    """Gloo takes the interface that this host's name resolves to, often the wrong one: take the one towards rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.address, place.port))
        address = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(interface.address == address for interface in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("HOROVOD_GLOO_IFACE", name)
            return
