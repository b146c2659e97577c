"""Tokenizer files of the Hugging Face layout, from GPT-2's ranks.

The ranks (`bytes -> id`) define the tokenizer, but the layout wants the merges. These follow from
the ranks: ids were assigned in the order of the merges, so byte-pair encoding of a token's bytes
with only the earlier merges leaves the two parts that it was merged from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from model.config import EOT
from model.files import write_json, write_text

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
SPECIAL_TOKENS, SETTINGS = "special_tokens_map.json", "tokenizer_config.json"
FILES = (VOCABULARY, MERGES, TOKENIZER, SPECIAL_TOKENS, SETTINGS)


def write_tokenizer(folder: Path, ranks: Mapping[bytes, int], block_size: int) -> None:
    """Write `tokenizer.json`, and the older `vocab.json` and `merges.txt`, with their settings.

    In a text that readers of these files encode, a literal `<|endoftext|>` is the special token.

    `ranks` are the ids of GPT-2's 50256 byte strings.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary, merges = spelled(ranks)
    write_text(folder / VOCABULARY, json.dumps(vocabulary, ensure_ascii=False))
    lines = [f"{left} {right}\n" for left, right in merges]
    write_text(folder / MERGES, "".join(["#version: 0.2\n", *lines]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    write_text(folder / TOKENIZER, tokenizer.to_str())
    special = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
    write_json(folder / SPECIAL_TOKENS, special)
    write_json(
        folder / SETTINGS,
        {
            **special,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": block_size,
            "tokenizer_class": "GPT2Tokenizer",
        },
    )


def spelled(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary in the order of its ids, and the merges, in printable characters."""
    characters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in sorted(ranks.items(), key=lambda x: x[1])}
    vocabulary[END_OF_TEXT] = EOT
    return vocabulary, [(spell(left), spell(right)) for left, right in recover_merges(ranks)]


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merged pairs in order, one for each token of more than one byte."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _byte_pair_encode(token, ranks, below=rank)
        assert len(parts) == 2, f"{token!r} is not a merge of two earlier tokens"
        merges.append((parts[0], parts[1]))
    return merges


def _byte_pair_encode(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """Encode `token` with the merges of rank less than `below`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pair_ranks = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        best = min(pair_ranks)
        if best >= below:
            break
        i = pair_ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bytes_to_unicode() -> list[str]:
    """Return a printable character for each byte (openai/gpt-2, src/encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, others = [], 0
    for byte in range(256):
        characters.append(chr(byte if byte in printable else 256 + others))
        others += byte not in printable
    return characters
