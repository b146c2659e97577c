"""Tests for a training run in one process: train.loop, train.trainer and train.run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT
from model.size import flops_per_token, parameter_count
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from tests.support.training import Project, batches, records, stop_in, train_here
from train.checkpoint import directory
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.launch import __main__ as launch
from train.monitor import history
from train.numerics import native_dtype
from train.run import Run
from train.trainer import Trainer


def test_what_a_finished_run_publishes(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(train={"dtype": "auto"})
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
    log = (project.folder / "artifacts/log.jsonl").read_bytes()
    assert history.parse(log, "log") == run.history.records

    dtype = native_dtype("cpu")  # `auto` is recorded as what it became
    assert run.record()["train"]["dtype"] == run.dtype == dtype
    assert f", {dtype}, compile off" in out

    metrics = project.results()
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
    assert (state["run_key"], state["val_loss"]) == (run.key, metrics["val_loss"])
    gpt = GPT.from_checkpoint(project.folder / "artifacts/checkpoint")
    assert torch.isfinite(gpt(torch.zeros(1, 4, dtype=torch.int64))).all()
    finished = run.finished()
    assert finished is not None
    assert finished[0] == run.folder / "step-00000012"


def test_settings_of_the_machine_change_only_rounding(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [records(train_here(), "train/loss")]
    settings = {"MICRO_BATCH": 2, "CHECKPOINT_ACTIVATIONS": True, "LOSS_CHUNK": 5}
    for name, value in {**settings, "WORK_DIR": "other"}.items():
        monkeypatch.setenv(f"GPT2_{name}", str(value))
    with process_group("cpu") as world:
        trainer = Trainer(Run.open(), world)
    assert trainer.split.micro_batch == 2
    assert (trainer.gpt.checkpoint_activations, trainer.gpt.loss_chunk) == (True, 5)
    losses.append(records(train_here(), "train/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_growing_batch_trains_on_each_sample_once(
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
    assert project.results()["tokens"] == 1056


def test_a_batch_that_cannot_grow_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(train={"batch_doublings": 4, "batch_ramp_steps": 5})
    with pytest.raises(UserError, match=r"train\.batch_tokens: 128 .*batch_doublings.*256"):
        Run.open()
    project.write(train={"batch_doublings": 1})
    with pytest.raises(UserError, match="batch_ramp_steps 0"):
        Run.open()
    project.write(train={"batch_doublings": 3, "batch_ramp_steps": 5})
    with pytest.raises(UserError, match=r"train\.batch_tokens / 2\^3 \(batch_doublings\)"):
        Run.open().split(2, "cpu")


def test_on_a_cpu_a_micro_batch_is_small_enough_to_be_interrupted(project: Project) -> None:
    sizes = {"size": "gpt2", "n_layer": None, "n_head": None, "n_embd": None}
    project.write(model={**sizes, "block_size": 1024}, train={"batch_tokens": 32 * 1024})
    assert Run.open().split(2, "cpu").micro_batch == 1
    assert Run.open().split(2, "cuda").micro_batch == 16


def test_out_of_memory_is_reported_before_the_first_step(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch that no machine holds: 2^44 bytes of tokens alone."""
    project.write(train={"batch_tokens": 2**41})
    monkeypatch.setenv("GPT2_MICRO_BATCH", str(2**37))
    with pytest.raises(UserError, match=rf"micro_batch.*GPT2_MICRO_BATCH.*{2**37}.*{2**36}"):
        train_here()
    assert not list(project.run_folder.glob("step-*"))


def test_batches_of_another_step_are_refused(project: Project) -> None:
    run = Run.open()
    with process_group("cpu") as world:
        trainer = Trainer(run, world)
        trainer.warm_up()
        with (
            batches(run, trainer, 3, 4) as loader,
            pytest.raises(AssertionError, match=r"step 3\b"),
        ):
            trainer.step(2, loader, Interrupt(world))


