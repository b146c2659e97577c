"""Tests for pipeline.verify: exactly the damaged files are named, removed and rebuilt."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.format.manifest import NAME, Manifest, RawManifest
from pipeline.format.shards import read_docs
from pipeline.format.tokenizer import EOT
from pipeline.params import TokenizeParams, VerifyParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.tokenize.stage import tokenize
from pipeline.verify import checks
from pipeline.verify import stage as verify
from pipeline.verify.__main__ import main as verify_main
from tests.support.small_data import (
    CODE,
    PARAMS,
    describe,
    flip,
    hashes,
    piece_times,
    some_texts,
    tokenize_here,
    write_manifest,
    write_parquet,
    write_raw,
)

SIZES = TokenizeParams(shard_tokens=2000, val_per_10k=1500)
RAW, TOKENS = verify.RAW, verify.TOKENS
Damage = Callable[[Path], object]


@pytest.fixture
def folder(
    small_raw: Path,
    small_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_ray: int,
) -> Path:
    """A new current folder with raw text, a copy of the store, and tokens hard-linked to it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_raw, RAW)
    shutil.copytree(small_tokens.with_name("work"), ".work")
    Path("params.yaml").write_text(PARAMS.format(shard_tokens=2000, val_per_10k=1500))
    tokenize(RAW, TOKENS, SIZES, Machine(), CODE)
    return tmp_path


def test_clean_data_passes_and_metrics_are_written(folder: Path) -> None:
    before = hashes(folder / TOKENS)
    verify_main()
    manifest = Manifest.load(TOKENS)
    assert hashes(folder / TOKENS) == before
    metrics = json.loads(verify.STATISTICS.read_text())
    train, val = manifest.totals["train"], manifest.totals["val"]
    assert metrics["documents"] == 55
    assert metrics["train_tokens"] == train.tokens
    assert metrics["val_tokens"] == val.tokens
    assert metrics["tokens"] == train.tokens + val.tokens
    texts = [*some_texts(30, "first"), *some_texts(25, "second")]
    assert metrics["text_bytes"] == sum(len((text or "").encode()) for text in texts)
    assert metrics["bytes_per_token"] == round(metrics["text_bytes"] / (metrics["tokens"] - 55), 4)
    rows = list(csv.DictReader(Path("metrics/document_lengths.csv").read_text().splitlines()))
    assert sum(int(row["documents"]) for row in rows) == 55
    verified = json.loads(verify.VERIFIED.read_text())
    assert verified == {"manifest_sha256": atomic.sha256_file(TOKENS / NAME)}


def edit_manifest(edit: Callable[[dict[str, Any]], None], folder: Path = TOKENS) -> None:
    """Edit a manifest, and give it the hash that it would have if it had been written so."""
    value = atomic.read_sealed(folder / NAME)
    edit(value)
    atomic.write_json(folder / NAME, atomic.sealed(value))


def add_to_train(key: str) -> Damage:
    """Add 1 to a count of the shard and to the total, which then agree."""

    def edit(value: dict[str, Any]) -> None:
        value["shards"][1][key] += 1
        value["totals"]["train"][key] += 1

    return lambda _: edit_manifest(edit)


def set_token(path: Path, at: int, token: int) -> None:
    """Change a token, and the hash in the manifest, so that only a check of the content fails."""
    with open(path, "r+b") as file:
        file.seek(1024 + 2 * at)
        file.write(token.to_bytes(2, "little"))
    shard = int(path.stem[-5:])
    sha256 = atomic.sha256_file(path)
    edit_manifest(lambda value: value["shards"][shard].update(sha256=sha256))


def flip_byte(offset: int) -> Damage:
    return lambda path: flip(path, offset % path.stat().st_size, keep_mtime=True)


def truncate(size: int) -> Damage:
    return lambda path: os.truncate(path, size)


def remove_eot(path: Path) -> None:
    set_token(path, int(read_docs(path)[1, 0]), 11)


