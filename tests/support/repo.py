"""Where the repository is, and the real data that may lie beside it."""

from pathlib import Path

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared"  # real text and tasks; tests must pass without
