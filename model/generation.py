"""Sampling with a KV cache: from the logits of the next token to continued text.

A row's window holds at most `block_size` tokens: of a longer prompt the last ones. When it
overflows, the last `block_size // 2` tokens are kept and their keys and values computed again:
these depend on absolute positions and on the dropped tokens, so the cache cannot slide. Every row
of a batch has its own window, cache length and random numbers, and so does not depend on the other
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from model.attention import KVCache
from model.config import EOT, GPTConfig, check_temperature
from model.errors import ConfigError, FormatError
from model.init import stable_seed

Prompts = TypeVar("Prompts", Tensor, list[list[int]])
"""A (B, T) int64 tensor, or rows of any lengths."""


class LanguageModel(Protocol):
    """The methods of `GPT` that sampling uses."""

    config: GPTConfig

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Return hidden states (B, T, C) of tokens (B, T) int64 that follow those in `cache`."""

    def head(self, x: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., C)."""

    def parameters(self) -> Iterator[Tensor]:
        """Return the weights, all on one device."""


def generate(
    model: LanguageModel,
    tokens: Prompts,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = EOT,
) -> Prompts:
    """Extend prompts by sampling; see `GPT.generate`."""
    rows: list[list[int]] = [list(row) for row in _as_rows(tokens)]
    for new_tokens in stream(model, rows, max_new_tokens, temperature, top_k, top_p, seed, stop):
        for row, new in zip(rows, new_tokens, strict=True):
            if new is not None:
                row.append(new)
    if not isinstance(tokens, Tensor):
        return rows
    longest = max(map(len, rows))
    # a row is shorter only if it ended with `stop`: repeat that
    filled = [row + row[-1:] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=tokens.device)


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = EOT,
    on_logits: Callable[[Tensor], None] | None = None,
) -> Iterator[list[int | None]]:
    """Extend prompts of any lengths step by step; for the other arguments see `GPT.generate`.

    Args:
        on_logits: Called before each draw with the logits (B, V), float32, on the CPU.

    Returns:
        An iterator over steps: the new token of each row, None for rows that have ended.

    Raises:
        ConfigError: An argument out of range, an empty prompt, or a token outside the vocabulary.
        FormatError: The logits are not finite; raised by the iterator.
    """
    _check_arguments(model, prompts, max_new_tokens, temperature, top_k, top_p)

    def steps() -> Iterator[list[int | None]]:
        generators = [_generator(seed, row) for row in range(len(prompts))]
        windows = Windows(model, prompts)
        ended = [False] * len(prompts)
        new_tokens: list[int | None] = []
        for step in range(max_new_tokens):
            if step:
                # rows that have ended get any token: it is never returned
                windows.append([new or 0 for new in new_tokens])
            if on_logits is not None:
                on_logits(windows.logits)
            new_tokens = [
                None if end else sample(logits, temperature, top_k, top_p, generator)
                for end, logits, generator in zip(ended, windows.logits, generators, strict=True)
            ]
            yield new_tokens
            ended = [end or new == stop for end, new in zip(ended, new_tokens, strict=True)]
            if all(ended):
                return

    return steps()


class Windows:
    """The context window of each row, and the KV cache of these windows.

    Attributes:
        logits: Logits of each row's next token, (B, V) float32, on the CPU so that sampling gives
            the same tokens on every device.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.device = next(iter(model.parameters())).device
        self.rows = [list(prompt[-model.config.block_size :]) for prompt in prompts]
        self.cache = KVCache(model.config, len(prompts), self.device)
        self.logits = self._run(self.cache, self.rows)

    def append(self, tokens: Sequence[int]) -> None:
        """Add a token to each row, and compute the logits of the next."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        block_size = self.model.config.block_size
        full = [i for i, row in enumerate(self.rows) if len(row) > block_size]
        if not full:
            self.logits = self._run(self.cache, [row[-1:] for row in self.rows])
            return
        # rows that overflow start a new cache; the others advance by one token
        others = [i for i in range(len(self.rows)) if i not in full]
        logits = torch.empty_like(self.logits)
        for i in full:
            self.rows[i] = self.rows[i][-max(1, block_size // 2) :]
        fresh = KVCache(self.model.config, len(full), self.device)
        logits[full] = self._run(fresh, [self.rows[i] for i in full])
        if others:
            part = self.cache.select(others)
            logits[others] = self._run(part, [self.rows[i][-1:] for i in others])
            self.cache.replace(others, part)
        self.cache.replace(full, fresh)
        self.logits = logits

    @torch.no_grad()
    def _run(self, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
        """Run new tokens, any number per row; return the logits after the last of each row."""
        counts = [len(row) for row in rows]
        padded = [list(row) + [0] * (max(counts) - len(row)) for row in rows]
        hidden = self.model.hidden(torch.tensor(padded, device=self.device), cache=cache)
        cache.lengths = [a + b for a, b in zip(cache.lengths, counts, strict=True)]
        last = hidden[torch.arange(len(rows)), torch.tensor(counts) - 1]  # (B, T, C) -> (B, C)
        logits = self.model.head(last).float().cpu()  # (B, V)
        if not logits.isfinite().all():
            raise FormatError(
                "the logits are non-finite (NaN or Inf): the weights are too large, use others"
            )
        return logits


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """Draw the next token.

    Args:
        logits: (V,) float32 on the CPU.
        temperature: 0 takes the most likely token (the first if several are equal).
        top_k: Keep the k most likely tokens.
        top_p: Then keep the smallest set of most likely tokens with total probability p or more
            (Holtzman et al. 2020).
        generator: On the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    # subtract the maximum first: division by a tiny temperature must not overflow
    scaled = (logits - logits.max()) / temperature
    tokens = torch.arange(len(scaled))
    if top_k is not None:
        scaled, tokens = scaled.topk(min(top_k, len(scaled)))  # descending
    elif top_p is not None:
        scaled, tokens = scaled.sort(descending=True, stable=True)
    probabilities = scaled.softmax(0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities  # total of all more likely tokens
        kept = before < top_p
        kept[0] = True  # also if float32 rounds p to 0
        probabilities = probabilities * kept
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _as_rows(tokens: Tensor | list[list[int]]) -> list[list[int]]:
    if not isinstance(tokens, Tensor):
        return tokens
    if tokens.ndim != 2:
        raise ConfigError(f"tokens must be (B, T), not {tuple(tokens.shape)}")
    rows: list[list[int]] = tokens.tolist()
    return rows


def _generator(seed: int | None, row: int) -> torch.Generator:
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(stable_seed(seed, f"row {row}"))
    return generator


def _check_arguments(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    check_temperature(temperature)
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not prompts or not all(prompts):
        raise ConfigError("a prompt is empty: start it with at least one token, such as 50256")
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ConfigError(
                f"a prompt has a token outside the vocabulary, 0 to {model.config.vocab_size - 1}"
            )
