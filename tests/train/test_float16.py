"""Tests for `train.dtype: float16`: the loss scale, its overflows, and exact resume. On a CPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import Project, records, stop_in, train_here
from train import numerics


def state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("artifacts/checkpoint/state.json").read_text())
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_and_resumed_ends_with_the_same_bits(
    project: Project, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """The scale depends on the overflows before the stop, and decides which steps are skipped."""
    # A scale that overflows at first, and grows again after three good steps.
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**24, growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    project.write(train={"dtype": "float16", "optimizer": optimizer, "log_every": 1})
    run = train_here()
    files, skipped = project.published(), records(run, "skipped")
    assert 0 < len(skipped) < 8
    assert state()["skipped"] == [*skipped]
    assert state()["scaler"]["scale"] != 2.0**24
    losses = records(run, "train/loss")
    assert losses[12] < losses[max(skipped) + 1]

    first = min(step for step in range(2, 12) if step in losses and step - 1 in skipped)
    monkeypatch.setenv("GPT2_WORK_DIR", "stopped")
    stop_in(monkeypatch, "step", first + 1)  # after the first step that was not skipped
    resumed = train_here()
    assert project.published() == files
    assert records(resumed, "grad_norm") == records(run, "grad_norm")


def test_losses_are_those_of_float32_and_other_types_have_no_scale(project: Project) -> None:
    found = {}
    for dtype in ("float32", "float16"):
        project.write(train={"dtype": dtype, "steps": 6, "log_every": 1})
        found[dtype] = records(train_here(), "train/loss")
        assert ("scaler" in state()) == (dtype == "float16")
    assert found["float16"].keys() == found["float32"].keys()
    for step, loss in found["float16"].items():
        assert loss == pytest.approx(found["float32"][step], abs=5e-3)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 6), "bfloat16")],
)
def test_auto_is_float16_on_tensor_cores_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert numerics.native_dtype("auto") == numerics.native_dtype("cuda") == dtype
