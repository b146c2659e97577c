"""Of train.hellaswag_every: HellaSwag, asked while a run trains, changes nothing but the log."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from model import GPT
from pipeline.runtime.errors import UserError
from tests.support.training import Project
from tests.train.test_loop import records, stop_in, train_here
from train import __main__ as worker
from train.checkpoint import directory
from train.evals import hellaswag
from train.run import Run

WORDS = re.findall(r"\w+", "the people of this land saw a wide river and went over it in boats")
ASKED = {"hellaswag": "tasks.jsonl", "hellaswag_every": 6}


def write_tasks(n: int = 10) -> None:
    rows = [
        {
            "activity_label": "Rowing",
            "ctx": " ".join(WORDS[i % 7 :]),
            "endings": [" ".join(WORDS[k : k + 1 + (i + k) % 4]) for k in range(4)],
            "label": str(i % 4),
        }
        for i in range(n)
    ]
    Path("tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_is_asked_at_its_steps_and_changes_no_weight(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT2_WORK_DIR", "without")
    without = train_here()
    weights = project.weights()
    assert records(without, "val/hellaswag") == {}
    assert "hellaswag_acc_completion" not in project.metrics()

    write_tasks()
    monkeypatch.setenv("GPT2_WORK_DIR", "with")
    project.write(train={**ASKED, "val_every": 3})
    run = train_here()
    assert list(records(run, "val/loss")) == [3, 6, 9, 12]
    answered = records(run, "val/hellaswag")
    assert list(answered) == [6, 12]
    assert project.weights() == weights
    for name in ("train/loss", "lr", "grad_norm"):
        assert records(run, name) == records(without, name)

    tasks = hellaswag.read("train.evals.hellaswag", "tasks.jsonl")
    gpt = GPT.from_checkpoint(project.folder / "artifacts/checkpoint")
    expected = hellaswag.measures(hellaswag.answer(gpt, tasks))["hellaswag_acc_completion"]
    assert answered[12] == expected == project.metrics()["hellaswag_acc_completion"]
    assert f"hellaswag {expected:.4f}" in capsys.readouterr().out
    assert (project.folder / "metrics/live/plots/metrics/val/hellaswag.tsv").exists()


@pytest.mark.parametrize("step", [6, 12])
def test_stopped_while_it_is_asked_and_resumed_ends_with_the_same_bits(
    project: Project, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    write_tasks()
    project.write(train=ASKED)
    monkeypatch.setenv("GPT2_WORK_DIR", "whole")
    whole = train_here()
    folder = project.folder / "artifacts/checkpoint"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("GPT2_WORK_DIR", "stopped")
    stop_in(monkeypatch, "answer", step // 6)
    assert step not in records(Run.open(), "val/hellaswag")
    resumed = train_here()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    for name in ("val/loss", "val/hellaswag"):
        assert records(resumed, name) == records(whole, name)


def test_without_its_tasks_a_finished_run_is_published_and_none_is_begun_or_lost(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun alone, where no `train.launch` has looked before."""
    write_tasks()
    project.write(train=ASKED)
    worker.main()
    weights, saved = project.weights(), directory.steps(project.run_folder)
    Path("tasks.jsonl").unlink()
    shutil.rmtree(project.folder / "artifacts")
    worker.main()
    assert project.weights() == weights

    monkeypatch.setenv("GPT2_FRESH", "1")
    with pytest.raises(UserError, match=r"train\.hellaswag: tasks\.jsonl: No such file"):
        worker.main()
    assert directory.steps(project.run_folder) == saved

    write_tasks()
    before = (project.run_folder / "final.json").stat().st_mtime_ns
    worker.main()
    assert (project.run_folder / "final.json").stat().st_mtime_ns > before
    assert project.weights() == weights
