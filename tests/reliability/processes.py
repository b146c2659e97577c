"""Loss of each kind of process: one is killed or stopped, and the same command is run again.

The first run must end by itself within `END` seconds; no process of it may be alive `GONE` seconds
later, and so none of its ports is open; nothing may be left in /dev/shm. The second run must end
with the bytes of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.reliability.commit_points import Result
from tests.support import small_data, training
from tests.support.waiting import wait_for

END, GONE = 300.0, 30.0  # seconds
SHARED_MEMORY = Path("/dev/shm")
TIMEOUT = 5  # seconds, of ranks for each other

Case = tuple["Choose", signal.Signals, bool | None]
Choose = Callable[[list[psutil.Process], int], list[psutil.Process]]
"""From all processes of a run and the id of the first, those that the fault hits."""


def named(*parts: str) -> Choose:
    """Choose the first process whose command line has one of these parts."""

    def choose(processes: list[psutil.Process], _: int) -> list[psutil.Process]:
        return [p for p in processes if any(part in _command(p) for part in parts)][:1]

    return choose


def first(processes: list[psutil.Process], pid: int) -> list[psutil.Process]:
    """Choose the process that was started."""
    return [p for p in processes if p.pid == pid]


def everything(processes: list[psutil.Process], _: int) -> list[psutil.Process]:
    """Choose all processes, as a power cut does."""
    return processes


def ranks(*numbers: int) -> Choose:
    """Choose ranks of a training run."""

    def choose(processes: list[psutil.Process], _: int) -> list[psutil.Process]:
        return [p for p in processes if _variable(p, "RANK") in [str(n) for n in numbers]]

    return choose


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
RAY_CASES: dict[str, Case] = {
    "a Ray worker killed": (named("ray::"), KILL, True),
    "the raylet killed": (named("raylet/raylet"), KILL, False),
    "the GCS killed": (named("gcs_server"), KILL, None),
    "the driver killed": (first, KILL, False),
    "all processes killed": (everything, KILL, False),
}
"""What is hit, by which signal, and whether the same run ends with status 0; None: it may."""
TRAINING_CASES: dict[str, Case] = {
    "a rank killed": (ranks(1), KILL, False),
    "all ranks killed": (ranks(0, 1), KILL, False),
    "torchrun's agent killed": (first, KILL, False),
    "all processes killed": (everything, KILL, False),
    "a rank stopped for longer than the timeout": (ranks(1), STOP, False),
}


def hit_tokenize(folder: Path, case: str) -> Result:
    """Hit a process of `pipeline.tokenize` with its local Ray."""
    raw = small_data.write_raw(folder / "raw", [small_data.some_texts(120)], group=2)
    project = small_data.Project(folder / "project", raw, shard_tokens=1000)
    expected = small_data.Project(folder / "undisturbed", raw, shard_tokens=1000)
    assert expected.run("tokenize").returncode == 0

    def is_busy() -> bool:
        return len([*(project.root / ".work/chunks").glob("*")]) >= 2

    def second_run() -> str | None:
        done = project.run("tokenize")
        if done.returncode != 0:
            return f"second run: status {done.returncode}: {done.stderr[-200:]}"
        same = small_data.hashes(project.tokens) == small_data.hashes(expected.tokens)
        return None if same else "second run: other tokens"

    environment = project.environment(GPT2_WORKERS="2")
    command = project.command("tokenize")
    return _test(
        "tokenize", case, RAY_CASES, command, project.root, environment, is_busy, second_run
    )


def hit_train(folder: Path, case: str) -> Result:
    """Hit a process of `train.launch` with two ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    project = training.make_project(folder)
    project.write(train={"steps": 60, "checkpoint_every": 3, "val_every": 30, "log_every": 1})
    project.train(2, GPT2_WORK_DIR="undisturbed")
    weights = project.weights()
    environment = {k: str(v) for k, v in project.environ(GPT2_PROCESSES=2).items()}
    environment |= {"GPT2_TIMEOUT": str(TIMEOUT)}

    def is_busy() -> bool:
        return any((folder / ".work/runs").glob("*/step-*"))

    def second_run() -> str | None:
        done = project.run("train.launch", GPT2_PROCESSES=2)
        if done.returncode != 0:
            return f"second run: status {done.returncode}: {done.stderr[-200:]}"
        return None if project.weights() == weights else "second run: other weights"

    command = [sys.executable, "-m", "train.launch"]
    return _test("train", case, TRAINING_CASES, command, folder, environment, is_busy, second_run)


def _test(
    stage: str,
    case: str,
    cases: Mapping[str, Case],
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    is_busy: Callable[[], bool],
    second_run: Callable[[], str | None],
) -> Result:
    choose, number, goes_on = cases[case]
    begin, mark = time.monotonic(), uuid.uuid4().hex
    result = Result(case, stage, points=1, of=1)
    shared = set(SHARED_MEMORY.iterdir())
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "RELIABILITY": mark},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    hit: list[psutil.Process] = []
    try:
        wait_for(lambda: is_busy() or process.poll() is not None, END, every=0.01)

        def found() -> bool:
            hit[:] = choose(_marked(mark), process.pid)
            return bool(hit) or process.poll() is not None

        wait_for(found, END, every=0.01)
        if not hit:
            result.unexplained.append(f"{stage}, {case}: ended before the fault")
        for victim in hit:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(number)
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            result.unexplained.append(f"{stage}, {case}: hangs: {log.read_text()[-200:]}")
        else:
            if goes_on is not None and goes_on != (process.returncode == 0):
                end = f"status {process.returncode}: {log.read_text()[-300:]}"
                result.unexplained.append(f"{stage}, {case}: {end}")
        if left := _wait_until_gone(mark):
            result.unexplained.append(f"{stage}, {case}: alive after {GONE:.0f} s: {left[:3]}")
        # Semaphores of `multiprocessing` are those of other programs: no command here has any.
        new = {path.name for path in {*SHARED_MEMORY.iterdir()} - shared}
        if more := sorted(name for name in new if not name.startswith("sem.mp-")):
            result.unexplained.append(f"{stage}, {case}: in /dev/shm: {more[:3]}")
    finally:
        for orphan in _marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
    if problem := second_run():
        result.lost.append(f"{stage}, {case}: {problem}")
    result.survived = int(not result.lost and not result.unexplained)
    result.seconds = time.monotonic() - begin
    return result


def _wait_until_gone(mark: str) -> list[str]:
    """Return the command lines of the processes alive after `GONE` seconds."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not _marked(mark), GONE)
    return [_command(process)[:100] for process in _marked(mark)]


def _marked(mark: str) -> list[psutil.Process]:
    """Return the living processes of a run, by a variable that they inherit."""
    return [p for p in psutil.process_iter() if _variable(p, "RELIABILITY") == mark]


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
