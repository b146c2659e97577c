"""Tests for pipeline.runtime.command: exit statuses and signals, seen from outside."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.runtime import command
from pipeline.runtime.params_file import read_yaml
from tests.support.repo import REPO
from tests.support.small_data import Project
from tests.support.waiting import wait_for

STAGES = read_yaml(REPO / "dvc.yaml")["stages"]

MAIN = """\
import time
from pipeline.runtime import command
from pipeline.runtime.errors import StageFailed, Stopped, UserError
def main():
    print("ready", flush=True)
    {body}
command.run(main)
"""


def start(body: str, hangup: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    code = MAIN.format(body=body)

    def reset_signals() -> None:
        # Background jobs of a shell ignore Ctrl-C, and so would the children of this test.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, hangup)

    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=reset_signals,
    )


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("pass", 0, ""),
        ("raise UserError('x.yaml: key: do this')", 2, "error: x.yaml: key: do this\n"),
        ("raise UserError('a\\x1b[2J\\r\\nc\\udcff')", 2, r"error: a\\x1b\[2J\nerror: c\\udcff\n"),
        ("raise StageFailed('2 tasks failed')", 1, "error: 2 tasks failed\n"),
        ("raise OSError(28, 'No space left', 'a\\nb')", 1, r"error: a\\nb: No space left; .*\n"),
        (
            "raise OSError(5, 'Input/output error')",
            1,
            r"error: .*work_dir: Input/output error; .*\n",
        ),
        ("raise ZeroDivisionError('so')", 1, r"Traceback(.|\n)*ZeroDivisionError: so\n"),
    ],
)
def test_exit_status_and_stderr(body: str, status: int, stderr: str) -> None:
    process = start(body)
    assert re.fullmatch(stderr, process.communicate(timeout=60)[1])
    assert process.returncode == status


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_exits_with_status_3_and_one_line(signum: signal.Signals) -> None:
    process = start("time.sleep(60)")
    wait_ready(process)
    process.send_signal(signum)
    (line,) = process.communicate(timeout=20)[1].splitlines()
    assert line.startswith("stopped")
    assert "GPT2_FRESH" not in line
    assert process.returncode == 3


def test_command_under_nohup_survives_its_terminal() -> None:
    process = start("time.sleep(1)", hangup=signal.SIG_IGN)
    wait_ready(process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0


def test_stopped_message_names_gpt2_fresh_because_it_prevents_resuming(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPT2_FRESH", "1")
    process = start("raise Stopped('x')")
    assert "GPT2_FRESH" in process.communicate(timeout=60)[1]
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("later", "status"),
    [("verify: {retokenize: 2}", 1), ("verify: {retokenize: 1}\nevaluate: {seed: 2}", 0)],
)
def test_a_stage_whose_section_is_changed_under_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str, status: int
) -> None:
    """DVC would record the new values as those of the result."""
    monkeypatch.setenv("DVC_STAGE", "verify")
    process = start(f"""
    from pathlib import Path
    from pipeline.params import VerifyParams
    from pipeline.runtime.params_file import load_section
    path = Path({str(tmp_path / "params.yaml")!r})
    path.write_text("verify: {{retokenize: 1}}")
    load_section("verify", VerifyParams, path)
    path.write_text({later!r})""")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status, error
    assert ("params.yaml: verify: " in error) == bool(status)


PARENT = """\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()  # ready
child.stdout.readline()  # in try
print(child.pid, flush=True)
time.sleep(60)
"""


def test_an_orphan_is_recognised_after_its_parent_has_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(command.PARENT, raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 7)
    sessions = {0: 5, 7: 5}
    monkeypatch.setattr(os, "getsid", sessions.__getitem__)
    assert not command._is_orphan()  # DVC's: in its session
    sessions[7] = 1
    assert command._is_orphan()  # adopted by an init process
    sessions[0] = os.getpid()
    assert not command._is_orphan()  # started in a session of its own
    monkeypatch.setenv(command.PARENT, "7")
    assert not command._is_orphan()  # train.launch's
    monkeypatch.setenv(command.PARENT, "8")
    assert command._is_orphan()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: pytest.fail("ran"))
    assert ended.value.code == command.STOPPED


@pytest.mark.parametrize("stage", ["train", "evaluate", "export", "report"])
def test_a_stage_whose_parent_has_died_ends_before_it_imports_torch(
    tmp_path: Path, stage: str
) -> None:
    command_line = [sys.executable, "-X", "importtime", *STAGES[stage]["cmd"].split()[2:]]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "DVC_STAGE": stage, command.PARENT: "1"}
    ended = subprocess.run(command_line, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert ended.returncode == command.STOPPED
    assert "| pipeline.runtime.command" in re.sub(" +", " ", ended.stderr)
    assert not re.search(r"\| +torch$", ended.stderr, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="uses PR_SET_PDEATHSIG of Linux")
@pytest.mark.parametrize("supervised", [True, False])
def test_only_a_stage_run_by_dvc_stops_when_its_parent_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supervised: bool
) -> None:
    stopped = tmp_path / "stopped"
    body = f"""
    try:
        print("in try", flush=True)
        time.sleep(60)
    finally:
        open({str(stopped)!r}, "w").close()"""
    if supervised:
        monkeypatch.setenv("DVC_STAGE", "tokenize")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, MAIN.format(body=body)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        if supervised:
            wait_for(stopped.exists, 30)
        else:
            time.sleep(2)
            assert not stopped.exists()
    finally:
        if not stopped.exists():
            os.kill(child, signal.SIGKILL)


def assert_user_error(result: subprocess.CompletedProcess[str], *names: str) -> None:
    """Check for status 2 and one line on stderr with all of ``names``."""
    assert result.returncode == 2, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(name in line for name in names), line


def test_user_errors_of_the_real_commands(project: Project) -> None:
    params = project.root / "params.yaml"
    good = params.read_text()
    params.write_text(good.replace("val_per_10k", "val_per_10"))
    result = project.run("tokenize")
    assert_user_error(result, "params.yaml", "tokenize.val_per_10", "val_per_10k?")
    params.write_text(good.replace("files: null", "files: -3"))
    assert_user_error(project.run("download"), "params.yaml", "sources.main.files", "-3")
    params.write_text(good)
    result = project.run("tokenize", GPT2_WORKER="2")
    assert_user_error(result, "GPT2_WORKER:", "GPT2_WORKERS?")
    assert_user_error(project.run("verify"), "data/tokens/manifest.json", "dvc repro")
