"""The folder in which a model is kept: `model.safetensors` and `state.json`.

`model.safetensors` holds the parameters under their names in `GPT.state_dict()`, float32, the tied
table once. `state.json` holds the config under "model", beside whatever else its writer (the
training) keeps there. No pickle is involved: reading a checkpoint runs no code of it.
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
    """The config and the parameters of a checkpoint, on the CPU.

    Raises:
        FormatError: A file is missing or unreadable, or the config is not one.
    """
    state = read_json(folder / STATE, f"is {folder} a checkpoint?")
    if not isinstance(state.get("model"), dict):
        raise FormatError(f"{folder / STATE} has no section 'model': is {folder} a checkpoint?")
    try:
        config = GPTConfig.from_dict(state["model"])
    except ConfigError as error:
        raise FormatError(f"{folder / STATE}: {error}") from error
    path = folder / WEIGHTS
    if not path.is_file():
        raise FormatError(f"{path} does not exist: is {folder} a whole checkpoint?")
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


def write(
    folder: Path, config: GPTConfig, parameters: dict[str, Tensor], extra: dict[str, Any]
) -> None:
    """Writes a checkpoint for `read`; `extra` goes into `state.json` beside the config.

    `state.json` comes last: a folder that was not finished is not taken for a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, parameters)
    write_json(folder / STATE, {"model": config.to_dict(), **extra})


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """The object in a JSON file; a `FormatError` with `hint` where there is none."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist: {hint}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no JSON object: {hint}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes readable JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, with the line ends of `text`."""
    _replace(path, lambda part: part.write_bytes(text.encode()))


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda part: save_file(whole, part, metadata))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes under another name, then renames.

    A file is there whole or not at all, also after a power cut; and one that is hard-linked (to
    DVC's cache) is replaced, never written into.
    """
    part = path.with_name(f".{path.name}.part")
    write(part)
    _sync(part)
    part.replace(path)
    _sync(path.parent)  # a rename is durable only when its folder is


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
