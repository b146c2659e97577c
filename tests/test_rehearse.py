"""Of tests.rehearse: small, but all of its parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repo import REPO

pytestmark = pytest.mark.soak


def test_the_quick_rehearsal_finds_all_as_it_must_be(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rehearse", "--quick", "--out", str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("all as it must be")
    reports = {path.name for path in tmp_path.glob("*.html")}
    assert reports == {"full.html", "shallow.html", "compiled.html"}
