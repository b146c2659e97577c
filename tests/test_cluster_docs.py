"""Tests for the files of docs/cluster.md: cluster configurations, node requirements."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.cluster.join import NODE_VARIABLES
from pipeline.tokenize.stage import _TASK_MEMORY
from tests.test_layout import reached, roots

DOCS = Path(__file__).parents[1] / "docs"
CONFIGS = sorted(DOCS.glob("cluster-*.yaml"))
# Modules with the functions of tasks, which workers import.
TASKS = (
    "pipeline/verify/stage.py",
    "pipeline/tokenize/encode_chunk.py",
    "pipeline/tokenize/index_chunk.py",
    "pipeline/tokenize/ship_chunks.py",
    "pipeline/cluster/probe.py",
)
DOWNLOAD_TASKS = ("pipeline/download/ingest.py",)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_cluster_config_is_valid_for_ray_up(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = YAML(typ="safe", pure=True).load(path)
    validate_config(prepare_config(config))
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(". ~/gpt2/docs/node-environment.sh" in command for command in starts)


def test_gcp_config_declares_enough_memory_per_task() -> None:
    """The autoscaler adds no node for a task that needs more. On AWS, Ray asks AWS."""
    config: dict[str, Any] = YAML(typ="safe", pure=True).load(DOCS / "cluster-gcp.yaml")
    resources = config["available_node_types"]["worker"]["resources"]
    assert resources["memory"] >= resources["CPU"] * _TASK_MEMORY


def requirements() -> tuple[set[str], set[str]]:
    """Return the packages that every node needs, and those that downloading nodes need as well."""
    text = (DOCS / "node-requirements.txt").read_text()
    always, downloads = filter(str.strip, re.split(r"^#.*$", text, flags=re.MULTILINE))
    names = re.compile(r"^([\w.-]+)", re.MULTILINE)
    return set(names.findall(always)), set(names.findall(downloads))


def test_node_requirements_cover_the_imports_of_tasks() -> None:
    always, downloads = requirements()
    packages = metadata.packages_distributions()

    def needed(*modules: str) -> set[str]:
        found = {root for file in reached(*modules) for root in roots(file)}
        found -= {*sys.stdlib_module_names, "pipeline"}
        return {packages[root][0].lower().replace("_", "-") for root in found if root in packages}

    assert needed(*TASKS) <= always
    assert needed(*TASKS, *DOWNLOAD_TASKS) <= always | downloads


def test_node_environment_sets_the_keepalive_of_the_driver() -> None:
    lines = (DOCS / "node-environment.sh").read_text().splitlines()
    exported = dict(line[7:].split(" #")[0].split("=") for line in lines if line[:7] == "export ")
    assert NODE_VARIABLES.items() <= exported.items()
