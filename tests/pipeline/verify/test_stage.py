"""Of pipeline.verify and pipeline.checks: damage is named, removed, made anew; no more is."""

from __future__ import annotations

import contextlib
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

from pipeline.format.manifest import NAME, Manifest
from pipeline.format.shards import read_docs
from pipeline.format.tokenizer import EOT
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from pipeline.tokenize.stage import tokenize
from pipeline.verify import checks
from pipeline.verify import stage as verify
from pipeline.verify.__main__ import main as verify_main
from tests.support.small_data import (
    CODE,
    PARAMS,
    Project,
    flip,
    hashes,
    some_texts,
    tokenize_here,
    write_parquet,
    write_raw,
)

SIZES = TokenizeParams(shard_tokens=2000, val_per_10k=1500)
RAW, TOKENS = verify.RAW, verify.TOKENS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw text, and tokens and a store made of it. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    write_raw(root / RAW, [some_texts(30, "first"), some_texts(25, "second")])
    tokenize_here(root / RAW, root / TOKENS, SIZES, Machine(work_dir=root / ".work"))
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_ray: int) -> Path:
    """A copy of it as the current folder, the tokens hard links into the store as ever."""
    root = tmp_path / "project"
    shutil.copytree(made / RAW, root / RAW)
    shutil.copytree(made / ".work", root / ".work")
    monkeypatch.chdir(root)
    (root / "params.yaml").write_text(PARAMS.format(shard_tokens=2000, val_per_10k=1500))
    tokenize(RAW, TOKENS, SIZES, Machine(), CODE)
    assert hashes(root / TOKENS) == hashes(made / TOKENS)
    return root


def chunk_times() -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in Path(".work/chunks").glob("*/record.json")}


