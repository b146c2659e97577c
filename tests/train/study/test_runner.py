"""Tests for studies as users run them: real experiments in a clone, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.format import tokenizer
from pipeline.format.shards import open_shard, read_docs
from pipeline.store import atomic
from tests.support.clone import Clone, make_clone, stages_run
from tests.support.small_data import hashes
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(1800)

STUDY: dict[str, Any] = {
    "base": "smoke",
    "variants": {"cold": {"train.learning_rate": 1e-4}, "warm": {"train.learning_rate": 8e-3}},
    "params": {"train.sample_tokens": 0, "evaluate.samples": 0},
    "budget": {"tokens": 6144},
    "held_out": "data/held-out.txt",
}
COMMAND = (sys.executable, "-m", "train.study", "one")


def make(folder: Path, **keys: Any) -> Clone:
    """A clone with a study, and with changes of the user that are not committed."""
    clone = make_clone(folder, "smoke")
    write(clone, **keys)
    (clone.folder / "data").mkdir()
    (clone.folder / "data/held-out.txt").write_text("The people of the Union are well. " * 60)
    line = json.dumps({"text": "The people of the Union are well. " * 60})
    (clone.folder / "data/held-out.jsonl").write_text(line)
    with open(clone.folder / "params.yaml", "a") as file:
        file.write("# a line of the user\n")
    return clone


def write(clone: Clone, **keys: Any) -> None:
    with open(clone.folder / "train/studies/one.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump({**STUDY, **keys}, file)


def finished(clone: Clone) -> dict[str, tuple[int, int]]:
    """Inode and time of each result: they change if a run is done again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in results_of(clone)}


def results_of(clone: Clone) -> list[Path]:
    return [*(clone.folder / ".work/studies/one/results").glob("[!.]*.json")]


def kill(clone: Clone, runs: int) -> None:
    """Start the study, and kill it and all that it started when so many runs are finished."""
    process = clone.start(*COMMAND)
    try:
        wait_for(lambda: len(finished(clone)) >= runs or process.poll() is not None, 500)
        assert process.poll() is None, clone.log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def report(clone: Clone, **env: str) -> dict[str, Any]:
    """The report as data, without the times of the machine."""
    found: dict[str, Any] = json.loads(clone.run(*COMMAND, "--json", status=0, **env))
    del found["training_seconds"]
    for variant in found["variants"].values():
        del variant["training_seconds"]
    return found


@pytest.mark.soak
def test_a_study_is_experiments_that_dvc_applies_and_changes_nothing_of_the_users(
    tmp_path: Path,
) -> None:
    clone = make(tmp_path / "project", seeds=1)
    head, params = clone.git("rev-parse", "HEAD"), (clone.folder / "params.yaml").read_text()
    clone.run(*COMMAND)
    assert clone.git("rev-parse", "HEAD") == head
    assert (clone.folder / "params.yaml").read_text() == params
    assert clone.git("stash", "list") == ""
    assert clone.git("status", "--porcelain").split() == [
        *("M", "params.yaml"),
        *("??", "train/studies/one.yaml"),
    ]
    assert not (clone.folder / ".work/studies/one/tree-0").exists()
    results = [json.loads(path.read_text()) for path in results_of(clone)]
    assert {one["name"] for one in results} == {"one-cold-1", "one-warm-1"}
    # An experiment is complete: DVC has all outs up to the evaluation, and none of other runs.
    clone.git("checkout", "-q", "params.yaml")
    clone.run("dvc", "exp", "apply", "one-warm-1")
    (warm,) = (one["evaluation"] for one in results if one["name"] == "one-warm-1")
    assert atomic.read_sealed(clone.folder / "artifacts/evaluation.json") == warm
    assert (clone.folder / "artifacts/checkpoint/model.safetensors").exists()
    assert not [*(clone.folder / "artifacts/hf").glob("*")]
    assert stages_run(clone.run("dvc", "repro", "--dry")) == {"export", "report"}


