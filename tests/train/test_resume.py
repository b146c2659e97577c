"""Tests for runs that are killed, stopped or faulty: real processes, real signals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from random import Random

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.support.ports import listeners
from tests.support.training import Project
from tests.support.waiting import wait_for
from train import __main__ as worker
from train.checkpoint import directory
from train.run import Run

LONG = {"steps": 36, "checkpoint_every": 3, "val_every": 12, "log_every": 1}


def start(project: Project) -> subprocess.Popen[str]:
    """Start a run of two processes under torchrun and wait until it has saved step 9."""
    process = project.start("train.launch", GPT2_PROCESSES=2)
    project.wait_for_step(process, 9)
    return process


def stop_after(project: Project, processes: int, step: int, number: int) -> list[int]:
    """Start a run, send its processes a signal once it has printed a step; return the statuses."""
    ranks = project.start_ranks(processes, GPT2_WORK_DIR="stopped", GPT2_MICRO_BATCH=2)
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if line.startswith("step") and int(line[4:].split("/")[0]) >= step:
            break
    for rank in ranks:
        rank.send_signal(number)
    for rank in ranks:
        rank.communicate(timeout=60)
    return [rank.returncode for rank in ranks]


def resumed_at(out: str) -> int:
    """The step after which a run has resumed, from its output."""
    return int(out.split("resumes after step ")[1].split()[0])


def uninterrupted_run(project: Project, processes: int) -> bytes:
    """The weights of a run that nothing interrupts."""
    project.write(train={**LONG, "batch_tokens": 24 * 16})
    project.train_ranks(processes, GPT2_WORK_DIR="uninterrupted", GPT2_MICRO_BATCH=2)
    return project.weights()


def resume(project: Project, processes: int) -> None:
    """Resume the stopped run to its end."""
    done = project.train(processes, GPT2_WORK_DIR="stopped", GPT2_MICRO_BATCH=2)
    assert 0 < resumed_at(done.stdout) < 36
    assert project.losses("stopped") == project.losses("uninterrupted")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes under torchrun, by rank; none while they start or exit."""
    try:
        children = psutil.Process(process.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))
    except (psutil.NoSuchProcess, KeyError):
        return []


@pytest.mark.soak
def test_a_killed_rank_is_restarted_once_then_ends_the_job_which_resumes(project: Project) -> None:
    weights = uninterrupted_run(project, 2)
    machine = {"GPT2_WORK_DIR": "stopped", "GPT2_MICRO_BATCH": 2, "GPT2_RESTARTS": 1}
    process = project.start("train.launch", GPT2_PROCESSES=2, **machine)
    project.wait_for_step(process, 3, "stopped")
    first = workers_of(process)
    first[1].kill()
    wait_for(lambda: len(now := workers_of(process)) == 2 and not {*now} & {*first})
    project.wait_for_step(process, 9, "stopped")
    workers_of(process)[1].kill()
    before = time.monotonic()
    out, err = process.communicate(timeout=40)
    assert time.monotonic() - before < 15
    assert process.returncode == 1
    assert resumed_at(out) >= 3
    assert "rank 1 was killed by SIGKILL" in err.splitlines()[-1]
    resume(project, 2)
    assert project.weights() == weights


@pytest.mark.soak
def test_a_closed_pipe_keeps_no_step_from_being_saved(project: Project) -> None:
    """Ctrl-C at `dvc repro | tee run.log` ends tee as well."""
    project.write(train={**LONG, "steps": 5000})
    (rank,) = project.start_ranks(1)
    project.wait_for_step(rank, 3)
    assert rank.stdout is not None
    rank.stdout.close()
    rank.stdout = None
    time.sleep(0.5)
    rank.send_signal(signal.SIGINT)
    _, err = rank.communicate(timeout=40)
    assert rank.returncode == 3, err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


