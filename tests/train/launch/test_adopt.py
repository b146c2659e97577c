"""Of train.adopt: a run goes on under changed code, asked to, and says so."""

from __future__ import annotations

import json

import pytest

from pipeline.runtime.errors import Stopped, UserError
from tests.support.training import Project
from tests.train.test_loop import interrupt_at, records, train_here
from train.checkpoint import directory
from train.launch import __main__ as launch
from train.run import Run


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_torchrun", lambda *_: None)


def stopped_run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that was stopped after step 7."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Stopped):
            train_here()
    return Run.open()


def test_a_run_goes_on_under_changed_code(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT2_WORK_DIR", "whole")
    whole = train_here()
    weights = project.weights()
    monkeypatch.setenv("GPT2_WORK_DIR", "other")
    old = stopped_run(monkeypatch)
    (project.folder / "stage_code.py").write_text("# changed")
    capsys.readouterr()

    launch.main()
    short = old.key[:12]
    assert f"train.launch --adopt {short}" in capsys.readouterr().out
    launch.main(["--adopt", short])
    assert f"adopted run {short} at step 7" in capsys.readouterr().out
    run = train_here()
    assert run.key != old.key
    assert "resumes after step 7\n" in capsys.readouterr().out
    assert project.weights() == weights
    assert records(run, "train/loss") == records(whole, "train/loss")
    adopted = [{"run_key": old.key, "code_key": old.code_key, "step": 7}]
    assert run.record()["adopted"] == adopted
    assert json.loads((run.folder / "step-00000012/state.json").read_text())["adopted"] == adopted
    assert directory.latest(old.folder) is not None, "the old run could go on as well"
    launch.main()
    assert "finished already" in capsys.readouterr().out


def test_what_cannot_be_adopted_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = stopped_run(monkeypatch)
    project.write(train={"learning_rate": 1e-3, "seed": 2})
    capsys.readouterr()
    with pytest.raises(UserError, match=r"in more than code: train\.seed, train\.learning_rate"):
        launch.main(["--adopt", old.key])
    launch.main()
    assert "--adopt" not in capsys.readouterr().out
    project.write()
    (project.folder / "stage_code.py").write_text("# changed")
    with pytest.raises(UserError, match=f"no such run; .*{old.key[:12]}"):
        launch.main(["--adopt", "zzz"])
    new = train_here()
    with pytest.raises(UserError, match="at step 7, and this one is already at 12"):
        launch.main(["--adopt", old.key[:12]])
    (project.folder / "stage_code.py").write_text("# changed again")
    with pytest.raises(UserError, match="that run is finished"):
        launch.main(["--adopt", new.key[:12]])
    monkeypatch.setenv("GPT2_FRESH", "1")
    with pytest.raises(UserError, match="not both"):
        launch.main(["--adopt", old.key[:12]])


def test_a_wrong_flag_ends_with_2(project: Project) -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main(["--adapt", "x"])
    assert caught.value.code == 2