@pytest.mark.soak
def test_a_killed_study_resumes_and_reports_the_same(tmp_path: Path) -> None:
    clone = make(tmp_path / "project", seeds=1)
    before = hashes(clone.folder)
    assert "0 of 2" in clone.run(*COMMAND, "--status", PYTHONDONTWRITEBYTECODE="1")
    assert hashes(clone.folder) == before  # nothing is written
    kill(clone, 1)
    done = finished(clone)
    output = clone.run(*COMMAND)
    assert "one-warm-1: " in output
    assert "one-cold-1: " not in output
    assert done.items() <= finished(clone).items()
    assert len(finished(clone)) == 2
    page = (clone.folder / "artifacts/study.html").read_bytes()
    assert "one-warm-1: " not in clone.run(*COMMAND)  # all is finished
    clone.run(*COMMAND, "--report")
    assert (clone.folder / "artifacts/study.html").read_bytes() == page
    found = report(clone)
    results = {name: one["results"][0] for name, one in found["variants"].items()}
    assert results["warm"] < results["cold"]
    (comparison,) = found["comparisons"]
    assert (comparison["n"], comparison["better"]) == (1, None)  # one seed says nothing
    # Experiments of DVC, and nothing else.
    shown = json.loads(clone.run("dvc", "exp", "show", "--json"))
    experiments = {exp["name"]: exp for entry in shown for exp in entry.get("experiments") or []}
    assert set(experiments) == {"one-cold-1", "one-warm-1"}
    metrics = experiments["one-warm-1"]["revs"][0]["data"]["metrics"]["metrics/eval.json"]["data"]
    assert metrics["held_out_bits_per_byte"] == results["warm"]
    # Documents of the held-out text that are training documents are refused.
    clone.git("checkout", "-q", "params.yaml")
    clone.run("dvc", "exp", "apply", "one-warm-1")
    shard = clone.folder / "data/tokens/train-00000.bin"
    first, second = read_docs(shard)[:2, 0]
    text = tokenizer.decode(open_shard(shard)[first + 1 : second].tolist())
    (clone.folder / "data/in.jsonl").write_text(json.dumps({"text": text}))
    write(clone, seeds=1, held_out="data/in.jsonl")
    (line,) = [x for x in clone.run(*COMMAND, status=2).splitlines() if x.startswith("error: ")]
    assert "data/in.jsonl" in line
    # A stage that refuses a variant ends the study as the user's mistake.
    missing = {"sources.main.kind": "files", "sources.main.paths": ["data/missing.jsonl"]}
    write(clone, seeds=1, held_out="data/in.jsonl", params=missing)
    (line,) = [x for x in clone.run(*COMMAND, status=2).splitlines() if x.startswith("error: ")]
    assert "data/missing.jsonl" in line
    assert "variant cold" in line


@pytest.mark.soak
def test_a_study_killed_twice_gives_the_report_of_one_that_was_not(tmp_path: Path) -> None:
    variants = {**STUDY["variants"], "dedup": {"curate.exact_duplicates": True}}
    keys: dict[str, Any] = {"seeds": 2, "variants": variants, "compare": "all"}
    keys["held_out"] = "data/held-out.jsonl"
    clone, other = (make(tmp_path / name, **keys) for name in ("killed", "whole"))
    for runs in (1, 4):
        kill(clone, runs)
        done = finished(clone)
        wait_for(lambda: not clone.is_busy(), 60)
    process = clone.start(*COMMAND)
    wait_for(lambda: (clone.folder / ".work/locks/studies-one").exists(), 60)
    (line,) = clone.run(*COMMAND, status=2).splitlines()  # one at a time
    assert line.startswith("error: study one: ")
    assert process.wait(200) == 0
    assert done.items() <= finished(clone).items()
    assert len(finished(clone)) == 6
    other.run(*COMMAND)
    assert report(clone) == report(other)
    # Another definition is another study: nothing of the first is mixed in.
    write(clone, **keys, budget={"tokens": 7168})
    assert "0 of 6" in clone.run(*COMMAND, "--status")
    write(clone, **keys)
    assert "6 of 6" in clone.run(*COMMAND, "--status")


@pytest.mark.soak
def test_a_run_that_diverges_is_named_and_not_repeated(tmp_path: Path) -> None:
    hot = {"train.optimizer": "adamw", "train.learning_rate": 0.99, "train.grad_clip": None}
    hot |= {"train.warmup_steps": 0, "train.eps": 1e-30, "train.embeddings_lr_ratio": 1e30}
    clone = make(tmp_path / "project", seeds=1, variants={"cold": {}, "hot": hot})
    output = clone.run(*COMMAND)
    assert "one-hot-1 has no result" in output
    assert len(finished(clone)) == 2
    assert report(clone)["comparisons"][0]["missing"] == 1
    assert "run 1 of" not in clone.run(*COMMAND)


@pytest.mark.soak
def test_seconds_are_a_budget_and_jobs_share_the_machine(tmp_path: Path) -> None:
    params = {**STUDY["params"], "train.warmup_steps": 0}
    clone = make(tmp_path / "project", seeds=1, budget={"seconds": 8.0}, params=params)
    output = clone.run(*COMMAND, "--jobs", "2", GPT2_CORES="1")
    assert output.count("s per step") == 2
    found = report(clone, GPT2_CORES="1")
    steps = {one["steps"] for one in found["variants"].values()}
    assert min(steps) >= 1
    assert found["unfinished"] == 0
    assert "run 1 of" not in clone.run(*COMMAND, GPT2_CORES="1")
