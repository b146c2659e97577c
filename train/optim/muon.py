"""Muon for the matrices of the transformer blocks, AdamW for all other parameters.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) updates a matrix with its momentum,
approximately orthogonalized, so that the step is equally long in all directions. It is made for
maps between hidden states; AdamW updates embeddings and vectors. The step is scaled by
0.2 sqrt(max(rows, columns)) to match the RMS of an AdamW step, so both use the same learning rate
and weight decay (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

`c_attn` holds the maps of queries, keys and values in one parameter; each is orthogonalized
separately. Orthogonalizing takes nearly all of Muon's time, so the ranks share it:

    every rank     momentum of all matrices, from the gradients that DDP has averaged
    one rank each  batches of `BATCH` matrices of one shape, orthogonalized in the same products
    all gather     the updates, bfloat16
    every rank     weights

What is in a batch depends on the model alone, and gathering adds nothing up: the weights are the
same bits for any number of ranks that have the same gradients.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from train.distributed.world import World

MOMENTUM = 0.95
QKV = ".attn.c_attn.weight"  # (3 C, C): queries, keys, values
BATCH = 4  # matrices in one product: 18 batches for the 12 layers of GPT-2 124M
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of Jordan et al.: steep at 0, values end in [0.7, 1.2]
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values near 1 by Newton-Schulz iterations (Jordan et al. 2024).

    Args:
        matrices: (n, rows, columns) bfloat16, rows <= columns.

    Returns:
        The same shape and dtype.
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):  # x <- a x + b (x xᵀ) x + c (x xᵀ)² x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if it has more rows than columns."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape that one rank orthogonalizes, and their place among all updates."""

    members: tuple[int, ...]
    shape: tuple[int, int]  # rows <= columns: of a matrix or its transpose
    rank: int
    start: int  # in the row of that rank

    def of(self, updates: Tensor) -> Tensor:
        """The updates of this batch (n, rows, columns), a view into those of all (ranks, most)."""
        n = len(self.members)
        size = n * math.prod(self.shape)
        return updates[self.rank, self.start : self.start + size].view(n, *self.shape)


def share(shapes: Sequence[torch.Size], ranks: int) -> tuple[list[Batch], int]:
    """Share matrices of these shapes among ranks, each costliest batch to the least busy rank.

    Returns:
        The batches, and the elements of the rank that has the most.
    """
    same: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        same[min(shape), max(shape)].append(number)
    parts = []
    for (rows, columns), numbers in same.items():
        rest = iter(numbers)
        while members := tuple(islice(rest, BATCH)):
            flops = len(members) * rows * rows * (2 * columns + rows)
            parts.append((flops, (rows, columns), members))
    batches, flops_of, used = [], [0] * ranks, [0] * ranks
    for flops, (rows, columns), members in sorted(parts, key=lambda part: -part[0]):
        rank = flops_of.index(min(flops_of))
        batches.append(Batch(members, (rows, columns), rank, used[rank]))
        flops_of[rank] += flops
        used[rank] += len(members) * rows * columns
    return batches, max(used)


class MuonAdamW:
    """Muon and AdamW behind the interface of one optimizer.

    Attributes:
        adamw: AdamW, for the parameters that Muon does not update.
        muon: The parameter group of Muon.
        momenta: State of Muon: parameter -> momentum, of the same shape; the same on each rank.

    Args:
        hidden: Names and matrices (out, in) for Muon.
        adamw: AdamW over all other parameters.
        world: The ranks that share the work, all of which call `step`; None: this process alone.
    """

    def __init__(
        self,
        hidden: Iterable[tuple[str, Tensor]],
        adamw: torch.optim.AdamW,
        *,
        learning_rate: float,
        weight_decay: float,
        world: World | None = None,
    ) -> None:
        self.adamw = adamw
        self._maps = {matrix: 3 if name.endswith(QKV) else 1 for name, matrix in hidden}
        self.muon: dict[str, Any] = {
            "params": [*self._maps],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        }
        self.momenta = {matrix: torch.zeros_like(matrix) for matrix in self._maps}
        self._world = world
        shapes = [part.shape for part in self._split(self._maps)]
        self._batches, self._most = share(shapes, world.size if world else 1)

    def _split(self, tensors: Iterable[Tensor | None]) -> list[Tensor]:
        """Views of the maps that are orthogonalized, of one tensor per matrix."""
        parts: list[Tensor] = []
        for tensor, n in zip(tensors, self._maps.values(), strict=True):
            assert tensor is not None, "a matrix without a gradient"
            parts += tensor.detach().chunk(n)
        return parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of both optimizers."""
        return [*self.adamw.param_groups, self.muon]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """State of each parameter; a matrix of Muon has one momentum of its shape."""
        return {
            **self.adamw.state,
            **{matrix: {"momentum_buffer": m} for matrix, m in self.momenta.items()},
        }

    def step(self) -> None:
        """Update all parameters from their gradients. A collective with more than one rank."""
        self._step_muon()
        self.adamw.step()

    @torch.no_grad()
    def _step_muon(self) -> None:
        ranks, rank = (self._world.size, self._world.rank) if self._world else (1, 0)
        weights, momenta = self._split(self._maps), self._split(self.momenta.values())
        gradients = self._split(matrix.grad for matrix in self._maps)
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.lerp_(gradient, 1 - MOMENTUM)

        updates = weights[0].new_empty(ranks, self._most, dtype=torch.bfloat16)
        for batch in self._batches:
            if batch.rank == rank:
                matrices = batch.of(updates)
                for i, matrix in zip(batch.members, matrices, strict=True):  # Nesterov's momentum
                    matrix.copy_(wide(gradients[i].lerp(momenta[i], MOMENTUM)))
                matrices.copy_(orthogonalize(matrices))
        if self._world:
            self._world.all_gather(updates)

        rate, decay = self.muon["lr"], self.muon["weight_decay"]
        for batch in self._batches:
            for i, update in zip(batch.members, batch.of(updates), strict=True):
                weight = wide(weights[i])
                weight.mul_(1 - rate * decay)
                weight.add_(update, alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zeros in place."""
        self.adamw.zero_grad(set_to_none)
        for matrix in self._maps:
            if set_to_none:
                matrix.grad = None
            elif matrix.grad is not None:
                matrix.grad.zero_()
