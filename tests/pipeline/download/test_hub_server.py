"""Tests for tests.support.hub: huggingface_hub and datasets read it as they read the hub."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, RepoFile, RepoFolder
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.hub import FINEWEB, TOKEN, Fault, Hub, http_date

SIZE = 300_000
FILES = {
    f"sample/10BT/{i:03d}_00000.parquet": random.Random(i).randbytes(SIZE) for i in range(3)
} | {"data/CC-MAIN-2013-20/000_00000.parquet": random.Random(9).randbytes(1000)}
FIRST = "sample/10BT/000_00000.parquet"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.repo().commit(FILES)
        yield hub


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def fetch(api: HfApi, tmp_path: Path, path: str = FIRST, revision: str | None = None) -> bytes:
    """A file as hf_hub_download brings it."""
    local = api.hf_hub_download(
        FINEWEB, path, repo_type="dataset", revision=revision, cache_dir=tmp_path / "cache"
    )
    return Path(local).read_bytes()


def get(hub: Hub, path: str = FIRST, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A file of the CDN by hand: status, headers, body."""
    sha256 = hashlib.sha256(FILES[path]).hexdigest()
    address = urlsplit(hub.cdn)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET", f"/{sha256}?Signature=x", headers=names)
    response = connection.getresponse()
    try:
        body = response.read()
    except http.client.IncompleteRead as error:
        body = error.partial
    connection.close()
    return response.status, dict(response.headers), body


def test_a_listing_has_sizes_and_hashes_and_is_paged(hub: Hub, api: HfApi) -> None:
    hub.page = 2
    listed = list(api.list_repo_tree(FINEWEB, recursive=True, repo_type="dataset"))
    assert len(hub.asked("tree")) == 5
    files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
    assert set(files) == {"README.md", *FILES}
    for path, data in FILES.items():
        lfs = files[path].lfs
        assert lfs is not None
        assert files[path].size == lfs.size == len(data)
        assert lfs.sha256 == hashlib.sha256(data).hexdigest()
    assert files["README.md"].lfs is None
    folders = {entry.path for entry in listed if isinstance(entry, RepoFolder)}
    assert folders == {"data", "data/CC-MAIN-2013-20", "sample", "sample/10BT"}
    below = list(api.list_repo_tree(FINEWEB, "sample/10BT", repo_type="dataset"))
    assert [entry.path for entry in below] == sorted(p for p in FILES if "10BT" in p)
    (info,) = api.get_paths_info(FINEWEB, [FIRST], repo_type="dataset")
    assert info == files[FIRST]


