"""Tests for train.distributed.torchrun: parameters that change while the workers run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runtime import command, params_file
from pipeline.runtime.errors import UserError
from tests.support.training import Project
from train.__main__ import main
from train.distributed import torchrun
from train.distributed.group import RUN_KEY
from train.launch.__main__ import main as launch
from train.params import ModelParams


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Set what is done in place of starting the workers."""

    def replace(work: Callable[[], object]) -> None:
        monkeypatch.setattr(torchrun, "elastic_launch", lambda *_: lambda *_: work())

    return replace


def test_launcher_under_dvc_fails_if_its_section_was_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DVC would record the new values as those of the result."""
    path = tmp_path / "params.yaml"
    path.write_text("model: {size: gpt2}")
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(params_file, "_loaded", {})
    monkeypatch.setattr(command, "die_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    workers(lambda: path.write_text("model: {size: gpt2-xl}"))

    def stage() -> None:
        params_file.load_section("model", ModelParams, path)
        torchrun.run_torchrun(2)

    with pytest.raises(SystemExit) as ended:
        command.run(stage)
    assert ended.value.code == command.FAULT
    assert "params.yaml: model: " in capsys.readouterr().err


def test_worker_refuses_another_run_than_the_launcher_has_checked(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    workers: Callable[[Callable[[], object]], None],
) -> None:
    def change_and_work() -> None:
        project.write(train={"seed": 4242})
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "train.launch")
        main()

    workers(change_and_work)
    with pytest.raises(UserError, match=r"^params\.yaml.* changed"):
        launch()
    assert len(os.environ[RUN_KEY]) == 64
