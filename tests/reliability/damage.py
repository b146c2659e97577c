"""Damage in every file of a finished run: a flipped bit, half of it, a pipe in its place.

For each kind of file, first its readers run: no result may change without the file being named.
Then all commands run in order, up to twice, because `verify` removes what is damaged: they must
restore every byte, where the source of the byte still exists.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability import project
from tests.reliability.commit_points import CHAIN
from tests.reliability.stages import Stages

PIPE = "named pipe"
DAMAGES = ("flipped bit", "truncation", PIPE)
NO_RESULT, REPAIRED, NAMED = "not read for any result", "repaired", "named, not repaired"

# The stage that writes a file, by its path; the store is used by all.
_WRITERS = {
    "data/raw/": "download",
    "data/selection/": "curate",
    "data/tokens/": "tokenize",
    "data/": "verify",
    "metrics/data.json": "verify",
    "metrics/d": "verify",
    "metrics/hosts": "verify",
    "artifacts/checkpoint/": "train",
    "artifacts/log.jsonl": "train",
    "artifacts/training.json": "train",
    "metrics/live/": "train",
    "metrics/train.json": "train",
    "artifacts/hf/": "export",
    "artifacts/report.html": "report",
    "artifacts/": "evaluate",
    "metrics/": "evaluate",
}
# What the slow stages read. A stage whose inputs and outs are all as they were is not run again: it
# would write the same.
_INPUTS = {
    "evaluate": ("artifacts/checkpoint/", "data/tokens/", "metrics/live/"),
    "export": (
        *("artifacts/checkpoint/", "artifacts/evaluation.json", "artifacts/training.json"),
        "data/tokens/manifest.json",
    ),
    "report": ("artifacts/", "data/", "metrics/"),
}
_PIPELINE = tuple(stage for stage in CHAIN if stage != "publish")


@dataclass
class Outcome:
    """What happened to one kind of damage in one kind of file."""

    kind: str
    damage: str
    what: str = ""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kinds(folder: Path) -> dict[str, str]:
    """Return the kinds of files in a finished project: kind -> one file of this kind."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ours = name.startswith(("data/", "artifacts/", "metrics/", ".work/"))
        if path.is_file() and ours and path.stat().st_size > 1 and "/locks/" not in name:
            kind = re.sub(r"[0-9a-f]{32,}", "KEY", name)
            kind = re.sub(r"\d{2,}", "N", kind)
            found.setdefault(re.sub(r"plots/metrics/.*", "plots/metrics/*", kind), name)
    return found


def damage(path: Path, how: str) -> None:
    """Flip a bit in the middle of a file, or cut it in half; keep its time, as a bad disk does.

    A named pipe in its place stands for all that is no file: who reads it waits for ever.
    """
    if how == PIPE:
        path.unlink()
        os.mkfifo(path)
        return
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if how == "truncation":
        del data[len(data) // 2 :]
    path.chmod(0o644)
    with open(path, "r+b") as file:  # the same inode: DVC and the store hold hard links
        file.write(data)
        file.truncate(len(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class Damages:
    """A finished project, in copies of which files are damaged."""

    def __init__(self, stages: Stages, finished: Path, work: Path) -> None:
        self.stages, self.finished, self.work = stages, finished, work
        self.expected = project.contents(finished)
        self._damaged = ""

    def test(self, kind: str, name: str, how: str) -> Outcome:
        """Damage a file, run its readers, then all commands."""
        begin, outcome = time.monotonic(), Outcome(kind, how)
        project.copy(self.finished, self.work)
        path = self.work / name
        inode, damaged = path.stat().st_ino, {name}
        for other in self.work.rglob("*"):
            if how != PIPE and other.is_file() and other.stat().st_ino == inode:
                damaged.add(other.relative_to(self.work).as_posix())
        damage(path, how)
        self._damaged = name
        readers = self._readers(name)
        output = self._run(readers, outcome)
        labels = {path.name, path.parent.name[:12], name}
        named = any(label in line for line in output for label in labels if _is_complaint(line))
        found = project.contents(self.work)
        changed = [n for n, what in self.expected.items() if found.get(n, what) != what]
        if not named and (silent := [n for n in changed if n not in damaged]):
            outcome.problems.append(f"{name}, {how}: changes {silent[:3]} silently")
        for _ in range(2):
            output += self._run(_PIPELINE, outcome)
            left = project.differences(project.contents(self.work), self.expected)
            if not left:
                break
        named = named or any(
            label in line for line in output for label in labels if _is_complaint(line)
        )
        outcome.what = REPAIRED if not left else NAMED if named else NO_RESULT
        unexpected = [line for line in left if line.split(" ", 1)[1] not in damaged]
        if unexpected and not named:
            outcome.problems.append(f"{name}, {how}: not repaired, not named: {unexpected[:3]}")
        outcome.seconds = time.monotonic() - begin
        return outcome

    def _readers(self, name: str) -> Sequence[str]:
        """Return the stages after the one that has written a file, without `verify`."""
        writer = next((stage for prefix, stage in _WRITERS.items() if name.startswith(prefix)), "")
        first = _PIPELINE.index(writer) + 1 if writer else 0
        if _trains_again(name):
            project.remove_outs(self.work, "train")
            shutil.rmtree(self.work / ".work/runs")
        return [stage for stage in _PIPELINE[first:] if stage != "verify"]

    def _run(self, names: Sequence[str], outcome: Outcome) -> list[str]:
        """Run stages in order, as far as they can change anything; return their lines."""
        lines: list[str] = []
        for name in names:
            if self._has_nothing_to_do(name):
                continue
            status, output, _ = self.stages.run(name, self.work)
            lines += output.splitlines()
            if status is None or "Traceback" in output:
                last = output.strip().splitlines()[-1][:200]
                outcome.problems.append(f"{outcome.kind}, {outcome.damage}: {name}: {last}")
            if status != 0:
                break
        return lines

    def _has_nothing_to_do(self, name: str) -> bool:
        if name not in _INPUTS:
            return False
        parts = (*_INPUTS[name], *project.OUTS[name])
        return self._bytes(self.work, parts) == self._bytes(self.finished, parts)

    def _bytes(self, folder: Path, parts: tuple[str, ...]) -> dict[str, bytes]:
        """Return the bytes of files by path; where a time may differ, what must be the same."""
        found = {}
        for name, what in project.contents(folder).items():
            if name.startswith(parts):
                same = name != self._damaged and self.expected.get(name) == what
                found[name] = what.encode() if same else project.read(folder / name)
        return found


def _trains_again(name: str) -> bool:
    """Whether the run is removed, to see that training finds the damage."""
    return name.startswith("data/")


def _is_complaint(line: str) -> bool:
    return bool(re.match(r"(\w+: )?(error|warning|note|data/|verify: damaged|WARNING)", line)) or (
        "fetching them" in line
    )
