"""Tests for train.plan.memory: the formulas match what PyTorch allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model import GPTConfig
from tests.benchmarks.plan import SMALL, Shape, peak_bytes, saved_bytes
from train.numerics import Dtype
from train.plan.memory import padded_parameter_count, saved_for_backward, training_memory


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_saved_tensors_match_the_formula(
    shape: Shape, dtype: Dtype, checkpoint_activations: bool
) -> None:
    formula = saved_for_backward(shape.config, shape.micro_batch, dtype, checkpoint_activations)
    # Equal tensor by tensor; alignment may add a little.
    assert saved_bytes(shape, dtype, checkpoint_activations) == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "checkpoint_activations", "rel"),
    [("bfloat16", False, 0.01), ("float32", False, 0.01), ("bfloat16", True, 0.05)],
)
def test_peak_of_a_step_matches_the_formula(
    dtype: Dtype, checkpoint_activations: bool, rel: float
) -> None:
    shape = Shape(GPTConfig.named("gpt2"), 16)
    measured = peak_bytes(shape, dtype, checkpoint_activations)
    formula = training_memory(
        shape.config, shape.micro_batch, dtype, checkpoint_activations=checkpoint_activations
    )
    assert formula.total == pytest.approx(measured, rel=rel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"positions": "rotary"},
        {"qk_norm": True},
        {"positions": "rotary", "qk_norm": True, "activation": "relu_squared"},
    ],
    ids=str,
)
def test_saved_tensors_of_variants_match_the_formula(options: dict[str, Any], dtype: Dtype) -> None:
    config = replace(SMALL[1].config, **options)
    formula = saved_for_backward(config, SMALL[1].micro_batch, dtype)
    measured = saved_bytes(Shape(config, SMALL[1].micro_batch), dtype)
    assert measured == pytest.approx(formula, rel=1e-3)


def test_muon_keeps_one_moment_and_adamw_two() -> None:
    config = GPTConfig.named("gpt2")
    adamw = training_memory(config, 1, "bfloat16")
    muon = training_memory(config, 1, "bfloat16", optimizer="muon")
    assert adamw.optimizer == 8 * padded_parameter_count(config)
    assert adamw.optimizer - muon.optimizer == 4 * 12 * 12 * 768**2
