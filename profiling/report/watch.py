"""The page of `fastdistil watch`: a run as it goes, served on this machine.

    /          the report of the run so far, as a page (live.py)
    /strip     the top of it: progress, time left, health, the log's last lines
    /watch.js  puts what is new into the page, in place

The page asks for the strip every 2 seconds, and not at all while nobody looks at it.

Who may read: on a loopback address whoever can reach it, by a name that means this machine (any other Host header comes from
a page elsewhere whose name was pointed here: DNS rebinding). On another address only who has the token of the printed URL,
which the first answer turns into a cookie, so that it stays in no history and no Referer. Nothing is encrypted.
"""

import errno
import hmac
import ipaddress
import re
import secrets
import socket
import socketserver
import sys
import threading
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastdistil.errors import UserError
from fastdistil.profiling.report.live import Live

_SCRIPT = Path(__file__).parent / "static" / "watch.js"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_REQUEST = re.compile(rb"[!-~]+ /[!-~]* HTTP/1\.[01]\r?\n")


def watch(directory: Path, host: str, port: int) -> None:
    """Serve until Ctrl-C. Raises UserError as `WatchServer` does."""
    with WatchServer(directory, host, port) as server:
        print(f"watching {directory}: {server.url}")
        if server.token is not None:
            print("whoever has this URL can read the run, and so can whoever listens on the network: nothing is encrypted")
        print("Ctrl-C ends this page, not the run", flush=True)
        try:
            server.serve_forever(poll_interval=2.0)  # a Ctrl-C just before it falls asleep waits that long
        except KeyboardInterrupt:
            print("no longer watching", file=sys.stderr)


class WatchServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves one run directory. `url` is what to open; it carries the token, if there is one."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, directory: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        """port 0: a free one. Raises UserError: no directory, no address of this machine, port in use."""
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is not a directory; give that of a run, e.g. runs/NAME")
        self.address_family, address = _resolved(host)
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        self.live, self.lock = Live(directory), threading.Lock()
        self.token = None if loopback else secrets.token_urlsafe(24)
        self.names = {"localhost", host.lower()} if loopback else {"localhost", host.lower(), socket.gethostname().lower()}
        self.script = _SCRIPT.read_bytes()
        try:
            super().__init__((address, port), _Answer)
        except OSError as error:
            raise UserError(self._refused(host, address, port, error)) from error
        self.port = int(self.server_address[1])
        anywhere = ipaddress.ip_address(address.partition("%")[0]).is_unspecified
        shown = socket.gethostname() if anywhere else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}/" + (f"?token={self.token}" if self.token is not None else "")

    def _refused(self, host: str, address: str, port: int, error: OSError) -> str:
        if error.errno == errno.EADDRNOTAVAIL:
            return f"--host {host} is no address of this machine; leave it out to watch from here, or give one of its own"
        with socket.socket(self.address_family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return f"port {port} cannot be had ({error.strerror}); --port {probe.getsockname()[1]} is free"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a page that was closed meanwhile, or reads no more
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    server: WatchServer
    raw_requestline: bytes
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fastdistil", ""
    timeout = 60.0
    disable_nagle_algorithm = True

    def parse_request(self) -> bool:
        """Refuse, before more of it is read, what asks for no path of this server: HTTP/0.9, addresses of others, noise."""
        if _REQUEST.fullmatch(self.raw_requestline):
            return super().parse_request()
        self.command = self.requestline = ""
        self.request_version, self.close_connection = self.protocol_version, True
        self._refuse(HTTPStatus.BAD_REQUEST, "wanted GET /PATH HTTP/1.1")
        return False

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # nobody reads it; it must not be taken for the next request
        if not self._host_is_ours():
            self._refuse(
                HTTPStatus.FORBIDDEN, "this name is not this machine's; open the address that fastdistil watch printed"
            )
            return
        path, _, fields = self.path.partition("#")[0].partition("?")
        query = parse_qs(fields)
        if self.server.token is not None and not self._has_cookie():
            if _same(query.get("token", [""])[0], self.server.token):
                self._take_in()
            else:
                self._refuse(HTTPStatus.FORBIDDEN, "open the whole URL that fastdistil watch printed, with its token")
        elif path == "/watch.js":
            self._send(HTTPStatus.OK, "text/javascript; charset=utf-8", self.server.script, **{"Cache-Control": "no-cache"})
        elif path in ("/", "/strip"):
            self._live(path)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _only_get(self) -> None:
        self.close_connection = True
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET", Allow="GET")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _only_get

    def _host_is_ours(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1:
            return False
        try:
            name = urlsplit(f"//{hosts[0]}").hostname or ""  # the port may be another: ssh -L
        except ValueError:
            return False
        if name in self.server.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address is no name that could be pointed elsewhere.
        return address.is_loopback or self.server.token is not None

    @property
    def _cookie(self) -> str:
        """Cookies of one host are shared by its ports."""
        return f"fastdistil-watch-{self.server.port}"

    def _has_cookie(self) -> bool:
        assert self.server.token is not None
        try:
            morsel = SimpleCookie("; ".join(self.headers.get_all("Cookie", []))).get(self._cookie)
        except CookieError:
            return False
        return morsel is not None and _same(morsel.value, self.server.token)

    def _take_in(self) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        # Lax, not Strict: a link in a chat leads here too. There is only GET, and it changes nothing.
        self.send_header("Set-Cookie", f"{self._cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Lax")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _live(self, path: str) -> None:
        with self.server.lock:
            self.server.live.refresh()
            body, version = self.server.live.page()
            body = self.server.live.strip() if path == "/strip" else body
        tag = f'"{version}"'
        if path == "/" and self.headers.get("If-None-Match") == tag:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.send_header("ETag", tag)
            self.end_headers()
        else:
            headers = {"Cache-Control": "no-cache", "ETag": tag} if path == "/" else {"Cache-Control": "no-store"}
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", body, **headers)

    def _refuse(self, status: HTTPStatus, why: str, **headers: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{why}\n".encode(), **headers)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class' name)
        """A line for each poll is for nobody; and the token is in the first one."""


def _resolved(host: str) -> tuple[socket.AddressFamily, str]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host!r} is no address ({error}); give one of this machine's, e.g. 0.0.0.0 for all") from error
    return family, str(address[0])


def _same(presented: str, token: str) -> bool:
    """Compare in a time that tells nothing of how much of it was right."""
    return hmac.compare_digest(presented.encode(), token.encode())
