"""Emulated networks on one machine: a namespace for each rank, caps in bit/s for a TCP flow or for a whole link.

    with Network(2, flow_mbit=500) as network:
        ranks = [network.run(rank, [sys.executable, "rank.py"], {"RANK": str(rank)}) for rank in range(2)]

Two ranks are the ends of a veth pair; more hang on a bridge in one more namespace. Each direction has caps of its own, as a
full-duplex link has. Needs root, util-linux and iproute2. The namespaces have no names and are held by file descriptors of this
process: the kernel removes them with everything in them when it ends, however it ends.

A cap for a flow imitates clouds that limit each TCP connection: HTB with a class for each flow, chosen by u32 filters (kernels
for small machines have neither fq nor netem). Which class: Linux gives even ephemeral ports to sockets that connect and odd
ones to sockets that listen, so the even one names the flow, as each flow of a listener has the same odd one.

As a script, it shows what the caps do to plain sockets: `python benchmarks/network.py --flows 4 --flow-mbit 100`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

INTERFACE = "eth0"
CLASSES = 1024
"""Two flows share one, and so its cap, with a chance of 1 in 1024."""
FIRST = 2
"""Number of the first of them. 1 is the link; OTHER, what is no TCP: address resolution."""
OTHER = FIRST + CLASSES
COMMANDS = ("unshare", "nsenter", "setpriv", "ip", "tc")


def missing() -> str | None:
    """Why no network can be emulated here; None: it can."""
    if os.geteuid() != 0:
        return "emulated networks need root"
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if absent:
        return f"emulated networks need {', '.join(absent)} (util-linux, iproute2)"
    try:
        with Network(2, flow_mbit=1000, link_mbit=1000):
            return None
    except NetworkError as error:
        return f"emulated networks: {error}"


class NetworkError(Exception):
    """The machine refused a namespace, a device or a filter."""


class Network:
    """`ranks` namespaces, each with `lo` and `eth0` (10.77.0.rank+1); nothing leads out of them."""

    def __init__(self, ranks: int, *, flow_mbit: float | None = None, link_mbit: float | None = None) -> None:
        """flow_mbit: cap of each TCP flow, link_mbit: of all that a rank sends, and of all it receives; 10^6 bit/s."""
        assert 2 <= ranks <= 200, ranks
        self.ranks = ranks
        self.flow_mbit = flow_mbit
        self.link_mbit = link_mbit
        self._stack = ExitStack()
        self._namespaces: list[str] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._namespaces = [stack.enter_context(_Namespace()).path for _ in range(self.ranks)]
            if self.ranks == 2:
                self._pair(self._namespaces[0], self._namespaces[1], INTERFACE)
            else:
                self._bridge(stack.enter_context(_Namespace()).path)
            for rank, namespace in enumerate(self._namespaces):
                _batch(
                    namespace,
                    "ip",
                    [
                        "link set lo up",
                        f"address add {self.address(rank)}/24 dev {INTERFACE}",
                        f"link set {INTERFACE} addrgenmode none up",  # no IPv6, which would send by itself
                    ],
                )
                _batch(namespace, "tc", list(_caps(INTERFACE, self.flow_mbit, self.link_mbit)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def address(self, rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def run(self, rank: int, argv: list[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process in a rank's namespace; `env` is added to this process's, `options` go to Popen. It is killed with
        this process, and when the network is left."""
        names = {"GLOO_SOCKET_IFNAME": INTERFACE, "HOROVOD_GLOO_IFACE": INTERFACE}
        command = ["setpriv", "--pdeathsig", "KILL", *_inside(self._namespaces[rank]), *argv]
        return self._stack.enter_context(_killed(subprocess.Popen(command, env={**os.environ, **names, **env}, **options)))

    def tx_bytes(self, rank: int) -> int:
        """Bytes a rank has sent, headers included, as its network device counted them."""
        shown = _call([*_inside(self._namespaces[rank]), "ip", "-json", "-stats", "link", "show", INTERFACE])
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def flow_bytes(self, rank: int) -> list[int]:
        """The same for each TCP flow, most first. Counted by the classes: needs `flow_mbit`."""
        assert self.flow_mbit is not None
        shown = _call([*_inside(self._namespaces[rank]), "tc", "-stats", "class", "show", "dev", INTERFACE])
        classes = re.findall(r"^class htb 1:([0-9a-f]+) .*\n Sent (\d+) bytes", shown, re.MULTILINE)
        sent = [int(count) for number, count in classes if FIRST <= int(number, 16) < FIRST + CLASSES]
        return sorted(filter(None, sent), reverse=True)

    def _pair(self, namespace: str, other: str, peer: str) -> None:
        _batch(namespace, "ip", [f"link add {INTERFACE} type veth peer name {peer} netns {other}"])

    def _bridge(self, switch: str) -> None:
        _batch(switch, "ip", ["link add bridge type bridge", "link set bridge up"])
        for rank, namespace in enumerate(self._namespaces):
            self._pair(namespace, switch, f"port{rank}")
            _batch(switch, "ip", [f"link set port{rank} master bridge", f"link set port{rank} up"])
            # What several ranks send to one: two ends of a pair have this by themselves.
            _batch(switch, "tc", list(_caps(f"port{rank}", None, self.link_mbit)))


