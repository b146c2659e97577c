"""Compare each step of `train.launch` with a training loop in float64.

    python -m tests.benchmarks.exact [--optimizer muon] [--shards FILE...]

`ours` is the command with two processes, two micro-steps each, in float32. `exact` is one loop over
the same windows: model, loss, gradient norm, clipping, schedule, decay groups and optimizer are
written again from their papers, in float64, with no module of train/ except the sampling order.
Both start from the same weights. Printed are losses, norms and rates side by side, their largest
differences, and how far the weights are apart at the end. Takes ten minutes on two cores and 6 GB
of temporary files: the checkpoint of each step.

Rounding errors grow during training, so two more comparisons show what of the difference is no
rounding: `exact` in float32, which shares no operation with `ours`; and each step of `exact` from
the weights that `ours` had there, so that nothing grows.

Muon orthogonalizes in bfloat16, here as in its published code (KellerJordan/Muon). So `exact` runs
twice: with that rounding of the orthogonalization alone, and in float64 throughout.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import GPT, GPTConfig
from tests.support.training import Project, make_project, some_tokens, write_tokens
from train import DataOrder

MODEL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
TRAIN: dict[str, Any] = {
    "steps": 300, "batch_tokens": 256, "learning_rate": 1e-3, "warmup_steps": 60, "grad_clip": 0.7,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "min_lr_ratio": 0.1, "seed": 1,
    "dtype": "float32", "val_every": 300, "checkpoint_every": 1, "keep_every": 1,
    "log_every": 1, "sample_tokens": 0,
}  # fmt: skip
VOCAB = 50257
KEYS = ("train/loss", "grad_norm", "lr")
SHOWN = (1, 2, 3, 10, 30, 31, 100, 200, 300)
MOMENTUM, NEWTON_SCHULZ = 0.95, (3.4445, -4.7750, 2.0315)

Weights = dict[str, Tensor]
Curves = dict[str, list[float]]
Run = tuple[Curves, Weights]


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def summed_loss(w: Weights, tokens: Tensor) -> Tensor:
    """Loss of GPT-2 (Radford et al. 2019), summed over the targets of (B, T + 1) tokens."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    B, T = inputs.shape
    heads, width = MODEL["n_head"], MODEL["n_embd"] // MODEL["n_head"]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = w["wte.weight"][inputs] + w["wpe.weight"][:T]
    for i in range(MODEL["n_layer"]):

        def linear(name: str, a: Tensor, i: int = i) -> Tensor:
            return a @ w[f"h.{i}.{name}.weight"].T + w[f"h.{i}.{name}.bias"]

        def norm(name: str, a: Tensor, i: int = i) -> Tensor:
            return layer_norm(a, w[f"h.{i}.{name}.weight"], w[f"h.{i}.{name}.bias"])

        q, k, v = linear("attn.c_attn", norm("ln_1", x)).chunk(3, -1)
        q, k, v = (a.view(B, T, heads, width).transpose(1, 2) for a in (q, k, v))
        scores = (q @ k.mT / math.sqrt(width)).masked_fill(hidden, -math.inf)
        x = x + linear("attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
        a = linear("mlp.c_fc", norm("ln_2", x))
        gelu = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + linear("mlp.c_proj", gelu)
    logits = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"][:VOCAB].T
    return (logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]).sum()


def rate(step: int) -> float:
    """Linear warm-up, then a cosine to a fraction of the peak at the last step; from 0."""
    peak, warmup, low = TRAIN["learning_rate"], TRAIN["warmup_steps"], TRAIN["min_lr_ratio"]
    if step < warmup:
        return float(peak * (step + 1) / warmup)
    done = (step - warmup) / (TRAIN["steps"] - 1 - warmup)
    return float(peak * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2))


