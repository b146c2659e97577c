"""Tests for source kind `hub`: stage `download` against a loopback hub with faults.

A single run meets many faults at a time, one per file. Most tests call the stage in this process.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.errors import Stopped, UserError
from pipeline.store import atomic
from tests.support.downloads import (
    Downloads,
    Project,
    random_parquet,
    sample_files,
    sample_paths,
    sha256,
)
from tests.support.hub import CARD, FINEWEB, TOKEN, Fault, Hub, http_date
from tests.support.waiting import wait_for

SIZE = 1_000_000
MIDDLE = 400_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def downloads(tmp_path: Path, hub: Hub) -> Downloads:
    return Downloads(tmp_path / "a" / "b" / "project", hub)


# Temporary faults, which must end in the right bytes: name -> faults of one file, in order.
LIMIT = {
    "RateLimit": '"resolvers";r=0;t=1',
    "RateLimit-Policy": '"fixed window";"resolvers";q=9;w=300',
}
RESET = ("cdn", Fault(reset_at=MIDDLE))
FAULTS: dict[str, list[tuple[str, Fault]]] = {
    "nothing": [],
    "429, Retry-After in seconds": [("resolve", Fault(status=429, headers={"Retry-After": "1"}))],
    "429, Retry-After a date": [("cdn", Fault(status=429, headers={"Retry-After": http_date(1)}))],
    "429, RateLimit": [("resolve", Fault(status=429, headers=LIMIT))],
    "429, no header": [("cdn", Fault(status=429))],
    "503, Retry-After": [("cdn", Fault(status=503, headers={"Retry-After": "1"}))],
    "503 twice": [("cdn", Fault(status=503)), ("resolve", Fault(status=503))],
    "500 and 504": [("resolve", Fault(status=500)), ("cdn", Fault(status=504))],
    "reset": [RESET],
    "reset, closed, reset": [
        ("cdn", Fault(reset_at=100_000)),
        ("cdn", Fault(close_at=MIDDLE)),
        ("cdn", Fault(reset_at=900_000)),
    ],
    "reset, range ignored": [RESET, ("cdn", Fault(ignore_range=True))],
    "reset, another range": [RESET, ("cdn", Fault(shift_range=1000))],
    "reset, another ETag": [RESET, ("cdn", Fault(etag="another"))],
    "reset, another file": [RESET, ("cdn", Fault(etag="other", content=random_parquet(99, SIZE)))],
    "reset, URL expired": [RESET, ("cdn", Fault(status=403))],
    "wrong byte": [("cdn", Fault(flip=MIDDLE))],
    "reset, wrong byte": [RESET, ("cdn", Fault(flip=MIDDLE + 1000))],
    "truncated": [("cdn", Fault(truncate_at=MIDDLE))],
    "truncated, chunked": [("cdn", Fault(truncate_at=MIDDLE, chunked=True))],
    "too long": [("cdn", Fault(content=random_parquet(98, 2 * SIZE)))],
    "slow drip": [("cdn", Fault(rate=SIZE / 2))],
}
PATHS = dict(zip(FAULTS, sample_paths(len(FAULTS)), strict=True))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A successful run that met all of `FAULTS`. Its files are those of `served`."""
    files = sample_files(len(FAULTS), SIZE)
    with Hub(page_size=5) as hub:
        # Outside the configuration, but in the listing of the repository.
        evil = dict.fromkeys(("../../evil.parquet", "/evil.parquet"), b"evil")
        hub.repo().commit({**files, **evil})
        for name, faults in FAULTS.items():
            for route, fault in faults:
                hub.inject(fault, PATHS[name], route)
        wait = Fault(status=429, headers={"Retry-After": "1"})
        hub.inject(wait, route="tree")
        hub.inject(Fault(status=503), route="tree")
        project = Project(tmp_path_factory.mktemp("faulty") / "project", hub)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            project.download(patience=60, threads=len(FAULTS))
        project.output += output.getvalue()
        project.check_token()
        yield project


def served(project: Project) -> dict[str, bytes]:
    """Return the files of `sample-10BT` at the newest commit."""
    repo = project.hub.repo()
    files = repo.commits[repo.refs["main"]]
    return {path: data for path, data in files.items() if path.startswith("sample/10BT/")}


def test_temporary_faults_end_in_the_right_bytes(faulty: Project) -> None:
    faulty.check(served(faulty))
    assert list((faulty.store / "partial").rglob("*.parquet")) == []
    assert sum(p.stat().st_size for p in (faulty.store / "partial").rglob("*") if p.is_file()) == 0
    assert [entry for entry in faulty.hub._injected if entry.times] == []  # all faults applied
    resolved = {request.authorization for request in faulty.hub.asked("resolve")}
    assert resolved == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("name", [name for name in FAULTS if name.startswith(("429", "503"))])
