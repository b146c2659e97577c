"""Tests for source kind `files`: local paths, globs and URLs, and conversion to parquet."""

from __future__ import annotations

import gzip
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.download import row_groups
from pipeline.download.source_paths import PathFile, resolve
from pipeline.download.stage import download, select_items
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import FINEWEB_SCHEMA, check_pages
from pipeline.params import SourceParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from tests.support.hub import FINEWEB, Hub
from tests.support.small_data import hashes, no_cluster, run_here

Fetch = Callable[..., RawManifest]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Return a function that runs the stage on paths, in this process, to `tmp_path / "raw"`."""
    monkeypatch.setattr("pipeline.download.stage.cluster", no_cluster)
    monkeypatch.setattr("pipeline.download.stage.run_tasks", run_here)
    store = Store(tmp_path / "work")
    store.root.mkdir()

    def run(*paths: object, **source: Any) -> RawManifest:
        params = SourceParams(kind="files", paths=[str(path) for path in paths], **source)
        return download({"main": params}, store, tmp_path / "raw", Machine(patience=5))

    return run


def no_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the stage fetches a file again")

    monkeypatch.setattr("pipeline.download.stage.run_tasks", refuse)


def write_parquet(path: Path, texts: Sequence[str | None], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, pa.string()), "n": range(len(texts))}), path)
    return path


def texts_of(path: Path, column: str = "text") -> list[Any]:
    return list(pq.read_table(path).column(column).to_pylist())


def test_parquet_is_copied_unchanged_and_only_once(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals = [write_parquet(tmp_path / f"in/{d}/part.parquet", [d, "x"]) for d in ("a", "b")]
    manifest = fetch(tmp_path / "in")
    assert [file.path for file in manifest.files] == ["a/part.parquet", "b/part.parquet"]
    assert [file.sha256 for file in manifest.files] == [
        atomic.sha256_file(path) for path in originals
    ]
    assert [(file.rows, file.origin) for file in manifest.files] == [(2, None)] * 2
    assert str(tmp_path) not in (tmp_path / "raw/manifest.json").read_text()
    # Not linked: DVC changes the mode of data/raw, which must not affect the user's file.
    assert not (tmp_path / "raw/a/part.parquet").samefile(originals[0])
    # The same files by a glob: nothing is read again.
    no_tasks(monkeypatch)
    assert fetch(tmp_path / "in/*/*.parquet") == manifest
    # A single file has no folder in its path.
    assert [file.path for file in fetch(originals[1]).files] == ["part.parquet"]
    assert sorted(hashes(tmp_path / "raw")) == ["manifest.json", "part.parquet"]


def test_a_changed_file_is_fetched_again(fetch: Fetch, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["one"])
    old = fetch(path)
    write_parquet(path, ["two", "three"])
    new = fetch(path)
    assert new.files[0].rows == 2
    assert new.sources["main"].revision != old.sources["main"].revision
    assert texts_of(tmp_path / "raw/a.parquet") == ["two", "three"]


def test_other_formats_are_converted_to_parquet(fetch: Fetch, tmp_path: Path) -> None:
    path = tmp_path / "in/a [1].jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b'{"body": "one\\nline", "id": "<a>"}\n'))
    manifest = fetch(path.parent, text_column="body")
    assert manifest.sources["main"].text_column == "body"
    assert [file.path for file in manifest.files] == [f"{path.name}.parquet"]
    assert manifest.files[0].origin == atomic.sha256_file(path)
    table = pq.read_table(tmp_path / "raw" / f"{path.name}.parquet")
    assert table.column_names == ["body", *FINEWEB_SCHEMA.names[1:]]
    row = dict.fromkeys(table.column_names) | {"body": "one\nline", "id": "<a>"}
    assert table.to_pylist() == [row]


def test_formats_mix(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    write_parquet(tmp_path / "a.parquet", ["three"])
    manifest = fetch(tmp_path / "b.txt", tmp_path / "a.parquet", text_documents="line")
    assert [file.path for file in manifest.files] == ["a.parquet", "b.txt.parquet"]
    assert texts_of(tmp_path / "raw/b.txt.parquet") == ["one", "two"]


def test_a_file_is_converted_once_per_text_column(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "other": "two"}\n')
    manifest = fetch(path)
    other = fetch(path, text_column="other")
    assert texts_of(tmp_path / "raw/a.jsonl.parquet", "other") == ["two"]
    assert other.files[0].sha256 != manifest.files[0].sha256
    no_tasks(monkeypatch)
    assert fetch(path) == manifest


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b"{no json", []),
        ("a.jsonl.gz", b"no gzip", []),
        ("a.jsonl", b'{"a": 1, "b": 2}\n', ["'text'", "text_column", "a, b"]),
        ("a.jsonl", b"", []),
        ("a.csv", b"text\n", []),
        ("a.parquet", b"no parquet", []),
        ("a.docx", b"unknown", ["paths", ".parquet"]),
    ],
)
def test_an_unreadable_file_is_named_in_one_line(
    fetch: Fetch, tmp_path: Path, name: str, data: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        fetch(tmp_path / name)
    assert "\n" not in str(error.value)
    for word in [name, *words]:
        assert word in str(error.value)
    assert not (tmp_path / "raw").exists()


def test_parquet_without_text_is_named_and_other_files_are_kept(
    fetch: Fetch, tmp_path: Path
) -> None:
    good = write_parquet(tmp_path / "in/a.parquet", ["one"])
    write_parquet(tmp_path / "in/b.parquet", ["one"], column="body")
    with pytest.raises(
        UserError, match=r"b\.parquet.*'text'.*sources\.main\.text_column.*body, n$"
    ):
        fetch(tmp_path / "in")
    assert (tmp_path / "work/files" / atomic.sha256_file(good) / "data.parquet").exists()
    with pytest.raises(UserError, match=r"a\.parquet.*'n'.*int64.*sources\.main\.text_column"):
        fetch(good, text_column="n")
    with pytest.raises(UserError, match=r"c\.parquet"):
        fetch(write_parquet(tmp_path / "c.parquet", []))


@pytest.mark.parametrize(
    ("paths", "word"),
    [
        (["{here}/nothing.parquet"], "nothing.parquet"),
        (["{here}/no*.parquet"], "no*.parquet"),
        (["unknown://host/a.parquet"], "unknown://host"),
        (["{here}/a/x.parquet", "{here}/b/x.parquet"], "b/x.parquet"),
        (["http://127.0.0.1:9/a.parquet"], "127.0.0.1:9"),
    ],
)
def test_a_path_that_names_no_file_is_an_error(tmp_path: Path, paths: list[str], word: str) -> None:
    for folder in "ab":
        write_parquet(tmp_path / folder / "x.parquet", ["one"])
    with pytest.raises(UserError, match=r"source\.paths") as error:
        resolve([path.format(here=tmp_path) for path in paths])
    assert word in str(error.value)


def test_remote_folders_and_globs_are_like_local_ones(capsys: pytest.CaptureFixture[str]) -> None:
    memory = fsspec.filesystem("memory")
    for name in (
        *("web/a.txt", "web/b.md", "web/_temporary/c.txt", "web/_SUCCESS"),
        *("web/out.parquet/part-0.parquet", "web/f/g/h.txt"),
    ):
        memory.pipe_file(name, b"x")
    texts = ["a.txt", "f/g/h.txt"]

    def found(pattern: str, **options: Any) -> list[str]:
        return [file.path for file in resolve([f"memory://{pattern}"], **options)]

    assert found("web") == found("web/*") == [*texts, "out.parquet/part-0.parquet"]
    assert found("web/**/*.txt") == texts
    assert found("web/[^b-z]*") == ["a.txt"]
    out = capsys.readouterr().out
    for name in ("b.md", "_temporary/c.txt", "_SUCCESS"):
        assert name in out
    assert found("web/_temporary/c.txt") == ["c.txt"]
    assert found("web", exclude=["f", "*.parquet"]) == ["a.txt"]
    assert found("web/*.txt", exclude=["f"]) == ["a.txt"]
    assert [f.path for f in resolve(["memory://web/a.txt", "memory://web/*.txt"])] == ["a.txt"]
    assert [f.path for f in resolve(["memory://web/f", "memory://web/**/*.txt"])] == [
        "a.txt", "g/h.txt",
    ]  # fmt: skip
    for pattern in ("web/no*.txt", "no", "web/d::e.txt", "web/b.md"):
        with pytest.raises(UserError, match=r"source\.paths"):
            found(pattern)


def test_files_are_fetched_from_urls_and_only_once(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "in/a.parquet", ["one"])
    (tmp_path / "in/b.jsonl").write_text('{"text": "two"}\n')
    with Hub() as hub:
        names = ("a.parquet", "b.jsonl")
        hub.repo().commit({name: (tmp_path / "in" / name).read_bytes() for name in names})
        folder = f"{hub.endpoint}/datasets/{FINEWEB}/resolve/main"
        urls = [f"{folder}/a.parquet?signature=x", f"{folder}/b.jsonl"]
        manifest = fetch(*urls)
        assert [file.path for file in manifest.files] == ["a.parquet", "b.jsonl.parquet"]
        assert texts_of(tmp_path / "raw/b.jsonl.parquet") == ["two"]
        assert hub.sent()["a.parquet"]
        hub.clear_requests()
        no_tasks(monkeypatch)
        assert fetch(*urls) == manifest
        assert not hub.sent()


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["x.jsonl", "x.jsonl.parquet"], "x.jsonl.parquet"),
        (["a.txt", "A.txt"], "A.txt"),
        (["e\u0301.txt", "\u00e9.txt"], "\u00e9.txt"),
        (["a.txt.parquet/b.txt", "a.txt"], "a.txt.parquet"),
        ([os.fsdecode(b"\xff.txt"), "a.txt"], r"\udcff.txt"),
        (["b" * 246 + ".txt", "a.txt"], "b" * 246),
        (["\x1b[2J\n.txt", "a.txt"], r"\x1b[2J\n.txt"),
        (["a.parquet.gz", "a.txt"], "a.parquet.gz"),
    ],
)
def test_names_that_cannot_be_in_one_folder_are_refused_before_anything_is_fetched(
    fetch: Fetch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    named: str,
) -> None:
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\n")
    with monkeypatch.context() as patch:
        no_tasks(patch)
        with pytest.raises(UserError, match=re.escape(named)) as error:
            fetch(tmp_path / "in")
    assert str(error.value).isprintable()
    assert "exclude" in str(error.value)
    (kept,) = names[1:]
    if not kept.endswith("parquet"):
        manifest = fetch(tmp_path / "in", exclude=[names[0], "a.txt.parquet/", "?.txt.*"])
        assert [file.path for file in manifest.files] == [f"{kept}.parquet"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_text(fetch: Fetch, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=rf"{name}: .*git lfs pull"):
        fetch(tmp_path / name)


def test_files_max_bytes_and_max_tokens_select_the_first_files() -> None:
    files = [PathFile(f"{i}.parquet", f"/{i}.parquet", 100, "", True) for i in range(5)]

    def selected(**source: Any) -> int:
        return len(select_items(files, SourceParams(kind="hub", **source)))

    assert selected() == 5
    assert selected(files=2) == 2
    assert selected(max_bytes=299) == 2
    assert selected(max_bytes=300) == 3
    assert selected(max_bytes=1) == 1  # at least one
    assert selected(max_tokens=64) == 2  # 32 per 100 bytes
    assert selected(max_tokens=63) == 1
    assert selected(files=4, max_bytes=350, max_tokens=10_000) == 3


def test_large_row_groups_are_rewritten_once(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "MAX_GROUP_BYTES", 100_000)
    path = tmp_path / "a.parquet"
    texts = [f"{i} " + "word " * 30 for i in range(3500)]
    table = pa.table({"text": texts, "n": range(3500)})
    pq.write_table(table, path, row_group_size=3000, use_dictionary=False)
    manifest = fetch(path)
    out = tmp_path / "raw/a.parquet"
    assert manifest.files[0].origin == atomic.sha256_file(path)
    assert manifest.files[0].sha256 == atomic.sha256_file(out)
    metadata = pq.read_metadata(out)
    assert [metadata.row_group(i).num_rows for i in range(4)] == [1000, 1000, 1000, 500]
    assert pq.read_table(out).equals(table)
    assert not list((tmp_path / "work/partial").iterdir())
    no_tasks(monkeypatch)
    assert fetch(path) == manifest


@pytest.mark.slow
def test_a_huge_row_group_is_checked_and_rewritten_in_bounded_memory(tmp_path: Path) -> None:
    """1 GB of text in one row group; the memory is the growth of the resident set."""
    source, target = tmp_path / "a.parquet", tmp_path / "b.parquet"
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(source, schema, use_dictionary=False) as writer:
        text = "some text of the web, as it comes. " * 100
        rows = [f"{i} {text}" for i in range(10_000)]
        writer.write_table(pa.table({"text": rows * 30}, schema=schema), row_group_size=300_000)
    assert pq.read_metadata(source).num_row_groups == 1
    assert row_groups.has_large_groups(source, "text")
    sizes = [psutil.Process().memory_info().rss]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            sizes.append(psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        check_pages(source, source.name, "text")
        row_groups.rewrite(source, source.name, target)
    finally:
        stop.set()
        watcher.join()
    assert pq.read_metadata(target).num_row_groups == 300
    assert max(sizes) - sizes[0] < 250 * 2**20
