"""Time of a training step, from operations, bytes and bandwidths.

    step = forward and backward    tokens x FLOPs per token / (peak x MFU)
         + exposed all-reduce      2 (n - 1) / n x bytes of the gradients / bus bandwidth, less
                                   the part that overlaps with the backward pass
         + optimizer               bytes read and written / memory bandwidth

FLOPs per token are those of `model.size.flops_per_token`. The all-reduce is a ring, and bus
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
from train.plan.accelerators import MEMORY_EFFICIENCY, Accelerator, Link
from train.plan.memory import padded_parameter_count

# Bytes per parameter that one step moves. Norm and clipping: gradient read twice and written once.
# AdamW: gradient, weight and two moments read, the last three written. Zeroing: gradient written.
OPTIMIZER_BYTES = 12 + 28 + 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one optimizer step by part, in seconds."""

    compute: float  # forward and backward of all micro-steps
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
    optimizer: Literal["adamw", "muon"] = "adamw",
    checkpoint_activations: bool = False,
    overlap: bool = False,
) -> StepTime:
    """Return the time of one step of `batch_tokens` tokens over all devices.

    Muon adds matrix products, and every device computes all of them. With `checkpoint_activations`
    the blocks run forward a second time; with `overlap`, all-reduce and backward pass overlap.
    """
    parameters, world = padded_parameter_count(config), cluster.world
    flops = flops_per_token(config, config.block_size)
    if checkpoint_activations:
        head = 2 * config.padded_vocab_size * config.n_embd
        flops += flops_per_token(config, config.block_size, backward=False) - head
    speed = cluster.speed
    compute = batch_tokens / world * flops / speed
    bus = cluster.accelerator.bus_bandwidth(cluster.link, cluster.nodes, cluster.network)
    all_reduce = all_reduce_bytes(config, world) / bus
    exposed = all_reduce
    if overlap:
        backward = 2 / 3 * compute / micro_steps
        table = config.padded_vocab_size * config.n_embd / parameters
        exposed = max(all_reduce * table, all_reduce - backward)
    bandwidth = MEMORY_EFFICIENCY * cluster.accelerator.bandwidth
    update = OPTIMIZER_BYTES * parameters / bandwidth
    if optimizer == "muon":
        update += muon_flops(config) / speed
    return StepTime(compute=compute, all_reduce=all_reduce, exposed=exposed, optimizer=update)


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
