"""Of whole runs as DVC starts them: real torchrun, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

from tests.train.conftest import Project, kill_group, wait_for
from tests.train.test_loop import assert_same_gradients
from train.run import Run

LONG = {"steps": 36, "checkpoint_every": 3, "val_every": 12, "log_every": 4}


def wait_for_step_9(project: Project, process: subprocess.Popen[str], work: str = ".work") -> None:
    store = project.folder / work
    wait_for(lambda: list(store.glob("runs/*/step-00000009")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def start(project: Project, processes: int) -> subprocess.Popen[str]:
    """Starts a run under torchrun and waits until it has saved step 9."""
    process = project.start("train.launch", GPT2_PROCESSES=processes)
    wait_for_step_9(project, process)
    return process


def kill_midway(project: Project, processes: int) -> None:
    """Starts a run, and kills all its processes once it has saved step 9."""
    ranks = project.start_ranks(processes, GPT2_WORK_DIR="stopped", GPT2_MICRO_BATCH=2)
    wait_for_step_9(project, ranks[0], "stopped")
    for rank in ranks:
        kill_group(rank)


def log_of(project: Project, work: str) -> dict[int, float]:
    (path,) = (project.folder / work).glob("runs/*/log.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def resumed_at(out: str) -> int:
    """The step that a run said it resumes after."""
    return int(out.split("resumes after step ")[1].split()[0])


def whole_run(project: Project, processes: int) -> bytes:
    """The weights of a run left alone."""
    project.write(train={**LONG, "batch_tokens": 12 * 16})
    project.train_ranks(processes, GPT2_WORK_DIR="whole", GPT2_MICRO_BATCH=2)
    return project.weights()


def resume(project: Project, processes: int) -> None:
    """Lets the stopped run end."""
    done = project.train(processes, GPT2_WORK_DIR="stopped", GPT2_MICRO_BATCH=2)
    assert 0 < resumed_at(done.stdout) < 36
    assert log_of(project, "stopped") == log_of(project, "whole")


def test_killed_and_resumed_on_two_ranks(project: Project) -> None:
    weights = whole_run(project, 2)
    kill_midway(project, 2)
    resume(project, 2)
    assert project.weights() == weights


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed_twice_and_resumed_on_more_or_fewer_ranks(project: Project, processes: int) -> None:
    """With three ranks the order of the sums in DDP's buckets shows in the last bits."""
    weights = whole_run(project, processes)
    kill_midway(project, processes)
    kill_midway(project, processes)
    resume(project, processes)
    assert project.weights() == weights


def test_a_signal_saves_the_last_step_and_leaves_no_process(project: Project) -> None:
    project.write(train={**LONG, "checkpoint_every": 9, "steps": 500})
    process = start(project, 2)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=40)
    assert time.monotonic() - before < 20
    assert process.returncode == 3
    stopped = int(out.split("/500  stopped by a signal")[0].split()[-1])
    assert (project.run_folder / f"step-{stopped:08d}").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_workers_of_a_killed_torchrun_leave(project: Project) -> None:
    project.write(train={**LONG, "steps": 5000})
    process = start(project, 2)
    process.kill()
    process.wait()
    run = Run.open()
    with run.lock():  # waits for them
        pass
    wait_for(lambda: not alive(process.pid))


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_ranks_compute_what_one_computes(project: Project) -> None:
    """The gradient of one step, from Adam's first moment; and the same validation."""
    project.write(train={"steps": 1, "warmup_steps": 0, "grad_clip": None})
    moments, losses = [], []
    for ranks, micro_batch in ((1, 8), (2, 2)):
        project.train_ranks(ranks, GPT2_MICRO_BATCH=micro_batch, GPT2_FRESH=1)
        moments.append(load_file(project.folder / "artifacts/checkpoint/optimizer.safetensors"))
        losses.append(project.metrics()["val_loss"])
    assert_same_gradients(*moments)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
