"""Memory that a training process needs, by component, computed from the shapes alone.

    B sequences of T tokens per micro-batch, N = B T tokens; L layers, C channels, H heads;
    P rows of the token table, padding included

With AdamW, 16 bytes per parameter stay allocated from step to step: weights, gradients and two
moments, all float32. DDP adds no second copy of the gradients: with `gradient_as_bucket_view` they
are views of its buckets. Activations are counted tensor by tensor, as the eager modules save them
for the backward pass (Korthikanti et al. 2022, section 4.1, does the same for another model). Bytes
per block:

    saved by                              bfloat16    float32
    ln_1, ln_2      input                    8 N C      8 N C    the residual stream is float32
                    mean and 1/deviation      16 N       16 N
    c_attn, c_fc    input                    4 N C      8 N C
    attention       queries, keys, values    6 N C     12 N C
                    output                   2 N C      4 N C    c_proj saves the same tensor
                    logsumexp                4 N H      4 N H    FlashAttention and the CPU kernel
    gelu            input                    8 N C     16 N C
    mlp.c_proj      input                    8 N C     16 N C

The sum is 36 N C in bfloat16 and 64 N C in float32, plus the small terms. Under autocast, one
bfloat16 copy of the blocks' weights is kept as well. `torch.compile` should save less, because it
recomputes what is cheap, so these figures are an upper bound for it. Options of `model` that GPT-2
does not have add:

    rotary, qk_norm queries and keys         4 N C      8 N C    next to those that c_attn wrote
    qk_norm         input in float32         8 N C          -    float32 keeps no copy
                    1 / root mean square      8 N H      8 N H
    rotary          cosines and sines        4 T C / H, once for all blocks

tests/train/plan/test_memory.py compares them with what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from model import GPTConfig
from model.loss import Chunks
from model.size import parameter_count
from train.numerics import Dtype

CUDA_RESERVE = 2 * 2**30
"""Bytes for the CUDA context, cuBLAS workspaces and NCCL buffers: an assumption."""

FRAGMENTATION = 0.05
"""Fraction of a GPU's memory that the allocator loses to fragmentation: an assumption."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of a training process by component, in bytes."""

    weights: int  # parameters in float32, with the padding rows of the token table
    gradients: int  # gradients of all parameters, in DDP's buckets
    optimizer: int  # AdamW's two moments, and Muon's single one
    copies: int  # the blocks' weights in bfloat16, made by autocast
    activations: int  # tensors that autograd keeps from the forward pass up to the loss
    work: int  # temporary tensors at the peak: head and loss, or the gradients of a block
    reserve: int  # memory that CUDA and its libraries take; 0 on a CPU

    @property
    def total(self) -> int:
        """Sum of all components."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(
    config: GPTConfig,
    micro_batch: int,
    dtype: Dtype,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpoint_activations: bool = False,
    reserve: int = 0,
    partial_sums: int = 0,
) -> Memory:
    """Return the memory that a process needs to train on windows of `block_size` tokens.

    Muon keeps one moment per matrix element instead of two. `reserve` bytes are taken before the
    first tensor is allocated. `partial_sums` are the gradients of `train.invariant` that wait in
    the tree of `summation.py`, in addition to the one that is computed.
    """
    parameters = padded_parameter_count(config)
    matrices = 12 * config.n_layer * config.n_embd**2
    moments = 2 * parameters - (matrices if optimizer == "muon" else 0)
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters * (1 + partial_sums),
        optimizer=4 * moments,
        copies=autocast_copies(config, dtype),
        activations=activations(config, micro_batch, dtype, checkpoint_activations),
        work=working_memory(config, micro_batch, dtype, checkpoint_activations),
        reserve=reserve,
    )


def padded_parameter_count(config: GPTConfig) -> int:
    """Count the parameters that are allocated and sent by DDP, padding rows included."""
    return parameter_count(config) + (config.padded_vocab_size - config.vocab_size) * config.n_embd


def loss_chunks(config: GPTConfig, micro_batch: int, dtype: Dtype) -> Chunks:
    """Return the split of a micro-batch into the chunks of the loss (`model/loss.py`)."""
    tokens, torch_dtype = micro_batch * config.block_size, getattr(torch, dtype)
    return Chunks.choose(tokens, config.n_embd, config.vocab_size, config.loss_chunk, torch_dtype)


def saved_for_backward(
    config: GPTConfig, micro_batch: int, dtype: Dtype, checkpoint_activations: bool = False
) -> int:
    """Return the bytes that autograd holds between forward and backward, parameters excluded.

    This is what `torch.autograd.graph.saved_tensors_hooks` sees, each storage counted once.
    """
    tokens, C = micro_batch * config.block_size, config.n_embd
    kept = activations(config, micro_batch, dtype, checkpoint_activations)
    copies = 0 if checkpoint_activations else autocast_copies(config, dtype)
    # The loss computes its gradients in the forward pass (model/loss.py) and keeps them.
    return kept + copies + 4 * tokens * C + 4 * config.padded_vocab_size * C


def autocast_copies(config: GPTConfig, dtype: Dtype) -> int:
    """Return the bytes of the blocks' weights in bfloat16: 3 + 1 + 4 + 4 square matrices each."""
    return 2 * 12 * config.n_layer * config.n_embd**2 if dtype != "float32" else 0


