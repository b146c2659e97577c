"""Compare `train.plan` with measurements and published runs: the tables of docs/plan.md.

    python -m tests.benchmarks.plan [--compiled] [--full]

Saved tensors are measured on the CPU, through the hooks of `torch.autograd.graph`: each storage
once, parameters excluded. The peak of a step is that of all storages of a step over fake tensors,
which have shapes but no memory. For time, the plan uses the model, batch and hardware
of a published run, at the MFU that it states and at the MFU that the plan assumes.
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
    size: str  # size of the model
    hardware: str  # name for `--hardware`
    gpus: int  # number of GPUs
    batch_tokens: int  # tokens per step
    mfu: float  # stated MFU; each project counts operations in its own way
    seconds: float  # time of a step
    source: str  # source of the time

    def plan(self, mfu: float | None) -> Plan:
        """Return our plan of the run; at our MFU if ``mfu`` is None."""
        params = load("fineweb-10b")
        model = params.model.model_copy(update={"size": self.size})
        train = params.train.model_copy(update={"batch_tokens": self.batch_tokens})
        params = replace(params, model=model, train=train)
        return make_plan(params, Options(hardware=self.hardware, gpus=self.gpus, mfu=mfu))


PUBLISHED = (
    Published("llm.c", "gpt2", "a100-80", 8, 524288, 0.60, 94.3 * 60 / 18865,
              "scripts/run_gpt2_124M.sh: 18,865 steps in 94.3 min"),
    Published("build-nanogpt", "gpt2", "a100-80", 1, 16384, 0.50, 0.090,
              "the lecture: 182K tokens/s, 90 ms"),
    Published("llm-foundry, MPT-125M", "gpt2", "a100-80", 8, 1048576, 0.4315, 1048576 / 1251751,
              "scripts/train/benchmarking: 156,468 tokens/s per GPU"),
    Published("llm.c", "gpt2-medium", "a100-80", 8, 524288, 0.60, 0.820,
              "scripts/run_gpt2_350M.sh: 820 ms; MFU of its 124M"),
    Published("llm.c", "gpt2-large", "a100-80", 8, 524288, 0.60, 1.7,
              "scripts/run_gpt2_774M.sh: 1.7 s; MFU of its 124M"),
)  # fmt: skip


def _time_table() -> None:
    print("| run | published ms | stated MFU | plan ms | error | assumed MFU | plan ms | error |")
    print("|---|---|---|---|---|---|---|---|")
    for run in PUBLISHED:
        stated, own = run.plan(run.mfu), run.plan(None)
        cells = [
            f"{run.name}, {run.size}, {run.gpus} x {run.hardware} ({run.source})",
            f"{1000 * run.seconds:,.0f}",
        ]
        for plan in (stated, own):
            difference = plan.step.total / run.seconds - 1
            cells += [f"{plan.mfu:.0%}", f"{1000 * plan.step.total:,.0f}", f"{difference:+.1%}"]
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
