"""What a run starts from (`train.init`): the seed, a checkpoint, or another's model.

    scratch           weights drawn from the seed
    checkpoint DIR    a checkpoint's weights; with `train.init_with: all` its optimizer and step
                      too: the run goes on where that one was (longer, or on another schedule)
    hf DIR            the weights of a folder as `transformers` writes it

The folder is read once, before a run's first step; a run that resumes has checkpoints of its own.
Its content is a part of the run's key.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from model import GPT, GPTConfig
from model.errors import FormatError
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from train.checkpoint import directory
from train.params import Start

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def content_key(start: Start) -> str:
    """The content that a run starts from, as a hash.

    Raises:
        UserError: There is none.
    """
    if start.kind == "checkpoint":
        names = directory.FILES if start.whole else (directory.MODEL,)
        paths = [start.folder / name for name in names]
    else:
        paths = sorted(start.folder.glob("*.safetensors"))
    try:
        hashes = [atomic.sha256_file(path) for path in paths]
    except OSError as error:
        raise UserError(
            f"params.yaml: train.init: {error.filename}: {error.strerror}; it is read again at "
            "each start, so keep it where it is"
        ) from None
    if not hashes:
        raise UserError(f"params.yaml: train.init: {start.folder} holds no *.safetensors")
    return atomic.sha256_json([start.kind, *hashes])


def first_step(start: Start) -> int:
    """Complete steps that are taken over; 0 unless whole."""
    state = start.folder / directory.STATE
    return int(json.loads(state.read_bytes())["step"]) if start.whole else 0


def load(start: Start, config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int]:
    """Reads the folder.

    Args:
        config: The model that is to be trained.

    Returns:
        Weights; flat optimizer state (empty unless whole); complete steps and samples seen (0
        unless whole).

    Raises:
        UserError: The folder is broken, or of another model.
    """
    try:
        state = _verified(start)
        read = GPT.from_hf if start.kind == "hf" else GPT.from_checkpoint
        gpt = read(start.folder)
    except (FormatError, directory.BrokenCheckpoint) as error:
        raise UserError(f"params.yaml: train.init: {error}") from None
    ours, theirs = config.to_dict(), gpt.config.to_dict()
    if any(ours[name] != theirs[name] for name in SIZES):
        said = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in SIZES)
        raise UserError(f"params.yaml: model: {start.folder} is of another size: {said}")
    if not start.whole:
        return gpt.state_dict(), {}, 0, 0
    _, moments = directory.load_tensors(start.folder)
    return gpt.state_dict(), moments, int(state["step"]), int(state["samples"])


def _verified(start: Start) -> dict[str, Any]:
    """The state of a checkpoint of ours; that of an imported model holds no hashes to check."""
    path = start.folder / directory.STATE
    if start.kind == "hf" or not path.exists():
        return {}
    if not start.whole and "sha256" not in json.loads(path.read_bytes()):
        return {}
    return directory.verify(start.folder)
