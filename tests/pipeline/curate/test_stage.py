"""Tests for pipeline.curate: the same rows for any cutting, and what a change costs."""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pipeline.curate import measure_chunk
from pipeline.curate import stage as curate_stage
from pipeline.curate.__main__ import main
from pipeline.curate.decisions import Decisions, split_ledger
from pipeline.curate.heuristics import SETS
from pipeline.curate.row_rules import column_keeps
from pipeline.curate.signatures import shingles
from pipeline.curate.words import as_texts
from pipeline.format.manifest import NAME, Manifest, RawManifest, SelectionManifest
from pipeline.format.selection import LEDGER_SCHEMA, SELECTION, read_ledger
from pipeline.format.shards import read_docs
from pipeline.params import ColumnRule, CurateParams, TokenizeParams, VerifyParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import validate
from pipeline.store import atomic
from pipeline.store.__main__ import main as prune
from pipeline.tokenize.__main__ import main as tokenize_main
from pipeline.tokenize.stage import tokenize
from pipeline.verify.stage import DataFault, verify
from tests.pipeline.curate.corpus import document, some_rows, write_source
from tests.support.repo import REPO
from tests.support.small_data import (
    CODE,
    Project,
    describe,
    flip,
    hashes,
    no_cluster,
    run_here,
    write_manifest,
)
from tests.support.waiting import wait_for
from tests.test_layout import reached

