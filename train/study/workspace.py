"""A clone of the project in which the runs of a study become DVC experiments.

`dvc exp run` edits `params.yaml` and stashes what has changed, so a kill would leave the user's
files changed. A study works in a clone of the last commit instead, below its folder in the store:

    main checkout ── shared objects ──► studies/NAME/tree-0 ── dvc repro, git commit ──┐
         ▲                                                                             │
         └── refs/exps/... is fetched, nothing else ───────────────────────────────────┘

The clone uses the cache, the store (`$DVC_ROOT`) and `machine.yaml` of the main checkout, has no
remote, and pushes nothing. It is rebuilt at each start of a study, and removed at its end.

DVC knows a stage by parameters that name files of tasks and weights, not by what is in them. So no
result comes from its run cache, or from `dvc.lock` of the commit: only from the store, which is
addressed by content.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML

from pipeline.runtime.errors import StageFailed, Stopped, UserError
from pipeline.runtime.params_file import read_yaml
from pipeline.store import atomic
from train.preset import merge
from train.study.definition import STAGES, Overlay

EMPTY: Mapping[str, str] = MappingProxyType({})
# Linux ends the command when this process dies, however it dies; `execvp` keeps the setting.
_TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(3)
os.execvp(sys.argv[2], sys.argv[2:])
"""
_FETCH = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
# Prints why the run of the workspace failed, if its loss or gradient was not finite, now or before.
_FAILURE = """
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from train.run import FAILED, Run
run = Run.open()
try:
    run.check_not_failed()
except UserError:
    print("diverged:", atomic.read_sealed(run.folder / FAILED)["what"])
"""


class Diverged(Exception):
    """A run stopped at a non-finite loss or gradient; the message says where."""


