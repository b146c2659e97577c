"""Tests for pipeline.format.parquet."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.format.parquet import read_batches, row_groups
from tests.support.small_data import some_texts, write_parquet


@pytest.mark.parametrize("group", [1, 4, 100])
@pytest.mark.parametrize("batch", [1, 3000, 1 << 20])
def test_read_batches_yields_exactly_the_rows(tmp_path: Path, group: int, batch: int) -> None:
    texts = [*some_texts(7), None, "", *some_texts(4, "é")]
    path = tmp_path / "a.parquet"
    write_parquet(path, texts, group)
    for start in range(0, len(texts) + 1, 3):
        for stop in range(start, len(texts) + 1):
            rows: dict[int, str | None] = {}
            for first, block in read_batches(path, "text", start, stop, batch):
                assert rows.keys().isdisjoint(range(first, first + len(block)))
                rows |= dict(enumerate(block.to_pylist(), first))
            assert rows == dict(enumerate(texts[start:stop], start)), (start, stop)


def test_row_groups_returns_rows_and_bytes_from_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"{i:050d}" for i in range(100)], group=40)
    groups = row_groups(path, "text")
    assert [rows for rows, _ in groups] == [40, 40, 20]
    # 50 bytes and a length of 4 per row, with a margin for pages and dictionaries.
    assert all(50 * rows < size < 70 * rows + 500 for rows, size in groups)
