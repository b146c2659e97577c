"""Check a run piece by piece: its chain without running anything, its segments by running again."""
