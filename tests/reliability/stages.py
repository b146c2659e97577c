"""Processes that run stages with a fault, each a fork of one process that has imported everything.

`python -m tests.reliability.stages` is that process. It runs under the library of faults.c, reads
requests on stdin; a point of the enumeration then costs as much as the stage itself, not seconds of
imports. Tasks of Ray run in the stage's own process, so that their writes are enumerated as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.reliability.project import EXPORT
from tests.support.repo import REPO
from tests.support.small_data import no_cluster, run_here

COUNT, KILL, TEAR, CLOCK = 0, -1, -2, -3  # modes of faults.c; a positive mode is an errno

COMMANDS: dict[str, tuple[str, list[str]]] = {
    "download": ("pipeline.download.__main__", []),
    "download from a hub": ("pipeline.download.__main__", []),
    "curate": ("pipeline.curate.__main__", []),
    "tokenize": ("pipeline.tokenize.__main__", []),
    "verify": ("pipeline.verify.__main__", []),
    "train": ("train.__main__", []),
    "publish": ("train.__main__", []),
    "evaluate": ("train.evaluate", []),
    "export": ("model.export", EXPORT),
    "report": ("train.report.__main__", []),
    "repair": ("pipeline.repair", []),
    "dvc repro": ("dvc.cli", ["repro"]),
}
"""Module and flags of each stage."""

MODEL_COMMANDS = ("export",)  # these have statuses of their own (model/command.py)


def compile_faults(folder: Path) -> Path:
    """Compile faults.c into a folder; return the library's path."""
    library = folder / "faults.so"
    compiler = shutil.which("cc") or "cc"
    source = REPO / "tests/reliability/faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


class Stages:
    """A running process of this module; a context manager."""

    def __init__(self, scratch: Path, variables: dict[str, str] | None = None) -> None:
        self.scratch = scratch
        home = scratch / "home"
        home.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPT2_", "DVC_", "HF_"))}
        self.environment = kept | {
            "HOME": str(home),
            "DVC_SITE_CACHE_DIR": str(home / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(home / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(home / "system"),
            "DVCLIVE_LOG_LEVEL": "ERROR",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GPT2_DEVICE": "cpu",
            "GPT2_ENGINE": "tiktoken",  # its threads would not survive a fork
            "GPT2_COMPILE": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "LD_PRELOAD": str(compile_faults(scratch)),
            **(variables or {}),
        }

    def __enter__(self) -> Stages:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.stages"],
            cwd=REPO,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(
        self, stage: str, folder: Path, mode: int = COUNT, at: int = 0, limit: float = 60
    ) -> tuple[int | None, str, list[str]]:
        """Run a stage in a project folder, with a fault.

        Args:
            mode: What happens at call number ``at``: see faults.c.
            limit: Seconds after which its processes are killed.

        Returns:
            Exit status, negative for a signal, None after ``limit``; output; the trace: all calls
            with `COUNT`, else the call at which the fault was.
        """
        trace, log = self.scratch / "trace", self.scratch / "log"
        trace.unlink(missing_ok=True)
        request = {
            "stage": stage,
            "folder": str(folder),
            "fault": [mode, at, str(trace)],
            "log": str(log),
            "limit": limit,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that runs the stages has ended"
        calls = trace.read_text().splitlines() if trace.exists() else []
        return json.loads(answer), log.read_text(errors="replace"), calls


def _serve() -> None:
    for module, _ in COMMANDS.values():
        importlib.import_module(module)
    for name in ("download", "curate", "tokenize", "verify"):
        setattr(importlib.import_module(f"pipeline.{name}.stage"), "cluster", no_cluster)  # noqa: B010
    texts = ("download.stage", "curate.stage", "tokenize.from_text")
    for name in (*texts, "tokenize.from_tokens", "verify.stage"):
        setattr(importlib.import_module(f"pipeline.{name}"), "run_tasks", run_here)  # noqa: B010
    from pipeline.format import tokenizer

    tokenizer.encode("warm")
    arm = ctypes.CDLL(None).faults_arm
    os.environ.pop("LD_PRELOAD")  # not for the commands that a stage starts
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request, arm)
        status = _wait(child, request["limit"])
        if request["fault"][0] == COUNT:
            _import_as(Path(f"{request['log']}.modules"))
        print(json.dumps(status), flush=True)


def _import_as(listed: Path) -> None:
    """Import what a stage has imported while it ran, so that its next runs find it here."""
    for name in listed.read_text().split() if listed.exists() else []:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()


def _wait(child: int, limit: float) -> int | None:
    """Return a child's status, or None if it was killed after ``limit`` seconds."""
    end, status = time.monotonic() + limit, None
    while time.monotonic() < end:
        pid, found = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(found)
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # also what the stage has started
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def _run(request: dict[str, Any], arm: Callable[..., None]) -> NoReturn:
    """Run a stage in this process, a new session."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0), os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(request["folder"])
    name, flags = COMMANDS[request["stage"]]
    status = 1
    faulthandler.dump_traceback_later(request["limit"] * 0.9, file=log)  # where it hangs
    mode, at, trace = request["fault"]
    arm(request["folder"].encode(), ctypes.c_long(mode), ctypes.c_long(at), trace.encode())
    try:
        _call(request["stage"], importlib.import_module(name).main, flags)
    except BaseException as error:  # as `command.run_and_leave`, before its frames are freed
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            traceback.print_exc()
        if mode == COUNT:
            Path(f"{request['log']}.modules").write_text("\n".join(sys.modules))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    raise AssertionError("a command ends by SystemExit")


def _call(stage: str, main: Callable[[list[str]], int | None], flags: list[str]) -> None:
    from model import command as model_command
    from pipeline.runtime import command

    if stage == "dvc repro":
        sys.exit(main(flags))
    run = model_command.run if stage in MODEL_COMMANDS else command.run
    run(lambda: main(flags))  # type: ignore[arg-type]


if __name__ == "__main__":
    _serve()