def activations(
    config: GPTConfig, micro_batch: int, dtype: Dtype, checkpoint_activations: bool = False
) -> int:
    """Return the bytes that autograd keeps from the embeddings to the head, without `copies`."""
    T, C = config.block_size, config.n_embd
    tokens = micro_batch * T
    block = 4 * tokens * C if checkpoint_activations else _block(config, micro_batch, dtype)
    rotary = config.positions == "rotary"
    positions = 4 * T * C // config.n_head if rotary else 8 * T  # cosines and sines, or int64
    last_norm = 4 * tokens * C + 8 * tokens
    return config.n_layer * block + 8 * tokens + positions + last_norm


def _block(config: GPTConfig, micro_batch: int, dtype: Dtype) -> int:
    tokens = micro_batch * config.block_size
    narrow = dtype != "float32"
    per_channel, per_head = (36 if narrow else 64), 4
    if config.positions == "rotary" or config.qk_norm:
        per_channel += 4 if narrow else 8
    if config.qk_norm:
        per_channel, per_head = per_channel + (8 if narrow else 0), per_head + 8
    return tokens * (per_channel * config.n_embd + 16 + per_head * config.n_head)


def working_memory(
    config: GPTConfig, micro_batch: int, dtype: Dtype, checkpoint_activations: bool = False
) -> int:
    """Return the bytes of temporary tensors at the highest of three moments.

    1. The loss computes a chunk of R tokens. It holds their logits in float32 and the gradient of
       the logits in the products' type; the token table in that type; the table's gradient from
       this chunk, from the previous one, and the sum so far; hidden states and their gradients.
    2. The backward pass begins. It holds both gradients of the loss, and both scaled.
    3. The last block runs backward. The table's gradient is still waiting, and the gradients of the
       MLP are computed next to its activations, which are recomputed first if checkpointed.
    """
    C, P = config.n_embd, config.padded_vocab_size
    tokens = micro_batch * config.block_size
    width = 2 if dtype != "float32" else 4
    R = loss_chunks(config, micro_batch, dtype).size
    narrow = width * P * (R + C) if dtype != "float32" else 0  # gradient of logits; table
    in_loss = 4 * P * R + narrow + P * C * (4 + 2 * width) + 2 * 4 * tokens * C
    begin = 2 * (4 * P * C + 4 * tokens * C)
    in_last_block = 4 * P * C + tokens * C * 5 * width
    if checkpoint_activations:  # the input of the block is counted in `activations`
        in_last_block += _block(config, micro_batch, dtype) - 4 * tokens * C
    return max(in_loss, begin, in_last_block)
