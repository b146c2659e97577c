"""Measure training recipes rung by rung, with seeds: the tables and the plot of docs/recipe.md.

    python -m tests.benchmarks.ladder FOLDER [--text PARQUET...] [--jobs N] [--sizes small]

A rung is a recipe: keys of the sections `model` and `train` on top of another rung's. Each rung is
trained at each size with each seed, by the program itself on tokens of the project's own pipeline
(without --text the sample's), in a process with one thread, ``--jobs`` of them side by side.
A finished run is kept in FOLDER/results/, an unfinished one resumes: the command can be stopped at
any time. At the end it prints the tables (ladder_tables.py) and draws FOLDER/ladder.png; --write
puts both into docs/.

Results are kept by parameters and data, not by code, which each of them records: after a change of
the code, delete one result and see that the same loss comes back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.format.manifest import Manifest
from pipeline.runtime.params_file import read_yaml
from pipeline.store import atomic
from tests.benchmarks.ladder_tables import (
    Size,
    draw,
    effects_table,
    fill,
    noise_table,
    reached_table,
    search_table,
)
from train.params import ModelParams

REPO = Path(__file__).parents[2]
Values = dict[str, Any]

# What all rungs share: 200 steps of 512 tokens, in windows of 128.
COMMON: Values = {
    "size": None, "block_size": 128, "batch_tokens": 512, "steps": 200, "dtype": "bfloat16",
    "val_every": 100, "val_tokens": 32768, "checkpoint_every": 200, "keep_checkpoints": 1,
    "sample_tokens": 0, "log_every": 1,
}  # fmt: skip
SIZES: dict[str, Values] = {
    "small": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "middle": {"n_layer": 3, "n_head": 4, "n_embd": 64},
    "large": {"n_layer": 4, "n_head": 6, "n_embd": 96},
}
SEEDS = (1, 2, 3)
SEARCH_SEED = 0  # learning rates are chosen with a seed that no rung is measured with
# Freed memory is kept, not given back to the system: a step takes 0.35 s instead of 0.63.
ENVIRONMENT = {
    "GPT2_DEVICE": "cpu", "GPT2_PROCESSES": "1", "GPT2_COMPILE": "false",
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592",
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """A recipe.

    Attributes:
        base: Rung that it changes, and is compared with; None: the first.
        changes: Keys of `model` and `train`, and their values.
        sizes: Where it is trained.
        average: Number of checkpoints at the end whose mean weights are measured; 0: none.
    """

    base: str | None
    changes: Values
    sizes: tuple[str, ...] = tuple(SIZES)
    average: int = 0


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        rung: Name of its rung.
        size: Name of its size.
        params: All keys of `model` and `train` that it sets.
        average: As in `Rung`.
    """

    rung: str
    size: str
    params: Values
    average: int = 0

    @property
    def seed(self) -> int:
        seed: int = self.params["seed"]
        return seed

    def key(self, dataset_key: str) -> str:
        """Name of its result."""
        identity = {"params": self.params, "average": self.average, "dataset": dataset_key}
        return atomic.sha256_json(identity)[:16]


SMALL = ("small",)
RUNGS: dict[str, Rung] = {
    # GPT-3's recipe (Brown et al. 2020, appendix B, 125M): 6e-4 and a cosine to a tenth; the
    # warm-up is the part of the run that llm.c gives it, 3.6 %.
    "classic": Rung(None, {
        "optimizer": "adamw", "learning_rate": 6e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
        "weight_decay": 0.1, "embeddings_decay": True, "grad_clip": 1.0,
        "schedule": "cosine", "warmup_steps": 7, "min_lr_ratio": 0.1,
    }),
    "tuned": Rung("classic", {
        "learning_rate": 8e-3, "beta2": 0.99, "embeddings_decay": False,
        "schedule": "wsd", "warmup_steps": 20, "decay_ratio": 0.5, "min_lr_ratio": 0.0,
    }),
    "tuned, 60 % of the steps": Rung("classic", {
        "learning_rate": 8e-3, "beta2": 0.99, "embeddings_decay": False, "steps": 120,
        "schedule": "wsd", "warmup_steps": 12, "decay_ratio": 0.5, "min_lr_ratio": 0.0,
    }),
    "muon": Rung("tuned", {"optimizer": "muon", "learning_rate": 16e-3}),
    "modern": Rung("muon", {
        "positions": "rotary", "qk_norm": True, "activation": "relu_squared", "zero_init": True,
    }),
    # Single changes of `muon`, at the small size.
    "rotary": Rung("muon", {"positions": "rotary"}, SMALL),
    "qk-norm": Rung("muon", {"qk_norm": True}, SMALL),
    "relu-squared": Rung("muon", {"activation": "relu_squared"}, SMALL),
    "zero-init": Rung("muon", {"zero_init": True}, SMALL),
    "embeddings-lr-x3": Rung("muon", {"embeddings_lr_ratio": 3.0}, SMALL),
    "embeddings-lr-x0.3": Rung("muon", {"embeddings_lr_ratio": 0.3}, SMALL),
    "embeddings-decay": Rung("muon", {"embeddings_decay": True}, SMALL),
    "beta2-0.95": Rung("muon", {"beta2": 0.95}, SMALL),
    "warmup-3.5%": Rung("muon", {"warmup_steps": 7}, SMALL),
    "decay-to-a-tenth": Rung("muon", {"min_lr_ratio": 0.1}, SMALL),
    "cosine-to-zero": Rung("muon", {"schedule": "cosine"}, SMALL),
    "decay-20%": Rung("muon", {"decay_ratio": 0.2}, SMALL),
    "decay-90%": Rung("muon", {"decay_ratio": 0.9}, SMALL),
    "no-weight-decay": Rung("muon", {"weight_decay": 0.0}, SMALL),
    "cautious-decay": Rung("muon", {"cautious_decay": True}, SMALL),
    "linear-weight-decay": Rung("muon", {"weight_decay_schedule": "linear"}, SMALL),
    "average": Rung("muon", {"checkpoint_every": 10, "keep_every": 10}, SMALL, average=4),
}  # fmt: skip
LADDER = ("classic", "tuned", "tuned, 60 % of the steps", "muon", "modern")
SEARCHED = {"tuned": (2e-3, 4e-3, 8e-3, 16e-3), "muon": (4e-3, 8e-3, 16e-3, 32e-3)}


