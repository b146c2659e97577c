"""Of docs/cluster.md and the files beside it: Ray takes them, and they name what a node needs."""

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
from tests.support.hosts import KEEPALIVE
from tests.test_layout import reached, roots

DOCS = Path(__file__).parents[1] / "docs"
CLUSTERS = sorted(DOCS.glob("cluster-*.yaml"))
# What tasks run, on any node.
TASKS = (
    "pipeline/verify/checks.py",
    "pipeline/tokenize/encode_chunk.py",
    "pipeline/tokenize/ship_chunks.py",
    "pipeline/cluster/probe.py",
)
DOWNLOADS = (
    "pipeline/download/ingest.py",
    "pipeline/download/hub.py",
    "pipeline/download/local_files.py",
)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_up_takes_the_clusters(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    described: dict[str, Any] = YAML(typ="safe", pure=True).load(path)
    validate_config(prepare_config(described))
    commands = described["head_start_ray_commands"] + described["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(". ~/gpt2/docs/node-environment.sh" in command for command in starts)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_the_autoscaler_knows_that_a_worker_has_what_a_task_asks_for(path: Path) -> None:
    described: dict[str, Any] = YAML(typ="safe", pure=True).load(path)
    if described["provider"]["type"] in ("aws", "local"):
        return  # Ray asks AWS for it; machines of one's own are all there from the beginning
    resources = described["available_node_types"]["worker"]["resources"]
    assert resources["memory"] >= resources["CPU"] * _TASK_MEMORY


def requirements() -> tuple[set[str], set[str]]:
    """The packages that every node needs, and those that one needs which downloads."""
    text = (DOCS / "node-requirements.txt").read_text()
    always, downloads = text.split("# Where nodes download")
    names = re.compile(r"^([\w.-]+)", re.MULTILINE)
    return set(names.findall(always)), set(names.findall(downloads))


def test_a_node_has_what_the_tasks_import() -> None:
    always, downloads = requirements()
    packages = metadata.packages_distributions()

    def needed(*modules: str) -> set[str]:
        found = {root for file in reached(*modules) for root in roots(file)}
        found -= {*sys.stdlib_module_names, "pipeline"}
        return {packages[root][0].lower().replace("_", "-") for root in found if root in packages}

    assert needed(*TASKS) <= always
    assert needed(*TASKS, *DOWNLOADS) <= always | downloads


def test_a_node_notices_silence_as_the_driver_does() -> None:
    lines = (DOCS / "node-environment.sh").read_text().splitlines()
    exported = dict(line[7:].split(" #")[0].split("=") for line in lines if line[:7] == "export ")
    assert NODE_VARIABLES.items() <= exported.items()
    assert NODE_VARIABLES == KEEPALIVE
