"""Tests for several sources: names, files, chunks, copies across sources, and old parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import Manifest, TokenStream
from pipeline.curate.stage import curate
from pipeline.download.restore import restore
from pipeline.download.stage import download, fetch_source
from pipeline.format.selection import SELECTION
from pipeline.params import (
    CurateParams,
    SourceParams,
    TokenizeParams,
    VerifyParams,
    errors_of_source,
    load_sources,
    validate_sources,
)
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store.store import Busy, Store
from pipeline.tokenize.stage import tokenize
from pipeline.verify.stage import verify
from tests.support.foreign_tokens import write_llm_c
from tests.support.small_data import (
    hashes,
    no_cluster,
    piece_times,
    run_here,
    some_texts,
    write_parquet,
)

RAW, TOKENS = Path("data/raw"), Path("data/tokens")
SPLIT = TokenizeParams(shard_tokens=2000, val_per_10k=1500)
SALTS = {"web": 20, "books": 12, "code": 9}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter a folder with a parquet file per source; `web` has two texts of `books` as well."""
    monkeypatch.chdir(tmp_path)
    for stage in ("download", "curate", "tokenize", "verify"):
        monkeypatch.setattr(f"pipeline.{stage}.stage.cluster", no_cluster)
    for module in ("download.stage", "curate.stage", "tokenize.from_text", "tokenize.from_tokens"):
        monkeypatch.setattr(f"pipeline.{module}.run_tasks", run_here)
    monkeypatch.setattr("pipeline.verify.stage.run_tasks", run_here)
    for name, count in SALTS.items():
        copies = some_texts(2, "books") if name == "web" else []
        write_parquet(Path("in", name, "a.parquet"), [*some_texts(count, name), *copies])
    write_llm_c(Path("in/tokens_train.bin"), np.tile([50256, 7, 8, 9], 500).astype(np.uint16))


def sources(*names: str) -> dict[str, SourceParams]:
    return {
        name: SourceParams(kind="files", paths=[f"in/{name}/*.parquet"])
        if name in SALTS
        else SourceParams(kind="tokens", paths=["in/tokens_train.bin"])
        for name in names
    }


def build(chosen: dict[str, SourceParams], split: TokenizeParams, **rules: Any) -> Manifest:
    """Run the data stages, and verify their outputs."""
    machine = Machine(workers=1, work_dir=Path(".work"), engine="tiktoken")
    download(chosen, Store.open(machine), RAW, machine)
    curate(RAW, SELECTION, CurateParams(**rules), split, machine)
    tokenize(RAW, TOKENS, split, machine, "code of a test", SELECTION)
    manifest, _ = verify(RAW, TOKENS, VerifyParams(retokenize=1), machine, SELECTION)
    return manifest


@pytest.mark.parametrize("kind", ["documents", "position"])
def test_each_source_has_its_folder_its_shards_and_its_validation(kind: Any) -> None:
    split = SPLIT.model_copy(update={"val_split": kind})
    manifest = build(sources("web", "books", "tokens"), split)
    names = ["books", "tokens", "web"]
    assert list(manifest.source.sources) == names
    assert [file.path for file in manifest.source.files] == [
        "books/a.parquet",
        "tokens/tokens_train.bin",
        "web/a.parquet",
    ]
    for of_split in ("train", "val"):
        shards = [shard for shard in manifest.shards if shard.split == of_split]
        assert [shard.source for shard in shards] == sorted(shard.source for shard in shards)
        for shard in shards:
            assert {part.path.split("/")[0] for part in shard.parts} == {shard.source}
    with_val = names if kind == "position" else ["books", "web"]
    assert sorted({s.source for s in manifest.shards if s.split == "val"}) == with_val
    parts = [TokenStream(TOKENS, "train", name) for name in names]
    stream = TokenStream(TOKENS, "train")
    assert np.array_equal(stream[:], np.concatenate([part[:] for part in parts]))
    restore(RAW, Machine(work_dir=Path(".work")))


def test_a_further_source_leaves_the_chunks_of_the_others_alone() -> None:
    two = build(sources("web", "books"), SPLIT)
    before, files = piece_times(), hashes(TOKENS)
    assert build(sources("books", "web"), SPLIT) == two  # the order does not count
    assert hashes(TOKENS) == files
    three = build(sources("code", "web", "books"), SPLIT)
    assert before.items() <= piece_times().items()
    assert {c.chunk_key for c in two.chunks} < {c.chunk_key for c in three.chunks}
    assert len({two.dataset_key, three.dataset_key}) == 2


