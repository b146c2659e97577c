"""Tests for the data stages on a cluster of three hosts that share only the network.

A head without CPUs, where the driver runs, and two workers. `ship`: the workers see nothing of the
project. `shared`: its folder is at the same place on each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from pipeline.format.manifest import NAME, Manifest, RawManifest
from pipeline.format.parquet import read_texts
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from tests.support.downloads import set_source
from tests.support.hosts import KEEPALIVE, Host, Hosts, wait_for, why_not
from tests.support.repo import REPO
from tests.support.small_data import hashes, tokenize_here, write_raw

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}")

STAGES = ("download", "tokenize", "verify")
SHARD_TOKENS = 20_000
# The titles of Ray's workers: at a task, and between two, for the tasks here are short.
WORKERS = ("ray::tokenize", "ray::IDLE")


class Project:
    """A project whose source, the sample's text, is downloaded."""

    def __init__(self, folder: Path, raw: Path) -> None:
        self.folder = folder
        self.tokens = folder / "data/tokens"
        shutil.copytree(REPO / "pipeline", folder / "pipeline")
        shutil.copy2(REPO / "dvc.yaml", folder)
        text = (REPO / "params.yaml").read_text()
        text = re.sub(r"shard_tokens: \S+", f"shard_tokens: {SHARD_TOKENS}", text)
        (folder / "params.yaml").write_text(text)
        shutil.copytree(raw, folder / "data/raw")

    def from_files(self) -> None:
        """Have the text come from files of the user's own, and nothing downloaded yet."""
        (self.folder / "data/raw").rename(self.folder / "source")
        paths = [f"{self.folder}/source/*.parquet"]
        set_source(self.folder / "params.yaml", kind="files", paths=paths)

    def pieces(self) -> dict[str, int]:
        """The finished chunks in the store, and when each was made."""
        found = (self.folder / ".work/chunks").glob("*/piece.json")
        return {
            path.parent.name: (path.parent / "record.json").stat().st_mtime_ns for path in found
        }

    def start(self, stage: str, host: Host, **variables: str) -> Run:
        log = self.folder.parent / f"{self.folder.name}-{stage}-{time.monotonic()}.log"
        variables = {"PYTHONPATH": str(self.folder), "GPT2_WORKERS": "1", **variables}
        command = [sys.executable, "-u", "-m", f"pipeline.{stage}"]
        return Run(host.start(*command, cwd=self.folder, log=log, variables=variables), log)

    def run(self, stage: str, host: Host, **variables: str) -> str:
        return self.start(stage, host, **variables).end()


