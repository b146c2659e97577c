"""Compare `train.plan` with measurements and published runs: the tables of docs/plan.md.

    python -m tests.benchmarks.plan [--compiled] [--full]

Saved tensors are measured on the CPU, through the hooks of `torch.autograd.graph`: each storage
once, parameters excluded. The peak of a step is that of all storages of a step over fake tensors,
which have shapes but no memory. For time, the plan uses the model, batch, micro-batch and hardware
of a published run, at the MFU that the plan assumes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT, GPTConfig
from tests.support.metering import Meter
from train.numerics import Dtype, summed_loss
from train.plan import memory
from train.plan.estimate import Options, Plan, make_plan
from train.preset import load


@dataclass(frozen=True)
class Shape:
    """Model and micro-batch."""

    config: GPTConfig
    micro_batch: int

    def __str__(self) -> str:
        c = self.config
        return f"L {c.n_layer}, C {c.n_embd}, T {c.block_size}, B {self.micro_batch}"


SMALL = (
    Shape(GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=128, vocab_size=500), 2),
    Shape(GPTConfig(n_layer=3, n_head=8, n_embd=256, block_size=64, vocab_size=2000), 8),
    Shape(GPTConfig(n_layer=1, n_head=2, n_embd=128, block_size=512, vocab_size=5000), 1),
)
FULL = (Shape(GPTConfig.named("gpt2"), 1), Shape(GPTConfig.named("gpt2"), 4))
PEAKS = (
    Shape(GPTConfig.named("gpt2"), 16),
    Shape(GPTConfig.named("gpt2"), 64),
    Shape(GPTConfig.named("gpt2-medium"), 32),
    Shape(GPTConfig.named("gpt2-xl"), 8),
)


# -- memory ----------------------------------------------------------------------------------------


def saved_bytes(
    shape: Shape, dtype: Dtype, checkpoint_activations: bool = False, compiled: bool = False
) -> int:
    """Measure the bytes that autograd holds after a forward pass, parameters excluded."""
    gpt = GPT(shape.config)
    gpt.checkpoint_activations = checkpoint_activations
    forward: Any = torch.compile(gpt, fullgraph=True) if compiled else gpt
    tokens = torch.randint(shape.config.vocab_size, (shape.micro_batch, shape.config.block_size))
    targets = tokens.roll(-1, 1)
    if compiled:  # the compiling call saves other tensors than later calls
        summed_loss(forward, tokens, targets, dtype).backward()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps it alive, so that no two tensors share an address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(forward, tokens, targets, dtype)
    assert loss.requires_grad
    return sum(sizes.values())


def peak_bytes(shape: Shape, dtype: Dtype, checkpoint_activations: bool = False) -> int:
    """Measure the peak of forward and backward, with gradients and AdamW's moments allocated."""
    gpt = GPT._unallocated(shape.config, "fused")
    gpt.checkpoint_activations = checkpoint_activations
    with FakeTensorMode(allow_non_fake_inputs=True):
        size = (shape.micro_batch, shape.config.block_size)
        tokens, targets = (torch.zeros(size, dtype=torch.int64) for _ in range(2))
        with Meter("cpu") as meter:
            empty = {name: torch.empty(t.shape) for name, t in gpt.state_dict().items()}
            gpt.load_state_dict(empty, assign=True)
            for parameter in gpt.parameters():
                parameter.grad = torch.zeros_like(parameter)
            moments = [torch.zeros_like(p) for p in gpt.parameters() for _ in range(2)]
            summed_loss(gpt, tokens, targets, dtype).backward()
            del moments
    return meter.peak


def _memory_tables(compiled: bool, full: bool) -> None:
    _header("saved by autograd")
    for shape in (*SMALL, *(FULL if full else ())):
        cases: list[tuple[Dtype, bool, bool]] = [
            ("float32", False, False),
            ("bfloat16", False, False),
            ("bfloat16", True, False),
        ]
        if compiled:
            cases += [("float32", False, True), ("bfloat16", False, True)]
        for dtype, checkpointed, compile_it in cases:
            measured = saved_bytes(shape, dtype, checkpointed, compile_it)
            formula = memory.saved_for_backward(
                shape.config, shape.micro_batch, dtype, checkpointed
            )
            how = ", compiled" if compile_it else ", checkpointed" if checkpointed else ""
            _row(str(shape), f"{dtype}{how}", measured, formula)
    print()
    _header("peak of a step")
    for shape in PEAKS:
        for dtype, checkpointed in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
            measured = peak_bytes(shape, dtype, checkpointed)
            formula = memory.training_memory(
                shape.config, shape.micro_batch, dtype, checkpoint_activations=checkpointed
            ).total
            _row(str(shape), f"{dtype}{', checkpointed' * checkpointed}", measured, formula)


def _header(name: str) -> None:
    print(f"| {name} | dtype | measured MB | formula MB | formula / measured |")
    print("|---|---|---|---|---|")


