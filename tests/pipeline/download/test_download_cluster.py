"""Tests for `pipeline.download` on a Ray cluster with shared storage: every node downloads."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.downloads import Project, sample_files
from tests.support.hub import Hub

pytestmark = pytest.mark.soak  # CI covers clusters in test_hosts.py

MEGABYTE = 2**20


def downloading_raylets(address: str) -> set[int]:
    """Return the pids of the cluster's raylets, one per node, with a downloading worker."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if command[0].startswith("ray::download"):
            with contextlib.suppress(psutil.Error, AttributeError):
                raylet = process.parent()
                if f"--gcs-address={address}" in raylet.cmdline():
                    found.add(raylet.pid)
    return found


def test_downloads_spread_over_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * MEGABYTE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 * MEGABYTE)
        with Hub(bandwidth=MEGABYTE) as hub:
            files = sample_files(4, 6 * MEGABYTE)
            hub.repo().commit(files)
            project = Project(tmp_path / "project", hub)
            process = project.start(RAY_ADDRESS=cluster.address, RAY_AUTH_MODE="disabled")
            nodes: set[int] = set()
            while process.poll() is None:
                nodes |= downloading_raylets(cluster.address)
                time.sleep(0.2)
            project.end(process)
            assert len(nodes) == 2
            project.check(files)
    finally:
        cluster.shutdown()
