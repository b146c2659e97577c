"""Of pipeline.cluster: how Ray is started here, joined there, and left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster.join import cluster
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.repo import REPO

WAIT = """\
import time
from pipeline import stage
from pipeline.cluster import cluster, run_tasks
from pipeline.machine import Machine
def sleep():
    time.sleep(120)
def main():
    with cluster(Machine(workers=1)) as cpus:
        assert cpus == 1
        print("ready", flush=True)
        list(run_tasks(sleep, [()], 1, "sleep"))
stage.run(main)
"""


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9 "),
        ("nowhere.invalid:6379", "no Ray cluster answers at nowhere.invalid:6379 "),
        ("ray://head:10001", "ray://head:10001 is Ray Client's; start the stage on a node"),
    ],
)
def test_an_address_where_no_cluster_is_is_named_at_once(
    tmp_path: Path, address: str, said: str
) -> None:
    machine = Machine(ray_address=address, work_dir=tmp_path)
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"^ray_address: {said}"), cluster(machine):
        pass
    assert time.monotonic() - begin < 15
    assert not list(tmp_path.glob("*/probe-*")), "nothing is left of the probe"


def test_sigterm_while_ray_works_is_status_3_and_leaves_no_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    # The pipe closes when the last process of Ray that holds it is gone.
    assert process.communicate(timeout=30)[1] == "stopped; the same command goes on from here\n"
    assert process.returncode == 3


def test_a_ray_that_does_not_start_is_told_in_a_line(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)  # no socket's path may be so long
    long.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(  # a process of its own: this one may have a Ray already
        [sys.executable, "-c", WAIT], cwd=REPO, text=True, capture_output=True,
        env={**variables, "RAY_TMPDIR": str(long)},
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Ray did not start on this machine (")
    assert "AF_UNIX" in line
