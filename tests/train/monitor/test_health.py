"""Tests for train.monitor.health: non-finite steps and loss spikes."""

import math

import pytest

from train.monitor.health import MAX_SKIPPED_IN_A_ROW, MIN_LOSSES, Health, NonFinite


def noisy(step: int) -> float:
    return 4.0 - step / 1000 + 0.3 * math.sin(step * 12.9898)


def test_a_spike_is_reported_once_and_a_falling_loss_never() -> None:
    health = Health(skips=False)
    for step in range(1, 300):
        assert health.check(step, 7.0 * math.exp(-step / 20) + noisy(step), 1.0) is None
    spike = health.check(300, 5.5, 1.0)
    assert spike is not None
    assert (spike.name, spike.value) == ("spike", 5.5)
    assert "python -m train.trace --step 300" in spike.text
    assert health.check(301, noisy(301), 1.0) is None


def test_a_spike_needs_enough_losses_and_a_rise() -> None:
    health = Health(skips=False)
    assert all(health.check(step, 4.0, 1.0) is None for step in range(1, MIN_LOSSES))
    assert Health(skips=False).check(2, 40.0, 1.0) is None
    assert health.check(MIN_LOSSES, 4.05, 1.0) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.inf)])
def test_a_non_finite_step_stops_the_run(loss: float, norm: float) -> None:
    with pytest.raises(NonFinite, match=r"^step 7: .*train\.trace --step 7"):
        Health(skips=False).check(7, loss, norm)


def test_skipped_steps_are_counted_and_too_many_in_a_row_stop_the_run() -> None:
    health = Health(skips=True, skipped=3)
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        skipped = health.check(step, math.nan, 1.0)
        assert skipped is not None
        assert (skipped.name, skipped.value) == ("skipped", 4 + step)
    assert health.check(9, 4.0, 1.0) is None
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        health.check(step, 4.0, math.nan)
    with pytest.raises(NonFinite, match=r"^step 99: "):
        health.check(99, math.nan, 1.0)


def test_overflows_of_float16_are_skipped_and_a_loss_that_is_not_finite_stops_the_run() -> None:
    health = Health(skips=False, skips_overflows=True)
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        skipped = health.check(step, 4.0, math.inf)
        assert skipped is not None
        assert (skipped.name, skipped.value) == ("skipped", 1 + step)
    with pytest.raises(NonFinite, match=r"^step 9: "):
        health.check(9, 4.0, math.nan)
    with pytest.raises(NonFinite, match=r"^step 3: "):
        Health(skips=False, skips_overflows=True).check(3, math.nan, math.nan)
