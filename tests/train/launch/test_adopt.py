"""Tests for train.launch --adopt: resume from a run that other code trained."""

from __future__ import annotations

import json

import pytest

from pipeline.runtime.errors import UserError
from tests.support.training import Project, records, stop_in, train_here
from train.checkpoint import directory
from train.launch import stage
from train.launch.__main__ import main
from train.run import Run


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "run_torchrun", lambda *_: None)


def stopped_run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that was stopped after step 7."""
    stop_in(monkeypatch, "step", 8)
    return Run.open()


def test_a_run_resumes_under_changed_code(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT2_WORK_DIR", "whole")
    whole = train_here()
    weights = project.weights()
    monkeypatch.setenv("GPT2_WORK_DIR", "other")
    old = stopped_run(monkeypatch)
    (project.folder / "stage_code.py").write_text("code = 1")
    capsys.readouterr()

    main()
    short = old.key[:12]
    assert f"train.launch --adopt {short}" in capsys.readouterr().out
    main(["--adopt", short])
    assert f"run {short} at step 7" in capsys.readouterr().out
    run = train_here()
    assert run.key != old.key
    assert "resumes after step 7\n" in capsys.readouterr().out
    assert project.weights() == weights
    assert records(run, "train/loss") == records(whole, "train/loss")
    adopted = [{"run_key": old.key, "code_key": old.code_key, "step": 7}]
    assert run.record()["adopted"] == adopted
    assert json.loads((run.folder / "step-00000012/state.json").read_text())["adopted"] == adopted
    assert directory.latest(old.folder) is not None, "the old run could go on as well"
    main()
    assert "already finished" in capsys.readouterr().out


def test_an_impossible_adoption_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = stopped_run(monkeypatch)
    project.write(train={"learning_rate": 1e-3, "seed": 2, "log_every": 5})
    capsys.readouterr()
    with pytest.raises(UserError, match=r"train\.seed, train\.learning_rate"):
        main(["--adopt", old.key])
    main()
    assert "--adopt" not in capsys.readouterr().out
    project.write()
    (project.folder / "stage_code.py").write_text("code = 1")
    with pytest.raises(UserError, match=f"zzz: .*{old.key[:12]}"):
        main(["--adopt", "zzz"])
    new = train_here()
    with pytest.raises(UserError, match=r"step 7\b.*step 12\b"):
        main(["--adopt", old.key[:12]])
    (project.folder / "stage_code.py").write_text("code = 2")
    with pytest.raises(UserError, match=new.key[:12]):
        main(["--adopt", new.key[:12]])
    monkeypatch.setenv("GPT2_FRESH", "1")
    with pytest.raises(UserError, match="GPT2_FRESH"):
        main(["--adopt", old.key[:12]])
