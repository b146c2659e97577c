"""Memory that a process needs to train, by part, from the shapes alone.

    B sequences of T tokens at a time, N = B T; L layers, C channels, H heads; P rows of the table

What stays from step to step is 16 bytes a parameter with AdamW: weights, gradients and two moments
in float32. DDP adds no second copy of the gradients: with `gradient_as_bucket_view` they lie in its
buckets. What autograd keeps for the backward pass is counted tensor by tensor, as the eager modules
save it (Korthikanti et al. 2022, section 4.1, count another model so). A block, in bytes:

    saved by                              bfloat16    float32
    ln_1, ln_2      input                    8 N C      8 N C    the residual stream is float32
                    mean and 1/deviation      16 N       16 N
    c_attn, c_fc    input                    4 N C      8 N C
    attention       queries, keys, values    6 N C     12 N C
                    output                   2 N C      4 N C    c_proj saves the same tensor
                    log of the sums          4 N H      4 N H    as FlashAttention; the CPU's, too
    gelu            input                    8 N C     16 N C
    mlp.c_proj      input                    8 N C     16 N C

that is 36 N C, or 64 N C in float32, and the little rest. Under autocast the weights of the blocks
are kept in bfloat16 besides, once for all. `torch.compile` should save less, for it computes what
is cheap twice: this is its upper bound. tests/train/test_memory.py holds it against what autograd
really saves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from model import GPTConfig
from model.loss import Cut
from model.size import parameter_count

Dtype = Literal["float32", "bfloat16"]

CUDA_RESERVE = 2 * 2**30
"""Bytes of CUDA's context, cuBLAS's workspaces and NCCL's buffers: an assumption."""

FRAGMENTS = 0.05
"""Part of a GPU's memory that the allocator cannot give in one piece: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a process needs at its highest, by part.

    Attributes:
        weights: Parameters, float32, the padded rows of the table with them.
        gradients: Of all parameters, float32, in DDP's buckets.
        optimizer: AdamW's two moments; of Muon's matrices one.
        copies: The blocks' weights in bfloat16, made by autocast.
        activations: What autograd keeps of the forward pass, up to the loss.
        work: What is at work at the highest moment: head and loss, or a block's gradients.
        reserve: What CUDA and its libraries take; 0 on a CPU.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    work: int
    reserve: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: GPTConfig,
    micro_batch: int,
    dtype: Dtype,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpoint_activations: bool = False,
    reserve: int = 0,
) -> Memory:
    """What a process needs to train with micro-batches of full windows.

    Args:
        config: The model; its `block_size` is T.
        micro_batch: Sequences at a time (B).
        dtype: Of the matrix products.
        optimizer: Muon keeps one number of a matrix's element instead of two.
        checkpoint_activations: As of machine.yaml.
        reserve: Bytes that are gone before the first tensor.
    """
    parameters = padded_parameters(config)
    matrices = 12 * config.n_layer * config.n_embd**2
    moments = 2 * parameters - (matrices if optimizer == "muon" else 0)
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=4 * moments,
        copies=weight_copies(config, dtype),
        activations=activations(config, micro_batch, dtype, checkpoint_activations),
        work=work_peak(config, micro_batch, dtype, checkpoint_activations),
        reserve=reserve,
    )


def padded_parameters(config: GPTConfig) -> int:
    """Parameters with the rows that pad the table: what is allocated, and what DDP sends."""
    return parameter_count(config) + (config.padded_vocab_size - config.vocab_size) * config.n_embd


def saved(
    config: GPTConfig, micro_batch: int, dtype: Dtype, checkpoint_activations: bool = False
) -> int:
    """Bytes that autograd holds between forward and backward, parameters left out.

    It is what `torch.autograd.graph.saved_tensors_hooks` sees, each storage counted once.
    """
    tokens, C = micro_batch * config.block_size, config.n_embd
    kept = activations(config, micro_batch, dtype, checkpoint_activations)
    copies = 0 if checkpoint_activations else weight_copies(config, dtype)
    # The loss forms its gradients in the forward pass (model/loss.py), and keeps them.
    return kept + copies + 4 * tokens * C + 4 * config.padded_vocab_size * C


def weight_copies(config: GPTConfig, dtype: Dtype) -> int:
    """Bytes of the blocks' weights in bfloat16: the 3 + 1 + 4 + 4 square matrices of each."""
    return 2 * 12 * config.n_layer * config.n_embd**2 if dtype == "bfloat16" else 0


def activations(
    config: GPTConfig, micro_batch: int, dtype: Dtype, checkpoint_activations: bool = False
) -> int:
    """Bytes that autograd keeps from the embeddings to the head, without the weights' copies."""
    T, C = config.block_size, config.n_embd
    tokens = micro_batch * T
    block = 4 * tokens * C if checkpoint_activations else _block(config, micro_batch, dtype)
    ids = 8 * tokens + 8 * T  # tokens and positions, int64
    last_norm = 4 * tokens * C + 8 * tokens
    return config.n_layer * block + ids + last_norm


def _block(config: GPTConfig, micro_batch: int, dtype: Dtype) -> int:
    tokens = micro_batch * config.block_size
    per_channel = 36 if dtype == "bfloat16" else 64
    return tokens * (per_channel * config.n_embd + 16 + 4 * config.n_head)


def work_peak(
    config: GPTConfig, micro_batch: int, dtype: Dtype, checkpoint_activations: bool = False
) -> int:
    """Bytes beyond weights and activations, at the highest of three moments.

    Either a chunk of R tokens is in the loss: its logits in float32, and their gradient in the type
    of the products; the table in that type, and its gradient, of this chunk, of the one before, and
    of all so far; the hidden states and their gradients. Or the backward pass begins: both
    gradients and what it makes of them. Or it is in the last block: the table's gradient waits to
    be added, and an MLP's gradients are formed beside the activations that they are formed from;
    these, too, where they were not kept.
    """
    C, P = config.n_embd, config.padded_vocab_size
    tokens = micro_batch * config.block_size
    width = 2 if dtype == "bfloat16" else 4
    cut = Cut.of(tokens, C, config.vocab_size, config.loss_chunk, getattr(torch, dtype))
    narrow = width * P * (cut.chunk + C) if dtype == "bfloat16" else 0  # gradient of logits; table
    in_the_loss = 4 * P * cut.chunk + narrow + P * C * (4 + 2 * width) + 2 * 4 * tokens * C
    begin = 2 * (4 * P * C + 4 * tokens * C)
    in_the_last_block = 4 * P * C + tokens * C * 5 * width
    if checkpoint_activations:  # its input is counted already
        in_the_last_block += _block(config, micro_batch, dtype) - 4 * tokens * C
    return max(in_the_loss, begin, in_the_last_block)
