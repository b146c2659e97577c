"""Token files published by other projects: their layouts, and how each delimits documents.

```
llm.c, modded-nanogpt   .bin   256 int32 (see shards.py), uint16 tokens; EOT before a document
nanoGPT                 .bin   uint16 tokens and nothing else; EOT after a document
build-nanogpt           .npy   NumPy's header, uint16 tokens; EOT before a document
```

In the first and last layout a document may continue in the next file: tokens before the first EOT
of a file belong to the last document of the file before.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.format.manifest import Split
from pipeline.format.shards import HEADER_BYTES, MAGIC, TOKEN_DTYPE, VERSION
from pipeline.format.tokenizer import EOT, N_VOCAB
from pipeline.runtime.errors import UserError

SUFFIXES = (".bin", ".npy")

_CHECKED_TOKENS = 1 << 20
_REMOVE = "remove the file from source.paths"


@dataclass(frozen=True)
class TokenFile:
    """A file of GPT-2 tokens."""

    path: Path
    offset: int
    """Bytes before the first token."""
    tokens: int
    is_shard: bool
    """Whether the file has the layout of our shards and can be used as one."""
    eot_after: bool
    """Whether `<|endoftext|>` ends a document rather than beginning it."""

    def read(self) -> np.ndarray:
        """Return the memory-mapped tokens: (tokens,) uint16."""
        shape = (self.tokens,)
        return np.memmap(self.path, TOKEN_DTYPE, "r", offset=self.offset, shape=shape)


def is_token_file(path: str) -> bool:
    """Return whether the file name has the suffix of a token file."""
    return PurePosixPath(path.lower()).suffix in SUFFIXES


def split_of_file(path: str) -> Split:
    """Return "val" if the file name, without its folders, contains `val`; else "train"."""
    return "val" if "val" in PurePosixPath(path).name.lower() else "train"


def open_token_file(path: Path, name: str) -> TokenFile:
    """Detect the layout of a token file from its name in the source, first bytes and size.

    Raises:
        UserError: The layout is unknown, the file is truncated, or its tokens are not GPT-2's.
    """
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3)
    if PurePosixPath(name.lower()).suffix == ".npy":
        file = _open_npy(path, name)
    elif len(header) == 3 and header[0] == MAGIC:
        if header[1] != VERSION:
            raise UserError(
                f"{name}: llm.c format version {header[1]}, but only version {VERSION} has uint16 "
                f"tokens; {_REMOVE}"
            )
        file = TokenFile(path, HEADER_BYTES, int(header[2]), is_shard=True, eot_after=False)
    else:
        n_tokens, odd = divmod(size, TOKEN_DTYPE.itemsize)
        if odd:
            raise UserError(f"{name}: {size} bytes cannot be uint16 tokens; {_REMOVE}")
        first = np.fromfile(path, TOKEN_DTYPE, 1)
        file = TokenFile(path, 0, n_tokens, is_shard=False, eot_after=bool((first != EOT).all()))
    expected = file.offset + file.tokens * TOKEN_DTYPE.itemsize
    if size != expected:
        raise UserError(
            f"{name}: {size} bytes, but the header gives {file.tokens} tokens in {expected} bytes; "
            "download the file again, or remove it from source.paths"
        )
    if file.tokens < 1:
        raise UserError(f"{name}: {size} bytes, no tokens; {_REMOVE}")
    if (largest := int(file.read()[:_CHECKED_TOKENS].max())) >= N_VOCAB:
        raise UserError(f"{name}: token {largest} is outside GPT-2's vocabulary; {_REMOVE}")
    return file


def _open_npy(path: Path, name: str) -> TokenFile:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's parser raises many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not readable as .npy ({reason}); {_REMOVE}") from None
    if not isinstance(tokens, np.memmap) or tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1:
        raise UserError(f"{name}: not a one-dimensional uint16 array; {_REMOVE}")
    return TokenFile(path, tokens.offset, len(tokens), is_shard=False, eot_after=False)
