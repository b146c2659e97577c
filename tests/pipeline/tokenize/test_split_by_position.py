"""Tests for pipeline.tokenize.split_by_position: the last part of the stream is validation."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import TokenStream
from pipeline.format.manifest import NAME, SPLITS, RawManifest, Source
from pipeline.format.tokenizer import EOT
from pipeline.params import TokenizeParams, VerifyParams
from pipeline.provenance import Documents, RawRows
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.__main__ import _pieces_of_outs
from pipeline.store.store import Store
from pipeline.tokenize.split_by_position import find_cut, val_size
from pipeline.tokenize.stage import tokenize
from pipeline.verify import stage as verify
from tests.support.foreign_tokens import write_llm_c
from tests.support.small_data import (
    CODE,
    describe,
    encode_document,
    hashes,
    no_cluster,
    piece_times,
    run_here,
    some_texts,
    tokenize_here,
    write_raw,
)
from train.trace import describe as describe_document

PARAMS = TokenizeParams(shard_tokens=2000, val_per_10k=1500, val_split="position")
SHORT = [f"The {i}th law of the land. " * 9 for i in range(80)]
LONG: list[str | None] = ["One text about the law of the land, é and 語. " * 900]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, runner in (
        ("verify.stage", "verify.stage"),
        ("tokenize.stage", "tokenize.from_text"),
    ):
        monkeypatch.setattr(f"pipeline.{module}.cluster", no_cluster)
        monkeypatch.setattr(f"pipeline.{runner}.run_tasks", run_here)


def params(per_10k: int, shard_tokens: int = 2000) -> TokenizeParams:
    update = {"val_per_10k": per_10k, "shard_tokens": shard_tokens}
    return PARAMS.model_copy(update=update)


def streams(out: Path) -> list[np.ndarray]:
    return [TokenStream(out, split)[:] for split in SPLITS]


def test_neither_split_is_empty_if_all_documents_are_too_short_to_cut() -> None:
    assert find_cut(np.arange(0, 200, 2), 200, 199, 0, 0, 200) == 198


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    per_10k=st.integers(1, 9_999),
)
def test_cut_is_at_a_near_border_or_at_the_target(lengths: list[int], per_10k: int) -> None:
    borders = [0, *accumulate(lengths)]
    total = borders[-1]
    size, tolerance = val_size(total, per_10k)
    if not size:
        return
    target = total - size
    cut = find_cut(np.array(borders[:-1]), total, target, tolerance, 0, total)
    if cut in borders:
        near = min((b for b in borders if 0 < b < total), key=lambda b: abs(b - target), default=0)
        shortest = min(b - a for a, b in pairwise(borders))
        assert abs(cut - target) == abs(near - target) <= tolerance or shortest < 3
    else:
        assert abs(cut - target) <= 2
        assert cut - 1 not in borders


@pytest.mark.parametrize(
    ("texts", "inside"), [(SHORT, 0), (some_texts(20), 1), (LONG, 1)], ids=["short", "long", "one"]
)
def test_splits_hold_the_tokens_in_order_however_they_are_sharded(
    tmp_path: Path, machine: Machine, texts: list[str | None], inside: int
) -> None:
    files = [part for part in (texts[:8], texts[8:]) if part]
    raw, out = write_raw(tmp_path / "raw", files), tmp_path / "out"
    documents = [encode_document(text or "") for text in texts]
    stream = np.concatenate(documents)
    keys, tokens = set(), []
    for shard_tokens in (1000, 4000, 10**6):
        manifest = tokenize_here(raw, out, params(1500, shard_tokens), machine)
        verify.verify(raw, out, VerifyParams(retokenize=3), machine)
        keys.add(manifest.dataset_key)
        train, val = streams(out)
        tokens.append((train.tolist(), val.tolist()))
        assert len(train) + len(val) == len(stream) + inside
        assert val[0] == EOT
        assert np.array_equal(np.append(train, val[inside:]), stream)
        assert len(val) - inside == pytest.approx(0.15 * len(stream), rel=0.1)
        assert manifest.totals["train"].docs + manifest.totals["val"].docs == len(texts) + inside
        size = sum(totals.text_bytes for totals in manifest.totals.values())
        assert size == sum(len((text or "").encode()) for text in texts)
    assert len(keys) == 1
    assert tokens.count(tokens[0]) == 3


def test_another_share_encodes_nothing_again(tmp_path: Path, machine: Machine) -> None:
    raw, out = write_raw(tmp_path / "raw", [some_texts(30)]), tmp_path / "out"
    manifest = tokenize_here(raw, out, params(1500), machine)
    before, expected = piece_times(tmp_path / "work"), hashes(out)
    # Without Ray: no chunk is missing.
    other = tokenize(raw, out, params(4000), machine, CODE)
    assert other.dataset_key != manifest.dataset_key
    assert other.totals["val"].tokens > 2 * manifest.totals["val"].tokens
    assert tokenize(raw, out, params(1500), machine, CODE) == manifest
    assert hashes(out) == expected
    after = piece_times(tmp_path / "work")
    assert {key: after[key] for key in before} == before
    # The split by hash with no validation has the same pieces.
    none = TokenizeParams(shard_tokens=2000, val_per_10k=0)
    assert tokenize(raw, out, none, machine, CODE).totals["train"].docs == 30
    assert piece_times(tmp_path / "work") == after


def test_pieces_that_were_cut_are_kept_and_rebuilt(tmp_path: Path, machine: Machine) -> None:
    root = tmp_path
    raw, out = write_raw(root / "data/raw", [LONG, some_texts(3)]), root / "data/tokens"
    tokenize_here(raw, out, params(4000), machine)
    store = Store.open(machine)
    chunks = {key for kind, key in _pieces_of_outs(root, store) if kind == "chunks"}
    assert chunks == {path.name for path in (store.root / "chunks").iterdir()}
    expected = hashes(out)
    half = out / "train-00000.bin"
    half.chmod(0o644)
    half.write_bytes(half.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(verify.DataFault) as caught:
        verify.verify(raw, out, VerifyParams(), machine)
    assert {line.split(": ")[0] for line in str(caught.value).splitlines()} == {str(half)}
    assert not half.exists()
    tokenize(raw, out, params(4000), machine, CODE)
    assert hashes(out) == expected
    fresh = Machine(work_dir=machine.work_dir, fresh=True)
    times = piece_times(store.root)
    store.fresh = True
    tokenize_here(raw, out, params(4000), fresh)
    assert hashes(out) == expected
    assert times.keys() == piece_times(store.root).keys()


def test_verify_encodes_both_halves_again_and_checks_the_place_of_the_cut(
    tmp_path: Path, machine: Machine
) -> None:
    raw, out = write_raw(tmp_path / "raw", [LONG]), tmp_path / "out"
    tokenize_here(raw, out, PARAMS, machine)
    for changed in (f"{LONG[0]}!", f"!{LONG[0]}"):
        # The raw file and both manifests agree: only the tokens differ.
        write_raw(raw, [[changed]])
        value = atomic.read_sealed(out / NAME)
        value["source"] = json.loads((raw / NAME).read_text())
        atomic.write_json(out / NAME, atomic.sealed(value))
        with pytest.raises(verify.DataFault, match=r"document 0 "):
            verify.verify(raw, out, VerifyParams(), machine)
        tokenize_here(write_raw(raw, [LONG]), out, PARAMS, machine)
    value = json.loads((out / NAME).read_text())
    value["params"]["val_per_10k"] = 3000
    atomic.write_json(out / NAME, value)
    with pytest.raises(UserError, match=f"{NAME}: .*{atomic.SEAL}"):
        verify.verify(raw, out, VerifyParams(), machine)
    value.pop(atomic.SEAL)
    atomic.write_json(out / NAME, atomic.sealed(value))
    with pytest.raises(verify.DataFault, match=NAME):
        verify.verify(raw, out, VerifyParams(), machine)


def test_both_halves_are_traced_to_their_row(tmp_path: Path, machine: Machine) -> None:
    raw, out = write_raw(tmp_path / "raw", [[None, *LONG]]), tmp_path / "out"
    manifest = tokenize_here(raw, out, PARAMS, machine)
    texts = []
    for split in SPLITS:
        stream = TokenStream(out, split)
        documents, rows = Documents(stream), RawRows(raw, manifest.source)
        (span,) = documents.between(0, len(stream))
        assert (span.path, span.row) == ("part-0.parquet", 1)
        found = describe_document(span, documents, rows)
        assert found["id"] == "<urn:test:1>"
        texts.append(found["window"])
    assert "".join(texts) == LONG[0]


def write_token_files(raw: Path, **files: np.ndarray) -> None:
    """Write a `data/raw` of llm.c's token files."""
    described = []
    for name, tokens in files.items():
        write_llm_c(raw / f"{name}.bin", tokens)
        file = describe(raw / f"{name}.bin", 0)
        described.append(file.model_copy(update={"tokens": len(tokens)}))
    source = Source(kind="tokens", repo="test", revision="1")
    manifest = RawManifest(sources={"main": source}, files=described)
    atomic.write_json(raw / NAME, manifest.model_dump())


