"""Fixtures of the pipeline's tests: one shared Ray, whose start takes seconds, and small data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.cluster.join import cluster
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from tests.support.small_data import Project, some_texts, tokenize_here, write_raw


@pytest.fixture(scope="session")
def ray_cpus() -> Iterator[int]:
    """Start a local Ray with the pipeline's own code; yield its number of CPUs."""
    with cluster(Machine(workers=1)) as cpus:
        yield cpus


@pytest.fixture
def one_ray(ray_cpus: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make the stages use the session's Ray instead of starting their own."""

    def running(machine: Machine, *_: object, **__: object) -> AbstractContextManager[int]:
        return contextlib.nullcontext(ray_cpus)

    monkeypatch.setattr("pipeline.curate.stage.cluster", running)
    monkeypatch.setattr("pipeline.tokenize.stage.cluster", running)
    monkeypatch.setattr("pipeline.verify.stage.cluster", running)
    return ray_cpus


@pytest.fixture(scope="session")
def small_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two source files of a few dozen documents; read-only."""
    files = [some_texts(30, "first"), some_texts(25, "second")]
    return write_raw(tmp_path_factory.mktemp("small") / "raw", files)


@pytest.fixture(scope="session")
def small_tokens(small_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of `small_raw`, in some thirteen shards of train and a few of val; read-only."""
    root = tmp_path_factory.mktemp("small")
    params = TokenizeParams(shard_tokens=2000, val_per_10k=1500)
    tokenize_here(small_raw, root / "tokens", params, Machine(work_dir=root / "work"))
    return root / "tokens"


@pytest.fixture
def project(tmp_path: Path, small_raw: Path) -> Project:
    """Create a project folder."""
    root = tmp_path / "project"
    root.mkdir()
    return Project(root, small_raw)
