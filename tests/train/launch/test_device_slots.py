"""Tests for train.launch.device_slots: runs that share a machine use different devices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, usable_cores
from train.launch.device_slots import claim, claim_devices

GPUS = ["0", "1", "GPU-8f3a/x", "3"]


def test_parts_do_not_overlap_and_come_free(tmp_path: Path) -> None:
    first, mine = claim("gpu", GPUS, 2, tmp_path)
    second, others = claim("gpu", GPUS, 1, tmp_path)
    assert (mine, others) == (["0", "1"], ["GPU-8f3a/x"])
    third: list[list[str]] = []
    waits = threading.Thread(
        target=lambda: third.append(claim("gpu", GPUS, 3, tmp_path, interval=0.05)[1])
    )
    waits.start()
    waits.join(0.3)
    assert third == []
    claim("gpu", GPUS, 1, tmp_path)[0].close()  # who waits keeps nothing from others
    first.close()
    waits.join(10)
    assert third == [["0", "1", "3"]]
    second.close()


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from train.launch.device_slots import claim; import os, signal\n"
        f"held = claim('core', ['0'], 1, Path({str(tmp_path)!r}))\n"
        "print('held', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "held\n"
    assert claim("core", ["0"], 1, tmp_path)[1] == ["0"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_training_is_bound_to_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = os.sched_getaffinity(0)
    try:
        with claim_devices(Machine(cores=1), "cpu", 1):
            assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    with claim_devices(Machine(), "cpu", 2):
        assert os.sched_getaffinity(0) == before
    with pytest.raises(UserError, match=f"GPT2_CORES.*4096, but {len(before)}"):
        claim_devices(Machine(cores=4096), "cpu", 1)
