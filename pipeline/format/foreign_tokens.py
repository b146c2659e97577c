"""Token files that others publish: what they are, and where their documents lie.

```
llm.c, modded-nanogpt   .bin   256 int32 (see shards.py), uint16 tokens; EOT before a document
nanoGPT                 .bin   uint16 tokens and nothing else; EOT after a document
build-nanogpt           .npy   NumPy's header, uint16 tokens; EOT before a document
```

A document may begin in one file of the first and the last kind and end in the next: what stands
before a file's first EOT continues a document of the file before.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.format.manifest import Split
from pipeline.format.shards import HEADER_BYTES, MAGIC, TOKEN_DTYPE, VERSION
from pipeline.format.tokenizer import EOT, N_VOCAB
from pipeline.runtime.errors import UserError

SUFFIXES = (".bin", ".npy")

_LOOK = 1 << 20


@dataclass(frozen=True)
class TokenFile:
    """A file of GPT-2 tokens."""

    path: Path
    offset: int
    """Bytes before its first token."""
    tokens: int
    is_shard: bool
    """Whether it is laid out as our shards are, so that it can serve as one."""
    eot_after: bool
    """Whether `<|endoftext|>` ends a document, and does not begin it."""

    def read(self) -> np.ndarray:
        """Its tokens, mapped: (tokens,) uint16."""
        shape = (self.tokens,)
        return np.memmap(self.path, TOKEN_DTYPE, "r", offset=self.offset, shape=shape)


def is_token_file(path: str) -> bool:
    """Whether a file's name says that tokens are in it."""
    return PurePosixPath(path.lower()).suffix in SUFFIXES


def split_of_file(path: str) -> Split:
    """Validation where the file's name, without its folders, has `val` in it."""
    return "val" if "val" in PurePosixPath(path).name.lower() else "train"


def open_token_file(path: Path, name: str) -> TokenFile:
    """Find out what a token file is, from its first bytes and its size.

    Args:
        name: what the file is called in messages.

    Raises:
        UserError: it is of no known kind, or cut short, or holds no tokens of GPT-2.
    """
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3)
    if PurePosixPath(name.lower()).suffix == ".npy":
        file = _open_npy(path, name)
    elif len(header) == 3 and header[0] == MAGIC:
        if header[1] != VERSION:
            raise UserError(
                f"{name}: llm.c's version {header[1]}, only {VERSION} has uint16 tokens"
            )
        file = TokenFile(path, HEADER_BYTES, int(header[2]), is_shard=True, eot_after=False)
    else:
        n_tokens, odd = divmod(size, TOKEN_DTYPE.itemsize)
        if odd:
            raise UserError(f"{name}: no uint16 tokens, for it has {size} bytes; leave it out")
        first = np.fromfile(path, TOKEN_DTYPE, 1)
        file = TokenFile(path, 0, n_tokens, is_shard=False, eot_after=bool((first != EOT).all()))
    expected = file.offset + file.tokens * TOKEN_DTYPE.itemsize
    if file.tokens < 1 or size != expected:
        raise UserError(
            f"{name}: {size} bytes, its header says {expected} and {file.tokens} tokens; "
            "have it fetched anew, or leave it out"
        )
    if (largest := int(file.read()[:_LOOK].max())) >= N_VOCAB:
        raise UserError(f"{name}: token {largest} is not of GPT-2's vocabulary; leave it out")
    return file


def _open_npy(path: Path, name: str) -> TokenFile:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever numpy's parser meets
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not readable as .npy ({reason}); leave it out") from None
    if not isinstance(tokens, np.memmap) or tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1:
        raise UserError(f"{name}: it holds no one-dimensional array of uint16; leave it out")
    return TokenFile(path, tokens.offset, len(tokens), is_shard=False, eot_after=False)
