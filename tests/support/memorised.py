"""A small GPT-2 that has learnt a few texts by heart, so that it answers tasks for a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from model import GPT, GPTConfig
from pipeline.format import tokenizer

IGNORED = -100


def memorise(texts: Sequence[str], steps: int = 100, block_size: int = 64) -> GPT:
    """Train a model with GPT-2's tokenizer on texts, each cut to `block_size` tokens.

    For speed, the tokens of the texts are its vocabulary in training; the rows of all others are
    zero in the result.
    """
    rows = [tokenizer.encode(text)[: block_size + 1] for text in texts]
    used = sorted({token for row in rows for token in row})
    index = {token: i for i, token in enumerate(used)}
    data = torch.full((len(rows), block_size + 1), IGNORED)
    for i, row in enumerate(rows):
        data[i, : len(row)] = torch.tensor([index[token] for token in row])
    config = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=block_size)
    small = GPT(replace(config, vocab_size=len(used)), seed=1)
    optimizer = torch.optim.AdamW(small.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (32,), generator=generator)]
        loss = small(batch[:, :-1].clamp(min=0), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gpt = GPT(config)
    state = small.state_dict()
    table = torch.zeros_like(gpt.wte.weight)
    table[used] = state["wte.weight"][: len(used)]
    gpt.load_state_dict({**state, "wte.weight": table})
    return gpt
