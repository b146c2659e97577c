"""Tests for verdicts: what is claimed of results that are missing, diverged, or of two machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from train.study import findings, page, study_file
from train.study.definition import Study
from train.study.findings import Findings
from train.study.results import Results

N = 6
CPU = {"cpu": "a processor", "torch": "2.13"}
GPU = {"gpu": "a GPU", "torch": "2.13"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Study, "code_key", "x")
    monkeypatch.setattr(study_file, "study_files", lambda: {"one": tmp_path / "one.yaml"})
    with open("one.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(
            {
                "base": "smoke",
                "variants": {"a": {}, "b": {"train.learning_rate": 1e-3}},
                "seeds": N,
                "budget": {"tokens": 20_480},
            },
            file,
        )
    return Results(tmp_path / "studies", Machine())


def find(
    results: Results, changes: Mapping[tuple[str, int], dict[str, Any] | None] = {}
) -> Findings:
    """Results in which b is better by 0.1; without those of None."""
    study = study_file.load("one")
    for seed in study.seeds:
        for variant in study.variants:
            run, change = study.run(variant, seed), changes.get((variant, seed), {})
            value = 2.0 + 0.01 * seed - (0.1 + 0.001 * seed) * (variant == "b")
            training = {"seconds": 1.0, "val_loss": 3.0, "validations": [[1, 3.0]]}
            record: dict[str, Any] = {
                "name": run.experiment,
                "evaluation": {"bits_per_byte": value},
            }
            record |= {"training": training, "dataset_key": "d", "environments": [CPU]}
            if change is not None:
                results.write("results", run.key, change if "failed" in change else record | change)
    found = findings.find(study, results)
    assert page.render(found)
    return found


FAILED = {"failed": "loss nan at step 3"}


def test_a_variant_that_diverges_is_not_claimed_to_be_better(results: Results) -> None:
    assert find(results).comparisons[0].better == "b"
    (found,) = find(results, {("b", 2): FAILED}).comparisons
    assert (found.better, found.result.n) == (None, N - 1)
    assert found.p is not None
    assert found.p < 0.01
    assert "one-b-2" in found.sentence
    (found,) = find(results, {("a", 2): FAILED, ("b", 2): {}}).comparisons
    assert found.better == "b"  # the worse one diverges


def test_nothing_is_claimed_before_all_runs_are_finished(results: Results) -> None:
    found = find(results, {("a", N): None})
    assert found.unfinished == 1
    assert (found.comparisons[0].better, found.comparisons[0].preliminary) == (None, True)
    assert found.as_json()["comparisons"][0]["preliminary"] is True
    found = find(results)
    assert (found.comparisons[0].better, found.comparisons[0].preliminary) == ("b", False)


def test_a_pair_on_two_machines_is_no_pair_and_both_are_named(results: Results) -> None:
    found = find(results, {("b", 1): {"environments": [GPU]}})
    assert found.comparisons[0].result.n == N - 1
    assert len(found.environments) == 2
    assert any("a GPU" in line and "a processor" in line for line in found.verdicts())
    both = {(variant, 1): {"environments": [GPU]} for variant in ("a", "b")}
    assert find(results, both).comparisons[0].result.n == N


def test_all_in_which_machines_differ_is_named(results: Results) -> None:
    found = find(results, {("b", 1): {"environments": [{**CPU, "flags": "avx2 fma"}]}})
    assert found.comparisons[0].result.n == N - 1
    assert len(found.environments) == 2
    assert any("avx2 fma" in line for line in found.verdicts())
    resumed = find(results, {("b", 1): {"environments": [GPU, CPU]}})  # begun on another machine
    assert resumed.comparisons[0].result.n == N - 1


def test_an_empty_result_is_none(results: Results) -> None:
    find(results)
    study = study_file.load("one")
    path = results.folder / "results" / f"{study.run('a', 1).key}.json"
    path.write_text("{}")
    assert findings.find(study, results).unfinished == 1


def test_no_number_of_seeds_is_named_for_a_difference_of_nothing(results: Results) -> None:
    noise = [0.02, -0.02, 0.01, -0.01, 0.03, -0.03]
    values = {
        (variant, seed): {"evaluation": {"bits_per_byte": 2.0 + noise[seed - 1] * (variant == "b")}}
        for variant in ("a", "b")
        for seed in range(1, N + 1)
    }
    (found,) = find(results, values).comparisons
    assert found.more_seeds is None
    assert "set resolve" in found.sentence


def test_other_data_of_the_same_parameters_is_refused(results: Results) -> None:
    with pytest.raises(UserError, match=r"variants\.b"):
        find(results, {("b", N): {"dataset_key": "other"}})
    with pytest.raises(UserError, match=r"variants\.b"):
        find(results, {("b", seed): {"dataset_key": "other"} for seed in range(1, N + 1)})
