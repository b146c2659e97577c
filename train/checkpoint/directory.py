"""Checkpoint directories: atomic, hashed, and without pickles.

    step-00000200/
        model.safetensors        weights, float32, names of the model
        optimizer.safetensors    optimizer state: <parameter>.exp_avg, .exp_avg_sq, .step (AdamW)
        state.json               step, samples, parameters, dataset_key, versions, sha256 of both
                                 files, validation loss if it was measured

A checkpoint is written under a temporary name, synced to disk, and renamed: after a crash it is
complete or not there. It holds no state of random generators: the data order is a function of the
samples seen, and GPT-2 is trained without dropout.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.store import atomic

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = (MODEL, OPTIMIZER, STATE)

SCHEMA_VERSION = 1


class BrokenCheckpoint(Exception):
    """A checkpoint does not hold the bytes that were written; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of a run to keep, in addition to the one with the lowest validation loss.

    Attributes:
        last: Number of newest checkpoints, at least 1.
        every: Keep those of steps divisible by this; None: no others.
    """

    last: int
    every: int | None = None

    def select(self, losses: Mapping[int, float | None]) -> set[int]:
        """Return the steps to keep, given the validation loss of each step (None: not measured)."""
        kept = set(sorted(losses)[-self.last :])
        if self.every is not None:
            kept |= {step for step in losses if step % self.every == 0}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        if measured:
            kept.add(min(measured, key=lambda step: (measured[step], step)))
        return kept


def folder_name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` complete steps; sorts by step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Number of complete steps, from the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints in a run's folder, oldest first; not verified."""
    return sorted(run.glob("step-*"))


def save(
    run: Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: Keep,
) -> Path:
    """Write a checkpoint, then remove those that ``keep`` does not select, and all of later steps.

    Checkpoints of later steps are broken: the run has skipped them and resumed from an earlier one.

    Args:
        model: State dict of the plain model, contiguous tensors on the CPU.
        optimizer: Flat optimizer state (``param_groups.flat_state``), likewise.
        state: JSON values; needs "step", the number of complete steps.

    Returns:
        The checkpoint's directory, synced to disk.
    """
    final = run / folder_name(state["step"])
    part = run / f".{final.name}.tmp"
    for path in run.glob(".step-*"):  # left by a run that was killed while it wrote or removed
        shutil.rmtree(path)
    part.mkdir(parents=True)
    save_file(dict(model), part / MODEL)
    save_file(dict(optimizer), part / OPTIMIZER)
    hashes = {name: atomic.sha256_file(part / name) for name in (MODEL, OPTIMIZER)}
    for name in hashes:
        atomic.fsync_file(part / name)
    atomic.write_json(part / STATE, {**state, "schema_version": SCHEMA_VERSION, "sha256": hashes})
    if final.exists():  # saved again, now with its validation loss
        os.rename(final, _removed(final))
    os.rename(part, final)
    atomic.fsync_folder(run)
    if _removed(final).exists():
        shutil.rmtree(_removed(final))
    found = {step_of(path): path for path in checkpoints(run)}
    losses = {step_of(path): loss for path, loss in _losses(run).items() if path <= final}
    for step in found.keys() - keep.select(losses):
        remove(found[step])
    return final


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a half-removed one is never used."""
    os.rename(folder, _removed(folder))
    shutil.rmtree(_removed(folder))


def _removed(folder: Path) -> Path:
    """Name of a checkpoint that is being removed."""
    return folder.with_name(f".{folder.name}.old")


def verify(folder: Path) -> dict[str, Any]:
    """Check a checkpoint's bytes against its hashes.

    Returns:
        The content of `state.json`.

    Raises:
        BrokenCheckpoint: A file is missing, unreadable, or not what was written.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
        hashes = state["sha256"]
        for name in (MODEL, OPTIMIZER):
            if atomic.sha256_file(folder / name) != hashes[name]:
                _make_writable(folder / name)
                raise BrokenCheckpoint(f"{folder / name}: does not match its sha256 in {STATE}")
            with safe_open(folder / name, "pt"):  # refuses any other format, such as a pickle
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BrokenCheckpoint(f"{folder}: {error!r}") from error
    if state.get("schema_version") != SCHEMA_VERSION:
        raise BrokenCheckpoint(f"{folder}: schema_version {state.get('schema_version')} is unknown")
    return state


def _make_writable(damaged: Path) -> None:
    """Make a damaged file writable, so that DVC replaces it.

    Its inode may be an object in DVC's cache, which DVC trusts as long as it is read-only.
    """
    with contextlib.suppress(OSError):
        damaged.chmod(0o644)


def latest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest intact checkpoint of a run.

    A broken one is reported on stderr and skipped; the next save removes it.

    Returns:
        The checkpoint and its state; None if there is none.
    """
    for folder in reversed(checkpoints(run)):
        try:
            return folder, verify(folder)
        except BrokenCheckpoint as error:
            print(f"warning: {error}; skipping this checkpoint", file=sys.stderr, flush=True)
    return None


def best(run: Path) -> Path | None:
    """Find the checkpoint with the lowest validation loss; None if none was measured."""
    losses = {path: loss for path, loss in _losses(run).items() if loss is not None}
    return min(losses, key=lambda path: (losses[path], path)) if losses else None


def _losses(run: Path) -> dict[Path, float | None]:
    """Validation losses of a run's checkpoints that can be compared, oldest first.

    None where the loss was not measured, cannot be read, or is over other tokens than the newest
    one (`train.val_tokens` has changed).
    """
    found: dict[Path, tuple[float | None, int | None]] = {}
    for path in checkpoints(run):
        try:
            state = json.loads((path / STATE).read_bytes())
            found[path] = state["val_loss"], state.get("train", {}).get("val_tokens")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            found[path] = None, None
    measured = [tokens for loss, tokens in found.values() if loss is not None]
    newest = measured[-1] if measured else None
    return {path: loss if tokens == newest else None for path, (loss, tokens) in found.items()}


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load weights and flat optimizer state of a verified checkpoint, on the CPU."""
    return load_file(folder / MODEL), load_file(folder / OPTIMIZER)
