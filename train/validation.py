"""The loss over a fixed piece of text, the same for every world, batch and moment.

What is measured are the first ``n`` targets of a split: tokens 1 ... n, each predicted from the
tokens before it in its window. Windows are cut as in training; the last may be shorter, and rows
are added to fill the last batch: both hold targets of -100, which the loss ignores, so that every
batch has one shape (one compiled graph).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError
from train.data.loader import Tokens
from train.distributed.world import World
from train.numerics import Dtype, summed_loss

IGNORED = -100


def check_split(name: str, stream: Tokens, wanted: int) -> None:
    """Refuses a validation split that is shorter than what is to be measured.

    Args:
        name: The parameter that asks, such as ``train.val_tokens``.
        stream: The validation split.
        wanted: Targets to measure.

    Raises:
        UserError: Names the parameter and the most that is possible.
    """
    if len(stream) < wanted + 1:
        most = max(0, len(stream) - 1)
        lower = f"set at most {most}, or " if most else ""
        raise UserError(
            f"params.yaml: {name}: {wanted}, but the validation split holds only {most} targets; "
            f"{lower}raise tokenize.val_per_10k"
        )


def fixed_batches(
    stream: Tokens, n_targets: int, block_size: int, rows: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one rank: batch ``k`` belongs to rank ``k mod world``.

    Yields:
        Inputs and targets, each (rows, block_size) int64 on the CPU.
    """
    span = rows * block_size
    for first in range(rank * span, n_targets, world * span):
        n = min(span, n_targets - first)
        tokens = torch.from_numpy(stream[first : first + n + 1].astype("int64"))
        inputs = torch.zeros(span, dtype=torch.int64)
        targets = torch.full((span,), IGNORED, dtype=torch.int64)
        inputs[:n], targets[:n] = tokens[:-1], tokens[1:]
        yield inputs.view(rows, block_size), targets.view(rows, block_size)


@torch.no_grad()
def mean_loss(
    forward: Any,
    stream: Tokens,
    n_targets: int,
    *,
    block_size: int,
    rows: int,
    dtype: Dtype,
    device: torch.device,
    world: World | None = None,
    check: Callable[[], None] = lambda: None,
) -> float:
    """The mean loss over the first targets of a split, nats; the same on each rank.

    Args:
        forward: A GPT, compiled or not; no DDP, whose hooks are for training.
        stream: The split.
        n_targets: How many targets.
        block_size: Tokens a window.
        rows: Windows computed at a time.
        dtype: Of the matrix products.
        device: Where.
        world: The processes that share the work, if there are several.
        check: Called before each batch, equally often on each rank: it may be a collective.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    total = torch.zeros((), dtype=torch.float64, device=device)  # many small terms: not float32
    batches = fixed_batches(stream, n_targets, block_size, rows, rank=rank, world=size)
    for _ in range(0, n_targets, size * rows * block_size):
        check()
        for inputs, targets in islice(batches, 1):  # none, on the last round, for the last ranks
            total += summed_loss(forward, inputs.to(device), targets.to(device), dtype)
    if world is not None:
        world.sum(total)
    return total.item() / n_targets