class Workspace:
    """A clone of the last commit of the main checkout.

    Args:
        folder: Its place; what is there is replaced.
        log: File of the commands' output, which grows.
    """

    def __init__(self, main: Path, folder: Path, log: Path) -> None:
        self.main, self.folder, self.log = main, folder, log
        self._processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.baseline = git(main, "rev-parse", "HEAD")
        atomic.remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        git(main, "init", "--quiet", str(folder))
        objects = (main / git(main, "rev-parse", "--git-path", "objects")).resolve()
        atomic.write_bytes(folder / ".git/objects/info/alternates", f"{objects}\n".encode())
        if (shallow := main / git(main, "rev-parse", "--git-path", "shallow")).is_file():
            atomic.write_bytes(folder / ".git/shallow", shallow.read_bytes())
        for key in ("user.name", "user.email"):
            git(folder, "config", key, identity(main, key))
        git(folder, "checkout", "--quiet", "--detach", self.baseline)
        self._params = (folder / "params.yaml").read_text(encoding="utf-8")
        if (local := main / ".dvc/config.local").is_file():
            atomic.write_bytes(folder / ".dvc/config.local", local.read_bytes())
        cache = _cache(main)
        self.dvc("config", "--local", "cache.dir", str(cache))
        self._empty_lock(cache / "files/md5")

    def reproduce(
        self,
        params: Overlay,
        stage: str,
        name: str,
        environment: Mapping[str, str] = EMPTY,
        *,
        run_cache: bool = False,
    ) -> str:
        """Run the pipeline with these parameters up to a stage; return its output.

        Args:
            name: Of the run, for messages.
            environment: Variables in addition to those of this process.
            run_cache: Whether stages that ran before may come from DVC's run cache.

        Raises:
            Diverged: The loss or a gradient was not finite.
            UserError: A stage refused a parameter, a file or a setting.
            StageFailed: A stage failed otherwise; its last line.
        """
        atomic.write_bytes(self.folder / "params.yaml", merge(self._params, params).encode())
        cache = () if run_cache else ("--no-run-cache",)
        status, output = self._run("-m", "dvc", "repro", *cache, stage, environment=environment)
        if status:
            if "failed to reproduce 'train'" in output:
                _, what = self._run("-c", _FAILURE)
                if found := re.search(r"^diverged: (.*)$", what, re.MULTILINE):
                    raise Diverged(found[1])
            reason = f"{name}: {_reason(output)}; the output is in {self.log}"
            exited = re.search(r"exited with (\d+)$", output, re.MULTILINE)  # DVC's own is 255
            if exited and exited[1] == "2":
                raise UserError(reason)
            if exited and exited[1] == "3":
                raise Stopped(reason)
            raise StageFailed(reason)
        return output

    def save(self, name: str, message: str) -> str:
        """Save the workspace as an experiment of the main checkout; return its commit.

        An experiment is a commit on the baseline with a ref of its own. `dvc exp save` would need
        the outs of all stages, also of those that a study does not run.
        """
        plain = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false")
        git(self.folder, "add", "--all")
        git(self.folder, *plain, "commit", "--quiet", "--allow-empty", "-m", message)
        ref = experiment_ref(self.baseline, name)
        git(self.main, *plain, *_FETCH, str(self.folder), f"+HEAD:{ref}")
        git(self.folder, "reset", "--quiet", "--soft", self.baseline)
        return git(self.main, "rev-parse", ref)

    def _empty_lock(self, objects: Path) -> None:
        """Write a dvc.lock that has nothing of a run, and empty outs of the stages after it.

        That of the last commit is of another run. Without outs of all stages `dvc exp apply` would
        fail; with these it puts nothing there, and `dvc repro` runs the stages.
        """
        path, stages = self.folder / "dvc.lock", read_yaml(self.folder / "dvc.yaml")["stages"]
        kept: dict[str, Any] = {}
        for name in [name for name in stages if name not in STAGES]:
            outs = []
            for out in filter(lambda out: isinstance(out, str), stages[name].get("outs", [])):
                content, end = (b"", "") if Path(out).suffix else (b"[]", ".dir")
                md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() + end
                if not (place := objects / md5[:2] / md5[2:]).exists():
                    atomic.write_bytes(place, content)
                outs.append({"path": out, "hash": "md5", "md5": md5, "size": 0})
            kept[name] = {"cmd": "", "outs": outs}
        with open(path, "w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": kept}, file)

    def json(self, path: str) -> dict[str, Any]:
        """Read a JSON file of the workspace."""
        return atomic.read_sealed(self.folder / path)

    def python(self, code: str, *args: str, environment: Mapping[str, str] = EMPTY) -> str:
        """Run code of Python in the workspace; return its output.

        Raises:
            StageFailed: It failed; its last line.
        """
        status, output = self._run("-c", code, *args, environment=environment)
        if status:
            raise StageFailed(f"{_reason(output)}; the output is in {self.log}")
        return output

    def dvc(self, *args: str) -> None:
        """Run a command of DVC.

        Raises:
            StageFailed: It failed; its last line.
        """
        status, output = self._run("-m", "dvc", *args)
        if status:
            raise StageFailed(f"dvc {args[0]}: {_reason(output)}; the output is in {self.log}")

    def terminate(self) -> None:
        """End the running command; no other one starts."""
        self.stopped = True
        for process in list(self._processes):
            process.terminate()

    def _run(self, *args: str, environment: Mapping[str, str] = EMPTY) -> tuple[int, str]:
        """Run Python with these arguments; return its status and output."""
        if self.stopped:
            raise KeyboardInterrupt
        tied = (sys.executable, "-c", _TIED, str(os.getpid()), sys.executable, *args)
        with open(self.log, "ab") as log:
            start = log.seek(0, io.SEEK_END)
            variables = {**_environment(self.main), **environment}
            process = subprocess.Popen(tied, cwd=self.folder, env=variables, stdout=log, stderr=log)
            self._processes.add(process)
            if self.stopped:  # since the question above
                process.terminate()
            try:
                status = process.wait()
            finally:
                self._processes.discard(process)
        if self.stopped:
            raise KeyboardInterrupt
        with open(self.log, "rb") as file:
            file.seek(start)
            return status, file.read().decode(errors="replace")


