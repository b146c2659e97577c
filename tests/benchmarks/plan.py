"""How far `train.plan` lies from measurement, and from published runs: the tables of docs/plan.md.

    python -m tests.benchmarks.plan [--compiled] [--full]

Memory: what autograd saves is counted on the CPU, through `torch.autograd.graph`'s hooks: each
storage once, parameters left out; the highest moment of a step is found by following every storage
of a step over fake tensors, which have shapes and no memory. Time: the plan of a published run's
model, batch and hardware, at the MFU that it states, and at the plan's own.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from train.numerics import Dtype, summed_loss
from train.plan import memory
from train.plan.estimate import Options, Plan, make_plan
from train.preset import load


@dataclass(frozen=True)
class Shape:
    """A model and a micro-batch."""

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
    """Bytes that autograd holds after a forward pass, parameters left out."""
    gpt = GPT(shape.config)
    gpt.checkpoint_activations = checkpoint_activations
    forward: Any = torch.compile(gpt, fullgraph=True) if compiled else gpt
    tokens = torch.randint(shape.config.vocab_size, (shape.micro_batch, shape.config.block_size))
    targets = tokens.roll(-1, 1)
    if compiled:  # what is saved while it compiles is not what it saves afterwards
        summed_loss(forward, tokens, targets, dtype).backward()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # and so it is held: no two of them share an address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(forward, tokens, targets, dtype)
    assert loss.requires_grad
    return sum(sizes.values())


class Follow(TorchDispatchMode):
    """Follows every storage from its making to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def take(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        """A storage's end."""
        self.now -= self.live.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.take(leaf)
        return result


@contextmanager
def fake_model(config: GPTConfig) -> Iterator[GPT]:
    """A model whose tensors have shapes, and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpt = GPT._unallocated(config, "fused")
        empty = {name: torch.empty(t.shape, device="cpu") for name, t in gpt.state_dict().items()}
        gpt.load_state_dict(empty, assign=True)
        yield gpt


def peak_bytes(shape: Shape, dtype: Dtype, checkpoint_activations: bool = False) -> int:
    """Bytes at the highest moment of forward and backward, gradients and AdamW's moments held."""
    with fake_model(shape.config) as gpt:
        gpt.checkpoint_activations = checkpoint_activations
        size = (shape.micro_batch, shape.config.block_size)
        tokens, targets = (torch.zeros(size, dtype=torch.int64) for _ in range(2))
        with Follow() as follow:
            for parameter in gpt.parameters():
                follow.take(parameter)
                parameter.grad = torch.zeros_like(parameter)
            moments = [torch.zeros_like(p) for p in gpt.parameters() for _ in range(2)]
            summed_loss(gpt, tokens, targets, dtype).backward()
            del moments
    return follow.peak


def _memory_tables(compiled: bool, full: bool) -> None:
    print("| saved by autograd | | measured MB | formula MB | formula / measured |")
    print("|---|---|---|---|---|")
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
            formula = memory.saved(shape.config, shape.micro_batch, dtype, checkpointed)
            how = ", compiled" if compile_it else ", checkpointed" if checkpointed else ""
            _row(str(shape), f"{dtype}{how}", measured, formula)
    print("\n| highest moment of a step | | found MB | formula MB | formula / found |")
    print("|---|---|---|---|---|")
    for shape in PEAKS:
        for dtype, checkpointed in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
            found = peak_bytes(shape, dtype, checkpointed)
            formula = memory.training_memory(
                shape.config, shape.micro_batch, dtype, checkpoint_activations=checkpointed
            ).total
            _row(str(shape), f"{dtype}{', checkpointed' if checkpointed else ''}", found, formula)


def _row(name: str, how: str, measured: float, formula: float) -> None:
    print(
        f"| {name} | {how} | {measured / 1e6:,.1f} | {formula / 1e6:,.1f} "
        f"| {formula / measured:.3f} |",
        flush=True,
    )


# -- time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A run that others have published.

    Attributes:
        name: Whose.
        size: Of the model.
        hardware: As `--hardware`.
        gpus: How many.
        batch_tokens: Of a step.
        mfu: That is stated, each by its own count of operations.
        seconds: Of a step.
        source: Where.
    """

    name: str
    size: str
    hardware: str
    gpus: int
    batch_tokens: int
    mfu: float
    seconds: float
    source: str

    def plan(self, mfu: float | None) -> Plan:
        """Our plan of it."""
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
              "scripts/train/benchmarking: 156,468 tokens/s a GPU"),
    Published("llm.c", "gpt2-medium", "a100-80", 8, 524288, 0.60, 0.820,
              "scripts/run_gpt2_350M.sh: 820 ms; MFU of its 124M"),
    Published("llm.c", "gpt2-large", "a100-80", 8, 524288, 0.60, 1.7,
              "scripts/run_gpt2_774M.sh: 1.7 s; MFU of its 124M"),
)  # fmt: skip


def _time_table() -> None:
    print("| run | published ms | stated MFU | plan ms | | plan's MFU | plan ms | |")
    print("|---|---|---|---|---|---|---|---|")
    for run in PUBLISHED:
        stated, own = run.plan(run.mfu), run.plan(None)
        cells = [
            f"{run.name}, {run.size}, {run.gpus} x {run.hardware} ({run.source})",
            f"{1000 * run.seconds:,.0f}",
        ]
        for plan in (stated, own):
            far = plan.step.total / run.seconds - 1
            cells += [f"{plan.mfu:.0%}", f"{1000 * plan.step.total:,.0f}", f"{far:+.1%}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well: minutes")
    parser.add_argument("--full", action="store_true", help="GPT-2 124M as well: 4 GB of memory")
    args = parser.parse_args()
    _time_table()
    print()
    _memory_tables(args.compiled, args.full)


if __name__ == "__main__":
    main()
