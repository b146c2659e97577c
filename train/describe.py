"""What a run says of itself: to people, to DVC, and to whoever opens its checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch

from model.size import parameter_count
from train.arithmetic import device_name, peak_memory
from train.optimizer import table

if TYPE_CHECKING:
    from train.trainer import Trainer


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
            f"{params.steps:,} steps of {params.batch_tokens:,} tokens, "
            f"{world.size} x {device_name(world.device)}, {split.micro_steps} micro-steps of "
            f"{split.micro_batch} sequences, {params.dtype}, "
            f"compile {'on' if trainer.compiled else 'off'}",
            f"run {run.folder}: " + (f"resumes after step {done}" if done else "starts"),
            table(trainer.groups, params.weight_decay),
        ]
    )


def state(trainer: Trainer, step: int) -> dict[str, Any]:
    """`state.json` of a checkpoint: all that it is, and nothing of when or by whom it was made.

    Args:
        trainer: Whose weights are saved.
        step: Complete steps.
    """
    run = trainer.run
    samples = run.samples(step)
    return {
        "step": step,
        "samples": samples,
        "tokens": samples * run.model.block_size,
        "model": trainer.gpt.config.to_dict(),
        "train": run.params.model_dump(mode="json"),
        "run_key": run.key,
        "dataset_key": run.dataset_key,
        "code_key": run.code_key,
        "adopted": run.record()["adopted"],
        "arithmetic": arithmetic_of(trainer),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def arithmetic_of(trainer: Trainer) -> dict[str, Any]:
    """What the last bits depend on, and neither the samples nor the parameters say."""
    return {
        "world_size": trainer.world.size,
        "micro_batch": trainer.split.micro_batch,
        "device": trainer.world.device.type,
        "threads": torch.get_num_threads(),
        "compile": trainer.compiled,
    }


def summary(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """`metrics/train.json` of a finished run.

    Args:
        trainer: After the last step.
        seconds: Time spent in steps, over all starts of the run.
    """
    run, world, history = trainer.run, trainer.world, trainer.run.history
    losses, validations = history.last("train/loss", n=10), history.last("val/loss", n=10**9)
    tokens = run.params.steps * run.params.batch_tokens
    start = run.params.start()
    taken = start.step * run.params.batch_tokens if start else 0  # trained before this run
    return {
        "step": run.params.steps,
        "tokens": tokens,
        "loss": sum(losses) / len(losses) if losses else None,  # None: all were skipped
        "val_loss": validations[-1],
        "best_val_loss": min(validations),
        "parameters": parameter_count(trainer.gpt.config),
        "seconds": round(seconds, 1),
        "tokens_per_second": round((tokens - taken) / seconds, 1),
        "peak_memory_bytes": peak_memory(world.device),
        "world_size": world.size,
        "micro_batch": trainer.split.micro_batch,
        "device": device_name(world.device),
        "dtype": run.params.dtype,
    }
