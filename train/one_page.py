"""The whole training program on one page: GPT-2, from tokens to a trained model.

    python train/one_page.py                                # any setting is a flag:
    python train/one_page.py --processes 8 --micro_batch 1  # one process per GPU of this machine

It needs PyTorch, NumPy, and `data/tokens`, which `dvc repro verify` makes. It leaves out what long
runs on shared machines need. On a CPU, with the same settings and `compile: false` in machine.yaml,
its weights are those of `python -m train.launch`, bit for bit. Each part names the modules that do
the same with more care, and the source of the idea; docs/one-page.md has links, and common edits.

Shapes: B windows of T tokens, C channels, H heads, V tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.nn.parallel import DistributedDataParallel

# -- Settings --------------------------------------------------------------------------------------
# The defaults are a small model that learns from two million tokens on a laptop. GPT-2 124M is
# 12 layers, 12 heads, 768 channels, 1024 tokens of context, 524288 tokens per step, rate 6e-4.
# Hardened: train/params.py, train/presets/classic.yaml
# Papers: Radford et al. 2019, table 2; Brown et al. 2020 (arXiv 2005.14165), appendix B

V, PADDED_V = 50257, 50304  # a multiple of 128 rows makes products fast; the last 47 are never used


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides a run; rates are per optimizer step."""

    tokens: str = "data/tokens"  # a folder of shards in llm.c's format, *train*.bin and *val*.bin
    out: str = "artifacts/one_page.pt"  # the checkpoint; delete it to start again
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    block_size: int = 128  # T
    steps: int = 1400
    batch_tokens: int = 1024  # per step, over all processes
    micro_batch: int = 8  # windows that a process computes at a time; less needs less memory
    processes: int = 1  # one per GPU
    learning_rate: float = 4e-3  # the peak
    min_lr_ratio: float = 0.1  # the last rate, as a fraction of the peak
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    dtype: str = "float32"  # of matrix products; bfloat16 is faster where the processor has it
    seed: int = 1337
    val_every: int = 200
    val_tokens: int = 16384
    checkpoint_every: int = 200
    log_every: int = 10


