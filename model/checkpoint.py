"""Checkpoint folder of a model: `model.safetensors` and `state.json`.

`model.safetensors` holds the parameters under their names in `GPT.state_dict()`, in float32, the
tied table once. `state.json` holds the config under "model"; training adds keys of its own. There
is no pickle, so loading a checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import GPTConfig
from model.errors import ConfigError, FormatError
from model.files import (
    check_shapes,
    list_tensors,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from model.size import parameter_shapes

WEIGHTS = "model.safetensors"
STATE = "state.json"
FILES = (WEIGHTS, STATE)
"""In the order in which they are written: an unfinished folder is not taken for a checkpoint."""

SEAL = "json_sha256"  # as in pipeline.store.atomic


def read(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read the config and the parameters of a checkpoint, in float32, on the CPU.

    Raises:
        FormatError: A file is missing or unreadable, the config is invalid, or a tensor is missing,
            unknown, of another shape or not finite; or a file differs from the hash that training
            has recorded.
    """
    state = read_json(folder / STATE, "give the folder of a checkpoint")
    _check_hashes(folder, state)
    if not isinstance(state.get("model"), dict):
        raise FormatError(f"{folder / STATE} has no key 'model': give the folder of a checkpoint")
    try:
        config = GPTConfig.from_dict(state["model"])
    except ConfigError as error:
        raise FormatError(f"{folder / STATE}: {error}") from error
    found = {stored.name: stored for stored in list_tensors(folder / WEIGHTS)}
    check_shapes(folder, found, parameter_shapes(config))
    return config, dict(load_tensors(found))


def check_seal(path: Path, values: dict[str, Any]) -> None:
    """Compare a JSON object with its own hash, if it has one.

    Raises:
        FormatError: They differ.
    """
    rest = {key: value for key, value in values.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    if values.get(SEAL) not in (None, hashlib.sha256(text.encode()).hexdigest()):
        raise FormatError(f"{path} is damaged: it does not match its {SEAL}")


def _check_hashes(folder: Path, state: dict[str, Any]) -> None:
    """Compare the files with the hashes in a checkpoint of training; others have none."""
    check_seal(folder / STATE, state)
    hashes = state.get("sha256")
    if not isinstance(hashes, dict) or WEIGHTS not in hashes or not (folder / WEIGHTS).is_file():
        return
    digest = hashlib.sha256()
    with open(folder / WEIGHTS, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != hashes[WEIGHTS]:
        raise FormatError(f"{folder / WEIGHTS} is damaged: it does not match its sha256 in {STATE}")


def write(
    folder: Path, config: GPTConfig, parameters: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """Write a checkpoint; `extra` holds further keys of `state.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, parameters)
    write_json(folder / STATE, {"model": config.to_dict(), **extra})
