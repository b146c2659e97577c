"""Validation loss over a fixed part of a split, for any number of processes and any batch size.

The loss is the mean over ``n`` targets in equally long spans, spread evenly from the first token of
the split to its last: a split has its sources one after the other, and its beginning is only one of
them. Each target is predicted from the tokens before it in its window:

    split      |=====                =====                =====                =====|
    span        [ window | window | ... ]      a multiple of block_size, about `SPAN` tokens

A stream of n + 1 tokens is measured as a whole. The last window and the last batch are padded with
targets of -100, which the loss ignores, so that all batches have one shape (and the model one
compiled graph).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from model.loss import IGNORE_INDEX
from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from train.data.loader import Tokens
from train.distributed.world import World
from train.numerics import Dtype, summed_loss

SPAN = 1024  # targets per span: the same for each block_size that divides it, if n is large
FEWEST_SPANS = 16  # for n < 16 * SPAN spans are shorter, down to one window of block_size

WINDOWS = "spread"
"""Name of this choice of targets, stored with each loss: earlier code, which stored none, measured
the first targets of the split, and its losses are of other text."""


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


def source_parts(stream: TokenStream, n_targets: int) -> dict[str, tuple[TokenStream, int]]:
    """Return the tokens of each source in the validation split, and the targets to measure.

    The sources have equal parts of ``n_targets``, where they are large enough. A single source has
    no parts: its loss is that of the split.
    """
    names = list(stream.manifest.source.sources)
    if len(names) < 2:
        return {}
    parts = {name: TokenStream(stream.folder, "val", name) for name in names}
    share = max(1, n_targets // len(names))
    return {name: (p, min(share, len(p) - 1)) for name, p in parts.items() if len(p) > 1}


def windows(n_tokens: int, n_targets: int, block_size: int) -> list[tuple[int, int]]:
    """Choose the windows to measure (module docstring).

    Args:
        n_tokens: Tokens of the split, more than ``n_targets``.

    Returns:
        First token and number of targets of each window: block_size, but in the last maybe fewer.
    """
    span = -(-min(SPAN, n_targets // FEWEST_SPANS) // block_size) * block_size or block_size
    gaps = -(-n_targets // span) - 1
    unmeasured = n_tokens - 1 - n_targets
    return [
        (done + done // span * unmeasured // max(1, gaps), min(block_size, n_targets - done))
        for done in range(0, n_targets, block_size)
    ]


def fixed_batches(
    stream: Tokens, n_targets: int, block_size: int, rows: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a split into batches for one rank: batch ``k`` belongs to rank ``k mod world``.

    Yields:
        Inputs and targets, each (rows, block_size) int64 on the CPU.
    """
    measured = windows(len(stream), n_targets, block_size)
    for first in range(rank * rows, len(measured), world * rows):
        inputs = torch.zeros(rows, block_size, dtype=torch.int64)
        targets = torch.full((rows, block_size), IGNORE_INDEX, dtype=torch.int64)
        for row, (start, n) in enumerate(measured[first : first + rows]):
            tokens = torch.from_numpy(stream[start : start + n + 1].astype("int64"))
            inputs[row, :n], targets[row, :n] = tokens[:-1], tokens[1:]
        yield inputs, targets


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
    one_order: bool = False,
) -> float:
    """Compute the mean loss over targets spread over a split, nats; the same on all ranks.

    Args:
        forward: A GPT, compiled or not, without DDP, whose hooks are for training.
        block_size: Tokens per window.
        rows: Windows per batch.
        world: The processes that share the work; None: this one alone.
        check: Called before each batch, equally often on each rank, so it may be a collective.
        one_order: Add the losses of the batches in one order for any number of processes.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    rounds = -(-n_targets // (size * rows * block_size))
    places = rounds * size if one_order else 1
    totals = torch.zeros(places, dtype=torch.float64, device=device)  # float32 would lose terms
    batches = fixed_batches(stream, n_targets, block_size, rows, rank=rank, world=size)
    for number in range(rounds):
        check()
        place = number * size + rank if one_order else 0
        for inputs, targets in islice(batches, 1):  # in the last round some ranks have no batch
            totals[place] += summed_loss(forward, inputs.to(device), targets.to(device), dtype)
    if world is not None:
        world.sum(totals)
    return math.fsum(totals.tolist()) / n_targets