RAW, TOKENS = Path("data/raw"), Path("data/tokens")
SPLIT = TokenizeParams(shard_tokens=2000, val_per_10k=2000)
RULES: dict[str, Any] = {
    "columns": [{"column": "language", "in": ["en"]}, {"column": "language_score", "min": 0.1}],
    "filters": {"gopher_quality": {"min_words": 20}, "fineweb": {}},
    "exact_duplicates": True,
    "near_duplicates": True,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new current folder, in which the stages run without Ray and on small chunks."""
    monkeypatch.chdir(tmp_path)
    for stage in ("curate.stage", "tokenize.stage", "verify.stage"):
        monkeypatch.setattr(f"pipeline.{stage}.cluster", no_cluster)
    for module in ("curate.stage", "tokenize.from_text", "verify.stage"):
        monkeypatch.setattr(f"pipeline.{module}.run_tasks", run_here)
    monkeypatch.setattr(measure_chunk, "CHUNK_TOKENS", 6000)
    monkeypatch.setattr("os.fsync", lambda _: None)  # half of the time of these tests
    return tmp_path


def params(**changes: Any) -> CurateParams:
    return CurateParams.model_validate({**RULES, **changes})


def curate(
    rules: CurateParams, split: TokenizeParams = SPLIT, raw: Path = RAW
) -> SelectionManifest:
    return curate_stage.curate(raw, SELECTION, rules, split, Machine())


def dropped(raw: Path = RAW) -> dict[int, tuple[Any, ...]]:
    """Return the ledger by the number of the row in the source; twins are numbered likewise."""
    source = RawManifest.load(raw)
    starts = np.cumsum([0, *(file.rows for file in source.files)])
    found = {}
    for start, file in zip(starts, SelectionManifest.load(SELECTION).files, strict=False):
        for entry in read_ledger(SELECTION, file).to_pylist():
            twin = entry["twin_file"]
            number = None if twin is None else int(starts[twin]) + entry["twin_row"]
            found[int(start) + entry["row"]] = (
                entry["rule"], entry["value"], entry["reason"], number,
            )  # fmt: skip
    return found


def tokens(key: str | None = None) -> Manifest:
    return tokenize(RAW, TOKENS, SPLIT, Machine(), CODE, SELECTION)


def is_val(text: str) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode()) % 10_000 < SPLIT.val_per_10k


def test_without_rules_all_rows_are_kept_and_the_tokens_are_the_same(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(RAW, some_rows(), [25, 25])
    Path("params.yaml").write_text('{"curate": {}, "tokenize": {}}')
    main()
    manifest = SelectionManifest.load(SELECTION)
    assert [(file.rows, file.kept) for file in manifest.files] == [(25, 25), (0, 0), (35, 35)]
    assert not Path(".work").exists()
    assert hashes(SELECTION).keys() == {NAME}
    assert tokens().selection_key is None
    before = hashes(TOKENS)
    tokenize(RAW, TOKENS, SPLIT, Machine(work_dir=here / "other"), CODE)
    assert hashes(TOKENS) == before


def test_a_selection_of_the_same_rows_is_the_same_after_a_change_of_code(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the stages after it need not run again; and `--prune` keeps what was measured."""
    write_source(RAW, some_rows(), [25])
    curate(params())
    before, code = hashes(SELECTION), measure_chunk.code_keys()
    changed = {kind: f"{key} changed" for kind, key in code.items()}
    monkeypatch.setattr(measure_chunk, "code_keys", lambda: changed)
    measured = {kind: {*Path(".work", kind).iterdir()} for kind in ("texts", "columns")}
    curate(params())
    assert hashes(SELECTION) == before
    for path in Path(".work").rglob("*"):
        os.utime(path, (0, 0))
    prune(["--prune", "--older-than", "1"])
    for kind, earlier in measured.items():
        found = {*Path(".work", kind).iterdir()}
        assert len(found) == len(earlier)
        assert found.isdisjoint(earlier)
    off: dict[str, Any] = {"columns": [], "filters": {}}
    off |= {"exact_duplicates": False, "near_duplicates": False}
    assert len({curate(params(**off, bands=bands)).model_dump_json() for bands in (1, 2)}) == 1


def test_fresh_rebuilds_every_piece(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no `posix_fallocate`, as on macOS."""
    write_source(RAW, some_rows(), [25])
    Path("tasks.jsonl").write_text('{"text": "a b c d e f g h i j"}\n')
    rules = {"val_copies": "drop", "decontaminate": ["tasks.jsonl"]}
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    curate(params(**rules, compare="text"))
    found, before = dropped(), pieces_by_kind()
    assert before.keys() == {*measure_chunk.MODULES, "measured", "selections"}
    curate_stage.curate(RAW, SELECTION, params(**rules, compare="text"), SPLIT, Machine(fresh=True))
    assert dropped() == found
    after = pieces_by_kind()
    assert after.keys() == before.keys()
    for kind, times in before.items():
        assert all(after[kind][key] != time for key, time in times.items()), kind
    curate(params(**rules))
    assert pieces_by_kind()["signatures"] == after["signatures"]


def pieces_by_kind() -> dict[str, dict[str, int]]:
    """Return when each piece of the store was made."""
    found: dict[str, dict[str, int]] = {}
    for path in Path(".work").glob("*/*/*"):
        if path.name != "piece.json":  # whose time is that of its last use
            found.setdefault(path.parts[1], {})[path.parts[2]] = path.stat().st_mtime_ns
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compare": "text", "similarity": 0.5},
        {"compare": None, "clusters": "components", "scope": "dump"},
        {"val_copies": "drop", "filters": {}},
    ],
)
def test_the_same_rows_for_any_cutting(here: Path, changes: dict[str, Any]) -> None:
    rows, rules = some_rows(), params(**changes)
    found = []
    for number, borders in enumerate(([], [1, 1, 30, 44])):
        raw = write_source(Path(f"raw-{number}"), rows, borders)
        key = curate(rules, raw=raw).selection_key
        found.append((key, dropped(raw)))
    assert found[0] == found[1]
    ledger = found[0][1]
    assert ledger[1][:3] == ("columns.language", None, "de")
    assert ledger[30][:2] == ("columns.language_score", None)
    assert ledger[16][:2] == ("columns.language_score", 0.0)
    twins = {row: entry[3] for row, entry in ledger.items() if entry[3] is not None}
    assert twins
    assert ledger.keys().isdisjoint(twins.values())
    text = [row["text"] for row in rows]
    for row, twin in twins.items():
        if changes.get("val_copies") != "drop":
            assert twin < row
        assert str(text[row])[-200:] == str(text[twin])[-200:]


def test_the_strings_of_a_ledger_may_be_longer_than_2_gib() -> None:
    """Of memory that is mapped, and for the most part never written."""
    text, first = b"a reason", 2**31
    memory = mmap.mmap(-1, first + len(text))
    memory[first:] = text
    offsets = np.array([0, first, first + 2, first + len(text)])
    reasons = pa.LargeStringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(memory))
    decisions = Decisions(np.ones(5, bool))
    decisions.drop("exact_duplicates", np.array([2]), twins=np.array([1]))
    decisions.drop("columns.a", np.array([4, 0]), reasons=reasons[1:])
    (part,) = split_ledger(decisions.ledger(), [*decisions.counts], [5])
    found = [(entry["row"], entry["rule"], entry["reason"]) for entry in part.to_pylist()]
    rows = [(0, "columns.a", "reason"), (2, "exact_duplicates", None), (4, "columns.a", "a ")]
    assert found == rows
    ledger = decisions.ledger().slice(0, 1).set_column(3, "reason", reasons[2:])
    (part,) = split_ledger(ledger, [*decisions.counts], [5])
    assert part["reason"].to_pylist() == ["reason"]


@pytest.mark.parametrize("val_copies", ["keep", "drop"])
def test_similarity_by_text_is_that_of_the_texts(here: Path, val_copies: str) -> None:
    rows = some_rows(120, seed=0)
    write_source(RAW, rows, [30, 90])
    off: dict[str, Any] = {"columns": [], "filters": {}, "exact_duplicates": False}
    curate(params(**off, val_copies=val_copies, compare="text", similarity=0.3))
    grams = shingles(as_texts(pa.array([row["text"] for row in rows], pa.large_string())))
    assert len({entry[0] for entry in dropped().values()}) == 1 + (val_copies == "drop")
    for row, (_, value, _, twin) in dropped().items():
        both = len(np.intersect1d(grams[row], grams[twin]))
        assert value == both / (len(grams[row]) + len(grams[twin]) - both) >= 0.3


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_the_same_rows_for_random_rules_cuttings_and_chunks(
    here: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, rows = random.Random(seed), some_rows(200, seed)
    rules = params(
        near_duplicates=draw.random() < 0.8,
        compare=draw.choice(["signatures", "text", None]),
        similarity=draw.choice([0.3, 0.7, 0.9]),
        scope=draw.choice(["all", "dump"]),
        val_copies=draw.choice(["keep", "drop"]),
        filters={name: {} for name in SETS if draw.random() < 0.5},
    )
    found = []
    for number in range(4):
        monkeypatch.setattr(measure_chunk, "CHUNK_TOKENS", draw.choice([3000, 20_000, 10**6]))
        borders = sorted(draw.choices(range(len(rows) + 1), k=number * 3))
        raw = write_source(Path(f"raw-{number}"), rows, borders)
        key = curate(rules, raw=raw).selection_key
        found.append((key, dropped(raw)))
    assert found[0][1]
    assert all(one == found[0] for one in found)


def test_text_that_is_not_utf8_changes_no_other_row(here: Path) -> None:
    texts = [b"\xe0", b"a b c d e f", b"\xe0", None, b"a b c d e f", b"one \xc3", b"of the. A b."]
    found = []
    for number, borders in enumerate(([0, 7], [0, 1, 2, 3, 4, 5, 6, 7])):
        raw, files = Path(f"raw-{number}"), []
        raw.mkdir()
        for first, last in pairwise(borders):
            path = raw / f"part-{first}.parquet"
            pq.write_table(pa.table({"text": pa.array(texts[first:last], pa.binary())}), path)
            files.append(describe(path, last - first))
        write_manifest(raw, files)
        curate(params(columns=[], filters={"gopher_quality": {"min_words": 5}}), raw=raw)
        found.append(dropped(raw))
    assert found[0] == found[1]
    assert found[0].keys() == {1, 4, 6}  # too few stop words, too few words


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_limits_are_inclusive_in_the_type_of_the_column(dtype: type) -> None:
    values = pa.array(np.array([0.6, 0.65, 0.7, 0.9, 1.0], dtype))
    rule = ColumnRule(column="a", min=0.65, max=0.9)
    assert column_keeps(values, rule).tolist() == [False, True, True, True, False]
    assert column_keeps(values, ColumnRule(column="a", max=1e300)).all()


def test_values_of_columns_that_are_not_utf8_count_as_missing(here: Path) -> None:
    """Parquet may hold any bytes in a column of strings."""
    values = [b"en", b"\xff", None, b"de", "é".encode()]
    strings = pa.Array.from_buffers(pa.string(), 5, pa.array(values, pa.binary()).buffers())
    RAW.mkdir(parents=True)
    path = RAW / "a.parquet"
    pq.write_table(pa.table({"text": ["a b c d e f"] * 5, "language": strings}), path)
    write_manifest(RAW, [describe(path, 5)])
    off: dict[str, Any] = {"filters": {}, "exact_duplicates": False, "near_duplicates": False}
    curate(params(**off, columns=[{"column": "language", "in": ["en", "é"]}]))
    assert {row: entry[2] for row, entry in dropped().items()} == {1: None, 2: None, 3: "de"}


def test_tokenize_and_verify_follow_the_selection(here: Path) -> None:
    rows = some_rows()
    write_source(RAW, rows, [25])
    curate(params())
    manifest = tokens()
    verify(RAW, TOKENS, VerifyParams(retokenize=2), Machine(), SELECTION)
    kept = {row for row, entry in enumerate(rows) if entry["text"]} - dropped().keys()
    found = set()
    for shard in manifest.shards:
        docs = read_docs(TOKENS / shard.name)
        for part in shard.parts:
            first = 25 if part.path == "part-001.parquet" else 0
            inside, docs = docs[: part.docs], docs[part.docs :]
            found |= {first + row for row in inside[:, 1].tolist()}
    assert found == kept
    assert manifest.selection_key == SelectionManifest.load(SELECTION).selection_key
    assert manifest.skipped["not kept"] == len(dropped())


def test_a_changed_threshold_reads_no_text_and_encodes_only_chunks_whose_rows_changed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows()
    write_source(RAW, rows, [25])
    columns = [{"column": "id", "in": [row["id"] for row in rows if row["id"] not in ("2", "59")]}]
    curate(params(columns=columns))
    tokens()
    before = dropped()
    capsys.readouterr()
    columns[0]["in"].append("59")  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(measure_chunk, "_read_text", None)
        filters = {"gopher_quality": {"min_words": 130, "min_stop_words": None}, "fineweb": {}}
        curate(params(columns=columns, filters=filters, similarity=0.9, exact_duplicates=False))
        assert any(entry[0] == "gopher_quality.min_words" for entry in dropped().values())
        curate(params(columns=columns))
    assert capsys.readouterr().out.count(", 0 to do") == 2
    changed = set(before.keys() ^ dropped().keys())
    assert changed == {59}
    tokens()
    (line,) = re.findall("to do: (.*)", capsys.readouterr().out)
    spans = re.findall(r"part-00(\d).parquet\[(\d+):(\d+)\]", line)
    again = {25 * int(n) + row for n, a, b in spans for row in range(int(a), int(b))}
    assert changed <= again < set(range(60))
    assert all(changed & {25 * int(n) + row for row in range(int(a), int(b))} for n, a, b in spans)


def test_tokenize_warns_of_a_selection_by_other_parameters(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tokenize.__main__.code_key", lambda _: CODE)
    write_source(RAW, some_rows(9), [])
    columns = [{"column": "language", "in": ["en"]}]
    for rules, is_warned in (({"columns": columns}, False), ({}, True), ({"bands": 2}, True)):
        sections = {"curate": rules, "tokenize": {"val_per_10k": 5000}}
        Path("params.yaml").write_text(json.dumps(sections))
        if not SELECTION.exists():
            main()
        tokenize_main()
        assert ("data/selection" in capsys.readouterr().err) == is_warned


def test_one_more_file_costs_only_that_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = some_rows(90)
    write_source(RAW, rows[:60], [25])
    curate(params())
    before = dropped()
    capsys.readouterr()
    write_source(RAW, rows, [25, 60])
    curate(params())
    done, to_do = re.findall(r"(\d+) chunks measured before, (\d+) to do", capsys.readouterr().out)[
        0
    ]
    assert int(done) > int(to_do) > 0
    assert {row: entry for row, entry in dropped().items() if row < 60} == before


def test_verify_accepts_a_validation_row_as_the_later_twin_of_a_training_row(here: Path) -> None:
    """It is the twin of all rows that are equal to the first one."""
    draw = random.Random(5)
    near = ((a, a.replace(" the ", " a ", 1)) for a in iter(lambda: document(draw), ""))
    first, twin = next(pair for pair in near if [*map(is_val, pair)] == [False, True])
    texts = [first, first, twin, *(document(draw) for _ in range(20))]
    write_source(RAW, [{"text": text} for text in texts], [1])
    curate(params(val_copies="drop", filters={}, columns=[]))
    decided = {row: (entry[0], entry[3]) for row, entry in dropped().items()}
    assert decided == {0: ("validation_copies", 2), 1: ("exact_duplicates", 2)}
    tokens()
    verify(RAW, TOKENS, VerifyParams(retokenize=0), Machine(), SELECTION)


def test_verify_finds_what_is_wrong_with_the_selection(here: Path) -> None:
    """A flipped bit, a ledger with another row or twin, counts and keys: named and removed."""
    write_source(RAW, some_rows(), [25])
    curate(params())
    tokens()

    def check(named: str) -> None:
        with pytest.raises(DataFault) as fault:
            verify(RAW, TOKENS, VerifyParams(), Machine(), SELECTION)
        assert f"{SELECTION / named}:" in str(fault.value)
        assert not (SELECTION / named).exists()
        curate(params())
        verify(RAW, TOKENS, VerifyParams(), Machine(), SELECTION)

    bits = SELECTION / "00000.kept.npy"
    flip(bits, -1 % bits.stat().st_size, keep_mtime=True)
    check(bits.name)
    name = "00001.ledger.parquet"
    ledger = pq.read_table(SELECTION / name)
    row = next(row for row, entry in dropped().items() if row < 25)
    dropped_twins = [
        {**entry, "twin_file": 0, "twin_row": row} if entry["twin_file"] is not None else entry
        for entry in ledger.to_pylist()
    ]
    entries = [dropped_twins]
    for missing in ({"row": None}, {"rule": None}, {"twin_file": 0, "twin_row": None}):
        entries.append([{**ledger.to_pylist()[0], **missing}, *ledger.to_pylist()[1:]])
    tables = [pa.Table.from_pylist(forged, schema=ledger.schema) for forged in entries]
    for table in (ledger.slice(1), *tables, None):
        (SELECTION / name).unlink()
        if table is None:
            (SELECTION / name).write_bytes(b"no parquet")
        else:
            pq.write_table(table, SELECTION / name)
        sha256 = atomic.sha256_file(SELECTION / name)
        edit_manifest(lambda value: value["files"][1].update(ledger_sha256=sha256))  # noqa: B023
        check(name)
    edit_manifest(lambda value: value["dropped"].update({"columns.language": 1, "fineweb.x": 5}))
    check(NAME)
    edit_manifest(lambda value: value.update(selection_key="0" * 64))
    check(NAME)
    curate(params(near_duplicates=False))  # another selection than that of the tokens
    with pytest.raises(DataFault, match=str(TOKENS / NAME)):
        verify(RAW, TOKENS, VerifyParams(), Machine(), SELECTION)


def test_ledgers_that_lack_values_or_are_no_parquet_are_refused(here: Path) -> None:
    write_source(RAW, some_rows(), [])
    (file,) = curate(params(filters={}, near_duplicates=False)).files
    path = SELECTION / str(file.ledger)
    first, *rest = pq.read_table(path).to_pylist()
    for missing in ({"row": None}, {"rule": None}, {"twin_file": 0}, None):
        path.unlink()
        if missing is None:
            path.write_bytes(b"no parquet")
        else:
            entries = [{**first, **missing}, *rest]
            pq.write_table(pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA), path)
        forged = file.model_copy(update={"ledger_sha256": atomic.sha256_file(path)})
        with pytest.raises(UserError, match=str(path)):
            read_ledger(SELECTION, forged)


def test_a_document_index_with_a_row_of_a_chunk_that_is_not_kept_is_named(here: Path) -> None:
    rows = [{**row, "token_count": i} for i, row in enumerate(some_rows())]
    write_source(RAW, rows, [])
    off: dict[str, Any] = {"filters": {}, "exact_duplicates": False, "near_duplicates": False}
    curate(params(**off, columns=[{"column": "token_count", "max": 9}]))
    docs = TOKENS / tokens().shards[0].docs_name
    index = np.load(docs)
    index[-1, 1] = 59
    docs.unlink()
    np.save(docs, index)
    with pytest.raises(DataFault, match=re.escape(f"{docs}: ")):
        verify(RAW, TOKENS, VerifyParams(retokenize=0), Machine(), SELECTION)


def edit_manifest(edit: Callable[[dict[str, Any]], None]) -> None:
    value = atomic.read_sealed(SELECTION / NAME)
    edit(value)
    (SELECTION / NAME).unlink()
    atomic.write_json(SELECTION / NAME, atomic.sealed(value))


def test_tasks_are_found_and_dropped_if_asked(here: Path) -> None:
    rows = some_rows(20)
    planted = str(rows[4]["text"]).split()
    tasks = [" ".join(planted[20:40]), " ".join(planted[50:58]), "too short", "x " * 30]
    Path("tasks.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in tasks))
    write_source(RAW, rows, [])
    rules = {"columns": [], "filters": {}, "decontaminate": ["tasks.jsonl"]}
    off = {"exact_duplicates": False, "near_duplicates": False}
    found = curate(params(**rules, **off)).found
    copies = {row for row, entry in enumerate(rows) if entry["text"] == rows[4]["text"]}
    assert found["tasks_found"] == 2
    assert found["tasks_too_short"] == 1
    assert found["contaminated_rows"] >= len(copies)
    unclean = SelectionManifest.load(SELECTION).unclean_tasks
    assert unclean.keys() == {"tasks.jsonl/0", "tasks.jsonl/1", "tasks.jsonl/2"}
    shares = [unclean["tasks.jsonl/0"] or 0, unclean["tasks.jsonl/1"] or 0]
    assert len(copies) <= min(shares) <= max(shares) == found["contaminated_rows"]
    assert dropped() == {}
    curate(params(**rules, **off, contaminated="drop"))
    assert copies <= dropped().keys()
    assert dropped()[4][:3] == ("contamination", 8.0, "tasks.jsonl/0")
    assert SelectionManifest.load(SELECTION).unclean_tasks == {"tasks.jsonl/2": None}


def test_training_rows_near_a_validation_row_are_counted_and_dropped_if_asked(here: Path) -> None:
    """Each text has one near copy, in either split."""
    draw = random.Random(5)
    texts = [document(draw) for _ in range(40)]
    texts += [text.replace(" the ", " a ", 1) for text in texts]
    write_source(RAW, [{"text": text} for text in texts], [33])
    near = {row for row in range(80) if not is_val(texts[row]) and is_val(texts[(row + 40) % 80])}
    assert any(row < 40 for row in near)
    assert any(row >= 40 for row in near)
    rules: dict[str, Any] = {"columns": [], "filters": {}, "exact_duplicates": False}
    assert curate(params(**rules)).found["training_rows_near_validation"] == len(near)
    for near_duplicates in (False, True):
        curate(params(**rules, near_duplicates=near_duplicates, val_copies="drop"))
        entries = dropped().items()
        assert {row for row, entry in entries if entry[0] == "validation_copies"} == near
        assert all(entry[3] == (row + 40) % 80 for row, entry in entries)
        assert (len(entries) > len(near)) == near_duplicates


def test_copies_are_looked_for_within_each_dump_and_not_among_too_many_rows(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(RAW, some_rows(), [25])
    rules: dict[str, Any] = {"columns": [], "filters": {}}
    curate(params(**rules, scope="dump"))
    within = dropped()
    assert all((row - entry[3]) % 2 == 0 for row, entry in within.items())
    monkeypatch.setattr(curate_stage, "MAX_ROWS", 40)
    curate(params(**rules, scope="dump"))  # one dump after the other
    assert dropped() == within
    with pytest.raises(UserError, match=r"curate: 60 rows.*curate\.scope: dump"):
        curate(params(**rules))
    monkeypatch.setattr(curate_stage, "MAX_ROWS", 20)
    with pytest.raises(UserError, match=r"curate: 30 rows of dump dump-0"):
        curate(params(**rules, scope="dump"))
    monkeypatch.setattr(curate_stage, "MAX_SOURCE_ROWS", 59)
    with pytest.raises(UserError, match=r"curate: .*60 rows"):
        curate(params(scope="dump"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"filters": {"fineweb": {"max_newline": 1}}}, "curate.filters.fineweb.max_newline: "),
        ({"columns": [{"column": "nothing", "min": 1}]}, "curate: .*'nothing'"),
        ({"columns": [{"column": "language", "min": 1}]}, "curate.columns: .*'language'"),
        ({"columns": [{"column": "language", "in": [1]}]}, "curate.columns: .*'language'"),
        ({"columns": [{"column": "token_count", "in": [10**30]}]}, "curate.columns: .*'token_co"),
        ({"columns": [{"column": "language", "in": ["\ud800"]}]}, "curate.columns: .*'language'"),
        ({"columns": [{"column": "language_score", "in": ["a"]}]}, "curate.columns: .*'language_s"),
        ({"columns": [{"column": "language_score", "min": 2}]}, "curate: drops every row"),
        ({"decontaminate": ["no.jsonl"]}, "no.jsonl: "),
    ],
)
def test_rules_that_do_not_fit_the_source_are_refused(
    here: Path, changes: dict[str, Any], named: str
) -> None:
    write_source(RAW, some_rows(8), [])
    rules = {"filters": {}, "columns": [], "near_duplicates": False, "exact_duplicates": False}
    with pytest.raises(UserError, match=named):
        curate(params(**{**rules, **changes}))
    assert not SELECTION.exists()


def test_a_missing_column_among_thousands_is_named_in_a_short_line(here: Path) -> None:
    RAW.mkdir(parents=True)
    path = RAW / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], **{f"c{i}\x1b[31m": [1] for i in range(999)}}), path)
    write_manifest(RAW, [describe(path, 1)])
    with pytest.raises(UserError, match="'score'") as error:
        curate(params(columns=[{"column": "score", "min": 1}]))
    assert len(str(error.value)) < 400
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"columns": [{"column": "a"}]}, "curate.columns.0"),
        ({"columns": [{"column": "a", "min": 2, "max": 1}]}, "curate.columns.0"),
        ({"columns": [{"column": "a", "in": []}]}, "curate.columns.0.in"),
        ({"filters": {"gopher": {}}}, "curate.filters.gopher"),
        ({"bands": 15}, "curate"),
        ({"clusters": "components"}, "curate"),
        ({"contamination_words": 5}, "curate.contamination_words"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(key)}\b"):
        validate(CurateParams, {**RULES, **changes}, "curate")


def test_rows_and_rules_are_explained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = some_rows()
    rows[5]["text"] = f"\x1b[31m{rows[5]['text']}"  # a terminal command
    write_source(RAW, rows, [25])
    curate(params())
    ledger = dropped()
    row = next(row for row, entry in ledger.items() if entry[3] is not None and row >= 25)
    main(["--why", "part-001.parquet", str(row - 25)])
    shown = capsys.readouterr().out
    assert ledger[row][0] in shown
    twin = ledger[row][3]
    place = ("part-000.parquet", twin) if twin < 25 else ("part-001.parquet", twin - 25)
    assert f"{place[0]}, row {place[1]}" in shown
    assert "gopher_quality.min_words" in shown
    main(["--why", "part-000.parquet", "5"])
    assert "\x1b" not in capsys.readouterr().out
    for rule in ("near_duplicates", "exact_duplicates", "columns.language", "fineweb.max_newlines"):
        main(["--sample", rule, "2"])
        assert capsys.readouterr().out.startswith(rule)
    main(["--sample", "columns.language_score", "2"])
    shown = capsys.readouterr().out
    assert shown.count("narrowly kept") == shown.count("== dropped") == 2
    for wrong in (
        ["--why", "no", "1"],
        ["--why", "part-000.parquet", "25"],
        ["--sample", "no", "1"],
    ):
        with pytest.raises(UserError, match=wrong[0]):
            main(wrong)
    for refused in (
        ["--why", "part-000.parquet", "1", "--sample", "near_duplicates", "1"],
        ["--why", "part-000.parquet", "9" * 19],
        ["--why", "part-000.parquet", "-1"],
        ["--sample", "near_duplicates", "x"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(refused)
        assert exit_.value.code == 2
    capsys.readouterr()


def test_examples_are_nearest_to_either_end_of_a_range(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"text {i}", "token_count": i} for i in range(60)]
    write_source(RAW, rows, [25])
    off: dict[str, Any] = {"filters": {}, "exact_duplicates": False, "near_duplicates": False}
    curate(params(**off, columns=[{"column": "token_count", "min": 10, "max": 40}]))
    main(["--sample", "columns.token_count", "3"])
    shown = capsys.readouterr().out
    assert re.findall(r"dropped: .*\((\d+)\)", shown) == ["9", "41", "8"]
    assert re.findall(r"narrowly kept: .*, (\d+)$", shown, re.MULTILINE) == ["10", "40", "11"]
    edit_manifest(lambda value: value["params"].update(gone=1))
    for command in (["--why", "part-000.parquet", "1"], ["--sample", "columns.token_count", "1"]):
        with pytest.raises(UserError, match=f"{SELECTION / NAME}: params"):
            main(command)


@pytest.mark.parametrize("suffix", ["kept.npy", "ledger.parquet"])
def test_damaged_selections_are_named_by_all_that_read_them(here: Path, suffix: str) -> None:
    """Also a file that is readable: the ledger of another selection, all bits set."""
    write_source(RAW, some_rows(), [25])
    curate(params())
    path = SELECTION / f"00001.{suffix}"
    if suffix == "kept.npy":
        values = np.full_like(np.load(path), 255)
        path.unlink()
        np.save(path, values)
        readers: list[Callable[[], Any]] = [
            tokens,
            lambda: main(["--sample", "columns.language_score", "2"]),
        ]
    else:
        entries = [{**entry, "twin_file": 7} for entry in pq.read_table(path).to_pylist()]
        path.unlink()
        pq.write_table(pa.Table.from_pylist(entries, schema=LEDGER_SCHEMA), path)
        readers = [
            lambda: main(["--why", "part-001.parquet", "1"]),
            lambda: main(["--sample", "columns.language", "2"]),
        ]
    for read in readers:
        with pytest.raises(UserError, match=re.escape(str(path))):
            read()


def test_each_kind_of_piece_depends_on_all_code_that_decides_it() -> None:
    """The keys cover the modules, and those that these import within the room."""
    room = "pipeline/curate/"
    starts = {"columns": "piece_files", "measures": "heuristics", "contamination": "decontaminate",
              "texts": "near_duplicates", "signatures": "signatures", "bands": "near_duplicates",
              "shingles": "signatures"}  # fmt: skip
    assert starts.keys() == measure_chunk.MODULES.keys()
    for kind, start in starts.items():
        needed = {name for name in reached(f"{room}{start}.py") if name.startswith(room)}
        listed = {f"{room}{name}" for name in measure_chunk.MODULES[kind]}
        assert needed | {f"{room}measure_chunk.py"} <= listed, kind
        assert all((REPO / name).exists() for name in listed)


@pytest.mark.soak
def test_workers_kills_and_shipped_data_change_nothing(tmp_path: Path, small_raw: Path) -> None:
    """The real commands on real Ray; with 2 and 4 workers killed at 20 numbers of pieces."""
    kills = range(1, 21)
    rows, found, shards = some_rows(30 * kills[-1], seed=3), [], []
    for number, workers in enumerate("124"):
        folder = tmp_path / workers
        folder.mkdir()
        project = Project(folder, small_raw)
        shutil.rmtree(folder / RAW)
        write_source(folder / RAW, rows, [25, 130])
        params_file, module = folder / "params.yaml", folder / "pipeline/curate/measure_chunk.py"
        text = params_file.read_text().replace("curate: {}", f"curate: {json.dumps(RULES)}")
        params_file.write_text(text)
        module.write_text(re.sub("CHUNK_TOKENS = .*", "CHUNK_TOKENS = 4_000", module.read_text()))
        variables = {"GPT2_WORKERS": workers, "GPT2_DATA": ("shared", "ship")[number % 2]}
        for pieces in kills[number - 1 :: 2] if number else ():
            process = subprocess.Popen(
                project.command("curate"), cwd=folder, env=project.environment(**variables),
                start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            folders = functools.partial((folder / ".work").glob, "signatures/*")
            wait_for(lambda: len([*folders()]) >= pieces or process.poll() is not None, 60)  # noqa: B023
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        for stage in ("curate", "tokenize"):
            result = project.run(stage, **variables)
            assert result.returncode == 0, result
        found.append(hashes(folder / SELECTION))
        shards.append(hashes(folder / TOKENS))
    assert found[0] == found[1] == found[2]
    assert shards[0] == shards[1] == shards[2]
    assert len(found[0]) == 7
