"""Statistics of a trained model: size of weights and activations, and token probabilities.

Sizes are root mean squares (RMS), which do not depend on the width: GPT-2's weights start at 0.02.
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
    """Token of a text, with the prediction of the model for its position."""

    text: str  # text of the token
    probability: float  # probability of the token
    likeliest: list[tuple[str, float]]  # (text, probability) of the most likely tokens here


def rms(tensor: Tensor) -> float:
    """Return the root mean square of all elements."""
    return float(tensor.detach().float().square().mean().sqrt())


def weight_rms(gpt: GPT) -> dict[str, list[float]]:
    """Return the RMS of each of `MATRICES`, one value per layer."""
    weights = dict(gpt.named_parameters())
    layers = range(gpt.config.n_layer)
    return {name: [rms(weights[f"h.{i}.{name}.weight"]) for i in layers] for name in MATRICES}


@torch.no_grad()
def activation_rms(gpt: GPT, tokens: np.ndarray) -> dict[str, list[float]]:
    """Return the RMS of activations over tokens (B, T), one value per layer; on the CPU.

    They are the residual stream after each block, and what attention and MLP add to it.
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
def predict_text(gpt: GPT, text: str, n: int = 8) -> tuple[list[Token], list[tuple[str, float]]]:
    """Predict every token of a document's beginning, cut to the context; on the CPU.

    Returns:
        The tokens of the text, and the ``n`` most likely tokens after them.
    """
    tokens = [tokenizer.EOT, *tokenizer.encode(text)][: gpt.config.block_size]
    probabilities = gpt(torch.tensor([tokens]))[0].float().softmax(-1)  # (T, V)
    likeliest = [top_tokens(row, n) for row in probabilities]
    predicted = [
        Token(token_text(token), float(probabilities[i, token]), likeliest[i])
        for i, token in enumerate(tokens[1:])
    ]
    return predicted, likeliest[-1]


def top_tokens(probabilities: Tensor, n: int) -> list[tuple[str, float]]:
    """Return (text, probability) of the ``n`` most likely tokens of (V,) probabilities."""
    values, tokens = probabilities.topk(n)
    return [(token_text(t), p) for t, p in zip(tokens.tolist(), values.tolist(), strict=True)]


def token_text(token: int) -> str:
    """Return a token as text; part of a character becomes U+FFFD."""
    return "<|endoftext|>" if token == tokenizer.EOT else tokenizer.decode([token])
