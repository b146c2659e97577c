"""GPT-2's byte-pair encoding, built from the ranks in this package; nothing is downloaded.

The ranks are tiktoken's `r50k_base`, which are GPT-2's (Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2.2).
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

import numpy as np
import tiktoken

EOT = 50256
"""`<|endoftext|>`: precedes each document; no text is encoded to it."""

N_VOCAB = 50257
"""Size of the vocabulary, including `<|endoftext|>`."""

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# Splits text before the merges (openai/gpt-2, src/encoder.py), in tiktoken's syntax.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@lru_cache(maxsize=1)
def ranks() -> dict[bytes, int]:
    """Return the 50,256 byte strings of the vocabulary and their token ids."""
    data = (resources.files("pipeline.format") / "gpt2.tiktoken").read_bytes()
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise RuntimeError("pipeline/format/gpt2.tiktoken is damaged; restore it by `git checkout`")
    lines = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@lru_cache(maxsize=1)
def encoding() -> tiktoken.Encoding:
    """Return tiktoken's encoder for these ranks."""
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks(),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=N_VOCAB,
    )


def encode(text: str) -> list[int]:
    """Encode ``text``; a literal `<|endoftext|>` in it is ordinary text."""
    return encoding().encode_ordinary(text)


def decode_bytes(tokens: Sequence[int]) -> bytes:
    """Decode ``tokens`` to bytes, which may begin or end inside a character.

    Raises:
        KeyError: An id is outside the vocabulary.
    """
    return encoding().decode_bytes(list(tokens))


def decode(tokens: Sequence[int]) -> str:
    """Decode ``tokens`` to text, with U+FFFD for incomplete characters."""
    return decode_bytes(tokens).decode("utf-8", errors="replace")


@lru_cache(maxsize=1)
def token_bytes() -> np.ndarray:
    """Return the number of bytes of each token, 0 for `<|endoftext|>`: (50257,) int64."""
    lengths = np.zeros(N_VOCAB, dtype=np.int64)
    for token, rank in ranks().items():
        lengths[rank] = len(token)
    return lengths
