"""Tests for pipeline.format.manifest."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.format.manifest import NAME, ChunkRecord, Manifest, RawManifest, SelectedFile, Shard
from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.small_data import tokenize_here

PARAMS = TokenizeParams(shard_tokens=3000, val_per_10k=1500)


def raw_value(path: str = "a.parquet", **changes: object) -> dict[str, object]:
    file = {"source": "main", "path": path, "bytes": 1, "rows": 1, "sha256": "0"}
    source = {"kind": "sample", "repo": "r", "revision": "v"}
    return {"schema_version": "2.0", "sources": {"main": source}, "files": [file], **changes}


def load(folder: Path, value: object) -> RawManifest:
    (folder / NAME).write_text(json.dumps(value))
    return RawManifest.load(folder)


@pytest.mark.parametrize(
    "path",
    ["../../evil", "a/../../evil", "a/..", "/etc/passwd", "..\\evil", "C:\\evil", "", ".", "a\0b"],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"manifest\.json.*files\.0\.path"):
        load(tmp_path, raw_value(path))


@pytest.mark.parametrize("path", ["a.parquet", "sample/10BT/000_00000.parquet", "..a", "a b"])
def test_a_path_inside_the_folder_is_accepted(tmp_path: Path, path: str) -> None:
    assert load(tmp_path, raw_value(path)).files[0].path == path


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "a\n", "a\nb", "", "A", ".", "a" * 33, "é", "\x1b[2J"]
)
def test_a_name_that_is_no_source_is_refused(tmp_path: Path, name: str) -> None:
    value = raw_value()
    value["sources"] = {name: value["sources"]["main"]}  # type: ignore[index]
    value["files"][0]["source"] = name  # type: ignore[index]
    with pytest.raises(UserError, match=r"manifest\.json: sources") as error:
        load(tmp_path, value)
    assert str(error.value).isprintable()
    for record, fields in (
        (SelectedFile, {"path": "a", "sha256": "0", "rows": 1, "kept": 1}),
        (ChunkRecord, {"name": "a", "chunk_key": "0", "sha256": "0"}),
        (Shard, {"name": "a", "split": "val", "tokens": 1, "docs": 1, "text_bytes": 1,
                 "sha256": "0", "docs_sha256": "0", "parts": []}),
    ):  # fmt: skip
        assert record(source="a-b_0", **fields).source == "a-b_0"
        with pytest.raises(ValidationError, match="source"):
            record(source=name, **fields)


@pytest.mark.parametrize("key", ["name", "parts.0.path"])
def test_a_shard_path_that_leaves_the_folder_is_refused(
    tmp_path: Path, small_raw: Path, machine: Machine, key: str
) -> None:
    out = tmp_path / "tokens"
    value = tokenize_here(small_raw, out, PARAMS, machine).model_dump()
    target = value["shards"][0] if key == "name" else value["shards"][0]["parts"][0]
    target[key.rpartition(".")[2]] = "../../evil.bin"
    (out / NAME).unlink()
    (out / NAME).write_text(json.dumps(value))
    with pytest.raises(UserError, match=rf"manifest\.json.*shards\.0\.{key}"):
        Manifest.load(out)


@pytest.mark.parametrize("version", ["1.0", "3.0", "0.9", "x", "", 1])
def test_an_unknown_major_version_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(UserError, match=r"manifest\.json.*schema_version"):
        load(tmp_path, raw_value(schema_version=version))


def test_a_later_minor_version_and_unknown_keys_are_read(tmp_path: Path) -> None:
    manifest = load(tmp_path, raw_value(schema_version="2.7", novelty={"x": 1}))
    assert manifest.files[0].path == "a.parquet"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\udcff"])
def test_an_invalid_manifest_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json.*dvc repro") as error:
        RawManifest.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/manifest\.json.*dvc repro"):
        Manifest.load(tmp_path / "nowhere")


def test_manifests_hold_nothing_about_the_machine_and_no_time(
    tmp_path: Path, sample_raw: Path, small_raw: Path, machine: Machine
) -> None:
    out = tmp_path / "tokens"
    tokenize_here(small_raw, out, PARAMS, machine)
    files = [sample_raw / NAME, out / NAME, *(out / "chunks").glob("*.json")]
    assert len(files) > 4
    for path in files:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        assert str(tmp_path) not in text
        assert socket.gethostname() not in text
        # Sorted keys: the same content gives the same bytes.
        canonical = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        assert text == canonical
        for word in strings(value):
            assert not word.startswith("/"), word
            assert "time" not in word.lower()


def strings(value: object) -> list[str]:
    """Return all strings of a JSON value, keys included."""
    if isinstance(value, dict):
        return [s for key, inner in value.items() for s in [key, *strings(inner)]]
    if isinstance(value, list):
        return [s for inner in value for s in strings(inner)]
    return [value] if isinstance(value, str) else []
