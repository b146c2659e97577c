"""Tests for train.trace and pipeline.provenance: a step is traced to the documents in it."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import TokenStream
from pipeline.format.tokenizer import EOT, decode_bytes, encode
from pipeline.params import TokenizeParams
from pipeline.provenance import Documents, RawRows, decoded
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from tests.support.small_data import some_texts, tokenize_here, write_raw
from tests.support.training import MODEL, TRAIN
from train import DataOrder, trace
from train.data.loader import Batches
from train.data.split import Split
from train.params import TrainParams
from train.trace import Share, Trace, describe, split_text

BLOCK = 32
BATCH = 12  # windows


@pytest.fixture(scope="module")
def texts() -> list[list[str | None]]:
    """Two source files: documents of many lengths, and rows without a document."""
    first, second = some_texts(30, "first"), some_texts(25, "second")
    first[3], first[7], second[0] = "", None, "é"
    return [first, second]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str | None]]) -> Path:
    """`data/raw` and `data/tokens` as the stages write them; read-only."""
    root = tmp_path_factory.mktemp("trace")
    raw = write_raw(root / "data/raw", texts)
    params = TokenizeParams(shard_tokens=1000, val_per_10k=1000)
    machine = Machine(workers=1, work_dir=root / "work")
    tokenize_here(raw, root / "data/tokens", params, machine)
    return root


def train_params(**changes: Any) -> TrainParams:
    return TrainParams.model_validate({**TRAIN, "batch_tokens": BATCH * BLOCK, **changes})


@pytest.fixture(scope="module")
def expected(root: Path, texts: list[list[str | None]]) -> list[tuple[str, int, int]]:
    """Source file, row and position in its document of each token of the train split.

    The split has the documents of the texts in order, without those of the validation split.
    """
    stream = TokenStream(root / "data/tokens", "train")
    tokens = stream[0 : len(stream)].tolist()
    rows = ((f"part-{f}.parquet", r, t) for f, file in enumerate(texts) for r, t in enumerate(file))
    expected: list[tuple[str, int, int]] = []
    for path, row, text in rows:
        document = [EOT, *encode(text or "")]
        if text and tokens[len(expected) : len(expected) + len(document)] == document:
            expected += [(path, row, place) for place in range(len(document))]
    assert len(expected) == len(tokens)
    assert len(stream.shards) > 4
    return expected


@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 50), order=st.sampled_from(["shuffled", "sequential"]))
def test_each_token_of_a_step_is_traced_to_its_document(
    root: Path, expected: list[tuple[str, int, int]], data: st.DataObject, seed: int, order: str
) -> None:
    run = Trace.of(BLOCK, train_params(seed=seed, order=order, steps=1000), root / "data/tokens")
    assert isinstance(run.order, DataOrder)
    steps_per_epoch = -(-run.order.n_windows // BATCH)
    step = data.draw(st.integers(1, 4 * steps_per_epoch))
    windows = list(run.windows(step))
    assert [w.sample for w in windows] == list(range((step - 1) * BATCH, step * BATCH))
    for window in windows:
        assert window.end - window.first == BLOCK + 1
        assert [s.first for s in window.spans[1:]] == [s.end for s in window.spans[:-1]]
        assert (window.spans[0].first, window.spans[-1].end) == (window.first, window.end)
        for span in window.spans:
            for position in range(span.first, span.end):
                assert expected[position] == (span.path, span.row, position - span.start)
            assert span.stop == len(expected) or expected[span.stop][2] == 0


@settings(deadline=None, max_examples=40)  # each starts a thread, which can be slow
@given(
    step=st.integers(1, 60),
    split=st.sampled_from([(1, 12), (1, 5), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]),
    seed=st.integers(0, 9),
)
def test_windows_of_a_rank_are_those_that_its_loader_reads(
    root: Path, step: int, split: tuple[int, int], seed: int
) -> None:
    world, micro_batch = split
    run = Trace.of(BLOCK, train_params(seed=seed, steps=1000), root / "data/tokens")
    if BATCH % (world * micro_batch):
        with pytest.raises(UserError, match="--world"):
            list(run.windows(step, Share(Split(world=world, micro_batch=micro_batch), 0)))
        return
    check_ranks(run, step, Split(world=world, micro_batch=micro_batch))


@pytest.mark.parametrize("world", [1, 2, 4, 5])
def test_leaves_of_a_rank_are_those_that_its_loader_reads(root: Path, world: int) -> None:
    run = Trace.of(BLOCK, train_params(seed=1, steps=1000), root / "data/tokens")
    check_ranks(run, 7, Split(world=world, micro_batch=2, contiguous=True))


def check_ranks(run: Trace, step: int, split: Split) -> None:
    """Compare the traced windows of each rank with those that it loads."""
    for rank in range(split.world):
        traced = [
            run.stream[window.first : window.end]
            for window in run.windows(step, Share(split, rank))
        ]
        assert np.array_equal(np.stack(traced), loaded(run, step, split, rank))


def loaded(run: Trace, step: int, split: Split, rank: int) -> np.ndarray:
    """Windows of one step, read by the loader of training."""
    spans, device = [(step - 1, (step - 1) * BATCH, BATCH)], torch.device("cpu")
    stream = TokenStream(run.stream.folder, "train")
    with Batches(stream, run.order, split, rank=rank, spans=spans, device=device) as batches:
        rows = [torch.cat([inputs, targets[:, -1:]], dim=1) for _, inputs, targets in batches]
    return torch.cat(rows).numpy()


def test_growing_batch_is_traced(root: Path) -> None:
    """Half the batch for 4 steps, then the full batch."""
    params = train_params(batch_doublings=1, batch_ramp_steps=4)
    run = Trace.of(BLOCK, params, root / "data/tokens")
    seen = [[window.sample for window in run.windows(step)] for step in (1, 4, 5, 6)]
    expected = (range(0, 6), range(18, 24), range(24, 36), range(36, 48))
    assert seen == [list(samples) for samples in expected]


def test_document_text_contains_the_window(
    root: Path, texts: list[list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    run = Trace.of(BLOCK, train_params(), Path("data/tokens"))
    documents, rows = Documents(run.stream), RawRows(trace.RAW, run.stream.manifest.source)
    no_rows = RawRows(root / "nowhere", run.stream.manifest.source)
    for span in chain(*(w.spans for step in (1, 2, 30) for w in run.windows(step % 12 or 12))):
        found = describe(span, documents, rows)
        assert span.path is not None
        assert span.row is not None
        text = texts[int(span.path[5])][span.row]
        assert text is not None
        raw = rows.get(span)
        assert raw is not None
        assert raw["text"] == text
        assert found["id"] == f"<urn:test:{span.row}>"
        assert found["url"] == f"https://example.org/{span.row}"
        assert found["dump"] == "test"
        # In bytes, because a window can begin or end within a character.
        tokens = [t for t in run.stream[span.first : span.end].tolist() if t != EOT]
        assert decode_bytes(tokens) in text.encode()
        assert found["window"].strip("\ufffd") in text
        if "\ufffd" not in found["before"] + found["window"] + found["after"]:
            assert found["before"] + found["window"] + found["after"] == text
        without = describe(span, documents, no_rows)
        assert without["window"] == found["window"]
        assert without["before"] == found["before"]
        assert "url" not in without


def test_merged_shard_is_traced_to_its_files(
    root: Path, texts: list[list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation shards are merged from several chunks; a row can be in any row group."""
    monkeypatch.setattr("pipeline.provenance.BATCH_ROWS", 3)  # row groups have 7 rows
    stream = TokenStream(root / "data/tokens", "val")
    assert any(len({part.path for part in shard.parts}) > 1 for shard in stream.shards)
    rows, documents = RawRows(root / "data/raw", stream.manifest.source), Documents(stream)
    spans = documents.between(0, len(stream))
    assert len(spans) == sum(shard.docs for shard in stream.shards)
    for span in spans:
        raw = rows.get(span)
        assert raw is not None
        assert raw["text"] == decoded(documents.tokens(span)).decode()


