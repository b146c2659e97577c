"""Benchmark of a training step: `python -m tests.benchmarks.model`.

A step is forward, backward, clipping and fused AdamW, in float32 or under bfloat16 autocast, of

    ours          this project's model: fused kernels, chunked loss
    ours plain    the same with a plain loss: all logits, then `F.cross_entropy`
    transformers  `GPT2LMHeadModel` with its fastest attention (sdpa), dropout 0
    torch.nn      a GPT built from `nn.TransformerEncoder`, as in its tutorial

each eager and compiled, all with a tied head and this project's `adamw`. The tables of the other
two models have 50,257 rows; ours has 50,304 and multiplies all of them.

Every variant runs in its own process, to measure its peak resident memory. Variants step in turn,
one at a time, in an order that rotates each round: when the machine slows down, it slows all of
them. Results are medians; ratios are medians over the rounds. The machine's peak is the fastest of
the square matrix products measured between the steps. FLOPs are `model.size.flops_per_token`.

    --size gpt2 --batch 1          the 124M model (a few minutes; first fill the compiler's cache
                                   with --rounds 0; up to 3 GB per variant, select with --only)
    --preset mini                  model, batch and dtype of a preset
    --only "ours eager"            a single variant
    --only "ours eager" --profile  time per operation
"""

from __future__ import annotations

import argparse
import math
import multiprocessing as mp
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, GPTConfig
from model.init import STD
from model.size import flops_per_token
from pipeline.runtime.params_file import read_yaml, validate
from train.data.split import MICRO_BATCH_TOKENS
from train.numerics import clip_gradients, native_dtype
from train.optim.param_groups import adamw, decay_groups
from train.params import ModelParams, TrainParams
from train.preset import read_preset

VARIANTS = [
    f"{model} {mode}"
    for mode in ("eager", "compiled")
    for model in ("ours", "ours plain", "transformers", "torch.nn")
]


@dataclass(frozen=True)
class Job:
    """The training step that every variant computes."""

    config: GPTConfig
    batch: int
    dtype: str
    threads: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.config.block_size

    @property
    def flops(self) -> int:
        """FLOPs per step."""
        return self.tokens * flops_per_token(self.config, self.config.block_size)


# -- the models ------------------------------------------------------------------------------------


class PlainLoss(nn.Module):
    """Our model with all logits at once and PyTorch's cross-entropy."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.gpt(tokens).flatten(0, 1), targets.flatten())


class Encoder(nn.Module):
    """GPT-2 built from PyTorch's own transformer layers."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C)
        layer = nn.TransformerEncoderLayer(
            C,
            config.n_head,
            4 * C,
            dropout=0.0,
            activation=partial(F.gelu, approximate="tanh"),
            batch_first=True,
            norm_first=True,
        )
        self.h = nn.TransformerEncoder(
            layer, config.n_layer, nn.LayerNorm(C), enable_nested_tensor=False
        )
        mask = nn.Transformer.generate_square_subsequent_mask(config.block_size)
        self.register_buffer("mask", mask)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=STD)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = self.h(x, mask=self.mask, is_causal=True)
        return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1), targets.flatten())


