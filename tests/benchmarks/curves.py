"""Compare our training curves with a plain training loop over `transformers`, on real text.

    python -m tests.benchmarks.curves FOLDER --text PARQUET... [--minutes N] [--only ours|plain]

`ours` is `python -m train.launch` with two processes. `plain` is one process, one loop and
`transformers.GPT2LMHeadModel`: no DDP, no loader, no module of train/ except the sampling order,
because both need the same data. Schedule, decay groups, gradient norm (in float64), clipping and
AdamW are written again from their papers. Both start from the same weights. If losses, gradient
norms and learning rates agree, neither has a bug that the other has not.

Both runs can be resumed: with --minutes each call continues for that long, and exits with status 3
if the runs are not finished. Numbers and `curves.png` cover the steps that both have done.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline import Manifest
from pipeline.runtime.params_file import read_yaml
from pipeline.store import atomic

REPO = Path(__file__).parents[2]
MODEL: dict[str, Any] = {"size": None, "n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 256}
TRAIN: dict[str, Any] = {
    "steps": 1600, "batch_tokens": 4096, "learning_rate": 2e-3, "warmup_steps": 80,
    "dtype": "float32", "val_every": 50, "val_tokens": 16384, "checkpoint_every": 50,
    "log_every": 1,
}  # fmt: skip
# A process may wait for long on a machine that is shared with others.
MACHINE = {
    "GPT2_PROCESSES": "2", "GPT2_DEVICE": "cpu", "GPT2_COMPILE": "true", "GPT2_TIMEOUT": "7200",
}  # fmt: skip
STOPPED = 3


def prepare(folder: Path, text: list[Path]) -> None:
    """Make a project with a copy of the code and the tokens of parquet files."""
    if (folder / "data/verified.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pipeline", "model", "train"):
        shutil.copytree(REPO / name, folder / name, dirs_exist_ok=True)
    shutil.copy(REPO / "dvc.yaml", folder)
    params = read_yaml(REPO / "params.yaml")
    params["sources"]["main"] |= {"kind": "files", "paths": [str(path.absolute()) for path in text]}
    params["tokenize"] |= {"shard_tokens": 1_000_000, "val_per_10k": 200}
    params["model"], params["train"] = MODEL, params["train"] | TRAIN
    (folder / "params.yaml").write_text(json.dumps(params, indent=1))  # JSON is YAML
    for stage in ("download", "tokenize", "verify"):
        subprocess.run([sys.executable, "-m", f"pipeline.{stage}"], cwd=folder, check=True)


def ours(folder: Path, seconds: float) -> None:
    """Run `train.launch`, which resumes, and stop it with SIGTERM after ``seconds``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train.launch"],
        cwd=folder,
        env={**os.environ, **MACHINE, "OMP_NUM_THREADS": "1"},
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    if process.wait() not in (0, STOPPED):
        sys.exit(process.returncode)


