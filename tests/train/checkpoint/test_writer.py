"""Tests for train.checkpoint.writer: it saves a copy, one at a time, and never fails silently."""

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.runtime.errors import UserError
from train.checkpoint import directory
from train.checkpoint.directory import Keep
from train.checkpoint.writer import Writer

KEEP = Keep(last=9)


def save(writer: Writer, step: int, value: torch.Tensor) -> None:
    writer.save(model={"w": value}, optimizer={"w.step": value[:1]}, state={"step": step})


def test_a_checkpoint_holds_the_tensors_as_they_were_when_save_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, original, writing = threading.Event(), directory.save, []

    def wait_and_save(*args: Any, **kwargs: Any) -> Path:
        writing.append(kwargs["state"]["step"])
        assert len(writing) == 1, "two at once"
        assert go.wait(20)
        writing.pop()
        return original(*args, **kwargs)

    monkeypatch.setattr(directory, "save", wait_and_save)
    weights = torch.zeros(3, 2).T  # not contiguous
    with Writer(tmp_path, KEEP) as writer:
        save(writer, 1, weights)
        weights += 1  # training continues before anything is written
        writer.check()
        assert directory.checkpoints(tmp_path) == []
        threading.Timer(0.2, go.set).start()
        save(writer, 2, weights)  # waits for the first
        assert directory.checkpoints(tmp_path) == [tmp_path / "step-00000001"]
        weights += 1
    for step in (1, 2):
        folder = tmp_path / directory.folder_name(step)
        directory.verify(folder)
        model, optimizer = directory.load_tensors(folder)
        assert torch.equal(model["w"], torch.full((2, 3), step - 1.0))
        assert optimizer["w.step"].shape == (1, 3)


def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(tmp_path, KEEP) as writer:
        save(writer, 1, torch.zeros(100_000, 2))
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(writer, 2, torch.zeros(100_000, 2))
            with pytest.raises(UserError, match=r"work_dir \(machine\.yaml") as caught:
                writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert directory.checkpoints(tmp_path) == [tmp_path / "step-00000001"]


def test_an_error_of_the_last_save_is_raised_on_exit(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match="file/run"), Writer(blocked / "run", KEEP) as writer:
        save(writer, 1, torch.zeros(2, 2))


def test_a_writer_that_never_saves_creates_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "run", KEEP) as writer:
        writer.check()
        writer.wait()
    assert not (tmp_path / "run").exists()
