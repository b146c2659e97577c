"""Of train.health: what is no number stops or is counted, and a spike is a spike."""

import math

import pytest

from train.monitor.health import ENOUGH, MOST_SKIPPED, Health, NonFinite


def noisy(step: int) -> float:
    return 4.0 - step / 1000 + 0.3 * math.sin(step * 12.9898)


def test_a_spike_is_marked_once_and_a_falling_loss_never() -> None:
    health = Health(skips=False)
    for step in range(1, 300):
        assert health.look(step, 7.0 * math.exp(-step / 20) + noisy(step), 1.0) is None
    mark = health.look(300, 5.5, 1.0)
    assert mark is not None
    assert (mark.name, mark.value) == ("spike", 5.5)
    assert "python -m train.trace --step 300" in mark.text
    assert health.look(301, noisy(301), 1.0) is None


def test_too_few_losses_say_nothing_and_a_flat_curve_is_no_alarm() -> None:
    health = Health(skips=False)
    assert all(health.look(step, 4.0, 1.0) is None for step in range(1, ENOUGH))
    assert Health(skips=False).look(2, 40.0, 1.0) is None
    assert health.look(ENOUGH, 4.05, 1.0) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.inf)])
def test_what_is_not_finite_stops_the_run(loss: float, norm: float) -> None:
    with pytest.raises(NonFinite, match=r"step 7: .*not finite.*train\.trace --step 7"):
        Health(skips=False).look(7, loss, norm)


def test_skipped_steps_are_counted_on_and_too_many_in_a_row_stop() -> None:
    health = Health(skips=True, skipped=3)
    for step in range(MOST_SKIPPED - 1):
        mark = health.look(step, math.nan, 1.0)
        assert mark is not None
        assert (mark.name, mark.value) == ("skipped", 4 + step)
    assert health.look(9, 4.0, 1.0) is None
    for step in range(MOST_SKIPPED - 1):
        health.look(step, 4.0, math.nan)
    with pytest.raises(NonFinite, match="in a row"):
        health.look(99, math.nan, 1.0)
