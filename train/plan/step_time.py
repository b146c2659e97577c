"""Time of a training step on given hardware, from operations, bytes and bandwidths.

    step = forward and backward         tokens x FLOPs a token / (peak x MFU)
         + what of the all-reduce shows 2 (n - 1) / n x bytes of the gradients / bus bandwidth
         + the optimizer                bytes of its state, read and written / memory's bandwidth

FLOPs a token are those of `model.size.flops_per_token`. The all-reduce is a ring's, as nccl-tests
defines bus bandwidth (doc/PERFORMANCE.md). DDP starts it when the gradients of a bucket are ready,
in the last micro-step. Of a model that is compiled as one graph all are ready only at its end, and
nothing is hidden; with `overlap` it hides behind the backward pass, but for the last bucket: the
table, which is also the head, gets its last gradient from the embedding, at the very end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model import GPTConfig
from model.size import flops_per_token
from train.plan.accelerators import MEMORY_SHARE, Accelerator, Link
from train.plan.memory import padded_parameters

# Bytes a parameter that one step moves. Norm and clipping: the gradient is read twice and written
# once; AdamW: gradient, weight and two moments read, the last three written; zeroing: written.
OPTIMIZER_BYTES = 12 + 28 + 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: Forward and backward of all micro-steps.
        all_reduce: Summing the gradients over all devices.
        exposed: What of that the backward pass does not hide.
        optimizer: Clipping, optimizer, zeroing.
    """

    compute: float
    all_reduce: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        """All that passes."""
        return self.compute + self.exposed + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The hardware of a run.

    Attributes:
        accelerator: One of its devices.
        nodes: How many nodes.
        gpus: Devices of each; on a CPU, processes.
        link: Between those of a node.
        network: Between nodes, bits a second of each; None: as usual.
        peak: Of one device for matrix products, FLOP/s; of the CPU, for all processes.
        mfu: Part of it that forward and backward reach.
    """

    accelerator: Accelerator
    nodes: int
    gpus: int
    link: Link
    network: float | None
    peak: float
    mfu: float

    @property
    def world(self) -> int:
        """Devices in all."""
        return self.nodes * self.gpus

    @property
    def sharers(self) -> int:
        """Processes that share one device: those of a CPU."""
        return self.gpus if self.accelerator.cuda is None else 1

    @property
    def speed(self) -> float:
        """What a process computes, FLOP/s."""
        return self.peak * self.mfu / self.sharers

    @property
    def memory(self) -> float:
        """Bytes that a process has."""
        return self.accelerator.memory / self.sharers


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
    """Seconds of one step.

    Args:
        config: The model; its `block_size` is T.
        cluster: Where it is trained.
        batch_tokens: Of a step, over all devices.
        micro_steps: Micro-batches of each device.
        optimizer: Muon computes as well, on each device all of it.
        checkpoint_activations: Whether the blocks are computed forward a second time.
        overlap: Whether gradients are sent during the backward pass.
    """
    parameters, world = padded_parameters(config), cluster.world
    flops = flops_per_token(config, config.block_size)
    if checkpoint_activations:
        head = 2 * config.padded_vocab_size * config.n_embd
        flops += flops_per_token(config, config.block_size, backward=False) - head
    speed = cluster.speed
    compute = batch_tokens / world * flops / speed
    bus = cluster.accelerator.bus(cluster.link, cluster.nodes, cluster.network)
    all_reduce = all_reduce_bytes(config, world) / bus
    exposed = all_reduce
    if overlap:
        backward = 2 / 3 * compute / micro_steps
        table = config.padded_vocab_size * config.n_embd / parameters
        exposed = max(all_reduce * table, all_reduce - backward)
    bandwidth = MEMORY_SHARE * cluster.accelerator.bandwidth
    update = OPTIMIZER_BYTES * parameters / bandwidth
    if optimizer == "muon":
        update += muon_flops(config) / speed
    return StepTime(compute=compute, all_reduce=all_reduce, exposed=exposed, optimizer=update)


def all_reduce_bytes(config: GPTConfig, world: int) -> float:
    """Bytes that a device sends in a ring all-reduce of the float32 gradients, and receives."""
    return 2 * (world - 1) / world * 4 * padded_parameters(config)


def muon_flops(config: GPTConfig) -> int:
    """Operations of Muon's five Newton-Schulz iterations over all matrices of the blocks.

    One of an m x n matrix, m the smaller: X X^T (2 m m n), its square (2 m m m), and the product
    with X (2 m m n). A block has four square matrices, and two of C x 4 C.
    """
    C = config.n_embd
    square, wide = (2 * C * C * (2 * n + C) for n in (C, 4 * C))
    return config.n_layer * 5 * (4 * square + 2 * wide)
