"""The plan of a run: what parameters come to on hardware that is named, nothing being run.

Formulas and their sources stand in memory.py and cost.py, hardware in accelerators.py, the sizes of
texts in corpus.py; here they are put together, and what does not fit is said.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from model import GPTConfig
from model.size import flops_per_token, parameter_count
from train.data.split import divisors, share_batch
from train.params import TrainParams
from train.plan.accelerators import Accelerator, Link, accelerator
from train.plan.corpus_size import Corpus
from train.plan.memory import CUDA_RESERVE, FRAGMENTS, Memory, training_memory
from train.plan.step_time import Cluster, StepTime, all_reduce_bytes, step_time
from train.preset import Parameters

MANY_EPOCHS = 4  # beyond these a text seen again teaches little (Muennighoff et al. 2023)
# HellaSwag as it is asked during training: 10,042 tasks of four rows, about 100 tokens each, by the
# plain module and in batches of all lengths: half the MFU. Assumptions, both.
HELLASWAG_TOKENS, HELLASWAG_MFU = 4_000_000, 0.5
SLOW_LINK = 0.1  # part of a step that the links may take without a word


@dataclass(frozen=True, kw_only=True)
class Options:
    """What no parameter says.

    Attributes:
        hardware: Name of the accelerator.
        nodes: How many.
        gpus: Of each node; on a CPU, processes.
        interconnect: Within a node; None: the best that there is.
        network: Between nodes, Gbit/s of each; None: as usual.
        peak: Of one GPU, or of a node's CPU, FLOP/s; None: what is known, or timed here.
        mfu: Part of the peak that forward and backward reach; None: train/plan/accelerators.py's.
        rate: Dollars for an hour of one GPU; None: not known.
        micro_batch: Sequences at a time; None: as training chooses.
        checkpoint_activations: As of machine.yaml.
        overlap: As of machine.yaml.
        loss_chunk: As of machine.yaml.
    """

    hardware: str = "a100-80"
    nodes: int = 1
    gpus: int = 8
    interconnect: Link | None = None
    network: float | None = None
    peak: float | None = None
    mfu: float | None = None
    rate: float | None = None
    micro_batch: int | None = None
    checkpoint_activations: bool = False
    overlap: bool = False
    loss_chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What comes of parameters on hardware; in bytes, seconds, tokens, FLOPs, dollars.

    Attributes:
        options: What was asked.
        parameters: Of the model, as published.
        flops_per_token: Forward and backward (`model.size.flops_per_token`).
        peak: Of one device, FLOP/s.
        mfu: That is assumed of forward and backward.
        mfu_source: Where it is from.
        world: Processes.
        micro_batch: Sequences at a time.
        micro_steps: Of a step of the whole batch.
        largest_micro_batch: That fits and divides; 0: not even one sequence fits.
        memory: Of one process, by part, at `micro_batch`.
        available: What it has.
        step: Seconds of a step of the whole batch.
        step_mfu: MFU of all of such a step, as training and train.bench show it.
        tokens_per_second: Of one device, in such steps.
        all_reduce_bytes: That one device sends a step.
        steps: Optimizer steps.
        tokens: Of all steps.
        epochs: Passes over the training split; None where its size is not known.
        training_seconds: Of all steps.
        evaluation_seconds: Of validations, and HellaSwag, between them.
        dollars: None without a rate.
        corpus: What the data stages make; None where that is not known.
        checkpoint_bytes: Of one: weights and optimizer.
        disk_bytes: Text, shards and checkpoints together.
        warnings: What is wrong, and what to do about it.
    """

    options: Options
    parameters: int
    flops_per_token: int
    peak: float
    mfu: float
    mfu_source: str
    world: int
    micro_batch: int
    micro_steps: int
    largest_micro_batch: int
    memory: Memory
    available: float
    step: StepTime
    step_mfu: float
    tokens_per_second: float
    all_reduce_bytes: float
    steps: int
    tokens: int
    epochs: float | None
    training_seconds: float
    evaluation_seconds: float
    dollars: float | None
    corpus: Corpus | None
    checkpoint_bytes: int
    disk_bytes: float
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a process has the memory that it needs."""
        return self.memory.total <= self.available

    @property
    def seconds(self) -> float:
        """Of the train stage."""
        return self.training_seconds + self.evaluation_seconds

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            **asdict(self),
            "fits": self.fits,
            "seconds": self.seconds,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "step": {**asdict(self.step), "total": self.step.total},
        }


def make_plan(params: Parameters, options: Options) -> Plan:
    """Computes the plan of some parameters on some hardware.

    Raises:
        UserError: The batch cannot be shared so, or the hardware is unknown.
    """
    config, train = replace(params.model.config(), loss_chunk=options.loss_chunk), params.train
    device = accelerator(options.hardware)
    cluster = _cluster(device, train, options)
    batches = train.batches(config.block_size)
    kind = "cpu" if device.cuda is None else "cuda"
    split = share_batch(params.model, train, cluster.world, options.micro_batch, kind)
    micro_steps = split.micro_steps(batches.full)

    def memory(micro_batch: int) -> Memory:
        return training_memory(
            config,
            micro_batch,
            train.dtype,
            optimizer=train.optimizer,
            checkpoint_activations=options.checkpoint_activations,
            reserve=CUDA_RESERVE if device.cuda else 0,
        )

    available = cluster.memory * (1 - FRAGMENTS)
    fitting = [
        n for n in divisors(batches.smallest // cluster.world) if memory(n).total <= available
    ]
    step = step_time(
        config,
        cluster,
        train.batch_tokens,
        micro_steps,
        optimizer=train.optimizer,
        checkpoint_activations=options.checkpoint_activations,
        overlap=options.overlap,
    )
    training, evaluation = _seconds(train, config, cluster, step)
    tokens = batches(train.steps)[0] * config.block_size
    flops = flops_per_token(config, config.block_size)
    speed = train.batch_tokens / cluster.world / step.total
    corpus = Corpus.of(params.source, params.tokenize)
    checkpoint = 4 * parameter_count(config) + memory(1).optimizer
    kept = (train.kept() + 1) * checkpoint  # the next one is written before the oldest goes
    hours = (training + evaluation) / 3600
    plan = Plan(
        options=options,
        parameters=parameter_count(config),
        flops_per_token=flops,
        peak=cluster.peak,
        mfu=cluster.mfu,
        mfu_source="given" if options.mfu else device.mfu_source,
        world=cluster.world,
        micro_batch=split.micro_batch,
        micro_steps=micro_steps,
        largest_micro_batch=max(fitting, default=0),
        memory=memory(split.micro_batch),
        available=available,
        step=step,
        step_mfu=speed * flops * cluster.mfu / cluster.speed,
        tokens_per_second=speed,
        all_reduce_bytes=all_reduce_bytes(config, cluster.world),
        steps=train.steps,
        tokens=tokens,
        epochs=tokens / corpus.train_tokens if corpus else None,
        training_seconds=training,
        evaluation_seconds=evaluation,
        dollars=options.rate * cluster.world * hours if options.rate is not None else None,
        corpus=corpus,
        checkpoint_bytes=checkpoint,
        disk_bytes=kept + (corpus.raw_bytes + corpus.token_bytes if corpus else 0),
        warnings=(),
    )
    return replace(plan, warnings=tuple(_warnings(plan, params)))


def _cluster(device: Accelerator, train: TrainParams, options: Options) -> Cluster:
    return Cluster(
        accelerator=device,
        nodes=options.nodes,
        gpus=options.gpus,
        link=device.link(options.interconnect),
        network=options.network * 1e9 if options.network else None,
        peak=options.peak or device.peak(train.dtype),
        mfu=options.mfu or device.mfu,
    )


def _seconds(
    train: TrainParams, config: GPTConfig, cluster: Cluster, step: StepTime
) -> tuple[float, float]:
    """Seconds of all steps, and of the validations and HellaSwag between them."""
    # Smaller batches, while they grow, are as fast a token; links and optimizer take a step's time.
    whole = train.batches(config.block_size)
    batches = whole(train.steps)[0] / whole.full
    training = batches * step.compute + train.steps * (step.exposed + step.optimizer)
    tokens: float = train.val_tokens * math.ceil(train.steps / train.val_every)
    if train.hellaswag_every:
        times = math.ceil(train.steps / train.hellaswag_every)
        tokens += times * HELLASWAG_TOKENS / HELLASWAG_MFU
    forward = flops_per_token(config, config.block_size, backward=False)
    return training, tokens * forward / (cluster.speed * cluster.world)


def _warnings(plan: Plan, params: Parameters) -> list[str]:
    """What is wrong with a plan, each with its mend."""
    options, train, found = plan.options, params.train, []
    most = plan.largest_micro_batch
    if not most:
        more = "fewer processes (--gpus)" if options.hardware == "cpu" else "more memory"
        mends = [more, "a smaller model or model.block_size"]
        if not options.checkpoint_activations:
            mends.insert(0, "checkpoint_activations: true (--checkpoint-activations)")
        found.append(f"not one sequence fits: take {', or '.join(mends)}")
    elif not plan.fits:
        found.append(
            f"micro-batches of {plan.micro_batch} do not fit: set GPT2_MICRO_BATCH={most} "
            "(machine.yaml: micro_batch), the largest that fits and divides"
        )
    if plan.step.exposed > SLOW_LINK * plan.step.total:
        part = plan.step.exposed / plan.step.total
        hide = "" if options.overlap else "overlap: true in machine.yaml (--overlap), "
        found.append(
            f"{part:.0%} of a step is spent on sending gradients: {hide}a faster network, or a "
            "larger train.batch_tokens"
        )
    if plan.epochs is not None and plan.epochs > MANY_EPOCHS:
        found.append(
            f"{plan.epochs:.1f} epochs: beyond {MANY_EPOCHS} a text seen again teaches little; "
            "fewer train.steps, or more text"
        )
    if plan.corpus and plan.corpus.val_tokens < max(train.val_tokens, params.evaluate.val_tokens):
        found.append(
            f"the validation split will hold about {plan.corpus.val_tokens:,.0f} tokens, fewer "
            "than val_tokens of train or evaluate: raise tokenize.val_per_10k"
        )
    if options.hardware != "cpu" and train.dtype == "float32":
        found.append("train.dtype is float32: bfloat16 is twice as fast on this hardware and more")
    return found
