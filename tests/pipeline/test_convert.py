"""Tests for pipeline.convert: other projects' readers read the shards and their conversions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline import TokenStream, convert
from pipeline.format import tokenizer
from pipeline.format.manifest import Manifest
from pipeline.format.tokenizer import EOT
from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store.store import publish
from tests.support.foreign_tokens import read_llm_c, read_megatron
from tests.support.small_data import Project, hashes, some_texts, tokenize_here, write_raw


def documents(tokens: np.ndarray) -> list[list[int]]:
    """Split a stream into its documents, without their EOT."""
    assert tokens[0] == EOT
    parts = np.split(tokens, np.flatnonzero(tokens == EOT))[1:]
    return [part[1:].tolist() for part in parts]


def test_llm_c_and_modded_nanogpt_read_the_shards_unchanged(small_tokens: Path) -> None:
    for split in ("train", "val"):
        shards = [read_llm_c(path) for path in sorted(small_tokens.glob(f"{split}-*.bin"))]
        assert len(shards) > 1
        assert all(shard[0] == EOT for shard in shards)
        found = np.concatenate(shards)
        assert np.array_equal(found, TokenStream(small_tokens, split)[:])
    texts = {tokenizer.decode(ids) for ids in documents(found)}
    assert texts <= {*some_texts(30, "first"), *some_texts(25, "second")}


@pytest.mark.parametrize("block", [50, 1 << 22])
def test_nanogpt_reads_the_conversion(
    small_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(convert, "_BLOCK_TOKENS", block)
    assert convert.convert(small_tokens, "nanogpt", tmp_path / "out") == ["train.bin", "val.bin"]
    for split in ("train", "val"):
        data = np.memmap(tmp_path / "out" / f"{split}.bin", dtype=np.uint16, mode="r")
        assert data[-1] == EOT
        found = [part[:-1].tolist() for part in np.split(data, np.flatnonzero(data == EOT) + 1)]
        assert found.pop() == []
        assert found == documents(TokenStream(small_tokens, split)[:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_build_nanogpt_reads_the_conversion(
    small_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_NPY_TOKENS", 1000)
    monkeypatch.setattr(convert, "_BLOCK_TOKENS", 700)
    convert.convert(small_tokens, "build-nanogpt", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    for split in ("train", "val"):
        # Its loader takes the files with the split in their name, sorted.
        shards = [np.load(tmp_path / "out" / name) for name in names if split in name]
        assert all(shard.dtype == np.uint16 for shard in shards)
        assert [len(shard) for shard in shards[:-1]] == [1000] * (len(shards) - 1)
        stream = TokenStream(small_tokens, split)[:]
        assert len(shards) == -(-len(stream) // 1000) > 1
        assert np.array_equal(np.concatenate(shards), stream)
    assert "shard_val_000000.npy" in names
    assert len({name[-10:] for name in names}) == len(names)


@pytest.mark.parametrize("block", [50, 1 << 22])
def test_megatron_reads_the_conversion(
    small_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(convert, "_BLOCK_TOKENS", block)
    convert.convert(small_tokens, "megatron", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 4
    for split in ("train", "val"):
        found = read_megatron(tmp_path / "out" / f"{split}_text_document")
        assert all(document[-1] == EOT for document in found)
        ids = [document[:-1].tolist() for document in found]
        assert ids == documents(TokenStream(small_tokens, split)[:])


def test_empty_split_has_no_file(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", [some_texts(5)])
    params = TokenizeParams(shard_tokens=2000, val_per_10k=0)
    tokenize_here(raw, tmp_path / "tokens", params, Machine(work_dir=tmp_path / "work"))
    for to, names in {
        "nanogpt": ["train.bin"],
        "build-nanogpt": ["shard_train_000000.npy"],
        "megatron": ["train_text_document.bin", "train_text_document.idx"],
    }.items():
        assert convert.convert(tmp_path / "tokens", to, tmp_path / to) == names


def test_existing_output_is_not_overwritten(small_tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be replaced
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new/left").write_text("by a killed run")
    convert.convert(small_tokens, "nanogpt", out)
    before = hashes(tmp_path)
    assert sorted(before) == ["out/train.bin", "out/val.bin"]
    with pytest.raises(UserError, match=r"--out .*out: "):
        convert.convert(small_tokens, "nanogpt", out)
    assert hashes(tmp_path) == before


def test_failed_conversion_leaves_no_files(
    small_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path for path in small_tokens.iterdir() if path.is_file()}
    publish({name: path.read_bytes() for name, path in files.items()}, tmp_path / "tokens")
    (tmp_path / "tokens/train-00003.docs.npy").unlink()
    with pytest.raises(UserError, match=r"train-00003\.docs\.npy"):
        convert.convert(tmp_path / "tokens", "megatron", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"--out .* GB"):
        convert.convert(small_tokens, "nanogpt", tmp_path / "out")


def test_command(project: Project, small_tokens: Path) -> None:
    total = sum(t.tokens for t in Manifest.load(small_tokens).totals.values())
    publish({path.name: path for path in small_tokens.iterdir() if path.is_file()}, project.tokens)

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return project.run("convert", *flags)

    done = run("--to", "nanogpt", "--out", "out")
    assert done.returncode == 0, done
    assert "2 files" in done.stdout.splitlines()[-1]
    assert f"of {total:,} tokens" in done.stdout  # progress
    again = run("--to", "nanogpt", "--out", "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: --out out: ")
