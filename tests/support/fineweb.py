"""A local hub with FineWeb's layout, real text, and the HellaSwag and LAMBADA benchmarks.

The text is that of `../shared/data` if it exists (parquet with FineWeb's nine columns), else the
addresses of source `sample`, cut to the length of web pages.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.download.row_groups import MAX_GROUP_BYTES
from pipeline.download.sample import write_sample
from pipeline.format import tokenizer
from pipeline.format.parquet import FINEWEB_SCHEMA
from tests.support.hub import FINEWEB, Hub
from tests.support.repo import SHARED
from train.evals import hellaswag, lambada

ROW_GROUP_ROWS = 1_000
_PAGE_WORDS = 500


def corpus() -> pa.Table:
    """Return real documents with FineWeb's columns."""
    if files := sorted(SHARED.glob("data/*/*.parquet")):
        return pa.concat_tables([pq.read_table(file).cast(FINEWEB_SCHEMA) for file in files])
    with tempfile.TemporaryDirectory() as folder:
        addresses = [pq.read_table(file).to_pylist() for file in write_sample(Path(folder), None)]
    pages = [page for table in addresses for row in table for page in _pages(row)]
    return pa.Table.from_pylist(pages, schema=FINEWEB_SCHEMA)


def _pages(row: dict[str, Any]) -> list[dict[str, Any]]:
    words = row["text"].split(" ")
    texts = [" ".join(words[i : i + _PAGE_WORDS]) for i in range(0, len(words), _PAGE_WORDS)]
    return [{**row, "text": text, "token_count": len(tokenizer.encode(text))} for text in texts]


def serve(hub: Hub, files: int, documents: int | None, *, coarse: bool, tasks: int) -> int:
    """Fill a hub with FineWeb's `sample-10BT`, HellaSwag and LAMBADA.

    Args:
        files: Number of parquet files; their row groups have 1,000 rows.
        documents: Approximate number of documents; None: all.
        coarse: Make the last file one row group, so large that `download` splits it; it repeats the
            documents.
        tasks: Largest number of tasks per benchmark.

    Returns:
        Bytes of parquet.
    """
    table = corpus()
    if documents is not None:
        table = table.take(list(range(0, table.num_rows, max(1, table.num_rows // documents))))
    regular = files - coarse
    parts = [table.take(list(range(i, table.num_rows, regular))) for i in range(regular)]
    served = {_name(i): _parquet(part, ROW_GROUP_ROWS) for i, part in enumerate(parts)}
    if coarse:
        times = MAX_GROUP_BYTES // pc.sum(pc.binary_length(table["text"])).as_py() + 2
        repeated = pa.concat_tables([table] * times)
        served[_name(regular)] = _parquet(repeated, repeated.num_rows)
    hub.repo(FINEWEB).commit(served)
    texts = table["text"].slice(0, 8 * tasks).to_pylist()
    _serve_tasks(hub, hellaswag.HUB, _hellaswag(texts)[:tasks])
    _serve_tasks(
        hub, lambada.HUB, [{"text": " ".join(text.split()[:60])} for text in texts[:tasks]]
    )
    return sum(map(len, served.values()))


def _name(index: int) -> str:
    return f"sample/10BT/{index:03d}_00000.parquet"


def _parquet(table: pa.Table, row_group_size: int) -> bytes:
    buffer = io.BytesIO()
    # No dictionary encoding: FineWeb's text has none, and it would hide the size of the text.
    pq.write_table(
        table, buffer, row_group_size=row_group_size, compression="zstd", use_dictionary=False
    )
    return buffer.getvalue()


def _serve_tasks(hub: Hub, where: tuple[str, str | None, str], rows: list[dict[str, Any]]) -> None:
    repo, _, split = where
    files = {
        f"data/{split}-00000-of-00001.parquet": _parquet(pa.Table.from_pylist(rows), len(rows))
    }
    hub.repo(repo).commit({"README.md": b"---\nlicense: mit\n---\n", **files})


def _hellaswag(texts: list[str]) -> list[dict[str, Any]]:
    """Return the real tasks if available; else build some that ask which text continues another."""
    if files := sorted(SHARED.glob("data/hellaswag/*.jsonl")):
        lines = files[0].read_text(encoding="utf-8").splitlines()
        return [{**json.loads(line), "label": str(json.loads(line)["label"])} for line in lines]
    words = [text.split() for text in texts]
    return [
        {
            "activity_label": "Reading",
            "ctx": " ".join(words[i][:30]),
            "endings": [" ".join(words[(i + k) % len(words)][30:45]) for k in range(4)],
            "label": "0",
        }
        for i in range(len(words))
        if all(len(words[(i + k) % len(words)]) > 45 for k in range(4))
    ]
