"""Of training on GPUs: no waiting, no race, the same numbers, and what the step takes."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import TokenStream
from tests.support.training import Project, kill_group, wait_for, write_tokens
from tests.train.test_loop import records
from train import DataOrder, bench
from train.checkpoint import directory
from train.checkpoint.directory import Keep
from train.checkpoint.writer import Writer
from train.data.loader import Batches
from train.data.split import Split
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.loop import train
from train.run import Run
from train.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
AWHILE = 30_000_000  # clock cycles that keep a GPU busy: some 20 ms

# A model whose every width tensor cores like, with heads of 64 channels.
MODEL = {"size": None, "n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 128}
TRAIN = {"steps": 24, "batch_tokens": 16 * 128, "learning_rate": 1e-3, "log_every": 1}

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def gpu(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The project, on a GPU; here one process in this one, with four micro-steps."""
    project.write(model=MODEL, train=TRAIN)
    project.write_data(n_train=100_000)
    for name, value in {"DEVICE": "cuda", "PROCESSES": "1", "MICRO_BATCH": "4"}.items():
        monkeypatch.setenv(f"GPT2_{name}", value)
        project.environment[f"GPT2_{name}"] = value
    before = torch.get_float32_matmul_precision()
    yield project
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_never_waits_for_the_gpu(
    gpu: Project, monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: str
) -> None:
    """PyTorch raises at whatever would wait for it: .item(), a copy from memory not pinned, ..."""
    gpu.write(model=MODEL, train={**TRAIN, "dtype": dtype})
    monkeypatch.setenv("GPT2_COMPILE", str(compiled))
    run = Run.open()
    with process_group("cuda") as world:
        trainer = Trainer(run, world)
        trainer.join()
        spans = (run.batches(step) for step in itertools.count())
        batches = Batches(
            run.train_data, run.order, trainer.split, rank=0, spans=spans, device=world.device
        )
        with batches, Interrupt(world) as interrupt:
            for step in range(3):  # what is made once may wait: optimizer state, pinned memory
                trainer.step(step, batches, interrupt)
            torch.cuda.set_sync_debug_mode("error")
            try:
                with pytest.raises(RuntimeError, match="synchroniz"):
                    torch.zeros(1, device=DEVICE).item()  # it does raise
                for step in range(3, 6):
                    _, numbers = trainer.step(step, batches, interrupt)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(numbers).all()


