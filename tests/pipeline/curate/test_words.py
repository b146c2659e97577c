"""The word splitter, its frozen tables and hashes."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate import hashing, signatures, words
from pipeline.curate.characters import code_table

ALPHABET = "aBé 東3.,-'’:/@…\n\r\t•#=_\u2028İ🙂"


def split(kind, texts):
    """Return the words of each text as strings."""
    batch = words.as_texts(pa.array(texts, pa.large_string()))
    found = kind(batch)
    data = batch.data.tobytes()
    flat = [data[a:b].decode() for a, b in zip(found.starts, found.ends, strict=True)]
    return [flat[a:b] for a, b in zip(found.firsts, found.firsts[1:], strict=False)]


@pytest.mark.parametrize(
    ("text", "plain", "surface"),
    [
        ("It's 3.5 %", "it s 3 5", "It 's 3.5 %"),
        (
            "well-known covid-19, 2019-20",
            "well known covid 19 2019 20",
            "well - known covid-19 , 2019 - 20",
        ),
        (
            "J. Smith of the U.S. saw Mr. X.",
            "j smith of the u s saw mr x",
            "J. Smith of the U.S. saw Mr. X.",
        ),
        ("end.Next 10:30 and/or 1/2", "end next 10 30 and or 1 2", "end . Next 10:30 and / or 1/2"),
        ("wait... 1,000 !! -- a,b ==", "wait 1 000 a b", "wait ... 1,000 ! ! -- a , b = ="),
        ("“don’t” 東京タワー。", "don t 東 京 タ ワ ー", "“ don ’t ” 東 京 タ ワ ー 。"),
        ("a_b@c.d AT&T Über ２", "a b c d at t Über ２", "a_b@c.d AT&T Über ２"),
        (" \u3000\n", "", ""),
    ],
)
def test_words(text, plain, surface):
    assert [
        word.lower() if word.isascii() else word for word in split(words.plain_words, [text])[0]
    ] == plain.split()
    assert split(words.surface_words, [text])[0] == surface.split()


def test_tables_and_hashes_are_frozen():
    """Every stored key depends on these: a change here is a new `words.VERSION`."""

    def digest(array):
        return hashlib.sha256(array.tobytes()).hexdigest()[:16]

    batch = words.as_texts(pa.array(["The quick brown fox, 東京 — it's " + "x" * 99, "é"]))
    assert words.VERSION == 1
    assert digest(code_table()) == "d7820b1f883b7f12"
    assert digest(signatures.multipliers()) == "60e8b7962529ba6d"
    assert digest(words.plain_words(batch).hashes) == "81bf65d2dc2ed128"
    assert digest(words.surface_words(batch).hashes) == "39080a792fa9a51f"
    assert digest(signatures.sign(batch)) == "319729226390c2c8"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(ALPHABET, max_size=12)), max_size=6))
def test_rows_do_not_depend_on_their_neighbours(texts):
    """The words of each row are those of the row alone, and equal words have equal hashes."""
    for kind in (words.plain_words, words.surface_words):
        assert split(kind, texts) == [split(kind, [text])[0] for text in texts]
        found = kind(words.as_texts(pa.array(texts, pa.string())))
        flat = [word for row in split(kind, texts) for word in row]
        key = [word.encode().lower() for word in flat] if kind is words.plain_words else flat
        assert len({*zip(key, found.hashes.tolist(), strict=True)}) == len({*key})
    joined = "".join("".join(row) for row in split(words.surface_words, texts))
    assert joined == "".join("".join((text or "").split()) for text in texts)


def test_every_layout_of_a_column_gives_the_same_texts():
    column = pa.array(["drop", "é", None, "", "long enough for a view of strings"])
    expected = words.as_texts(column.slice(1))
    for kind in (
        pa.large_string(),
        pa.binary(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ):
        other = words.as_texts(pa.chunked_array([column.cast(kind)]).slice(1))
        assert all(map(np.array_equal, other, expected))
    assert words.as_texts(pa.chunked_array([], pa.string())).offsets.tolist() == [0]


def test_span_hashes_of_any_length():
    data = np.frombuffer(bytes(range(1, 251)) * 2, dtype=np.uint8)
    sizes = np.arange(0, 250)
    a = hashing.span_hashes(data, np.zeros_like(sizes), sizes)
    b = hashing.span_hashes(data, np.full_like(sizes, 250), 250 + sizes)
    assert np.array_equal(a, b)
    assert len(np.unique(a)) == len(a)
