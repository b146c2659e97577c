"""Tests for runs with `train.mixture`: real text of two sources, two phases, and a ramp."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from tests.support.small_data import tokenize_here, write_sources
from tests.support.training import Project, records, stop_in, train_here
from train import trace
from train.audit.judge import Judge
from train.audit.run_folder import Audited
from train.audit.segments import segments
from train.data.loader import Batches
from train.data.mixed_order import MixedOrder
from train.data.split import Split
from train.report import run_charts
from train.report.page import source_rows
from train.report.run_log import Log
from train.run import Run

MIXTURE = [
    {"until": 0.5, "weights": {"land": 3, "sea": 1}},
    {"until": 1.0, "weights": {"land": 0, "sea": 1}},
]
TRAIN: dict[str, Any] = {
    "mixture": MIXTURE, "steps": 8, "checkpoint_every": 3, "log_every": 1, "val_every": 4,
    "batch_doublings": 1, "batch_ramp_steps": 2,
}  # fmt: skip


@pytest.fixture
def mixed(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project with two sources, of which the run sees several epochs."""
    tokens = project.folder / "data/tokens"
    texts = {
        name: [f"A tale of the {name}: " + f"I saw {i} of it, " * (3 + i % 9) for i in range(n)]
        for name, n in (("sea", 40), ("land", 90))
    }
    raw = write_sources(project.folder / "data/raw", texts)
    params = TokenizeParams(shard_tokens=1000, val_per_10k=2000)
    shutil.rmtree(tokens)
    tokenize_here(raw, tokens, params, Machine(workers=1, work_dir=project.folder / "encoded"))
    project.verify()
    project.write(train=TRAIN)
    monkeypatch.setenv("GPT2_MICRO_BATCH", "2")
    return project


def test_stopped_in_either_phase_and_resumed_it_ends_with_the_same_bits(
    mixed: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = train_here()
    files = mixed.published()
    assert "land 37.5%" in capsys.readouterr().out  # 3/4 of the first half
    monkeypatch.setenv("GPT2_WORK_DIR", "stopped")
    stop_in(monkeypatch, "step", 3)
    stop_in(monkeypatch, "step", 4)
    resumed = train_here()
    assert mixed.published() == files
    for name in ("train/loss", "val/loss", "val/source/land", "val/source/sea"):
        assert records(resumed, name) == records(uninterrupted, name) != {}
    judge, parts = Judge(run := Audited.open(resumed.folder), mixed.folder), segments(run)
    answers = [judge(part).answer for part in parts if not part.missing]
    assert len(answers) > 1
    assert set(answers) == {"equal"}

    summary = mixed.results()
    samples = uninterrupted.samples(8)
    shares = {name: facts["tokens"] for name, facts in summary["sources"].items()}
    assert sum(shares.values()) == 16 * samples
    assert shares["land"] == 16 * round(samples * 0.375)
    log = (mixed.folder / "artifacts/log.jsonl").read_bytes()
    assert "land" in str(run_charts.source_chart(Log.parse(log), wide=True))
    state = json.loads((mixed.folder / "artifacts/checkpoint/state.json").read_text())
    assert [row[:2] for row in source_rows(summary, state)] == [
        ("land", "3, then 0"),
        ("sea", "1, then 1"),
    ]
    trace.main(["--step", "8", "--limit", "1"])
    assert "source sea" in capsys.readouterr().out


def test_samples_depend_neither_on_processes_nor_on_where_a_run_resumes(mixed: Project) -> None:
    run = Run.open()
    traced = [w.first for step in range(1, 9) for w in trace.Trace.of(16, run.params).windows(step)]
    expected = [run.train_data[first : first + 16].tolist() for first in traced]
    assert len(expected) == run.samples(8)
    for world, micro_batch, first in ((1, 2, 0), (2, 2, 1), (4, 1, 3), (2, 1, 5)):
        split, spans = (
            Split(world=world, micro_batch=micro_batch),
            list(run.batches.spans(first, 8)),
        )
        ranks = []
        for rank in range(world):
            cpu = torch.device("cpu")
            with Batches(
                run.train_data, run.order, split, rank=rank, spans=spans, device=cpu
            ) as found:
                ranks.append([batch.inputs.numpy() for batch in found])
        rows = np.concatenate([part for parts in zip(*ranks, strict=True) for part in parts])
        assert rows.tolist() == expected[run.samples(first) :]


def test_a_mixture_that_does_not_fit_the_data_is_refused(mixed: Project) -> None:
    for mixture, named in (
        ({"land": 1}, "train.mixture.sea: missing"),
        ({"land": 1, "seas": 1}, "train.mixture.seas"),
    ):
        mixed.write(train={**TRAIN, "mixture": mixture})
        with pytest.raises(UserError, match=named):
            Run.open()
    for weight in (1, 0):  # land is longer than a window, sea is not
        changes = {"batch_tokens": 6000, "mixture": {"land": 1, "sea": weight}}
        mixed.write(train={**TRAIN, **changes}, model={"block_size": 3000})
        if weight:
            with pytest.raises(UserError, match=r"train\.mixture: source sea"):
                Run.open()
    assert Run.open().order.starts(0, 2).tolist() == [0, 0]


def test_without_a_mixture_all_sources_are_one_stream(mixed: Project) -> None:
    mixed.write(train={**TRAIN, "mixture": None})
    run = train_here()
    assert not isinstance(run.order, MixedOrder)
    for name in ("land", "sea"):
        assert abs(records(run, f"val/source/{name}")[8] - records(run, "val/loss")[8]) < 0.5
    assert Path("metrics/live/plots/metrics/val/source/sea.tsv").exists()


@pytest.mark.soak
def test_killed_at_any_step_it_resumes_on_other_processes(mixed: Project) -> None:
    """The same samples on any number of processes; the same weights on equal ones."""
    mixed.write(train={**TRAIN, "steps": 40, "checkpoint_every": 2})
    mixed.train_ranks(2, GPT2_WORK_DIR="whole")
    weights = mixed.weights()
    for work, worlds in (("equal", [2, 2, 2]), ("others", [1, 4, 2])):
        for world, step in zip(worlds, (4, 16, None), strict=True):
            micro_batch = 8 // world // 2
            ranks = mixed.start_ranks(
                world, GPT2_WORK_DIR=work, GPT2_MICRO_BATCH=2 if work == "equal" else micro_batch
            )
            if step is not None:
                mixed.wait_for_step(ranks[0], step, work)
                for rank in ranks:
                    rank.send_signal(signal.SIGKILL)
            for rank in ranks:
                out, err = rank.communicate(timeout=120)
                assert step is not None or rank.returncode == 0, out + err
        assert mixed.losses(work) == pytest.approx(mixed.losses("whole"), abs=1e-3)
        assert work == "others" or mixed.weights() == weights
