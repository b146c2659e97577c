"""Loss of processes: real Ray, real torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.processes import RAY_CASES, TRAINING_CASES, hit_tokenize, hit_train

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("case", RAY_CASES)
def test_tokenize_survives_the_loss_of_a_process(tmp_path: Path, case: str) -> None:
    result = hit_tokenize(tmp_path / "x", case)
    assert (result.lost, result.unexplained) == ([], [])


@pytest.mark.parametrize("case", TRAINING_CASES)
def test_training_survives_the_loss_of_a_process(tmp_path: Path, case: str) -> None:
    result = hit_train(tmp_path / "x", case)
    assert (result.lost, result.unexplained) == ([], [])
