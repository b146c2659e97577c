"""Signatures, buckets and the decision in row order."""

import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate import near_duplicates, signatures, words
from pipeline.curate.signatures import HASHES


def batch(texts):
    return words.as_texts(pa.array(texts, pa.large_string()))


def shared(signs, bands=14, rows=8, alive=None, groups=None):
    keys = near_duplicates.band_keys(signs, bands, rows)
    alive = np.ones(len(signs), bool) if alive is None else alive
    return near_duplicates.shared_buckets(keys, alive, groups)


def clusters(seed, n=60):
    """Return signatures of rows that are copies of a few, with a random number of other minima."""
    source = np.random.default_rng(seed)
    signs = source.integers(1, 60000, (8, HASHES))[source.integers(0, 8, n)].astype(np.uint16)
    for row in signs:
        changed = source.choice(HASHES, source.integers(0, 70), replace=False)
        row[changed] = source.integers(1, 60000, len(changed))
    signs[source.random(n) < 0.1] = 0
    return signs


@pytest.fixture(scope="module")
def planted():
    """Pairs of a text and a copy in which a random part of the words is replaced."""
    source = random.Random(3)
    vocabulary = [f"word{i}" for i in range(5000)]
    texts, copies = [], []
    for i in range(1500):
        text = source.choices(vocabulary, k=150)
        copy = list(text)
        for _ in range(source.randrange(1, 12)):
            copy[source.randrange(150)] = f"new{i}"
        texts.append(" ".join(text))
        copies.append(" ".join(copy).upper())
    return texts, copies


@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (16, 7)])
def test_hit_rate_follows_the_curve(planted, bands, rows):
    texts, copies = map(batch, planted)
    a, b = signatures.sign(texts), signatures.sign(copies)
    sets = zip(signatures.shingles(texts), signatures.shingles(copies), strict=True)
    jaccard = np.array([len(np.intersect1d(x, y)) / len(np.union1d(x, y)) for x, y in sets])
    hit = (
        near_duplicates.band_keys(a, bands, rows) == near_duplicates.band_keys(b, bands, rows)
    ).any(axis=0)
    chance = 1 - (1 - jaccard**rows) ** bands
    for low in np.arange(0.5, 0.95, 0.1):
        inside = (jaccard >= low) & (jaccard < low + 0.1)
        assert inside.sum() > 50
        error = np.sqrt((chance * (1 - chance))[inside].sum()) + 1
        assert abs(hit[inside].sum() - chance[inside].sum()) < 4 * error
    assert hit[jaccard >= 0.85].mean() >= 0.99
    error = np.sqrt((jaccard * (1 - jaccard)).mean() / HASHES)
    assert np.sqrt((((a == b).mean(axis=1) - jaccard) ** 2).mean()) == pytest.approx(error, rel=0.1)


