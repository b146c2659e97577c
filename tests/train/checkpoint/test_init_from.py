"""Tests for train.checkpoint.init_from: runs that start from the weights of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig, hf
from model import checkpoint as model_format
from pipeline.runtime.errors import UserError
from tests.support.training import Project, records, train_here
from train.checkpoint import directory, init_from
from train.checkpoint.start import Start
from train.launch import stage
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


def test_a_run_that_extends_another_ends_with_the_bits_of_one_long_run(
    project: Project, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(train={**CONSTANT, "init": "checkpoint source", "init_with": "all"})
    continued = train_here()
    assert "resumes after step 6\n" in capsys.readouterr().out
    weights = project.weights()
    moments = Path("artifacts/checkpoint/optimizer.safetensors").read_bytes()
    assert list(records(continued, "train/loss")) == [8, 10, 12]
    assert list(records(continued, "val/loss")) == [6, 12]  # the initial weights are validated
    metrics = project.results()
    assert metrics["tokens_per_second"] * metrics["seconds"] == pytest.approx(6 * 128, rel=0.5)

    project.write(train=CONSTANT)
    train_here()
    assert project.weights() == weights
    assert Path("artifacts/checkpoint/optimizer.safetensors").read_bytes() == moments


def test_init_with_weights_takes_only_the_weights(project: Project, source: Path) -> None:
    one = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-30, "weight_decay": 0.0}
    project.write(train={**one, "init": "checkpoint source"})
    run = train_here()
    assert list(records(run, "train/loss")) == [1]  # the schedule starts at step 0
    last = run.folder / "step-00000001"
    trained, before = (load_file(p / "model.safetensors") for p in (last, source))
    assert all(torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["hf", "imported"])
def test_a_run_can_start_from_imported_weights(project: Project, source: Path, kind: str) -> None:
    gpt = GPT.from_checkpoint(source)
    if kind == "hf":
        gpt.to_hf("theirs")
        project.write(train={"init": "hf theirs"})
    else:  # as model.import_hf writes it: no hashes, no optimizer
        model_format.write(Path("theirs"), gpt.config, gpt.state_dict(), {"imported_from": "x"})
        project.write(train={"init": "checkpoint theirs"})
    run = train_here()
    losses = records(run, "train/loss")
    assert losses[1] < 10.3  # random weights start at 10.8


def test_the_content_of_initial_weights_is_in_the_run_key(project: Project, source: Path) -> None:
    project.write(train={"init": "checkpoint source"})
    before = Run.open()
    shutil.copytree(source, "elsewhere")
    project.write(train={"init": "checkpoint elsewhere"})
    assert Run.open().identity["starts_from"] == before.identity["starts_from"]
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")
    project.write(train={"init": "checkpoint source"})
    assert Run.open().key != before.key
    with pytest.raises(UserError, match=r"train\.init: source/model\.safetensors"):
        train_here()


def test_an_experiment_finds_weights_that_git_ignores_in_the_main_checkout(
    project: Project, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(train={"init": "checkpoint source"})
    before = Run.open().identity["starts_from"]
    root = tmp_path / "main"
    root.mkdir()
    source.rename(root / "source")
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert Run.open().identity["starts_from"] == before
    shutil.copytree(root / "source", root / "artifacts/checkpoint")  # which the next run replaces
    project.write(train={"init": "checkpoint artifacts/checkpoint"})
    with pytest.raises(UserError, match=r"train\.init: artifacts/checkpoint"):
        Run.open()


def test_an_out_of_the_stage_is_refused_behind_a_link(project: Project, source: Path) -> None:
    shutil.move("artifacts", "elsewhere")
    Path("artifacts").symlink_to("elsewhere")
    for name in ("artifacts/checkpoint", "elsewhere/checkpoint"):
        project.write(train={"init": f"checkpoint {name}"})
        with pytest.raises(UserError, match=r"train\.init: artifacts/checkpoint"):
            Run.open()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"init": "scratch source"}, r"train: init 'scratch source'"),  # more: test_params.py
    ({"init": "checkpoint nowhere"}, r"train\.init: nowhere/model\.safetensors"),
    ({"init": "hf nowhere"}, r"train\.init: nowhere "),
    ({"init": f"hf {'x' * 300}"}, r"train\.init: x"),
    ({"init": "hf source"}, r"train\.init: source/config\.json"),
    ({"init": "checkpoint ./artifacts/checkpoint"}, r"train\.init: artifacts/checkpoint"),
    ({"keep_every": 5, "checkpoint_every": 4}, r"train: keep_every 5 .*checkpoint_every 4; .* 8$"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_reported_before_torchrun_starts(
    project: Project, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(stage, "run_torchrun", lambda *_: pytest.fail("started"))
    (project.folder / "source").mkdir()
    (project.folder / "source/x.safetensors").touch()
    project.write(train=changes)
    with pytest.raises(UserError, match=message) as caught:
        stage.launch()
    assert "\n" not in str(caught.value)


def test_a_source_that_does_not_fit_the_run_is_refused(project: Project, source: Path) -> None:
    project.write(model={"n_layer": 3}, train={"init": "checkpoint source"})
    with pytest.raises(UserError, match=r"model: source .*n_layer 2 \(here 3\)"):
        stage.launch()
    extended = {**CONSTANT, "init": "checkpoint source", "init_with": "all"}
    project.write(train={**extended, "batch_tokens": 256})
    with pytest.raises(UserError, match=r"train\.init_with: .* 48 samples in 6 steps, .* 96"):
        train_here()
    project.write(train={**extended, "steps": 6})
    with pytest.raises(UserError, match=r"train\.steps: 6\b.*source.*step 6"):
        train_here()


def test_non_finite_weights_and_moments_and_a_damaged_state_are_named(tmp_path: Path) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=60)
    good = GPT(config).state_dict()

    def refused(kind: str, named: str, with_optimizer: bool = False) -> None:
        with pytest.raises(UserError, match=rf"train\.init: .*{named}") as caught:
            init_from.load(Start(kind, tmp_path / "source", with_optimizer), config)
        assert "\n" not in str(caught.value)

    for bad in (float("nan"), float("inf")):
        state = {**good, "ln_f.bias": torch.full((8,), bad)}
        model_format.write(tmp_path / "source", config, state, {})
        refused("checkpoint", r"ln_f\.bias")
        hf.write(tmp_path / "source", config, state)
        refused("hf", r"transformer\.ln_f\.bias")
    moments = {"ln_f.bias.exp_avg": torch.full((8,), float("nan"))}
    state = {"step": 3, "samples": 12, "model": config.to_dict()}
    saved = directory.save(
        tmp_path, model=good, optimizer=moments, state=state, keep=directory.Keep(last=1)
    )
    saved.rename(tmp_path / "source 2")
    (tmp_path / "source").rename(tmp_path / "source 1")
    (tmp_path / "source 2").rename(tmp_path / "source")
    refused("checkpoint", r"optimizer\.safetensors: ln_f\.bias\.exp_avg", with_optimizer=True)
    for text in ("{", "[" * 100_000, "[]", "3", ""):
        (tmp_path / "source/state.json").write_text(text)
        for with_optimizer in (False, True):
            refused("checkpoint", "state", with_optimizer)
        with pytest.raises(UserError, match=r"train\.init: .*state\.json"):
            init_from.content_key(Start("checkpoint", tmp_path / "source", True))