@pytest.mark.slow
def test_a_hung_rank_ends_the_run_and_is_named(project: Project) -> None:
    project.write(train={**LONG, "steps": 5000})
    ranks = project.start_ranks(2, GPT2_TIMEOUT=3)
    project.wait_for_step(ranks[0], 3)
    ranks[1].send_signal(signal.SIGSTOP)
    _, err = ranks[0].communicate(timeout=40)
    assert ranks[0].returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank 1 (pid {ranks[1].pid} on ")
    assert " 3 s" in line
    assert "Traceback" not in err


def test_a_non_finite_step_of_one_rank_is_skipped_by_all(project: Project) -> None:
    """The third micro-batch of rank 1 after the three of the warm-up: in step 2 of two each."""
    project.write(train={"non_finite": "skip", "checkpoint_every": 1, "keep_checkpoints": 12})
    ranks = project.start_ranks(
        2, module="tests.support.faulty_train", GPT2_MICRO_BATCH=2, FAULT="1,6"
    )
    (out, err), _ = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], err
    assert "step  2/12  skipped: loss nan" in out
    assert "python -m train.trace --step 2" in out
    log = [json.loads(line) for line in (project.run_folder / "log.jsonl").open()]
    assert [(r["step"], r["skipped"]) for r in log if "skipped" in r] == [(2, 1)]
    saved = [path / "model.safetensors" for path in directory.checkpoints(project.run_folder)]
    one, two, three = (path.read_bytes() for path in saved[:3])
    assert one == two != three


@pytest.mark.soak
def test_a_non_finite_step_is_reported_before_torchrun_ends_all_ranks(project: Project) -> None:
    """While the checkpoint of step 1 is still being written."""
    project.write(train={"checkpoint_every": 1})
    ranks = project.start_ranks(
        2, module="tests.support.faulty_train", GPT2_MICRO_BATCH=2, FAULT="1,6", SLOW=3
    )
    wait_for(lambda: any(rank.poll() is not None for rank in ranks))
    for rank in ranks:
        rank.terminate()
    _, err = ranks[0].communicate(timeout=40)
    assert ranks[1].wait(40) != 0
    assert "error: step 2: loss nan" in err
    assert (project.run_folder / "failed.json").exists()


def test_a_rank_whose_weights_drift_stops_the_run_and_is_named(project: Project) -> None:
    """Before the checkpoint of step 8, which is not written."""
    ranks = project.start_ranks(2, module="tests.support.faulty_train", DRIFT="1,7")
    (_, err), _ = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: step 8: rank 1 (pid {ranks[1].pid} on ")
    assert "ln_f.weight" in line
    assert "Traceback" not in err
    assert [p.name for p in directory.checkpoints(project.run_folder)] == ["step-00000004"]
    project.train_ranks(2)  # resumes: a fault of the machine would not repeat itself


def test_ranks_of_another_run_are_refused(project: Project) -> None:
    ranks = project.start_ranks(2, each=[{}, {"GPT2_MICRO_BATCH": 1}])
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert errors[0] == ""
    assert errors[1].startswith("error: rank 1 (pid ")
    assert "micro_batch" in errors[1]
    assert not list(project.folder.glob(".work/runs/*/step-*"))


def test_a_restart_by_torchrun_does_not_start_a_fresh_run_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another node asked for the restart, which this node has not counted."""
    start = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GPT2_FRESH": 1}
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in {**start, **torchrun, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))

    def begin(store: TCPStore) -> int:
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        worker.main()
        return (project.run_folder / "final.json").stat().st_mtime_ns

    one, other = (TCPStore("127.0.0.1", 0, is_master=True) for _ in range(2))
    first = begin(one)
    assert begin(one) == first
    assert begin(other) > first


@pytest.mark.soak
def test_a_lost_terminal_costs_no_step(project: Project) -> None:
    project.write(train={**LONG, "steps": 5000, "checkpoint_every": 5000, "val_every": 5000})
    ours, theirs = pty.openpty()

    def attach_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup

    process = subprocess.Popen(
        [sys.executable, "-m", "train.launch"],
        cwd=project.folder,
        env=project.environ(GPT2_PROCESSES=1),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=attach_terminal,
        text=True,
    )
    os.close(theirs)
    project.processes.append(process)
    output = b""
    while b"step    3/5000" not in output:
        output += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(40) == 3
    (saved,) = directory.checkpoints(project.run_folder)
    assert directory.step_of(saved) >= 3


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_killed_five_times_stopped_and_resumed_from_each_checkpoint(
    project: Project, processes: int
) -> None:
    """With more than two ranks, the order of the sums in DDP's buckets changes the last bits."""
    weights = uninterrupted_run(project, processes)
    *kills, term = sorted(Random(processes).sample(range(1, 26), 6))
    for step in kills:
        statuses = stop_after(project, processes, step, signal.SIGKILL)
        assert statuses == [-signal.SIGKILL] * processes
    assert stop_after(project, processes, term, signal.SIGTERM) == [3] * processes
    resume(project, processes)
    assert project.weights() == weights

    (run,) = (project.folder / "stopped/runs").iterdir()
    kept = directory.checkpoints(run)
    assert len(kept) >= 2
    for folder in kept[:-1]:
        for later in directory.checkpoints(run):
            if later > folder:
                shutil.rmtree(later)
        (run / "final.json").unlink()
        done = project.train(processes, GPT2_WORK_DIR="stopped", GPT2_MICRO_BATCH=2)
        assert resumed_at(done.stdout) == directory.step_of(folder)
        assert project.weights() == weights


@pytest.mark.soak
def test_process_counts_agree_for_twenty_steps(project: Project) -> None:
    project.write(train={**LONG, "steps": 20, "batch_tokens": 16 * 16})
    losses = []
    for processes, micro_batch in ((1, 16), (1, 2), (2, 4), (4, 1), (4, 4)):
        work = f"{processes}-{micro_batch}"
        project.train_ranks(processes, GPT2_WORK_DIR=work, GPT2_MICRO_BATCH=micro_batch)
        losses.append(project.losses(work))
    assert len(losses[0]) == 20
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_a_signal_saves_the_last_step_and_no_process_is_left(project: Project) -> None:
    """Until then nothing listens outside the loopback interface."""
    project.write(train={**LONG, "checkpoint_every": 9, "steps": 500})
    process = project.start("train.launch", GPT2_PROCESSES=2)
    ports: dict[str, bool] = {}

    def saved() -> bool:
        ports.update(listeners(process.pid))
        return any(project.folder.glob(".work/runs/*/step-*9"))

    wait_for(saved, 120)
    assert len(ports) >= 3  # the store, and gloo of two ranks
    assert [name for name, loopback in ports.items() if not loopback] == []
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=40)
    assert time.monotonic() - before < 20
    assert process.returncode == 3
    stopped = int(out.split("/500  stopped by a signal")[0].split()[-1])
    assert (project.run_folder / f"step-{stopped:08d}").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_workers_of_a_killed_torchrun_exit(project: Project) -> None:
    project.write(train={**LONG, "steps": 5000})
    process = start(project)
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