def _row(name: str, how: str, measured: float, formula: float) -> None:
    print(
        f"| {name} | {how} | {measured / 1e6:,.1f} | {formula / 1e6:,.1f} "
        f"| {formula / measured:.3f} |",
        flush=True,
    )


# -- time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """Run published by another project."""

    name: str  # name of the project
    sizes: tuple[int, int, int]  # layers, heads, width
    hardware: str  # name for `--hardware`
    gpus: int  # number of GPUs
    batch_tokens: int  # tokens per step
    micro_batch: int  # sequences per micro-batch
    block_size: int  # tokens per sequence
    seconds: float  # time of a step
    source: str  # source of the time

    def plan(self) -> Plan:
        """Return our plan of the run."""
        params = load("fineweb-10b")
        names = ("n_layer", "n_head", "n_embd", "block_size", "size")
        update = dict(zip(names, (*self.sizes, self.block_size, None), strict=True))
        model = params.model.model_copy(update=update)
        train = params.train.model_copy(update={"batch_tokens": self.batch_tokens})
        params = replace(params, model=model, train=train)
        options = Options(
            hardware=self.hardware,
            gpus=self.gpus,
            micro_batch=self.micro_batch,
            loss_chunk=2 * self.sizes[-1],  # about the model's default, to which the MFU applies
        )
        return make_plan(params, options)

    @property
    def mfu(self) -> float:
        """MFU with which the plan would be exact."""
        step = self.plan().step
        products = step.compute - step.traffic
        return self.plan().mfu * products / (self.seconds - step.total + products)


S, M, L, XL = (12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)  # GPT-2's sizes
MPT_760M, MPT_1B, MPT_3B = (24, 12, 1536), (24, 16, 2048), (32, 20, 2560)


def _mpt(
    sizes: tuple[int, int, int], hardware: str, batch: int, micro_batch: int, T: int, speed: int
) -> Published:
    source, tokens = f"scripts/train/benchmarking: {speed:,} tokens/s", batch * T
    return Published(
        "llm-foundry", sizes, hardware, 8, tokens, micro_batch, T, tokens / speed, source
    )


PUBLISHED = (
    Published("llm.c", S, "a100-80", 8, 524288, 64, 1024, 94.3 * 60 / 18865,
              "scripts/run_gpt2_124M.sh: 18,865 steps in 94.3 min"),
    Published("build-nanogpt", S, "a100-80", 1, 16384, 16, 1024, 0.090,
              "the lecture: 182K tokens/s, 90 ms"),
    _mpt(S, "a100-80", 1024, 64, 1024, 1251751),
    Published("llm.c", M, "a100-80", 8, 524288, 64, 1024, 0.820, "scripts/run_gpt2_350M.sh"),
    _mpt(M, "a100-80", 1024, 64, 1024, 518504),
    Published("llm.c", L, "a100-80", 8, 524288, 32, 1024, 1.7, "scripts/run_gpt2_774M.sh"),
    _mpt(MPT_760M, "a100-80", 768, 48, 1024, 238122),
    _mpt(MPT_760M, "a100-80", 384, 24, 2048, 259472),
    _mpt(MPT_1B, "a100-80", 576, 18, 1024, 176898),
    _mpt(MPT_3B, "a100-80", 960, 20, 1024, 92643),
    Published("llm.c", S, "h100", 8, 524288, 64, 1024, 0.140,
              "modded-nanogpt, 2024-10-13_llmc: 140 ms"),
    Published("modded-nanogpt", S, "h100", 8, 524288, 64, 1024, 0.1418,
              "2024-10-18_PyTorch25, another architecture: 141.8 ms"),
    _mpt(MPT_760M, "h100", 768, 48, 1024, 628648),
    _mpt(MPT_1B, "h100", 576, 18, 1024, 391287),
    Published("llm.c", XL, "h100", 8, 1048576, 16, 1024, 2.80, "scripts/run_gpt2_1558M.sh"),
    _mpt(MPT_3B, "h100", 960, 20, 1024, 216369),
    Published("nanogpt-speedrun", S, "rtx4090", 2, 262144, 32, 1024, 1.1913,
              "tyler-romero, logs/4c627c0d: 1,191 ms"),
)  # fmt: skip
"""Step times that others published, by hardware and size."""


def _time_table() -> None:
    print(
        "| run | parameters | hardware | published ms | its MFU | assumed MFU | plan ms | error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for run in PUBLISHED:
        plan = run.plan()
        cells = [
            f"{run.name} ({run.source})",
            f"{plan.parameters / 1e6:,.0f}M",
            f"{run.gpus} x {run.hardware}",
            f"{1000 * run.seconds:,.0f}",
            f"{run.mfu:.0%}",
            f"{plan.mfu:.0%}",
            f"{1000 * plan.step.total:,.0f}",
            f"{plan.step.total / run.seconds - 1:+.1%}",
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile (minutes)")
    parser.add_argument("--full", action="store_true", help="also GPT-2 124M (4 GB of memory)")
    args = parser.parse_args()
    _time_table()
    print()
    _memory_tables(args.compiled, args.full)


if __name__ == "__main__":
    main()