# -- Model -----------------------------------------------------------------------------------------
# A stream of C channels per token passes through the layers; each block reads it through a
# LayerNorm and adds to it, so that gradients reach the embeddings through additions alone. Only
# attention moves information between tokens, and only forwards in time. The head is the token table
# again: a token that is close to the final stream is likely.
# Hardened: model/gpt.py, model/attention.py, model/layers.py
# Papers: Vaswani et al. 2017 (arXiv 1706.03762); Radford et al. 2019; the head: Press and Wolf 2017
# (arXiv 1608.05859); the attention kernel: Dao et al. 2022 (arXiv 2205.14135)
class Attention(nn.Module):
    """Each token takes a mean of earlier values, weighted by how well its query fits their keys."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.n_head = s.n_head
        self.c_attn = nn.Linear(s.n_embd, 3 * s.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(s.n_embd, s.n_embd)  # mixes the outputs of the heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C / H)
            for part in self.c_attn(x).split(C, dim=2)
        )
        # softmax(q kᵀ / sqrt(C / H)) v, without storing the (T, T) weights
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return mixed


class MLP(nn.Module):
    """Two linear maps with GELU between, on each token alone."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.c_fc = nn.Linear(s.n_embd, 4 * s.n_embd)
        self.c_proj = nn.Linear(4 * s.n_embd, s.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        y: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """Attention, then MLP, each added to the stream."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(s.n_embd), Attention(s)
        self.ln_2, self.mlp = nn.LayerNorm(s.n_embd), MLP(s)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2 with its loss. DDP hooks `forward`, so the loss is computed there."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.wte = nn.Embedding(PADDED_V, s.n_embd)  # a vector per token
        self.wpe = nn.Embedding(s.block_size, s.n_embd)  # a vector per position
        self.h = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.ln_f = nn.LayerNorm(s.n_embd)
        initialise(self, s)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of (B, T) targets, the token after each, summed over all, in nats."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x)
        x, y = self.ln_f(x).flatten(0, 1), targets.flatten()
        loss: Tensor = SummedLoss.apply(x, self.wte.weight, y)  # type: ignore[no-untyped-call]
        return loss


# -- Initial weights -------------------------------------------------------------------------------
# Each parameter has a generator of its own, seeded by its name. So the weights are the same on any
# device and for any number of processes, and a new layer does not change those of the others. Maps
# that end in the stream start smaller: the stream is a sum of 2 L of them.
# Hardened: model/init.py
# Papers: Radford et al. 2019, section 2.3
@torch.no_grad()
def initialise(gpt: nn.Module, s: Settings) -> None:
    """Draw all weights from the seed, on the CPU."""
    for name, parameter in gpt.named_parameters():
        if parameter.dim() < 2:  # biases and LayerNorms
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        std = 0.02 / (2 * s.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02
        digest = hashlib.sha256(f"{s.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows = V if name == "wte.weight" else len(parameter)
        drawn = torch.empty(rows, parameter.shape[1]).normal_(0.0, std, generator=generator)
        parameter[:rows], parameter[rows:] = drawn, 0.0


# -- Loss ------------------------------------------------------------------------------------------
# The loss of a token is -log softmax(z)_y = log Σ exp(z_i) - z_y for logits z and target y, and its
# gradient is dz = softmax(z) - onehot(y). The logits of 16 x 1024 tokens would take 3.3 GB, so they
# are made in chunks, each turned into gradients before the next: dx = dz W, dW = dzᵀ x.
# `F.cross_entropy(x @ W.T, y)` is the same up to rounding, and all that a small model needs.
# Hardened: model/loss.py
# Papers: chunks that make gradients in the forward pass: Hsu et al. 2024 (arXiv 2410.10989)
class SummedLoss(torch.autograd.Function):
    """Cross-entropy of x (N, C) with the token table (PADDED_V, C) and targets (N,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses; keep the gradients."""
        (N, C), device = x.shape, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = table.to(dtype)
        chunk = -(-N // -(-N // max(2 * C, 512)))  # about equal chunks of up to 2 C tokens
        losses, dx, dw = [], [], torch.zeros_like(table)
        for part, y in zip(x.split(chunk), targets.split(chunk), strict=True):
            z = (part.to(dtype) @ w.T).float()  # (R, PADDED_V)
            z[:, V:] = -torch.inf  # the padding: no probability, no gradient
            top = z.amax(1, keepdim=True)  # exp(z) may overflow, exp(z - max) cannot
            z_target = z.gather(1, y[:, None])
            exps = z.sub_(top).exp_()
            total = exps.sum(1, keepdim=True)
            losses.append((total.log() + (top - z_target))[:, 0])
            if ctx.needs_input_grad[0]:
                dz = exps.mul_(1 / total).to(dtype)  # softmax(z)
                dz[torch.arange(len(y)), y] = torch.expm1(-losses[-1]).to(dtype)  # minus one there
                dx.append((dz @ w).to(x.dtype))
                dw += dz.T @ part.to(dtype)
        if dx:
            ctx.save_for_backward(torch.cat(dx), dw)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the gradients, as the chain rule says."""
        dx, dw = ctx.saved_tensors
        return upstream * dx, upstream * dw, None


# -- Tokens ----------------------------------------------------------------------------------------
# A shard is a header of 1,024 bytes, then uint16 tokens. A split is one stream, in several files.
# Hardened: pipeline/format/shards.py, pipeline/verify/, train/data/loader.py
class Stream:
    """The tokens of one split, as one sequence; the disk is read only where a window lies."""

    def __init__(self, folder: str, split: str) -> None:
        files = sorted(Path(folder).glob(f"*{split}*.bin"))
        if not files:
            sys.exit(f"{folder}: no *{split}*.bin; run `dvc repro verify`, or set --tokens")
        self.shards = [np.memmap(file, "<u2", "r", offset=1024) for file in files]
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, n: int) -> np.ndarray:
        """Copy tokens [start, start + n), which may lie in several shards: (n,) int64."""
        pieces = []
        while n > 0:
            shard = int(np.searchsorted(self.starts, start, "right")) - 1
            offset = start - int(self.starts[shard])
            pieces.append(self.shards[shard][offset : offset + n])
            start, n = start + len(pieces[-1]), n - len(pieces[-1])
        return np.concatenate(pieces).astype(np.int64)

    def batch(self, starts: list[int], T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T): the targets are the same windows, one token later."""
        rows = torch.from_numpy(np.stack([self.read(start, T + 1) for start in starts]))
        return rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)


# -- Data order ------------------------------------------------------------------------------------
# Which window is sample i? A permutation answers, another one in each epoch. It is computed, not
# stored, by a Feistel network: each round can be undone, whatever its mixing function is, so no two
# samples get the same window. Its numbers are below a * b; one that is no window passes again. So
# the number of samples seen is all that a run must remember of its data, and resuming is exact.
# Hardened: train/data/order.py, train/data/split.py
# Papers: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"
def mix(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits, wrapping: the end of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map indices below n to indices below n, one to one."""
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)  # a * b is n or a little more
    value, outside = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while outside.any():
        right, left = np.divmod(value[outside], np.uint64(a))
        for number, key in enumerate(keys):
            size = np.uint64(b if number % 2 else a)
            left, right = right, (left + mix(right + key) % size) % size
        value[outside] = right * np.uint64(a) + left
        outside = value >= n
    return value.astype(np.int64)


