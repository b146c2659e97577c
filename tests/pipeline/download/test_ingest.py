"""Tests for pipeline.download.ingest: faulty, empty and unusual files, as `download` meets them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.download import row_groups
from pipeline.download.source_paths import PathFile
from pipeline.download.stage import download
from pipeline.format import tokenizer
from pipeline.format.manifest import Manifest, RawManifest
from pipeline.format.parquet import read_batches
from pipeline.format.shards import open_shard
from pipeline.params import SourceParams, TokenizeParams, VerifyParams
from pipeline.provenance import DocumentSpan, RawRows
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize.ship_chunks import pack, unpack
from pipeline.verify import data_report
from pipeline.verify import stage as verify
from tests.support.small_data import hashes, no_cluster, run_here, tokenize_here

Fetch = Callable[..., RawManifest]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Return a function that runs the stage on `in`, in this process, to `raw`."""
    for stage in ("download", "verify"):
        monkeypatch.setattr(f"pipeline.{stage}.stage.cluster", no_cluster)
        monkeypatch.setattr(f"pipeline.{stage}.stage.run_tasks", run_here)
    store = Store(tmp_path / "work")
    store.root.mkdir()
    (tmp_path / "in").mkdir()

    def run(**source: Any) -> RawManifest:
        params = SourceParams(kind="files", paths=[str(tmp_path / "in")], **source)
        return download({"main": params}, store, tmp_path / "raw", Machine(patience=5))

    return run


def write(path: Path, texts: Sequence[str | None] | pa.Array, **options: Any) -> Path:
    pq.write_table(pa.table({"text": texts}), path, **options)
    return path


def replace(path: Path, old: bytes, new: bytes) -> None:
    """Damage the first occurrence of some bytes of a file, which keeps its length."""
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def decoded(tokens: Path) -> list[str]:
    """Decode all documents of `data/tokens`, sorted."""
    found = []
    for shard in Manifest.load(tokens).shards:
        ids = np.array(open_shard(tokens / shard.name))
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.EOT))[1:]
        found += [tokenizer.decode(part[1:].tolist()) for part in parts]
    return sorted(found)


def tokenize_and_verify(tmp_path: Path) -> tuple[list[str], data_report.DataReport]:
    """Run the later stages; return the documents of the tokens, and the report."""
    machine, out = Machine(work_dir=tmp_path / "work"), tmp_path / "tokens"
    tokenize_here(tmp_path / "raw", out, TokenizeParams(val_per_10k=0), machine)
    _, report = verify.verify(tmp_path / "raw", out, VerifyParams(retokenize=9), machine)
    return decoded(out), report