def read_log(path: Path, names: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """Read a run's log: curve -> step -> value, for the keys of the log by curve."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        curve: {record["step"]: record[name] for record in records if name in record}
        for curve, name in names.items()
    }


def both_logs(folder: Path) -> list[dict[str, dict[int, float]]]:
    """Read the logs of our run and of the plain one."""
    (ours,) = (folder / ".work/runs").glob("*/log.jsonl")
    names = {"loss": "train/loss", "val": "val/loss", "norm": "grad_norm", "lr": "lr"}
    return [
        read_log(ours, {**names, "spike": "spike"}),
        read_log(folder / "plain.jsonl", {name: name for name in names}),
    ]


def rate(step: int) -> float:
    """Learning rate: linear warm-up, then a cosine to a tenth at the last step; steps from 0."""
    peak, warmup, last = TRAIN["learning_rate"], TRAIN["warmup_steps"], TRAIN["steps"] - 1
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2)


def all_tokens(folder: Path, split: str) -> np.ndarray:
    """Read the tokens of a split with plain numpy."""
    tokens = folder / "data/tokens"
    names = [shard.name for shard in Manifest.load(tokens).shards if shard.split == split]
    return np.concatenate([np.fromfile(tokens / name, "<u2")[512:] for name in names])


def plain(folder: Path, seconds: float) -> None:
    """Continue the run over `transformers` for ``seconds``, or to its end."""
    import transformers

    from model import GPT, GPTConfig
    from train import DataOrder

    end = time.monotonic() + seconds
    params = read_yaml(folder / "params.yaml")["train"]
    T, rows = MODEL["block_size"], TRAIN["batch_tokens"] // MODEL["block_size"]
    train_tokens, val_tokens = all_tokens(folder, "train"), all_tokens(folder, "val")
    order = DataOrder(n_tokens=len(train_tokens), block_size=T, seed=params["seed"])

    sizes = {key: value for key, value in MODEL.items() if key != "size"}
    GPT.initialised(GPTConfig(**sizes), seed=params["seed"]).to_hf(folder / "initial")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "initial")
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # with embeddings, the tied one once
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    done, lines, saved = 0, [], folder / "plain.pt"
    if saved.exists():
        state = torch.load(saved)
        done, lines = state["done"], state["lines"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def loss_of(tokens: np.ndarray, first: int) -> torch.Tensor:
        window = torch.from_numpy(tokens[first : first + T + 1].astype(np.int64))
        return F.cross_entropy(model(window[None, :-1]).logits[0], window[1:])

    def validate() -> float:
        n = TRAIN["val_tokens"] // T  # complete windows only
        with torch.no_grad():
            return sum(loss_of(val_tokens, w * T).item() for w in range(n)) / n

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        part = saved.with_suffix(".part")
        torch.save({"done": done, "lines": lines, **state}, part)
        part.replace(saved)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        atomic.write_bytes(folder / "plain.jsonl", text.encode())

    while done < TRAIN["steps"] and time.monotonic() < end:
        for group in optimizer.param_groups:
            group["lr"] = rate(done)
        windows = order.samples(done * rows, rows)
        indices = windows[:, None] * T + np.arange(T + 1)
        total = 0.0
        for part in np.split(train_tokens[indices].astype(np.int64), 4):
            batch = torch.from_numpy(part)
            logits = model(batch[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / 4
            loss.backward()
            total += loss.item()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.tensor(norm))
        optimizer.step()
        optimizer.zero_grad()
        line = {"step": done + 1, "loss": total, "norm": norm, "lr": rate(done)}
        done += 1
        if done % TRAIN["val_every"] == 0:
            line["val"] = validate()
            print(f"plain: step {done}, loss {total:.4f}, val {line['val']:.4f}", flush=True)
        lines.append(line)
        if done % TRAIN["checkpoint_every"] == 0:
            save()
    save()


def compare(folder: Path) -> None:
    """Print how far the curves are apart, and plot them."""
    mine, theirs = both_logs(folder)
    steps = sorted(mine["loss"].keys() & theirs["loss"].keys())
    print(f"{len(steps)} of {TRAIN['steps']} steps, {len(steps) * TRAIN['batch_tokens']:,} tokens")

    def difference(name: str, among: list[int]) -> np.ndarray:
        return np.abs([mine[name][s] - theirs[name][s] for s in among])

    print(f"loss, largest difference in steps 1 to 20: {difference('loss', steps[:20]).max():.1e}")
    for first, last in ((20, 100), (100, 300), (300, len(steps))):
        apart = difference("loss", steps[first:last])
        if not len(apart):
            break
        until = first + len(apart)
        print(f"  steps {first + 1} to {until}: mean {apart.mean():.1e}, max {apart.max():.1e}")
    relative = difference("norm", steps) / [theirs["norm"][s] for s in steps]
    print(f"gradient norm: mean relative difference {relative.mean():.1e}")
    print(f"learning rate: largest difference {difference('lr', steps).max():.1e}")
    if validated := sorted(mine["val"].keys() & theirs["val"].keys()):
        print(f"validation: largest difference {difference('val', validated).max():.1e}")
        last = validated[-1]
        print(f"  at step {last}: ours {mine['val'][last]:.4f}, plain {theirs['val'][last]:.4f}")
    losses = np.array([loss for _, loss in sorted(mine["loss"].items())])
    rises = [losses[i] - np.median(losses[i - 20 : i]) for i in range(20, len(losses))]
    if rises:
        print(f"our {len(losses)} steps: {len(mine['spike'])} spikes logged")
        print(f"  largest rise of the loss over the median of the 20 before: {max(rises):.3f}")
    draw(mine, theirs, folder / "curves.png")


def draw(mine: dict[str, dict[int, float]], theirs: dict[str, Any], path: Path) -> None:
    """Plot the curves of both runs and the difference of the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for axes, name in zip(panels, ("loss", "norm", "lr"), strict=False):
        for label, curve, style in (("ours", mine, "-"), ("plain transformers", theirs, "--")):
            axes.plot(*zip(*sorted(curve[name].items()), strict=True), style, label=label, lw=1)
        axes.set_title({"loss": "loss, nats", "norm": "gradient norm", "lr": "learning rate"}[name])
    for label, curve, marker in (("ours, val", mine, "o"), ("plain, val", theirs, "x")):
        validated = sorted(curve["val"].items())
        panels[0].plot([s for s, _ in validated], [v for _, v in validated], marker, label=label)
    gap = {
        s: abs(v - theirs["loss"][s]) + 1e-9 for s, v in mine["loss"].items() if s in theirs["loss"]
    }
    panels[3].semilogy(*zip(*sorted(gap.items()), strict=True), lw=1)
    panels[3].set_title("difference of the losses, nats")
    for axes in panels:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=80)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.curves")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="parquet files")
    parser.add_argument(
        "--minutes", type=float, default=1e4, help="time limit per run (default 10000)"
    )
    parser.add_argument("--only", choices=["ours", "plain"])
    args = parser.parse_args()
    folder = args.folder.absolute()
    prepare(folder, args.text)
    if args.only != "plain":
        ours(folder, 60 * args.minutes)
    if args.only != "ours":
        plain(folder, 60 * args.minutes)
    both = (folder / "plain.jsonl").exists() and (folder / ".work/runs").exists()
    if both:
        compare(folder)
    if not both or min(max(log["loss"]) for log in both_logs(folder)) < TRAIN["steps"]:
        print("not finished: run the same command again to continue", flush=True)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
