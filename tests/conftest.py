"""Fixtures of all tests: a clean environment, the sample data, and machine settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.cluster.join import LOCAL_VARIABLES
from pipeline.download.stage import download
from pipeline.params import SourceParams
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store

# On a shared machine a time limit per example only makes tests flaky.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="session")
def _clean_session() -> Iterator[None]:
    """Remove the caller's settings before any test or session fixture."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in os.environ.copy():
            if variable.startswith(("GPT2_", "DVC_", "RAY_")):
                patch.delenv(variable)
        for variable, value in LOCAL_VARIABLES.items():  # a test may import Ray before its start
            patch.setenv(variable, value)
        yield


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """Undo changes that a test, or Ray, makes to the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def sample_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/raw` with the complete sample, as downloaded. Do not change it."""
    folder = tmp_path_factory.mktemp("sample")
    download({"main": SourceParams()}, Store(folder / "work"), folder / "raw", Machine())
    return folder / "raw"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Settings with one worker and a store for this test."""
    return Machine(workers=1, work_dir=tmp_path / "work")
