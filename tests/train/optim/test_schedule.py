"""Tests for train.optim.schedule."""

from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.optim.schedule import BatchSchedule, Schedule


def schedule(**changes: Any) -> Schedule:
    values: dict[str, Any] = {
        "kind": "cosine", "peak": 6e-4, "minimum": 6e-5, "steps": 100, "warmup_steps": 10,
        "decay_steps": 20,
    }  # fmt: skip
    return Schedule(**{**values, **changes})


@given(
    kind=st.sampled_from(get_args(get_type_hints(Schedule)["kind"])),
    steps=st.integers(1, 300),
    data=st.data(),
)
def test_the_rate_rises_to_the_peak_then_falls_and_is_never_zero(
    kind: str, steps: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    rates = [
        schedule(kind=kind, steps=steps, warmup_steps=warmup, decay_steps=7)(step)
        for step in range(steps)
    ]
    assert all(0 < rate <= 6e-4 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (1, 0), (2, 1), (19560, 700)])
def test_the_last_step_has_exactly_the_minimum(kind: str, steps: int, warmup: int) -> None:
    rate = schedule(kind=kind, steps=steps, warmup_steps=warmup)
    assert rate(steps - 1) == 6e-5


def test_the_warmup_is_linear() -> None:
    rate = schedule(peak=1.0, minimum=0.0)
    assert [rate(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]


def test_the_cosine_is_halfway_in_the_middle() -> None:
    rate = schedule(peak=1.0, minimum=0.5, steps=101, warmup_steps=0)
    assert rate(50) == pytest.approx(0.75)


def test_wsd_is_stable_then_decays_linearly() -> None:
    rate = schedule(kind="wsd", peak=1.0, minimum=0.0)
    assert [rate(step) for step in (10, 50, 79)] == [1.0] * 3
    assert [rate(step) for step in (89, 94, 99)] == pytest.approx([0.5, 0.25, 0.0])


def test_constant_keeps_the_peak() -> None:
    rate = schedule(kind="constant")
    assert {rate(step) for step in range(10, 100)} == {6e-4}


@pytest.mark.parametrize("step", [-1, 100])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=str(step)):
        schedule()(step)


# -- BatchSchedule ---------------------------------------------------------------------------------


@given(
    smallest=st.integers(1, 20),
    doublings=st.integers(0, 5),
    ramp=st.integers(1, 60),
    step=st.integers(0, 100),
)
def test_batches_follow_each_other_without_a_gap(
    smallest: int, doublings: int, ramp: int, step: int
) -> None:
    full = smallest << doublings
    batches = BatchSchedule(full=full, doublings=doublings, ramp_steps=ramp if doublings else 0)
    (_, start, count), (_, following, _) = batches.spans(step, step + 2)
    assert following == start + count
    assert count % batches.smallest == 0
    assert count == full or (doublings and step < ramp and count < full)


def test_a_batch_doubles_to_its_full_size() -> None:
    batches = BatchSchedule(full=16, doublings=2, ramp_steps=5)  # 2 steps of 4, 3 of 8
    assert [batches(step)[1] for step in range(7)] == [4, 4, 8, 8, 8, 16, 16]
    assert batches(0)[0] == 0
    assert batches(7)[0] == 2 * 4 + 3 * 8 + 2 * 16
    assert BatchSchedule(full=8)(10) == (80, 8)


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"12 .* 3\b"):
        BatchSchedule(full=12, doublings=3, ramp_steps=3)
    with pytest.raises(ValueError, match="-1"):
        BatchSchedule(full=4)(-1)
