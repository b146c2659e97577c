"""Plan of a run: memory, time, price and disk of some parameters on some hardware.

Nothing is run. The formulas are in `memory` and `step_time`, the hardware in `accelerators`, the
sizes of known sources in `corpus_size`. This module combines them and warns of problems.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from model import GPTConfig
from model.size import flops_per_token, parameter_count
from pipeline.runtime.errors import UserError
from train.data.mixed_order import mixture_of
from train.data.split import divisors, share_batch
from train.params import TrainParams
from train.plan.accelerators import Accelerator, Link, accelerator
from train.plan.corpus_size import Corpus, total
from train.plan.fit import choose, usable_memory
from train.plan.memory import (
    CUDA_RESERVE,
    FRAGMENTATION,
    Memory,
    loss_chunks,
    padded_parameter_count,
    training_memory,
)
from train.plan.step_time import (
    LEAF_BYTES,
    Cluster,
    StepTime,
    all_reduce_bytes,
    step_time,
    traffic,
)
from train.preset import Parameters
from train.summation import most_nodes, nodes_of

# Beyond these, repeated text teaches little (Muennighoff et al. 2023).
MANY_EPOCHS = 4
# HellaSwag during training: 10,042 tasks of four rows of about 100 tokens; not compiled, and in
# batches of mixed lengths, so at half the MFU. Both are assumptions.
HELLASWAG_TOKENS, HELLASWAG_MFU = 4_000_000, 0.5
# Exposed all-reduce above this fraction of a step causes a warning.
SLOW_LINK = 0.1
# So do leaves (`train.invariant`) that make a step longer by more than this fraction.
DEAR_LEAVES = 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hardware and machine settings of a plan: everything that params.yaml does not hold."""

    hardware: str = "a100-80"  # name of the accelerator
    nodes: int = 1  # number of nodes
    gpus: int = 8  # GPUs per node; on a CPU, processes per node
    interconnect: Link | None = None  # link within a node; None: the fastest that the hardware has
    network: float | None = None  # bandwidth between nodes, Gbit/s per node; None: the usual one
    peak: float | None = None  # FLOP/s of a GPU, or of a node's CPU; None: known, or timed here
    mfu: float | None = None  # of forward and backward; None: as in `accelerators`
    rate: float | None = None  # dollars per GPU-hour; None: typical, as in `accelerators`
    micro_batch: int | None = None  # sequences per micro-batch; None: as training chooses
    checkpoint_activations: bool = False  # the setting of machine.yaml
    overlap: bool = False  # the setting of machine.yaml
    loss_chunk: int | None = None  # the setting of machine.yaml


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of a run; in bytes, seconds, tokens, FLOPs and dollars.

    "Step" is a step of the full batch: with `train.batch_doublings`, the first ones are smaller.
    """

    options: Options  # hardware and machine settings
    parameters: int  # parameter count, as published
    flops_per_token: int  # forward and backward (`model.size.flops_per_token`)
    peak: float  # FLOP/s of one device
    mfu: float  # MFU of forward and backward
    mfu_source: str  # source of that MFU
    world: int  # number of processes
    micro_batch: int  # sequences per micro-batch
    micro_steps: int  # micro-steps per step
    loss_chunk: int  # tokens whose logits are in memory at a time
    loss_chunks: int  # chunks of the loss per micro-step
    largest_micro_batch: int  # largest that fits and divides the batch; 0: not even one fits
    memory: Memory  # memory of one process at `micro_batch`
    available: float  # memory that one process has
    step: StepTime  # time of a step
    step_mfu: float  # MFU of a step, as training and train.bench report it
    tokens_per_second: float  # tokens per second of one device
    all_reduce_bytes: float  # bytes that one device sends per step
    steps: int  # optimizer steps
    tokens: int  # tokens of all steps
    epochs: float | None  # passes over the training split; None: size unknown, or a mixture
    source_epochs: dict[str, float | None]  # the same of each source in `train.mixture`
    source_shares: dict[str, float]  # share of the samples of each source in `train.mixture`
    training_seconds: float  # time of all steps
    evaluation_seconds: float  # time of validations and HellaSwag between the steps
    rate: float | None  # dollars per GPU-hour; None if unknown
    rate_source: str  # source of that rate, and its date
    dollars: float | None  # price; None if unknown
    corpus: Corpus | None  # estimated output of the data stages; None if unknown
    checkpoint_bytes: int  # size of one checkpoint: weights and optimizer
    disk_bytes: float  # size of text, shards and checkpoints
    warnings: tuple[str, ...]  # problems, each with its fix

    @property
    def fits(self) -> bool:
        """Whether the run fits in the memory of a process."""
        return self.memory.total <= self.available

    @property
    def seconds(self) -> float:
        """Time of the train stage."""
        return self.training_seconds + self.evaluation_seconds

    def as_json(self) -> dict[str, Any]:
        """Return all fields and derived values, ready for JSON."""
        return {
            **asdict(self),
            "fits": self.fits,
            "seconds": self.seconds,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "step": {**asdict(self.step), "total": self.step.total},
        }


def make_plan(params: Parameters, options: Options) -> Plan:
    """Return the plan of some parameters on some hardware.

    Raises:
        UserError: The hardware is unknown, or its processes cannot share the batch.
    """
    device = accelerator(options.hardware)
    params = replace(params, train=params.train.resolved(device.native_dtype))
    config, train = params.model.config(), params.train
    dtype = train.matmul_dtype()
    cluster = _cluster(device, config, train, options)
    batches = train.batches(config.block_size)
    kind = "cpu" if device.gpu_name is None else "cuda"
    gpu_memory = device.memory if device.gpu_name else None
    split, chunk = choose(params.model, train, options, cluster.world, gpu_memory)
    usual = split
    if batches.smallest % cluster.world == 0:  # else only leaves can be shared
        free = train.model_copy(update={"invariant": None})
        usual = share_batch(params.model, free, cluster.world, None, kind)
    sized = replace(config, loss_chunk=chunk)
    micro_steps, nodes, waiting, leaf_bytes = split.micro_steps(batches.full), 1, 0, 0
    if train.invariant:
        leaf_bytes = LEAF_BYTES * padded_parameter_count(config)
        leaves = [split.micro_batches(batches.full, rank) for rank in range(cluster.world)]
        nodes = max(len(nodes_of(part)) for part in leaves)
        waiting = max(most_nodes(part) for part in leaves) - 1
    chunks = loss_chunks(sized, split.micro_batch, dtype)

    def memory(micro_batch: int) -> Memory:
        return training_memory(
            sized,
            micro_batch,
            dtype,
            optimizer=train.optimizer,
            checkpoint_activations=options.checkpoint_activations,
            reserve=CUDA_RESERVE if device.gpu_name else 0,
            partial_sums=waiting,
        )

    available = cluster.memory * (1 - FRAGMENTATION)
    if gpu_memory is not None:
        available = usable_memory(gpu_memory)
    fitting = [
        n for n in divisors(batches.smallest // cluster.world) if memory(n).total <= available
    ]
    step = step_time(
        config,
        cluster,
        train.batch_tokens,
        micro_steps,
        extra_bytes=micro_steps * (traffic(sized, split.micro_batch, dtype) + leaf_bytes)
        - usual.micro_steps(batches.full) * traffic(config, usual.micro_batch, dtype),
        optimizer=train.optimizer,
        checkpoint_activations=options.checkpoint_activations,
        overlap=options.overlap and not train.invariant,
        nodes=nodes,
    )
    validations = 2 if len(params.sources) > 1 else 1  # of all, and source by source
    training, evaluation = _train_seconds(train, config, cluster, step, validations)
    tokens = batches(train.steps)[0] * config.block_size
    flops = flops_per_token(config, config.block_size)
    speed = train.batch_tokens / cluster.world / step.total
    corpora = {name: Corpus.estimate(s, params.tokenize) for name, s in params.sources.items()}
    corpus, shares, source_epochs = total(corpora.values()), {}, {}
    if train.mixture is not None:
        samples = batches(train.steps)[0]
        counts = mixture_of(train, [*corpora], config.block_size).counts(samples)
        for (name, part), count in zip(corpora.items(), counts, strict=True):
            seen = count * config.block_size
            shares[name] = count / samples
            source_epochs[name] = seen / part.train_tokens if part else None
    checkpoint = 4 * parameter_count(config) + memory(1).optimizer
    kept = (train.kept() + 1) * checkpoint  # the next is written before the oldest is deleted
    hours = (training + evaluation) / 3600
    rate = device.price if options.rate is None else options.rate
    plan = Plan(
        options=options,
        parameters=parameter_count(config),
        flops_per_token=flops,
        peak=cluster.peak,
        mfu=cluster.mfu,
        mfu_source="--mfu" if options.mfu else device.mfu_source,
        world=cluster.world,
        micro_batch=split.micro_batch,
        micro_steps=micro_steps,
        loss_chunk=chunks.size,
        loss_chunks=len(chunks.slices()),
        largest_micro_batch=max(fitting, default=0),
        memory=memory(split.micro_batch),
        available=available,
        step=step,
        step_mfu=speed * flops * cluster.mfu / cluster.speed,
        tokens_per_second=speed,
        all_reduce_bytes=all_reduce_bytes(config, cluster.world),
        steps=train.steps,
        tokens=tokens,
        epochs=tokens / corpus.train_tokens if corpus and not shares else None,
        source_epochs=source_epochs,
        source_shares=shares,
        training_seconds=training,
        evaluation_seconds=evaluation,
        rate=rate,
        rate_source=device.price_source if options.rate is None else "--rate",
        dollars=None if rate is None else rate * cluster.world * hours,
        corpus=corpus,
        checkpoint_bytes=checkpoint,
        disk_bytes=kept + (corpus.raw_bytes + corpus.token_bytes if corpus else 0),
        warnings=(),
    )
    return replace(plan, warnings=tuple(_warnings(plan, params)))


def _cluster(
    device: Accelerator, config: GPTConfig, train: TrainParams, options: Options
) -> Cluster:
    return Cluster(
        accelerator=device,
        nodes=options.nodes,
        gpus=options.gpus,
        link=device.link(options.interconnect),
        network=options.network * 1e9 if options.network else None,
        peak=options.peak or device.peak(train.matmul_dtype()),
        mfu=options.mfu or device.assumed_mfu(parameter_count(config)),
    )


def _train_seconds(
    train: TrainParams, config: GPTConfig, cluster: Cluster, step: StepTime, validations: int
) -> tuple[float, float]:
    """Return the time of all steps, and of the validations and HellaSwag between them."""
    # The smaller batches of a ramp take as long per token; all-reduce and optimizer as long per
    # step.
    schedule = train.batches(config.block_size)
    batches = schedule(train.steps)[0] / schedule.full
    training = batches * step.compute + train.steps * (step.exposed + step.optimizer)
    tokens: float = validations * train.val_tokens * math.ceil(train.steps / train.val_every)
    if train.hellaswag_every:
        times = math.ceil(train.steps / train.hellaswag_every)
        tokens += times * HELLASWAG_TOKENS / HELLASWAG_MFU
    forward = flops_per_token(config, config.block_size, backward=False)
    return training, tokens * forward / (cluster.speed * cluster.world)


def _price_of_leaves(plan: Plan, params: Parameters) -> float:
    """Return the fraction that `train.invariant` adds to a step; 0 where it is null.

    Also 0 where the processes can share leaves, but not the batch without them.
    """
    if not params.train.invariant:
        return 0.0
    free = replace(params, train=params.train.model_copy(update={"invariant": None}))
    try:
        options = replace(plan.options, peak=plan.peak)  # of a CPU it is measured
        return plan.step.total / make_plan(free, options).step.total - 1
    except UserError:
        return 0.0


def _warnings(plan: Plan, params: Parameters) -> list[str]:
    """List the problems of a plan, each with its fix."""
    options, train, found = plan.options, params.train, []
    most = plan.largest_micro_batch
    if not most:
        more = "fewer processes (--gpus)" if options.hardware == "cpu" else "more memory"
        fixes = [more, "a smaller model or model.block_size"]
        if not options.checkpoint_activations:
            fixes.insert(0, "checkpoint_activations: true (--checkpoint-activations)")
        found.append(f"not even one sequence fits in memory; use {', or '.join(fixes)}")
    elif not plan.fits:
        key = f"micro_batch: {most} in machine.yaml (GPT2_MICRO_BATCH={most})"
        if train.invariant:
            key = f"train.invariant: {most}"
        found.append(
            f"micro-batches of {plan.micro_batch} do not fit in memory; set {key}, the largest "
            "that fits and divides the batch"
        )
    if plan.step.exposed > SLOW_LINK * plan.step.total:
        part = plan.step.exposed / plan.step.total
        overlap = "" if options.overlap else "set overlap: true in machine.yaml (--overlap), "
        found.append(
            f"sending gradients takes {part:.0%} of a step; {overlap}use a faster network, or "
            "raise train.batch_tokens"
        )
    if (price := _price_of_leaves(plan, params)) > DEAR_LEAVES:
        found.append(
            f"train.invariant: leaves of {plan.micro_batch} sequences make a step {price:.0%} "
            "longer (computed, from the bytes that are moved); set more"
        )
    if plan.epochs is not None and plan.epochs > MANY_EPOCHS:
        found.append(
            f"train.steps: {plan.epochs:.1f} epochs, and text repeated more than {MANY_EPOCHS} "
            "times teaches little; lower train.steps, or use more text"
        )
    for name, epochs in plan.source_epochs.items():
        if epochs is not None and epochs > MANY_EPOCHS:
            found.append(
                f"train.mixture: {epochs:.1f} epochs of source {name}, and text repeated more than "
                f"{MANY_EPOCHS} times teaches little; lower its weight, or take more of it"
            )
    if plan.corpus and plan.corpus.val_tokens < max(train.val_tokens, params.evaluate.val_tokens):
        found.append(
            f"the validation split will have about {plan.corpus.val_tokens:,.0f} tokens, fewer "
            "than val_tokens of train or evaluate; raise tokenize.val_per_10k"
        )
    native = accelerator(options.hardware).native_dtype
    if options.hardware != "cpu" and train.dtype == "float32":
        found.append(f"train.dtype: {native} is at least twice as fast as float32 on this hardware")
    if native == "float16" and train.dtype == "bfloat16":
        found.append("train.dtype: bfloat16 is only emulated on this hardware; use auto")
    return found
