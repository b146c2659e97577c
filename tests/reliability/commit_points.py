"""Every commit point of a stage: a fault at each call that may change the disk, then a second run.

1. Run the stage undisturbed and list its calls (faults.c): N of them.
2. For each call k: in a fresh copy of the prepared project, run the stage with a fault at call k,
   then the same command undisturbed. It must end with status 0 and leave exactly the bytes of step
   1, without a stray file.

SIGKILL comes before call k, or in the middle of it if it is a write, and so also after call k - 1:
nothing else changes the disk. After the last call there is nothing left to lose.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability import project
from tests.reliability.stages import CLOCK, KILL, TEAR, Stages
from tests.support.hub import FINEWEB

SPACE, DATA, PERMISSION = 1, 2, 4  # what a call needs, as in faults.c

FAULTS = {
    "SIGKILL before the call": KILL,
    "SIGKILL in the middle of a write": TEAR,
    "ENOSPC from the call on": errno.ENOSPC,
    "EIO": errno.EIO,
    "EACCES": errno.EACCES,
    "clock set back by an hour": CLOCK,
}
_NEEDS = {errno.ENOSPC: SPACE, errno.EIO: DATA, errno.EACCES: PERMISSION}

CHAIN = (
    "download", "curate", "tokenize", "verify", "train", "publish", "evaluate", "export", "report"
)  # fmt: skip
STAGES = (*CHAIN, "download from a hub", "dvc repro")


@dataclass
class Result:
    """One row of the table: a fault in a stage, at a number of points."""

    fault: str
    stage: str
    points: int = 0
    of: int = 0
    """Number of points there are."""
    survived: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    """Points after which the second run failed or left other bytes."""
    unexplained: list[str] = field(default_factory=list)
    """Points at which the faulted run ended in a traceback, a hang, or with status 0 but wrong."""


class Prepared:
    """The project before each stage, made by running the stages before it."""

    def __init__(self, stages: Stages, scratch: Path) -> None:
        self._stages, self._scratch = stages, scratch
        self.work = scratch / "work"  # always this folder: identities of local files have the path
        self._ready: dict[str, Path] = {}
        self._done = project.make_project(scratch / "new")  # by the stages so far

    def before(self, stage: str) -> Path:
        """Return the prepared project of a stage. Do not change it."""
        if stage == "dvc repro" and stage not in self._ready:
            folder = self._scratch / f"before {stage}"
            self._ready[stage] = project.make_dvc_project(folder, self._stages.environment)
        elif stage == "download from a hub" and stage not in self._ready:
            source = {"kind": "hub", "paths": [], "config": "sample-10BT", "repo": FINEWEB}
            folder = self._scratch / f"before {stage}"
            self._ready[stage] = project.make_project(folder, source=source)
        if stage in self._ready:
            return self._ready[stage]
        for name in CHAIN:
            if name not in self._ready:
                project.copy(self._done, self.work)
                if name == "publish":
                    project.remove_outs(self.work, name)
                self._ready[name] = project.copy(self.work, self._scratch / f"before {name}")
                status, output, _ = self._stages.run(name, self.work)
                assert status == 0, f"{name}: {output}"
                self._done = project.copy(self.work, self._scratch / "done")
            if name == stage:
                return self._ready[name]
        raise AssertionError(stage)

    def after_all(self) -> Path:
        """Return the project after the last stage."""
        self.before(CHAIN[-1])
        return self._done


class CommitPoints:
    """The calls of a stage that may change the disk."""

    def __init__(self, stages: Stages, stage: str, prepared: Path, work: Path) -> None:
        self.stages, self.stage, self.prepared, self.work = stages, stage, prepared, work
        self._run()  # imports, caches of the process
        self.calls = self._run()
        self.expected = project.contents(work)
        self.undisturbed = project.copy(work, work.with_name("undisturbed"))
        self._run()
        assert not (wrong := project.differences(project.contents(work), self.expected)), wrong

    def _run(self) -> list[str]:
        project.copy(self.prepared, self.work)
        status, output, calls = self.stages.run(self.stage, self.work)
        assert status == 0, f"{self.stage}, undisturbed: status {status}\n{output}"
        return calls

    def points(self, mode: int) -> list[int]:
        """Return the numbers of the calls to which a fault applies."""
        words = [call.split(" ", 2) for call in self.calls]
        if mode == TEAR:
            return [k for k, (name, _, _) in enumerate(words) if name == "write"]
        return [k for k, (_, needs, _) in enumerate(words) if int(needs) & _NEEDS.get(mode, 7)]

    def sample(self, mode: int, most: int | None) -> list[int]:
        """Return at most so many points: of each kind of call one, then spread evenly."""
        points = self.points(mode)
        if most is None or len(points) <= most:
            return points
        kinds: dict[str, int] = {}
        for k in points:
            kinds.setdefault(re.sub(r"[0-9a-f]{16,}|\d+|\.tmp\w+", "#", self.calls[k]), k)
        firsts = sorted(kinds.values())
        others = [k for k in points if k not in firsts]
        chosen = _spread(firsts, most)
        return sorted({*chosen, *_spread(others, most - len(chosen))})

    def test(self, fault: str, most: int | None = None) -> Result:
        """Test a fault at each of its points, or at ``most`` of them."""
        mode, begin = FAULTS[fault], time.monotonic()
        chosen = self.sample(mode, most)
        result = Result(fault, self.stage, points=len(chosen), of=len(self.points(mode)))
        for k in chosen:
            where = f"{self.stage}, {fault}, call {k} of {len(self.calls)} ({self.calls[k]})"
            if problem := self._faulted(mode, k):
                result.unexplained.append(f"{where}: {problem}")
            if problem := self._second_run():
                result.lost.append(f"{where}: {problem}")
            result.survived += not (
                any(line.startswith(where) for line in (*result.lost, *result.unexplained))
            )
        result.seconds = time.monotonic() - begin
        return result

    def _faulted(self, mode: int, k: int) -> str | None:
        """Run with the fault; return what is wrong with how it ended."""
        project.copy(self.prepared, self.work)
        status, output, _ = self.stages.run(self.stage, self.work, mode, k)
        lines = output.strip().splitlines() or [""]
        if status is None:
            return f"hangs: {lines[-1]}"
        if status == -9 and mode < 0:
            return None
        if status == 0:
            found = project.differences(project.contents(self.work), self.expected)
            wrong = [line for line in found if mode == CLOCK or not line.startswith("stray")]
            return f"status 0, but {wrong[:3]}" if wrong else None
        statuses = (255,) if self.stage == "dvc repro" else (1, 2)
        said = "Traceback" not in output and _says_error(lines)
        if status in statuses and said and mode != CLOCK:
            return None
        return f"status {status}: {lines[-1][:200]}"

    def _second_run(self) -> str | None:
        """Run again without a fault; return what differs from an undisturbed run."""
        if self.stage == "dvc repro":  # as `make run` does
            self.stages.run("repair", self.work)
        status, output, _ = self.stages.run(self.stage, self.work)
        if status != 0:
            return f"second run: status {status}: {(output.strip().splitlines() or [''])[-1][:200]}"
        found = project.differences(project.contents(self.work), self.expected)
        if not found:
            return None
        lines = project.differing_lines(self.work, self.undisturbed, found)
        return "\n    ".join([f"second run: {found[:3]}", *lines[:6]])


def _says_error(lines: Sequence[str]) -> bool:
    return any(line.startswith(("error: ", "ERROR: ")) for line in lines)


def _spread(points: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the points, evenly spread, with the first and the last."""
    if len(points) <= most:
        return list(points)
    if most < 2:
        return [points[len(points) // 2]] * most
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
