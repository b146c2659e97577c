"""What a run says of itself: to people, to DVC, and to whoever opens its checkpoint."""

from __future__ import annotations

import platform
import statistics
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from model.size import parameter_count
from train.checkpoint.init_from import first_step
from train.numerics import device_name, peak_memory, versions
from train.optim.param_groups import table
from train.trainer import Trainer

NO_CODE = ("dvc.lock", "metrics", "params.yaml")


def banner(trainer: Trainer, done: int) -> str:
    """What runs, where, and from which step: printed first.

    Args:
        trainer: Ready to train.
        done: Complete steps, of a run that resumes.
    """
    run, world, split, params = trainer.run, trainer.world, trainer.split, trainer.params
    config = trainer.gpt.config
    return "\n".join(
        [
            f"training GPT-2, {parameter_count(config):,} parameters ({config.n_layer} layers, "
            f"{config.n_head} heads, width {config.n_embd}, context {config.block_size}), "
            f"on {len(run.train_data):,} tokens (dataset {run.dataset_key[:12]}): "
            f"{params.steps:,} steps of {params.batch_tokens:,} tokens{_ramp(trainer)}, "
            f"{run.tokens(params.steps):,} in all; "
            f"{world.size} x {device_name(world.device)}, "
            f"{split.micro_steps(run.batches.full)} micro-steps of "
            f"{split.micro_batch} sequences, {params.dtype}, "
            f"compile {'on' if trainer.compiled else 'off'}, "
            f"commit {commit() or 'unknown (no git here)'}",
            f"run {run.folder}: " + (f"resumes after step {done}" if done else "starts"),
            table(trainer.groups, params.weight_decay, params.optimizer),
        ]
    )


def _ramp(trainer: Trainer) -> str:
    params, batches = trainer.params, trainer.run.batches
    if not params.batch_doublings:
        return ""
    first = batches.smallest * trainer.run.model.block_size
    return f" (from {first:,}, doubled {params.batch_doublings} x in {params.batch_ramp_steps:,})"


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit that runs, 12 digits, "-dirty" where code differs from it; None without git.

    DVC itself changes the files of `NO_CODE` before and while a stage runs. It is told to people
    and to logs, and is part of no key: what decides a run is its content.
    """

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=10)

    try:
        found = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        others = (f":(top,exclude){name}" for name in NO_CODE)
        changed = git("diff", "--quiet", "HEAD", "--", ":(top)", *others).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found + "-dirty" * (changed == 1) if found else None


def start_record(trainer: Trainer, done: int, peak: float | None) -> dict[str, Any]:
    """The run record's line for one start: what was used, by whom, and when.

    Args:
        trainer: Ready to train.
        done: Complete steps.
        peak: Operations a second that all devices could do, if known.
    """
    run = trainer.run
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "commit": commit(),
        "dataset_key": run.dataset_key,
        "step": done,
        "device_name": device_name(trainer.world.device),
        "peak_flops": peak,
        "arithmetic": trainer.arithmetic(),
        "versions": versions(),
        "machine": run.machine.model_dump(mode="json"),
    }


def summary(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """`metrics/train.json` of a finished run.

    Args:
        trainer: After the last step.
        seconds: Time spent in steps, over all starts of the run.
    """
    run, world, history = trainer.run, trainer.world, trainer.run.history
    losses, validations = history.last("train/loss", n=10), history.last("val/loss", n=10**9)
    begun = run.params.start()
    taken = run.tokens(first_step(begun)) if begun else 0  # trained before this run
    tokens = run.tokens(run.params.steps)
    answered = history.last("val/hellaswag")
    waits, mfus = (history.last(name, n=10**9) for name in ("data_wait", "mfu"))
    return {
        "step": run.params.steps,
        "tokens": tokens,
        "loss": sum(losses) / len(losses) if losses else None,  # None: all were skipped
        "val_loss": validations[-1],
        "best_val_loss": min(validations),
        **({"hellaswag_acc_completion": answered[-1]} if answered else {}),
        "parameters": parameter_count(trainer.gpt.config),
        "seconds": round(seconds, 1),
        "tokens_per_second": round((tokens - taken) / seconds, 1),
        **({"mfu": round(statistics.median(mfus), 4)} if mfus else {}),
        **({"data_wait": round(statistics.median(waits), 5)} if waits else {}),
        "peak_memory_bytes": peak_memory(world.device),
        "world_size": world.size,
        "micro_batch": trainer.split.micro_batch,
        "device": device_name(world.device),
        "dtype": run.params.dtype,
        "commit": commit(),
    }