def changes(name: str) -> Values:
    """All keys that a rung sets, with those of the rungs below."""
    rung = RUNGS[name]
    return {**(changes(rung.base) if rung.base else {}), **rung.changes}


def trials(sizes: Sequence[str]) -> Iterator[Trial]:
    """Yield the runs of all rungs: size by size, one seed of each rung after another."""
    for size in sizes:
        for seed, (name, rung) in itertools.product(SEEDS, RUNGS.items()):
            if size in rung.sizes:
                params = {**COMMON, **SIZES[size], **changes(name), "seed": seed}
                yield Trial(name, size, params, rung.average)


def search() -> Iterator[Trial]:
    """Yield the runs that choose the learning rates, at the small size."""
    for name, rates in SEARCHED.items():
        for rate in rates:
            params = {**COMMON, **SIZES["small"], **changes(name), "seed": SEARCH_SEED}
            yield Trial(f"{name} at {rate:g}", "small", {**params, "learning_rate": rate})


def prepare(folder: Path, text: list[Path]) -> str:
    """Make tokens of parquet files, or of the sample, unless they are there.

    Returns:
        The dataset key.
    """
    if not (folder / "data/verified.json").exists():
        link_code(folder)
        params = read_yaml(REPO / "params.yaml")
        if text:
            params["sources"]["main"] |= {
                "kind": "files",
                "paths": [str(path.absolute()) for path in text],
            }
        params["tokenize"] |= {"shard_tokens": 1_000_000, "val_per_10k": 500}
        (folder / "params.yaml").write_text(json.dumps(params, indent=1))  # JSON is YAML
        for stage in ("download", "tokenize", "verify"):
            subprocess.run([sys.executable, "-m", f"pipeline.{stage}"], cwd=folder, check=True)
    return Manifest.load(folder / "data/tokens").dataset_key


