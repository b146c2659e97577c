"""Tests for train.optim.muon: the published update, and the same bits for any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.benchmarks.muon import compare
from train.distributed.world import World
from train.optim.muon import BATCH, MuonAdamW, share

SHAPES = {"h.0.attn.c_attn.weight": (48, 16), "h.0.mlp.c_fc.weight": (64, 16)} | {
    f"h.{i}.attn.c_proj.weight": (16, 16) for i in range(2 * BATCH)
}


class Ranks:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size)

    def world(self, rank: int) -> World:
        ranks = self

        class Fake:
            size = ranks.size

            def all_gather(self, rows: Tensor) -> None:
                ranks.rows[rank] = rows[rank].clone()
                ranks.barrier.wait()
                rows.copy_(torch.stack(ranks.rows))
                ranks.barrier.wait()

        fake = Fake()
        fake.rank = rank  # type: ignore[attr-defined]
        return cast(World, fake)

    def run(self, part: Callable[[World], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(part, map(self.world, range(self.size))))


def train(world: World | None, steps: int = 3) -> dict[str, Tensor]:
    """Weights and momenta after some steps with random gradients."""
    generator = torch.Generator().manual_seed(0)
    named = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    vector = torch.nn.Parameter(torch.zeros(3))
    optimizer = MuonAdamW(
        named.items(),
        torch.optim.AdamW([vector]),
        learning_rate=0.02,
        weight_decay=0.1,
        world=world,
    )
    for _ in range(steps):
        for parameter in (*named.values(), vector):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    momenta = {f"{name}.momentum": optimizer.momenta[p] for name, p in named.items()}
    return {name: p.detach() for name, p in named.items()} | momenta


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_weights_and_momenta_are_the_same_bits_for_any_number_of_ranks(size: int) -> None:
    alone = train(None)
    for found in Ranks(size).run(train):
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_an_update_is_that_of_pytorch() -> None:
    """torch.optim.Muon, over the same maps, is an implementation that is not ours."""
    before, found = train(None, steps=0), train(None)
    generator = torch.Generator().manual_seed(0)
    parts = {n: [torch.nn.Parameter(p.clone()) for p in w.chunk(3 if "c_attn" in n else 1)]
             for n, w in before.items() if "momentum" not in n}  # fmt: skip
    for shape in SHAPES.values():
        torch.randn(shape, generator=generator)  # the weights
    theirs = torch.optim.Muon(
        [part for p in parts.values() for part in p],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(3):
        for name, members in parts.items():
            gradient = torch.randn(SHAPES[name], generator=generator)
            for part, g in zip(members, gradient.chunk(len(members)), strict=True):
                part.grad = g
        torch.randn(3, generator=generator)
        theirs.step()
    for name, members in parts.items():
        torch.testing.assert_close(found[name], torch.cat([*members]), rtol=0, atol=1e-3)
        assert (found[name] - before[name]).abs().max() > 0.02


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([(4, 4), (4, 16), (16, 4), (8, 8)]), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_every_matrix_has_one_rank_and_a_place_of_its_own(
    shapes: list[tuple[int, int]], ranks: int
) -> None:
    batches, most = share([torch.Size(shape) for shape in shapes], ranks)
    updates = torch.zeros(ranks, most)
    for batch in batches:
        batch.of(updates).add_(1)
        assert all(sorted(shapes[i]) == list(batch.shape) for i in batch.members)
    assert sorted(i for batch in batches for i in batch.members) == list(range(len(shapes)))
    assert updates.sum() == sum(rows * columns for rows, columns in shapes)
    assert updates.max() == 1
    alone, _ = share([torch.Size(shape) for shape in shapes], 1)  # the same batches, so same bits
    assert {b.members for b in alone} == {b.members for b in batches}


def test_eight_ranks_share_gpt2_evenly() -> None:
    C = 768
    layer = [torch.Size(s) for s in [(C, C)] * 4 + [(4 * C, C), (C, 4 * C)]]
    batches, most = share(layer * 12, 8)
    flops = [0] * 8
    for b in batches:
        flops[b.rank] += len(b.members) * b.shape[0] ** 2 * (2 * b.shape[1] + b.shape[0])
    assert max(flops) < 1.1 * sum(flops) / 8
    assert most < 1.1 * 12 * 12 * C * C / 8 + 4 * 4 * C * C


@pytest.mark.slow  # 4 processes import torch
def test_gloo_ranks_end_with_the_same_bits() -> None:
    hashes = {result.digest for n in (1, 2, 4) for result in compare(n, layers=2, width=32)}
    assert len(hashes) == 1