@pytest.mark.parametrize("first", ["web", "tokens"])
@pytest.mark.parametrize("kind", ["documents", "position"])
def test_a_second_source_leaves_the_chunks_of_the_first_alone(first: str, kind: Any) -> None:
    split = SPLIT.model_copy(
        update={"val_split": kind, "val_per_10k": 0 if first == "tokens" else 1500}
    )
    rules = {"exact_duplicates": first != "tokens"}
    alone = build(sources(first), split, **rules)
    before = piece_times()
    both = build(sources(first, "code"), split, **rules)
    assert before.items() <= piece_times().items()
    of_first = [chunk for chunk in both.chunks if chunk.source == first]
    assert [chunk.sha256 for chunk in of_first] == [chunk.sha256 for chunk in alone.chunks]
    paths = {part.path for shard in both.shards if shard.source == first for part in shard.parts}
    assert paths == {f"{first}/{file.path}" for file in alone.source.files}


def test_the_name_of_a_single_source_is_in_no_path_and_not_in_the_dataset_key() -> None:
    keys = {build({name: sources("web")["web"]}, SPLIT).dataset_key for name in ("main", "other")}
    assert len(keys) == 1
    assert (RAW / "a.parquet").exists()


def test_a_damaged_token_file_is_named_with_the_key_of_its_source() -> None:
    build(sources("web", "tokens"), SPLIT)
    path = (RAW / "tokens/tokens_train.bin").resolve()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"sources\.tokens\.paths"):
        tokenize(
            RAW, Path("again"), SPLIT, Machine(work_dir=Path(".work")), "code of a test", SELECTION
        )


def test_rules_apply_across_sources_in_the_order_of_their_names() -> None:
    manifest = build(sources("web", "books", "tokens"), SPLIT, exact_duplicates=True)
    assert manifest.selection_key is not None
    docs = {
        name: sum(shard.docs for shard in manifest.shards if shard.source == name)
        for name in manifest.source.sources
    }
    assert docs == {"books": 12, "web": 20, "tokens": 500}


def test_an_error_names_the_key_of_its_source() -> None:
    machine = Machine(workers=1, work_dir=Path(".work"))
    chosen = {**sources("web"), "gone": SourceParams(kind="files", paths=["nowhere/*.parquet"])}
    with pytest.raises(UserError, match=r"sources\.gone\.paths"):
        download(chosen, Store.open(machine), RAW, machine)
    assert not RAW.exists()


def test_an_error_keeps_its_type_and_the_names_of_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine, folder = Machine(workers=1, work_dir=Path(".work")), "my source.files; source.exclude"
    store = Store.open(machine)
    write_parquet(Path(folder, "source.paths/a.parquet"), some_texts(3, "web"))
    web = SourceParams(kind="files", paths=[folder], exclude=["z*"], text_column="texts")
    with pytest.raises(UserError, match=r"set sources\.web\.text_column") as error:
        fetch_source("web", web, store, RAW, machine)
    assert "source.paths/a.parquet" in str(error.value)
    assert "sources.web.exclude: 'z*'" in capsys.readouterr().out
    missing = web.model_copy(update={"paths": ["/corpus/source.files/no.parquet"]})
    with pytest.raises(UserError, match=r"^sources\.web\.paths: /corpus/source\.files/no.parquet"):
        fetch_source("web", missing, store, RAW, machine)
    message = f"{folder}: locked; set source.kind and source.paths"
    with pytest.raises(Busy) as busy, errors_of_source("a-b"):
        raise Busy(message)
    assert str(busy.value) == f"{folder}: locked; set sources.a-b.kind and sources.a-b.paths"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("source: {kind: sample, files: 2}\n", 'sources: {main: {"kind": "sample", "files": 2}}'),
        ("sources: {}\n", "sources"),
        ("sources: {Main: {}}\n", "sources: Main"),
        ("sources: {a.b: {}}\n", r"sources: a.b"),
        ("sources: {7: {}}\n", "sources: 7"),
        ("sources: {null: {}}\n", "sources: None"),
        ("sources: {web: [a]}\n", "sources.web"),
        ("sources: {web: {kinds: hub}}\n", "sources.web.kinds"),
        ("sources: {web: {kind: files}}\n", "sources.web"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(text: str, named: str) -> None:
    Path("params.yaml").write_text(text)
    for load in (load_sources, lambda: load_section("tokenize", TokenizeParams)):
        if load is load_sources or text.startswith("source:"):
            with pytest.raises(UserError, match=r"^params\.yaml: ") as error:
                load()
            assert named in str(error.value)
            assert "\n" not in str(error.value)


def test_sources_are_sorted_and_names_have_a_limit() -> None:
    assert list(validate_sources({"b": {}, "a-1_": {}}, "x")) == ["a-1_", "b"]
    validate_sources({"a" * 32: {}}, "x")
    with pytest.raises(UserError, match=r"^x: a+"):
        validate_sources({"a" * 33: {}}, "x")
