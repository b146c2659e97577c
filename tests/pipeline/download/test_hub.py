"""Source `hub`, seen from outside: `python -m pipeline.download` against a hub with faults.

Each start of Ray takes seconds, so one run meets many faults, one a file.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.download.hub import HubFile
from pipeline.download.ingest import PIECE, bring, find
from pipeline.runtime.errors import Stopped
from pipeline.store import atomic
from pipeline.store.store import Store
from tests.support.clone import make_clone
from tests.support.downloads import (
    Project,
    environment,
    interrupted,
    kill_tree,
    parquet_of,
    random_parquet,
    sample_files,
    sample_paths,
    set_source,
    sha256,
    wait_for,
)
from tests.support.hub import CARD, FINEWEB, Fault, Hub, http_date
from tests.support.repo import REPO

SIZE = 1_000_000
MIDDLE = 400_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables with which a run joins a Ray that is up: to start one takes longer than the run.

    Its nodes know no token and no hub: what they need comes with the tasks.
    """
    folder = tmp_path_factory.mktemp("ray-head")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "num-cpus": 4,
        "include-dashboard": "false",
        "object-store-memory": 150 * 2**20,
    }
    ours = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # Its sockets do not bear a long name.
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        flags = [f"--{key}={value}" for key, value in options.items()]
        with open(folder / "log.txt", "wb") as log:
            head = subprocess.Popen(
                [*command, *flags, f"--temp-dir={temporary}"],
                env={**kept, **ours, "PYTHONPATH": str(REPO)},
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(lambda: "Ray runtime started" in (folder / "log.txt").read_text(), 90, 0.1)
            yield {"RAY_ADDRESS": f"127.0.0.1:{port}", **ours}
        finally:
            kill_tree(head)


def told(stderr: str) -> str:
    """The one line that a user's mistake ends in."""
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


# Transient faults: each ends in the right bytes. By name: what a file meets, in order.
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
    "slow drip": [("cdn", Fault(rate=SIZE / 4))],
}
PATHS = dict(zip(FAULTS, sample_paths(len(FAULTS)), strict=True))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A run that met all of them and ended well. Its files are those of `served`."""
    files = sample_files(len(FAULTS), SIZE)
    with Hub(page=5) as hub:
        # Not of the configuration, and in the listing of the whole repository.
        evil = dict.fromkeys(("../../evil.parquet", "/evil.parquet"), b"evil")
        hub.repo().commit({**files, **evil})
        for name, faults in FAULTS.items():
            for route, fault in faults:
                hub.inject(fault, PATHS[name], route)
        wait = Fault(status=429, headers={"Retry-After": "1"})
        hub.inject(wait, route="tree")
        hub.inject(Fault(status=503), route="tree")
        project = Project(tmp_path_factory.mktemp("faulty") / "project", hub)
        # Ray's logs in a place of their own; its sockets do not bear a long name.
        with tempfile.TemporaryDirectory(prefix="ray-") as logs:
            project.run(GPT2_PARALLEL_DOWNLOADS="8", RAY_TMPDIR=logs)
            assert list(Path(logs).rglob("*.log"))
            project.check_token(Path(logs))
        yield project


def served(project: Project) -> dict[str, bytes]:
    """The files that the hub serves at the newest commit."""
    repo = project.hub.repo()
    files = repo.commits[repo.refs["main"]]
    return {path: data for path, data in files.items() if path.startswith("sample/10BT/")}


def test_faults_that_pass_end_in_the_right_bytes(faulty: Project) -> None:
    faulty.check(served(faulty))
    assert list((faulty.store / "partial").rglob("*.parquet")) == []
    assert sum(p.stat().st_size for p in (faulty.store / "partial").rglob("*") if p.is_file()) == 0
    left = [entry for entry in faulty.hub._injected if entry.times]
    assert left == [], "faults that were never met"


def test_the_manifest_pins_the_commit(faulty: Project) -> None:
    manifest = faulty.manifest()
    assert manifest["source"]["repo"] == FINEWEB
    assert manifest["source"]["revision"] == faulty.hub.repo().refs["main"]


@pytest.mark.parametrize("name", [name for name in FAULTS if name.startswith(("429", "503"))])
def test_it_waits_as_the_server_says(faulty: Project, name: str) -> None:
    asked = [r for r in faulty.hub.asked("*", PATHS[name]) if r.route in ("resolve", "cdn")]
    refused = [i for i, request in enumerate(asked) if request.status in (429, 503)]
    assert refused
    for index in refused:
        waited = asked[index + 1].at - asked[index].at
        least = 1.0 if "Retry" in name or "RateLimit" in name else 0.2
        assert least <= waited < least + 15, f"{waited:.2f} s"


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("nothing", 1.0),
        ("reset", 1.0),
        ("reset, closed, reset", 1.0),
        ("reset, another range", 1.7),
        ("reset, range ignored", 1.4),
        ("reset, another ETag", 1.4),
        ("reset, another file", 2.5),
        ("reset, URL expired", 1.0),
        ("slow drip", 1.0),
        ("wrong byte", 2.0),
        ("reset, wrong byte", 2.0),
        ("truncated", 1.4),
    ],
)
def test_no_more_is_sent_than_the_fault_costs(faulty: Project, name: str, most: float) -> None:
    path = PATHS[name]
    assert faulty.hub.sent()[path] <= most * len(served(faulty)[path]) + 1000


def test_a_second_run_transfers_nothing_and_starts_no_ray(faulty: Project) -> None:
    faulty.hub.forget()
    before = {path: path.stat().st_mtime_ns for path in faulty.store.glob("files/*/data.parquet")}
    assert before
    faulty.run(**faulty.without_ray())
    assert faulty.hub.sent() == {}
    assert faulty.hub.asked("cdn") == []
    faulty.check(served(faulty))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_token_stays_with_the_hub(faulty: Project) -> None:
    authorized = {request.authorization is not None for request in faulty.hub.asked("resolve")}
    assert authorized <= {True}
    faulty.check_token()


def test_files_and_revision_change(hub: Hub, tmp_path: Path, ray_head: dict[str, str]) -> None:
    files = sample_files(3, 200_000)
    paths = sorted(files)
    two = {path: files[path] for path in paths[:2]}
    hub.repo().commit(files)
    project = Project(tmp_path / "project", hub, files=2)
    project.run(**ray_head)
    project.check(two)
    assert hub.sent() == {path: len(data) for path, data in two.items()}

    hub.forget()
    project.set(files=3)
    project.run(**ray_head)
    project.check(files)
    assert hub.sent() == {paths[2]: len(files[paths[2]])}

    # From here on all is there: in the store, if not in data/raw.
    hub.forget()
    no_ray = project.without_ray()
    size = sum(map(len, two.values()))
    # Parts by size are the whole files that fit, at 32 tokens for 100 bytes.
    for part in ({"files": 2}, {"max_bytes": size + 9}, {"max_tokens": size * 32 // 100 + 9}):
        project.set(**({"files": None, "max_bytes": None, "max_tokens": None} | part))
        project.run(**no_ray)
        project.check(two)
    project.set(max_tokens=1)
    project.run(**no_ray)
    project.check({paths[0]: files[paths[0]]})

    project.set(max_tokens=None, text_column="content")
    line = told(project.run(2, **no_ray))
    assert "content" in line
    assert "file_path" in line  # it names the columns that there are
    project.check({paths[0]: files[paths[0]]})  # as it was

    # The same bytes in other places, as each dump of FineWeb has a 000_00000.parquet.
    dumps = [f"data/CC-MAIN-{dump}/000_00000.parquet" for dump in (2013, 2014, 2015)]
    moved = dict(zip(dumps, files.values(), strict=True))
    hub.repo().commit({**files, **moved})
    project.set(text_column="text", config="default")
    project.run(**no_ray)
    project.check(moved)
    assert hub.sent() == {}

    # Another revision: the same file by another name, another file by the same name.
    changed = {paths[0]: files[paths[0]], paths[1]: random_parquet(7, 200_000)}
    changed["sample/10BT/007_00000.parquet"] = files[paths[2]]
    commit = hub.repo().commit(changed, "v2")
    project.set(config="sample-10BT", revision="v2")
    project.run(**ray_head)
    project.check(changed)
    assert project.manifest()["source"]["revision"] == commit
    assert hub.sent() == {paths[1]: len(changed[paths[1]])}
    project.check_token()


def test_a_lasting_wrong_byte_is_named(hub: Hub, tmp_path: Path, ray_head: dict[str, str]) -> None:
    files = sample_files(3, 200_000)
    bad = sorted(files)[1]
    hub.repo().commit(files)
    hub.inject(Fault(flip=1000), bad, times=None)
    project = Project(tmp_path / "project", hub)
    stderr = project.run(1, 2, **ray_head)
    wrong = bytearray(files[bad])
    wrong[1000] ^= 0xFF
    line = next(line for line in reversed(stderr.splitlines()) if Path(bad).name in line)
    assert sha256(files[bad]) in line
    assert sha256(bytes(wrong)) in line
    assert [request.sent for request in hub.asked("cdn", bad)] == 2 * [len(wrong)]
    project.check_nothing()
    # When the hub is mended the next run fetches that file, and no wrong byte of it was kept.
    hub.heal()
    sent = hub.sent()
    project.run(**ray_head)
    project.check(files)
    assert hub.sent()[bad] - sent[bad] == len(wrong)
    assert sum(hub.sent().values()) <= sum(map(len, files.values())) + 2 * len(wrong)


Mistake = Callable[[Hub, Project], dict[str, str]]


def missing_repo(hub: Hub, project: Project) -> dict[str, str]:
    project.set(repo="HuggingFaceFW/finewebb")
    return {}


def private_repo(hub: Hub, project: Project) -> dict[str, str]:
    hub.repo().private = True
    return {"HF_TOKEN": ""}


def gated_repo(hub: Hub, project: Project) -> dict[str, str]:
    hub.repo().gated = "*"
    return {}


def gated_files(hub: Hub, project: Project) -> dict[str, str]:
    hub.repo().gated = "*.parquet"
    return {}


def missing_revision(hub: Hub, project: Project) -> dict[str, str]:
    project.set(revision="v9.9")
    return {}


def missing_config(hub: Hub, project: Project) -> dict[str, str]:
    project.set(config="sample-10B")
    return {}


def invalid_token(hub: Hub, project: Project) -> dict[str, str]:
    return {"HF_TOKEN": "hf_expired"}


def no_hub(hub: Hub, project: Project) -> dict[str, str]:
    return {"HF_ENDPOINT": "http://127.0.0.1:9", "GPT2_PATIENCE": "2"}


def busy_hub(hub: Hub, project: Project) -> dict[str, str]:
    hub.inject(Fault(status=503), route="*", times=None)
    return {"GPT2_PATIENCE": "2"}


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (missing_repo, ["HuggingFaceFW/finewebb", "source.repo"]),
        (private_repo, [FINEWEB, "HF_TOKEN"]),
        (gated_repo, [FINEWEB, "gated"]),
        (gated_files, [FINEWEB, "gated"]),
        (missing_revision, ["v9.9", "source.revision"]),
        (missing_config, ["sample-10B", "source.config", "sample-10BT"]),
        (invalid_token, ["HF_TOKEN"]),
        (no_hub, ["127.0.0.1:9"]),
        (busy_hub, ["503"]),
    ],
)
def test_what_the_user_must_mend_is_one_line(
    hub: Hub, tmp_path: Path, ray_head: dict[str, str], mistake: Mistake, words: list[str]
) -> None:
    hub.repo().commit(sample_files(1, 20_000))
    project = Project(tmp_path / "project", hub)
    variables = mistake(hub, project)
    line = told(project.run(2, **(ray_head | variables)))
    for word in words:
        assert word.lower() in line.lower()
    assert "hf_expired" not in line
    if mistake is gated_files:  # noticed by a worker, whose environment names no hub
        assert f"{hub.endpoint}/datasets/{FINEWEB}" in line
    project.check_nothing()
    project.check_token()


@pytest.mark.parametrize(
    "evil",
    [
        "../../evil.parquet",
        "{outside}/evil.parquet",
        "sample/10BT/../../../../evil.parquet",
        "sample/10BT/..\\..\\evil.parquet",
    ],
)
def test_no_path_of_a_listing_leaves_the_folder(hub: Hub, tmp_path: Path, evil: str) -> None:
    files = sample_files(2, 20_000)
    evil = evil.format(outside=tmp_path)
    card = CARD.replace("data/*/*", '"**"').encode()  # the default is all that there is
    hub.repo().commit({"README.md": card, **files, evil: random_parquet(66, 20_000)})
    project = Project(tmp_path / "a" / "b" / "project", hub, config="default")
    line = told(project.run(2, **project.without_ray()))
    assert "evil.parquet" in line
    assert list(tmp_path.rglob("*evil*")) == []
    project.check_nothing()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (parquet_of([]), "rows"),
        (b"not parquet at all" * 100, "parquet"),
    ],
    ids=["no rows", "no footer"],
)
def test_what_tokenize_could_not_read_is_named_at_once(
    hub: Hub, tmp_path: Path, ray_head: dict[str, str], data: bytes, word: str
) -> None:
    files = sample_files(2, 20_000)
    bad = sorted(files)[1]
    hub.repo().commit({**files, bad: data})
    project = Project(tmp_path / "project", hub)
    line = told(project.run(2, **ray_head))
    assert Path(bad).name in line
    assert word in line
    project.check_nothing()


def test_sigterm_leaves_within_seconds_and_resumes(
    hub: Hub, tmp_path: Path, ray_head: dict[str, str]
) -> None:
    files = sample_files(4, 5_000_000)
    total = sum(map(len, files.values()))
    hub.repo().commit(files)
    hub.bandwidth = 1e6
    project = Project(tmp_path / "project", hub)
    process = project.start()
    wait_for(lambda: sum(hub.sent().values()) > total / 4)
    process.terminate()
    began = time.monotonic()
    stderr = project.end(process, 3)
    assert time.monotonic() - began < 10
    assert stderr.splitlines()[-1] == "stopped; the same command goes on from here"
    project.check_nothing()
    hub.bandwidth = None
    project.run(**ray_head)
    project.check(files)
    assert sum(hub.sent().values()) < 1.1 * total


def test_stopped_when_all_is_there_it_costs_no_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last flush to the disk takes seconds where a file has gigabytes."""
    (path, data), *_ = files = list(sample_files(1, SIZE).items())
    commit = hub.repo().commit(dict(files))
    url = f"{hub.endpoint}/datasets/{FINEWEB}/resolve/{commit}/{path}"
    item = HubFile(path, len(data), sha256(data), "", url, FINEWEB, commit, None)
    store = Store(tmp_path / "work")

    def stopped(path: Path) -> None:
        raise Stopped("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fsync_file", stopped)
        with pytest.raises(Stopped):
            bring(item, "text", store, 10)
    assert find(item, "text", store) is None
    kept = bring(item, "text", store, 10)
    assert (store.root / "files" / kept.sha256 / PIECE).read_bytes() == data
    assert hub.sent() == {path: len(data)}


