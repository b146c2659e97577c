"""Of pipeline.transfer and pipeline.partial: what the hub on loopback does not show."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

from pipeline.download import http as downloads
from pipeline.download.http import Patience, fetch, told_wait
from pipeline.download.partial_file import Partial
from pipeline.runtime.errors import UserError

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=12;t=55'}, None),  # not what the refusal is about
        ({"Retry-After": "3", "RateLimit": '"api";r=0;t=55'}, 3),
        ({}, None),
    ],
)
def test_a_wait_is_read_from_headers(headers: Mapping[str, str], seconds: float | None) -> None:
    assert told_wait(headers) == seconds


def test_a_wait_may_be_a_date() -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=30)
    wait = told_wait({"Retry-After": format_datetime(soon, usegmt=True)})
    assert wait is not None
    assert 28 < wait <= 30
    assert told_wait({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


def test_patience_ends_and_progress_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    patience = Patience("a.parquet", 100)

    def wait_on() -> None:
        while True:
            patience.wait("reset")

    with pytest.raises(UserError, match=r"^a\.parquet: reset: no progress in 100 s"):
        wait_on()
    assert 60 < sum(slept) <= 100
    assert slept[0] < 1 < slept[3]
    patience.progress()
    slept.clear()
    patience.wait("HTTP 429", told=90)
    assert slept[0] >= 90
    with pytest.raises(UserError, match="asks for a wait of 90 s"):
        patience.wait("HTTP 429", told=90)


def test_a_partial_file_is_taken_up(tmp_path: Path) -> None:
    with Partial(tmp_path, len(DATA), git=True) as first:
        first.restart('"v1"')
        first.append(DATA[:1000])
    with Partial(tmp_path, len(DATA), git=True) as second:
        assert (second.done, second.etag) == (1000, '"v1"')
        second.append(DATA[1000:])
        assert second.sha256 == SHA256
        assert second.git == hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
        assert second.path.read_bytes() == DATA
    # One that is longer than the file is of another.
    with Partial(tmp_path, 10) as third:
        assert (third.done, third.etag) == (0, None)
        third.append(b"0123456789")
        third.restart('"v2"')
        assert (third.path.read_bytes(), third.etag) == (b"", '"v2"')
        assert third.sha256 == hashlib.sha256().hexdigest()


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves DATA with ranges, says what was asked, and goes elsewhere where told to."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, Mapping[str, str]]]
    elsewhere: str | None = None

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        if self.path == "/moved" and self.elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{self.elsewhere}/data?Signature=secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        self.wfile.write(DATA[start:])

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def servers() -> Iterator[list[tuple[str, type[Answers]]]]:
    """Two servers: their addresses, and what they were asked."""
    running, made = [], []
    for _ in range(2):
        handler = type("Handler", (Answers,), {"asked": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        made.append((f"http://127.0.0.1:{server.server_port}", handler))
    yield made
    for server in running:
        server.shutdown()
        server.server_close()


def test_the_token_stays_with_the_first_server(
    servers: list[tuple[str, type[Answers]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here, hub), (there, storage) = servers
    hub.elsewhere = there
    # A password for either host in ~/.netrc is neither's token.
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with Partial(tmp_path, len(DATA)) as partial:
        partial.restart('"v1"')
        partial.append(DATA[:5000])
        fetch("a", f"{here}/moved", partial, SHA256, "hf_x", patience=5)
        assert partial.path.read_bytes() == DATA
    assert hub.asked[0][1]["Authorization"] == "Bearer hf_x"
    assert "Authorization" not in storage.asked[0][1]
    assert storage.asked[0][1]["Range"] == "bytes=5000-"
    assert storage.asked[0][1]["If-Range"] == '"v1"'


def test_a_file_that_is_whole_is_not_asked_for(
    servers: list[tuple[str, type[Answers]]], tmp_path: Path
) -> None:
    (here, hub), _ = servers
    with Partial(tmp_path, len(DATA)) as partial:
        partial.append(DATA)
        fetch("a", f"{here}/data", partial, SHA256, None, patience=5)
    assert hub.asked == []
    # Zeros, where a power cut took the pages: noticed, and fetched once more.
    (tmp_path / "data").write_bytes(DATA[:4096] + bytes(len(DATA) - 4096))
    with Partial(tmp_path, len(DATA)) as partial:
        fetch("a", f"{here}/data", partial, SHA256, None, patience=5)
        assert partial.path.read_bytes() == DATA
    assert "Range" not in hub.asked[0][1]


def test_no_signed_address_is_printed(
    servers: list[tuple[str, type[Answers]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here, hub), _ = servers
    hub.elsewhere = "http://127.0.0.1:9"
    with (
        Partial(tmp_path, len(DATA)) as partial,
        pytest.raises(UserError, match="the connection was refused"),
    ):
        fetch("a", f"{here}/moved", partial, SHA256, "hf_x", patience=2)
    said = capsys.readouterr().out
    assert "the connection was refused" in said
    assert "Signature" not in said
    assert "hf_x" not in said


def test_too_many_redirects_end(
    servers: list[tuple[str, type[Answers]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here, hub), (there, _) = servers
    hub.elsewhere = there
    monkeypatch.setattr(downloads, "_MAX_REDIRECTS", 1)
    with Partial(tmp_path, len(DATA)) as partial, pytest.raises(UserError, match="redirected"):
        fetch("a", f"{here}/moved", partial, SHA256, None, patience=1)
