"""Tests for the measured speed: a pilot is long enough, and compiled as the run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.runtime.machine import Machine
from train.params import TrainParams
from train.study import pilot, study_file
from train.study.definition import Study
from train.study.results import Results


class Space:
    """A workspace on a machine with a known speed, on which long runs are compiled."""

    def __init__(self, seconds: float, *, long: bool) -> None:
        self.seconds, self.long = seconds, long
        self.runs: list[tuple[int, str | None]] = []

    def reproduce(
        self, params: dict[str, Any], stage: str, name: str, environment: dict[str, str]
    ) -> None:
        train = TrainParams.model_validate(params["train"])
        self.runs.append((train.steps, environment.get("GPT2_COMPILE")))

    def python(self, code: str, *args: str, environment: dict[str, str]) -> str:
        steps, setting = self.runs[-1]
        compiled = setting == "true"
        step = self.seconds / (4 if compiled else 1)
        found = {"seconds": round(steps * step, 3), "seconds_per_step": step}
        return json.dumps(found | {"compiled": compiled, "compile": self.long or compiled})


@pytest.mark.parametrize("seconds", [0.0004, 0.02, 3.0])
@pytest.mark.parametrize("long", [False, True])
def test_a_pilot_is_long_enough_and_compiled_as_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, long: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Study, "code_key", "x")
    monkeypatch.setattr(study_file, "study_files", lambda: {"one": tmp_path / "one.yaml"})
    variants = {"a": {}, "b": {"train.learning_rate": 1e-3}}
    with open("one.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump({"variants": variants, "budget": {"seconds": 100}}, file)
    study, results = study_file.load("one"), Results(tmp_path, Machine())
    monkeypatch.setattr(Results, "speed_settings", {"cpu": "a processor"})
    space = Space(seconds, long=long)
    pilot.measure(study, results, space, "a")  # type: ignore[arg-type]
    speed = results.speed(study, "a")
    assert speed is not None
    assert speed["seconds"] >= pilot.SECONDS
    assert speed["compiled"] is long
    assert len(set(space.runs)) == len(space.runs)
    assert len({steps for steps, _ in space.runs}) == len(space.runs)  # DVC runs each
    pilot.measure(study, results, space, "a")  # type: ignore[arg-type]
    steps = study.parameters("a", 1, speed["seconds_per_step"])["train"]["steps"]
    assert steps == int(100 / (seconds / (4 if long else 1)))
    monkeypatch.setattr(Results, "speed_settings", {"gpu": "a GPU"})
    assert results.speed(study, "a") is None
