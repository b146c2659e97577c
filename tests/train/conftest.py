"""Fixtures for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.training import Project, kill_group, make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project in a temporary folder, which is also the working directory."""
    made = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT2_DEVICE", "cpu")
    # One thread: on a busy machine, two of them mostly wait for each other.
    monkeypatch.setattr("train.distributed.rendezvous.usable_cores", lambda: 1)
    yield made
    for process in made.processes:
        kill_group(process)
