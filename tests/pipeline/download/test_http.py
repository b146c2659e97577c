"""Tests for pipeline.download.http and pipeline.download.partial_file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.download.http import Patience, fetch, retry_after
from pipeline.download.partial_file import PartialFile
from pipeline.runtime.errors import UserError
from tests.support.hub import FINEWEB, TOKEN, Hub

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        (dict.fromkeys(["Retry-After", "Date"], "Fri, 21 Oct 2050 07:28:00 GMT"), 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=12;t=55'}, None),  # requests remain: another limit was hit
        ({"Retry-After": "3", "RateLimit": '"api";r=0;t=55'}, 3),
        ({}, None),
    ],
)
def test_the_requested_wait_is_read_from_the_headers(
    headers: Mapping[str, str], seconds: float | None
) -> None:
    assert retry_after(headers) == seconds


def test_patience_limits_the_waits_and_progress_resets_it(monkeypatch: pytest.MonkeyPatch) -> None:
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

    with pytest.raises(UserError, match=r"a\.parquet.*patience"):
        wait_on()
    assert 60 < sum(slept) <= 100
    assert slept[0] < 1 < slept[3]
    patience.progress()
    slept.clear()
    patience.wait("HTTP 429", requested=90)
    assert slept[0] >= 90
    with pytest.raises(UserError, match="90 s"):
        patience.wait("HTTP 429", requested=90)


def test_a_partial_file_is_resumed(tmp_path: Path) -> None:
    with PartialFile(tmp_path, len(DATA), git=True) as first:
        first.restart('"v1"')
        first.append(DATA[:1000])
    with PartialFile(tmp_path, len(DATA), git=True) as second:
        assert (second.done, second.etag) == (1000, '"v1"')
        second.append(DATA[1000:])
        assert second.sha256 == SHA256
        assert second.git == hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
        assert second.path.read_bytes() == DATA
    # More bytes than the file has: they belong to another file.
    with PartialFile(tmp_path, 10) as third:
        assert (third.done, third.etag) == (0, None)
        third.append(b"0123456789")
        third.restart('"v2"')
        assert (third.path.read_bytes(), third.etag) == (b"", '"v2"')
        assert third.sha256 == hashlib.sha256().hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.repo().commit({"a.parquet": DATA})
        yield hub


def url_of(hub: Hub) -> str:
    return f"{hub.endpoint}/datasets/{FINEWEB}/resolve/main/a.parquet"


def test_the_token_stays_with_the_first_server(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A password in ~/.netrc must not replace or accompany the token.
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with PartialFile(tmp_path, len(DATA)) as partial:
        partial.restart(f'"cdn-{SHA256[:32]}"')
        partial.append(DATA[:5000])
        fetch("a", url_of(hub), partial, SHA256, TOKEN, patience=5)
        assert partial.path.read_bytes() == DATA
    (asked,), (stored,) = hub.asked("resolve"), hub.asked("cdn")
    assert asked.authorization == f"Bearer {TOKEN}"
    assert stored.authorization is None
    assert (stored.range, stored.status) == ("bytes=5000-", 206)


def test_a_complete_file_is_requested_only_if_its_hash_is_wrong(hub: Hub, tmp_path: Path) -> None:
    with PartialFile(tmp_path, len(DATA)) as partial:
        partial.append(DATA)
        fetch("a", url_of(hub), partial, SHA256, None, patience=5)
    assert hub.requests == []
    # Zeros after a power cut: the hash differs, and the file is fetched again.
    (tmp_path / "data").write_bytes(DATA[:4096] + bytes(len(DATA) - 4096))
    with PartialFile(tmp_path, len(DATA)) as partial:
        fetch("a", url_of(hub), partial, SHA256, None, patience=5)
        assert partial.path.read_bytes() == DATA
    assert [request.range for request in hub.asked("cdn")] == [None]


def test_no_signed_url_and_no_token_is_printed(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.cdn = "http://127.0.0.1:9"
    with (
        PartialFile(tmp_path, len(DATA)) as partial,
        pytest.raises(UserError, match="refused") as error,
    ):
        fetch("a", url_of(hub), partial, SHA256, TOKEN, patience=2)
    printed = capsys.readouterr().out + str(error.value)
    assert "refused" in printed
    assert "Signature" not in printed
    assert TOKEN not in printed


def test_too_many_redirects_are_an_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.download.http._MAX_REDIRECTS", 1)
    with PartialFile(tmp_path, len(DATA)) as partial, pytest.raises(UserError, match="redirect"):
        fetch("a", url_of(hub), partial, SHA256, None, patience=1)
