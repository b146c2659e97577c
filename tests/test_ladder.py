"""The ladder's statistics on planted numbers, and its harness on two tiny runs."""

import json

import numpy as np
import pytest

from tests.benchmarks import ladder
from tests.benchmarks.ladder_tables import Noise, Size, draw, effects, effects_table, fill, holm
from tests.support.training import Project
from train.params import ModelParams, TrainParams

NOISE = 0.01


def planted(rng, shifts, seeds=3):
    """Losses of rungs: 7, plus a rung's shift, plus a large effect of the seed, plus noise."""
    seed = rng.normal(0, 0.5, seeds)
    return {
        name: list(7 + shift + seed + rng.normal(0, NOISE, seeds)) for name, shift in shifts.items()
    }


def test_planted_effects_are_found_and_others_are_not():
    shifts = {"base": 0, "better": -0.1, "worse": 0.1, "same": 0, "also the same": 0}
    losses = planted(np.random.default_rng(0), shifts)
    found = effects(losses, {name: "base" for name in shifts if name != "base"})
    verdicts = {effect.rung: effect.verdict for effect in found}
    none = "no effect measured"
    assert verdicts == {"better": "helped", "worse": "hurt", "same": none, "also the same": none}
    assert [e.difference for e in found[:2]] == pytest.approx([-0.1, 0.1], abs=4 * NOISE)


def test_false_effects_are_as_rare_as_p_says():
    rng, tables, names = np.random.default_rng(1), 400, "abcdef"
    wrong = sum(
        any(e.p < 0.1 for e in effects(planted(rng, dict.fromkeys(names, 0)), bases))
        for bases in [dict.fromkeys(names[1:], "a")]
        for _ in range(tables)
    )
    assert 0.02 < wrong / tables < 0.13


def test_noise_is_what_rung_and_seed_leave():
    noise = Noise.of(planted(np.random.default_rng(2), dict.fromkeys("abcdefghijklmnopqrst", 0), 8))
    assert noise.sigma == pytest.approx(NOISE, rel=0.15)
    assert noise.degrees == 19 * 7
    assert noise.p(0) == 1


def test_holm_on_a_published_example():  # its steps by hand: 4 * .005, 3 * .01, 2 * .03, max
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def result(rung, seed, train, step_cpu=1.0):
    return {
        "rung": rung, "params": {"seed": seed, "batch_tokens": 8}, "loss": train[-1],
        "train": list(enumerate(train, 1)), "step_cpu": step_cpu,
    }  # fmt: skip


def test_step_at_which_a_rung_reaches_a_loss(tmp_path):
    falling = np.linspace(9, 5, 101)
    size = Size([result("slow", s, 0.5 * falling + 4) for s in (1, 2)]
                + [result("fast", s, falling, 2.0) for s in (2, 1)]
                + [result("unfinished", 1, falling)])  # fmt: skip
    assert list(size.losses) == ["slow", "fast"]
    step = size.reached("fast", 7.0)
    assert step is not None
    assert np.mean(falling[step - 20 : step]) <= 7.0 < np.mean(falling[step - 21 : step - 1])
    assert size.reached("slow", 6.0) is None
    size.losses["slow"][0] += 0.01
    assert "| 2.00 |" in effects_table(size, {"fast": "slow", "missing": "slow"})
    draw({"small": size}, ("slow", "fast", "missing"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_page_is_filled_between_its_markers():
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert fill(page, {"x": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError):
        fill(page, {"y": "new"})


def test_all_recipes_are_valid_and_each_changes_something():
    keys = set()
    trials = [*ladder.trials(list(ladder.SIZES)), *ladder.search()]
    for trial in trials:
        model, train = ladder.sections(trial.params)
        ModelParams.model_validate(model)
        TrainParams.model_validate(train)
        keys.add(trial.key("data"))
    searched = sum(
        ladder.changes(name)["learning_rate"] in rates for name, rates in ladder.SEARCHED.items()
    )
    assert searched == len(ladder.SEARCHED)  # the rungs use one of the rates that were tried
    assert len(keys) == len(trials)


def test_two_runs_and_their_result(tmp_path, monkeypatch):
    Project(tmp_path).write_data()
    tiny = {
        "size": None, "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "steps": 4,
        "batch_tokens": 32, "learning_rate": 0.01, "val_every": 4, "val_tokens": 64, "seed": 1,
        "checkpoint_every": 2, "keep_every": 2, "sample_tokens": 0, "log_every": 1,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, value in ladder.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    results = []
    for average in (0, 2):
        trial = ladder.Trial("rung", "small", tiny, average)
        path = ladder.result_path(tmp_path, "data", trial)
        ladder.train_trial(tmp_path, trial, path)
        results.append(json.loads(path.read_text()))
        ladder.measure(tmp_path, "data", [trial], jobs=1)  # trains nothing
        assert ladder.finished(tmp_path, "data", [trial]) == [results[-1]]
    last, averaged = results
    assert last["train"] == averaged["train"]  # the same run
    assert last["loss"] == last["val"][-1][1] != averaged["loss"]
    assert averaged["loss"] == pytest.approx(last["loss"], abs=0.5)
    assert len(last["train"]) == 4
    assert last["step_cpu"] > 0
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left of finished runs
