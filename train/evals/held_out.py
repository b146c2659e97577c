"""A held-out text, and bits per byte over all of it: a number that compares models of any data.

The documents of the file, each after `<|endoftext|>`, are one stream of tokens. Each token is
predicted once, from the tokens before it in its window of `model.block_size`. The nats are summed
over all tokens, divided by ln 2 and by the UTF-8 bytes of the documents: neither the tokenizer nor
the validation split of a run is part of the unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import find_file
from pipeline.store import atomic

FORMATS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class HeldOut:
    """A tokenized text."""

    tokens: np.ndarray
    """(n,) uint16: the documents, each after `<|endoftext|>`."""
    n_bytes: int
    """UTF-8 bytes of the documents."""
    sha256: str
    """Of the file."""

    @classmethod
    def read(cls, name: str) -> HeldOut:
        """Read and tokenize the file of `evaluate.held_out`.

        Raises:
            UserError: It is missing, or holds no text.
        """
        path, where = find_file(name), f"params.yaml: evaluate.held_out: {name}"
        texts = read_documents(path, where)
        parts = [[tokenizer.EOT, *tokenizer.encode(text)] for text in texts]
        return cls(
            tokens=np.concatenate([np.array(part, dtype=np.uint16) for part in parts]),
            n_bytes=sum(len(text.encode()) for text in texts),
            sha256=atomic.sha256_file(path),
        )

    def metrics(self, loss: float) -> dict[str, Any]:
        """Return the metrics of a model with this mean loss, in nats per token."""
        nats = loss * (len(self.tokens) - 1)
        return {
            "held_out_bits_per_byte": nats / math.log(2) / self.n_bytes,
            "held_out_bytes": self.n_bytes,
            "held_out_sha256": self.sha256,
        }


def read_documents(path: Path, where: str) -> list[str]:
    """Read the documents of a file: of `.jsonl` and `.parquet` the column `text`, of `.txt` all.

    Args:
        where: Names the file in messages.

    Raises:
        UserError: It cannot be read, is of another format, or holds no text.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{where}: name a file that ends with {', '.join(FORMATS)}")
    try:
        atomic.check_regular(path)
        texts = [text for text in _texts(path) if text]
        for text in texts:
            text.encode()  # JSON can hold half of a surrogate pair
    except FileNotFoundError:
        raise UserError(f"{where}: no such file; name one of this project") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or 'cannot be read'}; name a file") from None
    except (ValueError, TypeError, KeyError, pa.ArrowException):
        raise UserError(
            f"{where}: not readable as {path.suffix} with a text in each row's `text`; correct it"
        ) from None
    if not texts:
        raise UserError(f"{where}: holds no text; name another file")
    return texts


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from filter(None, pq.read_table(path, columns=["text"])["text"].to_pylist())
    elif path.suffix == ".txt":
        yield path.read_bytes().decode()
    else:
        for line in path.read_bytes().splitlines():
            if line.strip():
                text = atomic.parse_json(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(text)
                yield text