def test_a_name_is_resolved_to_its_commit(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    repo = hub.repo()
    first = repo.refs["main"]
    changed = {**FILES, FIRST: b"changed"}
    second = repo.commit(changed)
    repo.refs["v1.0.0"] = first
    assert api.dataset_info(FINEWEB).sha == second
    assert api.dataset_info(FINEWEB, revision="v1.0.0").sha == first
    assert api.dataset_info(FINEWEB, revision=first).sha == first
    assert fetch(api, tmp_path) == b"changed"
    assert fetch(api, tmp_path, revision="v1.0.0") == FILES[FIRST]


def test_a_file_comes_from_another_origin_without_the_token(
    hub: Hub, api: HfApi, tmp_path: Path
) -> None:
    assert fetch(api, tmp_path) == FILES[FIRST]
    assert b"config_name: sample-10BT" in fetch(api, tmp_path, "README.md")
    assert hub.sent() == {FIRST: SIZE}
    assert {request.authorization for request in hub.asked("cdn")} == {None}
    assert {request.authorization for request in hub.asked("resolve")} == {f"Bearer {TOKEN}"}
    assert get(hub, Authorization=f"Bearer {TOKEN}")[0] == 400


def test_what_cannot_be_had_is_told_apart(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        fetch(api, tmp_path, "sample/10BT/none.parquet")
    with pytest.raises(RevisionNotFoundError):
        fetch(api, tmp_path, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.dataset_info(FINEWEB, revision="v9")
    with pytest.raises(RepositoryNotFoundError) as missing:
        api.dataset_info("HuggingFaceFW/finewebb")
    assert missing.value.response.status_code == 404
    hub.repo().private = True
    with pytest.raises(RepositoryNotFoundError) as private:
        HfApi(endpoint=hub.endpoint, token=False).dataset_info(FINEWEB)
    assert private.value.response.status_code == 401
    hub.repo().gated = "*"
    with pytest.raises(GatedRepoError):
        fetch(api, tmp_path)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        HfApi(endpoint=hub.endpoint, token="hf_other").dataset_info(FINEWEB)
    assert refused.value.response.status_code == 401
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_ranges(hub: Hub) -> None:
    data = FILES[FIRST]
    status, headers, body = get(hub)
    assert (status, body) == (200, data)
    status, ranged, body = get(hub, Range="bytes=1000-", If_Range=headers["ETag"])
    assert (status, body) == (206, data[1000:])
    assert ranged["Content-Range"] == f"bytes 1000-{SIZE - 1}/{SIZE}"
    assert get(hub, Range="bytes=5-9")[2] == data[5:10]
    assert get(hub, Range="bytes=-7")[2] == data[-7:]
    assert get(hub, Range="bytes=1000-", If_Range='"another"')[::2] == (200, data)
    assert get(hub, Range=f"bytes={SIZE}-")[0] == 416


def test_faults_of_the_body(hub: Hub) -> None:
    data = FILES[FIRST]
    answers = []
    for fault in (
        Fault(close_at=1000),
        Fault(truncate_at=1000),
        Fault(truncate_at=1000, chunked=True),
        Fault(flip=1000),
        Fault(content=b"other", etag="other"),
        Fault(ignore_range=True),
        Fault(shift_range=10),
    ):
        hub.inject(fault)
        answers.append(get(hub, Range="bytes=500-"))
    closed, short, chunked, flipped, other, whole, shifted = answers
    assert closed[1]["Content-Length"] == str(SIZE - 500)
    assert closed[2] == short[2] == chunked[2] == data[500:1000]
    assert short[1]["Content-Length"] == "500"
    assert chunked[1]["Transfer-Encoding"] == "chunked"
    assert [i for i, (a, b) in enumerate(zip(flipped[2], data[500:], strict=True)) if a != b] == [
        500
    ]
    assert other[0] == 416  # the other file ends before byte 500
    assert whole[::2] == (200, data)
    assert (shifted[1]["Content-Range"], shifted[2]) == (
        f"bytes 490-{SIZE - 1}/{SIZE}",
        data[490:],
    )
    hub.inject(Fault(reset_at=100_000))
    with pytest.raises(ConnectionResetError):
        get(hub)
    assert hub.asked("cdn")[-1].sent == 100_000
    assert get(hub)[2] == data  # each fault was met once


def test_faults_by_status_file_and_count(hub: Hub) -> None:
    hub.inject(Fault(status=429, headers={"Retry-After": http_date(2)}), "*/000_*.parquet", times=2)
    assert get(hub, "sample/10BT/001_00000.parquet")[0] == 200
    status, headers, _ = get(hub)
    assert status == 429
    wait = parsedate_to_datetime(headers["Retry-After"]).timestamp() - time.time()
    assert 1.9 < wait <= 3
    assert [get(hub)[0] for _ in range(2)] == [429, 200]


def test_the_real_client_waits_as_it_is_told(hub: Hub, api: HfApi) -> None:
    limit = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.inject(Fault(status=429, headers=limit), route="tree")
    began = time.monotonic()
    assert list(api.list_repo_tree(FINEWEB, recursive=True, repo_type="dataset"))
    assert time.monotonic() - began > 1
    assert [request.status for request in hub.asked("tree")] == [429, 200]


def test_speed(hub: Hub) -> None:
    hub.inject(Fault(rate=SIZE))
    began = time.monotonic()
    assert get(hub)[2] == FILES[FIRST]
    assert 0.9 < time.monotonic() - began < 2
    hub.inject(Fault(stall_at=1000, stall=0.5))
    began = time.monotonic()
    assert get(hub)[2] == FILES[FIRST]
    assert 0.5 < time.monotonic() - began < 1.5


SCRIPT = f"""
import datasets
builder = datasets.load_dataset_builder({FINEWEB!r}, "sample-10BT", revision="v1")
print(*builder.config.data_files["train"], sep="\\n")
print(datasets.get_dataset_config_names({FINEWEB!r}))
"""


def test_datasets_resolves_a_config_there(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repo().commit(FILES, "v1")
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**environment, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *files, names = done.stdout.splitlines()
    found = [f"hf://datasets/{FINEWEB}@{commit}/{path}" for path in FILES if "10BT" in path]
    assert files == found
    assert names == "['default', 'sample-10BT', 'CC-MAIN-2013-20']"
