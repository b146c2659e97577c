"""Tests for the data stages on a cluster of three hosts that share only the network.

The driver runs on the head, which has no CPUs; two workers run the tasks. With `ship` the workers
see nothing of the project; with `shared` its folder is at the same path on each host.
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
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from pipeline.cluster.join import NODE_VARIABLES
from pipeline.format.manifest import NAME, Manifest, RawManifest
from pipeline.format.parquet import read_texts
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from tests.support.downloads import set_source
from tests.support.hosts import Host, Hosts, unsupported_reason
from tests.support.repo import REPO
from tests.support.small_data import hashes, piece_times, tokenize_here, write_raw
from tests.support.waiting import wait_for

REASON = unsupported_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}")

STAGES = ("download", "tokenize", "verify")
SHARD_TOKENS = 20_000
# Titles of Ray's worker processes: running a task, and between two short ones.
WORKERS = ("ray::tokenize", "ray::IDLE")


class Project:
    """A project folder whose `data/raw` is the sample."""

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
        """Make the sample the source of kind `files`, not yet downloaded."""
        (self.folder / "data/raw").rename(self.folder / "source")
        paths = [f"{self.folder}/source/*.parquet"]
        set_source(self.folder / "params.yaml", kind="files", paths=paths)

    def pieces(self) -> dict[str, int]:
        """Return key -> mtime of the finished chunks in the store."""
        return piece_times(self.folder / ".work")

    def start(self, stage: str, host: Host, **variables: str) -> Run:
        log = self.folder.parent / f"{self.folder.name}-{stage}-{time.monotonic()}.log"
        variables = {"PYTHONPATH": str(self.folder), "GPT2_WORKERS": "1", **variables}
        command = [sys.executable, "-u", "-m", f"pipeline.{stage}"]
        return Run(host.start(*command, cwd=self.folder, log=log, variables=variables), log)

    def run(self, stage: str, host: Host, **variables: str) -> str:
        return self.start(stage, host, **variables).end()


class Run:
    """A stage running on a host."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the stage, which is the child of nsenter."""
        (stage,) = psutil.Process(self.process.pid).children()
        stage.send_signal(number)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def end(self, status: int = 0, seconds: float = 200) -> str:
        """Wait for the end, check the exit status, return the output."""
        assert self.process.wait(seconds) == status, self.output
        return self.output


@contextlib.contextmanager
def cluster(folder: Path, project: Path, shared: bool, **w2_variables: str) -> Iterator[Hosts]:
    """Yield a Ray cluster: a head without CPUs and two workers with one CPU each."""
    names = ("head", "w1", "w2")
    keep = {name: [project] for name in (names if shared else names[:1])}
    with Hosts(folder, names, keep) as hosts:
        hosts.ray_start("head", "head", cpus=0)
        hosts.ray_start("w1", "head", cpus=1)
        hosts.ray_start("w2", "head", cpus=1, **w2_variables)
        logs = [folder / f"{name}.log" for name in names]
        wait_for(lambda: all("Ray runtime started" in log.read_text() for log in logs), 90)
        yield hosts


@pytest.fixture
def project(tmp_path: Path, sample_raw: Path) -> Project:
    return Project(tmp_path / "project", sample_raw)


def remote(hosts: Hosts, data: str) -> dict[str, str]:
    return {"RAY_ADDRESS": hosts.ray_address("head"), "GPT2_DATA": data}


def assert_same_as_local(project: Project, tmp_path: Path) -> None:
    """Check that the shards have the bytes that this process makes without a cluster."""
    params = TokenizeParams.model_validate(Manifest.load(project.tokens).params)
    code = code_key("tokenize", project.folder)
    machine = Machine(work_dir=tmp_path / "local")
    tokenize_here(project.folder / "data/raw", tmp_path / "local-out", params, machine, code)
    assert len(hashes(project.tokens)) > 300
    assert hashes(project.tokens) == hashes(tmp_path / "local-out")


def assert_found(output: str, chunks: int) -> None:
    """Check how many chunks the stage found finished in the store."""
    assert re.search(rf"\b{chunks} chunks done before", output), output


def spilled(hosts: Hosts) -> list[Path]:
    """Return the objects that Ray spilled to disk, and the logs that report it."""
    files = list(hosts.folder.glob("*/tmp/ray/session_2*/ray_spilled_objects*/*"))
    logs = hosts.folder.glob("*/tmp/ray/session_2*/logs/raylet.out")
    return files + [log for log in logs if "Spilled" in log.read_text(errors="replace")]


def wait_for_chunks(project: Project, run: Run) -> None:
    """Wait until 10 chunks are finished, or the stage has ended."""
    wait_for(lambda: len(project.pieces()) >= 10 or run.process.poll() is not None, 120)