def edit_index(edit: Callable[[np.ndarray], np.ndarray]) -> Damage:
    def damage(path: Path) -> None:
        docs = edit(read_docs(path.with_name("train-00001.bin")))
        with open(path.with_name("train-00001.docs.npy"), "wb") as file:
            np.save(file, docs)

    return damage


def rows_of_another_chunk(path: Path) -> None:
    edit_index(lambda docs: np.add(docs, [0, 1]))(path)
    docs_sha256 = atomic.sha256_file(path.with_suffix(".docs.npy"))
    edit_manifest(lambda value: value["shards"][1].update(docs_sha256=docs_sha256))


def shard_of_another_run(path: Path) -> None:
    """A valid shard with a matching index, but of other data."""
    other = Path("other").absolute()
    raw = write_raw(other / "raw", [some_texts(30, "another text")])
    tokenize_here(raw, other / "tokens", SIZES, Machine(work_dir=other / "work"))
    for name in ("train-00001.bin", "train-00001.docs.npy"):
        os.replace(other / "tokens" / name, TOKENS / name)


def edited_record(path: Path) -> None:
    status, record = path.stat(), json.loads(path.read_text())
    record["splits"]["train"]["tokens"] += 1
    path.write_bytes(atomic.json_bytes(record))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def record_of_another_run(path: Path) -> None:
    """A record that differs only in its chunk key, with the hash that the manifest has."""
    path.write_bytes(atomic.json_bytes({**json.loads(path.read_text()), "chunk_key": 64 * "0"}))
    edit_manifest(lambda value: value["chunks"][1].update(sha256=atomic.sha256_file(path)))


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SHARD, INDEX, RECORD = "train-00001.bin", "train-00001.docs.npy", "chunks/00001.json"
# Damage to a file, after which tokenize rebuilds one chunk; below, damage after which it does not.
DAMAGES: dict[str, tuple[str, Damage]] = {
    "token": (SHARD, flip_byte(1024 + 333)),
    "last byte": (SHARD, flip_byte(-1)),
    "header": (SHARD, flip_byte(0)),
    "header padding": (SHARD, flip_byte(700)),
    "cut": (SHARD, truncate(2000)),
    "cut in the header": (SHARD, truncate(1021)),
    "empty": (SHARD, truncate(0)),
    "missing": (SHARD, Path.unlink),
    "link loop": (SHARD, link_loop),
    "token outside the vocabulary": (SHARD, lambda path: set_token(path, 7, 50257)),
    "no EOT": (SHARD, remove_eot),
    "extra EOT": (SHARD, lambda path: set_token(path, 7, EOT)),
    "text of the first document": (SHARD, lambda path: set_token(path, 1, 11)),
    "shard of another run": (SHARD, shard_of_another_run),
    "rows of another chunk": (SHARD, rows_of_another_chunk),
    "text_bytes": (SHARD, add_to_train("text_bytes")),
    "docs": (SHARD, add_to_train("docs")),
    "index": (INDEX, flip_byte(128 + 8)),
    "index header": (INDEX, flip_byte(40)),
    "empty index": (INDEX, truncate(0)),
    "index that is a folder": (INDEX, folder_in_its_place),
    "short index": (INDEX, edit_index(lambda docs: docs[:-1])),
    "rows beyond the file": (INDEX, edit_index(lambda docs: np.add(docs, [0, 10**12]))),
    "record": (RECORD, flip_byte(0)),
    "edited record": (RECORD, edited_record),
    "record of another run": (RECORD, record_of_another_run),
    "missing record": (RECORD, Path.unlink),
    "record that is a folder": (RECORD, folder_in_its_place),
    "record that is a pipe": (RECORD, pipe),
}
WITHOUT_REBUILD: dict[str, tuple[str, Damage]] = {
    "validation": ("val-00000.bin", flip_byte(1024 + 33)),
    "foreign shard": ("train-00099.bin", lambda path: shutil.copy(TOKENS / SHARD, path)),
    "foreign file with a colon": ("a: b.bin", Path.touch),
    "totals": (NAME, lambda _: edit_manifest(lambda m: m["totals"]["train"].update(text_bytes=1))),
    "part of an unknown file": (
        NAME,
        lambda _: edit_manifest(lambda m: m["shards"][1]["parts"][0].update(path="no.parquet")),
    ),
    "skipped": (NAME, lambda _: edit_manifest(lambda m: m["skipped"].update(empty=3))),
    "other raw manifest": (
        NAME,
        lambda _: edit_manifest(lambda m: m["source"]["sources"]["main"].update(revision="2")),
    ),
}