def git(folder: Path, *args: str) -> str:
    """Run git in a folder; return its output.

    Raises:
        UserError: It failed; its last line.
    """
    command = ["git", "-C", str(folder), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_without_git(os.environ))
    except FileNotFoundError:
        raise UserError("git: not installed; experiments are commits") from None
    if done.returncode:
        what = next(arg for arg in args if re.fullmatch(r"[a-z][a-z-]+", arg))
        raise UserError(f"git {what}: {_reason(done.stderr)}; correct it in {folder}")
    return done.stdout.strip()


def identity(main: Path, key: str) -> str:
    """Return the name or address for commits.

    Raises:
        UserError: Git has none.
    """
    try:
        return git(main, "config", key)
    except UserError:
        raise UserError(f"git: {key}: not set; git config {key} VALUE") from None


def check_committed(main: Path, files: Iterable[str] = ()) -> None:
    """Refuse to run where the code is not that of the last commit, which the experiments belong to.

    Args:
        files: Files that the runs read; git may ignore them, or they may be new.

    Raises:
        UserError: There is no commit, or the code or a tracked file differs from it.
    """
    if Path(git(main, "rev-parse", "--show-toplevel")).resolve() != main.resolve():
        raise UserError(f"{main}: not the top of a git repository; run this there")
    git(main, "rev-parse", "--verify", "HEAD^{commit}")
    code = ("dvc.yaml", *(f":(glob){room}/**/*.py" for room in ("pipeline", "model", "train")))
    changed = git(main, "status", "--porcelain", "--", *code).splitlines()
    paths = (Path(os.path.normpath(main / name)) for name in files)
    if inside := [str(path) for path in paths if path.is_relative_to(main)]:
        status = ("--literal-pathspecs", "status", "--porcelain", "--untracked-files=no", "--")
        changed += git(main, *status, *inside).splitlines()
    if changed:
        raise UserError(
            f"{changed[0][2:].strip()}: differs from the last commit, which the experiments of a "
            "study belong to; commit it, or git stash"
        )


def experiment_ref(baseline: str, name: str) -> str:
    """Return the ref of an experiment of DVC on a commit."""
    return f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"


def check_names(main: Path, messages: Mapping[str, str]) -> None:
    """Refuse to replace an experiment of another study, or of the user.

    Args:
        messages: Of the commits, by the names of the experiments.

    Raises:
        UserError: There is an experiment of the name whose commit has another message.
    """
    refs = experiment_ref(git(main, "rev-parse", "HEAD"), "")
    there = git(main, "for-each-ref", "--format=%(refname) %(contents:subject)", refs)
    for line in there.splitlines():
        ref, _, subject = line.partition(" ")
        name = ref.removeprefix(refs)
        if name in messages and subject != messages[name]:
            raise UserError(
                f"experiment {name}: there is one that is not of this study; rename the study, or "
                f"dvc exp remove {name}"
            )


def _cache(main: Path) -> Path:
    from dvc.repo import Repo  # here: an import of a second

    with Repo(str(main)) as repo:
        return Path(repo.cache.local_cache_dir)


def _environment(main: Path) -> dict[str, str]:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return _without_git(os.environ) | {
        "PATH": binaries,
        "DVC_ROOT": str(main),  # its store and machine.yaml
        "DVC_EXP_AUTO_PUSH": "false",
        "DVC_STUDIO_OFFLINE": "true",
    }


def _without_git(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without git's variables, by which a hook would name another repository."""
    kept = ("GIT_CONFIG", "GIT_SSL", "GIT_SSH")
    return {k: v for k, v in environment.items() if not k.startswith("GIT_") or k.startswith(kept)}


def _reason(output: str) -> str:
    """The line of an output that says what went wrong."""
    lines: Sequence[str] = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    return (errors or lines or ["failed"])[0].removeprefix("error: ").removeprefix("ERROR: ")