class AdamW:
    """One parameter's AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, w: Tensor) -> None:
        self.m, self.v, self.t = torch.zeros_like(w), torch.zeros_like(w), 0
        self.decay = TRAIN["weight_decay"] if w.dim() >= 2 else 0.0

    def update(self, w: Tensor, g: Tensor, lr: float) -> None:
        b1, b2 = TRAIN["beta1"], TRAIN["beta2"]
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        w -= lr * (m / (v.sqrt() + TRAIN["eps"]) + self.decay * w)


class Muon:
    """One matrix's Muon (kellerjordan.github.io/posts/muon), scaled as by Liu et al. 2025."""

    def __init__(self, w: Tensor, dtype: torch.dtype, parts: int) -> None:
        self.m, self.dtype, self.parts = torch.zeros_like(w), dtype, parts

    def update(self, w: Tensor, g: Tensor, lr: float) -> None:
        self.m = MOMENTUM * self.m + (1 - MOMENTUM) * g
        nesterov = MOMENTUM * self.m + (1 - MOMENTUM) * g
        step = torch.cat([self.orthogonal(part) for part in nesterov.chunk(self.parts)])
        rows, columns = w.shape[0] // self.parts, w.shape[1]
        w -= lr * (0.2 * math.sqrt(max(rows, columns)) * step + TRAIN["weight_decay"] * w)

    def orthogonal(self, g: Tensor) -> Tensor:
        """Five Newton-Schulz iterations, on the smaller side."""
        a, b, c = NEWTON_SCHULZ
        x = (g.T if g.shape[0] > g.shape[1] else g).to(self.dtype)
        x = x / x.norm()
        for _ in range(5):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)


