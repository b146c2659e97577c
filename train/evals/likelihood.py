"""Likelihood of a continuation given its context: all benchmarks here are computed from it.

As in EleutherAI's lm-evaluation-harness, a request that is too long for the model loses its first
tokens, and no token is put before the context. If its continuation alone is too long, the harness
refuses it; here its last tokens are scored, and a warning says how many requests are concerned.

Batches hold requests of equal length: without padding, a score does not depend on the rest of its
batch. Batch size and number of processes change only the last bits of a float32 product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT
from pipeline.format import tokenizer
from train.distributed.world import World
from train.numerics import Dtype, autocast

BATCH_TOKENS = 8192  # per batch, if no batch size is given
HEAD_TOKENS = 1024  # logits held at a time: 206 MB for GPT-2's vocabulary


class Request(NamedTuple):
    """Token ids of a context and of a continuation to score, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def from_text(cls, context: str, continuation: str) -> Request:
        """Encode text as the harness does.

        Spaces at the end of the context move to the continuation. Context and continuation are
        encoded together; the tokens after as many as the context has alone are the continuation.
        """
        before = tokenizer.encode(context.rstrip())
        both = tokenizer.encode(context + continuation)
        return cls(tuple(before), tuple(both[len(before) :]))

    def window(self, block_size: int) -> tuple[tuple[int, ...], int]:
        """Return the last tokens, as many as the model can use, and how many targets count."""
        tokens = (*self.context, *self.continuation)[-(block_size + 1) :]
        return tokens, min(len(self.continuation), len(tokens) - 1)


class Score(NamedTuple):
    """Score of a continuation.

    Attributes:
        log_likelihood: Sum over its tokens, in nats.
        tokens: Number of tokens scored.
        greedy: Whether every token is the most likely one.
    """

    log_likelihood: float
    tokens: int
    greedy: bool


def batches(lengths: Sequence[int], batch_size: int | None) -> Iterator[list[int]]:
    """Group request indices into batches of equal length, the longest first.

    Args:
        lengths: Inputs of each request, in tokens.
        batch_size: Most requests per batch; None: about `BATCH_TOKENS` tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for length, group in groupby(order, key=lambda i: lengths[i]):
        same = list(group)
        size = batch_size or max(1, BATCH_TOKENS // length)
        yield from (same[first : first + size] for first in range(0, len(same), size))


@torch.no_grad()
def score_requests(
    gpt: GPT,
    requests: Sequence[Request],
    world: World | None = None,
    batch_size: int | None = None,
    *,
    dtype: Dtype = "float32",
    check: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Score requests; returns the same list on every rank, in the order of the requests.

    Args:
        gpt: The model, used on its own device.
        world: Processes that share the work, if there are several.
        batch_size: Requests per batch; None chooses.
        dtype: Of the matrix products; published scores use float32.
        check: Called before each batch, equally often on each rank; may be a collective.
    """
    device = gpt.wte.weight.device
    windows = [request.window(gpt.config.block_size) for request in requests]
    # (request, 3): log-likelihood, tokens, greedy; zero for requests of other ranks
    table = torch.zeros((len(requests), 3), dtype=torch.float64, device=device)
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    if rank == 0:
        _warn_of_cut_continuations(requests, gpt.config.block_size)
    plan = list(batches([len(tokens) - 1 for tokens, _ in windows], batch_size))
    for first in range(0, len(plan), ranks):
        check()
        own = first + rank
        for batch in plan[own : own + 1]:  # empty for some ranks in the last round
            tokens = torch.tensor([windows[i][0] for i in batch], device=device)  # (B, T + 1)
            counts = torch.tensor([windows[i][1] for i in batch], device=device)  # (B,)
            with autocast(device, dtype):
                table[batch] = _score_batch(gpt, tokens, counts)
    if world is not None:
        world.sum(table)
    return [Score(total, int(n), bool(greedy)) for total, n, greedy in table.tolist()]


def _warn_of_cut_continuations(requests: Sequence[Request], block_size: int) -> None:
    cut = sum(len(request.continuation) > block_size for request in requests)
    if cut:
        print(
            f"warning: {cut} of {len(requests)} continuations are longer than the model's context "
            f"of {block_size} tokens: only their last tokens are scored, so the results cannot be "
            "compared with those of other models",
            file=sys.stderr,
            flush=True,
        )


def _score_batch(gpt: GPT, tokens: Tensor, counts: Tensor) -> Tensor:
    """Score the last ``counts`` (B,) targets of ``tokens`` (B, T + 1): (B, 3) float64."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    T = inputs.shape[1]
    counted = torch.arange(T, device=tokens.device) >= T - counts[:, None]  # (B, T)
    hidden = gpt.hidden(inputs)[counted]  # (N, C), the positions that need logits
    log_p, greedy = [], []
    for x, y in zip(hidden.split(HEAD_TOKENS), targets[counted].split(HEAD_TOKENS), strict=True):
        logits = gpt.head(x).float()  # (n, V)
        log_p.append(logits.log_softmax(-1).gather(-1, y[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == y)
    row = counted.nonzero()[:, 0]  # (N,) batch row of each position
    zeros = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    total = zeros.index_add(0, row, torch.cat(log_p).double())
    hits = zeros.index_add(0, row, torch.cat(greedy).double())
    return torch.stack([total, counts.double(), (hits == counts).double()], dim=1)
