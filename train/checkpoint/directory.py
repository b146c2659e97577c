"""Checkpoint directories: atomic, hashed, and without pickles.

    step-00000200/
        model.safetensors        weights, float32, names of the model
        optimizer.safetensors    optimizer state: <parameter>.exp_avg, .exp_avg_sq, .step (AdamW)
        state.json               step, samples, parameters, dataset_key, versions, validation loss
                                 if it was measured; sha256 of both files, and of itself

A checkpoint is written under a temporary name, synced to disk, and renamed: after a crash it is
complete or not there. A changed byte is found when it is loaded. It holds no state of random
generators: the data order is a function of the samples seen, and GPT-2 is trained without dropout.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.files import save_tensors
from pipeline.runtime.errors import UserError, printable
from pipeline.store import atomic
from pipeline.store.store import mark_damaged
from train.checkpoint import chain

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = (MODEL, OPTIMIZER, STATE)

SCHEMA_VERSION = 2
UNSEALED_VERSION = 1  # of earlier code: state.json without a hash of itself

_NAME = re.compile(r"step-[0-9]{8,}")


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
    """Checkpoints in a run's folder, oldest first; not verified. Other names are ignored."""
    found = [path for path in run.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


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
        state: JSON values; needs "step", the number of complete steps. The newest link of its
            "chain", if it has one, is completed in place.

    Returns:
        The checkpoint's directory, synced to disk.
    """
    final = run / folder_name(state["step"])
    part = run / f".{final.name}.tmp"
    remove_leftovers(run)
    part.mkdir(parents=True)
    save_tensors(part / MODEL, dict(model))
    save_tensors(part / OPTIMIZER, dict(optimizer))
    hashes = {name: atomic.sha256_file(part / name) for name in (MODEL, OPTIMIZER)}
    state = {**state, "schema_version": SCHEMA_VERSION, "sha256": hashes}
    if "chain" in state:
        chain.complete(state["chain"]["links"], hashes)
    atomic.write_json(part / STATE, atomic.sealed(state))
    if os.path.lexists(final):  # saved again, now with its validation loss
        os.rename(final, _removed(final))
    os.rename(part, final)
    atomic.fsync_folder(run)
    atomic.remove(_removed(final))
    found = {step_of(path): path for path in checkpoints(run)}
    losses = {step_of(path): loss for path, loss in _losses(run).items() if path <= final}
    for step in found.keys() - keep.select(losses):
        remove(found[step])
    return final


def remove_leftovers(run: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for path in run.glob(".step-*"):
        atomic.remove(path)


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a half-removed one is never used."""
    os.rename(folder, _removed(folder))
    atomic.remove(_removed(folder))


def _removed(folder: Path) -> Path:
    """Name of a checkpoint that is being removed."""
    return folder.with_name(f".{folder.name}.old")


def verify(folder: Path, samples: Callable[[int], int] | None = None) -> dict[str, Any]:
    """Check a checkpoint's bytes against its hashes, and its step against the folder's name.

    Args:
        folder: A checkpoint of a run, or a copy under any name.
        samples: Gives the samples seen after a number of steps, to compare with; None: unknown.

    Returns:
        The content of `state.json`.

    Raises:
        BrokenCheckpoint: A file is missing, unreadable, or not what was written.
    """
    try:
        state = read_state(folder)
        hashes = state["sha256"]
        for name in (MODEL, OPTIMIZER):
            if atomic.sha256_file(folder / name) != hashes[name]:
                mark_damaged(folder / name)
                raise BrokenCheckpoint(f"{folder / name}: does not match its sha256 in {STATE}")
            with safe_open(folder / name, "pt"):  # refuses any other format, such as a pickle
                pass
        step = state["step"]
        if _NAME.fullmatch(folder.name) and step != step_of(folder):
            raise BrokenCheckpoint(f"{folder / STATE}: step {step} is not that of its folder")
        if samples is not None and state["samples"] != (expected := samples(step)):
            raise BrokenCheckpoint(
                f"{folder / STATE}: {state['samples']} samples, but this run has seen {expected} "
                f"after step {step}"
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BrokenCheckpoint(f"{folder}: {error!r}") from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Read and check `state.json`.

    Raises:
        BrokenCheckpoint: It is not what was written.
        OSError: It cannot be read.
    """
    path = folder / STATE
    try:
        state = atomic.parse_json(atomic.read_bytes(path))
        version = state.get("schema_version") if isinstance(state, dict) else None
        if version != UNSEALED_VERSION:
            state = atomic.unsealed(state)
    except ValueError as error:
        mark_damaged(path)
        raise BrokenCheckpoint(f"{path}: {error}") from None
    if version not in (SCHEMA_VERSION, UNSEALED_VERSION):
        raise BrokenCheckpoint(f"{path}: schema_version {version} is unknown")
    return dict(state)


def latest(
    run: Path, samples: Callable[[int], int] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest intact checkpoint of a run.

    A broken one is reported on stderr and skipped; the next save removes it.

    Args:
        run: The run's folder.
        samples: See `verify`.

    Returns:
        The checkpoint and its state; None if there is none.
    """
    for folder in reversed(checkpoints(run)):
        try:
            return folder, verify(folder, samples)
        except BrokenCheckpoint as error:
            line = printable(f"warning: {error}; skipping this checkpoint")
            print(line, file=sys.stderr, flush=True)
    return None


def best(run: Path) -> Path | None:
    """Find the checkpoint with the lowest validation loss; None if none was measured."""
    losses = {path: loss for path, loss in _losses(run).items() if loss is not None}
    return min(losses, key=lambda path: (losses[path], path)) if losses else None


def _losses(run: Path) -> dict[Path, float | None]:
    """Validation losses of a run's checkpoints that can be compared, oldest first.

    None where the loss was not measured, cannot be read, or is over other tokens than the newest
    one (`train.val_tokens` has changed, or `train.validation.WINDOWS`).
    """
    found: dict[Path, tuple[float | None, Any]] = {}
    for path in checkpoints(run):
        try:
            state = read_state(path)
            loss = state["val_loss"]
            loss = float(loss) if loss is not None else None
            found[path] = loss, (state.get("train", {}).get("val_tokens"), state.get("val_windows"))
        except (OSError, LookupError, TypeError, ValueError, AttributeError, BrokenCheckpoint):
            found[path] = None, None
    measured = [tokens for loss, tokens in found.values() if loss is not None]
    newest = measured[-1] if measured else None
    return {path: loss if tokens == newest else None for path, (loss, tokens) in found.items()}


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load weights and flat optimizer state of a verified checkpoint, on the CPU."""
    return load_file(folder / MODEL), load_file(folder / OPTIMIZER)


def check_data(folder: Path, trained_on: str, here: str) -> None:
    """Refuse to resume on other data than a checkpoint was trained on.

    Args:
        trained_on: Its dataset_key.
        here: That of `data/tokens`.

    Raises:
        UserError: They differ.
    """
    if trained_on != here:
        raise UserError(
            f"{folder}: was trained on other data ({trained_on[:12]}) than data/tokens "
            f"({here[:12]}); restore that data, or start from scratch with GPT2_FRESH=1"
        )
