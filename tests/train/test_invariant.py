"""Tests for train.invariant: the same bits on any number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.errors import UserError
from tests.support.forked import run_ranks
from tests.support.training import Project, train_here
from train import numerics, summation
from train.__main__ import main
from train.checkpoint import directory
from train.checkpoint.chain import LOGGED

# 8 leaves in the first two steps, then 16; clipping is active.
LEAVES: dict[str, Any] = {
    "invariant": 2, "batch_tokens": 32 * 16, "batch_doublings": 1, "batch_ramp_steps": 2,
    "grad_clip": 0.1, "log_every": 1, "val_every": 2, "steps": 6, "checkpoint_every": 2,
    "keep_checkpoints": 9, "sample_tokens": 0,
}  # fmt: skip


def numbers(project: Project) -> dict[str, Any]:
    """All that must be the same: weights, optimizer state, chain and log of the published run."""
    lines = (project.folder / "artifacts/log.jsonl").read_text().splitlines()
    chain = json.loads(project.published()[directory.STATE])["chain"]
    return {
        "log": [{n: r[n] for n in ("step", *LOGGED) if n in r} for r in map(json.loads, lines)],
        "chain": chain,
        "weights": project.weights(),
        "optimizer": project.published()[directory.OPTIMIZER],
    }


def train_in_small_buckets() -> None:
    """Train one rank; the gradients take many buckets, which do not change a bit either."""
    summation.BUCKET = 777
    main()


@pytest.mark.slow
def test_no_number_of_processes_changes_a_bit(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2 and 3 processes, and a run that was killed on 2 and resumes on 3."""
    project.write(train=LEAVES)
    train_here()
    first = numbers(project)
    assert max(r.get("grad_norm", 0) for r in first["log"]) > 0.1
    run_ranks(train_in_small_buckets, project.folder, 2, GPT2_WORK_DIR="two")
    assert numbers(project) == first
    (killed,) = (project.folder / "two/runs").iterdir()
    for folder in directory.checkpoints(killed)[1:]:
        shutil.rmtree(folder)
    (killed / "final.json").unlink()
    project.train_ranks(3, GPT2_WORK_DIR="two")  # after step 2
    assert numbers(project) == first

    project.write(train={**LEAVES, "invariant": None})
    found = set()
    monkeypatch.setenv("GPT2_MICRO_BATCH", "2")
    for train in (train_here, lambda: project.train_ranks(2, GPT2_WORK_DIR="usual")):
        train()
        found.add(project.weights())
    assert len(found) == 2


def test_what_would_change_the_rounding_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, changes, variables in (
        ("micro_batch", {}, {"GPT2_MICRO_BATCH": "4"}),
        ("loss_chunk", {}, {"GPT2_LOSS_CHUNK": "64"}),
        ("train.dtype", {"dtype": "float16"}, {}),
        ("train.invariant", {"invariant": 3}, {}),
    ):
        project.write(train={**LEAVES, **changes})
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            with pytest.raises(UserError, match=name):
                train_here()
    done = project.run("train.launch", GPT2_PROCESSES=9)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_another_processor_is_refused_or_recorded(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(train=LEAVES)
    run = train_here()
    weights = project.weights()
    for folder in directory.checkpoints(run.folder)[1:]:
        shutil.rmtree(folder)
    (run.folder / "final.json").unlink()
    monkeypatch.setattr(numerics, "environment", lambda device, compiled: {"instructions": "other"})
    with pytest.raises(UserError, match=r"train\.invariant"):
        train_here()
    monkeypatch.setenv("GPT2_OTHER_ROUNDING", "1")
    train_here()
    assert project.weights() == weights  # the processor was the same after all
    state = json.loads(Path("artifacts/checkpoint/state.json").read_text())
    assert [part["since"] for part in state["chain"]["conditions"]] == [0, 2]