def test_character_cut_by_the_window_is_marked_on_both_sides(root: Path) -> None:
    run = Trace.of(BLOCK, train_params(), root / "data/tokens")
    (span,) = Documents(run.stream).between(5, 9)
    text = "a☃b".encode()
    assert len(encode("a☃b")) == 4
    tokens = np.array([EOT, *encode("a☃b")], dtype=np.uint16)
    cut = type(span)(**{**vars(span), "start": 0, "stop": 5, "first": 0, "end": 3})
    assert decoded(tokens) == text
    before, within, after = split_text(cut, tokens, text)
    assert before == ""
    assert within == "a\ufffd"
    assert after.endswith("b")


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Project with these data and no checkpoint; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("raw", "tokens"):
        (tmp_path / "data" / name).symlink_to(root / "data" / name)
    sections = {
        "sources": {"main": {}},
        **{section: {} for section in ("curate", "tokenize", "verify", "evaluate")},
        "model": {**MODEL, "block_size": BLOCK},
        "train": {**TRAIN, "batch_tokens": BATCH * BLOCK},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(sections))
    return tmp_path


def test_command_shows_documents_with_the_window_in_brackets(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.main(["--step", "2", "--limit", "3"])
    out = capsys.readouterr().out
    assert out.startswith("step 2: samples 12 to 23, 12 windows of 32 tokens, epoch 0\n")
    assert out.count("\nsample ") == 3
    assert out.count("⟦") == out.count("⟧") >= 3
    assert "https://example.org/" in out
    assert "--limit 12" in out
    (project / "data/raw").unlink()
    trace.main(["--step", "2", "--limit", "3"])
    without = capsys.readouterr().out
    assert "https://example.org/" not in without
    assert " part-" in without
    assert without.count("⟦") == out.count("⟦")


def test_json_prints_one_line_per_document(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.main(["--step", "1", "--json", "--rank", "1", "--world", "2", "--micro-batch", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Micro-steps of 2 x 3 samples: rank 1 has the second half of each.
    assert list(dict.fromkeys(line["sample"] for line in lines)) == [3, 4, 5, 9, 10, 11]
    for line in lines:
        source = pq.read_table(project / "data/raw" / line["path"])
        assert line["id"] == source["id"][line["row"]].as_py()
        assert line["window"].strip("\ufffd") in source["text"][line["row"]].as_py()


def test_checkpoint_gives_parameters_and_split(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = TokenStream("data/tokens", "train").manifest.dataset_key
    state = {
        "model": {**MODEL, "block_size": BLOCK},
        "train": {**TRAIN, "batch_tokens": 6 * BLOCK},
        "dataset_key": key,
        "arithmetic": {"world_size": 2, "micro_batch": 1},
    }
    atomic.write_json(project / "elsewhere/state.json", state)
    trace.main(["--step", "3", "--rank", "1", "--checkpoint", "elsewhere"])
    out = capsys.readouterr().out
    assert "samples 12 to 17" in out
    assert "rank 1 of 2: 3" in out
    assert out.count("\nsample 13:") == 1
    atomic.write_json(project / "elsewhere/state.json", {**state, "dataset_key": "other"})
    with pytest.raises(UserError, match=r"--checkpoint: .* other"):
        trace.main(["--step", "3", "--checkpoint", "elsewhere"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--step", "0"], "--step 0: .* 1 to 12"),
        (["--step", "13"], "--step 13"),
        (["--step", "1", "--rank", "0"], "--rank: .*--world.*--micro-batch"),
        (
            ["--step", "1", "--rank", "2", "--world", "2", "--micro-batch", "1"],
            "--rank 2: .* 0 to 1",
        ),
        (["--step", "1", "--rank", "0", "--world", "5", "--micro-batch", "1"], "--world 5"),
        (["--step", "1", "--checkpoint", "none"], "--checkpoint: none/state.json"),
    ],
)
def test_impossible_flags_are_refused(project: Path, flags: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        trace.main(flags)


def test_document_without_a_row_or_a_beginning(root: Path, tmp_path: Path) -> None:
    """Imported token files have no rows (-1), and their shards can begin within a document."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for path in (root / "data/tokens").iterdir():
        if path.is_file():
            (tokens / path.name).write_bytes(path.read_bytes())
    index = tokens / "train-00001.docs.npy"
    docs = np.load(index)
    cut = int(docs[1, 0])
    docs = docs[1:]
    docs[:, 1] = -1
    np.save(index, docs)
    stream = TokenStream(tokens, "train")
    begin = int(stream.starts[1])
    headless, next_one = Documents(stream).between(begin, begin + cut + 1)
    assert (headless.number, headless.row) == (None, None)
    assert (headless.start, headless.stop, headless.end) == (begin, begin + cut, begin + cut)
    assert (next_one.number, next_one.row) == (0, None)
    found = describe(
        headless, Documents(stream), RawRows(root / "data/raw", stream.manifest.source)
    )
    assert found["window"] == decoded(stream[begin : begin + cut]).decode()
    assert "url" not in found


def test_raw_text_that_differs_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    run = Trace.of(BLOCK, train_params(), Path("data/tokens"))
    rows = RawRows(trace.RAW, run.stream.manifest.source)
    (span,) = Documents(run.stream).between(2, 5)
    wrong = type(span)(**{**vars(span), "row": 9})
    with pytest.raises(UserError, match=r"row 9: .*train-00000\.bin"):
        describe(wrong, Documents(run.stream), rows)
