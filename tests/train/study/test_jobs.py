"""Tests for runs at the same time."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.runtime.machine import Machine
from train.study import runner, study_file
from train.study.definition import Planned, Study
from train.study.results import Results

DEDUP = {"curate.exact_duplicates": True}


class Space:
    """In the place of a workspace."""

    def terminate(self) -> None:
        """There is nothing to end."""


@pytest.mark.parametrize("dataset_keys", [("same", "same"), ("one", "other")])
def test_two_runs_that_end_with_the_same_weights_do_not_train_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_keys: tuple[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Study, "code_key", "x")
    monkeypatch.setattr(study_file, "study_files", lambda: {"one": tmp_path / "one.yaml"})
    Path("text.jsonl").write_text('{"text": "some text"}')
    keys: dict[str, Any] = {"base": "smoke", "variants": {"raw": {}, "dedup": DEDUP}}
    keys |= {"seeds": 3, "budget": {"tokens": 20_480}, "held_out": "text.jsonl"}
    with open("one.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(keys, file)
    study, results = study_file.load("one"), Results(tmp_path / "studies", Machine())
    for variant, dataset_key in zip(study.variants, dataset_keys, strict=True):
        results.write("data", runner.data_key(study, variant), {"dataset_key": dataset_key})
    running: list[int] = []
    together, lock = set(), threading.Lock()

    def run_one(study: Study, results: Results, space: Space, run: Planned) -> str:
        with lock:
            together.add(run.seed in running)
            running.append(run.seed)
        time.sleep(0.2)
        with lock:
            running.remove(run.seed)
        return "done"

    monkeypatch.setattr(runner, "_run_one", run_one)
    spaces: list[Any] = [Space(), Space()]
    runner._run_all(study, results, spaces, runner.missing(study, results) or [])
    assert (True in together) == (dataset_keys == ("one", "other"))
