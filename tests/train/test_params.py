"""Tests for train.params: sections `model`, `train` and `evaluate`."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.runtime.params_file import validate
from tests.support.repo import REPO
from train.checkpoint.start import Start
from train.params import EvaluateParams, ModelParams, ObservingParams, TrainParams


def test_sizes_have_names() -> None:
    assert ModelParams(size="gpt2-xl").config().n_layer == 48
    assert ModelParams(size="gpt2", block_size=64).config().block_size == 64
    assert ModelParams(n_layer=1, n_head=2, n_embd=4).config().n_embd == 4


def test_the_schedule_follows_the_parameters() -> None:
    values: dict[str, Any] = {
        "steps": 100,
        "batch_tokens": 8,
        "learning_rate": 0.5,
        "val_tokens": 8,
    }
    wsd = TrainParams(**values, schedule="wsd", decay_ratio=0.1, min_lr_ratio=0.0).lr_schedule()
    assert [wsd(step) for step in (0, 88, 89, 99)] == pytest.approx([0.5, 0.5, 0.5, 0.0])
    assert wsd(90) < 0.5


def test_weight_decay_may_fall_to_zero_over_the_run() -> None:
    values: dict[str, Any] = {"batch_tokens": 8, "learning_rate": 0.5, "val_tokens": 8}
    params = TrainParams(**values, steps=5, weight_decay_schedule="linear")
    assert [params.decay_fraction(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert TrainParams(**values, steps=1, weight_decay_schedule="linear").decay_fraction(0) == 1.0
    assert TrainParams(**values, steps=5).decay_fraction(4) == 1.0


def test_runs_that_are_not_invariant_keep_their_key() -> None:
    values: dict[str, Any] = {"batch_tokens": 8, "learning_rate": 0.5, "val_tokens": 8, "steps": 9}
    assert "invariant" not in TrainParams(**values).deciding()
    assert TrainParams(**values, invariant=2).deciding()["invariant"] == 2


def test_every_field_is_described() -> None:
    for section in (ModelParams, TrainParams, EvaluateParams):
        for name, field in section.model_fields.items():
            assert field.description, name


def test_prompts_may_be_a_list() -> None:
    params = validate(EvaluateParams, {"val_tokens": 1, "prompts": ["a", "b"]}, "evaluate")
    assert params.prompts == ("a", "b")


def test_params_yaml_says_which_keys_only_observe() -> None:
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    section = text[text.index("\ntrain:") : text.index("\nevaluate:")]
    marked = set(re.findall(r"^  (\w+): .* # observes: ", section, re.MULTILINE))
    assert marked == set(ObservingParams.model_fields)


def test_a_key_of_train_either_decides_or_observes() -> None:
    values: dict[str, Any] = {"learning_rate": 0.1, "val_tokens": 1, "invariant": 1}
    params = TrainParams(steps=1, batch_tokens=1, **values)
    assert params.deciding().keys().isdisjoint(params.observing())
    assert {**params.deciding(), **params.observing()} == params.model_dump(mode="json")


@pytest.mark.parametrize(
    ("init", "init_with", "named"),
    [
        ("file x", "weights", "init"),
        ("scratch x", "weights", "init"),
        ("hf", "weights", "init"),
        ("hf a\0b", "weights", "init"),
        ("hf ~no-such-user/x", "weights", "init"),
        ("hf x", "all", "init_with"),
        ("scratch", "all", "init_with"),
    ],
)
def test_an_impossible_start_is_refused(init: str, init_with: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} "):
        Start.parse(init, init_with)