def lose_a_worker(
    project: Project, hosts: Hosts, data: str, lose: Callable[[], None]
) -> tuple[str, float]:
    """Tokenize and lose w2 halfway; return the output, and the seconds until it was noticed."""
    run = project.start("tokenize", hosts["head"], **remote(hosts, data))
    wait_for_chunks(project, run)
    hosts["w2"].freeze(*WORKERS)  # so that a task runs there when it is lost
    before = project.pieces()
    lose()
    seconds = wait_for(lambda: " lost" in run.output, 60)
    output = run.end()
    after = project.pieces()
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before) + 50
    lost = int(re.findall(r"(\d+) retried", output)[-1])
    assert 1 <= lost <= 4, output  # tasks running and queued on w2
    return output, seconds


LOSSES = [("ship", "unplug"), ("ship", "cut"), ("shared", "unplug"), ("shared", "cut")]


@pytest.mark.soak
@pytest.mark.parametrize(("data", "how"), LOSSES)
def test_lost_worker(project: Project, tmp_path: Path, data: str, how: str) -> None:
    with cluster(tmp_path / "hosts", project.folder, data == "shared") as hosts:
        lose = hosts["w2"].unplug if how == "unplug" else partial(hosts.cut, "w2")
        output, seconds = lose_a_worker(project, hosts, data, lose)
        print(f"{data}, {how}: noticed after {seconds:.1f} s\n{output}")
        assert seconds < 30
        assert "2 nodes: 2 running" in output
        assert spilled(hosts) == []
        if data == "ship":
            assert "part" not in hosts["w1"].run("ls", "/tmp")
            assert list((tmp_path / "hosts/w1/tmp/gpt2-shipped/tmp").iterdir()) == []
    assert_same_as_local(project, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
def test_download_tokenize_and_verify(project: Project, tmp_path: Path, data: str) -> None:
    project.from_files()
    with cluster(tmp_path / "hosts", project.folder, data == "shared") as hosts:
        for stage in STAGES:
            output = project.run(stage, hosts["head"], **remote(hosts, data))
            # With `ship`, stages whose tasks open files use a local Ray.
            local = data == "ship" and stage != "tokenize"
            assert ("1 node: " if local else "2 nodes: ") in output
        assert spilled(hosts) == []
        for worker in ("w1", "w2"):
            assert list((tmp_path / "hosts" / worker / "tmp").rglob("_ray_pkg_*"))
    manifest = (project.tokens / NAME).read_bytes()
    verified = (project.folder / "data/verified.json").read_text()
    assert atomic.sha256_file(project.tokens / NAME) in verified
    assert_same_as_local(project, tmp_path)
    assert manifest == (tmp_path / "local-out" / NAME).read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
def test_lost_head(project: Project, tmp_path: Path, data: str) -> None:
    """The driver runs on w1, so that it survives the head."""
    with cluster(tmp_path / "hosts", project.folder, True) as hosts:
        run = project.start("tokenize", hosts["w1"], **remote(hosts, data))
        wait_for_chunks(project, run)
        for name in ("w1", "w2"):
            hosts[name].freeze(*WORKERS)
        hosts["head"].unplug()
        output = run.end(status=1, seconds=60)
        assert "Traceback" not in output
        last = output.splitlines()[-1]
        assert last.startswith("error: ")
        assert "10.77.0.1:6379" in last
        before = project.pieces()
        assert 10 <= len(before) < 100
        output = project.run("tokenize", hosts["w2"])  # local
    assert_found(output, len(before))
    assert {key: project.pieces()[key] for key in before} == before
    assert_same_as_local(project, tmp_path)


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
def test_tasks_end_with_their_driver(
    tmp_path: Path, sample_raw: Path, data: str, number: signal.Signals, status: int
) -> None:
    files = [(sample_raw / file.path, file.rows) for file in RawManifest.load(sample_raw).files]
    batches = [batch for path, rows in files for batch in read_texts(path, "text", 0, rows)]
    texts = [text for _, batch in batches for text in batch]
    long = "".join(filter(None, texts)) * 4  # one chunk: a task of some seconds
    project = Project(tmp_path / "project", write_raw(tmp_path / "raw", [texts, [long]]))
    slow = {"GPT2_ENGINE": "tiktoken"}
    with cluster(tmp_path / "hosts", project.folder, data == "shared") as hosts:

        def tasks() -> list[str]:
            return [
                " ".join(process.cmdline())
                for host in hosts.hosts.values()
                for process in host.titled("ray::tokenize", "ray::read")
            ]

        run = project.start("tokenize", hosts["head"], **remote(hosts, data), **slow)
        wait_for_chunks(project, run)
        assert any("part-1" in task for task in tasks()), "the largest task starts first"
        run.signal(number)
        output = run.end(status, seconds=20)
        wait_for(lambda: not tasks(), 20)
        if status > 0:
            assert output.splitlines()[-1].startswith("stopped")
        before = project.pieces()
        assert 10 <= len(before) < 130
        output = project.run("tokenize", hosts["head"], **remote(hosts, data))
        assert_found(output, len(before))
        assert {key: project.pieces()[key] for key in before} == before
    assert_same_as_local(project, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("data", ["ship", "shared"])
def test_autoscaler_adds_nodes_for_waiting_tasks(
    project: Project, tmp_path: Path, data: str
) -> None:
    """Its provider starts raylets on the host instead of renting machines."""
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
            "module": "raylet_provider.Provider",
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
    }
    with Hosts(tmp_path / "hosts", ["head"], {"head": [project.folder]}) as hosts:
        (tmp_path / "hosts/head/tmp/scaled.yaml").write_text(json.dumps(scaled))
        # Under another name: Ray's monitor finds its own `autoscaler` first.
        module = tmp_path / "hosts/head/tmp/raylet_provider.py"
        shutil.copy2(REPO / "tests/support/autoscaler.py", module)
        fast = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": "/tmp", "RAY_FAKE_CLUSTER": "1"}
        hosts.ray_start("head", "head", 0, "--autoscaling-config=/tmp/scaled.yaml", **fast)
        log = tmp_path / "hosts/head.log"
        wait_for(lambda: "Ray runtime started" in log.read_text(), 90)
        output = project.run("tokenize", hosts["head"], **remote(hosts, data))
        assert "2 nodes: " in output, output
    assert_same_as_local(project, tmp_path)


@pytest.mark.soak
def test_symmetric_run(project: Project, tmp_path: Path) -> None:
    """The same command on each node, as `srun` starts it in docs/cluster.md."""
    names = ("one", "two")
    with Hosts(tmp_path / "hosts", names, {name: [project.folder] for name in names}) as hosts:
        address = hosts.ray_address("one")
        bin_folder = Path(sys.prefix) / "bin"
        command = [str(bin_folder / "ray"), "symmetric-run", "--address", address]
        command += ["--min-nodes", "2", "--num-cpus", "1"]
        command += ["--", sys.executable, "-m", "pipeline.tokenize"]
        variables = NODE_VARIABLES | {
            "RAY_ADDRESS": address,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(project.folder),
        }
        logs = [tmp_path / f"{name}.log" for name in names]
        runs = [
            Run(hosts[name].start(*command, cwd=project.folder, log=log, variables=variables), log)
            for name, log in zip(names, logs, strict=True)
        ]
        output = runs[0].end()
        assert "2 nodes: " in output, output
        runs[1].end(seconds=60)
    assert_same_as_local(project, tmp_path)


@pytest.mark.soak
def test_nodes_that_differ_are_named_before_any_work(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "hosts/w2/tmp/other"  # on w2: /tmp/other
    for name in ("tiktoken", "gigatoken"):
        (other / f"{name}-9.9.9.dist-info").mkdir(parents=True)
        metadata = other / f"{name}-9.9.9.dist-info/METADATA"
        metadata.write_text(f"Name: {name}\nVersion: 9.9.9\n")
    with cluster(tmp_path / "hosts", project.folder, False, PYTHONPATH="/tmp/other") as hosts:
        for data in ("shared", "ship"):
            run = project.start("tokenize", hosts["head"], **remote(hosts, data))
            line = run.end(status=2).splitlines()[-1]
            assert line.startswith("error: ")
            assert re.search(r"10\.77\.0\.3 .*tiktoken: 9\.9\.9 .*gigatoken: 9\.9\.9 ", line)
            assert ("10.77.0.2" in line) == (data == "shared")
            assert (f"{project.folder}/.work" in line) == (data == "shared")
            assert project.pieces() == {}
            assert not list((project.folder / ".work").glob("*/probe*"))
        (tmp_path / "hosts/head/tmp/wrong").write_text("0" * 64)
        wrong = {"RAY_AUTH_TOKEN_PATH": "/tmp/wrong"}
        run = project.start("tokenize", hosts["head"], **remote(hosts, "ship"), **wrong)
        line = run.end(status=2).splitlines()[-1]
        assert line.startswith("error: ray_address: ")
        assert "10.77.0.1:6379" in line


@pytest.mark.soak
def test_local_ray_works_quietly_with_a_tiny_dev_shm(project: Project, tmp_path: Path) -> None:
    """/dev/shm is smaller here than in a Docker container."""
    with Hosts(tmp_path / "hosts", ["one"], {"one": [project.folder]}, shm=2**20) as hosts:
        project.from_files()
        for stage in STAGES:
            for data in ("shared", "ship"):
                output = project.run(stage, hosts["one"], GPT2_DATA=data, GPT2_FRESH="1")
                assert all(line.startswith(stage) for line in output.splitlines()), output
    assert_same_as_local(project, tmp_path)
