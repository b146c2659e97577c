"""Tests for pipeline.tokenize.stage: equal bytes on any workers and after any crash."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import TokenStream
from pipeline.cluster.tasks import TasksFailed
from pipeline.format import tokenizer
from pipeline.format.manifest import Manifest, RawManifest
from pipeline.format.parquet import read_texts
from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store.code_key import code_key
from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import plan_chunks
from pipeline.tokenize.encode_chunk import chunk_key, split_of
from pipeline.tokenize.stage import tokenize
from tests.support.small_data import (
    CODE,
    Project,
    encode_document,
    hashes,
    piece_times,
    some_texts,
    split_bytes,
    tokenize_here,
    write_raw,
)

PARAMS = TokenizeParams(shard_tokens=2000, val_per_10k=1500)


def test_workers_and_engines_do_not_change_the_bytes(
    tmp_path: Path, small_raw: Path, project: Project, one_ray: int
) -> None:
    result = project.run("tokenize", GPT2_WORKERS="2")
    assert result.returncode == 0, result
    assert result.stderr == ""
    code = code_key("tokenize", project.root)
    machine = Machine(workers=1, work_dir=tmp_path / "one", engine="tiktoken")
    tokenize(small_raw, tmp_path / "by_one", PARAMS, machine, code)
    tokenize_here(
        small_raw, tmp_path / "by_none", PARAMS, Machine(work_dir=tmp_path / "none"), code
    )
    assert len(hashes(project.tokens)) > 15
    assert hashes(project.tokens) == hashes(tmp_path / "by_one") == hashes(tmp_path / "by_none")


def test_numbers_printed_by_a_run_with_nothing_to_do(project: Project, small_raw: Path) -> None:
    """Such a run starts no Ray."""
    machine = Machine(work_dir=project.root / ".work")
    manifest = tokenize_here(
        small_raw, project.tokens, PARAMS, machine, code_key("tokenize", project.root)
    )
    before = hashes(project.tokens)
    script = (
        "import sys; from pipeline.tokenize.__main__ import main; main(); "
        "assert 'ray' not in sys.modules"
    )
    result = subprocess.run(
        [project.command("tokenize")[0], "-c", script],
        cwd=project.root, env=project.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result
    plan, summary = result.stdout.splitlines()
    files, chunks, _, before_run, to_do = re.findall(r"\d[\d,]*", plan)
    count = str(len(list((project.tokens / "chunks").iterdir())))
    assert (files, chunks, before_run, to_do) == ("2", count, count, "0")
    for totals in manifest.totals.values():
        assert f"{totals.tokens:,} tokens of {totals.docs:,} documents" in summary
    assert manifest.dataset_key[:12] in summary
    assert hashes(project.tokens) == before


def test_shards_hold_the_texts(tmp_path: Path, sample_raw: Path, machine: Machine) -> None:
    """All documents of the sample, in order: split by hash, each EOT and its tokens."""
    params = TokenizeParams(shard_tokens=250_000, val_per_10k=500)
    manifest = tokenize_here(sample_raw, tmp_path / "out", params, machine)
    expected: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    size = 0
    for file in RawManifest.load(sample_raw).files:
        for _, texts in read_texts(sample_raw / file.path, "text", 0, file.rows):
            for text in texts:
                assert text
                expected[split_of(text.encode(), 500)].append(encode_document(text))
                size += len(text.encode())
    for split, documents in expected.items():
        stream = TokenStream(tmp_path / "out", split)  # type: ignore[arg-type]
        assert np.array_equal(stream[:], np.concatenate(documents))
        totals = manifest.totals[split]  # type: ignore[index]
        assert (totals.docs, totals.tokens) == (len(documents), len(stream))
        # The bytes of the tokens add up to the bytes of the text.
        assert int(tokenizer.token_bytes()[stream[:]].sum()) == totals.text_bytes
    assert sum(t.text_bytes for t in manifest.totals.values()) == size
    assert 6 <= manifest.totals["train"].shards <= 14
    assert manifest.totals["val"].shards == 1
    lengths = [s.tokens for s in manifest.shards if s.split == "train"]
    assert max(lengths) < 2 * 250_000


def test_manifest_describes_the_shards(tmp_path: Path, small_raw: Path, machine: Machine) -> None:
    out = tmp_path / "out"
    manifest = tokenize_here(small_raw, out, PARAMS, machine)
    assert Manifest.load(out) == manifest
    assert manifest.source == RawManifest.load(small_raw)
    assert manifest.params == PARAMS.model_dump()
    found = hashes(out)
    for shard in manifest.shards:
        assert found[shard.name] == shard.sha256
        assert found[shard.docs_name] == shard.docs_sha256
        assert sum(part.tokens for part in shard.parts) == shard.tokens
        assert shard.split == "train" or shard.tokens <= 2000 or len(shard.parts) == 1
    assert len([s for s in manifest.shards if s.split == "val"]) > 1
    train = [s.parts[0].rows for s in manifest.shards if s.split == "train"]
    assert [s.name for s in manifest.shards][: len(train)] == [
        f"train-{i:05d}.bin" for i in range(len(train))
    ]
    known = {"manifest.json", *(s.name for s in manifest.shards)}
    known |= {s.docs_name for s in manifest.shards}
    assert {name for name in found if not name.startswith("chunks/")} == known


def test_content_does_not_depend_on_shard_size_or_row_groups(tmp_path: Path) -> None:
    files = [some_texts(30, "a"), [None, *some_texts(9, "b"), ""]]
    raws = {group: write_raw(tmp_path / f"raw{group}", files, group) for group in (3, 100)}
    contents = set()
    shard_counts = set()
    for group, raw in raws.items():
        for shard_tokens in (1000, 3000, 10**6):
            params = PARAMS.model_copy(update={"shard_tokens": shard_tokens})
            out = tmp_path / f"out-{group}-{shard_tokens}"
            machine = Machine(work_dir=tmp_path / f"work-{group}-{shard_tokens}")
            manifest = tokenize_here(raw, out, params, machine, code=f"{group} {shard_tokens}")
            contents.add((manifest.dataset_key, split_bytes(out, "train"), split_bytes(out, "val")))
            shard_counts.add(manifest.totals["train"].shards)
            assert manifest.skipped == {"null": 1, "empty": 1}
    assert len(contents) == 1
    assert len(shard_counts) >= 3


def test_dataset_key_changes_with_a_text_or_the_order(tmp_path: Path, machine: Machine) -> None:
    texts, keys = some_texts(9), set()
    for i, documents in enumerate((texts, [*texts[:8], f"{texts[8]}~"], texts[::-1])):
        raw = write_raw(tmp_path / f"raw{i}", [documents])
        keys.add(tokenize_here(raw, tmp_path / "out", PARAMS, machine).dataset_key)
    assert len(keys) == 3


def test_no_validation(tmp_path: Path, small_raw: Path, machine: Machine) -> None:
    params = PARAMS.model_copy(update={"val_per_10k": 0})
    out = tmp_path / "out"
    manifest = tokenize_here(small_raw, out, params, machine)
    assert {s.split for s in manifest.shards} == {"train"}
    assert manifest.totals["train"].docs == 55
    assert set(manifest.totals["val"].model_dump().values()) == {0}
    assert {p.name.split("-")[0] for p in out.glob("*.bin")} == {"train"}
    assert len(TokenStream(out, "val")) == 0


def test_chunk_of_null_and_empty_documents(tmp_path: Path, machine: Machine) -> None:
    raw = write_raw(tmp_path / "raw", [[None, "", None], ["one", "", "two"], []])
    out = tmp_path / "out"
    params = PARAMS.model_copy(update={"val_per_10k": 0})
    manifest = tokenize_here(raw, out, params, machine)
    assert manifest.skipped == {"null": 2, "empty": 2}
    assert [s.name for s in manifest.shards] == ["train-00000.bin"]
    assert manifest.totals["train"].docs == 2
    assert [p.name for p in sorted((out / "chunks").iterdir())] == ["00000.json", "00001.json"]
    assert json.loads((out / "chunks/00000.json").read_text())["splits"] == {}


def test_run_that_builds_only_chunks_without_text(
    tmp_path: Path, machine: Machine, one_ray: int
) -> None:
    raw = write_raw(tmp_path / "raw", [[None, ""]])
    with pytest.raises(UserError, match=r"sources\.main\.text_column"):
        tokenize(raw, tmp_path / "out", PARAMS, machine, CODE)
    assert not (tmp_path / "out").exists()


def test_new_source_file_rebuilds_no_chunk(tmp_path: Path, machine: Machine, one_ray: int) -> None:
    files = [some_texts(20, "a"), some_texts(20, "b")]
    first, second = (write_raw(tmp_path / f"raw{n}", files[:n]) for n in (1, 2))
    tokenize_here(first, tmp_path / "out", PARAMS, machine)
    before = piece_times(tmp_path / "work")
    tokenize(second, tmp_path / "out", PARAMS, machine, CODE)
    after = piece_times(tmp_path / "work")
    assert len(after) > len(before) > 2
    assert {key: after[key] for key in before} == before
    tokenize_here(second, tmp_path / "alone", PARAMS, Machine(work_dir=tmp_path / "another"))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


def test_failed_chunks_are_named_and_only_they_are_built_next(
    tmp_path: Path, small_raw: Path, machine: Machine, one_ray: int
) -> None:
    chunks = plan_chunks(small_raw, RawManifest.load(small_raw), 2000)
    keys = [chunk_key(chunk, "text", PARAMS, CODE) for chunk in chunks]
    store = Store.open(machine)
    (store.root / "locks").mkdir()
    obstacles = [store.root / "locks" / f"chunks-{keys[i]}" for i in (0, 3)]
    for path in obstacles:  # a socket in place of the piece's lock
        os.mknod(path, stat.S_IFSOCK | 0o600)
    with pytest.raises(TasksFailed) as caught:
        tokenize(small_raw, tmp_path / "out", PARAMS, machine, CODE)
    first, *failures = str(caught.value).splitlines()
    assert f"2 of {len(keys)}" in first
    for line, index in zip(failures[:2], (0, 3), strict=True):
        assert line.startswith(f"  {chunks[index].label}, ")
        assert "OSError: " in line
    assert not (tmp_path / "out").exists()
    before = piece_times(store.root)
    assert before.keys() == set(keys) - {keys[0], keys[3]}
    for path in obstacles:
        path.unlink()
    tokenize(small_raw, tmp_path / "out", PARAMS, machine, CODE)
    after = piece_times(store.root)
    assert after.keys() == set(keys)
    assert before.items() <= after.items()


def test_other_code_or_split_shares_no_piece(
    tmp_path: Path, small_raw: Path, machine: Machine
) -> None:
    def pieces(kind: str) -> set[str]:
        return {p.name for p in (tmp_path / "work" / kind).iterdir()}

    tokenize_here(small_raw, tmp_path / "out", PARAMS, machine, "old")
    chunks, merged = pieces("chunks"), pieces("merged")
    tokenize_here(small_raw, tmp_path / "out", PARAMS, machine, "new")
    assert len(pieces("chunks")) == 2 * len(chunks)
    assert len(pieces("merged")) == 2 * len(merged)
    more = PARAMS.model_copy(update={"val_per_10k": 3000})
    tokenize_here(small_raw, tmp_path / "out", more, machine, "new")
    assert len(pieces("chunks")) == 3 * len(chunks)


def test_fresh_rebuilds_every_piece(tmp_path: Path, small_raw: Path, one_ray: int) -> None:
    work = tmp_path / "work"
    tokenize_here(small_raw, tmp_path / "out", PARAMS, Machine(work_dir=work))
    before, expected = piece_times(work), hashes(tmp_path / "out")
    merged = {p: p.stat().st_mtime_ns for p in work.glob("merged/*/val.bin")}
    tokenize(small_raw, tmp_path / "out", PARAMS, Machine(work_dir=work, fresh=True), CODE)
    after = piece_times(work)
    assert after.keys() == before.keys()
    assert all(after[key] > before[key] for key in before)
    assert all(p.stat().st_mtime_ns > time for p, time in merged.items())
    assert hashes(tmp_path / "out") == expected


@pytest.mark.soak
def test_run_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, sample_raw: Path
) -> None:
    """Twenty times with an empty store: stopped, resumed with other workers, then run again."""
    params = TokenizeParams(shard_tokens=15_000, val_per_10k=500)
    code, expected = None, {}
    draw = random.Random(4)
    late, again = 0, []
    for turn in range(20):
        root = tmp_path / str(turn)
        root.mkdir()
        project = Project(root, sample_raw, shard_tokens=15_000, val=500)
        if code is None:
            code = code_key("tokenize", root)
            machine = Machine(work_dir=tmp_path / "never_stopped")
            tokenize_here(sample_raw, tmp_path / "out", params, machine, code)
            expected = hashes(tmp_path / "out")
        workers, engine = draw.choice("125"), draw.choice(("gigatoken", "tiktoken"))
        process = subprocess.Popen(
            project.command("tokenize"), cwd=root, start_new_session=True,
            env=project.environment(GPT2_WORKERS=workers, GPT2_ENGINE=engine),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        moment = draw.randrange(-20, 120)  # a second before the first chunk is 20 chunks
        pieces = root / ".work/chunks"
        while len(list(pieces.glob("*/piece.json"))) < moment and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * (4 if moment < 0 else 0.05))
        late += process.poll() is not None
        process.send_signal(draw.choice((signal.SIGKILL, signal.SIGTERM)))
        process.wait()
        before = piece_times(root / ".work")
        result = project.run("tokenize", GPT2_WORKERS=draw.choice("125"))
        assert result.returncode == 0, result
        assert before.items() <= piece_times(root / ".work").items()
        assert hashes(project.tokens) == expected, (turn, workers, engine, moment)
        began = time.monotonic()
        result = project.run("tokenize")
        again.append(time.monotonic() - began)
        assert " 0 to do" in result.stdout
        assert hashes(project.tokens) == expected
        assert list((root / ".work/tmp").iterdir()) == []
        shutil.rmtree(root)
    assert late < 5
    assert min(again) < 3  # seconds with nothing to do, including the start of Python
