"""Run a command, measure the memory of its processes, and kill it on a condition."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Result:
    """Result of a command."""

    output: str
    """Stdout and stderr."""
    status: int
    peak: int
    """Most bytes held at once by the command and its descendants, sampled every 2 s."""
    killed: bool


def run_watched(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    until: Callable[[], bool] | None = None,
) -> Result:
    """Run a command to its end; if ``until`` gets true, kill it and its descendants (SIGKILL)."""
    peak, killed, next_sample = 0, False, 0.0
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file)
        while process.poll() is None:
            if time.monotonic() >= next_sample:  # rarely, because the kernel walks all pages
                peak = max(peak, sum(map(_memory, _family(process.pid))))
                next_sample = time.monotonic() + 2
            if until is not None and until():
                killed = True
                for member in _family(process.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
            time.sleep(0.5 if until is None else 0.1)
        file.seek(0)
        output = file.read().decode("utf-8", errors="replace")
    return Result(output, process.returncode, peak, killed)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    """Return the proportional set size in bytes; the resident size if that is unknown."""
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "pss", info.rss))