def test_a_loss_over_other_targets_is_measured_again(project: Project) -> None:
    run = Run.open()
    with process_group("cpu") as world:
        trainer = Trainer(run, world)
        trainer.measured = 5.0
        trainer.save(1)
        trainer.writer.wait()
        assert (trainer.restore(), trainer.measured) == (1, 5.0)
        path = run.folder / directory.folder_name(1) / "state.json"
        state = atomic.read_sealed(path)
        for change in ({"val_windows": None}, {"train": {**state["train"], "val_tokens": 1}}):
            atomic.write_json(path, atomic.sealed({**state, **change}))
            trainer.measured = None
            assert (trainer.restore(), trainer.measured) == (1, None)


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, {0: signal.SIGINT, 8: signal.SIGUSR1}),
        (
            {
                "optimizer": "muon", "batch_doublings": 1, "batch_ramp_steps": 8,
                "embeddings_lr_ratio": 2.0, "weight_decay_schedule": "linear",
                "cautious_decay": True,
            },
            {7: signal.SIGTERM},
        ),
    ],
    ids=["adamw", "muon"],
)  # fmt: skip
def test_stopped_and_resumed_ends_with_the_same_bits(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    stops: dict[int, int],
) -> None:
    project.write(train=changes)
    uninterrupted = train_here()
    files = project.published()
    for step, number in stops.items():
        monkeypatch.setenv("GPT2_WORK_DIR", f"stopped-{step}")
        stop_in(monkeypatch, "step", step + 1, number)
        assert f"step {step:2d}/12  stopped by a signal" in capsys.readouterr().out
        resumed = train_here()
        assert (f"resumes after step {step}\n" in capsys.readouterr().out) == (step > 0)
        assert project.published() == files
        for name in ("train/loss", "val/loss", "lr", "grad_norm"):
            assert records(resumed, name) == records(uninterrupted, name)


def published_state() -> dict[str, Any]:
    """State of the published checkpoint, without the chain, which tells when others were saved."""
    state = atomic.read_sealed(Path("artifacts/checkpoint/state.json"))
    return {name: value for name, value in state.items() if name not in ("chain", atomic.SEAL)}


