"""Sampling: from the logits of the next token to text that goes on.

A row's window holds at most `block_size` tokens. When it overflows, its last `block_size // 2`
tokens are kept and their keys computed anew: positions are learned and absolute, so a cache cannot
simply slide. Each row of a batch has its own window, cache length and random numbers: what it gets
does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from model.attention import KVCache
from model.config import EOT, GPTConfig
from model.errors import ConfigError
from model.init import stable_seed

Prompts = TypeVar("Prompts", Tensor, list[list[int]])
"""A (B, T) int64 tensor, or rows of any lengths."""


class LanguageModel(Protocol):
    """What sampling needs of a model; `model.gpt.GPT` has it."""

    config: GPTConfig

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of tokens (B, T) int64; ``cache`` holds earlier tokens."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        ...

    def parameters(self) -> Iterator[Tensor]:
        """The weights."""
        ...


def generate(
    gpt: LanguageModel,
    tokens: Prompts,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = EOT,
) -> Prompts:
    """See `GPT.generate`."""
    rows: list[list[int]] = [list(row) for row in _prompts(tokens)]
    for news in stream(gpt, rows, max_new_tokens, temperature, top_k, top_p, seed, stop):
        for row, new in zip(rows, news, strict=True):
            if new is not None:
                row.append(new)
    if not isinstance(tokens, Tensor):
        return rows
    longest = max(map(len, rows))
    # a row is shorter than another only because it ended with `stop`
    filled = [row + row[-1:] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=tokens.device)


def stream(
    gpt: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = EOT,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[list[int | None]]:
    """Continues prompts of any lengths, step by step; the arguments are those of `GPT.generate`.

    Args:
        watch: Shown the logits of each step, (B, V) float32 on the CPU, before a token is chosen.

    Yields:
        For each step the new token of each row, None for a row that has ended.

    Raises:
        ConfigError: An argument out of range, an empty prompt, or a token that is not in the
            vocabulary.
    """
    _check(gpt, prompts, max_new_tokens, temperature, top_k, top_p)
    return _steps(gpt, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, watch)


def _steps(
    gpt: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: int | None,
    watch: Callable[[Tensor], None] | None,
) -> Iterator[list[int | None]]:
    generators = [_generator(seed, row) for row in range(len(prompts))]
    windows = Windows(gpt, prompts)
    ended = [False] * len(prompts)
    news: list[int | None] = []
    for step in range(max_new_tokens):
        if step:
            # an ended row goes on with any token: nobody reads it
            windows.append([new or 0 for new in news])
        if watch is not None:
            watch(windows.logits)
        news = [
            None if end else choose(logits, temperature, top_k, top_p, generator)
            for end, logits, generator in zip(ended, windows.logits, generators, strict=True)
        ]
        yield news
        ended = [end or new == stop for end, new in zip(ended, news, strict=True)]
        if all(ended):
            return


class Windows:
    """The tokens that each row sees, with the KV cache that belongs to them.

    Args:
        gpt: The model; its device is used.
        prompts: A row each, none empty.

    Attributes:
        logits: Of the next token of each row, (B, V) float32. They are on the CPU: choosing there
            gives the same on every device.
    """

    def __init__(self, gpt: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.gpt = gpt
        self.device = next(iter(gpt.parameters())).device
        self.rows = [_cut(list(prompt), gpt.config.block_size) for prompt in prompts]
        self.cache = KVCache(gpt.config, len(prompts), self.device)
        self.logits = self._run(self.cache, self.rows)

    def append(self, news: Sequence[int]) -> None:
        """Adds a token to each row."""
        for row, new in zip(self.rows, news, strict=True):
            row.append(new)
        block_size = self.gpt.config.block_size
        full = [i for i, row in enumerate(self.rows) if len(row) > block_size]
        if not full:
            self.logits = self._run(self.cache, [row[-1:] for row in self.rows])
            return
        # rows that overflow begin a new cache; the others take their one step
        others = [i for i in range(len(self.rows)) if i not in full]
        logits = torch.empty_like(self.logits)
        for i in full:
            self.rows[i] = _cut(self.rows[i], block_size)
        fresh = KVCache(self.gpt.config, len(full), self.device)
        logits[full] = self._run(fresh, [self.rows[i] for i in full])
        if others:
            part = self.cache.take(others)
            logits[others] = self._run(part, [self.rows[i][-1:] for i in others])
            self.cache.replace(others, part)
        self.cache.replace(full, fresh)
        self.logits = logits

    @torch.no_grad()
    def _run(self, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
        """Runs more tokens, any number a row; returns the logits after the last of each row."""
        counts = [len(row) for row in rows]
        filled = [list(row) + [0] * (max(counts) - len(row)) for row in rows]
        hidden = self.gpt.hidden(torch.tensor(filled, device=self.device), cache=cache)  # (B, T, C)
        cache.lengths = [a + b for a, b in zip(cache.lengths, counts, strict=True)]
        last = hidden[torch.arange(len(rows)), torch.tensor(counts) - 1]  # (B, C)
        return self.gpt.head(last).float().cpu()  # (B, V): the head for one token a row


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """Draws the next token.

    Args:
        logits: (V,) float32 on the CPU.
        temperature: 0 takes the likeliest (the first of equals).
        top_k: Keep the k likeliest.
        top_p: Then keep the fewest likeliest whose probabilities reach p (Holtzman et al. 2020).
        generator: Source of randomness, on the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    # subtracting the maximum first: a tiny temperature must not overflow
    scaled = (logits - logits.max()) / temperature
    tokens = torch.arange(len(scaled))
    if top_k is not None:
        scaled, tokens = scaled.topk(min(top_k, len(scaled)))  # descending
    elif top_p is not None:
        scaled, tokens = scaled.sort(descending=True, stable=True)
    probabilities = scaled.softmax(0)
    if top_p is not None:
        likelier = probabilities.cumsum(0) - probabilities  # probability of all that are likelier
        probabilities = probabilities * (likelier < top_p)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _prompts(tokens: Tensor | list[list[int]]) -> list[list[int]]:
    if not isinstance(tokens, Tensor):
        return tokens
    if tokens.ndim != 2:
        raise ConfigError(f"tokens must be (B, T), not {tuple(tokens.shape)}")
    rows: list[list[int]] = tokens.tolist()
    return rows


def _cut(window: list[int], block_size: int) -> list[int]:
    return window if len(window) <= block_size else window[-max(1, block_size // 2) :]


def _generator(seed: int | None, row: int) -> torch.Generator:
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(stable_seed(seed, f"row {row}"))
    return generator


def _check(
    gpt: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 (greedy) or positive, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be over 0 and at most 1, not {top_p}")
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty: begin with at least one token, such as 50256")
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < gpt.config.vocab_size:
            raise ConfigError(f"a prompt holds a token outside 0..{gpt.config.vocab_size - 1}")