def test_retries_wait_as_long_as_the_server_requests(faulty: Project, name: str) -> None:
    asked = [r for r in faulty.hub.asked("*", PATHS[name]) if r.route in ("resolve", "cdn")]
    refused = [i for i, request in enumerate(asked) if request.status in (429, 503)]
    assert refused
    for index in refused:
        waited = asked[index + 1].at - asked[index].at
        least = 1.0 if "Retry" in name or "RateLimit" in name else 0.2
        assert least <= waited < least + 15, f"{waited:.2f} s"


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("nothing", 1, 1),
        ("reset", 1, 1),
        ("reset, closed, reset", 1, 1),
        ("reset, another range", 1.3, 1.7),
        ("reset, range ignored", 1.3, 1.4),
        ("reset, another ETag", 1.3, 1.4),
        ("reset, another file", 2.3, 2.5),
        ("reset, URL expired", 1, 1),
        ("slow drip", 1, 1),
        ("wrong byte", 2, 2),
        ("reset, wrong byte", 2, 2),
        ("truncated", 1, 1.4),
        ("truncated, chunked", 1, 1),
        ("too long", 1, 3),
    ],
)
def test_a_fault_is_noticed_and_costs_few_extra_bytes(
    faulty: Project, name: str, least: float, most: float
) -> None:
    path = PATHS[name]
    size = len(served(faulty)[path])
    assert least * size - 1000 <= faulty.hub.sent()[path] <= most * size + 1000
    n_requests = len(faulty.hub.asked("cdn", path))
    assert n_requests == 1 if name in ("nothing", "slow drip") else n_requests > 1


def test_a_second_run_downloads_nothing_and_starts_no_ray(faulty: Project) -> None:
    faulty.hub.clear_requests()
    before = {path: path.stat().st_mtime_ns for path in faulty.store.glob("files/*/data.parquet")}
    assert before
    faulty.run(**faulty.without_ray())
    assert faulty.hub.sent() == {}
    assert faulty.hub.asked("cdn") == []
    faulty.check(served(faulty))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_mistake_ends_the_command_with_status_2_and_one_line(faulty: Project) -> None:
    stderr = faulty.run(2, **faulty.without_ray(), HF_TOKEN="hf_expired")
    (line,) = stderr.splitlines()
    assert line.startswith("error: HF_TOKEN")
    assert "hf_expired" not in line
    faulty.check(served(faulty))  # unchanged


def test_changed_source_parameters_fetch_only_missing_files(hub: Hub, downloads: Downloads) -> None:
    files = sample_files(3, 200_000)
    paths = sorted(files)
    hub.repo().commit(files)
    for count in (2, 3):
        hub.clear_requests()
        downloads.download(files=count)
        downloads.check({path: files[path] for path in paths[:count]})
        new = paths[:2] if count == 2 else paths[2:]
        assert hub.sent() == {path: len(files[path]) for path in new}

    # From here on all files are in the store.
    hub.clear_requests()
    first = {paths[0]: files[paths[0]]}
    downloads.download(max_tokens=1)
    downloads.check(first)
    downloads.download(exclude=[paths[0], "*/002_*"])
    downloads.check({paths[1]: files[paths[1]]})
    downloads.download(max_tokens=1)
    # The error names the columns of the file.
    with pytest.raises(UserError, match=r"sources\.main\.text_column.*file_path") as error:
        downloads.download(text_column="content")
    assert "content" in str(error.value)
    downloads.check(first)  # unchanged

    # The same bytes at other paths, as each dump of FineWeb has a 000_00000.parquet.
    dumps = [f"data/CC-MAIN-{dump}/000_00000.parquet" for dump in (2013, 2014, 2015)]
    moved = dict(zip(dumps, files.values(), strict=True))
    hub.repo().commit({**files, **moved})
    downloads.download(config="default")
    downloads.check(moved)
    assert hub.sent() == {}

    # Another revision: the same file under another name, another file under the same name.
    changed = {paths[0]: files[paths[0]], paths[1]: random_parquet(7, 200_000)}
    changed["sample/10BT/007_00000.parquet"] = files[paths[2]]
    commit = hub.repo().commit(changed, "v2")
    assert downloads.download(revision="v2").sources["main"].revision == commit
    downloads.check(changed)
    assert hub.sent() == {paths[1]: len(changed[paths[1]])}


def test_a_file_with_a_permanently_wrong_byte_is_named_and_not_kept(
    hub: Hub, downloads: Downloads
) -> None:
    files = sample_files(3, 200_000)
    bad = sorted(files)[1]
    hub.repo().commit(files)
    hub.inject(Fault(flip=1000), bad, times=None)
    wrong = bytearray(files[bad])
    wrong[1000] ^= 0xFF
    with pytest.raises(UserError, match=f"^{bad}.*{sha256(files[bad])}.*{sha256(bytes(wrong))}"):
        downloads.download()
    assert [request.sent for request in hub.asked("cdn", bad)] == 2 * [len(wrong)]
    downloads.check_nothing_published()
    # Once the hub serves the right bytes, the next run fetches that file from the start.
    hub.clear_faults()
    downloads.download()
    downloads.check(files)
    assert hub.sent() == {
        path: len(data) * (3 if path == bad else 1) for path, data in files.items()
    }


