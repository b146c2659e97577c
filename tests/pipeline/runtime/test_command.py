"""Of pipeline.stage: how a command ends, seen from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.repo import REPO
from tests.support.small_data import Project

MAIN = """\
import time
from pipeline import stage
from pipeline.errors import Stopped, UserError
def main():
    print("ready", flush=True)
    {body}
stage.run(main)
"""


def start(body: str, hangup: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen[str]:
    code = MAIN.format(body=body)

    def as_from_a_terminal() -> None:
        # A shell has its background jobs ignore Ctrl-C, and so would what this test starts there.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, hangup)

    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_from_a_terminal,
    )


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("pass", 0, ""),
        ("raise UserError('x.yaml: key: do this')", 2, "error: x.yaml: key: do this\n"),
        ("raise Stopped('x')", 3, "stopped; the same command goes on from here\n"),
        ("raise SystemExit(1)", 1, ""),
    ],
)
def test_statuses(body: str, status: int, stderr: str) -> None:
    process = start(body)
    assert process.communicate(timeout=60)[1] == stderr
    assert process.returncode == status


def test_a_fault_is_status_1_with_its_traceback() -> None:
    process = start("raise ZeroDivisionError('so')")
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" in stderr
    assert "ZeroDivisionError: so" in stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_status_3(signum: signal.Signals) -> None:
    process = start("time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    assert process.communicate(timeout=20)[1] == "stopped; the same command goes on from here\n"
    assert process.returncode == 3


def test_under_nohup_a_command_outlives_its_terminal() -> None:
    process = start("time.sleep(1)", hangup=signal.SIG_IGN)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0


def test_to_make_all_anew_once_more_is_not_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_FRESH", "1")
    stderr = start("raise Stopped('x')").communicate(timeout=60)[1]
    assert stderr == "stopped; the same command without GPT2_FRESH goes on from here\n"


PARENT = """\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's death")
@pytest.mark.parametrize("supervised", [True, False])
def test_a_stage_of_dvc_dies_with_it_and_one_under_nohup_does_not(
    tmp_path: Path, supervised: bool
) -> None:
    begun, mark = tmp_path / "begun", tmp_path / "ended"
    body = f"""
    try:
        open({str(begun)!r}, "w").close()
        time.sleep(60)
    finally:
        open({str(mark)!r}, "w").write("stopped")"""
    environment = {**os.environ, **({"DVC_STAGE": "tokenize"} if supervised else {})}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, MAIN.format(body=body)],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    while not begun.exists():  # a signal before that ends the child without a mark
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    try:
        end = time.monotonic() + (30 if supervised else 2)
        while not mark.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert mark.exists() == supervised
    finally:
        if not mark.exists():
            os.kill(child, signal.SIGKILL)


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Status 2, and one line on stderr that holds the words."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_mistakes_through_the_real_commands(project: Project) -> None:
    params = project.root / "params.yaml"
    good = params.read_text()
    params.write_text(good.replace("val_per_10k", "val_per_10"))
    one_line(project.run("tokenize"), "params.yaml", "tokenize.val_per_10", "val_per_10k?")
    params.write_text(good.replace("files: null", "files: -3"))
    one_line(project.run("download"), "params.yaml", "source.files", "-3")
    params.write_text(good)
    one_line(project.run("tokenize", GPT2_WORKER="2"), "GPT2_WORKER:", "GPT2_WORKERS?")
    one_line(project.run("verify"), "data/tokens/manifest.json", "dvc repro")
    (project.root / "data/raw/manifest.json").unlink()
    one_line(project.run("tokenize"), "data/raw/manifest.json", "dvc repro")
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    one_line(project.run("tokenize"), "dvc.yaml", "tokenize")
    params.unlink()
    one_line(project.run("tokenize"), "params.yaml", "no such file")