class Transformers(nn.Module):
    """`transformers.GPT2LMHeadModel`, with its own loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()
        self.gpt = transformers.GPT2LMHeadModel._from_config(
            transformers.GPT2Config(
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                n_positions=config.block_size,
                vocab_size=config.vocab_size,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                use_cache=False,
            ),
            attn_implementation="sdpa",
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # it shifts the labels itself: one target fewer per row
        return self.gpt(input_ids=tokens, labels=tokens).loss


def build(name: str, config: GPTConfig) -> nn.Module:
    """Build the model of a variant, in training mode."""
    if name.startswith("ours"):
        gpt = GPT.initialised(config)
        return PlainLoss(gpt) if name == "ours plain" else gpt
    return Transformers(config) if name == "transformers" else Encoder(config)


# -- one process per variant -----------------------------------------------------------------------


def training_step(variant: str, job: Job) -> Callable[[], float]:
    """Return a function that runs one step of a variant and returns the loss."""
    name, _, mode = variant.rpartition(" ")
    torch.manual_seed(0)
    module = build(name, job.config)
    groups = decay_groups(module.named_parameters(), embeddings_decay=True)
    optimizer = adamw(groups, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    forward: Any = torch.compile(module) if mode == "compiled" else module
    shape = (job.batch, job.config.block_size)
    tokens, targets = torch.randint(job.config.vocab_size, (2, *shape)).unbind()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bfloat16"):
            loss = forward(tokens, targets)
        loss.backward()
        clip_gradients(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def matmul(job: Job) -> Callable[[], float]:
    """Return a function that multiplies square matrices, for the machine's peak."""
    dtype = torch.bfloat16 if job.dtype == "bfloat16" else torch.float32
    a, b = torch.randn(2, SQUARE, SQUARE).to(dtype).unbind()

    def step() -> float:
        a @ b
        return 0.0

    return step


SQUARE = 4096
MATMUL = "matrix product"


def serve(pipe: Any, variant: str, job: Job) -> None:
    """Warm up, then run as many steps as the pipe asks for, until it sends 0."""
    torch.set_num_threads(job.threads)
    step = matmul(job) if variant == MATMUL else training_step(variant, job)
    start = time.perf_counter()
    first = step()
    step()  # the first step allocates the optimizer's state
    pipe.send((first, time.perf_counter() - start))
    memory = Path("/proc/self/clear_refs")
    if memory.exists():
        memory.write_text("5")  # reset the peak, which includes the compiler
    while n := pipe.recv():
        start = time.perf_counter()
        for _ in range(n):
            step()
        seconds = (time.perf_counter() - start) / n
        pipe.send((seconds, peak_memory()))