class Exact:
    """The training loop.

    Args:
        muon: Its dtype, for the matrices of the blocks; None: AdamW for all.
        dtype: Of everything else.
    """

    def __init__(
        self,
        order: DataOrder,
        tokens: np.ndarray,
        muon: torch.dtype | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.order, self.tokens = order, tokens
        gpt = GPT.initialised(GPTConfig(**MODEL), seed=TRAIN["seed"])
        self.w = {n: p.detach().to(dtype).requires_grad_() for n, p in gpt.named_parameters()}
        self.optimizers: dict[str, AdamW | Muon] = {
            name: Muon(p.detach(), muon, 3 if "c_attn" in name else 1)
            if muon is not None and name.startswith("h.") and p.dim() == 2
            else AdamW(p.detach())
            for name, p in self.w.items()
        }

    def step(self, step: int) -> tuple[float, float, float]:
        """Train one step; return loss, gradient norm and rate."""
        T, rows = MODEL["block_size"], TRAIN["batch_tokens"] // MODEL["block_size"]
        windows = self.order.samples(step * rows, rows)[:, None] * T + np.arange(T + 1)
        batch = torch.from_numpy(self.tokens[windows].astype(np.int64))
        loss = summed_loss(self.w, batch) / (rows * T)
        gradients = torch.autograd.grad(loss, list(self.w.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            scale = min(1.0, TRAIN["grad_clip"] / (norm + 1e-6))  # PyTorch adds 1e-6
            for (name, p), g in zip(self.w.items(), gradients, strict=True):
                self.optimizers[name].update(p, g * scale, rate(step))
        return loss.item(), norm, rate(step)

    def run(self) -> Run:
        """Train all steps."""
        values = [self.step(step) for step in range(TRAIN["steps"])]
        return curves(values), self.w

    def follow(self, folders: list[Path]) -> Run:
        """Train each step from the weights of the checkpoint before it, with own moments.

        Prints the largest distance of the weights after one step.
        """
        values, apart = [], dict.fromkeys(self.w, 0.0)
        theirs: Weights = {}
        for step, folder in enumerate(folders):
            for name, w in theirs.items():
                self.w[name].detach().copy_(w)
            values.append(self.step(step))
            theirs = load_file(folder / "model.safetensors")
            for name, w in theirs.items():
                apart[name] = max(apart[name], distance(w, self.w[name].detach()))
        worst = max(apart, key=lambda name: apart[name])
        print(f"\nweights after one step: at most {apart[worst]:.1e} of their norm ({worst})")
        return curves(values), self.w


def curves(values: Iterable[tuple[float, ...]]) -> Curves:
    return dict(zip(KEYS, map(list, zip(*values, strict=True)), strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    """Distance of weights, as a fraction of the norm of the second."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def ours(project: Project) -> tuple[Run, list[Path]]:
    """Run `train.launch` in a project; return its log and weights, and its checkpoints."""
    command = [sys.executable, "-m", "train.launch"]
    machine = {"GPT2_PROCESSES": 2, "GPT2_MICRO_BATCH": 2, "GPT2_TIMEOUT": 7200}
    subprocess.run(command, cwd=project.folder, env=project.environ(**machine), check=True)
    lines = (project.folder / "artifacts/log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    checkpoints = sorted(project.folder.glob(".work/runs/*/step-*"))
    assert len(checkpoints) == TRAIN["steps"], checkpoints
    weights = load_file(project.folder / "artifacts/checkpoint/model.safetensors")
    return (curves(tuple(r[key] for key in KEYS) for r in records), weights), checkpoints


def compare(title: str, mine: Run, right: Run) -> None:
    """Print two runs side by side, and their largest differences."""
    a, b = mine[0], right[0]
    print(f"\n{title}")
    print(f"{'step':>5} {'loss':>10} {'exact':>10} {'norm':>10} {'exact':>10} {'rate':>10} exact")
    for i in (step - 1 for step in SHOWN):
        print(f"{i + 1:5d}", *(f"{c[k][i]:10.7f}" for k in KEYS for c in (a, b)))

    def difference(key: str) -> np.ndarray:
        return np.abs(np.subtract(a[key], b[key]))

    clipped = sum(norm > TRAIN["grad_clip"] for norm in b["grad_norm"])
    print(f"{len(b['lr'])} steps, clipped in {clipped}; largest differences:")
    loss = difference("train/loss")
    early = loss[:30].max()
    print(f"  loss {loss.max():.1e} nats, mean {loss.mean():.1e}, up to step 30 {early:.1e}")
    print(f"  gradient norm {(difference('grad_norm') / b['grad_norm']).max():.1e} of it")
    print(f"  rate {(difference('lr') / b['lr']).max():.1e} of it")
    apart = {name: distance(mine[1][name], w) for name, w in right[1].items()}
    worst = max(apart, key=lambda name: apart[name])
    print(f"  weights after the last step: {apart[worst]:.1e} of their norm ({worst})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.exact")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--shards", type=Path, nargs="+", help="tokens in llm.c's format")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes of `ours`
    torch.set_num_threads(1)
    parts = [np.fromfile(path, "<u2")[512:] for path in args.shards or ()]
    tokens = np.concatenate(parts) if parts else some_tokens(200_000, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        project.write(model=MODEL, train={**TRAIN, "optimizer": args.optimizer})
        splits = {"train": [tokens], "val": [some_tokens(2000, seed=2)]}
        write_tokens(project.folder / "data/tokens", splits)
        project.verify()
        T = MODEL["block_size"]
        order = DataOrder(n_tokens=len(tokens), block_size=T, seed=TRAIN["seed"])
        mine, checkpoints = ours(project)
        muon = torch.bfloat16 if args.optimizer == "muon" else None
        right = Exact(order, tokens, muon).run()
        compare("ours beside float64", mine, right)
        plain = Exact(order, tokens, muon, dtype=torch.float32).run()
        compare("a plain loop in float32 beside float64", plain, right)
        followed = Exact(order, tokens, muon).follow(checkpoints)
        compare("ours beside float64, each step from our weights", mine, followed)
        if muon is not None:
            right = Exact(order, tokens, torch.float64).run()
            compare("ours beside float64, orthogonalized in float64", mine, right)


if __name__ == "__main__":
    main()
