"""What all tests share: a clean environment, real data, and a machine with its own store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.download.stage import download
from pipeline.params import SourceParams
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store


def _is_ours(variable: str) -> bool:
    return variable.startswith(("GPT2_", "DVC_", "RAY_"))


@pytest.fixture(autouse=True, scope="session")
def _clean_session() -> Iterator[None]:
    """Nothing of the caller's machine decides a test, session fixtures included."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in filter(_is_ours, list(os.environ)):
            patch.delenv(variable)
        yield


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """What a test, or Ray, puts into the environment does not reach the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def sample_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/raw` as the real download leaves it: the whole sample. Not to be changed."""
    folder = tmp_path_factory.mktemp("sample")
    download(SourceParams(), Store(folder / "work"), folder / "raw", Machine())
    return folder / "raw"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One worker, and a store of its own."""
    return Machine(workers=1, work_dir=tmp_path / "work")