def test_a_busy_gpu_is_given_the_right_batches(tmp_path: Path) -> None:
    """Copies wait behind a second of work, and the reader runs ahead: pinned memory is not reused
    before it has been copied."""
    values = (np.arange(200_000) * 7919 % 50257).astype(np.uint16)
    write_tokens(tmp_path, {"train": [values], "val": [values[:10]]})
    stream, order = (
        TokenStream(tmp_path, "train"),
        DataOrder(n_tokens=len(values), block_size=64, seed=1),
    )
    split, spans = Split(world=1, micro_batch=8), [(0, 400)]

    def load(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        with Batches(stream, order, split, rank=0, spans=spans, device=device) as batches:
            for inputs, targets in batches:
                if device.type == "cuda":
                    torch.cuda._sleep(AWHILE)
                found.append((inputs, targets))
        return found

    expected, got = load(torch.device("cpu")), load(DEVICE)
    assert len(got) == 50
    for (a, b), (c, d) in zip(expected, got, strict=True):
        assert torch.equal(a, c.cpu())
        assert torch.equal(b, d.cpu())


def test_a_checkpoint_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    """It is copied behind the step's work and before that of the next, both still to come."""
    weights, step = torch.zeros(4_000_000, device=DEVICE), torch.zeros(1, device=DEVICE)
    with Writer(tmp_path, Keep(last=9)) as writer:
        for number in (1, 2, 3):
            torch.cuda._sleep(AWHILE)
            weights += 1
            writer.save(model={"w": weights}, optimizer={"w.step": step}, state={"step": number})
            weights += 1000  # the next step, queued before anything is written
    for number in (1, 2, 3):
        saved, _ = directory.load_tensors(tmp_path / directory.folder_name(number))
        assert torch.equal(saved["w"], torch.full((4_000_000,), 1 + 1001.0 * (number - 1)))


def test_a_run_has_the_losses_of_one_on_the_cpu(
    gpu: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 (products in TF32), 24 steps from the same weights on the same data."""
    found = {}
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("GPT2_WORK_DIR", f"work-{device}")
        run = Run.open()
        with process_group(device) as world, run.lock():
            train(run, world)
        found[device] = records(run, "train/loss")
    assert list(found["cuda"]) == list(range(1, 25))
    assert found["cuda"] == pytest.approx(found["cpu"], abs=2e-2)
    assert found["cuda"][24] < found["cuda"][1] - 0.3


def wait_for_checkpoint(project: Project, work: str, step: int) -> None:
    def saved() -> bool:
        found = (project.folder / work).glob("runs/*/step-*")
        return any(directory.step_of(path) >= step for path in found)

    wait_for(saved, seconds=240)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=several)])
def test_a_deterministic_run_resumes_bit_for_bit(
    gpu: Project, compiled: bool, processes: int
) -> None:
    settings = {**TRAIN, "steps": 2000, "checkpoint_every": 100, "val_every": 500}
    gpu.write(model=MODEL, train={**settings, "dtype": "bfloat16", "deterministic": True})
    machine: dict[str, Any] = {"GPT2_COMPILE": compiled, "GPT2_MICRO_BATCH": 2}
    gpu.train_ranks(processes, GPT2_WORK_DIR="whole", **machine)
    weights = gpu.weights()
    ranks = gpu.start_ranks(processes, GPT2_WORK_DIR="stopped", **machine)
    try:
        wait_for_checkpoint(gpu, "stopped", 200)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    finally:
        for rank in ranks:
            kill_group(rank)
    done = gpu.train(processes, GPT2_WORK_DIR="stopped", **machine)
    assert "resumes after step" in done.stdout
    assert gpu.weights() == weights


@several
def test_two_gpus_compute_what_one_does(gpu: Project) -> None:
    losses = []
    for processes in (1, 2):
        gpu.train_ranks(processes, GPT2_WORK_DIR=f"work-{processes}")
        (log,) = (gpu.folder / f"work-{processes}").glob("runs/*/log.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        losses.append({r["step"]: r["train/loss"] for r in lines if "train/loss" in r})
    assert len(losses[0]) == 24
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert gpu.metrics()["world_size"] == 2


@several
def test_the_death_of_a_rank_ends_the_others(gpu: Project) -> None:
    """Also where they stand in an all-reduce of NCCL, and no torchrun is there to kill them."""
    gpu.write(model=MODEL, train={**TRAIN, "steps": 100_000, "checkpoint_every": 20})
    ranks = gpu.start_ranks(2, GPT2_TIMEOUT=20)
    try:
        wait_for_checkpoint(gpu, ".work", 20)
        ranks[1].kill()
        before = time.monotonic()
        _, err = ranks[0].communicate(timeout=120)
        print(f"after {time.monotonic() - before:.1f} s: {err[-2000:]}")
        assert time.monotonic() - before < 60
        assert ranks[0].returncode != 0
        assert f"rank 1 (pid {ranks[1].pid} on " in err
    finally:
        for rank in ranks:
            kill_group(rank)


def test_the_step_is_measured_with_its_kernels(
    gpu: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["--steps", "20", "--json", "found.json"])
    found = json.loads(Path("found.json").read_text())
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert len(found["steps"]) == 20
    assert found["parts"]["forward and backward"] > 0
    # Kernels of the GPU, not calls of the CPU; together no longer than a step by much.
    assert found["kernels"]
    assert not any(kernel["name"].startswith("aten::") for kernel in found["kernels"])
    busy = sum(kernel["seconds"] for kernel in found["kernels"])
    assert 0 < busy < 2 * max(found["steps"])
    assert 0 < found["memory"] <= found["reserved"] < found["total"]