def test_token_files_are_cut_unless_one_is_validation_by_name(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tokenize.from_tokens.run_tasks", run_here)
    raw, out = tmp_path / "raw", tmp_path / "out"
    stream = np.concatenate([encode_document(text or "") for text in LONG * 3])
    a, b = np.split(stream, [len(stream) // 2])  # the second document continues in the next file
    write_token_files(raw, a=a, b=b)
    for per_10k in (500, 4900):  # inside the last document, and at the file's first token
        manifest = tokenize(raw, out, params(per_10k), machine, CODE)
        verify.verify(raw, out, VerifyParams(), machine)
        train, val = streams(out)
        assert val[0] == EOT
        assert np.array_equal(np.append(train, val[1:]), stream)
        assert len(val) - 1 == pytest.approx(len(stream) * per_10k / 10_000, rel=0.1)
        assert manifest.totals["val"].docs == {500: 1, 4900: 2}[per_10k]
    write_token_files(raw, a=a, val=b)
    with pytest.raises(UserError, match=r"tokenize\.val_split.* val\.bin"):
        tokenize(raw, out, PARAMS, machine, CODE)


@pytest.mark.parametrize(
    ("texts", "per_10k", "split", "ways"),
    [
        (LONG, 20, "documents", ["tokenize.val_per_10k", "tokenize.val_split"]),
        (LONG, 10_000, "documents", ["tokenize.val_per_10k", "tokenize.val_split"]),
        (["short"], 20, "position", ["tokenize.val_per_10k"]),
        (["short"], 10_000, "position", ["tokenize.val_per_10k"]),
        ([None, ""], 20, "position", ["text_column"]),
        ([None, ""], 0, "documents", ["text_column"]),
    ],
)
def test_empty_split_is_refused(
    tmp_path: Path,
    machine: Machine,
    texts: list[str | None],
    per_10k: int,
    split: str,
    ways: list[str],
) -> None:
    raw, out = write_raw(tmp_path / "raw", [texts]), tmp_path / "out"
    sizes = params(per_10k).model_copy(update={"val_split": split})
    with pytest.raises(UserError) as caught:
        tokenize_here(raw, out, sizes, machine)
    assert [key for key in ways if key not in str(caught.value)] == []
    assert not out.exists()
