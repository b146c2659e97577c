"""One Ray for all tests that need one in this process: each start of it takes seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.cluster.join import cluster
from pipeline.runtime.machine import Machine
from tests.support.small_data import MakeProject, Project, some_texts, write_raw


@pytest.fixture(scope="session")
def ray_cpus() -> Iterator[int]:
    """A real local Ray, started by the real code; the number of its CPUs."""
    with cluster(Machine(workers=1)) as cpus:
        yield cpus


@pytest.fixture
def one_ray(ray_cpus: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have the stages use the session's Ray in place of one of their own."""

    def running(machine: Machine, *_: object, **__: object) -> AbstractContextManager[int]:
        return contextlib.nullcontext(ray_cpus)

    monkeypatch.setattr("pipeline.tokenize.stage.cluster", running)
    monkeypatch.setattr("pipeline.verify.stage.cluster", running)
    return ray_cpus


@pytest.fixture(scope="session")
def small_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two source files of a few dozen documents. Not to be changed."""
    files = [some_texts(30, "first"), some_texts(25, "second")]
    return write_raw(tmp_path_factory.mktemp("small") / "raw", files)


@pytest.fixture
def project(tmp_path: Path, small_raw: Path) -> Project:
    """A project folder of the test's own."""
    root = tmp_path / "project"
    root.mkdir()
    return Project(root, small_raw)


@pytest.fixture
def make_project(tmp_path: Path, small_raw: Path) -> MakeProject:
    """Further project folders."""

    def make(name: str) -> Project:
        (tmp_path / name).mkdir()
        return Project(tmp_path / name, small_raw)

    return make
