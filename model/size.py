"""Names, shapes and number of the parameters of a model, and FLOPs per token."""

from __future__ import annotations

from collections.abc import Iterator

from model.config import GPTConfig


def block_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a block's parameters by name, in the order of `GPT.state_dict()`."""
    C = config.n_embd
    return {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }


def parameter_shapes(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of all parameters, in the order of `GPT.state_dict()`.

    Nothing is allocated, so a config with a billion layers costs no more than what is read.
    """
    C = config.n_embd
    yield "wte.weight", (config.padded_vocab_size, C)
    if config.positions == "learned":
        yield "wpe.weight", (config.block_size, C)
    block = block_shapes(config)
    for layer in range(config.n_layer):
        for name, shape in block.items():
            yield f"h.{layer}.{name}", shape
    yield "ln_f.weight", (C,)
    yield "ln_f.bias", (C,)


def parameter_count(config: GPTConfig, embeddings: bool = True) -> int:
    """Return the number of parameters as published: no padded rows, the tied head counted once.

    Args:
        config: The model; 124,439,808 for `gpt2`.
        embeddings: False leaves out the token and position tables (85,056,000 for `gpt2`).
    """
    C = config.n_embd
    layer_norm = 2 * C
    attention = (C + 1) * 3 * C + (C + 1) * C
    mlp = (C + 1) * 4 * C + (4 * C + 1) * C
    count = config.n_layer * (2 * layer_norm + attention + mlp) + layer_norm
    if embeddings:
        positions = config.block_size if config.positions == "learned" else 0
        count += (config.vocab_size + positions) * C
    return count


def flops_per_token(config: GPTConfig, T: int, backward: bool = True) -> int:
    """Return the FLOPs of the matrix products for one token in a sequence of T tokens.

    This equals the count of `torch.utils.flop_counter` on a model with explicit attention: the full
    T x T square (a causal kernel computes about half) and all padded rows of the head, which are
    multiplied. Recomputation by activation checkpointing is not included. The estimate of PaLM
    (appendix B), 6 N + 12 L C T with N the parameters without positions, is close.

    Args:
        config: The model.
        T: Tokens per sequence.
        backward: Forward and backward pass; False counts the forward pass only, a third.
    """
    C = config.n_embd
    linear = 2 * (3 + 1 + 4 + 4) * C * C  # c_attn, c_proj, c_fc, c_proj; 2 FLOPs per weight
    attention = 2 * 2 * T * C  # Q Kᵀ and the weighted sum of values, over all heads
    head = 2 * config.padded_vocab_size * C
    forward = config.n_layer * (linear + attention) + head
    return 3 * forward if backward else forward
