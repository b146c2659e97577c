"""Fixtures of the tests of training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.training import Project, make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project, and the current folder in it."""
    made = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("GPT2_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GPT2_DEVICE", "cpu")
    # One thread: on a busy machine, two of them mostly wait for each other.
    monkeypatch.setattr("train.distributed.world.usable_cores", lambda: 1)
    return made