def test_clean_data_passes_and_is_described(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(folder / TOKENS)
    verify_main()
    manifest = Manifest.load(TOKENS)
    out = capsys.readouterr().out
    assert "no fault" in out
    assert hashes(folder / TOKENS) == before
    metrics = json.loads(verify.METRICS.read_text())
    train, val = manifest.totals["train"], manifest.totals["val"]
    assert metrics["documents"] == 55
    assert metrics["train_tokens"] == train.tokens
    assert metrics["val_tokens"] == val.tokens
    assert metrics["tokens"] == train.tokens + val.tokens
    assert metrics["text_bytes"] == sum(len((t or "").encode()) for t in all_texts())
    assert metrics["bytes_per_token"] == round(metrics["text_bytes"] / (metrics["tokens"] - 55), 4)
    rows = list(csv.DictReader(Path("metrics/document_lengths.csv").read_text().splitlines()))
    assert sum(int(row["documents"]) for row in rows) == 55
    said = json.loads(verify.VERIFIED.read_text())
    assert said == {"manifest_sha256": atomic.sha256_file(TOKENS / NAME)}


def all_texts() -> list[str | None]:
    return [*some_texts(30, "first"), *some_texts(25, "second")]


def edit_manifest(edit: Callable[[dict[str, Any]], None], folder: Path = TOKENS) -> None:
    value = json.loads((folder / NAME).read_text())
    edit(value)
    atomic.write_json(folder / NAME, value)


def rehash(name: str) -> None:
    """Have the manifest say what the shard now is: only a look at its content finds the fault."""

    def edit(value: dict[str, Any]) -> None:
        shard = next(s for s in value["shards"] if s["name"] == name)
        shard["sha256"] = atomic.sha256_file(TOKENS / name)

    edit_manifest(edit)


def set_token(name: str, at: int, token: int) -> None:
    with open(TOKENS / name, "r+b") as file:
        file.seek(1024 + 2 * at)
        file.write(token.to_bytes(2, "little"))
    rehash(name)


def flipped_token() -> str:
    flip(TOKENS / "train-00001.bin", 1024 + 333)
    return "train-00001.bin"


def rotten_token() -> str:
    flip(TOKENS / "train-00001.bin", 1024 + 333, keep_mtime=True)
    return "train-00001.bin"


def rotten_last_byte() -> str:
    path = TOKENS / "train-00001.bin"
    flip(path, path.stat().st_size - 1, keep_mtime=True)
    return path.name


def truncated() -> str:
    os.truncate(TOKENS / "train-00001.bin", 2000)
    return "train-00001.bin"


def truncated_in_its_header() -> str:
    os.truncate(TOKENS / "train-00001.bin", 1021)
    return "train-00001.bin"


def emptied() -> str:
    os.truncate(TOKENS / "train-00001.bin", 0)
    return "train-00001.bin"


def wrong_header() -> str:
    flip(TOKENS / "train-00001.bin", 0)
    return "train-00001.bin"


def rotten_padding_of_the_header() -> str:
    flip(TOKENS / "train-00001.bin", 700, keep_mtime=True)
    return "train-00001.bin"


def missing() -> str:
    (TOKENS / "train-00001.bin").unlink()
    return "train-00001.bin"


def rotten_sidecar() -> str:
    flip(TOKENS / "train-00001.docs.npy", 128 + 8, keep_mtime=True)
    return "train-00001.docs.npy"


def rotten_sidecar_header() -> str:
    flip(TOKENS / "train-00001.docs.npy", 40, keep_mtime=True)
    return "train-00001.docs.npy"


def emptied_sidecar() -> str:
    os.truncate(TOKENS / "train-00001.docs.npy", 0)
    return "train-00001.docs.npy"


def shorter_sidecar() -> str:
    path = TOKENS / "train-00001.docs.npy"
    docs = read_docs(TOKENS / "train-00001.bin")
    with open(path, "wb") as file:
        np.save(file, docs[:-1])
    return path.name


def sidecar_of_rows_that_are_not() -> str:
    path = TOKENS / "train-00001.docs.npy"
    docs = read_docs(TOKENS / "train-00001.bin").copy()
    docs[:, 1] = 10**12
    with open(path, "wb") as file:
        np.save(file, docs)
    return path.name


def outside_the_vocabulary() -> str:
    set_token("train-00001.bin", 7, 50257)
    return "train-00001.bin"


def eot_removed() -> str:
    set_token("train-00001.bin", int(read_docs(TOKENS / "train-00001.bin")[1, 0]), 11)
    return "train-00001.bin"


def eot_too_many() -> str:
    set_token("train-00001.bin", 7, EOT)
    return "train-00001.bin"


def another_text_in_the_first_document() -> str:
    set_token("train-00001.bin", 1, 11)
    return "train-00001.bin"


def rotten_validation() -> str:
    flip(TOKENS / "val-00000.bin", 1024 + 33, keep_mtime=True)
    return "val-00000.bin"


def foreign_shard() -> str:
    shutil.copy(TOKENS / "train-00001.bin", TOKENS / "train-00099.bin")
    return "train-00099.bin"


def edited_record() -> str:
    path = TOKENS / "chunks/00001.json"
    status = path.stat()
    record = json.loads(path.read_text())
    record["splits"]["train"]["tokens"] += 1
    path.write_bytes(atomic.json_bytes(record))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return "chunks/00001.json"


def stale_record() -> str:
    """That of the chunk as another run made it: all but its key is right."""
    path = TOKENS / "chunks/00001.json"
    path.write_bytes(atomic.json_bytes({**json.loads(path.read_text()), "chunk_key": 64 * "0"}))
    return "chunks/00001.json"


def edited_statistics_of_a_record() -> str:
    path = TOKENS / "chunks/00001.json"
    record = json.loads(path.read_text())
    record["splits"]["train"]["lengths"] = {"1": 1}
    path.write_bytes(atomic.json_bytes(record))
    return "chunks/00001.json"


def missing_record() -> str:
    (TOKENS / "chunks/00001.json").unlink()
    return "chunks/00001.json"


def shard_of_another_run() -> str:
    """It is whole, its header and its sidecar are right, and it is not of these data."""
    other = Path("other").absolute()
    raw = write_raw(other / "raw", [some_texts(30, "another text")])
    tokenize_here(raw, other / "tokens", SIZES, Machine(work_dir=other / "work"))
    for name in ("train-00001.bin", "train-00001.docs.npy"):
        os.replace(other / "tokens" / name, TOKENS / name)
    return "train-00001.bin"


def rows_of_another_chunk() -> str:
    path = TOKENS / "train-00001.docs.npy"
    docs = read_docs(TOKENS / "train-00001.bin").copy()
    docs[:, 1] += 1
    with open(path, "wb") as file:
        np.save(file, docs)

    def edit(value: dict[str, Any]) -> None:
        value["shards"][1]["docs_sha256"] = atomic.sha256_file(path)

    edit_manifest(edit)
    return "train-00001.bin"


def edited_bytes_of_text() -> str:
    def edit(value: dict[str, Any]) -> None:
        value["shards"][1]["text_bytes"] += 1
        value["totals"]["train"]["text_bytes"] += 1

    edit_manifest(edit)
    return "train-00001.bin"


def foreign_file_with_a_colon() -> str:
    (TOKENS / "a: b.bin").write_text("not of these data")
    return "a: b.bin"


def copied_record() -> str:
    shutil.copy(TOKENS / "chunks/00001.json", TOKENS / "chunks/00099.json")
    return "chunks/00099.json"


def edited_content() -> str:
    path = TOKENS / "chunks/00001.json"
    record = json.loads(path.read_text())
    record["splits"]["train"]["content"] = 32 * "0"
    path.write_bytes(atomic.json_bytes(record))
    return "chunks/00001.json"


def rotten_record() -> str:
    flip(TOKENS / "chunks/00001.json", 0, keep_mtime=True)
    return "chunks/00001.json"


def edited_totals() -> str:
    edit_manifest(lambda value: value["totals"]["train"].update(text_bytes=1))
    return NAME


def edited_count_of_a_shard() -> str:
    def edit(value: dict[str, Any]) -> None:
        value["shards"][1]["docs"] += 1
        value["totals"]["train"]["docs"] += 1

    edit_manifest(edit)
    return value_name(1)


def value_name(index: int) -> str:
    return str(json.loads((TOKENS / NAME).read_text())["shards"][index]["name"])


def part_of_no_file() -> str:
    edit_manifest(lambda value: value["shards"][1]["parts"][0].update(path="no.parquet"))
    return NAME


def another_raw_manifest() -> str:
    edit_manifest(lambda value: value["source"]["source"].update(revision="2"))
    return NAME


# Damage -> how many chunks are made anew by the next tokenize.
DAMAGES: list[tuple[Callable[[], str], int]] = [
    (flipped_token, 1), (rotten_token, 1), (rotten_last_byte, 1), (truncated, 1),
    (truncated_in_its_header, 1), (emptied, 1), (wrong_header, 1),
    (rotten_padding_of_the_header, 1), (missing, 1), (rotten_sidecar, 1),
    (rotten_sidecar_header, 1), (emptied_sidecar, 1), (shorter_sidecar, 1),
    (sidecar_of_rows_that_are_not, 1), (outside_the_vocabulary, 1), (eot_removed, 1),
    (eot_too_many, 1), (another_text_in_the_first_document, 1), (rotten_validation, 0),
    (foreign_shard, 0), (copied_record, 0), (edited_content, 1), (edited_record, 1),
    (stale_record, 1), (edited_statistics_of_a_record, 1), (missing_record, 1),
    (shard_of_another_run, 1), (rows_of_another_chunk, 1), (edited_bytes_of_text, 1),
    (foreign_file_with_a_colon, 0), (rotten_record, 1), (edited_totals, 0),
    (edited_count_of_a_shard, 1), (part_of_no_file, 0), (another_raw_manifest, 0),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "remade"), DAMAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_is_named_and_made_anew(
    folder: Path, damage: Callable[[], str], remade: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, before = hashes(folder / TOKENS), chunk_times()
    name = damage()
    with pytest.raises(SystemExit) as stopped:
        verify_main()
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if not line.startswith(("verify: ", "tokenize: "))]
    assert faults
    assert all(str(TOKENS / name.split(".")[0]) in line for line in faults), faults
    assert any(f"{TOKENS / name}: " in line for line in faults), faults
    assert not (TOKENS / name).exists()
    assert not verify.VERIFIED.exists()
    assert not verify.METRICS.exists()

    tokenize(RAW, TOKENS, SIZES, Machine(), CODE)
    after = chunk_times()
    assert after.keys() == before.keys()
    assert len([key for key in before if after[key] != before[key]]) == remade
    assert hashes(folder / TOKENS) == expected
    verify_main()


def test_each_check_speaks_for_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the hash does not show, nor the spot check, is still found."""
    outside_the_vocabulary()
    eot = int(read_docs(TOKENS / "train-00002.bin")[1, 0])
    set_token("train-00002.bin", eot, 11)
    (folder / "params.yaml").write_text(
        (folder / "params.yaml").read_text().replace("retokenize: 1", "retokenize: 0")
    )
    with pytest.raises(SystemExit):
        verify_main()
    out = capsys.readouterr().out
    assert "train-00001.bin: token 50257 is outside the vocabulary" in out
    assert "train-00002.bin: its <|endoftext|> tokens are not where" in out
    assert "sha256" not in out


def test_a_swapped_text_is_found_by_encoding_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw file and both manifests agree with each other: only the tokens tell."""
    texts = some_texts(30, "first")
    row = int(read_docs(TOKENS / "train-00000.bin")[0, 1])
    texts[row] = "Another text."
    file = write_parquet(RAW / "part-0.parquet", texts)

    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][0] = file.model_dump()

    edit_manifest(edit, RAW)
    edit_manifest(lambda value: edit(value["source"]))
    with pytest.raises(SystemExit):
        verify_main()
    assert "train-00000.bin: document 0 is not row" in capsys.readouterr().out
    (folder / "params.yaml").write_text(
        (folder / "params.yaml").read_text().replace("retokenize: 1", "retokenize: 0")
    )
    tokenize_here(RAW, TOKENS, SIZES, Machine(), CODE)
    verify_main()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


