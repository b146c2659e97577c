"""How big a model is, and what a token costs."""

from __future__ import annotations

from model.config import GPTConfig


def parameter_count(config: GPTConfig, embeddings: bool = True) -> int:
    """Number of parameters, as published: without the padded rows, the tied head counted once.

    Args:
        config: The model; 124,439,808 for `gpt2`.
        embeddings: False leaves out the token and position tables (85,056,000 are left).
    """
    C = config.n_embd
    layer_norm = 2 * C
    attention = (C + 1) * 3 * C + (C + 1) * C
    mlp = (C + 1) * 4 * C + (4 * C + 1) * C
    count = config.n_layer * (2 * layer_norm + attention + mlp) + layer_norm
    if embeddings:
        count += (config.vocab_size + config.block_size) * C
    return count


def flops_per_token(config: GPTConfig, T: int, backward: bool = True) -> int:
    """Floating-point operations of the matrix products for a token in a sequence of T tokens.

    It equals what `torch.utils.flop_counter` counts on the real module with explicit attention: the
    full T x T square (a causal kernel does about half of it) and all padded rows of the head, which
    really are multiplied; not what activation checkpointing computes twice. Near "6 N + 12 L C T"
    (PaLM, appendix B) with N the parameters without positions.

    Args:
        config: The model.
        T: Tokens of a sequence.
        backward: Training (forward and backward); false for forward alone, a third of it.
    """
    C = config.n_embd
    linear = 2 * (3 + 1 + 4 + 4) * C * C  # c_attn, c_proj, c_fc, c_proj: two operations a weight
    attention = 2 * 2 * T * C  # Q Kᵀ and the weighted values, over all heads
    head = 2 * config.padded_vocab_size * C
    forward = config.n_layer * (linear + attention) + head
    return 3 * forward if backward else forward
