"""Tests for `train.hellaswag_every`: scoring HellaSwag during training changes only the log."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model import GPT
from pipeline.runtime.errors import UserError
from tests.support.training import Project, records, stop_in, train_here, write_hellaswag
from train import __main__ as worker
from train.checkpoint import directory
from train.evals import hellaswag
from train.run import Run

HELLASWAG = {"hellaswag": "tasks.jsonl", "hellaswag_every": 6}


def test_hellaswag_is_scored_at_its_steps_and_changes_no_weight(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT2_WORK_DIR", "without")
    without = train_here()
    weights = project.weights()
    assert records(without, "val/hellaswag") == {}
    assert "hellaswag_acc_completion" not in project.results()

    write_hellaswag()
    monkeypatch.setenv("GPT2_WORK_DIR", "with")
    project.write(train={**HELLASWAG, "val_every": 3})
    run = train_here()
    assert list(records(run, "val/loss")) == [3, 6, 9, 12]
    accuracies = records(run, "val/hellaswag")
    assert list(accuracies) == [6, 12]
    assert project.weights() == weights
    for name in ("train/loss", "lr", "grad_norm"):
        assert records(run, name) == records(without, name)

    tasks = hellaswag.read("train.hellaswag", "tasks.jsonl")
    gpt = GPT.from_checkpoint(project.folder / "artifacts/checkpoint")
    expected = hellaswag.metrics(hellaswag.predict(gpt, tasks))["hellaswag_acc_completion"]
    assert accuracies[12] == expected == project.results()["hellaswag_acc_completion"]
    assert f"hellaswag {expected:.4f}" in capsys.readouterr().out
    assert (project.folder / "metrics/live/plots/metrics/val/hellaswag.tsv").exists()


def test_a_run_stopped_while_validating_or_scoring_resumes_to_the_same_bits(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is saved at once, and validated when the run resumes."""
    write_hellaswag()
    project.write(train=HELLASWAG)
    uninterrupted = train_here()
    files = project.published()
    stops = [
        ("validate", 6, "val/loss"),
        ("score_hellaswag", 6, "val/hellaswag"),
        ("validate", 12, "val/loss"),
    ]
    for method, step, curve in stops:
        monkeypatch.setenv("GPT2_WORK_DIR", f"{method}-{step}")
        stop_in(monkeypatch, method, step // 6)
        stopped = Run.open()
        assert directory.checkpoints(stopped.folder)[-1].name == f"step-{step:08d}"
        assert step not in records(stopped, curve)
        resumed = train_here()
        assert project.published() == files
        for name in ("val/loss", "val/hellaswag"):
            assert records(resumed, name) == records(uninterrupted, name)


def test_missing_tasks_stop_a_new_run_but_not_a_finished_one(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checks of `train.launch`, as under torchrun alone."""
    write_hellaswag()
    project.write(train=HELLASWAG)
    worker.main()
    weights, saved = project.weights(), directory.checkpoints(project.run_folder)
    Path("tasks.jsonl").unlink()
    shutil.rmtree(project.folder / "artifacts")
    worker.main()
    assert project.weights() == weights

    monkeypatch.setenv("GPT2_FRESH", "1")
    with pytest.raises(UserError, match=r"train\.hellaswag: tasks\.jsonl"):
        worker.main()
    assert directory.checkpoints(project.run_folder) == saved

    write_hellaswag()
    before = (project.run_folder / "final.json").stat().st_mtime_ns
    worker.main()
    assert (project.run_folder / "final.json").stat().st_mtime_ns > before
    assert project.weights() == weights
