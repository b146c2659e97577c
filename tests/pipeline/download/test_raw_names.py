"""Tests for pipeline.download.raw_names."""

from __future__ import annotations

import pytest

from pipeline.download.raw_names import check_names
from pipeline.download.source_paths import PathFile
from pipeline.runtime.errors import UserError


def check(names: list[str]) -> None:
    check_names([PathFile(name, f"/{name}", 1, "", local=True) for name in names])


def test_names_that_can_be_in_one_folder_pass() -> None:
    check(["a.txt", "a.csv", "b/a.txt", "c.jsonl.gz", "c.jsonl", "d.x.parquet", "é/می‌خواهم.txt"])


@pytest.mark.parametrize(
    ("names", "n_lines"),
    [
        (["x.jsonl", "x.jsonl.parquet"], 1),
        (["A/x.txt", "a/X.txt", "a/y.txt"], 1),
        (["\u00e9.txt", "e\u0301.txt"], 1),
        (["stra\u00dfe.txt", "STRASSE.txt"], 1),
        (["a.parquet", "a.parquet/b.parquet"], 1),
        (["A.parquet", "a.parquet/b.parquet"], 1),
        (["a.jsonl", "a.jsonl.parquet/b.txt"], 1),
        (["manifest.json/a.parquet"], 1),
        (["a\nb.txt", "a\x1b[31m.txt", "a\udcff.txt", "a\u2028.txt"], 4),
        (["a\u202etxt.csv", "a\u2066.txt", "a\u2069.txt", "\u200ea.txt", "\u061ca.txt"], 5),
        (["../a.txt", "/a.txt", "a\\b.txt"], 3),
        (["a" * 244 + ".txt", "é" * 122 + ".txt"], 2),
        (["a/" * 1000 + ".txt"], 1),
        (["a.bin.gz", "a.npy.zst", "a.parquet.gz", "A.PARQUET.XZ"], 4),
    ],
)
def test_an_impossible_name_is_refused_in_one_line_each(names: list[str], n_lines: int) -> None:
    with pytest.raises(UserError) as error:
        check(["fine.txt", *names])
    lines = str(error.value).split("\n")
    assert len(lines) == n_lines
    assert all(line.isprintable() and "exclude" in line for line in lines)