def test_keys_that_only_observe_change_no_weight(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, changed and resumed, a run ends as one that had the new values from the start."""
    changes = {
        "log_every": 3, "val_every": 4, "val_tokens": 100, "checkpoint_every": 2,
        "keep_checkpoints": 1, "keep_every": 6, "sample_tokens": 0, "non_finite": "skip",
    }  # fmt: skip
    stop_in(monkeypatch, "step", 8)
    project.write(train=changes)
    run = train_here()
    starts = map(json.loads, (run.folder / "starts.jsonl").read_text().splitlines())
    assert [start["step"] for start in starts] == [0, 7]
    measured = {r["step"]: r["val_tokens"] for r in run.history.records if "val/loss" in r}
    assert measured == {6: 200, 8: 100, 12: 100}
    losses = list(records(run, "val/loss").values())
    assert run.history.validations(100) == losses[1:]  # compared only with each other
    assert project.results()["best_val_loss"] == min(losses[1:])
    files, state = project.published(), published_state()
    monkeypatch.setenv("GPT2_WORK_DIR", "uninterrupted")
    train_here()
    for name in (directory.MODEL, directory.OPTIMIZER):
        assert project.published()[name] == files[name]
    assert published_state() == state
    project.write()
    monkeypatch.setenv("GPT2_WORK_DIR", "unchanged")
    train_here()
    assert project.weights() == files["model.safetensors"]


def make_non_finite(monkeypatch: pytest.MonkeyPatch, step: int, name: str) -> None:
    """Make the loss or gradient norm of a step NaN; steps are counted from 1."""
    original = Trainer.step

    def faulty_step(self: Trainer, number: int, *args: Any) -> Any:
        learning_rate, numbers = original(self, number, *args)
        if number == step - 1:
            numbers[("loss", "gradient").index(name)] = float("nan")
        return learning_rate, numbers

    monkeypatch.setattr(Trainer, "step", faulty_step)


@pytest.mark.parametrize("way", ["retry", "skip", "lower rate"])
def test_the_ways_to_continue_after_a_non_finite_step_keep_its_checkpoints(
    project: Project, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with monkeypatch.context() as faulty:
        make_non_finite(faulty, 6, "loss")
        with pytest.raises(SystemExit):
            train_here()
        saved = project.run_folder / "step-00000004"
        with pytest.raises(UserError, match=rf"step 6.*--retry.*skip.*{saved}.*GPT2_FRESH"):
            launch.main()
        if way == "skip":
            project.write(train={"non_finite": "skip"})
            run = train_here()
            assert records(run, "skipped") == {6: 1}
    if way == "retry":
        monkeypatch.setattr("train.launch.stage.run_torchrun", lambda *_: train_here())
        launch.main(["--retry"])
        run = Run.open()
        assert list(records(run, "train/loss"))[-1] == 12
        monkeypatch.setenv("GPT2_FRESH", "1")
        with pytest.raises(UserError, match=r"--retry.*GPT2_FRESH"):
            launch.main(["--retry"])
    elif way == "lower rate":
        start = {"init": f"checkpoint {saved}", "init_with": "all", "learning_rate": 1e-3}
        project.write(train=start)
        run = train_here()
        assert 1e-4 <= min(records(run, "lr").values()) < max(records(run, "lr").values()) < 1e-3
        assert list(records(run, "train/loss")) == [6, 8, 10, 12]
    state = directory.verify(run.folder / "step-00000012")
    assert state["skipped"] == ([6] if way == "skip" else [])
    assert saved.exists() or run.folder == saved.parent  # another run prunes only its own


def test_a_finished_run_whose_files_are_lost_trains_only_the_lost_steps(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    weights, before = project.weights(), records(run, "train/loss")
    (run.folder / "final.json").unlink()  # as if killed before it was published
    (project.folder / "artifacts/checkpoint/model.safetensors").unlink()
    assert records(train_here(), "train/loss") == before
    assert project.weights() == weights

    capsys.readouterr()
    (run.folder / "final.json").unlink()
    (run.folder / "step-00000012/optimizer.safetensors").write_bytes(b"")
    train_here()
    captured = capsys.readouterr()
    assert "resumes after step 8\n" in captured.out
    assert "step-00000012" in captured.err
    assert project.weights() == weights


@pytest.mark.parametrize(("name", "step"), [("gradient", 8), ("validation", 6)])
def test_a_non_finite_number_stops_the_run_and_is_neither_saved_nor_repeated(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    step: int,
) -> None:
    """At step 8, where a checkpoint is due, or at the validation before."""
    if name == "validation":
        monkeypatch.setattr(Trainer, "validate", lambda self, interrupt: float("nan"))
    else:
        make_non_finite(monkeypatch, step, name)
    with pytest.raises(SystemExit) as stopped:
        train_here()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: step {step}: ")
    assert [p.name for p in directory.checkpoints(project.run_folder)] == ["step-00000004"]
    assert not (project.folder / "artifacts").exists()
    with pytest.raises(UserError, match=rf"failed before: step {step}\b.*GPT2_FRESH"):
        train_here()


def test_a_checkpoint_of_other_data_is_refused(project: Project) -> None:
    run = train_here()
    for folder in directory.checkpoints(run.folder):
        state = atomic.read_sealed(folder / "state.json")
        atomic.write_json(folder / "state.json", atomic.sealed({**state, "dataset_key": "x" * 64}))
    with pytest.raises(UserError, match=r"other data \(xxxxxxxxxxxx\)"):
        train_here()


def test_the_key_covers_what_decides_the_weights(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [Run.open().key]
    project.write(train={"learning_rate": 1e-3})
    keys.append(Run.open().key)
    project.write(model={"n_layer": 3})
    keys.append(Run.open().key)
    project.write()
    (project.folder / "stage_code.py").write_text("code = 1")
    keys.append(Run.open().key)
    project.write_data(key="o" * 64)
    keys.append(Run.open().key)
    assert len(set(keys)) == 5
    monkeypatch.setenv("GPT2_MICRO_BATCH", "1")  # the machine is no part of it
    assert Run.open().key == keys[-1]


def test_one_process_holds_a_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.LOCK_TIMEOUT", 0.0)
    run = Run.open()
    with run.lock(), pytest.raises(UserError, match="another process"), run.lock():
        pass
