"""What a study has finished: one file per run in the store, named by the run's key.

```
.work/studies/NAME/results/<key>.json   a finished run, or one that diverged
.work/studies/NAME/speed/<key>.json     the measured speed of a variant (budget of seconds)
.work/studies/NAME/data/<key>.json      data of variants, checked against the held-out text
.work/studies/NAME/files/<key>.json     the hash of a file of text or tasks, when first used
.work/studies/NAME/logs/                the output of the commands
.work/studies/NAME/tree-0/              the clone that runs work in (workspace.py)
```

A file appears complete, by rename, and knows its hash. A kill loses the run that was in progress
only, whose checkpoints are in the store of runs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.runtime.machine import Machine, project_root
from pipeline.store import atomic
from train.study.definition import Planned, Study
from train.study.environment import speed_settings


@dataclass(frozen=True)
class Results:
    """The folder of a study."""

    folder: Path
    machine: Machine

    @classmethod
    def of(cls, study: Study, machine: Machine) -> Results:
        """Return the folder of a study; nothing is created."""
        store = project_root() / (machine.work_dir or Path(".work")).expanduser()
        return cls(store.absolute() / "studies" / study.name, machine)

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """Read a record; None if there is none, or a damaged one."""
        with contextlib.suppress(OSError, ValueError):
            value = atomic.read_sealed(self.folder / kind / f"{key}.json")
            return value or None  # `{}` has no seal, so it passes
        return None

    @cached_property
    def speed_settings(self) -> dict[str, Any]:
        """All that a speed depends on, in addition to parameters."""
        return speed_settings(self.machine)

    def speed(self, study: Study, variant: str) -> dict[str, Any] | None:
        """Read the measured speed of a variant; None without one, and for a budget of tokens."""
        if study.file.budget.seconds is None:
            return None
        return self.read("speed", study.speed_key(variant, self.speed_settings))

    def write(self, kind: str, key: str, record: dict[str, Any]) -> None:
        """Write a record, which appears complete."""
        atomic.write_json(self.folder / kind / f"{key}.json", atomic.sealed(record))


def planned(study: Study, results: Results) -> list[Planned] | None:
    """Return all runs, seed by seed; None if a speed must be measured before they are known."""
    speeds: dict[str, float | None] = dict.fromkeys(study.variants)
    if study.file.budget.seconds is not None:
        for variant in study.variants:
            record = results.speed(study, variant)
            if record is None:
                return None
            speeds[variant] = record["seconds_per_step"]
    return [
        study.run(variant, seed, speeds[variant])
        for seed in study.seeds
        for variant in study.variants
    ]