def peak_memory() -> float:
    """Return the peak resident memory of this process in GB; NaN if Linux does not report it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else float("nan")


@dataclass
class Runner:
    """The process of a variant, and its measurements."""

    variant: str
    pipe: Any
    process: Any
    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0

    @classmethod
    def start(cls, variant: str, job: Job) -> Runner:
        ours, theirs = mp.Pipe()
        process = mp.get_context("spawn").Process(target=serve, args=(theirs, variant, job))
        process.start()
        theirs.close()
        runner = cls(variant, ours, process)
        first, seconds = ours.recv()
        if variant != MATMUL:
            # sanity check: the loss of initial weights is about ln V
            assert abs(first - math.log(job.config.vocab_size)) < 0.3, f"{variant}: loss {first}"
            print(f"  {variant}: first loss {first:.3f}, two steps in {seconds:.0f} s", flush=True)
        return runner

    def run(self, n: int) -> None:
        self.pipe.send(n)
        seconds, self.memory = self.pipe.recv()
        self.seconds.append(seconds)

    def end(self) -> None:
        self.pipe.send(0)
        self.process.join()


def measure(job: Job, variants: list[str], rounds: int, steps: int) -> dict[str, Runner]:
    """Run all variants in turn, in an order that rotates each round."""
    runners = [Runner.start(variant, job) for variant in [MATMUL, *variants]]
    for i in range(rounds):
        for runner in runners[i % len(runners) :] + runners[: i % len(runners)]:
            runner.run(1 if runner.variant == MATMUL else steps)
    for runner in runners:
        runner.end()
    return {runner.variant: runner for runner in runners}


def profile(variant: str, job: Job) -> None:
    """Print the time per operation of a step."""
    torch.set_num_threads(job.threads)
    step = training_step(variant, job)
    for _ in range(2):
        step()
    with torch.profiler.profile() as profiler:
        step()
    table = profiler.key_averages()
    print(table.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))


# -- the table -------------------------------------------------------------------------------------


def report(job: Job, runners: dict[str, Runner]) -> bool:
    """Print the table; return whether all ratios reach their minimum."""
    peak = 2 * SQUARE**3 / min(runners.pop(MATMUL).seconds)
    speed = {name: job.tokens / statistics.median(r.seconds) for name, r in runners.items()}
    best = max(speed.values())
    print(f"machine's peak {peak / 1e9:.0f} GFLOP/s ({SQUARE} x {SQUARE}, {job.dtype})")
    print(f"{'':22}{'tokens/s':>9}  {'slowest - fastest':>17}  {'of peak':>7}  {'memory':>8}")
    for name, runner in runners.items():
        slow, fast = job.tokens / max(runner.seconds), job.tokens / min(runner.seconds)
        share = speed[name] * job.flops / job.tokens / peak
        print(
            f"{name:22}{speed[name]:9.0f}  {slow:8.0f} - {fast:<6.0f}  {share:7.1%}  "
            f"{runner.memory:5.2f} GB{'  fastest' if speed[name] == best else ''}"
        )
    good = True
    for a, b, least in (
        ("ours eager", "transformers eager", 1.0),
        ("ours eager", "torch.nn eager", 1.0),
        ("ours compiled", "transformers compiled", 1.0),
        ("ours compiled", "torch.nn compiled", 1.0),
        ("ours compiled", "ours plain compiled", 0.92),
        ("ours compiled", "ours plain eager", 1.1 if job.dtype == "bfloat16" else 1.0),
    ):
        if a in speed and b in speed:
            # ratio per round: a slow phase of the machine slows both
            pairs = zip(runners[a].seconds, runners[b].seconds, strict=True)
            ratio = statistics.median(theirs / ours for ours, theirs in pairs)
            good &= ratio >= least
            print(f"{a} / {b:22} {ratio:6.3f}  (at least {least})")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.model")
    parser.add_argument("--preset", help="model, batch and dtype of this preset")
    parser.add_argument("--size", help="a published size; default: 4 layers, 256 channels")
    parser.add_argument(
        "--block-size", type=int, help="tokens per sequence (256; 1024 with --size)"
    )
    parser.add_argument("--batch", type=int, help="sequences per step (4; 1 with --size)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: both")
    parser.add_argument("--loss-chunk", type=int, help="tokens per chunk of the loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps per turn")
    parser.add_argument(
        "--only", action="append", choices=VARIANTS, help="only this variant; repeatable"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the time per operation instead of timing steps",
    )
    args = parser.parse_args()

    dtypes = [args.dtype] if args.dtype else ["bfloat16", "float32"]
    if args.preset:
        params, overlay = read_yaml(Path("params.yaml")), read_preset(args.preset)
        sections = {name: {**params[name], **overlay.get(name, {})} for name in ("model", "train")}
        train = validate(TrainParams, sections["train"], "train")
        config = validate(ModelParams, sections["model"], "model").config()
        batch = min(train.batch_tokens, MICRO_BATCH_TOKENS["cpu"]) // config.block_size
        dtypes = [args.dtype or train.resolved(native_dtype("cpu")).dtype]
    elif args.size:
        config = GPTConfig.named(args.size, block_size=args.block_size or 1024)
        batch = 1
    else:
        config, batch = GPTConfig(4, 4, 256, block_size=args.block_size or 256), 4
    if args.loss_chunk is not None:
        config = GPTConfig.from_dict({**config.to_dict(), "loss_chunk": args.loss_chunk})

    good = True
    for dtype in dtypes:
        job = Job(config, args.batch or batch, dtype, args.threads)
        print(
            f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels; "
            f"{job.batch} x {config.block_size} tokens per step; {dtype}; {args.threads} threads; "
            f"torch {torch.__version__}"
        )
        if args.profile:
            for variant in args.only or ["ours eager"]:
                profile(variant, job)
            continue
        runners = measure(job, args.only or VARIANTS, args.rounds, args.steps)
        if args.rounds:
            good &= report(job, runners)
    sys.exit(int(not good))


if __name__ == "__main__":
    main()
