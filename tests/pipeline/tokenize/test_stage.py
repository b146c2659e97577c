"""Of pipeline.tokenize: the same bytes on any workers, after any crash, and no work twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import TokenStream
from pipeline.cluster.tasks import TasksFailed
from pipeline.format import tokenizer
from pipeline.format.manifest import Manifest, RawManifest
from pipeline.format.parquet import read_texts
from pipeline.params import TokenizeParams
from pipeline.runtime.machine import Machine
from pipeline.store.code_key import code_key
from pipeline.store.store import Store
from pipeline.tokenize.chunk_plan import plan_chunks
from pipeline.tokenize.encode_chunk import chunk_key, encode_text, split_of
from pipeline.tokenize.stage import tokenize
from tests.support.small_data import (
    CODE,
    MakeProject,
    Project,
    hashes,
    some_texts,
    split_bytes,
    tokenize_here,
    write_raw,
)

PARAMS = TokenizeParams(shard_tokens=2000, val_per_10k=1500)


def piece_times(store: Path) -> dict[str, int]:
    """When each chunk's record in the store was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (store / "chunks").glob("*/record.json")}


def test_any_workers_either_engine_and_no_ray_give_the_same_bytes(
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


def test_what_the_summary_says(project: Project, small_raw: Path) -> None:
    """Also: a run with nothing left to do starts no Ray."""
    machine = Machine(work_dir=project.root / ".work")
    manifest = tokenize_here(
        small_raw, project.tokens, PARAMS, machine, code_key("tokenize", project.root)
    )
    before = hashes(project.tokens)
    script = (
        "import sys; from pipeline import tokenize; tokenize.main(); "
        "assert 'ray' not in sys.modules"
    )
    result = subprocess.run(
        [project.command("tokenize")[0], "-c", script],
        cwd=project.root, env=project.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result
    count = len(manifest.source.files), len(list((project.tokens / "chunks").iterdir()))
    plan, summary = result.stdout.splitlines()
    assert plan.startswith(f"tokenize: 2 files, {count[1]} chunks, about ")
    assert plan.endswith(f"; {count[1]} chunks done before, 0 to do")
    train = manifest.totals["train"]
    assert f"train {train.tokens:,} tokens of {train.docs:,} documents" in summary
    assert manifest.dataset_key[:12] in summary
    assert hashes(project.tokens) == before


def test_the_shards_are_the_texts(tmp_path: Path, sample_raw: Path, machine: Machine) -> None:
    """Every document of the sample, by the definition: split by hash, EOT and tokens, in order."""
    params = TokenizeParams(shard_tokens=250_000, val_per_10k=500)
    manifest = tokenize_here(sample_raw, tmp_path / "out", params, machine)
    expected: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    size = 0
    for file in RawManifest.load(sample_raw).files:
        for _, texts in read_texts(sample_raw / file.path, "text", 0, file.rows):
            for text in texts:
                assert text
                expected[split_of(text.encode(), 500)].append(encode_text(text))
                size += len(text.encode())
    for split, documents in expected.items():
        stream = TokenStream(tmp_path / "out", split)  # type: ignore[arg-type]
        assert np.array_equal(stream[:], np.concatenate(documents))
        totals = manifest.totals[split]  # type: ignore[index]
        assert (totals.docs, totals.tokens) == (len(documents), len(stream))
        # What the ranks say a token stands for adds up to the text.
        assert int(tokenizer.token_bytes()[stream[:]].sum()) == totals.text_bytes
    assert sum(t.text_bytes for t in manifest.totals.values()) == size
    assert 6 <= manifest.totals["train"].shards <= 14
    assert manifest.totals["val"].shards == 1
    lengths = [s.tokens for s in manifest.shards if s.split == "train"]
    assert max(lengths) < 2 * 250_000


def test_the_manifest_describes_the_shards(
    tmp_path: Path, small_raw: Path, machine: Machine
) -> None:
    out = tmp_path / "out"
    manifest = tokenize_here(small_raw, out, PARAMS, machine)
    assert Manifest.load(out) == manifest
    assert manifest.source == RawManifest.load(small_raw)
    assert manifest.params == {"shard_tokens": 2000, "val_per_10k": 1500}
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


def test_content_does_not_depend_on_the_cutting(tmp_path: Path) -> None:
    files = [some_texts(30, "a"), [None, *some_texts(9, "b"), ""]]
    raws = {group: write_raw(tmp_path / f"raw{group}", files, group) for group in (3, 100)}
    whole = set()
    cuts = set()
    for group, raw in raws.items():
        for shard_tokens in (1000, 3000, 10**6):
            params = PARAMS.model_copy(update={"shard_tokens": shard_tokens})
            out = tmp_path / f"out-{group}-{shard_tokens}"
            machine = Machine(work_dir=tmp_path / f"work-{group}-{shard_tokens}")
            manifest = tokenize_here(raw, out, params, machine, code=f"{group} {shard_tokens}")
            whole.add((manifest.dataset_key, split_bytes(out, "train"), split_bytes(out, "val")))
            cuts.add(manifest.totals["train"].shards)
            assert manifest.skipped == {"null": 1, "empty": 1}
    assert len(whole) == 1
    assert len(cuts) >= 3


@given(st.integers(0, 8), st.integers(0, 20))
@settings(max_examples=8, deadline=None)
def test_content_differs_where_a_text_differs(row: int, at: int) -> None:
    texts = some_texts(9)
    changed = list(texts)
    changed[row] = (texts[row] or "")[:at] + "~" + (texts[row] or "")[at:]
    with tempfile.TemporaryDirectory() as name:
        keys = []
        for i, files in enumerate([[texts], [changed], [texts[::-1]]]):
            raw = write_raw(Path(name) / f"raw{i}", files)
            machine = Machine(work_dir=Path(name) / "work")
            keys.append(tokenize_here(raw, Path(name) / "out", PARAMS, machine).dataset_key)
        assert len(set(keys)) == 3


@pytest.mark.parametrize(("val_per_10k", "split"), [(0, "train"), (10_000, "val")])
def test_a_split_of_nothing_or_of_all(
    tmp_path: Path, small_raw: Path, machine: Machine, val_per_10k: int, split: str
) -> None:
    params = PARAMS.model_copy(update={"val_per_10k": val_per_10k})
    out = tmp_path / "out"
    manifest = tokenize_here(small_raw, out, params, machine)
    assert {s.split for s in manifest.shards} == {split}
    assert manifest.totals[split].docs == 55  # type: ignore[index]
    other = manifest.totals["val" if split == "train" else "train"]
    assert (other.shards, other.docs, other.tokens, other.text_bytes) == (0, 0, 0, 0)
    assert {p.name.split("-")[0] for p in out.glob("*.bin")} == {split}
    assert len(TokenStream(out, "val")) + len(TokenStream(out, "train")) == sum(
        t.tokens for t in manifest.totals.values()
    )


def test_null_and_empty_documents_and_a_chunk_of_nothing_else(
    tmp_path: Path, machine: Machine
) -> None:
    raw = write_raw(tmp_path / "raw", [[None, "", None], ["one", "", "two"], []])
    out = tmp_path / "out"
    params = PARAMS.model_copy(update={"val_per_10k": 0})
    manifest = tokenize_here(raw, out, params, machine)
    assert manifest.skipped == {"null": 2, "empty": 2}
    assert [s.name for s in manifest.shards] == ["train-00000.bin"]
    assert manifest.totals["train"].docs == 2
    assert [p.name for p in sorted((out / "chunks").iterdir())] == ["00000.json", "00001.json"]
    assert json.loads((out / "chunks/00000.json").read_text())["splits"] == {}


def test_one_more_file_redoes_nothing(tmp_path: Path, machine: Machine, one_ray: int) -> None:
    files = [some_texts(20, "a"), some_texts(20, "b")]
    first, second = (write_raw(tmp_path / f"raw{n}", files[:n]) for n in (1, 2))
    tokenize_here(first, tmp_path / "out", PARAMS, machine)
    before = piece_times(tmp_path / "work")
    tokenize(second, tmp_path / "out", PARAMS, machine, CODE)
    after = piece_times(tmp_path / "work")
    assert len(after) > len(before) > 2
    assert {key: after[key] for key in before} == before
    alone = tokenize_here(
        second, tmp_path / "alone", PARAMS, Machine(work_dir=tmp_path / "another")
    )
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert alone.totals["train"].docs + alone.totals["val"].docs == 40


def test_chunks_that_fail_are_listed_and_the_next_run_does_only_them(
    tmp_path: Path, small_raw: Path, machine: Machine, one_ray: int
) -> None:
    chunks = plan_chunks(small_raw, RawManifest.load(small_raw).files, "text", 2000)
    keys = [chunk_key(chunk, "text", PARAMS, CODE) for chunk in chunks]
    store = Store.open(machine)
    (store.root / "tmp").mkdir()
    in_the_way = [store.root / "tmp" / f"chunks-{keys[i]}" for i in (0, 3)]
    for path in in_the_way:  # a file where the piece is to be made
        path.touch()
    with pytest.raises(TasksFailed) as caught:
        tokenize(small_raw, tmp_path / "out", PARAMS, machine, CODE)
    first, *listed = str(caught.value).splitlines()
    assert first.startswith(f"tokenize: 2 of {len(keys)} tasks failed; the others are done and ")
    for line, index in zip(listed[:2], (0, 3), strict=True):
        assert line.startswith(f"  {chunks[index].label}, tried 3 times: FileExistsError: ")
    assert not (tmp_path / "out").exists()
    before = piece_times(store.root)
    assert before.keys() == set(keys) - {keys[0], keys[3]}
    for path in in_the_way:
        path.unlink()
    tokenize(small_raw, tmp_path / "out", PARAMS, machine, CODE)
    after = piece_times(store.root)
    assert after.keys() == set(keys)
    assert before.items() <= after.items()


def test_other_code_or_another_split_shares_nothing(
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


def test_a_changed_line_of_the_tokenizer_makes_the_chunks_anew(
    project: Project, small_raw: Path
) -> None:
    code = code_key("tokenize", project.root)
    machine = Machine(work_dir=project.root / ".work")
    before = tokenize_here(small_raw, project.tokens, PARAMS, machine, code)
    module = project.root / "pipeline" / "tokenizer.py"
    text = module.read_text()
    changed = text.replace(".encode_ordinary(text)", ".encode_ordinary(text.upper())")
    assert changed != text
    module.write_text(changed)
    result = project.run("tokenize")
    assert result.returncode == 0, result
    assert "0 chunks done before" in result.stdout
    after = Manifest.load(project.tokens)
    assert after.dataset_key != before.dataset_key
    assert {s.parts[0].chunk_key for s in after.shards}.isdisjoint(
        s.parts[0].chunk_key for s in before.shards
    )


def test_a_renamed_source_file_is_named_by_its_new_name(tmp_path: Path, machine: Machine) -> None:
    files = [some_texts(12)]
    for name in ("old", "new"):
        raw = write_raw(tmp_path / name, files, name=name)
        manifest = tokenize_here(raw, tmp_path / "out", PARAMS, machine)
    assert {part.path for s in manifest.shards for part in s.parts} == {"new-0.parquet"}


def test_fresh_ignores_what_stands_in_the_store(
    tmp_path: Path, small_raw: Path, one_ray: int
) -> None:
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


def test_a_damaged_chunk_of_the_store_is_made_again_and_no_other(
    tmp_path: Path, small_raw: Path, machine: Machine, one_ray: int
) -> None:
    out = tmp_path / "out"
    manifest = tokenize_here(small_raw, out, PARAMS, machine)
    before, expected = piece_times(tmp_path / "work"), hashes(out)
    bad = manifest.shards[1].parts[0].chunk_key
    os.truncate(out / manifest.shards[1].name, 1500)  # a hard link of the store's own file
    tokenize(small_raw, out, PARAMS, machine, CODE)
    after = piece_times(tmp_path / "work")
    assert [key for key in before if after[key] != before[key]] == [bad]
    assert hashes(out) == expected


def chunks_done(project: Project) -> int:
    return len(list(project.chunks.glob("*/piece.json")))


def kill_in_the_middle(project: Project, signum: signal.Signals) -> tuple[int, str]:
    """Start tokenize, send it a signal after some chunks; its status and stderr."""
    process = subprocess.Popen(
        project.command("tokenize"),
        cwd=project.root, env=project.environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    for _ in range(2400):
        if chunks_done(project) >= 5 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signum)
    # Ray's processes hold the pipe until they are gone too: no orphans.
    stderr = process.communicate(timeout=60)[1]
    return process.returncode, stderr


@pytest.mark.soak  # tests/test_repro.py kills the whole of DVC in tokenize
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, sample_raw: Path, signum: signal.Signals
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    project = Project(root, sample_raw, shard_tokens=15_000, val=500)
    status, stderr = kill_in_the_middle(project, signum)
    if signum == signal.SIGTERM:
        assert (status, stderr) == (3, "stopped; the same command goes on from here\n")
    else:
        assert status == -signal.SIGKILL
    assert not project.tokens.exists()
    time.sleep(0.5)
    done = chunks_done(project)
    before = piece_times(project.root / ".work")
    result = project.run("tokenize")
    assert result.returncode == 0, result
    said = re.search(r" (\d+) chunks, .*; (\d+) chunks done before, (\d+) to do", result.stdout)
    assert said is not None
    total, found, to_do = map(int, said.groups())
    assert found == done >= 5
    assert to_do == total - done > 5, "the signal came too late to show anything"
    after = piece_times(project.root / ".work")
    assert len(after) == total
    assert {key: after[key] for key in before} == before
    assert list((project.root / ".work" / "tmp").iterdir()) == []
    assert sorted(p.name for p in (root / "data").iterdir()) == ["raw", "tokens"]
    params = TokenizeParams(shard_tokens=15_000, val_per_10k=500)
    machine = Machine(work_dir=tmp_path / "never_stopped")
    tokenize_here(sample_raw, tmp_path / "out", params, machine, code_key("tokenize", root))
    assert hashes(project.tokens) == hashes(tmp_path / "out")


@pytest.mark.soak
def test_killed_at_twenty_random_moments_by_any_workers_the_bytes_are_the_same(
    tmp_path: Path, sample_raw: Path
) -> None:
    """Each time with an empty store: killed once, gone on with on other workers, run once more."""
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
        while chunks_done(project) < moment and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * (4 if moment < 0 else 0.05))
        late += process.poll() is not None
        process.kill()
        process.wait()
        result = project.run("tokenize", GPT2_WORKERS=draw.choice("125"))
        assert result.returncode == 0, result
        assert hashes(project.tokens) == expected, (turn, workers, engine, moment)
        began = time.monotonic()
        result = project.run("tokenize")
        again.append(time.monotonic() - began)
        assert " 0 to do" in result.stdout
        assert hashes(project.tokens) == expected
        shutil.rmtree(root)
    assert late < 5
    assert min(again) < 3  # seconds: nothing to do, Python's start among it


def test_a_broken_source_file_is_named(
    tmp_path: Path, machine: Machine, make_project: MakeProject
) -> None:
    project = make_project("broken")
    path = project.root / "data/raw/part-1.parquet"
    path.unlink()
    result = project.run("tokenize")
    assert result.returncode == 2
    assert result.stderr == f"error: data/raw/{path.name}: no such file; `dvc repro` makes it\n"
    assert Store.open(Machine(work_dir=project.root / ".work")).root.is_dir()
