"""The initial weights, in one function.

    weights of linear maps and both embeddings   N(0, 0.02²)
    maps that end in the residual stream         N(0, (0.02 / sqrt(2 L))²)   attn.c_proj, mlp.c_proj
    biases                                       0
    LayerNorm                                    1 (weight), 0 (bias)
    padded rows of the token table               0

0.02 and the factor for the 2 L additions to the residual stream are those of Radford et al. 2019,
section 2.3, and of OpenAI's code (which has 0.01 for positions; this project follows the later
habit of one number). Padded rows never receive a gradient and are in no softmax: zero is a choice,
nothing depends on it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from model.config import GPTConfig

if TYPE_CHECKING:
    from torch.nn import Module

STD = 0.02


def initial_std(name: str, n_layer: int) -> float:
    """Standard deviation of the weight called `name`, 0 for those that are constant."""
    if name.endswith("bias") or ".ln_" in name or name.startswith("ln_"):
        return 0.0
    return STD / (2 * n_layer) ** 0.5 if name.endswith("c_proj.weight") else STD


def stable_seed(seed: int, name: str) -> int:
    """63 bits that depend on both, the same in every process (Python's own `hash` is not)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def initialise(gpt: Module, config: GPTConfig, seed: int) -> None:
    """Gives every parameter its initial value, in place.

    Each is drawn on the CPU, in float32, by a generator of its own, seeded from (seed, name): so
    the same on every device, on any number of ranks, in any order of building. One parameter is on
    the CPU at a time.
    """
    for name, parameter in gpt.named_parameters():
        std = initial_std(name, config.n_layer)
        if std == 0:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        generator = torch.Generator("cpu").manual_seed(stable_seed(seed, name))
        rows = config.vocab_size if name == "wte.weight" else parameter.shape[0]
        drawn = torch.empty(rows, *parameter.shape[1:], dtype=torch.float32, device="cpu")
        parameter[:rows] = drawn.normal_(0.0, std, generator=generator)
        parameter[rows:] = 0.0
