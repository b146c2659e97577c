"""Tests for pipeline.tokenize.unicode_guard and engines: the proof that both engines agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.format import tokenizer
from pipeline.tokenize import engines, unicode_guard
from pipeline.tokenize.engines import (
    MAX_UNBROKEN_BYTES,
    PIECE_BYTES,
    FastEngine,
    Unencodable,
    needs_reference,
    reference,
)
from tests.support.small_data import needs_gigatoken


def arrays(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, texts)])
    return np.frombuffer(b"".join(texts), dtype=np.uint8), offsets


@pytest.fixture(scope="module")
def fast() -> FastEngine:
    found = engines.fast()
    assert found is not None
    return found


def differing(fast: FastEngine, texts: Sequence[str]) -> list[str]:
    """Return the texts that the two engines encode differently."""
    tokens, counts = fast.encode(*arrays([text.encode() for text in texts]))
    expected = tokenizer.encoding().encode_ordinary_batch(list(texts), num_threads=1)
    ends = np.cumsum(counts)
    assert len(tokens) == ends[-1]
    return [
        text
        for text, end, count, right in zip(texts, ends, counts, expected, strict=True)
        if tokens[end - count : end].tolist() != right
    ]


def proven() -> list[str]:
    return [chr(c) for first, last in unicode_guard.PROVEN for c in range(first, last + 1)]


PROVEN = frozenset(proven())


# Each context that the pattern distinguishes, before and after a character.
CONTEXTS = (
    "{}", " {}", "  {}", "a{}", " a{}b", "1{}", "1{}2", "!{}", " !{}?", "\n{}", "\n\n{}x", "\t{}",
    "'{}", "'s{}", "a'{}", "{}'s", "{}'ll", "{}{}", " {}{}a1", "{} ", "{}  x", "{}\n", "{}1", "{}!",
    "\u00a0{}\u3000", "é{}Ж", "中{}٣",
)  # fmt: skip


@needs_gigatoken
def test_engines_agree_on_every_proven_character_in_every_context(fast: FastEngine) -> None:
    """The proof of `unicode_guard.PROVEN`; the next test has each context by itself."""
    texts = ["x".join(CONTEXTS).replace("{}", c) for c in proven()]
    assert len(texts) > 50_000
    texts += [c + " x" for c in proven()]
    assert differing(fast, texts) == []


@pytest.mark.soak
@needs_gigatoken
def test_engines_agree_on_every_proven_character_in_single_contexts(fast: FastEngine) -> None:
    for context in CONTEXTS:
        assert differing(fast, [context.replace("{}", c) for c in proven()]) == []


# Hard cases for the pattern and the merges, mixed with single characters of the proven set.
FRAGMENTS = (
    " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\u0085", "\x00",
    "'s", "'t", "'ll", "'ve", "'re", "'m", "'d", "'S", "’s", "don't", "''", "the", " the", " of",
    "1", "12", "1234567", "٣", "Ⅷ", "²", "½", "!", "?!", "...", "-", "--", "_", "<|endoftext|>",
    "é", "e\u0301", "ß", "Ж", "中", "の", "한", "אב", "नम", "ไท", "😀", "👩‍👩‍👧", "🇩🇪", "\ufeff",
    "\ufffd", "https://x.org/?a=1&b", "aaaaaaaaaaaaaaaaaaaaaaaa", "=" * 40, " " * 40,
)  # fmt: skip
PROVEN_CHARACTER = (
    st.sampled_from(unicode_guard.PROVEN).flatmap(lambda run: st.integers(*run)).map(chr)
)
ANY_CHARACTER = st.one_of(PROVEN_CHARACTER, st.characters(exclude_categories=["Cs"]))
TEXT = st.lists(st.one_of(st.sampled_from(FRAGMENTS), PROVEN_CHARACTER), max_size=60).map("".join)


@needs_gigatoken
@given(st.lists(TEXT, min_size=1, max_size=20))
@settings(max_examples=150)
def test_engines_agree_on_random_texts(fast: FastEngine, texts: list[str]) -> None:
    data, offsets = arrays([text.encode() for text in texts])
    assert not unicode_guard.unproven(data, offsets).any()
    assert differing(fast, texts) == []


@pytest.mark.soak
@needs_gigatoken
def test_engines_agree_on_a_million_random_texts(fast: FastEngine) -> None:
    draw = random.Random(1)
    characters = proven()
    for _ in range(1000):
        texts = []
        for _ in range(1000):
            rare = draw.choice((0.0, 0.1, 0.5, 1.0))
            length = draw.choice((3, 10, 30, 100))
            words = draw.choices(FRAGMENTS, k=length)
            texts.append(
                "".join(draw.choice(characters) if draw.random() < rare else w for w in words)
            )
        assert differing(fast, texts) == []


def test_guard_classifies_every_character() -> None:
    allowed = np.zeros(0x110000, dtype=bool)
    for first, last in unicode_guard.PROVEN:
        assert first % 64 == 0
        assert (last + 1) % 64 == 0
        allowed[first : last + 1] = True
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    found = unicode_guard.unproven(*arrays([chr(c).encode() for c in points]))
    assert np.array_equal(found, ~allowed[points])


@given(st.data())
@settings(max_examples=200)
def test_guard_finds_a_character_at_any_offset(data: st.DataObject) -> None:
    """Among much ASCII, at any offset in a word of eight bytes and in a document."""
    pieces = data.draw(st.lists(st.tuples(st.integers(0, 300), ANY_CHARACTER), max_size=8))
    text = "".join("a" * count + character for count, character in pieces) + "b" * 20
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=5)))
    documents = [text[a:b] for a, b in pairwise(borders)]
    before = text[: borders[0]].encode()
    buffer, offsets = arrays([before, *(d.encode() for d in documents), text.encode()])
    expected = [not PROVEN.issuperset(d) for d in documents]
    assert unicode_guard.unproven(buffer, offsets[1 : len(documents) + 2]).tolist() == expected


LONG = st.lists(
    st.one_of(st.sampled_from((*FRAGMENTS, "x" * 90, "\n" * 90)), PROVEN_CHARACTER), max_size=120
).map("".join)


@given(LONG)
@settings(max_examples=200)
def test_cutting_a_long_document_keeps_its_tokens(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "PIECE_BYTES", 50)
        assert reference(text.encode()).tolist() == tokenizer.encode(text)


@needs_gigatoken
def test_long_document_is_encoded_by_the_fast_engine(fast: FastEngine) -> None:
    text = "".join(f"{i} words, {i * i}é and more\n" for i in range(60_000))
    data, offsets = arrays([text.encode()])
    assert len(data) > 3 * PIECE_BYTES
    assert not needs_reference(data, offsets).any()
    assert np.array_equal(fast.encode(data, offsets)[0], reference(text.encode()))


def test_unbroken_documents_need_the_reference() -> None:
    texts = [b"a" * (PIECE_BYTES + 1), b"a" * PIECE_BYTES, b"a b " * PIECE_BYTES]
    texts += [b"x" + b" " * (PIECE_BYTES + 1)]
    assert needs_reference(*arrays(texts)).tolist() == [True, False, False, True]


def spaces_and_a_word(count: int) -> bytes:
    return b" " * count + b"x"


def test_limits_of_the_reference() -> None:
    assert len(reference(spaces_and_a_word(PIECE_BYTES - 1))) == PIECE_BYTES - 1
    assert len(reference("😀".encode() * 1_000_000)) == 2_000_000
    # tiktoken's pattern overflows its stack in Rust, which raises a BaseException.
    with pytest.raises(BaseException, match="StackOverflow"):
        tokenizer.encode(spaces_and_a_word(2_000_000).decode())
    for text, reason in [
        (spaces_and_a_word(2_000_000), "panic"),
        (b"a" * (MAX_UNBROKEN_BYTES + 1), "unbroken"),
        (b"a" * 50_000_000, "unbroken"),
        (b"\xff", "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),  # a lone surrogate
    ]:
        with pytest.raises(Unencodable, match=reason):
            reference(text)


@needs_gigatoken
def test_fast_engine_cache_is_bounded(fast: FastEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_CACHE_BYTES", 20 << 20)
    generator = np.random.default_rng(1)
    fresh = FastEngine()
    before, grown = engines._resident_bytes(), []
    for _ in range(16):  # no word repeats: an unbounded cache would take 160 MB
        text = generator.integers(97, 123, 1_000_000).astype(np.uint8)
        text[::8] = 32
        tokens, _ = fresh.encode(text, np.array([0, len(text)]))
        grown.append(engines._resident_bytes() - before)
    assert max(grown) < 80 << 20
    assert np.array_equal(tokens, reference(text.tobytes()))
