"""Loss of each kind of process, and a clock that is set back; then the same command runs again.

A process is killed, stopped for good, or stopped and continued, by signals to real Ray and real
torchrun. The clock is that of faults.c, in all processes.

The first run must end by itself within `END` seconds; no process of it may be alive `GONE` seconds
later, and so none of its ports is open; nothing may be left in /dev/shm. The second run must end
with the bytes of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.reliability.commit_points import Result
from tests.reliability.stages import compile_faults
from tests.support import small_data, training
from tests.support.waiting import wait_for

END, GONE = 300.0, 30.0  # seconds
SHARED_MEMORY = Path("/dev/shm")
TIMEOUT = 5  # seconds, of ranks for each other
STOPPED = 30.0  # seconds; longer than that timeout, and than Ray waits for a node
HOUR = 3600

Choose = Callable[[list[psutil.Process], int], list[psutil.Process]]
"""From all processes of a run and the id of the first, those that the fault hits."""


@dataclass(frozen=True)
class Case:
    """What happens to a run.

    Attributes:
        choose: The processes that are hit.
        number: The signal that they get.
        completes: Whether the same run ends with status 0; None: it may.
        continues: Whether they continue after `STOPPED` seconds.
        clock: Whether the clock is set back, for this run and the next.
    """

    choose: Choose
    number: signal.Signals
    completes: bool | None
    continues: bool = False
    clock: bool = False


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


def nobody(processes: list[psutil.Process], _: int) -> list[psutil.Process]:
    """Choose no process."""
    return []


def ranks(*numbers: int) -> Choose:
    """Choose ranks of a training run."""

    def choose(processes: list[psutil.Process], _: int) -> list[psutil.Process]:
        return [p for p in processes if _variable(p, "RANK") in [str(n) for n in numbers]]

    return choose


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
_CLOCK_CASES = {
    "the clock set back by an hour": Case(nobody, KILL, True, clock=True),
    "all processes killed, then the clock set back": Case(everything, KILL, False, clock=True),
}
RAY_CASES = {
    "a Ray worker killed": Case(named("ray::"), KILL, True),
    "the raylet killed": Case(named("raylet/raylet"), KILL, False),
    "the GCS killed": Case(named("gcs_server"), KILL, None),
    "the driver killed": Case(first, KILL, False),
    "all processes killed": Case(everything, KILL, False),
    "a Ray worker stopped for 30 s": Case(named("ray::"), STOP, True, continues=True),
    "the raylet stopped for 30 s": Case(named("raylet/raylet"), STOP, None, continues=True),
    "the GCS stopped for 30 s": Case(named("gcs_server"), STOP, None, continues=True),
    "the driver stopped for 30 s": Case(first, STOP, None, continues=True),
    "all processes stopped for 30 s": Case(everything, STOP, None, continues=True),
    **_CLOCK_CASES,
}
TRAINING_CASES = {
    "a rank killed": Case(ranks(1), KILL, False),
    "all ranks killed": Case(ranks(0, 1), KILL, False),
    "torchrun's agent killed": Case(first, KILL, False),
    "all processes killed": Case(everything, KILL, False),
    "a rank stopped for good": Case(ranks(1), STOP, False),
    "a rank stopped for 30 s": Case(ranks(1), STOP, False, continues=True),
    "torchrun's agent stopped for 30 s": Case(first, STOP, True, continues=True),
    "all processes stopped for 30 s": Case(everything, STOP, None, continues=True),
    **_CLOCK_CASES,
}


def hit_tokenize(folder: Path, case: str) -> Result:
    """Hit a process of `pipeline.tokenize` with its local Ray."""
    raw = small_data.write_raw(folder / "raw", [small_data.some_texts(120)], group=2)
    project = small_data.Project(folder / "project", raw, shard_tokens=1000)
    expected = small_data.Project(folder / "undisturbed", raw, shard_tokens=1000)
    undisturbed = expected.run("tokenize")
    assert undisturbed.returncode == 0, undisturbed.stderr

    def is_busy() -> bool:
        return len([*(project.root / ".work/chunks").glob("*")]) >= 2

    def second_run(variables: Mapping[str, str]) -> str | None:
        done = project.run("tokenize", **variables)
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

    def second_run(variables: Mapping[str, str]) -> str | None:
        done = project.run("train.launch", GPT2_PROCESSES=2, **variables)
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
    second_run: Callable[[Mapping[str, str]], str | None],
) -> Result:
    what = cases[case]
    clock = folder.with_name(f"{folder.name}.clock")
    clock.write_bytes(struct.pack("l", 0))
    variables = {}
    if what.clock:
        variables = {"LD_PRELOAD": str(compile_faults(folder.parent)), "CLOCK": str(clock)}
    begin, mark = time.monotonic(), uuid.uuid4().hex
    result = Result(case, stage, points=1, of=1)
    shared = set(SHARED_MEMORY.iterdir())
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, **variables, "RELIABILITY": mark},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    hit: list[psutil.Process] = []
    try:
        wait_for(lambda: is_busy() or process.poll() is not None, END, every=0.01)

        def found() -> bool:
            hit[:] = what.choose(_marked(mark), process.pid)
            return bool(hit) or what.choose is nobody or process.poll() is not None

        wait_for(found, END, every=0.01)
        if process.poll() is not None:
            result.unexplained.append(f"{stage}, {case}: ended before the fault")
        _send(hit, what.number)
        if what.clock:
            with open(clock, "r+b") as file:
                file.write(struct.pack("l", -HOUR))
        if what.continues:
            time.sleep(STOPPED)
            _send(hit, signal.SIGCONT)
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            result.unexplained.append(f"{stage}, {case}: hangs: {log.read_text()[-200:]}")
        else:
            if what.completes is not None and what.completes != (process.returncode == 0):
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
    if problem := second_run(variables):
        result.lost.append(f"{stage}, {case}: {problem}")
    result.survived = int(not result.lost and not result.unexplained)
    result.seconds = time.monotonic() - begin
    return result


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


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
