"""Tests for train.launch: what is refused before any process starts."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from pipeline.runtime.errors import UserError
from tests.support.training import Project, some_tokens, train_here, write_tokens
from train.launch import stage
from train.launch.__main__ import main


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process counts with which torchrun would have been started."""
    starts: list[int] = []
    monkeypatch.setattr(stage, "run_torchrun", lambda processes, *_: starts.append(processes))
    return starts


def test_a_valid_run_is_started_with_torchrun(
    project: Project, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2_PROCESSES", "4")
    main()
    monkeypatch.delenv("GPT2_PROCESSES")
    main()
    assert started == [4, 1]


def test_a_finished_run_is_published_again_without_torchrun(
    project: Project,
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_here()
    weights, metrics = project.weights(), project.results()
    curve = project.folder / "metrics/live/plots/metrics/train/loss.tsv"
    before = curve.read_bytes()
    for name in ("artifacts", "metrics"):  # as DVC does before a stage
        shutil.rmtree(project.folder / name)
    monkeypatch.setenv("GPT2_PROCESSES", "3")  # which could not train it
    main()
    assert started == []
    assert "already finished" in capsys.readouterr().out
    assert project.weights() == weights
    assert project.results() == metrics
    assert curve.read_bytes() == before

    monkeypatch.setenv("GPT2_FRESH", "1")
    with pytest.raises(UserError, match="processes"):
        main()
    monkeypatch.delenv("GPT2_PROCESSES")
    main()
    assert len(started) == 1


MISTAKES: list[tuple[dict[str, dict[str, Any]], dict[str, str], list[str]]] = [
    ({"train": {"learning_rat": 1}}, {}, ["train.learning_rat", "learning_rate"]),
    ({"train": {"batch_tokens": -128}}, {}, ["train.batch_tokens", "-128"]),
    ({"train": {"batch_tokens": 100}}, {}, ["train.batch_tokens", "100", "112"]),
    ({"train": {"warmup_steps": 12}}, {}, ["train", "warmup_steps", "11"]),
    ({"train": {"val_tokens": 10**6}}, {}, ["train.val_tokens", "1999"]),
    (
        {"train": {"hellaswag": "none.jsonl", "hellaswag_every": 6}},
        {},
        ["train.hellaswag", "none.jsonl"],
    ),
    ({"train": {"hellaswag": "hub"}}, {}, ["hellaswag_every"]),
    (
        {"train": {"hellaswag": "hub", "hellaswag_every": 8}},
        {},
        ["hellaswag_every 8", "val_every 6", "12"],
    ),
    ({"model": {"n_embd": 17}}, {}, ["model", "n_embd", "n_head"]),
    ({"model": {"size": "gpt2"}}, {}, ["model", "size", "n_layer"]),
    ({"model": {"n_layer": None}}, {}, ["model", "n_layer", "missing"]),
    ({"model": {"block_size": 8192}, "train": {"batch_tokens": 8192}}, {}, ["block_size", "5000"]),
    ({}, {"GPT2_PROCESSES": "3"}, ["train.batch_tokens", "GPT2_PROCESSES", "2 or 4", "96 or 144"]),
    ({}, {"GPT2_PROCESSES": "16"}, ["train.batch_tokens", "256", "4 or 8"]),
    ({}, {"GPT2_MICRO_BATCH": "3", "GPT2_PROCESSES": "1"}, ["micro_batch", "2 or 4"]),
]


@pytest.mark.parametrize(("changes", "environment", "words"), MISTAKES)
def test_a_mistake_is_named_in_one_line(
    project: Project,
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, Any]],
    environment: dict[str, str],
    words: list[str],
) -> None:
    project.write(**changes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        main()
    assert started == []
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("params.yaml", ["params.yaml"]),
        ("data/tokens/manifest.json", ["data/tokens/manifest.json"]),
        ("data/tokens/train-00001.bin", ["train-00001.bin"]),
        ("data/verified.json", ["data/verified.json", "pipeline.verify"]),
    ],
)
def test_a_missing_file_is_named(
    project: Project, started: list[int], gone: str, words: list[str]
) -> None:
    (project.folder / gone).unlink()
    with pytest.raises(UserError) as caught:
        main()
    assert all(word in str(caught.value) for word in words), caught.value


def test_data_that_is_not_verified_is_refused(project: Project, started: list[int]) -> None:
    (project.folder / "data/verified.json").write_text(json.dumps({"manifest_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"pipeline\.verify"):
        main()


def test_a_data_folder_without_validation_is_refused(project: Project, started: list[int]) -> None:
    shutil.rmtree(project.folder / "data/tokens")
    write_tokens(project.folder / "data/tokens", {"train": [some_tokens(5000, seed=1)]})
    project.verify()
    with pytest.raises(UserError, match=r"train\.val_tokens"):
        main()


def test_the_command_prints_one_line_and_exits_with_2(project: Project) -> None:
    shutil.rmtree(project.folder / "data")
    done = project.run("train.launch")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: data/tokens")
    assert done.stderr.count("\n") == 1


def test_checkpoints_that_a_run_already_has_need_no_more_space(
    project: Project, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(stage, "require_space", lambda root, size, what: needed.append(size))
    main()
    run = train_here()
    (run.folder / "final.json").unlink()
    main()
    held = sum(path.stat().st_size for path in run.folder.glob("step-*/*"))
    assert needed[0] - needed[1] == held > 0


def test_a_finished_run_is_not_trained_again_for_observing_keys_or_comments(
    project: Project, started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    train_here()
    weights = project.weights()
    shutil.rmtree(project.folder / "artifacts")
    changes = {"log_every": 3, "val_every": 4, "val_tokens": 100, "checkpoint_every": 6}
    project.write(train={**changes, "keep_checkpoints": 3, "non_finite": "skip"})
    capsys.readouterr()
    main()
    out = capsys.readouterr().out
    assert project.weights() == weights
    assert all(f"train.{name}" in out for name in (*changes, "keep_checkpoints", "non_finite"))
    assert "train.sample_tokens" not in out
    project.write()
    main()
    assert "train.log_every" not in capsys.readouterr().out
    assert started == []

    (project.folder / "stage_code.py").write_text('"""A docstring."""\n\n# A comment\n')
    main()
    assert started == []
    (project.folder / "stage_code.py").write_text("code = 1\n")
    main()
    assert len(started) == 1
