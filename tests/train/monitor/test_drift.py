"""Tests for train.monitor.drift: which rank differs, and in which parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.support.training import Project, batches
from train.distributed.interrupt import Interrupt
from train.distributed.rendezvous import process_group
from train.distributed.world import World
from train.monitor.drift import Drift, check_same_weights, checksums
from train.run import Run
from train.trainer import Trainer


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(30, 7, generator=generator), "b": torch.full((5,), -0.0)}


def world(ranks: list[dict[str, Tensor]]) -> World:
    """Pretend to be rank 0 of a group with these weights."""

    def gather(own: tuple[str, Any]) -> list[tuple[str, Any]]:
        assert own[1] == checksums(ranks[0])
        return [(f"rank {number}", checksums(named)) for number, named in enumerate(ranks)]

    return cast(World, SimpleNamespace(rank=0, size=len(ranks), gather=gather))


@pytest.mark.parametrize(
    ("size", "drifted", "named"),
    [
        (1, [], ""),
        (3, [], ""),
        (2, [1], "rank 1: "),
        (4, [0], "rank 0: "),
        (5, [1, 3], "rank 1, rank 3: "),
    ],
)
@pytest.mark.parametrize("parameter", ["a", "b"])
def test_the_ranks_that_differ_from_most_are_named(
    size: int, drifted: list[int], named: str, parameter: str
) -> None:
    ranks = [weights() for _ in range(size)]
    for number in drifted:
        ranks[number][parameter].view(-1)[2:3].view(torch.int32).bitwise_xor_(1)  # the last bit
    if not drifted:
        check_same_weights(ranks[0], world(ranks), 7)
        return
    with pytest.raises(Drift, match=rf"^step 7: {named}.* in {parameter};"):
        check_same_weights(ranks[0], world(ranks), 7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_momenta_of_muon_are_compared_as_well(project: Project, optimizer: str) -> None:
    """One that has drifted would change the weights of all ranks alike."""
    project.write(train={"optimizer": optimizer})
    run = Run.open()
    with process_group("cpu") as only:
        trainer = Trainer(run, only)
        trainer.warm_up()
        with batches(run, trainer, 0) as loader, Interrupt(only) as interrupt:
            trainer.step(0, loader, interrupt)
        mine = trainer.replicas()
    assert mine.keys() >= trainer.named.keys()
    momenta = [name for name in mine if name not in trainer.named]
    assert len(momenta) == (8 if optimizer == "muon" else 0)
    for name in momenta[-1:]:
        other = {**mine, name: mine[name].clone()}
        other[name].view(-1)[0] += 1
        with pytest.raises(Drift, match=f"rank 1: .* in {name};"):
            check_same_weights(mine, world([mine, other]), 7)
