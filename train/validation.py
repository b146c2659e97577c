"""Validation loss over a fixed part of a split, for any number of processes and any batch size.

The loss is the mean over the first ``n`` targets of the split: tokens 1 ... n, each predicted from
the tokens before it in its window. Windows are cut as in training. The last window and the last
batch are padded with targets of -100, which the loss ignores, so that all batches have one shape
(and the model one compiled graph).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from model.loss import IGNORE_INDEX
from pipeline.runtime.errors import UserError
from train.data.loader import Tokens
from train.distributed.world import World
from train.numerics import Dtype, summed_loss


def check_val_tokens(name: str, stream: Tokens, n_targets: int) -> None:
    """Refuse to validate more targets than the validation split has.

    Raises:
        UserError: Names the parameter (``train.val_tokens``) and the largest possible value.
    """
    most = max(0, len(stream) - 1)
    if n_targets > most:
        lower = f"set at most {most}, or " if most else ""
        raise UserError(
            f"params.yaml: {name}: {n_targets}, but the validation split has only {most} targets; "
            f"{lower}raise tokenize.val_per_10k; token files without a validation file: set "
            "tokenize.val_split: position"
        )


def fixed_batches(
    stream: Tokens, n_targets: int, block_size: int, rows: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a split into batches for one rank: batch ``k`` belongs to rank ``k mod world``.

    Yields:
        Inputs and targets, each (rows, block_size) int64 on the CPU.
    """
    span = rows * block_size
    for first in range(rank * span, n_targets, world * span):
        n = min(span, n_targets - first)
        tokens = torch.from_numpy(stream[first : first + n + 1].astype("int64"))
        inputs = torch.zeros(span, dtype=torch.int64)
        targets = torch.full((span,), IGNORE_INDEX, dtype=torch.int64)
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
    """Compute the mean loss over the first targets of a split, nats; the same on all ranks.

    Args:
        forward: A GPT, compiled or not, without DDP, whose hooks are for training.
        block_size: Tokens per window.
        rows: Windows per batch.
        world: The processes that share the work; None: this one alone.
        check: Called before each batch, equally often on each rank, so it may be a collective.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    total = torch.zeros((), dtype=torch.float64, device=device)  # float32 would lose small terms
    batches = fixed_batches(stream, n_targets, block_size, rows, rank=rank, world=size)
    for _ in range(0, n_targets, size * rows * block_size):
        check()
        for inputs, targets in islice(batches, 1):  # in the last round some ranks have no batch
            total += summed_loss(forward, inputs.to(device), targets.to(device), dtype)
    if world is not None:
        world.sum(total)
    return total.item() / n_targets