@contextmanager
def _killed(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class _Namespace:
    """A network namespace; leaving it kills what runs in it, such as children that processes left behind."""

    def __enter__(self) -> Self:
        # What the shell writes says that it lives in the namespace; it ends with its input.
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        with holder:
            if not holder.stdout.readline():
                raise NetworkError(holder.stderr.read().strip())
            self._descriptor = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while inhabitants := list(self._inhabitants()):
                for pid in inhabitants:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        finally:
            os.close(self._descriptor)

    def _inhabitants(self) -> Iterator[int]:
        here = os.fstat(self._descriptor)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                there = (process / "ns" / "net").stat()  # a zombie has none
            except OSError:
                continue
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                yield int(process.name)


def _caps(device: str, flow_mbit: float | None, link_mbit: float | None) -> Iterator[str]:
    """tc's commands."""
    if flow_mbit is None and link_mbit is None:
        return
    default = OTHER if flow_mbit is not None else 1
    yield f"qdisc add dev {device} root handle 1: htb default {default:x}"
    parent = "1:"
    if link_mbit is not None:
        yield f"class add dev {device} parent 1: classid 1:1 htb {_rate(link_mbit, link_mbit)}"
        parent = "1:1"
    if flow_mbit is not None:
        # A class may always send at its own rate, whatever its parent's: below a link all but a trace is borrowed from it.
        rate = _rate(flow_mbit if link_mbit is None else min(flow_mbit, link_mbit) / CLASSES, flow_mbit)
        for number in (*range(FIRST, FIRST + CLASSES), OTHER):
            yield f"class add dev {device} parent {parent} classid 1:{number:x} htb {rate}"
        yield from _filters(device)


def _rate(mbit: float, ceiling_mbit: float) -> str:
    # HTB may send late by a timer's tick: a millisecond's worth, and at least one packet as segmentation offload makes them.
    burst = max(65536, int(ceiling_mbit * 1e6 / 8 / 1000))
    return f"rate {int(mbit * 1e6)}bit ceil {int(ceiling_mbit * 1e6)}bit burst {burst} cburst {burst} quantum 60000"


def _filters(device: str) -> Iterator[str]:
    """Class FIRST + bits 1 to 10 of the port that names the flow: 8 of them by hash, 2 by comparison."""
    add = f"filter add dev {device} parent 1: protocol ip prio 1"
    ports = 20  # bytes of an IP header; the word after it holds both, the source's in its upper half
    for table, shift in ((2, 16), (3, 0)):
        yield f"{add} handle {table}: u32 divisor 256"
        for number in range(CLASSES):
            value, mask = (number >> 8) << 9 << shift, 0x3 << 9 << shift
            match = f"match u32 {value:#x} {mask:#x} at {ports} flowid 1:{FIRST + number:x}"
            yield f"{add} u32 ht {table}:{number & 0xFF:x}: {match}"
    for match, table in (
        ("match ip sport 0x8000 0x8001", 2),  # ephemeral and even: this end connected
        ("match ip dport 0x8000 0x8001", 3),  # the other one did
        ("match ip sport 0x8000 0x8000", 2),  # neither says so: the ephemeral port of this end
        ("match ip dport 0x8000 0x8000", 3),
        ("match u32 0 0", 2),
    ):
        mask = 0x1FE << (16 if table == 2 else 0)
        yield f"{add} u32 ht 800:: match ip protocol 6 0xff {match} link {table}: hashkey mask {mask:#010x} at {ports}"


def _inside(namespace: str) -> list[str]:
    return ["nsenter", f"--net={namespace}"]


def _batch(namespace: str, tool: str, commands: list[str]) -> None:
    if commands:
        _call([*_inside(namespace), tool, "-batch", "-"], "".join(f"{command}\n" for command in commands))


def _call(argv: list[str], text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    """Every rank exchanges bytes with rank 0 over parallel flows, in both directions at once."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--flow-mbit", type=float)
    parser.add_argument("--link-mbit", type=float)
    parser.add_argument("--flows", type=int, default=1, help="of each rank with rank 0")
    parser.add_argument("--megabytes", type=float, default=10.0, help="that each end of a flow sends")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(*_exchange(options))
        return
    if reason := missing():
        print(reason, file=sys.stderr)
        sys.exit(2)
    with Network(options.ranks, flow_mbit=options.flow_mbit, link_mbit=options.link_mbit) as network:
        argv = [sys.executable, __file__, *sys.argv[1:], "--address", network.address(0), "--rank"]
        ends = [network.run(rank, [*argv, str(rank)], {}, stdout=subprocess.PIPE) for rank in range(options.ranks)]
        print(json.dumps({"pids": [end.pid for end in ends]}), flush=True)
        outputs = [end.communicate()[0] for end in ends]
        if any(end.returncode for end in ends):
            sys.exit(f"ranks ended with {[end.returncode for end in ends]}")
        begun, ended = zip(*(map(float, output.split()) for output in outputs), strict=True)
        result = {
            "seconds": [moment - min(begun) for moment in ended],
            "tx_bytes": [network.tx_bytes(rank) for rank in range(options.ranks)],
        }
        if options.flow_mbit is not None:
            result["flow_bytes"] = [network.flow_bytes(rank) for rank in range(options.ranks)]
        print(json.dumps(result))


def _exchange(options: argparse.Namespace) -> tuple[float, float]:
    """When the first byte could leave this rank and when the last one had come, by the clock that the ranks share."""
    where = (options.address, 29500)
    if options.rank == 0:
        with socket.create_server(where) as server:
            flows = [server.accept()[0] for _ in range(options.flows * (options.ranks - 1))]
    else:
        flows = [_connected(where) for _ in range(options.flows)]
    begun = time.monotonic()
    data = bytes(round(options.megabytes * 1e6))
    for flow in flows:
        threading.Thread(target=flow.sendall, args=(data,)).start()
    receivers = [threading.Thread(target=_receive, args=(flow, len(data))) for flow in flows]
    for receiver in receivers:
        receiver.start()
    for receiver in receivers:
        receiver.join()
    return begun, time.monotonic()


def _connected(where: tuple[str, int]) -> socket.socket:
    while True:  # until rank 0 listens; if it never does, whoever waits for both ends this one
        try:
            return socket.create_connection(where)
        except ConnectionRefusedError:
            time.sleep(0.01)


def _receive(flow: socket.socket, size: int) -> None:
    while size:
        got = flow.recv(min(size, 2**20))
        assert got, "the other end left"
        size -= len(got)


if __name__ == "__main__":
    main()
