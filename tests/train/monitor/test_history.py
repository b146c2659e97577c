"""Tests for train.monitor.history: the log, and the curves written from it."""

import json
from pathlib import Path

from train.monitor.history import History


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
    history.draw()
    assert curve(tmp_path / "again", "train/loss") == curve(live, "train/loss")


def test_a_history_that_is_never_begun_writes_nothing(tmp_path: Path) -> None:
    with History(tmp_path / "log.jsonl", tmp_path / "live") as history:
        assert history.last("seconds") == []
        history.sync()
    assert list(tmp_path.iterdir()) == []
