"""Tests for source kind `tokens`: published token files are linked or cut, indexed and trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import TokenStream, convert
from pipeline.download.stage import download
from pipeline.format.foreign_tokens import split_of_file
from pipeline.format.manifest import SPLITS, Manifest, RawManifest
from pipeline.format.shards import read_docs
from pipeline.format.tokenizer import EOT
from pipeline.params import SourceParams, TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize.from_tokens import TokenFileChunks
from pipeline.tokenize.index_chunk import index_chunk
from pipeline.tokenize.stage import tokenize
from pipeline.verify import stage as verify
from pipeline.verify.__main__ import main as verify_main
from tests.support.foreign_tokens import write_llm_c
from tests.support.hub import Hub
from tests.support.repo import REPO
from tests.support.small_data import CODE, PARAMS, flip, hashes, no_cluster, piece_times, run_here
from tests.support.training import Project as Training

SIZES = TokenizeParams(shard_tokens=2000, val_per_10k=0)
RAW, TOKENS = verify.RAW, verify.TOKENS


@pytest.fixture(scope="module")
def published(small_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokens as others publish them, with documents that continue in the next file."""
    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_NPY_TOKENS", 3000)
        for to in ("nanogpt", "build-nanogpt"):
            convert.convert(small_tokens, to, root / to)
    write_llm_c(root / "llm.c/fineweb_val_000000.bin", TokenStream(small_tokens, "val")[:])
    for number, part in enumerate(
        np.array_split(TokenStream(small_tokens, "train")[:], 3), start=1
    ):
        write_llm_c(root / f"llm.c/fineweb_train_{number:06d}.bin", part)
    return root


Run = Callable[..., Manifest]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_ray: int) -> Run:
    """Return a function that downloads and tokenizes paths in a new current folder."""
    monkeypatch.setattr("pipeline.download.stage.cluster", no_cluster)
    for module in ("download.stage", "tokenize.from_tokens"):
        monkeypatch.setattr(f"pipeline.{module}.run_tasks", run_here)
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    Path("params.yaml").write_text(PARAMS.format(shard_tokens=2000, val_per_10k=0))

    def run(*paths: object, shard_tokens: int = 2000, **source: Any) -> Manifest:
        params = SourceParams(kind="tokens", paths=[str(path) for path in paths], **source)
        machine = Machine()
        download({"main": params}, Store.open(machine), RAW, machine)
        sizes = SIZES.model_copy(update={"shard_tokens": shard_tokens})
        return tokenize(RAW, TOKENS, sizes, machine, CODE)

    return run


@pytest.mark.parametrize("kind", ["llm.c", "nanogpt", "build-nanogpt"])
def test_published_tokens_give_the_same_stream_and_pass_verify(
    run: Run, small_tokens: Path, published: Path, kind: str
) -> None:
    manifest = run(published / kind)
    for split in SPLITS:
        assert np.array_equal(TokenStream(TOKENS, split)[:], TokenStream(small_tokens, split)[:])
    raw = RawManifest.load(RAW)
    assert manifest.source == raw
    assert raw.sources["main"].kind == "tokens"
    assert sum(file.tokens or 0 for file in raw.files) == sum(
        totals.tokens for totals in manifest.totals.values()
    )
    for split, expected in Manifest.load(small_tokens).totals.items():
        assert manifest.totals[split].docs == expected.docs
        assert manifest.totals[split].text_bytes == expected.text_bytes
    verify_main()
    metrics = json.loads(verify.STATISTICS.read_text())
    assert metrics["documents"] == 55
    assert metrics["duplicates"] == metrics["val_documents_in_train"] == 0
    assert "token_count_agreement" not in metrics
    # A document's position is its first token in the file: its EOT or, in nanoGPT's, the one after.
    for shard in manifest.shards:
        docs, tokens = read_docs(TOKENS / shard.name), TokenStream(TOKENS, shard.split)
        assert (tokens[:][np.asarray(docs[:, 0]) + _start(tokens, shard.name)] == EOT).all()
        if kind == "nanogpt" and shard.split == "train":
            source = np.fromfile(RAW / "train.bin", np.uint16)
            assert all(at == 0 or source[at - 1] == EOT for at in docs[:, 1])
    # Nothing is built twice.
    before = piece_times()
    assert run(published / kind) == manifest
    assert piece_times() == before


def _start(stream: TokenStream, name: str) -> int:
    return int(stream.starts[[shard.name for shard in stream.shards].index(name)])


def test_llm_c_shards_are_linked_and_other_files_are_cut(run: Run, published: Path) -> None:
    manifest = run(published / "llm.c")
    train = sorted(RAW.glob("*train*"))
    assert len(train) == 3
    for number, path in enumerate(train):
        assert path.samefile(TOKENS / f"train-{number:05d}.bin")
        assert not path.samefile(published / "llm.c" / path.name)  # the user's file is not linked
    first, second = (read_docs(TOKENS / f"train-{n:05d}.bin") for n in range(2))
    assert first[0].tolist() == [0, 0]
    assert second[0, 0] > 0  # it begins inside a document
    assert manifest.shards[1].docs == len(second)
    cut = run(published / "nanogpt")
    assert cut.totals["train"].shards > 5


