"""Checkpoint folder of a model: `model.safetensors` and `state.json`.

`model.safetensors` holds the parameters under their names in `GPT.state_dict()`, in float32, the
tied table once. `state.json` holds the config under "model"; training adds keys of its own. There
is no pickle, so loading a checkpoint runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import GPTConfig
from model.errors import ConfigError, FormatError

WEIGHTS = "model.safetensors"
STATE = "state.json"


def read(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read the config and the parameters of a checkpoint, on the CPU.

    Raises:
        FormatError: A file is missing or unreadable, or the config is invalid.
    """
    state = read_json(folder / STATE, "give the folder of a checkpoint")
    if not isinstance(state.get("model"), dict):
        raise FormatError(f"{folder / STATE} has no key 'model': give the folder of a checkpoint")
    try:
        config = GPTConfig.from_dict(state["model"])
    except ConfigError as error:
        raise FormatError(f"{folder / STATE}: {error}") from error
    path = folder / WEIGHTS
    if not path.is_file():
        raise FormatError(f"{path} does not exist: give the folder of a complete checkpoint")
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


def write(
    folder: Path, config: GPTConfig, parameters: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """Write a checkpoint; `extra` holds further keys of `state.json`.

    `state.json` is written last, so an unfinished folder is not taken for a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, parameters)
    write_json(folder / STATE, {"model": config.to_dict(), **extra})


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object; if there is none, raise a `FormatError` that ends with `hint`."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist: {hint}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object: {hint}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, line endings unchanged."""
    _write_atomically(path, lambda part: part.write_bytes(text.encode()))


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _write_atomically(path, lambda part: save_file(contiguous, part, metadata))


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename.

    The file is complete or absent, even after a power failure. A file hard-linked to DVC's cache is
    replaced, never modified.
    """
    part = path.with_name(f".{path.name}.part")
    write(part)
    _sync(part)
    part.replace(path)
    _sync(path.parent)  # makes the rename durable


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
