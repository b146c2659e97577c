"""Tests for train.monitor.history: the log, and the curves written from it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.damage import FEW, JSON_VALUES, damaged
from train.monitor.history import History, parse


def curve(folder: Path, name: str) -> list[list[str]]:
    text = (folder / f"plots/metrics/{name}.tsv").read_text()
    return [line.split("\t") for line in text.splitlines()]


def test_a_resumed_run_truncates_the_log_and_rewrites_the_curves(tmp_path: Path) -> None:
    log, live = tmp_path / "log.jsonl", tmp_path / "live"
    with History(log, live) as history:
        history.begin(0)
        for step in (1, 2, 3):
            history.add({"step": step, "train/loss": step / 2, "lr": 1e-3})
        history.add({"step": 3, "val/loss": 9.0})
        history.sync()
    with open(log, "a") as file:
        file.write('{"step": 4, "tr')  # cut by a crash

    with History(log, live) as history:
        assert history.last("train/loss", 2) == [1.0, 1.5]
        history.begin(2)
        history.add({"step": 3, "train/loss": 7.0, "lr": 1e-3})
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert curve(live, "train/loss") == [["step", "loss"], ["1", "0.5"], ["2", "1.0"], ["3", "7.0"]]
    assert not (live / "plots/metrics/val/loss.tsv").exists()
    assert json.loads((live / "metrics.json").read_text())["step"] == 3

    history = History(log, tmp_path / "again")
    history.draw(3)
    assert curve(tmp_path / "again", "train/loss") == curve(live, "train/loss")


def test_only_losses_of_sources_are_drawn_into_files(tmp_path: Path) -> None:
    history = History(tmp_path / "log.jsonl", tmp_path / "live")
    names = ["web", "../../../../../evil", "a/b", "a\n"]
    history.records = [{"step": 1, **{f"val/source/{name}": 1.0 for name in names}}]
    history.draw(1)
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tsv")]
    assert found == ["live/plots/metrics/val/source/web.tsv"]


def test_a_history_that_is_never_begun_writes_nothing(tmp_path: Path) -> None:
    with History(tmp_path / "log.jsonl", tmp_path / "live") as history:
        assert history.last("seconds") == []
        history.sync()
    assert list(tmp_path.iterdir()) == []


def test_damaged_lines_are_named_and_others_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    with History(log, tmp_path / "live") as history:
        history.begin(0)
        for step in (1, 2, 3, 4):
            history.add({"step": step, "train/loss": step / 2})
    good = log.read_bytes()
    lines = good.splitlines(keepends=True)
    first = len(lines[0])
    for at in range(first, first + len(lines[1])):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        records = parse(bytes(bad), "name.jsonl")
        kept = {record["step"]: record["train/loss"] for record in records}
        # A changed line end takes the next line with it. Names and values are checked alike.
        assert {1: 0.5, 4: 2.0}.items() <= kept.items() <= {1: 0.5, 2: 1, 3: 1.5, 4: 2}.items()
        assert ("name.jsonl: " in capsys.readouterr().err) == (len(kept) < 4)
        assert kept.get(2) is None or b"crc32" not in bytes(bad).splitlines()[1]


def test_log_that_is_cut_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    with History(log, tmp_path / "live", every=10) as history:
        history.begin(0)
        for step in (1, 10, 20, 30):
            history.add({"step": step, "lr": 1.0})
    for step, cut in ((39, False), (41, True)):
        capsys.readouterr()
        with History(log, tmp_path / "live", every=10) as history:
            history.begin(step)
        assert (f"{log}: ends at step 30" in capsys.readouterr().err) == cut


LINE = b'{"crc32": "5a3c5e0f", "lr": 0.5, "step": 1}\n{"sample": [1, 2], "step": 1}\n'


@FEW
@given(damaged(LINE), st.dictionaries(st.sampled_from(["step", "lr", "sample"]), JSON_VALUES))
def test_any_bytes_are_records_that_can_be_drawn(content: bytes, values: dict[str, object]) -> None:
    for record in parse(json.dumps(values).encode() + b"\n" + content, "log"):
        assert type(record["step"]) is int
        for name, value in record.items():
            numbers = value if name == "sample" else [value]
            assert {type(number) for number in numbers} <= {int, float}