def windows(first: int, count: int, n: int, seed: int) -> np.ndarray:
    """Numbers of the windows that are samples [first, first + count), of n windows per epoch."""
    epoch, index = np.divmod(np.arange(first, first + count), n)
    return np.concatenate([permute(index[epoch == e], n, seed, int(e)) for e in np.unique(epoch)])


# -- Optimizer -------------------------------------------------------------------------------------
# AdamW divides a running mean of the gradient by the root of a running mean of its square, so every
# weight moves by about the learning rate. Weights also shrink a little each step, but not biases
# and LayerNorms. The rate rises linearly, then falls by half a cosine.
# Hardened: train/optim/, train/numerics.py
# Papers: Kingma and Ba 2015 (arXiv 1412.6980); Loshchilov and Hutter on decay, 2019 (arXiv
# 1711.05101), and cosines, 2017 (arXiv 1608.03983); clipping: Pascanu et al. 2013 (arXiv 1211.5063)
def make_optimizer(gpt: GPT, s: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in gpt.parameters() if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in gpt.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, s.learning_rate, (s.beta1, s.beta2), fused=True)


def rate(step: int, s: Settings) -> float:
    """Learning rate of a step, counted from 0."""
    if step < s.warmup_steps:
        return s.learning_rate * ((step + 1) / s.warmup_steps)
    past, length = step - s.warmup_steps, s.steps - 1 - s.warmup_steps
    height = 0.5 * (1.0 + math.cos(math.pi * past / length)) if past < length else 0.0
    return s.learning_rate * s.min_lr_ratio * (1.0 - height) + s.learning_rate * height


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients to a norm of at most `limit`; return the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients[0].is_cuda:
        norm = nn.utils.get_total_norm(gradients)
    else:  # a CPU adds squares one by one in float32, 1e-3 off for large tables: add short pieces
        norms = []
        for gradient in gradients:
            flat, cut = gradient.flatten(), gradient.numel() // 4096 * 4096
            for pieces in (flat[:cut].view(-1, 4096), flat[cut:].view(1, -1)):
                norms.append(torch.linalg.vector_norm(pieces, dim=1))
        norm = torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


