"""Of pipeline.convert: others read our shards, and what is made of them."""

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

SIZES = TokenizeParams(shard_tokens=2000, val_per_10k=1500)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thirteen shards of train, a few of val. Not to be changed."""
    root = tmp_path_factory.mktemp("tokens")
    raw = write_raw(root / "raw", [some_texts(30, "first"), some_texts(25, "second")])
    tokenize_here(raw, root / "tokens", SIZES, Machine(work_dir=root / "work"))
    return root / "tokens"


def documents(tokens: np.ndarray) -> list[list[int]]:
    """The documents of a stream with EOT before each, without it."""
    assert tokens[0] == EOT
    parts = np.split(tokens, np.flatnonzero(tokens == EOT))[1:]
    return [part[1:].tolist() for part in parts]


def test_llm_c_and_modded_nanogpt_read_our_shards_as_they_are(tokens: Path) -> None:
    for split in ("train", "val"):
        shards = [read_llm_c(path) for path in sorted(tokens.glob(f"{split}-*.bin"))]
        assert len(shards) > 1
        assert all(shard[0] == EOT for shard in shards)
        found = np.concatenate(shards)
        assert np.array_equal(found, TokenStream(tokens, split)[:])
    texts = {tokenizer.decode(ids) for ids in documents(found)}
    assert texts <= {*some_texts(30, "first"), *some_texts(25, "second")}


@pytest.mark.parametrize("block", [50, 1 << 22])
def test_nanogpt_reads_what_is_written_for_it(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(convert, "_BLOCK_TOKENS", block)
    assert convert.convert(tokens, "nanogpt", tmp_path / "out") == ["train.bin", "val.bin"]
    for split in ("train", "val"):
        data = np.memmap(tmp_path / "out" / f"{split}.bin", dtype=np.uint16, mode="r")
        assert data[-1] == EOT
        found = [part[:-1].tolist() for part in np.split(data, np.flatnonzero(data == EOT) + 1)]
        assert found.pop() == []
        assert found == documents(TokenStream(tokens, split)[:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_build_nanogpt_reads_what_is_written_for_it(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_NPY_TOKENS", 1000)
    monkeypatch.setattr(convert, "_BLOCK_TOKENS", 700)
    convert.convert(tokens, "build-nanogpt", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    for split in ("train", "val"):
        # Its loader takes the files with the split's name in theirs, sorted.
        shards = [np.load(tmp_path / "out" / name) for name in names if split in name]
        assert all(shard.dtype == np.uint16 for shard in shards)
        assert [len(shard) for shard in shards[:-1]] == [1000] * (len(shards) - 1)
        stream = TokenStream(tokens, split)[:]
        assert len(shards) == -(-len(stream) // 1000) > 1
        assert np.array_equal(np.concatenate(shards), stream)
    assert "shard_val_000000.npy" in names
    assert len({name[-10:] for name in names}) == len(names)


@pytest.mark.parametrize("block", [50, 1 << 22])
def test_megatron_reads_what_is_written_for_it(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(convert, "_BLOCK_TOKENS", block)
    convert.convert(tokens, "megatron", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 4
    for split in ("train", "val"):
        found = read_megatron(tmp_path / "out" / f"{split}_text_document")
        assert all(document[-1] == EOT for document in found)
        ids = [document[:-1].tolist() for document in found]
        assert ids == documents(TokenStream(tokens, split)[:])


def test_an_empty_split_has_no_file(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", [some_texts(5)])
    params = TokenizeParams(shard_tokens=2000, val_per_10k=0)
    tokenize_here(raw, tmp_path / "tokens", params, Machine(work_dir=tmp_path / "work"))
    for to, names in {
        "nanogpt": ["train.bin"],
        "build-nanogpt": ["shard_train_000000.npy"],
        "megatron": ["train_text_document.bin", "train_text_document.idx"],
    }.items():
        assert convert.convert(tmp_path / "tokens", to, tmp_path / to) == names


def test_what_is_there_is_not_overwritten(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no loss
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new/left").write_text("by a run that was killed")
    convert.convert(tokens, "nanogpt", out)
    before = hashes(tmp_path)
    assert sorted(before) == ["out/train.bin", "out/val.bin"]
    with pytest.raises(UserError, match=r"--out .*out: is there already"):
        convert.convert(tokens, "nanogpt", out)
    assert hashes(tmp_path) == before


def test_a_fault_on_the_way_leaves_nothing(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path for path in tokens.iterdir() if path.is_file()}
    publish({name: path.read_bytes() for name, path in files.items()}, tmp_path / "tokens")
    (tmp_path / "tokens/train-00003.docs.npy").unlink()
    with pytest.raises(UserError, match=r"train-00003\.docs\.npy: no such file"):
        convert.convert(tmp_path / "tokens", "megatron", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"--out .* GB are free"):
        convert.convert(tokens, "nanogpt", tmp_path / "out")


def test_the_real_command(project: Project, tokens: Path) -> None:
    total = sum(t.tokens for t in Manifest.load(tokens).totals.values())
    publish({path.name: path for path in tokens.iterdir() if path.is_file()}, project.tokens)

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return project.run("convert", *flags)

    done = run("--to", "nanogpt", "--out", "out")
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1].startswith("convert: 2 files, ")
    assert f"of {total:,} tokens" in done.stdout  # progress
    again = run("--to", "nanogpt", "--out", "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: --out out: is there already")