RAW_DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("first byte", lambda path: flip(path, 0)),
    ("first page", lambda path: flip(path, 60, keep_mtime=True)),
    ("a page", lambda path: flip(path, 300, keep_mtime=True)),
    ("middle", lambda path: flip(path, path.stat().st_size // 2, keep_mtime=True)),
    ("footer", lambda path: flip(path, path.stat().st_size - 200, keep_mtime=True)),
    ("last byte", lambda path: flip(path, path.stat().st_size - 1)),
    ("cut", cut),
    ("missing", lambda path: path.unlink()),
]


@pytest.mark.parametrize(("how", "damage"), RAW_DAMAGES, ids=[how for how, _ in RAW_DAMAGES])
def test_a_damaged_source_file_is_named_and_removed(
    folder: Path, how: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = RAW / "part-1.parquet"
    sha256 = Manifest.load(TOKENS).source.files[1].sha256
    piece = folder / ".work" / "files" / sha256
    piece.mkdir(parents=True)
    os.link(path, piece / "data.parquet")
    damage(path)
    with pytest.raises(SystemExit) as stopped:
        verify_main()
    assert stopped.value.code == 1
    assert f"{path}: " in capsys.readouterr().out
    assert not path.exists()
    assert not piece.exists()


def test_missing_folders_are_the_users(folder: Path) -> None:
    from pipeline.runtime.errors import UserError

    shutil.rmtree(TOKENS)
    with pytest.raises(UserError, match=r"data/tokens/manifest\.json: no such file"):
        verify_main()


def test_the_real_command(project: Project, small_raw: Path) -> None:
    """Status 1, the file named, no traceback; what was verified before is said no more."""
    code = code_key("tokenize", project.root)
    machine = Machine(work_dir=project.root / ".work")
    tokenize_here(small_raw, project.tokens, SIZES, machine, code)
    flip(project.tokens / "train-00002.bin", 1500, keep_mtime=True)
    result = project.run("verify")
    assert result.returncode == 1, result
    assert "data/tokens/train-00002.bin: sha256 " in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert not (project.tokens / "train-00002.bin").exists()
    assert not (project.root / "data/verified.json").exists()
    with contextlib.suppress(FileNotFoundError):
        assert list((project.root / ".work/tmp").iterdir()) == []


def test_a_column_of_bytes_is_encoded_again(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", [["one", "two"]])
    path = raw / "part-0.parquet"
    texts = pa.array([b"bytes", b"\xff", "sécond".encode()], pa.binary())
    pq.write_table(pa.table({"text": texts}), path)
    digest = atomic.sha256_file(path)
    file = {"path": path.name, "bytes": path.stat().st_size, "rows": 3, "sha256": digest}
    edit_manifest(lambda value: value.update(files=[file]), raw)
    params = TokenizeParams(shard_tokens=1000, val_per_10k=0)
    machine = Machine(work_dir=tmp_path / "work")
    manifest = tokenize_here(raw, tmp_path / "tokens", params, machine)
    assert manifest.totals["train"].docs == 2

    def faults(val_per_10k: int) -> list[str]:
        places = checks.places_of(manifest.shards[0])
        findings = checks.check_texts(raw, "text", tmp_path / "tokens", places, 5, val_per_10k)
        return [fault.what for fault in findings.faults]

    assert faults(0) == []
    assert faults(10_000) == [
        "document 0 is not of split train",
        "document 1 is not of split train",
    ]