# -- Validation ------------------------------------------------------------------------------------
# The mean loss over the same tokens each time, in spans that are spread over the held-out split,
# which has its sources one after the other. The processes share the batches, and sum in float64.
# Hardened: train/validation.py, train/evaluate.py, train/evals/
@torch.no_grad()
def validate(gpt: GPT, stream: Stream, s: Settings, device: torch.device) -> float:
    """Mean loss over `val_tokens`, nats per token; the same on each rank."""
    T, n = s.block_size, s.val_tokens // s.block_size * s.block_size
    span = -(-min(1024, n // 16) // T) * T or T
    gaps, unmeasured = -(-n // span) - 1, len(stream) - 1 - n
    starts = [a + a // span * unmeasured // max(1, gaps) for a in range(0, n, T)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    rows, world = s.micro_batch, dist.get_world_size()
    for first in range(dist.get_rank() * rows, len(starts), world * rows):
        total += loss_of(gpt, stream.batch(starts[first : first + rows], T, device), s)
    dist.all_reduce(total)
    return total.item() / n


def loss_of(forward: nn.Module, batch: tuple[Tensor, Tensor], s: Settings) -> Tensor:
    """Run a model with matrix products in `dtype`, and all else in float32."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
        loss: Tensor = forward(*batch)
    return loss


# -- Checkpoint ------------------------------------------------------------------------------------
# Weights, the optimizer's moments, and the step: there is no other state. The file is written under
# another name, synced to the disk, then renamed: a kill leaves the old one or the new one.
# Hardened: train/checkpoint/, train/run.py
def save(gpt: GPT, optimizer: torch.optim.AdamW, step: int, s: Settings) -> None:
    """Write the checkpoint after `step` complete steps."""
    path, part = Path(s.out), Path(f"{s.out}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "settings": dataclasses.asdict(s)}
    state |= {"model": gpt.state_dict(), "optimizer": optimizer.state_dict()}
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def restore(gpt: GPT, optimizer: torch.optim.AdamW, s: Settings, device: torch.device) -> int:
    """Load the checkpoint, if there is one; return the number of complete steps."""
    if not Path(s.out).exists():
        return 0
    saved = torch.load(s.out, map_location=device, weights_only=True)  # runs no code
    free = {"out", "val_every", "val_tokens", "checkpoint_every", "log_every"}  # change no weight,
    free |= {"micro_batch", "processes"}  # or only by rounding
    if saved["settings"] | {name: getattr(s, name) for name in free} != dataclasses.asdict(s):
        sys.exit(f"{s.out}: trained with other settings; set --out, or delete it to start again")
    gpt.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


# -- Processes -------------------------------------------------------------------------------------
# One process per GPU. Each holds the whole model and takes its part of every batch; the backward
# pass averages the gradients, so that all take the same step. They meet in a file and talk over the
# loopback interface: neither gloo nor NCCL asks who connects.
# Hardened: train/distributed/, train/launch/
# Papers: Li et al. 2020 (arXiv 2006.15704)
def work(rank: int, s: Settings, folder: str) -> None:
    """Train as one of the processes, which meet in `folder`."""
    if s.processes > 1:  # Ctrl-C ends this process at once, also in a wait for the others
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = "lo" if sys.platform == "linux" else "lo0"
    sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")  # only the first prints
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:  # share the cores; another number of threads adds in another order
        backend, device = "gloo", torch.device("cpu")
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // s.processes))
    store = dist.FileStore(f"{folder}/store", s.processes)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=s.processes)
    train(s, device)
    dist.destroy_process_group()


def wrap(gpt: GPT, s: Settings, device: torch.device) -> DistributedDataParallel:
    """Wrap the model in DDP, and have it settle how it adds gradients.

    DDP rearranges its buckets after the first backward pass, and then sums in another order. With
    two passes over made-up tokens at each start, a resumed run adds as one that never stopped.
    """
    ids = [device] if device.type == "cuda" else None
    ddp = DistributedDataParallel(gpt, device_ids=ids, gradient_as_bucket_view=True)
    made_up = torch.zeros(s.micro_batch, s.block_size, dtype=torch.int64, device=device)
    for _ in range(2):
        loss_of(ddp, (made_up, made_up), s).backward()
    return ddp


# -- Training --------------------------------------------------------------------------------------
# A step: read a batch, add up the gradients of its micro-batches, clip, update. Only the last
# micro-batch averages over the processes; `no_sync` saves the others the traffic. The loss is a sum
# over tokens, divided once by the batch's tokens: processes and micro-batches change only rounding.
# Hardened: train/trainer.py, train/loop.py, train/monitor/
def train(s: Settings, device: torch.device) -> None:
    """Train from the checkpoint, or from scratch, to the last step."""
    T, count, rank = s.block_size, s.batch_tokens // s.block_size, dist.get_rank()
    data, held_out = Stream(s.tokens, "train"), Stream(s.tokens, "val")
    gpt = GPT(s).to(device)
    optimizer = make_optimizer(gpt, s)
    done = restore(gpt, optimizer, s, device)
    ddp = wrap(gpt, s, device)
    optimizer.zero_grad(set_to_none=False)  # the gradients are views into DDP's buckets: keep them
    scale = s.processes / s.batch_tokens  # DDP divides by the number of processes; undo that
    clock, since = time.perf_counter(), done
    for step in range(done, s.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, s)
        samples = windows(step * count, count, (len(data) - 1) // T, s.seed)
        mine = samples.reshape(-1, s.processes, s.micro_batch)[:, rank] * T
        total = torch.zeros((), device=device)
        for number, starts in enumerate(mine.tolist(), start=1):
            with nullcontext() if number == len(mine) else ddp.no_sync():
                loss = loss_of(ddp, data.batch(starts, T, device), s) * scale
                loss.backward()
            total += loss.detach()
        norm = clip(list(gpt.parameters()), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        done = step + 1
        logs, validates, saves = (
            done % every == 0 or done == s.steps
            for every in (s.log_every, s.val_every, s.checkpoint_every)
        )
        if logs or saves:
            dist.all_reduce(total)
            if not math.isfinite(total.item() + norm.item()):
                sys.exit(f"step {done}: loss or gradient is NaN or Inf; try a lower learning_rate")
        if logs:
            speed = (done - since) * s.batch_tokens / (time.perf_counter() - clock)
            print(f"step {done}: loss {total.item() / s.processes:.4f}, {speed:,.0f} tokens/s")
            clock, since = time.perf_counter(), done
        if validates:
            print(f"step {done}: validation loss {validate(gpt, held_out, s, device):.4f}")
        if saves and rank == 0:
            save(gpt, optimizer, done, s)


def main(argv: list[str] | None = None) -> None:
    """Train GPT-2; each setting is a flag."""
    parser = argparse.ArgumentParser(prog="train/one_page.py", description=main.__doc__)
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    s = Settings(**vars(parser.parse_args(argv)))
    T, unit = s.block_size, s.processes * s.micro_batch * s.block_size
    if not 1 <= unit <= s.batch_tokens or s.batch_tokens % unit:
        sys.exit(f"batch_tokens: no multiple of processes * micro_batch * block_size, {unit}")
    if s.dtype not in ("float32", "bfloat16"):
        sys.exit(f"dtype: float32 or bfloat16, not {s.dtype}")
    if not T <= s.val_tokens < len(Stream(s.tokens, "val")) or len(Stream(s.tokens, "train")) <= T:
        sys.exit(f"val_tokens, block_size: too many for {s.tokens}, or val_tokens below block_size")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: end the others, clean up
    with tempfile.TemporaryDirectory() as folder:
        try:
            if s.processes == 1:
                return work(0, s, folder)
            spawn(work, (s, folder), s.processes, daemon=True)
        except (KeyboardInterrupt, ProcessExitedException) as error:
            sys.exit(str(error) or "stopped; the same command resumes")


if __name__ == "__main__":
    main()
