"""Tests for the reader of a log that grows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.monitor import history
from train.monitor.history import History
from train.report.run_log import Log, LogReader


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("lines"), st.integers(1, 6)),
            st.tuples(st.just("half a line"), st.integers(1, 90)),
            st.tuples(st.just("damage"), st.binary(max_size=30)),
            st.tuples(st.just("replaced"), st.integers(0, 12)),
            st.tuples(st.just("truncated"), st.integers(0, 2000)),
        ),
        max_size=12,
    )
)
def test_a_reading_is_the_log_as_it_is(changes: list[tuple[str, int | bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, number = Path(folder) / "log.jsonl", 0
        path.touch()
        reader = LogReader(path)
        for change, value in changes:
            if isinstance(value, bytes):
                added = value
            elif change == "truncated":
                path.write_bytes(path.read_bytes()[:value])
                added = b""
            elif change == "replaced":  # as by a run that resumes
                with History(path, path.parent / "live") as resumed:
                    resumed.records = resumed.records[:value]
                    path.unlink()
                    path.write_bytes(resumed.content())
                added = b""
            else:
                records = [{"step": number + i, "train/loss": 0.5, "lr": 1e-3} for i in range(6)]
                number += 6
                written = History(path.parent / "none", path.parent)
                written.records = records
                content = written.content()
                lines = content.splitlines(keepends=True)
                added = content[:value] if change == "half a line" else b"".join(lines[:value])
            with open(path, "ab") as file:
                file.write(added)
            assert reader.read() == Log.parse(path.read_bytes())


def test_what_was_read_is_not_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    parse = history.parse

    def counted(data: bytes, name: str = "") -> list[history.Record]:
        parsed.append(len(parse(data, name)))
        return parse(data, name)

    path = tmp_path / "log.jsonl"
    reader = LogReader(path)
    with pytest.raises(FileNotFoundError):
        reader.read()
    with History(path, tmp_path / "live") as log:
        log.begin(0)
        for step in range(1, 30):
            log.add({"step": step, "train/loss": 1 / step, "seconds": step * 1.5})
        assert len(reader.read().records) == 29
        monkeypatch.setattr(history, "parse", counted)
        log.add({"step": 30, "train/loss": 0.0})
        assert len(reader.read().records) == 30
        assert sum(parsed) == 1
    with History(path, tmp_path / "live") as log:
        log.begin(20)
        parsed.clear()
        assert len(reader.read().records) == sum(parsed) == 20
        log.add({"step": 21, "train/loss": 5.0})
        assert reader.read().curve("train/loss")[1][-1] == 5.0
        assert sum(parsed) == 21
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reader.read()
    path.write_bytes(b"")
    assert reader.read() == Log([])
