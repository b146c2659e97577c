"""Initial weights.

    weights of linear maps and both embeddings   N(0, 0.02²)
    maps that end in the residual stream         N(0, (0.02 / sqrt(2 L))²)   attn.c_proj, mlp.c_proj
    biases                                       0
    LayerNorm                                    1 (weight), 0 (bias)
    padded rows of the token table               0

With `GPTConfig.zero_init`, maps that end in the residual stream start at 0, so that each block
begins as the identity (Zhang et al. 2019, "Fixup", section 3).

0.02 and the factor for the 2 L additions to the residual stream are from Radford et al. 2019,
section 2.3, and OpenAI's code (which uses 0.01 for positions; later code, and this project, use
0.02 throughout). Padded rows receive no gradient and are in no softmax, so their value is free.
"""

from __future__ import annotations

import hashlib

import torch
from torch.nn import Module

from model.config import GPTConfig

STD = 0.02


def initial_std(name: str, n_layer: int) -> float:
    """Return the standard deviation of the parameter `name`; 0 if it starts constant."""
    if name.endswith("bias") or ".ln_" in name or name.startswith("ln_"):
        return 0.0
    return STD / (2 * n_layer) ** 0.5 if name.endswith("c_proj.weight") else STD


def stable_seed(seed: int, name: str) -> int:
    """Hash both to 63 bits, equal in every process (unlike Python's `hash`)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def initialise(gpt: Module, config: GPTConfig, seed: int) -> None:
    """Set every parameter to its initial value, in place.

    Each parameter is drawn on the CPU in float32, by a generator of its own, seeded from (seed,
    name). The values are the same on every device, for any number of ranks, and in any order of
    construction. Only one drawn parameter is in host memory at a time.
    """
    for name, parameter in gpt.named_parameters():
        if config.zero_init and name.endswith("c_proj.weight"):
            parameter.zero_()
            continue
        std = initial_std(name, config.n_layer)
        if std == 0:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        generator = torch.Generator("cpu").manual_seed(stable_seed(seed, name))
        rows = config.vocab_size if name == "wte.weight" else parameter.shape[0]
        drawn = torch.empty(rows, *parameter.shape[1:], dtype=torch.float32, device="cpu")
        parameter[:rows] = drawn.normal_(0.0, std, generator=generator)
        parameter[rows:] = 0.0
