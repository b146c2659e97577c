"""Descriptions of a run: the banner it prints, the record of each start, and its summary."""

from __future__ import annotations

import platform
import statistics
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from model.size import parameter_count
from train.checkpoint.init_from import first_step
from train.data.mixed_order import MixedOrder
from train.monitor.history import SOURCE_LOSS
from train.numerics import device_name, peak_memory, versions
from train.optim.param_groups import groups_table
from train.plan.fit import nominal_memory
from train.trainer import Trainer

# Files that DVC changes before or while a stage runs.
CHANGED_BY_DVC = ("dvc.lock", "metrics", "params.yaml")


def banner(trainer: Trainer, done: int) -> str:
    """Text that a run prints first, after ``done`` steps: model, data, batch and devices."""
    run, world, split, params = trainer.run, trainer.world, trainer.split, trainer.params
    config, eager = trainer.gpt.config, run.why_eager(world.device.type)
    variants = "".join(f", {name} {value}" for name, value in config.variants.items())
    return "\n".join(
        [
            f"training GPT-2, {parameter_count(config):,} parameters ({config.n_layer} layers, "
            f"{config.n_head} heads, width {config.n_embd}, context {config.block_size}"
            f"{variants}), on {len(run.train_data):,} tokens (dataset {run.dataset_key[:12]}): "
            f"{params.steps:,} steps of {params.batch_tokens:,} tokens{_ramp(trainer)}, "
            f"{run.tokens(params.steps):,} in all; "
            f"{world.size} x {device_name(world.device)}, "
            f"{split.micro_steps(run.batches.full)} micro-steps of "
            f"{split.micro_batch} sequences{_for_memory(trainer)}, {params.dtype}, "
            f"compile {'on' if trainer.compiled else 'off'}, "
            f"{f'attention {trainer.attention}, ' if trainer.attention else ''}"
            f"commit {commit() or 'unknown (no git here)'}",
            *([f"not compiled: {eager}"] if eager else []),
            *_sources(trainer),
            f"run {run.folder}: " + (f"resumes after step {done}" if done else "starts"),
            groups_table(trainer.groups, params.weight_decay, params.optimizer),
        ]
    )


def _sources(trainer: Trainer) -> list[str]:
    """Describe what the run will see of each source; nothing without `train.mixture`."""
    order = trainer.run.order
    if not isinstance(order, MixedOrder):
        return []
    shares = order.shares(trainer.run.samples(trainer.params.steps))
    shown = (
        f"{name} {share.share:.1%}, {share.tokens:,} tokens, {share.epochs:.3g} epochs"
        for name, share in shares.items()
    )
    return [f"sources of the samples: {'; '.join(shown)}"]


def _for_memory(trainer: Trainer) -> str:
    """What was chosen for the memory of a GPU, in addition to the micro-batch."""
    if trainer.gpu_memory is None:
        return ""
    gib = nominal_memory(trainer.gpu_memory) / 2**30
    chunk = trainer.gpt.loss_chunk
    return f" (for {gib:.0f} GiB){f', loss chunks of {chunk:,} tokens' if chunk else ''}"


def _ramp(trainer: Trainer) -> str:
    params, batches = trainer.params, trainer.run.batches
    if not params.batch_doublings:
        return ""
    first = batches.smallest * trainer.run.model.block_size
    return f" (from {first:,}, doubled {params.batch_doublings} x in {params.batch_ramp_steps:,})"


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Current commit, 12 digits, "-dirty" if code differs from it; None without git.

    It is only printed and logged: the keys are made from content.
    """

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=10)

    try:
        found = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        excluded = (f":(top,exclude){name}" for name in CHANGED_BY_DVC)
        changed = git("diff", "--quiet", "HEAD", "--", ":(top)", *excluded).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found + "-dirty" * (changed == 1) if found else None


def start_record(trainer: Trainer, done: int, peak: float | None) -> dict[str, Any]:
    """Record of one start, after ``done`` steps, for `starts.jsonl`; ``peak``: FLOP/s, if known."""
    run = trainer.run
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "commit": commit(),
        "dataset_key": run.dataset_key,
        "step": done,
        "device_name": device_name(trainer.world.device),
        "gpu_memory": trainer.gpu_memory,
        "peak_flops": peak,
        "arithmetic": trainer.arithmetic(),
        "versions": versions(),
        "machine": run.machine.model_dump(mode="json"),
    }


def summary(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """Facts of a run after its last step, for `artifacts/training.json`.

    ``seconds`` is the training time over all starts of the run.
    """
    run, world, history = trainer.run, trainer.world, trainer.run.history
    losses = history.last("train/loss", n=10)
    val_loss = trainer.measured
    assert val_loss is not None, "the last step is validated"
    start = run.params.start()
    inherited = run.tokens(first_step(start)) if start else 0  # tokens trained by another run
    tokens = run.tokens(run.params.steps)
    hellaswag, skipped = history.last("val/hellaswag"), history.last("skipped")
    waits, mfus = (history.last(name, n=10**9) for name in ("data_wait", "mfu"))
    return {
        "step": run.params.steps,
        "tokens": tokens,
        "loss": sum(losses) / len(losses) if losses else None,  # None: all steps were skipped
        "val_loss": val_loss,  # not that of the log, of which a line may be lost
        "best_val_loss": min([val_loss, *history.validations(run.params.val_tokens)]),
        "validations": [[r["step"], r["val/loss"]] for r in history.records if "val/loss" in r],
        **({"hellaswag_acc_completion": hellaswag[-1]} if hellaswag else {}),
        **({"skipped_steps": skipped[-1]} if skipped else {}),
        **_sources_summary(trainer),
        "parameters": parameter_count(trainer.gpt.config),
        "seconds": round(seconds, 1),
        "tokens_per_second": round((tokens - inherited) / seconds, 1),
        **({"mfu": round(statistics.median(mfus), 4)} if mfus else {}),
        **({"data_wait": round(statistics.median(waits), 5)} if waits else {}),
        "peak_memory_bytes": peak_memory(world.device),
        "world_size": world.size,
        "micro_batch": trainer.split.micro_batch,
        "device": device_name(world.device),
        "dtype": run.params.dtype,
        "commit": commit(),
        "chain": trainer.chain.head,
    }


def _sources_summary(trainer: Trainer) -> dict[str, Any]:
    """Facts of each source: share of the samples, tokens, epochs, loss; empty for one source."""
    run, found = trainer.run, {}
    for name in run.train_data.manifest.source.sources:
        if losses := run.history.last(f"{SOURCE_LOSS}{name}"):
            found[name] = {"val_loss": losses[-1]}
    if isinstance(run.order, MixedOrder):
        for name, share in run.order.shares(run.samples(run.params.steps)).items():
            found[name] = {**found.get(name, {}), **share._asdict()}
    return {"sources": found} if found else {}
