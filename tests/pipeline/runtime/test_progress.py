"""Tests for `pipeline.runtime.progress` on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from pipeline.runtime.progress import Progress


@pytest.mark.parametrize(("columns", "notes"), [(60, 0), (100, 2), (170, 6)])
def test_the_bar_keeps_its_room_beside_the_notes(
    columns: int, notes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("tokenize", 10_000_000_000, "tokens") as progress:
            progress.task_counts = "1 node: 2 running, 7 waiting, 3 done, 0 retried"
            progress.advance(5_000_000_000, "14,870,000 documents, 109.3 MB/s")
            progress.refresh()
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(read_end, 10_000):
            shown += block
    os.close(read_end)
    line = shown.decode().strip().splitlines()[-1].split("\r")[-1]
    assert len(line) <= columns
    assert line.count("█") >= 5  # half of the bar
    assert line.count(", ") == notes
