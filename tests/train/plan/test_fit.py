"""Tests for train.plan.fit: the micro-batch and loss chunk of each GPU, and what they depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from train.plan.accelerators import NAMES, accelerator
from train.plan.estimate import Options, make_plan
from train.plan.fit import GIB, REPORTED, SOLD, choose, nominal_memory, usable_memory
from train.plan.memory import CUDA_RESERVE, training_memory
from train.preset import load

# (preset, GPU, processes) -> sequences per micro-batch, tokens per chunk of the loss, GiB planned
CHOSEN = {
    ("fineweb-10b", "a100-40", 8): (64, 8192, 27.5),
    ("fineweb-10b", "a100-80", 8): (64, 8192, 27.5),
    ("fineweb-10b", "a100-80", 1): (64, 8192, 27.5),
    ("fineweb-10b", "h100", 8): (64, 8192, 27.5),
    ("fineweb-10b", "h200", 8): (64, 8192, 27.5),
    ("fineweb-10b", "l4", 8): (32, 8192, 17.1),
    ("fineweb-10b", "rtx4090", 1): (32, 8192, 17.1),
    ("gpt2-medium", "a100-80", 8): (64, 8192, 65.5),
    ("gpt2-medium", "l4", 8): (8, 8192, 17.5),
    ("gpt2-large", "h100", 8): (32, 4096, 67.8),
    ("gpt2-xl", "a100-80", 8): (8, 8192, 52.3),
    ("gpt2-xl", "h200", 8): (32, 8192, 116.1),
}


@pytest.mark.parametrize(("preset", "gpu", "world"), CHOSEN)
def test_choice_for_a_gpu_of_the_table(preset: str, gpu: str, world: int) -> None:
    params, (micro_batch, chunk, gib) = load(preset), CHOSEN[preset, gpu, world]
    total = accelerator(gpu).memory
    split, found = choose(params.model, params.train, Machine(), world, total)
    assert (split.micro_batch, found) == (micro_batch, chunk)
    plan = make_plan(params, Options(hardware=gpu, gpus=world))
    assert (plan.micro_batch, plan.loss_chunk) == (micro_batch, chunk)
    assert plan.memory.total / GIB == pytest.approx(gib, abs=0.1)
    assert plan.memory.total <= plan.available < total
    assert plan.fits


@pytest.mark.parametrize("gpu", [name for name in NAMES if name != "cpu"])
@pytest.mark.parametrize("preset", ["fineweb-10b", "gpt2-medium", "speedrun"])
def test_no_other_choice_that_fits_moves_fewer_bytes(preset: str, gpu: str) -> None:
    params, total = load(preset), accelerator(gpu).memory
    best = make_plan(params, Options(hardware=gpu, gpus=1)).step.total
    for micro_batch in (1, 8, 16, 32, 64):
        for chunk in (None, 1024, 4096, 8192):
            options = Options(hardware=gpu, gpus=1, micro_batch=micro_batch, loss_chunk=chunk)
            plan = make_plan(params, options)
            assert plan.step.total >= best or plan.memory.total > usable_memory(total)


@pytest.mark.parametrize("preset", ["fineweb-10b", "gpt2-large"])
def test_cards_of_one_size_get_one_choice_whatever_they_report(preset: str) -> None:
    params = load(preset)
    for reports in ((78.7, 79.1, 79.3, 80.0), (22.0, 22.5, 23.5, 23.7), (39.4, 39.6, 40.0)):
        found = {choose(params.model, params.train, Machine(), 8, gib * GIB) for gib in reports}
        assert len(found) == 1


def test_a_plan_never_takes_more_than_a_card_reports() -> None:
    assert list(SOLD) == sorted(SOLD)
    for gib in (3.0, *(0.25 * n for n in range(16, 1200))):
        assert usable_memory(gib * GIB) < gib * GIB
        assert nominal_memory(gib * GIB) >= gib * GIB
    for size in SOLD:  # the least that a card of this size reports
        assert nominal_memory(REPORTED * 1.02 * size * GIB) <= size * GIB


def test_settings_are_taken_as_they_are() -> None:
    params, total = load("fineweb-10b"), 79.1 * GIB
    split, chunk = choose(params.model, params.train, Machine(micro_batch=4), 8, total)
    assert (split.micro_batch, chunk) == (4, 8192)  # all 4 x 1024 tokens in one chunk
    split, chunk = choose(params.model, params.train, Machine(loss_chunk=1490), 8, total)
    assert (split.micro_batch, chunk) == (64, 1490)
    split, chunk = choose(params.model, params.train, Machine(micro_batch=64), 8, 8 * GIB)
    assert (split.micro_batch, chunk) == (64, None)  # it does not fit, and the warm-up says so
    checkpointed = Machine(checkpoint_activations=True)
    assert choose(params.model, params.train, checkpointed, 8, 16 * GIB)[0].micro_batch == 64
    with pytest.raises(UserError, match="micro_batch"):
        choose(params.model, params.train, Machine(micro_batch=7), 8, total)


def test_where_nothing_fits_the_smallest_is_tried_and_a_cpu_is_asked_for_nothing() -> None:
    params = load("gpt2-xl")
    split, chunk = choose(params.model, params.train, Machine(), 8, 16 * GIB)
    assert (split.micro_batch, chunk) == (1, None)
    params = load("mini")
    split, chunk = choose(params.model, params.train, Machine(loss_chunk=5), 2, None)
    assert (split.micro_batch, chunk) == (4, 5)


def test_the_smallest_batch_of_a_ramp_is_split() -> None:
    params = load("muon")
    update = {"batch_doublings": 2, "batch_ramp_steps": 1000}  # 128 sequences at first
    params = replace(params, train=params.train.model_copy(update=update))
    split, _ = choose(params.model, params.train, Machine(), 8, 79.1 * GIB)
    assert split.micro_batch == 16
    memory = training_memory(
        replace(params.model.config(), loss_chunk=8192),
        16,
        "bfloat16",
        optimizer="muon",
        reserve=CUDA_RESERVE,
    )
    assert memory.total < usable_memory(79.1 * GIB)
