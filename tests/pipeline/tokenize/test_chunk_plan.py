"""Tests for pipeline.tokenize.chunk_plan."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.format.manifest import RawManifest, Source
from pipeline.runtime.errors import UserError
from pipeline.tokenize.chunk_plan import cut_rows, plan_chunks
from tests.support.small_data import some_texts, write_parquet, write_raw

GROUPS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10_000)), max_size=12)


@given(groups=GROUPS, target=st.integers(1, 20_000))
def test_cut_covers_every_row_once_in_order(groups: list[tuple[int, int]], target: int) -> None:
    runs = cut_rows(groups, target)
    rows = [row for start, stop in runs for row in range(start, stop)]
    assert rows == list(range(sum(count for count, _ in groups)))
    assert all(start < stop for start, stop in runs)
    assert all(a[1] == b[0] for a, b in pairwise(runs))


@given(
    rows=st.lists(st.integers(1, 200), min_size=1, max_size=10),
    row_bytes=st.integers(1, 500),
    target=st.integers(1, 50_000),
)
def test_cut_is_balanced(rows: list[int], row_bytes: int, target: int) -> None:
    """Rows of equal length: ranges differ by at most two rows, and are near the target."""
    groups = [(count, count * row_bytes) for count in rows]
    lengths = [stop - start for start, stop in cut_rows(groups, target)]
    assert max(lengths) - min(lengths) <= 2
    if row_bytes <= target <= sum(rows) * row_bytes:
        mean = sum(rows) * row_bytes / len(lengths)
        assert target / 2 <= mean + row_bytes
        assert mean - row_bytes <= 2 * target


def test_cut_goldens() -> None:
    assert cut_rows([(10, 1000)], 250) == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert cut_rows([(10, 1000), (10, 3000)], 2000) == [(0, 13), (13, 20)]
    assert cut_rows([(5, 10)], 10**9) == [(0, 5)]
    assert cut_rows([], 100) == []


def test_few_large_files_keep_many_cores_busy() -> None:
    """FineWeb's sample-10BT: 15 files of about 3.1 GB of text, in small or large row groups."""
    target = 20_000_000 * 9 // 2
    for groups in ([(1_000, 3_120_000)] * 991, [(330_000, 1_031_000_000)] * 3):
        sizes = [stop - start for start, stop in cut_rows(groups, target)]
        rounds = -(-15 * len(sizes) // 256)
        assert 15 * len(sizes) / (256 * rounds) > 0.9  # of the cores' time
        assert max(sizes) <= 1.01 * min(sizes)


def test_plan_covers_the_files_in_order(tmp_path: Path) -> None:
    raw = write_raw(tmp_path, [some_texts(30), [], some_texts(20, "x")])
    source = RawManifest.load(raw)
    chunks = plan_chunks(raw, source, 2000)
    assert len(chunks) > 4
    assert sorted({c.file_index for c in chunks}) == [0, 2]
    for index, file in enumerate(source.files):
        runs = [(c.start, c.stop) for c in chunks if c.file_index == index]
        assert [row for a, b in runs for row in range(a, b)] == list(range(file.rows))
    assert chunks == plan_chunks(raw, source, 2000)


def test_plan_names_the_unusable_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", ["x"])

    def manifest(column: str) -> RawManifest:
        source = Source(kind="files", repo="files", revision="", text_column=column)
        return RawManifest(sources={"main": source}, files=[file])

    with pytest.raises(UserError, match=r"a\.parquet.*'body'.*text, id"):
        plan_chunks(tmp_path, manifest("body"), 1000)
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet: not readable"):
        plan_chunks(tmp_path, manifest("text"), 1000)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"a\.parquet: no such file"):
        plan_chunks(tmp_path, manifest("text"), 1000)