@pytest.mark.soak
def test_overlap_splits_the_graph_and_changes_no_gradient(project: Project) -> None:
    """2 ranks, 4 micro-steps, of which `no_sync` covers 3; several buckets, a graph for each."""
    project.write(model={"n_layer": 4, "n_embd": 128}, train={"batch_tokens": 16 * 16})
    gradients = {}
    for overlap in (False, True):
        project.train_ranks(
            2,
            module="tests.support.one_gradient",
            GPT2_MICRO_BATCH=2,
            GPT2_COMPILE=True,
            GPT2_OVERLAP=overlap,
            BUCKET_MB=1,
            GRADIENTS=overlap,
        )
        files = (project.folder / f"{overlap}-{rank}.safetensors" for rank in (0, 1))
        one, other = map(load_file, files)
        assert all(torch.equal(gradient, other[name]) for name, gradient in one.items())
        gradients[overlap] = one
    whole, split = gradients[False], gradients[True]
    assert whole.pop("graphs") == 1
    assert split.pop("graphs") >= 3
    for name, gradient in whole.items():  # and the validation loss
        assert (split[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.slow
def test_gradients_do_not_depend_on_ranks_and_micro_steps(project: Project) -> None:
    """4 ranks of 2 micro-steps, 1 rank of 8, and one big batch; all ranks agree exactly."""
    project.write(train={"batch_tokens": 16 * 16, "grad_clip": None})
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for ranks, micro_batch in ((4, 2), (1, 2), (1, 16)):
        name = f"{ranks}x{16 // ranks // micro_batch}"
        project.train_ranks(
            ranks, module="tests.support.one_gradient", GPT2_MICRO_BATCH=micro_batch, GRADIENTS=name
        )
        for rank in range(ranks):
            file = project.folder / f"{name}-{rank}.safetensors"
            gradients[file.stem] = load_file(file)
    assert len(gradients) == 6
    for rank in (1, 2, 3):
        for name, gradient in gradients["4x2-0"].items():
            assert torch.equal(gradient, gradients[f"4x2-{rank}"][name]), name
    for name, big in gradients["1x1-0"].items():  # and the validation loss
        for other in ("4x2-0", "1x8-0"):
            assert (gradients[other][name] - big).norm() <= 1e-6 * big.norm(), (other, name)
