"""Tests for pipeline.format.tokenizer."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.format import tokenizer

# Any text that UTF-8 can encode: everything but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(TEXT)
@example("<|endoftext|>")
@example("a<|endoftext|><|endoftext|> b")
@example(" \n\n \t é 中文 👩‍👩‍👧 don't WE'LL 1234567")
def test_decode_inverts_encode_and_no_text_gives_eot(text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode_bytes(tokens) == text.encode()
    assert tokenizer.EOT not in tokens
    assert all(0 <= token < tokenizer.N_VOCAB for token in tokens)
    assert int(tokenizer.token_bytes()[tokens].sum()) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # From the encoder of openai/gpt-2.
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("", []),
    ],
)
def test_encode_equals_the_published_encoder(text: str, tokens: list[int]) -> None:
    assert tokenizer.encode(text) == tokens


def byte_pairs(piece: bytes) -> list[int]:
    """Encode one word by the definition: merge the pair of lowest rank first."""
    ranks = tokenizer.ranks()
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        pairs = [a + b for a, b in pairwise(parts)]
        best = min(pairs, key=lambda pair: ranks.get(pair, 1 << 30))
        if best not in ranks:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [best]
    return [ranks[part] for part in parts]


@given(st.text("abcdefghijklmnopqrstuvwxyzéß中", min_size=1, max_size=40))
def test_encode_equals_the_definition_of_byte_pair_encoding(word: str) -> None:
    assert tokenizer.encode(word) == byte_pairs(word.encode())


def test_an_incomplete_character_decodes_to_a_replacement_character() -> None:
    tokens = tokenizer.encode("👩")
    assert len(tokens) > 1
    assert "\ufffd" in tokenizer.decode(tokens[:1])


def test_token_bytes_has_a_length_for_each_token_but_eot() -> None:
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (50257,)
    assert lengths[tokenizer.EOT] == 0
    assert lengths[:256].tolist() == [1] * 256
    assert (lengths[:-1] > 0).all()


@pytest.mark.parametrize("unit", [" ", "a", "\n", "^", "中"])
def test_a_long_repetition_of_one_character_can_be_encoded(unit: str) -> None:
    text = unit * 300_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