@pytest.mark.parametrize(
    ("source", "variables", "words"),
    [
        ({"repo": "HuggingFaceFW/finewebb"}, {}, ["HuggingFaceFW/finewebb", "repo"]),
        ({"repo": "a/private"}, {"HF_TOKEN": ""}, ["a/private", "HF_TOKEN"]),
        ({"repo": "a/gated"}, {}, ["a/gated", "repo", "HF_TOKEN"]),
        # Raised in a task, whose environment names no hub.
        ({"repo": "a/gated-files"}, {}, ["{hub}/datasets/a/gated-files", "repo"]),
        ({"revision": "v9.9"}, {}, ["v9.9", "revision"]),
        ({"config": "sample-10B"}, {}, ["sample-10B", "config", "sample-10BT"]),
        ({}, {"HF_TOKEN": "hf_expired"}, ["HF_TOKEN"]),
        ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["127.0.0.1:9"]),
        ({"repo": "a/busy"}, {}, ["503"]),
    ],
)
def test_a_user_error_is_one_line_that_names_what_to_fix(
    hub: Hub,
    downloads: Downloads,
    source: dict[str, Any],
    variables: dict[str, str],
    words: list[str],
) -> None:
    for name in (FINEWEB, "a/private", "a/gated", "a/gated-files", "a/busy"):
        hub.repo(name).commit(sample_files(1, 20_000))
    hub.repo("a/private").private = True
    hub.repo("a/gated").gated = "*"
    hub.repo("a/gated-files").gated = "*.parquet"
    if "503" in words:
        hub.inject(Fault(status=503), route="*", times=None)
    with pytest.raises(UserError) as error:
        downloads.download(2, variables, **source)
    line = str(error.value)
    for word in words:
        assert word.format(hub=hub.endpoint) in line
    for secret in ("\n", "hf_expired", TOKEN):
        assert secret not in line
    downloads.check_nothing_published()


@pytest.mark.parametrize(
    "evil",
    [
        "../../evil.parquet",
        "{outside}/evil.parquet",
        "sample/10BT/../../../../evil.parquet",
        "sample/10BT/..\\..\\evil.parquet",
    ],
)
def test_a_listed_path_outside_the_folder_is_refused(
    hub: Hub, downloads: Downloads, tmp_path: Path, evil: str
) -> None:
    evil = evil.format(outside=tmp_path)
    card = CARD.replace("data/*/*", '"**"').encode()  # the default is every file
    hub.repo().commit({"README.md": card, **sample_files(2, 20_000), evil: b"evil"})
    with pytest.raises(UserError, match=r"evil\.parquet"):
        downloads.download(config="default")
    assert list(tmp_path.rglob("*evil*")) == []
    downloads.check_nothing_published()


@pytest.mark.soak
def test_sigterm_stops_the_stage_within_seconds_and_the_next_run_resumes(
    hub: Hub, tmp_path: Path
) -> None:
    files = sample_files(4, 1_000_000)
    total = sum(map(len, files.values()))
    hub.repo().commit(files)
    hub.bandwidth = 200_000
    project = Project(tmp_path / "project", hub)
    # A short path for Ray's logs: the names of its sockets are limited.
    with tempfile.TemporaryDirectory(prefix="ray-") as logs:
        process = project.start(RAY_TMPDIR=logs)
        wait_for(lambda: sum(hub.sent().values()) > total / 4, 150)
        process.terminate()
        began = time.monotonic()
        project.end(process, 3)
        assert time.monotonic() - began < 10
        project.check_nothing_published()
        hub.bandwidth = None
        project.run(RAY_TMPDIR=logs)
        assert list(Path(logs).rglob("*.log"))
        project.check_token(Path(logs))
    project.check(files)
    assert sum(hub.sent().values()) < 1.1 * total


def test_a_stop_during_the_final_fsync_costs_no_byte(
    hub: Hub, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fsync takes seconds for a file of gigabytes."""
    files = sample_files(1, SIZE)
    hub.repo().commit(files)

    def stopped(path: Path) -> None:
        raise Stopped("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fsync_file", stopped)
        with pytest.raises(Stopped):
            downloads.download()
    downloads.check_nothing_published()
    downloads.download()
    downloads.check(files)
    assert hub.sent() == {path: len(data) for path, data in files.items()}


@pytest.mark.soak
def test_a_stalled_connection_is_resumed_and_a_lasting_outage_is_an_error(
    hub: Hub, downloads: Downloads
) -> None:
    files = sample_files(3, SIZE)
    first, _, last = sorted(files)
    hub.repo().commit(files)
    # A stalled connection is closed, and the download resumes over another one.
    hub.inject(Fault(stall_at=MIDDLE, stall=300), first)
    began = time.monotonic()
    downloads.download(files=1)
    assert time.monotonic() - began < 60
    downloads.check({first: files[first]})
    assert hub.sent()[first] <= len(files[first])
    # Storage unavailable for longer than `patience`: the bytes received are kept.
    hub.inject(Fault(reset_at=MIDDLE), last)
    hub.inject(Fault(status=503), last, times=None)
    with pytest.raises(UserError, match=f"{last}.*503"):
        downloads.download(patience=3)
    downloads.check({first: files[first]})  # unchanged
    hub.clear_faults()
    downloads.download()
    downloads.check(files)
    assert hub.sent()[last] <= len(files[last])
