"""Of train.loop, trainer, meter, interrupt and run, in this process: what a run does and leaves."""

from __future__ import annotations

import json
import os
import signal
from itertools import count
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import GPT
from model.size import flops_per_token, parameter_count
from pipeline.runtime.errors import Stopped, UserError
from tests.support.training import Project
from train.checkpoint import directory
from train.distributed.rendezvous import process_group
from train.loop import train
from train.run import Run
from train.trainer import Trainer


def train_here() -> Run:
    run = Run.open()
    with process_group("cpu") as world, run.lock():
        train(run, world)
    return run


def records(run: Run, name: str) -> dict[int, Any]:
    return {r["step"]: r[name] for r in run.history.records if name in r}


def test_a_run_leaves_what_it_promises(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    out = capsys.readouterr().out
    n = parameter_count(run.model.config())
    assert out.startswith(f"training GPT-2, {n:,} parameters (2 layers, 2 heads, width 16")
    assert "12 steps of 128 tokens" in out
    assert run.key in out
    assert "starts" in out

    assert list(records(run, "train/loss")) == [1, 2, 4, 6, 8, 10, 12]
    assert list(records(run, "val/loss")) == [6, 12]
    losses = list(records(run, "train/loss").values())
    assert losses[0] == pytest.approx(10.83, abs=0.05)  # ln 50257 and a little
    assert losses[-1] < losses[0] - 0.5

    samples = records(run, "sample")
    assert list(samples) == [6, 12]
    prompt = run.val_data[:16].tolist()
    assert all(s[:16] == prompt and 16 < len(s) <= 16 + 48 for s in samples.values())
    log = (project.folder / "artifacts/log.jsonl").read_text()
    assert [json.loads(line) for line in log.splitlines()] == run.history.records

    metrics = project.metrics()
    assert metrics["step"] == 12
    assert metrics["tokens"] == 12 * 128
    assert metrics["val_loss"] == records(run, "val/loss")[12]
    assert metrics["world_size"] == 1
    (start,) = map(json.loads, (run.folder / "starts.jsonl").read_text().splitlines())
    assert (start["step"], start["dataset_key"]) == (0, "k" * 64)
    assert start["peak_flops"] > 0
    for name in ("mfu", "step_seconds", "data_wait", "memory_gb"):
        assert all(value >= 0 for value in records(run, name).values()), name
        assert (project.folder / f"metrics/live/plots/metrics/{name}.tsv").exists()
    last = next(r for r in reversed(run.history.records) if "step_seconds" in r)
    speed = 128 / last["step_seconds"]
    assert last["tokens_per_second"] == pytest.approx(speed, rel=0.02)
    flops = flops_per_token(run.model.config(), 16)
    assert last["mfu"] == pytest.approx(speed * flops / start["peak_flops"], rel=0.02, abs=1e-4)
    assert metrics["mfu"] > 0

    live = json.loads((project.folder / "metrics/live/metrics.json").read_text())
    assert live["val"]["loss"] == metrics["val_loss"]
    assert (project.folder / "metrics/live/plots/metrics/train/loss.tsv").exists()

    state = directory.verify(project.folder / "artifacts/checkpoint")
    assert state["samples"] == 12 * 8
    assert state["dataset_key"] == "k" * 64
    assert state["run_key"] == run.key
    gpt = GPT.from_checkpoint(project.folder / "artifacts/checkpoint")
    assert torch.isfinite(gpt(torch.zeros(1, 4, dtype=torch.int64))).all()
    assert run.finished() == run.folder / "step-00000012"


def test_settings_of_the_machine_change_no_sample_and_hardly_a_loss(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for micro_batch in (8, 2):
        monkeypatch.setenv("GPT2_MICRO_BATCH", str(micro_batch))
        monkeypatch.setenv("GPT2_WORK_DIR", f"work-{micro_batch}")
        losses.append(records(train_here(), "train/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_checkpointed_activations_change_no_loss(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for on in (False, True):
        monkeypatch.setenv("GPT2_CHECKPOINT_ACTIVATIONS", str(on))
        monkeypatch.setenv("GPT2_WORK_DIR", f"work-{on}")
        with process_group("cpu") as world:
            assert Trainer(Run.open(), world).gpt.checkpoint_activations is on
        losses.append(records(train_here(), "train/loss"))
    assert losses[0] == losses[1]


def test_the_chunk_of_the_loss_changes_rounding_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for chunk in ("", "5"):  # of 128 tokens in a micro-batch
        monkeypatch.setenv("GPT2_LOSS_CHUNK", chunk)
        monkeypatch.setenv("GPT2_WORK_DIR", f"work-{chunk}")
        with process_group("cpu") as world:
            assert Trainer(Run.open(), world).gpt.loss_chunk == (int(chunk) if chunk else None)
        losses.append(records(train_here(), "train/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_gradients_do_not_depend_on_the_micro_batch(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first moment after one step is the gradient, times 1 - beta1."""
    project.write(train={"steps": 1, "warmup_steps": 0, "grad_clip": None})
    moments = []
    for micro_batch in (8, 1):
        monkeypatch.setenv("GPT2_MICRO_BATCH", str(micro_batch))
        monkeypatch.setenv("GPT2_WORK_DIR", f"work-{micro_batch}")
        train_here()
        moments.append(load_file("artifacts/checkpoint/optimizer.safetensors"))
    assert_same_gradients(*moments)


def assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    whole = torch.cat([v.flatten() for k, v in one.items() if k.endswith("exp_avg")]).norm()
    for name, moment in one.items():
        if name.endswith(".exp_avg"):
            assert (moment - other[name]).norm() <= 1e-6 * max(moment.norm(), 0.1 * whole), name


def test_a_growing_batch_reads_on_where_the_smaller_one_ended(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(train={"batch_doublings": 2, "batch_ramp_steps": 6})
    run = train_here()
    assert "(from 32, doubled 2 x in 6)" in capsys.readouterr().out
    tokens = records(run, "tokens")
    assert tokens == {1: 32, 2: 64, 4: 160, 6: 288, 8: 544, 10: 800, 12: 1056}
    state = directory.verify(project.folder / "artifacts/checkpoint")
    assert (state["samples"], state["tokens"]) == (66, 1056)
    losses = list(records(run, "train/loss").values())
    assert losses[0] == pytest.approx(10.83, abs=0.05)  # a mean also while the batch is small
    assert project.metrics()["tokens"] == 1056


def test_a_batch_that_cannot_grow_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(train={"batch_doublings": 4, "batch_ramp_steps": 5})
    with pytest.raises(UserError, match=r"batch_tokens: 128 .* 2\^4 \(batch_doublings\).*: 256"):
        Run.open()
    project.write(train={"batch_doublings": 1})
    with pytest.raises(UserError, match="batch_ramp_steps 0 go together"):
        Run.open()
    project.write(train={"batch_doublings": 3, "batch_ramp_steps": 5})
    with pytest.raises(UserError, match=r"batch_tokens / 2\^3 \(batch_doublings\): 16 are 1 seq"):
        Run.open().split(2, "cpu")


def test_on_a_cpu_a_micro_batch_is_small_enough_to_be_interrupted(project: Project) -> None:
    sizes = {"size": "gpt2", "n_layer": None, "n_head": None, "n_embd": None}
    project.write(model={**sizes, "block_size": 1024}, train={"batch_tokens": 32 * 1024})
    assert Run.open().split(2, "cpu").micro_batch == 1
    assert Run.open().split(2, "cuda").micro_batch == 16


def test_too_little_memory_shows_before_the_first_step_and_says_what_to_change(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch that no machine holds: 2^44 bytes of tokens alone."""
    project.write(train={"batch_tokens": 2**41})
    monkeypatch.setenv("GPT2_MICRO_BATCH", str(2**37))
    with pytest.raises(UserError, match=rf"micro_batch .*: {2**37} seq.* 16 tokens.*; try {2**36}"):
        train_here()
    assert not list(project.run_folder.glob("step-*"))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal while it computes a step."""
    original = Trainer.step

    def step_and_signal(self: Trainer, this: int, *args: Any) -> Any:
        if this == step:
            os.kill(os.getpid(), number)
        return original(self, this, *args)

    monkeypatch.setattr(Trainer, "step", step_and_signal)


def stop_in(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Trains, and stops the run by a signal at that call, from 1, of a method of the trainer."""
    original, calls = getattr(Trainer, method), count(1)

    def method_and_signal(self: Trainer, *args: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, method_and_signal)
        with pytest.raises(Stopped):
            train_here()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_ends_with_the_same_bits(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
) -> None:
    project.write(
        train={"optimizer": optimizer}
        if optimizer == "adamw"
        else {"optimizer": optimizer, "batch_doublings": 1, "batch_ramp_steps": 8}
    )
    monkeypatch.setenv("GPT2_WORK_DIR", "whole")
    whole = train_here()
    folder = project.folder / "artifacts/checkpoint"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    stops = ((0, signal.SIGINT), (7, signal.SIGTERM), (8, signal.SIGUSR1))
    for step, number in stops if optimizer == "adamw" else stops[1:2]:
        monkeypatch.setenv("GPT2_WORK_DIR", f"stopped-{step}")
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, number)
            with pytest.raises(Stopped):
                train_here()
        assert f"step {step:2d}/12  stopped by a signal" in capsys.readouterr().out
        resumed = train_here()
        assert (f"resumes after step {step}\n" in capsys.readouterr().out) == (step > 0)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        for name in ("train/loss", "val/loss", "lr", "grad_norm"):
            assert records(resumed, name) == records(whole, name)


@pytest.mark.parametrize("step", [6, 12])
def test_stopped_in_a_validation_and_resumed_ends_with_the_same_bits(
    project: Project, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The step is saved at once, and measured when the run resumes."""
    monkeypatch.setenv("GPT2_WORK_DIR", "whole")
    whole = train_here()
    folder = project.folder / "artifacts/checkpoint"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("GPT2_WORK_DIR", "stopped")
    stop_in(monkeypatch, "validate", step // 6)
    stopped = Run.open()
    assert directory.steps(stopped.folder)[-1].name == f"step-{step:08d}"
    assert step not in records(stopped, "val/loss")
    resumed = train_here()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert records(resumed, "val/loss") == records(whole, "val/loss")


def test_a_broken_last_checkpoint_costs_only_its_steps(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    weights = project.weights()
    (run.folder / "final.json").unlink()
    (run.folder / "step-00000012/optimizer.safetensors").write_bytes(b"")
    train_here()
    captured = capsys.readouterr()
    assert "resumes after step 8\n" in captured.out
    assert "step-00000012" in captured.err
    assert project.weights() == weights


def test_a_killed_end_is_finished_without_a_step(project: Project) -> None:
    """Killed after the last save and before the publication."""
    run = train_here()
    weights, before = project.weights(), records(run, "train/loss")
    (run.folder / "final.json").unlink()
    (project.folder / "artifacts/checkpoint/model.safetensors").unlink()
    assert records(train_here(), "train/loss") == before
    assert project.weights() == weights


@pytest.mark.parametrize(
    ("what", "said"), [("loss", "step 8"), ("gradient", "step 8"), ("validation", "step 6")]
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved_or_repeated(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    said: str,
) -> None:
    """At step 8, where a checkpoint is due, or at the validation before."""
    original = Trainer.step

    def step(self: Trainer, number: int, *args: Any) -> Any:
        learning_rate, numbers = original(self, number, *args)
        if number == 7 and what != "validation":
            numbers[0 if what == "loss" else 1] = float("nan")
        return learning_rate, numbers

    monkeypatch.setattr(Trainer, "step", step)
    if what == "validation":
        monkeypatch.setattr(Trainer, "validate", lambda self, interrupt: float("nan"))
    with pytest.raises(SystemExit) as stopped:
        train_here()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}: ")
    assert [p.name for p in directory.steps(project.run_folder)] == ["step-00000004"]
    assert not (project.folder / "artifacts").exists()
    with pytest.raises(UserError, match=rf"failed before: {said}.*GPT2_FRESH"):
        train_here()


def test_data_of_another_content_is_another_run(project: Project) -> None:
    one = Run.open()
    project.write_data(key="o" * 64)
    assert Run.open().key != one.key


def test_a_checkpoint_of_other_data_is_refused(project: Project) -> None:
    run = train_here()
    for folder in directory.steps(run.folder):
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "dataset_key": "x" * 64}))
    with pytest.raises(UserError, match=r"other data \(xxxxxxxxxxxx\)"):
        train_here()


def test_what_decides_the_run_is_its_key(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [Run.open().key]
    project.write(train={"learning_rate": 1e-3})
    keys.append(Run.open().key)
    project.write(model={"n_layer": 3})
    keys.append(Run.open().key)
    project.write()
    (project.folder / "stage_code.py").write_text("# changed")
    keys.append(Run.open().key)
    assert len(set(keys)) == 4
    monkeypatch.setenv("GPT2_MICRO_BATCH", "1")  # the machine is no part of it
    assert Run.open().key == keys[-1]


def test_one_process_holds_a_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.LOCK_PATIENCE", 0.0)
    run = Run.open()
    with run.lock(), pytest.raises(UserError, match="another process"), run.lock():
        pass
