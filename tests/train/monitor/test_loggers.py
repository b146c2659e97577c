"""Tests for the loggers of a run, with their programs where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import LoggerName, Machine
from tests.support.training import Project, records, stop_in, train_here
from train.monitor import loggers


class Kept:
    """A logger that keeps what it gets."""

    started: list[list[tuple[int, dict[str, float]]]]

    def __init__(self, run: Path) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []
        self.started.append(self.values)

    def log(self, step: int, values: Any) -> None:
        self.values.append((step, dict(values)))

    def end(self) -> None: ...


def test_a_logger_sees_what_the_log_has_also_after_a_resume_and_never_stops_a_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Kept):
        def log(self, step: int, values: Any) -> None:
            raise RuntimeError("its disk is full")

    Kept.started = []
    monkeypatch.setattr(loggers, "LOGGERS", {"tensorboard": Kept, "wandb": Broken})
    monkeypatch.setenv("GPT2_LOGGERS", '["tensorboard", "wandb"]')
    stop_in(monkeypatch, "step", 7)
    run = train_here()
    assert capsys.readouterr().err.count("wandb failed") == 2  # once per start
    first, _, second, _ = Kept.started
    assert first == second[: len(first)]
    for name in ("train/loss", "val/loss", "tokens_per_second"):
        assert {step: v[name] for step, v in second if name in v} == records(run, name)
    steps = [step for step, _ in second]
    assert steps == sorted(steps)


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_LOGGERS", '["nobody"]')
    with pytest.raises(UserError, match="GPT2_LOGGERS"):
        Machine.load()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb"):
        loggers.check_installed(["wandb"])


LOG = [{"step": step, "train/loss": 1 / step, "sample": [1]} for step in (1, 2, 3)]


def write_twice(name: LoggerName, run: Path) -> None:
    """Write a log to a logger in two starts; the second one resumes after step 1."""
    for done in (LOG[:2], LOG[:1]):
        logger = loggers.Loggers([name], run)
        logger.begin(done)
        for record in LOG[len(done) :]:
            logger.add(record)
        assert logger._open
        logger.end()


def test_tensorboard_has_each_point_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_twice("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in found] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_wandb_writes_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = loggers.Loggers(["wandb"], tmp_path)
    logger.begin([{"step": 1, "train/loss": 2.0}])
    logger.add({"step": 2, "train/loss": 1.0})
    assert logger._open
    logger.end()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in file.read_bytes()


@pytest.mark.parametrize("flush_seconds", [0, 10])
def test_trackio_has_each_point_once_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_seconds: float
) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(loggers, "FLUSH_SECONDS", flush_seconds)
    monkeypatch.setattr("socket.getaddrinfo", None)
    write_twice("trackio", tmp_path / "other")
    for _ in range(2):
        write_twice("trackio", tmp_path / "run")
    for run in ("run", "other"):
        found = storage.SQLiteStorage.get_logs(loggers.PROJECT, run)
        assert [(f["step"], f["train/loss"]) for f in found] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
