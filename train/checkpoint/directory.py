"""Checkpoints: directories that appear whole, know their own hashes, and hold no pickle.

    step-00000200/
        model.safetensors        the weights, float32, names of the model
        optimizer.safetensors    <parameter>.exp_avg, .exp_avg_sq, .step
        state.json               step, samples, params, dataset_key, versions, sha256 of the two,
                                 validation loss where it was measured

The directory is written under another name, synced to the disk, and renamed: a crash leaves the
old state or the new. State of random generators is no part of it, for training draws nothing: the
order of data is a function of the samples seen, and GPT-2 is trained without dropout.

Writer (writer.py) calls this beside the training.
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
    """A checkpoint whose bytes are not those that were written; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of a run stay.

    The best by validation stays besides: the lowest loss among those saved at a validated step.

    Attributes:
        last: The newest so many, at least 1.
        every: Those of steps that this divides, or None.
    """

    last: int
    every: int | None = None

    def of(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps whose checkpoints stay.

        Args:
            losses: Each checkpoint's step and validation loss (None: not measured).
        """
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
    """Complete steps of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def save(
    run: Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: Keep,
) -> Path:
    """Writes a checkpoint, then removes those that ``keep`` lets go, and any of a later step.

    A later one is broken: the run has passed it over, and goes on from before it.

    Args:
        run: The run's folder.
        model: State dict of the plain model, contiguous tensors on the CPU.
        optimizer: Flat optimizer state (``optimizer.flat_state``), likewise.
        state: JSON values; needs "step", the number of complete steps.
        keep: Which checkpoints stay.

    Returns:
        The checkpoint's directory; on return it is on the disk.
    """
    final = run / folder_name(state["step"])
    part = run / f".{final.name}.tmp"
    for path in run.glob(".step-*"):  # left by a run that died while it wrote or removed
        shutil.rmtree(path)
    part.mkdir(parents=True)
    save_file(dict(model), part / MODEL)
    save_file(dict(optimizer), part / OPTIMIZER)
    hashes = {name: atomic.sha256_file(part / name) for name in (MODEL, OPTIMIZER)}
    for name in hashes:
        atomic.fsync_file(part / name)
    atomic.write_json(part / STATE, {**state, "schema_version": SCHEMA_VERSION, "sha256": hashes})
    if final.exists():  # saved once more, with the loss that was not measured then
        os.rename(final, _hidden(final))
    os.rename(part, final)
    atomic.fsync_folder(run)
    if _hidden(final).exists():
        shutil.rmtree(_hidden(final))
    found = {step_of(path): path for path in steps(run)}
    losses = {step: _loss(path) for step, path in found.items() if path <= final}
    for step in found.keys() - keep.of(losses):
        remove(found[step])
    return final


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was measured."""
    losses = {path: loss for path in steps(run) if (loss := _loss(path)) is not None}
    return min(losses, key=lambda path: (losses[path], path)) if losses else None


def _loss(folder: Path) -> float | None:
    """The validation loss of a checkpoint; None where it was not measured, or cannot be read."""
    try:
        loss = json.loads((folder / STATE).read_bytes())["val_loss"]
        return None if loss is None else float(loss)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(run.glob("step-*"))


def remove(folder: Path) -> None:
    """Removes a checkpoint; its name goes first, so that no half of it is ever taken for one."""
    os.rename(folder, _hidden(folder))
    shutil.rmtree(_hidden(folder))


def _hidden(folder: Path) -> Path:
    """The name of a checkpoint that goes."""
    return folder.with_name(f".{folder.name}.old")


def verify(folder: Path) -> dict[str, Any]:
    """Compares a checkpoint's bytes with its hashes.

    Returns:
        Its state.

    Raises:
        BrokenCheckpoint: A file is missing, unreadable, or not what was written.
    """
    try:
        state = json.loads((folder / STATE).read_bytes())
        hashes = state["sha256"]
        for name in (MODEL, OPTIMIZER):
            if atomic.sha256_file(folder / name) != hashes[name]:
                _disown(folder / name)
                raise BrokenCheckpoint(f"{folder / name}: bytes differ from their sha256")
            with safe_open(folder / name, "pt"):  # no other format, a pickle say, is ever loaded
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BrokenCheckpoint(f"{folder}: {error!r}") from error
    if state.get("schema_version") != SCHEMA_VERSION:
        raise BrokenCheckpoint(f"{folder}: schema_version {state.get('schema_version')} is unknown")
    return state


def _disown(damaged: Path) -> None:
    """Makes a damaged file writable.

    Its inode may be DVC's cached object, which DVC trusts while it is read-only, and replaces when
    it is not.
    """
    with contextlib.suppress(OSError):
        damaged.chmod(0o644)


def latest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole, and its state; None where there is none.

    A broken one is named on stderr and passed over; the next save removes it.
    """
    for folder in reversed(steps(run)):
        try:
            return folder, verify(folder)
        except BrokenCheckpoint as error:
            print(f"warning: {error}; it is passed over", file=sys.stderr, flush=True)
    return None


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and flat optimizer state of a verified checkpoint, on the CPU."""
    return load_file(folder / MODEL), load_file(folder / OPTIMIZER)
