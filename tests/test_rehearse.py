"""Tests for tests.rehearse, with small sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repo import REPO

pytestmark = pytest.mark.soak


def test_quick_rehearsal_passes_all_checks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.rehearse", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "FAILED" not in done.stdout
    reports = {path.name for path in tmp_path.glob("*.html")}
    parts = {"full", "shallow", "compiled", "one-gpu", "one-hour"}
    assert reports == {f"{part}.html" for part in parts}
