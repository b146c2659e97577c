"""Tests for tests.support.hub: the clients huggingface_hub and datasets accept it as a hub."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, RepoFile, RepoFolder
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.hub import FINEWEB, TOKEN, Hub

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
    """Return a file fetched by hf_hub_download."""
    local = api.hf_hub_download(
        FINEWEB, path, repo_type="dataset", revision=revision, cache_dir=tmp_path / "cache"
    )
    return Path(local).read_bytes()


def test_a_listing_has_sizes_and_hashes_and_is_paged(hub: Hub, api: HfApi) -> None:
    hub.page_size = 2
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


def test_branches_tags_and_commits_resolve_to_a_commit(
    hub: Hub, api: HfApi, tmp_path: Path
) -> None:
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


def test_a_file_comes_from_another_origin_which_gets_no_token(
    hub: Hub, api: HfApi, tmp_path: Path
) -> None:
    assert fetch(api, tmp_path) == FILES[FIRST]
    assert b"config_name: sample-10BT" in fetch(api, tmp_path, "README.md")
    assert hub.sent() == {FIRST: SIZE}
    assert {request.authorization for request in hub.asked("cdn")} == {None}
    assert {request.authorization for request in hub.asked("resolve")} == {f"Bearer {TOKEN}"}
    url = f"{hub.cdn}/{hashlib.sha256(FILES[FIRST]).hexdigest()}?Signature=x"
    assert requests.get(url, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 400


def test_each_kind_of_refusal_raises_its_own_error(hub: Hub, api: HfApi, tmp_path: Path) -> None:
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


SCRIPT = f"""
import datasets
builder = datasets.load_dataset_builder({FINEWEB!r}, "sample-10BT", revision="v1")
print(*builder.config.data_files["train"], sep="\\n")
print(datasets.get_dataset_config_names({FINEWEB!r}))
"""


def test_datasets_resolves_a_configuration(hub: Hub, tmp_path: Path) -> None:
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
