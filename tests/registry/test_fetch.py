"""Importing from URLs: what is taken, and what is refused, within limits of size and time."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
from click.testing import CliRunner, Result
from registry_samples import signed, verdict

from tilebook import op as ops
from tilebook.cli import main
from tilebook.cli.fetch import _Redirects
from tilebook.errors import RegistryError
from tilebook.registry import Registry

OP = ops.get("rms_norm_fwd")
TEXT = signed({"type": "verdict", **verdict(problem=OP.problem.parse("M64,N256", "bf16").key, config={}).portable()})
SENT: list[int] = []  # bytes of what had no end
OVER = threading.Event()  # lets go what a server holds back


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = TEXT.encode()
        if self.path == "/gone":
            self.send_error(404, "no \x1b[31mred")
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            if "endless" in self.path:
                self.endless()
            return
        self.send_response(200)
        if self.path == "/endless":  # of no length that it tells
            self.end_headers()
            self.endless()
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/drip":
            self.wfile.write(body[:10])
            self.wfile.flush()
            OVER.wait(60)
            return
        self.wfile.write(body[:20] if self.path == "/torn" else body)

    def endless(self) -> None:
        sent = 0
        while not OVER.is_set():
            try:
                sent += self.wfile.write(b"x" * 65536)
            except OSError:
                break
        SENT.append(sent)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        OVER.set()
        running.shutdown()


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def start(url: str, *more: str, status: int = 0) -> Result:
        result = CliRunner().invoke(main, ["import", url, "--registry", str(tmp_path / "r.db"), *more])
        assert result.exit_code == status, result.output
        return result

    return start


@pytest.mark.parametrize("way", ["/verdicts.jsonl", "/to//verdicts.jsonl", "file"])
def test_what_a_url_names_is_imported_and_not_trusted(
    fetch: Callable[..., Result], server: str, tmp_path: Path, way: str
) -> None:
    (tmp_path / os.fsdecode(b"a file\xff.jsonl")).write_text(TEXT)
    url = f"file://{tmp_path}/a%20file%ff.jsonl" if way == "file" else server + way
    assert "1 verdicts imported" in fetch(url).stderr
    with Registry.open(tmp_path / "r.db") as registry:
        assert [(each.trusted, each.origin) for each in registry.verdicts()] == [(False, "imported")]


@pytest.mark.parametrize(
    ("way", "more", "said"),
    [
        ("/gone", (), "the server answers 404 'no \\x1b[31mred'"),
        ("/torn", (), "line 1 of the import"),
        ("/endless", ("--max-size", "1"), "has more than 1 MB: see --max-size"),
        ("/drip", ("--timeout", "1"), "was not here after 1 s: see --timeout"),
        ("/to/file:///etc/passwd", (), "Redirection to url 'file:///etc/passwd' is not a"),
        ("/to/ftp://127.0.0.1/x", (), "which is not followed"),
    ],
)
def test_what_is_not_within_limits_is_refused_in_one_line(
    fetch: Callable[..., Result], server: str, way: str, more: tuple[str, ...], said: str
) -> None:
    told = fetch(server + way, *more, status=1).stderr
    assert said in told
    assert told.count("\n") == 1
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("url", "status", "said"),
    [
        ("ftp://127.0.0.1/x.jsonl", 2, "only file, http and https URLs"),
        ("file://elsewhere/x.jsonl", 2, "a file of another machine"),
        ("file:///dev/zero", 1, "is no file"),
        ("file:///none.jsonl", 1, "No such file"),
        ("http://127.0.0.1:1/x.jsonl", 1, "cannot be read: "),
        ("http://[nonsense/x.jsonl", 2, "is no URL"),
        ("file:///x%00.jsonl", 2, "no file is called so"),
    ],
)
def test_other_urls_are_refused_in_one_line(fetch: Callable[..., Result], url: str, status: int, said: str) -> None:
    told = fetch(url, status=status).stderr
    assert said in told
    assert told.count("\n") == 1


def test_what_a_server_says_as_it_sends_us_on_is_not_read(fetch: Callable[..., Result], server: str) -> None:
    SENT.clear()
    assert "1 verdicts imported" in fetch(f"{server}/to//verdicts.jsonl?endless", "--timeout", "10").stderr
    waited = time.monotonic() + 5
    while not SENT and time.monotonic() < waited:
        time.sleep(0.01)
    assert SENT
    assert SENT[0] < 16 << 20  # what is on its way


@pytest.mark.parametrize("size", ["inf", "nan", "1e305", "0", "-1"])
def test_what_is_no_size_is_wrong_usage(fetch: Callable[..., Result], size: str) -> None:
    assert "Invalid value for '--max-size'" in fetch("http://127.0.0.1:1/x", "--max-size", size, status=2).stderr


@pytest.mark.parametrize("time", ["1e300", "9e9h"])
def test_a_time_out_may_be_as_long_as_anybody_likes(fetch: Callable[..., Result], server: str, time: str) -> None:
    assert "1 verdicts imported" in fetch(f"{server}/verdicts.jsonl", "--timeout", time).stderr


def test_nobody_is_led_away_from_https() -> None:
    follow = lambda before, after: _Redirects().redirect_request(Request(before), io.BytesIO(), 302, "", None, after)  # type: ignore[arg-type] # noqa: E731
    assert follow("http://a/x", "https://b/x") is not None
    with pytest.raises(RegistryError, match="not followed"):
        follow("https://a/x", "http://b/x")


@pytest.mark.parametrize("raised", [TimeoutError("timed out"), URLError(TimeoutError("timed out"))], ids=repr)
def test_a_connection_that_times_out_first_is_said_to_be_late_too(
    fetch: Callable[..., Result], server: str, monkeypatch: pytest.MonkeyPatch, raised: OSError
) -> None:
    def late(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("urllib.request.OpenerDirector.open", late)
    assert "was not here after 1 s: see --timeout" in fetch(f"{server}/drip", "--timeout", "1", status=1).stderr
