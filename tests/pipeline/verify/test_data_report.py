"""Tests for pipeline.verify.data_report, and for `pipeline.verify --show`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.format import tokenizer
from pipeline.format.manifest import Manifest
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize.encode_chunk import split_of
from pipeline.verify import data_report
from pipeline.verify import stage as verify
from pipeline.verify.__main__ import main as verify_main
from pipeline.verify.data_report import DataReport, DuplicateCounter, hosts, source_facts
from tests.support.small_data import PARAMS, describe, tokenize_here, write_manifest

SIZES = TokenizeParams(shard_tokens=1000, val_per_10k=2500)
TEXTS = [f"Text {i}. " + "more " * (5 * i) for i in range(60)]
TEXTS[7] = TEXTS[3]
TEXTS[50] = TEXTS[3]
TEXTS[20] = "One\x1b[31m red, \u202eleft, نمی\u200cخواهم 👩\u200d💻"
ROWS = [
    {
        "text": text or None,
        "dump": "CC-1" if i % 3 else "CC-2",
        "url": f"https://{'WWW.example.org:8080' if i % 2 else f'host{i}.net'}/path?q=http://x/",
        "token_count": len(tokenizer.encode(text)) + (i == 10),
    }
    for i, text in enumerate(TEXTS)
]
ROWS[11]["token_count"] = None
ROWS[12]["text"] = None
ROWS[13]["url"] = None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_ray: int) -> Path:
    """A new current folder with raw text, tokens and a store."""
    monkeypatch.chdir(tmp_path)
    files = []
    for number, rows in enumerate((ROWS[:25], ROWS[25:])):
        path = verify.RAW / f"part: {number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=FINEWEB_SCHEMA), path, row_group_size=7)
        files.append(describe(path, len(rows)))
    write_manifest(verify.RAW, files)
    Path("params.yaml").write_text(PARAMS.format(shard_tokens=1000, val_per_10k=2500))
    tokenize_here(verify.RAW, verify.TOKENS, SIZES, Machine())
    return tmp_path


def table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(f"metrics/{name}.csv").read_text().splitlines()))


def report() -> dict[str, Any]:
    verify_main()
    metrics: dict[str, Any] = json.loads(verify.STATISTICS.read_text())
    return metrics


def test_metrics_and_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = report()
    texts = [str(row["text"]) for row in ROWS if row["text"]]
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    assert metrics["documents"] == 59
    assert metrics["tokens"] == sum(lengths)
    assert metrics["skipped"] == 1
    assert metrics["duplicates"] == 2
    assert metrics["val_documents_in_train"] == 0  # the split is by content
    assert metrics["shortest_document"] == min(lengths)
    assert metrics["shortest_document_at"] == "part: 0.parquet:0"
    assert metrics["longest_document"] == max(lengths)
    assert metrics["longest_document_at"] == "part: 1.parquet:34"
    assert metrics["token_count_agreement"] == round(57 / 58, 6)
    assert table("dumps") == [
        {"dump": "CC-1", "documents": "40"},
        {"dump": "CC-2", "documents": "20"},
    ]
    rows = table("hosts")
    assert rows[0] == {"host": "www.example.org", "documents": "29"}
    assert len(rows) == data_report.TOP
    bins = {row["tokens"]: int(row["documents"]) for row in table("document_lengths")}
    assert sum(bins.values()) == 59
    assert bins["256 to 511"] == sum(256 <= length < 512 for length in lengths)
    assert metrics["gigatoken_share"] + metrics["tiktoken_share"] == 1
    # The engines come from the pieces in the store.
    for note in Path(".work/chunks").glob("*/engine.json"):
        note.unlink()
    assert not [key for key in report() if "share" in key]
    for number, chunk in enumerate(Manifest.load(verify.TOKENS).chunks[:2]):
        made = {
            "bytes": {"gigatoken": 900, "tiktoken": 100 * number},
            "documents": {"gigatoken": 9, "tiktoken": number},
            "checked": 1,
            "differences": [7] * number,
        }
        with Store(Path(".work")).make("chunks", chunk.chunk_key) as piece:
            atomic.write_json(piece / "engine.json", made)
    metrics = report()
    assert metrics["gigatoken_share"] == round(1800 / 1900, 6)
    assert metrics["tiktoken_share"] == round(100 / 1900, 6)
    assert metrics["engine_differences"] == 1


@pytest.mark.parametrize(
    ("path", "key"), [("a.txt.zst.parquet", "text_documents"), ("a.parquet", "text_column")]
)
def test_warning_about_short_documents_names_the_key(
    small_tokens: Path, path: str, key: str
) -> None:
    manifest = Manifest.load(small_tokens)
    train = manifest.totals["train"]
    file = manifest.source.files[0].model_copy(update={"path": path})
    source = manifest.source.model_copy(update={"files": [file]})

    def warning(docs: int) -> str | None:
        totals = {**manifest.totals, "train": train.model_copy(update={"docs": docs})}
        changed = manifest.model_copy(update={"totals": totals, "source": source})
        found: str | None = DataReport().statistics(changed, {}).get("warning")
        return found

    assert warning(train.tokens // 31) is None
    assert key in str(warning(train.tokens // 20))


def test_source_without_metadata_columns_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    counts = np.zeros(2, np.int32)
    pq.write_table(pa.table({"text": ["a", "b"], "url": [1, 2]}), path)
    assert source_facts(path, counts) == data_report.SourceFacts()
    pq.write_table(pa.table({"url": pa.array(["http://a/", "b"], pa.large_string())}), path)
    assert source_facts(path, counts).hosts == {"a": 1}
    invalid = pa.array([b"http://\xff/", b"b"]).view(pa.string())
    pq.write_table(pa.table({"url": invalid}), path)
    assert source_facts(path, counts) == data_report.SourceFacts()


def test_hosts() -> None:
    addresses = {
        "https://a.org": "a.org",
        "http://User:pw@B.org:80/x@y": "b.org",
        "ftp://c.org?x": "c.org",
        "https://d.org#e/f": "d.org",
        "no address": None,
        "https://": None,
        "": None,
    }
    found = hosts(pa.array([*addresses, None])).to_pylist()
    assert found == [*addresses.values(), None]


def test_names_are_counted_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_report, "_MAX_NAMES", 50)
    counter = data_report.SourceFacts().hosts
    for start in range(0, 2000, 20):
        rare = [f"rare{i}" for i in range(start, start + 20)]
        data_report._count(counter, pa.array([*rare, *["often"] * 5]))
    assert len(counter) <= 100
    assert counter["often"] == 500


def test_duplicates_are_counted_exactly_and_by_sample() -> None:
    rng = np.random.default_rng(1)
    texts = rng.integers(0, 2**64, 40_000, np.uint64)
    train = np.concatenate([texts[:30_000], texts[:10_000], texts[:5_000]])
    val = np.concatenate([texts[30_000:], texts[:2_000], texts[39_000:]])
    for limit, tolerance in ((10**6, 0.0), (20_000, 0.05)):
        counter = DuplicateCounter(limit)
        for part in np.array_split(rng.permutation(train), 7):
            counter.add("train", part)
        counter.add("val", val)
        assert sum(len(p) for parts in counter._hashes.values() for p in parts) <= limit
        repeated, shared = counter.count()
        assert repeated == pytest.approx(15_000 + 2_000 + 1_000, rel=tolerance)
        assert shared == pytest.approx(2_000, rel=3 * tolerance)


def test_show_prints_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def show(count: int) -> str:
        capsys.readouterr()
        verify_main(["--show", str(count)])
        return capsys.readouterr().out

    assert show(5) == show(5)
    shown = show(1000)
    assert shown.count("== ") == 59
    assert "part: 0.parquet row 20, " in shown
    # A document cannot control the terminal or the direction of text; letters join as they should.
    assert "One\\x1b[31m red, \\x202eleft, نمی\u200cخواهم 👩\u200d💻\n" in shown
    assert not {"\x1b", "\u202e"} & set(shown)
    assert show(5).count("== ") == 5
    assert f"{TEXTS[1]}".rstrip() in shown
    long = next(text for text in TEXTS[::-1] if split_of(text.encode(), 2500) == "train")
    assert "characters]\n" in shown
    assert long not in shown
    assert not verify.VERIFIED.exists()
