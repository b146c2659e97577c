"""Tests for training on GPUs: no synchronisation, no race, and the losses of a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import TokenStream
from tests.support.training import Project, batches, kill_group, records, write_tokens
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
BUSY = 30_000_000  # clock cycles that keep a GPU busy for about 20 ms

# All widths suit tensor cores; heads have 64 channels.
MODEL = {"size": None, "n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 128}
TRAIN = {"steps": 24, "batch_tokens": 16 * 128, "learning_rate": 1e-3, "log_every": 1}

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def gpu(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The project on a GPU, with one process and four micro-steps unless a test sets others."""
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
def test_a_step_never_synchronises_with_the_gpu(
    gpu: Project, monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: str
) -> None:
    """PyTorch raises at each synchronising call: .item(), a copy from unpinned memory, ..."""
    gpu.write(model=MODEL, train={**TRAIN, "dtype": dtype})
    monkeypatch.setenv("GPT2_COMPILE", str(compiled))
    run = Run.open()
    with process_group("cuda") as world:
        trainer = Trainer(run, world)
        trainer.warm_up()
        with batches(run, trainer, 0) as loader, Interrupt(world) as interrupt:
            for step in range(3):  # first allocations may: optimizer state, pinned memory
                trainer.step(step, loader, interrupt)
            torch.cuda.set_sync_debug_mode("error")
            try:
                with pytest.raises(RuntimeError, match="synchroniz"):
                    torch.zeros(1, device=DEVICE).item()  # the check works
                for step in range(3, 6):
                    _, numbers = trainer.step(step, loader, interrupt)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(numbers).all()


def test_pinned_memory_is_not_reused_before_it_is_copied(tmp_path: Path) -> None:
    """Copies wait behind a second of work on the GPU, while the loader prefetches."""
    values = (np.arange(200_000) * 7919 % 50257).astype(np.uint16)
    write_tokens(tmp_path, {"train": [values], "val": [values[:10]]})
    stream = TokenStream(tmp_path, "train")
    order = DataOrder(n_tokens=len(values), block_size=64, seed=1)
    split, spans = Split(world=1, micro_batch=8), [(0, 0, 400)]

    def load(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        with Batches(stream, order, split, rank=0, spans=spans, device=device) as batches:
            for _, inputs, targets in batches:
                if device.type == "cuda":
                    torch.cuda._sleep(BUSY)
                found.append((inputs, targets))
        return found

    expected, got = load(torch.device("cpu")), load(DEVICE)
    assert len(got) == 50
    for (a, b), (c, d) in zip(expected, got, strict=True):
        assert torch.equal(a, c.cpu())
        assert torch.equal(b, d.cpu())


def test_a_checkpoint_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    """The copy is queued between the work of two steps, before the GPU has done either."""
    weights, step = torch.zeros(4_000_000, device=DEVICE), torch.zeros(1, device=DEVICE)
    with Writer(tmp_path, Keep(last=9)) as writer:
        for number in (1, 2, 3):
            torch.cuda._sleep(BUSY)
            weights += 1
            writer.save(model={"w": weights}, optimizer={"w.step": step}, state={"step": number})
            weights += 1000  # the next step, queued before the copy is written
    for number in (1, 2, 3):
        saved, _ = directory.load_tensors(tmp_path / directory.folder_name(number))
        assert torch.equal(saved["w"], torch.full((4_000_000,), 1 + 1001.0 * (number - 1)))


def test_gpu_and_cpu_give_the_same_losses(gpu: Project, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=several)])
def test_a_deterministic_run_resumes_bit_for_bit(
    gpu: Project, compiled: bool, processes: int
) -> None:
    settings = {**TRAIN, "steps": 2000, "checkpoint_every": 100, "val_every": 500}
    gpu.write(model=MODEL, train={**settings, "dtype": "bfloat16", "deterministic": True})
    machine: dict[str, Any] = {"GPT2_COMPILE": compiled, "GPT2_MICRO_BATCH": 2}
    gpu.train_ranks(processes, GPT2_WORK_DIR="uninterrupted", **machine)
    weights = gpu.weights()
    ranks = gpu.start_ranks(processes, GPT2_WORK_DIR="stopped", **machine)
    gpu.wait_for_step(ranks[0], 200, "stopped", seconds=240)
    for rank in ranks:
        kill_group(rank)
    done = gpu.train(processes, GPT2_WORK_DIR="stopped", **machine)
    assert "resumes after step" in done.stdout
    assert gpu.weights() == weights


@several
def test_two_gpus_give_the_losses_of_one(gpu: Project) -> None:
    losses = []
    for processes in (1, 2):
        gpu.train_ranks(processes, GPT2_WORK_DIR=f"work-{processes}")
        losses.append(gpu.losses(f"work-{processes}"))
    assert len(losses[0]) == 24
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert gpu.results()["world_size"] == 2


@several
def test_a_dead_rank_is_named_and_ends_the_others(gpu: Project) -> None:
    """Also while they wait in an NCCL all-reduce, with no torchrun to kill them."""
    gpu.write(model=MODEL, train={**TRAIN, "steps": 100_000, "checkpoint_every": 20})
    ranks = gpu.start_ranks(2, GPT2_TIMEOUT=20)
    gpu.wait_for_step(ranks[0], 20, seconds=240)
    ranks[1].kill()
    before = time.monotonic()
    _, err = ranks[0].communicate(timeout=120)
    print(f"after {time.monotonic() - before:.1f} s: {err[-2000:]}")
    assert time.monotonic() - before < 60
    assert ranks[0].returncode != 0
    assert f"rank 1 (pid {ranks[1].pid} on " in err


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_invariant_run_repeats_on_any_number_of_gpus(
    gpu: Project, compiled: bool, dtype: str
) -> None:
    """Unproven: written without a GPU. With one GPU it only repeats."""
    settings = {**TRAIN, "batch_doublings": 1, "batch_ramp_steps": 8, "grad_clip": 0.1}
    gpu.write(
        model=MODEL, train={**settings, "dtype": dtype, "invariant": 2, "deterministic": True}
    )
    gpu.environment.pop("GPT2_MICRO_BATCH")
    found = set()
    for number, processes in enumerate((1, 1, 2, 2) if torch.cuda.device_count() > 1 else (1, 1)):
        gpu.train_ranks(processes, GPT2_WORK_DIR=f"work-{number}", GPT2_COMPILE=compiled)
        chain = json.loads(gpu.published()["state.json"])["chain"]
        found.add((gpu.weights(), chain["links"][-1]["link"]))
    assert len(found) == 1


def test_bench_measures_steps_and_gpu_kernels(
    gpu: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["--steps", "20", "--json", "found.json"])
    found = json.loads(Path("found.json").read_text())
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert len(found["steps"]) == 20
    assert found["parts"]["forward and backward"] > 0
    # Kernels of the GPU, not operators on the CPU; in total they take about as long as a step.
    assert found["kernels"]
    assert not any(kernel["name"].startswith("aten::") for kernel in found["kernels"])
    busy = sum(kernel["seconds"] for kernel in found["kernels"])
    assert 0 < busy < 2 * max(found["steps"])
    assert 0 < found["memory"] <= found["reserved"] < found["total"]
