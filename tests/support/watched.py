"""A command watched while it runs: what it says, the memory that its processes hold, its end."""

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
class Seen:
    """What became of a command.

    Attributes:
        output: What it said, on stdout and stderr.
        status: Its exit status.
        peak: Most bytes that it and all that it had started held together, looked at every two
            seconds.
        killed: Whether it was killed here.
    """

    output: str
    status: int
    peak: int
    killed: bool


def watch(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    until: Callable[[], bool] | None = None,
) -> Seen:
    """Run a command to its end, or ``until`` that comes true: then SIGKILL meets all of it."""
    peak, killed, look = 0, False, 0.0
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file)
        while process.poll() is None:
            if time.monotonic() >= look:  # not more often: the kernel walks all pages for it
                peak = max(peak, sum(map(_memory, _family(process.pid))))
                look = time.monotonic() + 2
            if until is not None and until():
                killed = True
                for member in _family(process.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
            time.sleep(0.5 if until is None else 0.1)
        file.seek(0)
        output = file.read().decode("utf-8", errors="replace")
    return Seen(output, process.returncode, peak, killed)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    """Bytes that a process holds, its part of what it shares; where not known, all resident."""
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "pss", info.rss))
