"""GPT-2's byte-pair encoding, from the ranks that this package ships: never a download.

The ranks are those that tiktoken publishes for `r50k_base`, which GPT-2 shares (Radford et al.
2019, "Language Models are Unsupervised Multitask Learners", section 2.2).
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

import numpy as np
import tiktoken

EOT = 50256
"""`<|endoftext|>`: stands before each document, and is never made from text."""

N_VOCAB = 50257
"""Tokens of the vocabulary, `<|endoftext|>` among them."""

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# How text is cut before the merges (openai/gpt-2, src/encoder.py), as tiktoken writes it.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@lru_cache(maxsize=1)
def ranks() -> dict[bytes, int]:
    """The 50,256 byte strings of the vocabulary and their token ids."""
    data = (resources.files("pipeline.format") / "gpt2.tiktoken").read_bytes()
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise RuntimeError("pipeline/format/gpt2.tiktoken is damaged; `git checkout` restores it")
    lines = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@lru_cache(maxsize=1)
def encoding() -> tiktoken.Encoding:
    """tiktoken's encoder over these ranks."""
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks(),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=N_VOCAB,
    )


def encode(text: str) -> list[int]:
    """The tokens of ``text``; a literal `<|endoftext|>` in it is ordinary text."""
    return encoding().encode_ordinary(text)


def decode_bytes(tokens: Sequence[int]) -> bytes:
    """The bytes behind ``tokens``; a document's borders may lie inside a character.

    Raises:
        KeyError: on an id outside the vocabulary.
    """
    return encoding().decode_bytes(list(tokens))


def decode(tokens: Sequence[int]) -> str:
    """The text behind ``tokens``, cut characters shown as U+FFFD."""
    return decode_bytes(tokens).decode("utf-8", errors="replace")


@lru_cache(maxsize=1)
def token_bytes() -> np.ndarray:
    """(50257,) int64: the number of bytes each token stands for, 0 for `<|endoftext|>`."""
    lengths = np.zeros(N_VOCAB, dtype=np.int64)
    for token, rank in ranks().items():
        lengths[rank] = len(token)
    return lengths