@pytest.mark.soak
def test_silence_and_a_server_that_stays_away(hub: Hub, tmp_path: Path) -> None:
    files = sample_files(3, SIZE)
    paths = sorted(files)
    hub.repo().commit(files)
    # A connection without a byte is given up, and the file goes on from there over another.
    hub.inject(Fault(stall_at=MIDDLE, stall=300), paths[0])
    project = Project(tmp_path / "project", hub, files=1)
    began = time.monotonic()
    project.run()
    assert time.monotonic() - began < 60
    project.check({paths[0]: files[paths[0]]})
    assert hub.sent()[paths[0]] <= len(files[paths[0]])
    # Storage that is away for longer than the patience lasts: one line; what came is kept.
    hub.inject(Fault(reset_at=MIDDLE), paths[2])
    hub.inject(Fault(status=503), paths[2], times=None)
    project.set(files=None)
    line = told(project.run(2, GPT2_PATIENCE="3"))
    assert Path(paths[2]).name in line
    assert "503" in line
    project.check({paths[0]: files[paths[0]]})  # as it was
    hub.heal()
    project.run()
    project.check(files)
    assert hub.sent()[paths[2]] <= len(files[paths[2]])
    project.check_token()


@pytest.mark.slow
def test_repro_with_one_more_file_fetches_and_tokenizes_that_one(hub: Hub, tmp_path: Path) -> None:
    files = sample_files(3, 300_000)
    paths = sorted(files)
    hub.repo().commit(files)
    clone = make_clone(tmp_path / "project", "smoke")
    hub_keys = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_TOKEN")
    clone.env |= {key: environment(hub, tmp_path)[key] for key in hub_keys}
    params = clone.folder / "params.yaml"
    set_source(params, kind="hub", repo=FINEWEB, config="sample-10BT", revision="main", files=2)
    clone.set("shard_tokens", "20000")
    first = chunks_told(clone.run("dvc", "repro", "tokenize"))
    assert first[0] == 0
    assert first[1] >= 4
    assert set(hub.sent()) == set(paths[:2])
    kept = {p: p.stat().st_ino for p in (clone.folder / ".work").glob("chunks/*/train.bin")}
    hub.forget()
    set_source(params, files=3)
    done, to_do = chunks_told(clone.run("dvc", "repro", "tokenize"))
    assert done == first[0] + first[1]
    assert 0 < to_do < first[1]
    assert hub.sent() == {paths[2]: len(files[paths[2]])}
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert "Running stage" not in clone.run("dvc", "repro", "tokenize")


def chunks_told(output: str) -> tuple[int, int]:
    """The chunks that were there, and those to do, as tokenize said."""
    match = re.search(r"(\d+) chunks done before, (\d+) to do", output)
    assert match, output
    return int(match[1]), int(match[2])


@pytest.mark.soak
def test_kills_cost_no_byte_and_few_transfers(hub: Hub, tmp_path: Path) -> None:
    files = sample_files(4, 6_000_000)
    total = sum(map(len, files.values()))
    hub.repo().commit(files)
    hub.bandwidth = 3e6
    rng = random.Random(5)
    project = Project(tmp_path / "project", hub)
    moments = [rng.random() * 0.95 * total for _ in range(5)]
    assert interrupted(project, files, moments, rng) < 1.2
