"""Tests for pipeline.cluster.join: start a local Ray, join a cluster, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import join
from pipeline.cluster.join import cluster
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.ports import listeners
from tests.support.repo import REPO
from tests.support.waiting import wait_for

WAIT = """\
import time
from pipeline.cluster.join import cluster
from pipeline.cluster.tasks import run_tasks
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
def sleep():
    time.sleep(120)
def main():
    with cluster(Machine(workers=1)) as cpus:
        assert cpus == 1
        print("ready", flush=True)
        list(run_tasks(sleep, [()], 1, "sleep"))
command.run(main)
"""


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:6379", "ray://head:10001"])
def test_address_without_a_cluster_fails_at_once(tmp_path: Path, address: str) -> None:
    machine = Machine(ray_address=address, work_dir=tmp_path)
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"^ray_address: .*{address}"), cluster(machine):
        pass
    assert time.monotonic() - begin < 15
    assert not list(tmp_path.glob("*/probe-*")), "the probe is removed"


def test_complete_package_is_shipped_to_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    shipped: dict[str, Any] = {}

    def init(address: str, *, runtime_env: dict[str, Any], **_: Any) -> None:
        shipped.update(runtime_env)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    machine = Machine(ray_address="auto", data="ship")
    with pytest.raises(UserError), cluster(machine, ships=True):
        pass
    (folder,) = map(Path, shipped["py_modules"])
    assert folder == REPO / "pipeline"
    assert {path.parent.name for path in folder.glob("*/__init__.py")} >= {
        "cluster", "format", "runtime", "store", "tokenize",
    }  # fmt: skip
    assert (folder / "format/gpt2.tiktoken").is_file()
    assert shipped["excludes"] == ["__pycache__"]


def test_sigterm_exits_with_status_3_and_leaves_no_ray_process(tmp_path: Path) -> None:
    """Also where Ray can use neither the home folder nor TMPDIR. Nothing listens on the network."""
    long = tmp_path / ("x" * 120)  # too long for the path of a socket
    long.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={
            **os.environ,
            **dict.fromkeys(join.LOCAL_VARIABLES, "1"),  # not the user's to set
            "HOME": "/dev/null/none",
            "TMPDIR": str(long),
        },
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    wait_for(lambda: any("ray::sleep" in name for name in listeners(process.pid)))
    ports = listeners(process.pid)
    assert len(ports) >= 6  # two of the raylet; GCS, agent, driver, worker
    assert [name for name, loopback in ports.items() if not loopback] == []
    process.send_signal(signal.SIGTERM)
    # The pipe closes when the last Ray process that holds it has ended.
    (line,) = process.communicate(timeout=30)[1].splitlines()
    assert line.startswith("stopped")
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("tmpdir", "replaced"), [("/tmp", False), ("/tmp/" + "x" * 100, True), ("/dev/null/none", True)]
)
def test_ray_is_kept_out_of_an_unusable_tmpdir(
    monkeypatch: pytest.MonkeyPatch, tmpdir: str, replaced: bool
) -> None:
    monkeypatch.setenv("TMPDIR", tmpdir)
    join._use_short_tmpdir()
    assert ("RAY_TMPDIR" in os.environ) == replaced


def test_ray_that_does_not_start_is_one_line_with_status_1(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)  # too long for the path of a socket
    long.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(  # this process may have a Ray already
        [sys.executable, "-c", WAIT], cwd=REPO, text=True, capture_output=True,
        env={**variables, "RAY_TMPDIR": str(long)},
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "AF_UNIX" in line