@pytest.mark.parametrize("kind", [*DAMAGES, *WITHOUT_REBUILD])
def test_damaged_file_is_named_removed_and_rebuilt(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, before = hashes(folder / TOKENS), piece_times()
    name, damage = (DAMAGES | WITHOUT_REBUILD)[kind]
    damage(TOKENS / name)
    with pytest.raises(SystemExit) as stopped:
        verify_main()
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if not line.startswith(("verify: ", "tokenize: "))]
    assert faults
    assert all(str(TOKENS / name.split(".")[0]) in line for line in faults), faults
    assert any(f"{TOKENS / name}: " in line for line in faults), faults
    assert not os.path.lexists(TOKENS / name)
    assert not verify.VERIFIED.exists()
    assert not verify.STATISTICS.exists()

    tokenize(RAW, TOKENS, SIZES, Machine(), CODE)
    after = piece_times()
    assert after.keys() == before.keys()
    assert len([key for key in before if after[key] != before[key]]) == (kind in DAMAGES)
    assert hashes(folder / TOKENS) == expected
    verify_main()


def turn_retokenize_off() -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("retokenize: 1", "retokenize: 0"))


def test_token_checks_work_without_hash_and_encoding(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_token(TOKENS / "train-00001.bin", 7, 50257)
    remove_eot(TOKENS / "train-00002.bin")
    turn_retokenize_off()
    with pytest.raises(SystemExit):
        verify_main()
    out = capsys.readouterr().out
    assert "train-00001.bin: token 50257 " in out
    assert "train-00002.bin: its <|endoftext|> tokens " in out
    assert "sha256" not in out


def test_changed_source_text_is_found_by_encoding_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The raw file and both manifests agree: only the tokens differ."""
    texts = [f"{text}!" for text in some_texts(30, "first")]
    file = write_parquet(RAW / "part-0.parquet", texts).model_dump()
    edit_manifest(lambda value: value["files"][0].update(file), RAW)
    edit_manifest(lambda value: value["source"]["files"][0].update(file))
    with pytest.raises(SystemExit):
        verify_main()
    assert "train-00000.bin: document " in capsys.readouterr().out
    turn_retokenize_off()
    tokenize_here(RAW, TOKENS, SIZES, Machine(), CODE)
    verify_main()


@pytest.mark.parametrize(
    "damage",
    [flip_byte(0), flip_byte(60), flip_byte(300), flip_byte(-200), truncate(999), Path.unlink],
    ids=["first byte", "first page", "a page", "footer", "cut", "missing"],
)
def test_damaged_source_file_is_named_and_removed(folder: Path, damage: Damage) -> None:
    path = RAW / "part-1.parquet"
    sha256 = Manifest.load(TOKENS).source.files[1].sha256
    piece = folder / ".work" / "files" / sha256
    piece.mkdir(parents=True)
    os.link(path, piece / "data.parquet")
    damage(path)
    with pytest.raises(verify.DataFault, match=f"{path}: "):
        verify.verify(RAW, TOKENS, VerifyParams(), Machine())
    assert not path.exists()
    assert not piece.exists()


def test_source_file_damaged_before_it_was_tokenized_leaves_no_shard(folder: Path) -> None:
    """Its shards agree with their manifest: only the source shows that their text is another."""
    path = RAW / "part-1.parquet"
    texts = some_texts(25, "second")
    pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
    write_manifest(RAW, [*RawManifest.load(RAW).files[:1], describe(path, len(texts))])
    good = path.read_bytes()
    tokenize_here(RAW, TOKENS, SIZES, Machine())
    expected = hashes(TOKENS)
    shutil.rmtree(TOKENS)
    shutil.rmtree(".work")
    flip(path, good.index(b"Document 3 "), keep_mtime=True)
    tokenize_here(RAW, TOKENS, SIZES, Machine())
    assert hashes(TOKENS) != expected
    with pytest.raises(verify.DataFault, match=f"{path}: sha256"):
        verify.verify(RAW, TOKENS, VerifyParams(retokenize=0), Machine())
    path.write_bytes(good)
    tokenize_here(RAW, TOKENS, SIZES, Machine())
    assert hashes(TOKENS) == expected


def test_foreign_link_is_removed_and_its_target_untouched(folder: Path) -> None:
    private = folder / "private"
    private.write_text("key")
    private.chmod(0o400)
    for link, target in ((TOKENS / "note", private), (TOKENS / "folder", folder)):
        link.symlink_to(target)
    with pytest.raises(verify.DataFault, match=r"folder: .*\n.*note: "):
        verify.verify(RAW, TOKENS, VerifyParams(retokenize=0), Machine())
    assert private.stat().st_mode & 0o777 == 0o400
    assert not os.path.lexists(TOKENS / "note")
    assert not os.path.lexists(TOKENS / "folder")
    assert (folder / ".work").is_dir()


def test_file_beyond_a_link_to_a_folder_is_kept(folder: Path) -> None:
    (folder / "private").mkdir()
    files = [folder / "private" / name for name in ("00000.json", "00001.json", "note")]
    for file in files:
        file.write_text("mine")
    shutil.rmtree(TOKENS / "chunks")
    (TOKENS / "chunks").symlink_to(folder / "private")
    with pytest.raises(verify.DataFault, match=r"chunks: "):
        verify.verify(RAW, TOKENS, VerifyParams(retokenize=0), Machine())
    assert [file.read_text() for file in files] == ["mine"] * 3
    assert not os.path.lexists(TOKENS / "chunks")


def test_outermost_link_to_a_folder_within_the_data_is_removed(tmp_path: Path) -> None:
    """A folder of the data may itself be a link, to another disk."""
    (tmp_path / "disk/far").mkdir(parents=True)
    raw = tmp_path / "raw"
    raw.symlink_to("disk")
    (raw / "near").symlink_to("far")
    (raw / "near/deep").symlink_to("deep")
    folders = (raw, tmp_path / "tokens")
    for name, link in (("far/a", None), ("near/a", raw / "near"), ("near/deep/a", raw / "near")):
        assert verify._outermost_link(raw / name, folders) == link


def test_source_file_that_is_a_pipe_is_a_fault(folder: Path) -> None:
    pipe(RAW / "part-1.parquet")
    file = RawManifest.load(RAW).files[1]
    (fault,) = checks.check_source(RAW, file, TOKENS, [], has_text=True).faults
    assert fault.path == RAW / "part-1.parquet"


def test_documents_of_a_bytes_column_are_encoded_again(tmp_path: Path) -> None:
    raw, texts = tmp_path / "raw", [b"bytes", b"\xff", "sécond".encode()]
    raw.mkdir()
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), raw / "a.parquet")
    write_manifest(raw, [describe(raw / "a.parquet", 3)])
    params = TokenizeParams(shard_tokens=1000, val_per_10k=0)
    machine = Machine(work_dir=tmp_path / "work")
    manifest = tokenize_here(raw, tmp_path / "tokens", params, machine)
    assert manifest.totals["train"].docs == 2

    def faults(val_per_10k: int) -> list[checks.Fault]:
        spans = checks.part_spans(manifest.shards[0])
        return checks.check_texts(raw, "text", tmp_path / "tokens", spans, 5, val_per_10k).faults

    assert faults(0) == []
    assert len(faults(10_000)) == 2
