"""JSON and safetensors files: read with care, as they may come from anyone; written atomically.

Reading runs no code. It takes time and memory in proportion to the size of a file, never to a
number that the file holds: names and shapes are compared with the config before a tensor is read or
a model is built.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import FormatError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights that are read; float32 has the values of all but the first."""

LARGEST_JSON = 2**24
"""Bytes; the index of gpt2-xl's 580 tensors has 40 kB."""


class Stored(NamedTuple):
    """Place and shape of a tensor, as its file has them."""

    path: Path
    name: str
    shape: tuple[int, ...]


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object; if there is none, raise a `FormatError` that ends with `hint`."""
    try:
        if not path.is_file():
            raise FormatError(f"{path} does not exist: {hint}")
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FormatError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}: {hint}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object: {hint}")
    return value


def shown(value: object) -> str:
    """Return the `repr` of a value from a file, cut if it is long."""
    return reprlib.repr(value)


def list_tensors(path: Path) -> list[Stored]:
    """Return the tensors of a safetensors file; reads its header only.

    Raises:
        FormatError: The file is missing or unreadable.
    """
    with _opened(path) as file:
        names = file.keys()
        return [Stored(path, name, tuple(file.get_slice(name).get_shape())) for name in names]


def check_shapes(
    source: Path, found: Mapping[str, Stored], expected: Iterable[tuple[str, tuple[int, ...]]]
) -> None:
    """Compare the tensors of a folder with those that its config asks for.

    Args:
        source: The folder, for messages.
        found: By the name in `GPT.state_dict()`.
        expected: Names and shapes, in the layout of the files; read up to the first that is wrong.

    Raises:
        FormatError: A tensor is missing, unknown, or of another shape.
    """
    known = set()
    for name, shape in expected:
        if name not in found:
            raise FormatError(f"{source}: tensor {name!r} is missing: its config asks for it")
        stored = found[name]
        if stored.shape != shape:
            raise FormatError(
                f"{stored.path}: tensor {stored.name!r} is {stored.shape}, "
                f"but must be {shape} by its config"
            )
        known.add(name)
    for name in sorted(found.keys() - known):
        raise FormatError(
            f"{found[name].path}: unknown tensor {found[name].name!r}: "
            "not part of a GPT-2 with its config"
        )


def load_tensors(found: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as float32, one at a time, to never hold a second copy of the model.

    Each is a copy in memory of its own: what safetensors returns is the mapped file, at any
    address. Vectorised kernels would be slower there and round differently, and a file that is cut
    short while it is mapped would end the process.

    Raises:
        FormatError: A file is unreadable, or a tensor has non-finite values or is not of `FLOATS`.
    """
    for path in sorted({stored.path for stored in found.values()}):
        with _opened(path) as file:
            for name, stored in found.items():
                if stored.path == path:
                    yield name, _as_float32(stored, file.get_tensor(stored.name))


def _as_float32(stored: Stored, tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise FormatError(
            f"{stored.path}: tensor {stored.name!r} is {tensor.dtype}: "
            "weights must be float64, float32, float16 or bfloat16"
        )
    tensor = tensor.to(torch.float32, copy=True)
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise FormatError(
            f"{stored.path}: tensor {stored.name!r} has non-finite values (NaN or Inf), "
            f"{int((~finite).sum())} of {tensor.numel()}: use other weights"
        )
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise FormatError(f"{path} is not a regular file: replace it by one")
    try:
        path.open("rb").close()  # names the reason; `safe_open` calls each "No such file"
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, line endings unchanged."""
    write_atomically(path, lambda part: part.write_bytes(text.encode()))


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def save(part: Path) -> None:
        try:
            save_file(contiguous, part, metadata)
        except SafetensorError as error:  # the disk is full, for example
            raise OSError(f"{path} cannot be written: {error}") from error

    write_atomically(path, save)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name, then rename.

    The file is complete or absent, even after a power failure, and its mode is that of new files
    here. A file hard-linked to DVC's cache is replaced, never modified.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; `save_file` would leave 0600
        write(part)
        part.chmod(mode)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)  # makes the rename durable


def sync(path: Path) -> None:
    """Flush a written file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
