"""`fastdistil watch` without a browser: who may read it, and how it starts and ends."""

import errno
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from fastdistil.errors import UserError
from fastdistil.profiling.report.watch import WatchServer
from tests.profiling.followed_run import append, serving, start, train

# ---- who may read it


def ask(
    server: WatchServer,
    path: str = "/strip",
    method: str = "GET",
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_the_page_and_its_strip_are_served_with_headers_that_keep_others_out(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with serving(tmp_path) as server:
        assert server.token is None
        for path, kind in {"/": "text/html", "/strip": "text/html", "/watch.js": "text/javascript"}.items():
            status, headers, body = ask(server, path)
            assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
            assert body
            policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["connect-src"] == "'self'"
            assert headers["x-content-type-options"] == "nosniff"
        tag = ask(server, "/")[1]["etag"]
        assert ask(server, "/", **{"If-None-Match": tag})[0] == 304
        append(tmp_path, {"event": "done", "update": 100, "time": 2.0})
        status, headers, _ = ask(server, "/", **{"If-None-Match": tag})
        assert (status, headers["etag"] != tag) == (200, True)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
def test_only_get_is_answered(tmp_path: Path, method: str) -> None:
    with serving(tmp_path) as server:
        status, headers, _ = ask(server, "/", method)
        assert (status, headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "path",
    [
        "/events.jsonl",
        "/recipe.yaml",
        "/static/",
        "/../recipe.yaml",
        "/%2e%2e/recipe.yaml",
        "//etc/passwd",
        "/watch.js/",
        "/watch.py",
    ],
)
def test_nothing_else_is_served(tmp_path: Path, path: str) -> None:
    append(tmp_path, start())
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with serving(tmp_path) as server:
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9000", 200),  # ssh -L 9000:localhost:8642
        ("127.0.0.1", 200),
        ("[::1]:8642", 200),
        ("LOCALHOST", 200),
        ("rebound.example:8642", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("10.0.0.7", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_name_that_was_pointed_here_is_refused(tmp_path: Path, host: str, status: int) -> None:
    with serving(tmp_path) as server:
        assert ask(server, "/", Host=host)[0] == status
        assert ask(server, "/strip", Host=host)[0] == status


def test_another_address_asks_for_the_token(tmp_path: Path) -> None:
    append(tmp_path, start())
    with serving(tmp_path, "0.0.0.0") as server:
        token = parse_qs(urlsplit(server.url).query)["token"][0]
        assert token == server.token
        assert len(token) >= 32
        cookie = {"Cookie": f"fastdistil-watch-{server.port}={token}"}
        for path in ("/", "/watch.js", "/strip", "/nothing"):
            assert ask(server, path)[0] == 403
            assert ask(server, f"{path}?token=")[0] == 403
            assert ask(server, f"{path}?token={token[:-1]}")[0] == 403
            assert ask(server, f"{path}?token=%F0%9F%98%80%ED%A0%80")[0] == 403
            assert ask(server, path, Cookie=f"fastdistil-watch-{server.port}=x; {cookie['Cookie'][:-1]}")[0] == 403
        status, headers, _ = ask(server, f"/?token={token}")
        assert (status, headers["location"]) == (303, "/")
        set_cookie = headers["set-cookie"]
        assert set_cookie.startswith(cookie["Cookie"])
        assert "HttpOnly" in set_cookie
        assert "SameSite=Lax" in set_cookie
        assert ask(server, "/", **cookie)[0] == 200
        assert ask(server, "/strip", **cookie)[0] == 200
        assert ask(server, "/strip", Host="rebound.example", **cookie)[0] == 403
    with WatchServer(tmp_path, "0.0.0.0") as other:
        assert other.token != token


def test_two_requests_in_one_connection_and_a_body_that_nobody_asked_for(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer,
    ):
        hidden = b"GET /strip HTTP/1.1\r\nHost: localhost\r\n\r\n"
        peer.sendall(
            b"GET /watch.js HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(hidden), hidden),
        )
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"Content-Type: text/html" not in answer


ODD_REQUESTS = {
    "no version": (b"GET /\r\n", 400),  # HTTP/0.9, whose answer has no status
    "no path": (b"GET\r\n\r\n", 400),
    "an empty line": (b"\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400),
    "version 2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "version 1.x": (b"GET / HTTP/1.x\r\nHost: localhost\r\n\r\n", 400),
    "four words": (b"GET / HTTP/1.1 x\r\nHost: localhost\r\n\r\n", 400),
    "no address": (b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "another's address": (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a proxy's": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "NUL": (b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "not ASCII": ("GET /\u2100 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 400),
    "percents": (b"GET /%zz%00%ff%?since=%ff%00% HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "brackets": (b"GET //[/../ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a long path": (b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 70_000), 414),
    "a long header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %b\r\n\r\n" % (b"a" * 70_000), 431),
    "many headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (b"X: y\r\n" * 300), 431),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 403),
    "a host of bytes": (b"GET / HTTP/1.1\r\nHost: \xff\x00[\r\n\r\n", 403),
    "no method": (b"__class__ / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "a long query": (b"GET /strip?since=%b HTTP/1.0\r\nHost: localhost\r\n\r\n" % (b"9" * 5_000), 200),
    "a cookie of bytes": (b"GET / HTTP/1.0\r\nHost: localhost\r\nCookie: \xff=\x01;;==\r\n\r\n", 200),
}


def test_odd_requests_are_answered_with_a_status_and_no_traceback(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    append(tmp_path, start(), train(1, 1.0))
    with serving(tmp_path) as server:
        for name, (request, status) in ODD_REQUESTS.items():
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as peer:
                peer.sendall(request)
                assert peer.recv(65536).startswith(b"HTTP/1.1 %d " % status), name
        assert ask(server)[0] == 200
    assert capsys.readouterr().err == ""


def test_a_page_that_reads_no_more_is_no_error_of_ours(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WatchServer(tmp_path) as server:
        for error in (TimeoutError("timed out"), BrokenPipeError()):
            try:
                raise error
            except OSError:
                server.handle_error(None, ("127.0.0.1", 1))
    assert capsys.readouterr().err == ""


# ---- how it is started and ended


def test_a_port_in_use_is_an_error_that_names_a_free_one(tmp_path: Path) -> None:
    with WatchServer(tmp_path) as first, pytest.raises(UserError, match=r"--port (\d+) is free") as caught:
        WatchServer(tmp_path, port=first.port)
    named = re.search(r"--port (\d+)", str(caught.value))
    assert named is not None
    with WatchServer(tmp_path, port=int(named[1])) as second:
        assert second.port == int(named[1])


def test_addresses_and_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no address of this machine"):
        WatchServer(tmp_path, "192.0.2.1")
    with pytest.raises(UserError, match="is no address"):
        WatchServer(tmp_path, "no such host.invalid")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="not a directory"):
        WatchServer(file)


def test_ipv6(tmp_path: Path) -> None:
    try:
        server = WatchServer(tmp_path, "::1")
    except UserError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (
            errno.EADDRNOTAVAIL,
            errno.EAFNOSUPPORT,
        ):
            pytest.skip("this machine has no IPv6")
        raise
    with server:
        assert server.url == f"http://[::1]:{server.port}/"
        assert server.token is None


def test_the_command_prints_its_url_serves_and_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    append(tmp_path, start(), train(1, 1.0))
    command = [sys.executable, "-m", "fastdistil", "watch", str(tmp_path), "--port", "0"]
    # As a terminal starts it; a shell that runs the tests in the background has its children ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/$", first.strip())[1])  # type: ignore[index]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/strip")
            assert b"1 of 100 (1.0%)" in connection.getresponse().read()
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in mapped  # following a run costs its machine little
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)  # an open connection does not hold it
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_the_command_tells_of_a_port_in_use(tmp_path: Path) -> None:
    with WatchServer(tmp_path) as first:
        command = [sys.executable, "-m", "fastdistil", "watch", str(tmp_path), "--port", str(first.port)]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "COLUMNS": "200"},
        )
    assert ended.returncode == 2
    assert re.fullmatch(rf"fastdistil: port {first.port} cannot be had .*--port \d+ is free\n", ended.stderr)
