"""Time of a training step, from operations, bytes and bandwidths.

    step = forward and backward    tokens x FLOPs per token / (peak x MFU)
         + memory traffic          bytes that the micro-steps move / memory bandwidth, less those at
                                   the default micro-batch and loss chunk, to which MFU applies
         + exposed all-reduce      2 (n - 1) / n x bytes of the gradients / bus bandwidth, less
                                   the part that overlaps with the backward pass
         + optimizer               bytes read and written / memory bandwidth; with Muon, the ranks'
                                   share of its products, and an all-gather of the updates

FLOPs per token are those of `model.size.flops_per_token`. A micro-step moves bytes (`traffic`) that
do not depend on its tokens, so larger micro-batches and loss chunks take less time; that kernels
are also less efficient on few tokens is not modelled. The all-reduce is a ring, and bus
bandwidth is as nccl-tests defines it (doc/PERFORMANCE.md). DDP reduces a bucket as soon as its
gradients are ready, in the last micro-step. A model compiled as one graph has no gradient ready
before the end, so nothing overlaps. With `overlap`, everything overlaps but the last bucket: the
token table is also the head, and gets its last gradient from the embedding, at the very end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model import GPTConfig
from model.size import flops_per_token
from train.numerics import Dtype
from train.plan.accelerators import MEMORY_EFFICIENCY, Accelerator, Link
from train.plan.memory import loss_chunks, padded_parameter_count

# Bytes per parameter that one step moves. Norm and clipping: gradient read twice and written once.
# AdamW: gradient, weight and two moments read, the last three written. Zeroing: gradient written.
OPTIMIZER_BYTES = 12 + 28 + 4
# Bytes per parameter that a leaf of `train.invariant` adds to a micro-step: its gradient is zeroed,
# and added to its sibling (two numbers read, one written).
LEAF_BYTES = 4 + 12


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one optimizer step by part, in seconds."""

    compute: float  # forward and backward of all micro-steps
    traffic: float  # part of `compute` due to micro-batch and loss chunk; below 0 if larger ones
    all_reduce: float  # sum of the gradients over all devices
    exposed: float  # part of the all-reduce that does not overlap with the backward pass
    optimizer: float  # clipping, update and zeroing

    @property
    def total(self) -> float:
        """Time of the step."""
        return self.compute + self.exposed + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hardware of a run."""

    accelerator: Accelerator  # type of the devices
    nodes: int  # number of nodes
    gpus: int  # devices per node; on a CPU, processes per node
    link: Link  # link between the devices of a node
    network: float | None  # bandwidth between nodes, bits per second; None: the usual one
    peak: float  # FLOP/s of one device in matrix products; a CPU's is shared by its processes
    mfu: float  # fraction of the peak that forward and backward reach

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.nodes * self.gpus

    @property
    def processes_per_device(self) -> int:
        """Number of processes that share a device: 1 on a GPU, all of a node on a CPU."""
        return self.gpus if self.accelerator.gpu_name is None else 1

    @property
    def speed(self) -> float:
        """FLOP/s that a process reaches."""
        return self.peak * self.mfu / self.processes_per_device

    @property
    def memory(self) -> float:
        """Memory of a process, bytes."""
        return self.accelerator.memory / self.processes_per_device


def step_time(
    config: GPTConfig,
    cluster: Cluster,
    batch_tokens: int,
    micro_steps: int,
    *,
    extra_bytes: float = 0,
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpoint_activations: bool = False,
    overlap: bool = False,
    nodes: int = 1,
) -> StepTime:
    """Return the time of one step of `batch_tokens` tokens over all devices.

    `extra_bytes` is the traffic of all micro-steps beyond that at the default settings.
    Muon adds matrix products, which the devices share evenly. With `checkpoint_activations` the
    blocks run forward a second time; with `overlap`, all-reduce and backward pass overlap. With
    `train.invariant`, a device sends ``nodes`` partial sums and gathers one sum: as much as an
    all-reduce if there is one.
    """
    parameters, world = padded_parameter_count(config), cluster.world
    flops = flops_per_token(config, config.block_size)
    if checkpoint_activations:
        head = 2 * config.padded_vocab_size * config.n_embd
        flops += flops_per_token(config, config.block_size, backward=False) - head
    speed = cluster.speed
    bandwidth = MEMORY_EFFICIENCY * cluster.accelerator.bandwidth
    moved = extra_bytes / bandwidth
    compute = batch_tokens / world * flops / speed + moved
    bus = cluster.accelerator.bus_bandwidth(cluster.link, cluster.nodes, cluster.network)
    all_reduce = all_reduce_bytes(config, world) * (1 + nodes) / 2 / bus
    exposed = all_reduce
    if overlap:
        backward = 2 / 3 * compute / micro_steps
        table = config.padded_vocab_size * config.n_embd / parameters
        exposed = max(all_reduce * table, all_reduce - backward)
    update = OPTIMIZER_BYTES * parameters / bandwidth
    if optimizer == "muon":
        gathered = (world - 1) / world * 2 * 12 * config.n_layer * config.n_embd**2  # bfloat16
        update += muon_flops(config) / world / speed + gathered / bus
    return StepTime(
        compute=compute,
        traffic=moved,
        all_reduce=all_reduce,
        exposed=exposed,
        optimizer=update,
    )


def traffic(config: GPTConfig, micro_batch: int, dtype: Dtype) -> int:
    """Return the bytes that a micro-step moves whatever its number of tokens.

    Each gradient is added to the sum (two numbers read, one written, float32), under autocast after
    two casts: of the weight, and of the gradient (6 bytes each). Each chunk of the loss writes its
    gradient of the token table, reads it, and adds it to a sum in float32.
    """
    width = 2 if dtype != "float32" else 4
    per_parameter = 12 + (12 if dtype != "float32" else 0)
    table = config.padded_vocab_size * config.n_embd
    chunks = len(loss_chunks(config, micro_batch, dtype).slices())
    return per_parameter * padded_parameter_count(config) + chunks * (2 * width + 8) * table


def all_reduce_bytes(config: GPTConfig, world: int) -> float:
    """Return the bytes that a device sends (and receives) in a ring all-reduce of the gradients."""
    return 2 * (world - 1) / world * 4 * padded_parameter_count(config)


def muon_flops(config: GPTConfig) -> int:
    """Return the operations of Muon's five Newton-Schulz iterations over all matrices.

    One iteration on an m x n matrix X, m <= n, computes X X^T (2 m m n), its square (2 m m m), and
    the product with X (2 m m n). A block has four square matrices and two of C x 4 C.
    """
    C = config.n_embd
    square, wide = (2 * C * C * (2 * n + C) for n in (C, 4 * C))
    return config.n_layer * 5 * (4 * square + 2 * wide)
