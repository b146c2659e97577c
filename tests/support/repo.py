"""Paths of the repository and of real data beside it."""

from pathlib import Path

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared"  # optional: real text and tasks
