"""How likely a model holds a continuation of a text: what every benchmark here comes down to.

A row is a context and a continuation, both tokens. As in EleutherAI's lm-evaluation-harness, what
is too long for the model loses its beginning, and nothing is put before the context.

Rows of equal length make a batch, so that nothing is padded and no row knows its neighbours. How
many are computed at a time, and which process computes them, changes no more than the last bits of
a product in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT
from pipeline.format import tokenizer
from train.distributed.world import World
from train.numerics import Dtype

BATCH_TOKENS = 8192  # computed at a time, where nobody says how many rows
HEAD_TOKENS = 1024  # whose logits are held at a time: 206 MB of GPT-2's vocabulary


class Row(NamedTuple):
    """A context, not empty, and what might follow it, not empty; both token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def of(cls, context: str, continuation: str) -> Row:
        """Encodes text as the harness does.

        Spaces at the end of the context begin the continuation; and the continuation's tokens are
        those that both together have beyond as many as the context alone.
        """
        before = tokenizer.encode(context.rstrip())
        both = tokenizer.encode(context + continuation)
        return cls(tuple(before), tuple(both[len(before) :]))

    def window(self, block_size: int) -> tuple[tuple[int, ...], int]:
        """The last tokens that a model sees, its last target included, and how many count."""
        tokens = (*self.context, *self.continuation)[-(block_size + 1) :]
        return tokens, min(len(self.continuation), len(tokens) - 1)


class Score(NamedTuple):
    """What a model makes of a row's continuation.

    Attributes:
        log_likelihood: Of all its tokens together, nats.
        tokens: How many they are.
        greedy: Whether each is the one that the model holds likeliest.
    """

    log_likelihood: float
    tokens: int
    greedy: bool


def batches(lengths: Sequence[int], rows: int | None) -> Iterator[list[int]]:
    """The rows of each batch, all of one length, the longest first.

    Args:
        lengths: Of each row, inputs.
        rows: In a batch at most; None: about `BATCH_TOKENS` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for length, group in groupby(order, key=lambda row: lengths[row]):
        alike = list(group)
        size = rows or max(1, BATCH_TOKENS // length)
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


@torch.no_grad()
def scores(
    gpt: GPT,
    rows: Sequence[Row],
    world: World | None = None,
    size: int | None = None,
    *,
    dtype: Dtype = "float32",
    check: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Each row's score, in order; the same on each rank.

    Args:
        gpt: The model; its device is used.
        rows: What is scored.
        world: The processes that share the work, if there are several.
        size: Rows computed at a time; None chooses.
        dtype: Of the matrix products; in float32 others measure them.
        check: Called before each batch, equally often on each rank: it may be a collective.
    """
    device = gpt.wte.weight.device
    windows = [row.window(gpt.config.block_size) for row in rows]
    # (row, 3): log-likelihood, tokens, greedy; zero in the rows of other ranks.
    table = torch.zeros((len(rows), 3), dtype=torch.float64, device=device)
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    plan = list(batches([len(tokens) - 1 for tokens, _ in windows], size))
    for first in range(0, len(plan), ranks):
        check()
        for batch in plan[first + rank : first + rank + 1]:  # none, at last, for the last ranks
            tokens = torch.tensor([windows[row][0] for row in batch], device=device)  # (B, T + 1)
            counts = torch.tensor([windows[row][1] for row in batch], device=device)  # (B,)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                table[batch] = _batch(gpt, tokens, counts)
    if world is not None:
        world.sum(table)
    return [Score(total, int(n), bool(greedy)) for total, n, greedy in table.tolist()]


def _batch(gpt: GPT, tokens: Tensor, counts: Tensor) -> Tensor:
    """Scores (B, 3) float64 of the last ``counts`` (B,) targets of ``tokens`` (B, T + 1)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    T = inputs.shape[1]
    counted = torch.arange(T, device=tokens.device) >= T - counts[:, None]  # (B, T)
    hidden = gpt.hidden(inputs)[counted]  # (N, C): the head is computed where it is asked for
    likely, greedy = [], []
    for x, y in zip(hidden.split(HEAD_TOKENS), targets[counted].split(HEAD_TOKENS), strict=True):
        logits = gpt.head(x).float()  # (n, V)
        likely.append(logits.log_softmax(-1).gather(-1, y[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == y)
    whose = counted.nonzero()[:, 0]  # (N,): the row of each
    zeros = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    total = zeros.index_add(0, whose, torch.cat(likely).double())
    hits = zeros.index_add(0, whose, torch.cat(greedy).double())
    return torch.stack([total, counts.double(), (hits == counts).double()], dim=1)