def test_all_faulty_files_are_listed_and_the_good_ones_are_kept(
    fetch: Fetch, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    good = [write(folder / f"{name}.parquet", [name]) for name in ("a", "z")]
    (folder / "csv.parquet").write_text("text\none\n")
    (folder / "empty.parquet").touch()
    (folder / "cut.parquet").write_bytes(good[0].read_bytes()[:-9])
    write(folder / "lists.parquet", pa.array([["one"]]))
    pq.write_table(pa.table({"body": ["one"]}), folder / "body.parquet")
    damaged = write(folder / "page.parquet", ["one", "two"], write_page_checksum=True)
    replace(damaged, b"two", b"TWO")
    (folder / "b.jsonl").write_bytes(b"{no json")
    with pytest.raises(UserError) as error:
        fetch()
    lines = str(error.value).splitlines()
    faulty = ["b.jsonl", *(f"{n}.parquet" for n in ("body", "csv", "cut", "empty", "lists"))]
    assert [line.split(": ")[0] for line in lines] == [*faulty, "page.parquet"]
    assert "row group 0" in lines[-1]
    stored = {path.name for path in (tmp_path / "work/files").iterdir()}
    assert stored == {atomic.sha256_file(path) for path in good}
    assert not (tmp_path / "raw").exists()
    for name in (*faulty, "page.parquet"):
        (folder / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.download.stage.run_tasks", None)  # nothing is fetched again
        assert [file.path for file in fetch().files] == ["a.parquet", "z.parquet"]
    # Files of the store are checked for another column as well.
    with pytest.raises(UserError, match=r"a\.parquet.*'body'(.|\n)*z\.parquet.*'body'"):
        fetch(text_column="body")


def test_a_long_list_of_faults_is_cut(fetch: Fetch, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"in/{number:02d}.parquet").touch()
    with pytest.raises(UserError) as error:
        fetch()
    lines = str(error.value).splitlines()
    assert lines[19].startswith("19.parquet")
    assert len(lines) == 21
    assert "10" in lines[20]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the source by a faulty local file and two remote ones without a text column.

    The list gets the URLs that are read.
    """
    local = tmp_path / "in/a.parquet"
    data = io.BytesIO()
    pq.write_table(pa.table({"body": ["one"]}), data)
    read: list[str] = []

    def items(*_: Any) -> list[PathFile]:
        size = len(data.getvalue())
        remote = [PathFile(f"{n}.parquet", f"s3://{n}", size, "", local=False) for n in "bc"]
        return [PathFile("a.parquet", str(local), 0, "", local=True), *remote]

    def read_from(url: str, start: int) -> Iterator[bytes]:
        read.append(url)
        yield data.getvalue()[start:]

    monkeypatch.setattr("pipeline.download.source_paths.resolve", items)
    monkeypatch.setattr("pipeline.download.source_paths._read", read_from)
    return read


def test_without_a_network_the_run_ends_at_the_first_file_and_names_the_faults(
    fetch: Fetch, tmp_path: Path, remote: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(url: str, _: int) -> Iterator[bytes]:
        remote.append(url)
        raise ConnectionError

    monkeypatch.setattr("pipeline.download.source_paths._read", unreachable)
    monkeypatch.setattr("pipeline.download.http.time.sleep", lambda _: None)
    monkeypatch.setattr("pipeline.download.http._MAX_BACKOFF", 100.0)
    (tmp_path / "in/a.parquet").touch()
    with pytest.raises(UserError, match=r"(?s)a\.parquet: .*\ns3://b: "):
        fetch()
    assert set(remote) == {"s3://b"}


def test_a_wrong_text_column_costs_one_remote_file(
    fetch: Fetch, tmp_path: Path, remote: list[str]
) -> None:
    (tmp_path / "in/a.parquet").touch()
    with pytest.raises(
        UserError, match=r"(?s)a\.parquet: .*\nb\.parquet: .*sources\.main\.text_column"
    ):
        fetch()
    assert remote == ["s3://b"]


def test_a_file_that_changes_while_it_is_read_is_refused(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in/a.jsonl"
    path.write_text('{"text": "old"}\n')
    hashed = atomic.sha256_file

    def change(file: Path) -> str:
        found = hashed(file)
        if file == path:
            path.write_text('{"text": "newer"}\n')
        return found

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sha256_file", change)
        with pytest.raises(UserError, match=r"^a\.jsonl: .*changed"):
            fetch()
    fetch()
    assert pq.read_table(tmp_path / "raw/a.jsonl.parquet")["text"].to_pylist() == ["newer"]


def test_parts_without_rows_are_accepted_if_another_has_rows(fetch: Fetch, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with pq.ParquetWriter(folder / "0.parquet", pa.schema([("text", pa.string())])):
        pass  # no row group either
    write(folder / "1.parquet", pa.array([], pa.float64()))
    (folder / "2.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    write(folder / "3.parquet", pa.array([], pa.string()))
    write(folder / "4.parquet", ["one"])
    write(folder / "5.parquet", pa.nulls(2))
    assert [file.rows for file in fetch().files] == [0, 0, 2, 0, 1, 2]
    assert tokenize_and_verify(tmp_path)[0] == ["one", "three", "two"]
    for name in ("2.jsonl", "4.parquet", "5.parquet"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"0\.parquet"):
        fetch()


def test_views_categories_and_extension_types_become_the_same_documents(
    fetch: Fetch, tmp_path: Path
) -> None:
    texts = ["naïve café", "", "two", "two"]
    array = pa.array(texts)
    write(tmp_path / "in/a.parquet", array.cast(pa.string_view()))
    write(tmp_path / "in/b.parquet", array.dictionary_encode())
    write(tmp_path / "in/c.parquet", pa.ExtensionArray.from_storage(pa.json_(), array))
    write(tmp_path / "in/d.parquet", pa.array([*(t.encode() for t in texts), b"\xff"]))
    fetch()
    assert tokenize_and_verify(tmp_path)[0] == sorted([*texts, *texts, *texts, *texts])[4:]
    manifest = Manifest.load(tmp_path / "tokens")
    assert manifest.skipped == {"empty": 4, "not UTF-8": 1}


def test_metadata_of_other_types_is_reported_or_left_out(fetch: Fetch, tmp_path: Path) -> None:
    urls = pa.array(["https://example.org/a", None])
    columns: dict[str, list[pa.Array]] = {
        "url": [urls.dictionary_encode(), urls.cast(pa.string_view()), pa.array([1, 2])],
        "token_count": [pa.array([2**64 - 1, 1], pa.uint64()), pa.array([1.0, float("inf")])],
        "dump": [pa.array([{"a": 1}, None]), pa.array([b"\xff", b"a"])],
        "date": [pa.array([0, 1], pa.timestamp("ns", "Nowhere")), pa.array([[1], [2]])],
    }
    for name, arrays in columns.items():
        for number, array in enumerate(arrays):
            table = pa.table({"text": ["one", "two"], name: array})
            pq.write_table(table, tmp_path / f"in/{name}{number}.parquet")
    twice = pa.Table.from_arrays([pa.array(["one", "two"]), urls, urls], ["text", "url", "url"])
    pq.write_table(twice, tmp_path / "in/twice.parquet")
    manifest = fetch()
    rows = RawRows(tmp_path / "raw", manifest)
    for file in manifest.files:
        span = DocumentSpan(
            shard="", number=0, path=file.path, row=1, start=0, stop=2, first=0, end=2
        )
        found = rows.get(span)
        assert found is not None
        assert found["text"] == "two"
        assert all(value is None or isinstance(value, str) for value in found.values())
    documents, report = tokenize_and_verify(tmp_path)
    assert documents == ["one"] * 10 + ["two"] * 10
    assert report.source.hosts == {"example.org": 2}
    assert not report.source.counted


def test_damaged_metadata_is_named(fetch: Fetch, tmp_path: Path) -> None:
    table = pa.table({"text": ["one"], "url": ["https://example.org"], "unused": ["spoiled"]})
    path = tmp_path / "in/a.parquet"
    pq.write_table(table, path, write_page_checksum=True)
    replace(path, b"spoiled", b"SPOILED")
    fetch()
    replace(path, b"https", b"HTTPS")
    with pytest.raises(UserError, match=r"^a\.parquet: row group 0, column 'url'"):
        fetch()


def test_large_row_groups_of_any_layout_are_cut(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "MAX_GROUP_BYTES", 1000)
    texts = [f"category {i % 1500}" for i in range(2500)]
    array = pa.array(texts)
    for number, column in enumerate([array.dictionary_encode(), array.cast(pa.string_view())]):
        write(tmp_path / f"in/{number}.parquet", column)
    table = pa.table({"text": texts, "unused": ["spoiled"] * 2500})
    pq.write_table(table, tmp_path / "in/2.parquet", write_page_checksum=True)
    manifest = fetch()
    for file in manifest.files:
        path = tmp_path / "raw" / file.path
        assert file.origin == atomic.sha256_file(tmp_path / "in" / file.path)
        assert pq.read_metadata(path).num_row_groups == 3
        assert pq.read_table(path)["text"].to_pylist() == texts
    replace(tmp_path / "in/2.parquet", b"spoiled", b"SPOILED")
    with pytest.raises(UserError, match=r"\A2\.parquet: [^\n]*\Z"):
        fetch()


def test_skipped_rows_are_printed_by_each_run_and_in_the_manifest(
    fetch: Fetch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": str(number)}).encode() for number in range(400)]
    lines[7] = b'{"text": "\xff"}'
    (tmp_path / "in/a.jsonl").write_bytes(b"\n".join(lines))
    write(tmp_path / "in/b.parquet", ["one"])
    manifests = []
    for _ in range(2):
        manifests.append(fetch())
        printed = [line for line in capsys.readouterr().out.splitlines() if "a.jsonl" in line]
        assert len(printed) == 1
        assert " 8" in printed[0]
    assert manifests[0] == manifests[1] == RawManifest.load(tmp_path / "raw")
    assert sum(manifests[0].files[0].skipped.values()) == 1
    stored = json.loads((tmp_path / "raw/manifest.json").read_text())
    assert "skipped" not in stored["files"][1]  # manifests of clean sources keep their bytes


def test_a_folder_that_cannot_be_written_is_named(fetch: Fetch, tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", ["one"])
    before = hashes(tmp_path / "in")
    (tmp_path / "file").touch()
    params = SourceParams(kind="files", paths=[str(tmp_path / "in")])
    with pytest.raises(UserError, match="file/raw"):
        download({"main": params}, Store(tmp_path / "work"), tmp_path / "file/raw", Machine())
    assert hashes(tmp_path / "in") == before


def test_every_layout_is_shipped(tmp_path: Path) -> None:
    """`machine.data: ship` sends what `read_batches` yields."""
    path = write(tmp_path / "a.parquet", pa.array(["one", None, "two"]).dictionary_encode())
    batches = read_batches(path, "text", 0, 3)
    assert [(row, texts.to_pylist()) for row, texts in unpack(pack(batches, 1 << 20), 0)] == [
        (0, [b"one", None, b"two"])
    ]


def test_what_a_process_left_that_was_killed_at_the_end_is_removed(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    params = SourceParams(kind="files", paths=[str(tmp_path / "a.jsonl")])
    store = Store.open(machine)
    monkeypatch.setattr("pipeline.download.stage.cluster", no_cluster)
    monkeypatch.setattr("pipeline.download.stage.run_tasks", run_here)
    download({"main": params}, store, tmp_path / "raw", machine)
    partial = store.root / "partial"
    for origin in (store.root / "origins").iterdir():  # named as the folder of the download
        (partial / origin.name).mkdir(exist_ok=True)
        (partial / origin.name / "made.parquet").write_text("half")
    download({"main": params}, store, tmp_path / "raw", machine)
    assert not [path for path in partial.iterdir() if not path.name.startswith("seen-")]