def test_short_and_cut_documents(monkeypatch):
    """Under five words there is no signature; a long document's is that of all its words."""
    long = " ".join(f"w{i % 977}" for i in range(3000))
    rows = ["one two three four", "", None, "a b c d e", long, "東京" * 900]
    whole = signatures.sign(batch(rows))
    assert whole.any(axis=1).tolist() == [False, False, False, True, True, True]
    monkeypatch.setattr(words, "LONG", 1001)
    assert np.array_equal(signatures.sign(batch(rows)), whole)
    shingles = signatures.shingles(batch(rows))
    monkeypatch.setattr(words, "LONG", 1 << 22)
    assert all(map(np.array_equal, shingles, signatures.shingles(batch(rows))))
    assert len(shingles[5]) == 2


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 900), st.integers(1, 2000))
def test_signatures_do_not_depend_on_batches_or_pieces(rows, piece):
    texts = [f"{i} row of " + f"text {i} " * (i % 50) for i in range(0, 900, 7)]
    with pytest.MonkeyPatch.context() as patch:
        whole = signatures.sign(batch(texts))
        patch.setattr(words, "PIECE", piece)
        parts = [signatures.sign(batch(texts[i : i + rows])) for i in range(0, len(texts), rows)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("seed", [1, 2])
def test_decision_in_row_order(seed, threshold):
    """As a plain loop over all pairs decides; rows appended later change nothing."""
    signs, groups = clusters(seed), np.arange(60) % 2
    similarity = None if threshold is None else near_duplicates.estimate(signs)
    expected = np.full(60, -1)
    kept: list[int] = []
    for row in np.flatnonzero(signs.any(axis=1)).tolist():
        near = [
            ((signs[row] == signs[other]).sum() if threshold else 0, -other)
            for other in kept
            if groups[row] == groups[other]
            and (signs[row] == signs[other]).reshape(14, 8).all(axis=1).any()
            and (threshold is None or (signs[row] == signs[other]).mean() >= threshold)
        ]
        if near:
            expected[row] = -max(near)[1]
        else:
            kept.append(row)
    found = near_duplicates.decide(shared(signs, groups=groups), 60, similarity, threshold or 0)
    assert 5 < (expected >= 0).sum() < 50
    assert np.array_equal(found.twins, expected)
    assert np.array_equal(np.isnan(found.values), (expected < 0) | (threshold is None))
    part = near_duplicates.decide(
        shared(signs[:40], groups=groups[:40]), 40, similarity, threshold or 0
    )
    assert np.array_equal(part.twins, expected[:40])


def test_components_are_those_of_a_union_of_pairs():
    signs = clusters(4)
    label = list(range(60))
    for row in range(60):
        for other in range(row):
            same = (signs[row] == signs[other]).reshape(14, 8).all(axis=1)
            if signs[row].any() and same.any() and label[row] != label[other]:
                low, high = sorted((label[row], label[other]))
                label = [low if one == high else one for one in label]
    expected = [one if one != row else -1 for row, one in enumerate(label)]
    assert near_duplicates.components(shared(signs), 60).tolist() == expected


def test_chain_keeps_what_is_far_from_kept_rows():
    """a is near b and b near c, but not a near c: in row order a and c are kept."""
    a = np.arange(1, HASHES + 1, dtype=np.uint16)
    b, c = a.copy(), a.copy()
    b[:40] += 1000
    c[:40] += 1000
    c[40:80] += 1000
    buckets = shared(np.stack([a, b, c]))
    similarity = near_duplicates.estimate(np.stack([a, b, c]))
    found = near_duplicates.decide(buckets, 3, similarity, 0.5)
    assert found.twins.tolist() == [-1, 0, -1]
    assert found.values[1] == 72 / 112
    assert near_duplicates.components(buckets, 3).tolist() == [-1, 0, 0]
    reference = np.array([False, True, False])
    near = near_duplicates.decide(buckets, 3, similarity, 0.5, reference)
    assert near.twins.tolist() == [1, -1, 1]


def test_exact_verification_drops_nothing_under_the_threshold(planted):
    texts = [text for pair in zip(*planted, strict=True) for text in pair][:400]
    sets = signatures.shingles(batch(texts))
    signs = signatures.sign(batch(texts))
    found = near_duplicates.decide(
        shared(signs), 400, near_duplicates.exactly(sets.__getitem__), 0.75
    )
    dropped = np.flatnonzero(found.twins >= 0)
    assert 20 < len(dropped) < 200
    for row in dropped:
        both = np.intersect1d(sets[row], sets[found.twins[row]])
        either = np.union1d(sets[row], sets[found.twins[row]])
        assert found.values[row] == len(both) / len(either) >= 0.75


def test_exact_duplicates():
    texts = ["a", "b", "", "a", None, "b", "a", "", "c"]
    hashes = near_duplicates.text_hashes(batch(texts))
    alive = np.array([True] * 9)
    find = near_duplicates.exact_duplicates
    assert find(hashes, alive).tolist() == [-1, -1, -1, 0, -1, 1, 0, -1, -1]
    alive[0] = False
    assert find(hashes, alive).tolist() == [-1, -1, -1, -1, -1, 1, 3, -1, -1]
    alive[0] = True
    groups = np.array([0, 0, 0, 1, 0, 0, 1, 0, 0])
    assert find(hashes, alive, groups).tolist() == [-1, -1, -1, -1, -1, 1, 3, -1, -1]
    assert find(hashes[:0], alive[:0]).tolist() == []


def test_short_rows_are_signed_in_bounded_memory():
    """Little more than the signatures, which are 224 bytes per row."""
    rows = 120_000
    texts = batch([f"{i} b c d e" for i in range(rows)])
    tracemalloc.start()
    signed = signatures.sign(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * signed.nbytes
    for row in (0, rows - 1):
        assert np.array_equal(signatures.sign(batch([f"{row} b c d e"]))[0], signed[row])


def test_too_many_bands_are_refused():
    with pytest.raises(ValueError, match="112"):
        near_duplicates.band_keys(clusters(1), 15, 8)