@pytest.mark.parametrize("kind", ["nanogpt", "build-nanogpt"])
def test_content_does_not_depend_on_shard_size_or_block_size(
    run: Run, published: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = [run(published / kind, shard_tokens=size) for size in (1000, 2500, 10**6)]
    assert len({manifest.dataset_key for manifest in made}) == 1
    assert len({manifest.totals["train"].shards for manifest in made}) > 1
    monkeypatch.setattr("pipeline.tokenize.index_chunk.BLOCK_TOKENS", 17)
    monkeypatch.setattr("pipeline.tokenize.token_stats.BLOCK_TOKENS", 17)
    shutil.rmtree(".work")
    assert run(published / kind, shard_tokens=1000) == made[0]


def test_source_files_limits_training_files_only(run: Run, published: Path) -> None:
    assert split_of_file("val/fineweb_train_000001.bin") == "train"
    run(published / "llm.c", files=1)
    assert sorted(path.name for path in RAW.glob("*.bin")) == [
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
    ]


def llama(path: Path) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, 2
    path.write_bytes(header.tobytes() + np.array([1, 2], np.uint32).tobytes())


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"


def cut_short(path: Path) -> None:
    write_llm_c(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.bin", llama, ["a.bin", "vocabulary"]),
        ("a.bin", cut_short, ["a.bin", "1222 bytes", "1224"]),
        ("a.bin", lambda path: path.write_bytes(b"odd"), ["a.bin", "3 bytes"]),
        ("a.bin", lambda path: path.write_bytes(b""), ["a.bin", "0 bytes"]),
        ("a.npy", lambda path: path.write_bytes(b"no numpy"), ["a.npy", "readable"]),
        ("a.npy", lambda path: np.save(path, np.zeros((2, 2))), ["a.npy", "uint16"]),
        ("a.npy", lambda path: np.save(path, np.zeros(3, np.int64)), ["a.npy", "uint16"]),
        ("a.txt", lambda path: path.write_text("x"), ["known format", ".bin, .npy"]),
        ("a.bin.gz", lambda path: path.write_bytes(b"x"), ["a.bin.gz", "decompress"]),
        ("a.npy.ZST", lambda path: path.write_bytes(b"x"), ["a.npy.ZST", "decompress"]),
        ("a.bin", lambda path: path.write_text(LFS_POINTER), ["a.bin", "git lfs pull"]),
    ],
)
def test_unusable_file_is_named(
    run: Run, tmp_path: Path, name: str, write: Callable[[Path], None], words: list[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / name)
    with pytest.raises(UserError) as error:
        run(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_token_outside_the_vocabulary_is_found_beyond_the_first_check(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.format.foreign_tokens._CHECKED_TOKENS", 100)
    tokens = np.arange(5000)
    tokens[4000] = 50257
    write_llm_c(tmp_path / "in/train.bin", tokens)
    with pytest.raises(UserError, match=r"train\.bin: token 50257 "):
        run(tmp_path / "in")


def test_damaged_file_is_named_under_both_names_and_downloaded_again(
    run: Run, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(published / "llm.c")
    before = hashes(TOKENS) | hashes(RAW)
    records = piece_times()
    flip(TOKENS / "train-00001.bin", 3000, keep_mtime=True)
    with pytest.raises(SystemExit) as stopped:
        verify_main()
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    for name in ("data/tokens/train-00001.bin", "data/raw/fineweb_train_000002.bin"):
        assert f"\n{name}: " in out
    assert not (RAW / "fineweb_train_000002.bin").exists()
    run(published / "llm.c")
    assert hashes(TOKENS) | hashes(RAW) == before
    after = piece_times()
    assert len([key for key in records if after[key] != records[key]]) == 1
    verify_main()


def test_file_damaged_before_indexing_is_refused(run: Run, published: Path) -> None:
    manifest = run(published / "llm.c")
    store = Store.open(Machine())
    plan = TokenFileChunks(RAW, manifest.source, SIZES, store, "other code").plan()
    ((chunk, key),) = (entry for entry in plan if "2.b" in entry[0].file.path)
    flip(RAW / chunk.file.path, 3000, keep_mtime=True)
    with pytest.raises(RuntimeError, match=r"fineweb_train_000002\.bin"):
        index_chunk(chunk, key, RAW, store)
    assert store.find("chunks", key) is None
    assert store.find("files", chunk.file.sha256) is None
    shutil.rmtree(TOKENS)
    assert run(published / "llm.c") == manifest


def test_training_on_published_tokens(
    run: Run, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run(published / "llm.c")
    verify_main()
    training = Training(Path.cwd())
    Path("stage_code.py").write_text("")
    Path("dvc.yaml").write_text("stages: {train: {cmd: none, deps: [stage_code.py]}}")
    training.write(train={"steps": 3, "warmup_steps": 1, "val_every": 3, "checkpoint_every": 3})
    training.train_ranks(1)
    state = json.loads(Path("artifacts/checkpoint/state.json").read_text())
    assert state["dataset_key"] == manifest.dataset_key
    assert training.results()["val_loss"] < 11


def test_token_files_of_a_hub_repository(published: Path, tmp_path: Path) -> None:
    """By fsspec, in a process of its own because the client reads its endpoint only once."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.download.ingest import ingest\n"
        "from pipeline.download.source_paths import resolve\n"
        "from pipeline.store.store import Store\n"
        "for item in resolve(['hf://datasets/kjj0/fineweb10B-gpt2'], ['.bin']):\n"
        "    print(item.path, item.identity, ingest(item, 'text', Store(Path('.')), 20).sha256)\n"
    )
    paths = sorted((published / "llm.c").iterdir())
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in paths}
        hub.repo("kjj0/fineweb10B-gpt2").commit({"README.md": b"tokens", **files})
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(REPO)}
        first, second = (
            subprocess.run(
                [sys.executable, "-c", script],
                cwd=tmp_path, env=environment, capture_output=True, text=True,
            )
            for _ in range(2)
        )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert second.stdout == first.stdout  # the same identity on both runs
    left_out, *lines = first.stdout.splitlines()
    assert "README.md" in left_out
    found = [(line.split()[0], line.split()[2]) for line in lines]
    assert found == [(path.name, atomic.sha256_file(path)) for path in paths]
