"""Initial weights of a run (`train.init`).

    scratch           random weights from the seed
    checkpoint DIR    weights of a checkpoint; with `train.init_with: all` its optimizer state and
                      step too, to extend a run or to branch from it with another schedule
    hf DIR            weights of a folder in the layout of `transformers`

The folder is read once, before the first step; a resumed run reads its own checkpoints. The content
of the folder is part of the run's key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model import GPT, GPTConfig
from model.config import VARIANTS
from model.errors import FormatError
from model.files import read_json
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from train.checkpoint import directory
from train.checkpoint.start import Start

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def content_key(start: Start) -> str:
    """Hash the content that a run starts from.

    Raises:
        UserError: A file is missing or damaged.
    """
    try:
        if start.kind == "checkpoint":
            # Of state.json only the step decides anything.
            names = (directory.MODEL, *([directory.OPTIMIZER] if start.with_optimizer else []))
            paths = [start.folder / name for name in names]
        else:
            paths = sorted(start.folder.glob("*.safetensors"))
        hashes: list[str | int] = [atomic.sha256_file(path) for path in paths]
    except OSError as error:
        raise UserError(
            f"params.yaml: train.init: {error.filename}: {error.strerror}; name a folder that "
            "exists and keep it: each start of the run reads it"
        ) from None
    if start.with_optimizer:
        hashes.append(first_step(start))
    if not hashes:
        raise UserError(
            f"params.yaml: train.init: {start.folder} holds no *.safetensors; name one that does"
        )
    return atomic.sha256_json([start.kind, *hashes])


def first_step(start: Start) -> int:
    """Number of complete steps that the run starts after; 0 if only weights are taken.

    Raises:
        UserError: The state of the checkpoint is missing or damaged.
    """
    return _number(start, _read_state(start), "step") if start.with_optimizer else 0


def load(start: Start, config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int]:
    """Read the folder, for a model of this configuration.

    Returns:
        Weights; flat optimizer state; number of complete steps; number of samples seen. The last
        three are empty or 0 if only weights are taken.

    Raises:
        UserError: The folder is damaged, its model has another size, or a number is not finite.
    """
    try:
        state = _verified(start)
        read = GPT.from_hf if start.kind == "hf" else GPT.from_checkpoint
        gpt = read(start.folder)
    except (FormatError, directory.BrokenCheckpoint) as error:
        raise UserError(f"params.yaml: train.init: {error}") from None
    ours, theirs = config.to_dict(), gpt.config.to_dict()
    if any(ours[name] != theirs[name] for name in SIZES):
        sizes = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in SIZES)
        raise UserError(
            f"params.yaml: model: {start.folder} has another size: {sizes}; set its numbers"
        )
    for name in VARIANTS:
        if ours[name] != theirs[name]:
            raise UserError(
                f"params.yaml: model.{name}: {ours[name]}, but {start.folder} was trained with "
                f"{theirs[name]}; set that"
            )
    if not start.with_optimizer:
        return gpt.state_dict(), {}, 0, 0
    _, moments = directory.load_tensors(start.folder)
    for name, tensor in moments.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"params.yaml: train.init: {start.folder / directory.OPTIMIZER}: {name} has "
                "non-finite values (NaN or Inf); use another checkpoint, or init_with: weights"
            )
    step, samples = (_number(start, state, key) for key in ("step", "samples"))
    return gpt.state_dict(), moments, step, samples


def _verified(start: Start) -> dict[str, Any]:
    """Verify a checkpoint and return its state; imported weights have no hashes to verify."""
    if start.kind == "hf":
        return {}
    if not start.with_optimizer and "sha256" not in _read_state(start):
        return {}
    return directory.verify(start.folder)


def _read_state(start: Start) -> dict[str, Any]:
    try:
        return read_json(start.folder / directory.STATE, "name the folder of a checkpoint")
    except FormatError as error:
        raise UserError(f"params.yaml: train.init: {error}") from None


def _number(start: Start, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"params.yaml: train.init: {start.folder / directory.STATE}: {key} is damaged; use "
            "another checkpoint"
        )
    return value


def check_step(start: Start, step: int, samples: int, expected: int, steps: int) -> None:
    """Refuse to start after the steps of a checkpoint if this run could not have been there.

    Args:
        step: Complete steps of the checkpoint, on so many ``samples``.
        expected: Samples of this run after as many steps.
        steps: Of this run.

    Raises:
        UserError: Names the key.
    """
    if samples != expected:
        raise UserError(
            f"params.yaml: train.init_with: all: {start.folder} has trained on {samples} "
            f"samples in {step} steps, this run would have on {expected}; keep its batch_tokens, "
            "or set init_with: weights"
        )
    if step >= steps:
        raise UserError(
            f"params.yaml: train.steps: {steps}, but {start.folder} is already at step {step}; "
            "set more"
        )
