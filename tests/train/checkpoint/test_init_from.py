"""Of train.start: a run that begins with what another has learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import GPT
from model import checkpoint as model_format
from pipeline.runtime.errors import UserError
from tests.support.training import Project
from tests.train.test_loop import records, train_here
from train.launch import __main__ as launch
from train.run import Run

CONSTANT: dict[str, Any] = {"schedule": "constant", "val_every": 6, "checkpoint_every": 6}


@pytest.fixture
def source(project: Project) -> Path:
    """The checkpoint of a run of 6 steps."""
    project.write(train={**CONSTANT, "steps": 6})
    train_here()
    folder = project.folder / "source"
    shutil.copytree("artifacts/checkpoint", folder)
    return folder


def test_a_run_that_continues_another_ends_as_one_that_never_stopped(
    project: Project, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(train={**CONSTANT, "init": "checkpoint source", "init_with": "all"})
    continued = train_here()
    assert "resumes after step 6\n" in capsys.readouterr().out
    weights = project.weights()
    moments = Path("artifacts/checkpoint/optimizer.safetensors").read_bytes()
    assert list(records(continued, "train/loss")) == [8, 10, 12]
    assert list(records(continued, "val/loss")) == [6, 12]  # what it starts from is measured
    metrics = project.metrics()
    assert metrics["tokens_per_second"] * metrics["seconds"] == pytest.approx(6 * 128, rel=0.5)

    project.write(train=CONSTANT)
    train_here()
    assert project.weights() == weights
    assert Path("artifacts/checkpoint/optimizer.safetensors").read_bytes() == moments


def test_of_a_checkpoint_the_weights_alone(project: Project, source: Path) -> None:
    one = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-30, "weight_decay": 0.0}
    project.write(train={**one, "init": "checkpoint source"})
    run = train_here()
    assert list(records(run, "train/loss")) == [1]  # the schedule begins anew
    trained, before = (load_file(p / "model.safetensors") for p in (run.finished(), source) if p)
    assert all(torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["hf", "imported"])
def test_a_model_of_another_library(project: Project, source: Path, kind: str) -> None:
    gpt = GPT.from_checkpoint(source)
    if kind == "hf":
        gpt.to_hf("theirs")
        project.write(train={"init": "hf theirs"})
    else:  # as model.import_hf writes it: no hashes, no optimizer
        model_format.write(Path("theirs"), gpt.config, gpt.state_dict(), {"imported_from": "x"})
        project.write(train={"init": "checkpoint theirs"})
    run = train_here()
    losses = records(run, "train/loss")
    assert losses[1] < 10.3, "as the source ended, where scratch begins at 10.8"


def test_what_a_run_starts_from_is_in_its_key(project: Project, source: Path) -> None:
    project.write(train={"init": "checkpoint source"})
    before = Run.open()
    shutil.copytree(source, "elsewhere")
    project.write(train={"init": "checkpoint elsewhere"})
    assert Run.open().identity["starts_from"] == before.identity["starts_from"]
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")
    project.write(train={"init": "checkpoint source"})
    assert Run.open().key != before.key
    with pytest.raises(UserError, match=r"train\.init: .*bytes differ"):
        train_here()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"init": "checkpoint"}, r"train: init 'checkpoint': write scratch, checkpoint DIR"),
    ({"init": "nothing here"}, r"train: init 'nothing here'"),
    ({"init": "scratch source"}, r"train: init"),
    ({"init": "hf source", "init_with": "all"}, r"init_with all needs a checkpoint"),
    ({"init": "checkpoint nowhere"}, r"train\.init: nowhere/model\.safetensors: No such file"),
    ({"init": "hf nowhere"}, r"train\.init: nowhere holds no"),
    ({"init": "hf source"}, r"train\.init: source/config\.json does not exist"),
    ({"init": "checkpoint ./artifacts/checkpoint"}, r"artifacts/checkpoint is what this stage"),
    ({"keep_every": 5, "checkpoint_every": 4}, r"keep_every 5 is no multiple.*take 8"),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES)
def test_a_mistake_is_named_before_anything_starts(
    project: Project, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(launch, "run_torchrun", lambda *_: pytest.fail("started"))
    (project.folder / "source").mkdir()
    (project.folder / "source/x.safetensors").touch()
    project.write(train=changes)
    with pytest.raises(UserError, match=said) as caught:
        launch.main()
    assert "\n" not in str(caught.value)


def test_another_size_and_another_batch_are_refused(project: Project, source: Path) -> None:
    project.write(model={"n_layer": 3}, train={"init": "checkpoint source"})
    with pytest.raises(UserError, match=r"source is of another size: n_layer 2 \(here 3\)"):
        launch.main()
    whole = {**CONSTANT, "init": "checkpoint source", "init_with": "all"}
    project.write(train={**whole, "batch_tokens": 256})
    with pytest.raises(UserError, match=r"seen 48 samples in 6 steps, .* would be 96"):
        train_here()
    project.write(train={**whole, "steps": 6})
    with pytest.raises(UserError, match=r"train\.steps: 6.*step 6 already"):
        train_here()
    state = json.loads((source / "state.json").read_text())
    assert state["val_loss"] == pytest.approx(project_val_loss(source), abs=1e-6)


def project_val_loss(source: Path) -> float:
    """What the checkpoint's loss is on the validation tokens, by another way."""
    from pipeline import TokenStream

    gpt, stream = GPT.from_checkpoint(source), TokenStream("data/tokens", "val")
    total = 0.0
    for first in range(0, 200, 16):
        tokens = torch.from_numpy(stream[first : min(first + 17, 201)].astype("int64"))[None]
        total += gpt(tokens[:, :-1], tokens[:, 1:], reduction="sum").item()
    return total / 200
