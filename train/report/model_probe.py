"""A look inside a trained model: sizes of weights and activations, and what it expects next.

Sizes are root mean squares, which do not depend on the width: 0.02 is where a GPT-2 begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPT
from pipeline.format import tokenizer

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
STREAMS = ("residual", "attn", "mlp")


@dataclass(frozen=True)
class Token:
    """A token in its context.

    Attributes:
        text: What it stands for.
        probability: That the model gave it.
        likeliest: (text, probability) of the tokens that the model found likeliest there.
    """

    text: str
    probability: float
    likeliest: list[tuple[str, float]]


def rms(tensor: Tensor) -> float:
    """Root mean square of all elements."""
    return float(tensor.detach().float().square().mean().sqrt())


def weight_sizes(gpt: GPT) -> dict[str, list[float]]:
    """RMS of each of `MATRICES`, a value a layer."""
    weights = dict(gpt.named_parameters())
    layers = range(gpt.config.n_layer)
    return {name: [rms(weights[f"h.{i}.{name}.weight"]) for i in layers] for name in MATRICES}


@torch.no_grad()
def activation_sizes(gpt: GPT, tokens: np.ndarray) -> dict[str, list[float]]:
    """RMS over all tokens of what flows through the model, a value a layer.

    Args:
        gpt: The model, on the CPU.
        tokens: (B, T), some text.

    Returns:
        Of the residual stream after each block, and of what its attention and MLP add to it.
    """
    sizes: dict[str, list[float]] = {name: [] for name in STREAMS}

    def record(name: str) -> Any:
        return lambda module, inputs, output: sizes[name].append(rms(output))

    hooks = []
    for layer in range(gpt.config.n_layer):
        for name, place in (("residual", ""), ("attn", ".attn"), ("mlp", ".mlp")):
            module = gpt.get_submodule(f"h.{layer}{place}")
            hooks.append(module.register_forward_hook(record(name)))
    try:
        gpt.hidden(torch.from_numpy(tokens.astype(np.int64)))
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


@torch.no_grad()
def read_text(gpt: GPT, text: str, n: int = 8) -> tuple[list[Token], list[tuple[str, float]]]:
    """How a model reads a text, token by token.

    Args:
        gpt: The model, on the CPU.
        text: The beginning of a document; its first tokens are read where it is too long.
        n: How many of the likeliest tokens are named.

    Returns:
        The text's tokens; and what the model finds likeliest after them.
    """
    tokens = [tokenizer.EOT, *tokenizer.encode(text)][: gpt.config.block_size]
    probabilities = gpt(torch.tensor([tokens]))[0].float().softmax(-1)  # (T, V)
    likeliest = [top(row, n) for row in probabilities]
    read = [
        Token(shown(token), float(probabilities[i, token]), likeliest[i])
        for i, token in enumerate(tokens[1:])
    ]
    return read, likeliest[-1]


def top(probabilities: Tensor, n: int) -> list[tuple[str, float]]:
    """The ``n`` likeliest tokens of (V,) probabilities, as text, with theirs."""
    values, tokens = probabilities.topk(n)
    return [(shown(t), p) for t, p in zip(tokens.tolist(), values.tolist(), strict=True)]


def shown(token: int) -> str:
    """A token as text; a part of a character as U+FFFD."""
    return "<|endoftext|>" if token == tokenizer.EOT else tokenizer.decode([token])
