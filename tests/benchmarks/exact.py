"""Compare each step of `train.launch` with a training loop in float64.

    python -m tests.benchmarks.exact [--optimizer muon] [--shards FILE...]

`ours` is the command with two processes, two micro-steps each, in float32. `exact` is one loop over
the same windows: model, loss, gradient norm, clipping, schedule, decay groups and optimizer are
written again from their papers, in float64, with no module of train/ except the sampling order.
Both start from the same weights. Printed are losses, norms and rates side by side, their largest
differences, and how far the weights are apart at the end. Takes some minutes on two cores.

Rounding errors grow during training. How much is shown by `exact` beside a second float64 loop,
whose initial weights differ by 6e-8 of themselves, the rounding of float32.

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
    "dtype": "float32", "val_every": 300, "checkpoint_every": 300, "log_every": 1,
    "sample_tokens": 0,
}  # fmt: skip
VOCAB = 50257
SHOWN = (1, 2, 3, 10, 30, 31, 100, 200, 300)
MOMENTUM, NEWTON_SCHULZ = 0.95, (3.4445, -4.7750, 2.0315)

Weights = dict[str, Tensor]
Curves = dict[str, list[float]]


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
        return (x.T if g.shape[0] > g.shape[1] else x).double()


def exact(
    order: DataOrder, tokens: np.ndarray, muon: torch.dtype | None = None, noise: float = 0.0
) -> tuple[Curves, Weights]:
    """Train in float64.

    Args:
        muon: Its dtype, for the matrices of the blocks; None: AdamW for all.
        noise: Relative, added to the initial weights.
    """
    generator = torch.Generator().manual_seed(0)
    gpt = GPT.initialised(GPTConfig(**MODEL), seed=TRAIN["seed"])
    w = {name: p.detach().double().requires_grad_() for name, p in gpt.named_parameters()}
    with torch.no_grad():
        for p in w.values():
            p *= 1 + noise * torch.randn(p.shape, generator=generator)
    optimizers: dict[str, AdamW | Muon] = {
        name: Muon(p.detach(), muon, 3 if "c_attn" in name else 1)
        if muon is not None and name.startswith("h.") and p.dim() == 2
        else AdamW(p.detach())
        for name, p in w.items()
    }
    T, rows = MODEL["block_size"], TRAIN["batch_tokens"] // MODEL["block_size"]
    curves: Curves = {"train/loss": [], "grad_norm": [], "lr": []}
    for step in range(TRAIN["steps"]):
        windows = order.samples(step * rows, rows)[:, None] * T + np.arange(T + 1)
        loss = summed_loss(w, torch.from_numpy(tokens[windows].astype(np.int64))) / (rows * T)
        gradients = torch.autograd.grad(loss, list(w.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            scale = min(1.0, TRAIN["grad_clip"] / (norm + 1e-6))  # PyTorch adds 1e-6
            for (name, p), g in zip(w.items(), gradients, strict=True):
                optimizers[name].update(p, g * scale, rate(step))
        for curve, value in zip(curves.values(), (loss.item(), norm, rate(step)), strict=True):
            curve.append(value)
    return curves, {name: p.detach() for name, p in w.items()}


def ours(project: Project) -> tuple[Curves, Weights]:
    """Run `train.launch` in a project; return its log and its weights."""
    command = [sys.executable, "-m", "train.launch"]
    machine = {"GPT2_PROCESSES": 2, "GPT2_MICRO_BATCH": 2, "GPT2_TIMEOUT": 7200}
    subprocess.run(command, cwd=project.folder, env=project.environ(**machine), check=True)
    lines = (project.folder / "artifacts/log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    curves = {key: [r[key] for r in records] for key in ("train/loss", "grad_norm", "lr")}
    return curves, load_file(project.folder / "artifacts/checkpoint/model.safetensors")


def compare(mine: tuple[Curves, Weights], right: tuple[Curves, Weights]) -> None:
    """Print two runs side by side, and their largest differences."""
    a, b = mine[0], right[0]
    print(f"{'step':>5} {'loss':>10} {'exact':>10} {'norm':>10} {'exact':>10} {'rate':>10} exact")
    for i in (step - 1 for step in SHOWN):
        print(f"{i + 1:5d}", *(f"{c[k][i]:10.7f}" for k in a for c in (a, b)))

    def difference(key: str) -> np.ndarray:
        return np.abs(np.subtract(a[key], b[key]))

    clipped = sum(norm > TRAIN["grad_clip"] for norm in b["grad_norm"])
    print(f"{len(b['lr'])} steps, clipped in {clipped}; largest differences:")
    loss = difference("train/loss")
    print(f"  loss {loss.max():.1e} nats, mean {loss.mean():.1e}")
    print(f"  gradient norm {(difference('grad_norm') / b['grad_norm']).max():.1e} of it")
    print(f"  rate {(difference('lr') / b['lr']).max():.1e} of it")
    apart = {n: float((mine[1][n].double() - w).norm() / w.norm()) for n, w in right[1].items()}
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
        mine = ours(project)
    T = MODEL["block_size"]
    order = DataOrder(n_tokens=len(tokens), block_size=T, seed=TRAIN["seed"])
    if args.optimizer == "adamw":
        right = exact(order, tokens)
        print("\nours beside float64")
        compare(mine, right)
        print("\nfloat64 beside float64 from rounded weights")
        compare(exact(order, tokens, noise=6e-8), right)
        return
    for muon in (torch.bfloat16, torch.float64):
        print(f"\nours beside float64, orthogonalized in {muon}")
        compare(mine, exact(order, tokens, muon))


if __name__ == "__main__":
    main()