def link_code(folder: Path) -> None:
    """Make a folder in which the commands run: with links to this checkout's code."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pipeline", "model", "train", "dvc.yaml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(REPO / name)


def train_trial(folder: Path, trial: Trial, result: Path) -> None:
    """Train a run in this process, and write its result.

    The result has ``val`` and ``train`` (lists of [tokens, loss]), ``loss`` (at the end, of the
    averaged weights where the trial asks for them), and ``step_cpu``, the median of the processor
    seconds per step, which other processes on the machine hardly change.
    """
    import torch

    from train.distributed.rendezvous import process_group
    from train.loop import train
    from train.run import Run

    here = folder / "runs" / result.stem
    link_code(here)
    if not (here / "data").exists():
        (here / "data").symlink_to(folder / "data")
    model, rest = sections(trial.params)
    params = read_yaml(REPO / "params.yaml") | {"model": model, "train": rest}
    os.chdir(here)
    Path("params.yaml").write_text(json.dumps(params))
    run = Run.open()
    with process_group("cpu") as world, timed_steps() as seconds:
        torch.set_num_threads(1)
        train(run, world)
    val = [[r["step"], r["val/loss"]] for r in run.history.records if "val/loss" in r]
    curve = [[r["step"], r["train/loss"]] for r in run.history.records if "train/loss" in r]
    loss = averaged_loss(run, trial.average) if trial.average else val[-1][1]
    record = {
        "rung": trial.rung, "size": trial.size, "params": trial.params, "average": trial.average,
        "loss": loss, "val": val, "train": curve, "step_cpu": statistics.median(seconds),
        "code_key": run.code_key, "dataset_key": run.dataset_key,
    }  # fmt: skip
    atomic.write_json(result, record)
    os.chdir(folder)
    shutil.rmtree(here)


def sections(params: Values) -> tuple[Values, Values]:
    """Split keys into those of `model` and those of `train`."""
    model = {key: value for key, value in params.items() if key in ModelParams.model_fields}
    return model, {key: value for key, value in params.items() if key not in model}


@contextmanager
def timed_steps() -> Iterator[list[float]]:
    """Record the processor seconds of this thread in each step of the trainer."""
    from train.trainer import Trainer

    seconds: list[float] = []
    original = Trainer.step

    def step(*args: Any) -> Any:
        before = time.thread_time()
        done = original(*args)
        seconds.append(time.thread_time() - before)
        return done

    with mock.patch.object(Trainer, "step", step):
        yield seconds


def averaged_loss(run: Any, n: int) -> float:
    """Measure the mean of the weights of a run's last ``n`` checkpoints, nats."""
    import torch

    from model import GPT
    from train.checkpoint import directory
    from train.validation import mean_loss

    saved = directory.checkpoints(run.folder)[-n:]
    weights = [directory.load_tensors(path)[0] for path in saved]
    gpt = GPT.initialised(run.model.config(), seed=0)
    gpt.load_state_dict({k: torch.stack([w[k] for w in weights]).mean(0) for k in weights[0]})
    return mean_loss(
        gpt,
        run.val_data,
        run.params.val_tokens,
        block_size=run.model.block_size,
        rows=run.split(1, "cpu").micro_batch,
        dtype=run.params.dtype,
        device=torch.device("cpu"),
    )


def result_path(folder: Path, dataset_key: str, trial: Trial) -> Path:
    """The file of a trial's result."""
    return folder / "results" / f"{trial.key(dataset_key)}.json"


def finished(folder: Path, dataset_key: str, wanted: Sequence[Trial]) -> list[Values]:
    """Read the results that exist."""
    paths = [result_path(folder, dataset_key, trial) for trial in wanted]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def measure(folder: Path, dataset_key: str, wanted: Sequence[Trial], jobs: int) -> None:
    """Train what has no result yet."""
    paths = {result_path(folder, dataset_key, trial): trial for trial in wanted}
    missing = {path: trial for path, trial in paths.items() if not path.exists()}
    print(f"{len(paths)} runs, {len(paths) - len(missing)} of them finished", flush=True)
    done, began = 0, time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train_trial, folder, t, path) for path, t in missing.items()]
        for future in as_completed(futures):
            future.result()
            done += 1
            minutes = (time.monotonic() - began) / 60
            print(f"{done} of {len(missing)} runs in {minutes:.1f} minutes", flush=True)


def report(results: Sequence[Values], searched: Sequence[Values]) -> dict[str, str]:
    """The tables of docs/recipe.md by the names of their markers."""
    sizes = by_size(results)
    bases = {name: rung.base for name, rung in RUNGS.items() if rung.base}
    ladder = {name: base for name, base in bases.items() if name in LADDER}
    single = {name: base for name, base in bases.items() if name not in LADDER}
    parts = {"noise": noise_table(sizes), "search": search_table(searched)}
    parts |= {f"ladder {name}": effects_table(size, ladder) for name, size in sizes.items()}
    parts["options"] = effects_table(sizes["small"], single)
    parts["reached"] = reached_table(sizes, LADDER[0], LADDER[1:])
    return parts


def by_size(results: Sequence[Values]) -> dict[str, Size]:
    """Group results by size."""
    names = [name for name in SIZES if any(r["size"] == name for r in results)]
    return {name: Size([r for r in results if r["size"] == name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ladder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="parquet files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rungs", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    parser.add_argument("--search", action="store_true", help="only the search of learning rates")
    parser.add_argument("--write", action="store_true", help="only put what is there into docs/")
    args = parser.parse_args()
    folder = args.folder.absolute()
    os.environ |= ENVIRONMENT
    dataset_key = prepare(folder, args.text)
    wanted = [trial for trial in trials(args.sizes) if trial.rung in args.rungs]
    if not args.write:
        measure(folder, dataset_key, list(search()) if args.search else wanted, args.jobs)
        return
    results = finished(folder, dataset_key, wanted)
    parts = report(results, finished(folder, dataset_key, list(search())))
    page = REPO / "docs/recipe.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
    draw(by_size(results), LADDER, REPO / "docs/ladder.png")


if __name__ == "__main__":
    main()