class Run:
    """A stage that runs on a host."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def signal(self, number: signal.Signals) -> None:
        """Send the stage a signal."""
        (stage,) = psutil.Process(self.process.pid).children()  # of nsenter
        stage.send_signal(number)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def end(self, status: int = 0, seconds: float = 200) -> str:
        """Wait for its end; all that it said."""
        assert self.process.wait(seconds) == status, self.said
        return self.said


@contextlib.contextmanager
def cluster(folder: Path, project: Path, shared: bool, **of_w2: str) -> Iterator[Hosts]:
    """A head without CPUs and two workers of one each, which form a cluster."""
    names = ("head", "w1", "w2")
    keep = {name: [project] for name in (names if shared else names[:1])}
    with Hosts(folder, names, keep) as hosts:
        hosts.ray_start("head", "head", cpus=0)
        hosts.ray_start("w1", "head", cpus=1)
        hosts.ray_start("w2", "head", cpus=1, **of_w2)
        up = "Ray runtime started"
        wait_for(lambda: all(up in (folder / f"{name}.log").read_text() for name in names), 90)
        yield hosts


@pytest.fixture
def project(tmp_path: Path, sample_raw: Path) -> Project:
    return Project(tmp_path / "project", sample_raw)


def remote(hosts: Hosts, data: str) -> dict[str, str]:
    return {"RAY_ADDRESS": hosts.ray_address("head"), "GPT2_DATA": data}


def same_as_local(project: Project, tmp_path: Path) -> None:
    """The shards are those that this process makes alone."""
    params = TokenizeParams.model_validate(Manifest.load(project.tokens).params)
    code = code_key("tokenize", project.folder)
    machine = Machine(work_dir=tmp_path / "local")
    tokenize_here(project.folder / "data/raw", tmp_path / "local-out", params, machine, code)
    assert len(hashes(project.tokens)) > 300
    assert hashes(project.tokens) == hashes(tmp_path / "local-out")


def spilled(hosts: Hosts) -> list[Path]:
    """What Ray wrote to disk for want of room, and where it says that it did."""
    files = list(hosts.folder.glob("*/tmp/ray/session_2*/ray_spilled_objects*/*"))
    logs = hosts.folder.glob("*/tmp/ray/session_2*/logs/raylet.out")
    return files + [log for log in logs if "Spilled" in log.read_text(errors="replace")]


def under_way(project: Project, run: Run) -> None:
    """Wait until some chunks are finished."""
    wait_for(lambda: len(project.pieces()) >= 10 or run.process.poll() is not None, 120)


def lose_a_worker(
    project: Project, hosts: Hosts, data: str, lose: Callable[[], None]
) -> tuple[str, float]:
    """Tokenize, and lose w2 in the midst of it; what was said, and when the loss was noticed."""
    run = project.start("tokenize", hosts["head"], **remote(hosts, data))
    under_way(project, run)
    hosts["w2"].freeze(*WORKERS)  # so that something runs there when it is lost
    before = project.pieces()
    lose()
    seconds = wait_for(lambda: "was lost" in run.said or "is lost" in run.said, 60)
    said = run.end()
    after = project.pieces()
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before) + 50
    lost = int(re.findall(r"(\d+) retried", said)[-1])
    assert 1 <= lost <= 4, said  # what ran there, and what waited there
    return said, seconds


@pytest.mark.slow
def test_shipped_with_a_worker_unplugged_gives_the_bytes_of_a_local_run(
    project: Project, tmp_path: Path
) -> None:
    with cluster(tmp_path / "hosts", project.folder, shared=False) as hosts:
        assert "part" not in hosts["w1"].run("ls", "/tmp")
        said, seconds = lose_a_worker(project, hosts, "ship", hosts["w2"].unplug)
        assert seconds < 30
        assert "2 nodes: 2 running" in said
        assert "is done again" in said
        assert spilled(hosts) == []
        left = list((tmp_path / "hosts/w1/tmp/gpt2-shipped/tmp").iterdir())
        assert left == []
    same_as_local(project, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
def test_download_tokenize_and_verify(project: Project, tmp_path: Path, data: str) -> None:
    project.from_files()
    with cluster(tmp_path / "hosts", project.folder, data == "shared") as hosts:
        for stage in STAGES:
            said = project.run(stage, hosts["head"], **remote(hosts, data))
            # What opens files runs beside them, on a Ray of its own.
            here = data == "ship" and stage != "tokenize"
            assert ("1 node: " if here else "2 nodes: ") in said
        assert spilled(hosts) == []
        # The code came to the workers.
        for worker in ("w1", "w2"):
            assert list((tmp_path / "hosts" / worker / "tmp").rglob("_ray_pkg_*"))
    manifest = (project.tokens / NAME).read_bytes()
    verified = (project.folder / "data/verified.json").read_text()
    assert atomic.sha256_file(project.tokens / NAME) in verified
    same_as_local(project, tmp_path)
    assert manifest == (tmp_path / "local-out" / NAME).read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
@pytest.mark.parametrize("how", ["unplug", "cut"])
def test_a_worker_lost(project: Project, tmp_path: Path, data: str, how: str) -> None:
    with cluster(tmp_path / "hosts", project.folder, data == "shared") as hosts:

        def lose() -> None:
            hosts["w2"].unplug() if how == "unplug" else hosts.cut("w2")

        said, seconds = lose_a_worker(project, hosts, data, lose)
        print(f"{data}, {how}: noticed after {seconds:.1f} s\n{said}")
        assert seconds < 30
    same_as_local(project, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
def test_the_head_lost(project: Project, tmp_path: Path, data: str) -> None:
    """The driver is on w1 here: on the head it would go with it."""
    with cluster(tmp_path / "hosts", project.folder, True) as hosts:
        run = project.start("tokenize", hosts["w1"], **remote(hosts, data))
        under_way(project, run)
        for name in ("w1", "w2"):
            hosts[name].freeze(*WORKERS)
        begin = time.monotonic()
        hosts["head"].unplug()
        said = run.end(status=1, seconds=60)
        print(f"{data}: ended after {time.monotonic() - begin:.1f} s\n{said}")
        assert "Traceback" not in said
        last = said.splitlines()[-1]
        assert last.startswith("error: the Ray cluster is gone: its head 10.77.0.1:6379 has not")
        before = project.pieces()
        assert 10 <= len(before) < 100
        said = project.run("tokenize", hosts["w2"])  # local
    assert f"; {len(before)} chunks done before" in said
    assert {key: project.pieces()[key] for key in before} == before
    same_as_local(project, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("data", "number", "status"),
    [
        ("ship", signal.SIGINT, 3),
        ("shared", signal.SIGTERM, 3),
        ("ship", signal.SIGTERM, 3),
        ("shared", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_stopped_driver_takes_its_tasks_with_it(
    tmp_path: Path, sample_raw: Path, data: str, number: signal.Signals, status: int
) -> None:
    texts: list[str | None] = []
    for file in RawManifest.load(sample_raw).files:
        for _, some in read_texts(sample_raw / file.path, "text", 0, file.rows):
            texts += some
    long = "".join(filter(None, texts)) * 4  # one document, one chunk: a task of some seconds
    project = Project(tmp_path / "project", write_raw(tmp_path / "raw", [texts, [long]]))
    slow = {"GPT2_ENGINE": "tiktoken"}
    with cluster(tmp_path / "hosts", project.folder, data == "shared") as hosts:

        def tasks() -> list[str]:
            found = [host.titled("ray::tokenize", "ray::read") for host in hosts.hosts.values()]
            return [" ".join(process.cmdline()) for of_host in found for process in of_host]

        run = project.start("tokenize", hosts["head"], **remote(hosts, data), **slow)
        under_way(project, run)
        assert any("part-1" in task for task in tasks()), "the largest first"
        begin = time.monotonic()
        run.signal(number)
        said = run.end(status, seconds=20)
        left = time.monotonic() - begin
        wait_for(lambda: not tasks(), 20)
        print(
            f"{data}, {number.name}: left after {left:.1f} s, tasks {time.monotonic() - begin:.1f}"
        )
        if status > 0:
            assert said.splitlines()[-1] == "stopped; the same command goes on from here"
        before = project.pieces()
        assert 10 <= len(before) < 130
        said = project.run("tokenize", hosts["head"], **remote(hosts, data))
        assert f"; {len(before)} chunks done before" in said
        assert {key: project.pieces()[key] for key in before} == before
    same_as_local(project, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
def test_nodes_come_when_tasks_wait_for_them(project: Project, tmp_path: Path, data: str) -> None:
    """Ray's autoscaler, with a provider that starts raylets here where a cloud's rents machines."""
    provider = {"use_node_id_as_ip": True, "disable_node_updaters": True}
    worker = {"CPU": 1, "memory": 10**9, "object_store_memory": 100 * 2**20}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
                "worker_start_ray")  # fmt: skip
    scaled = {f"{name}_commands": [] for name in commands} | {
        "cluster_name": "test",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "provider": {
            "type": "external",
            "module": "scaling.Provider",
            "disable_launch_config_check": True,
            **provider,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
    }
    with Hosts(tmp_path / "hosts", ["head"], {"head": [project.folder]}) as hosts:
        (tmp_path / "hosts/head/tmp/scaled.yaml").write_text(json.dumps(scaled))
        shutil.copy2(REPO / "tests/support/autoscaler.py", tmp_path / "hosts/head/tmp")
        fast = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "PYTHONPATH": "/tmp",
        }
        hosts.ray_start("head", "head", 0, "--autoscaling-config=/tmp/scaled.yaml", **fast)
        log = tmp_path / "hosts/head.log"
        wait_for(lambda: "Ray runtime started" in log.read_text(), 90)
        said = project.run("tokenize", hosts["head"], **remote(hosts, data))
        print(said)
        assert "2 nodes: " in said
    same_as_local(project, tmp_path)


@pytest.mark.soak
def test_symmetric_run(project: Project, tmp_path: Path) -> None:
    """As `srun` starts it in docs/cluster.md: the same command on each node."""
    names = ("one", "two")
    with Hosts(tmp_path / "hosts", names, {name: [project.folder] for name in names}) as hosts:
        address = hosts.ray_address("one")
        bin_folder = Path(sys.prefix) / "bin"
        command = [str(bin_folder / "ray"), "symmetric-run", "--address", address]
        command += ["--min-nodes", "2", "--num-cpus", "1"]
        command += ["--", sys.executable, "-m", "pipeline.tokenize"]
        variables = KEEPALIVE | {
            "RAY_ADDRESS": address,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(project.folder),
        }
        logs = [tmp_path / f"{name}.log" for name in names]
        runs = [
            Run(hosts[name].start(*command, cwd=project.folder, log=log, variables=variables), log)
            for name, log in zip(names, logs, strict=True)
        ]
        said = runs[0].end()
        print(said)
        assert "2 nodes: " in said
        assert runs[1].process.wait(60) == 0, runs[1].said
    same_as_local(project, tmp_path)


@pytest.mark.soak
def test_what_does_not_fit_is_named_before_any_work(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "hosts/w2/tmp/other"  # on w2: /tmp/other
    (other / "tiktoken-9.9.9.dist-info").mkdir(parents=True)
    (other / "tiktoken-9.9.9.dist-info/METADATA").write_text("Name: tiktoken\nVersion: 9.9.9\n")
    (other / "gigatoken-9.9.9.dist-info").mkdir(parents=True)
    (other / "gigatoken-9.9.9.dist-info/METADATA").write_text("Name: gigatoken\nVersion: 9.9.9\n")
    with cluster(tmp_path / "hosts", project.folder, False, PYTHONPATH="/tmp/other") as hosts:
        for data in ("shared", "ship"):
            run = project.start("tokenize", hosts["head"], **remote(hosts, data))
            said = run.end(status=2)
            line = said.splitlines()[-1]
            print(line)
            assert line.startswith("error: the cluster's nodes do not fit: ")
            assert "10.77.0.3 has tiktoken 9.9.9 where the driver has " in line
            assert "gigatoken 9.9.9 where the driver has " in line
            assert ("10.77.0.2" in line) == (data == "shared")
            assert (f"no share in {project.folder}/.work" in line) == (data == "shared")
            assert project.pieces() == {}
            assert not list((project.folder / ".work").glob("*/probe*"))
        (tmp_path / "hosts/head/tmp/wrong").write_text("0" * 64)
        begin = time.monotonic()
        wrong = {"RAY_AUTH_TOKEN_PATH": "/tmp/wrong"}
        run = project.start("tokenize", hosts["head"], **remote(hosts, "ship"), **wrong)
        line = run.end(status=2).splitlines()[-1]
        print(f"{time.monotonic() - begin:.0f} s: {line}")
        assert line.startswith("error: ray_address: cannot join the Ray cluster at 10.77.0.1:6379")


@pytest.mark.soak
def test_a_container_with_a_tiny_shared_memory(project: Project, tmp_path: Path) -> None:
    """A local Ray where /dev/shm is smaller than in a Docker container: quiet, and it works."""
    with Hosts(tmp_path / "hosts", ["one"], {"one": [project.folder]}, shm=2**20) as hosts:
        project.from_files()
        for stage in STAGES:
            for data in ("shared", "ship"):
                said = project.run(stage, hosts["one"], GPT2_DATA=data, GPT2_FRESH="1")
                print(said)
                for line in said.splitlines():
                    assert line.startswith(stage), line
    same_as_local(project, tmp_path)
