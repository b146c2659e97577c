"""The short form of the harness; `python -m tests.reliability` tests more points."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import damage, project
from tests.reliability.commit_points import FAULTS, CommitPoints, Prepared
from tests.reliability.damage import REPAIRED, Damages
from tests.reliability.stages import KILL, Stages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
    ),
]

DAMAGED = [  # the rest in the middle form
    ".work/chunks/KEY/train.bin", ".work/runs/KEY/step-N/state.json", "data/tokens/manifest.json",
    "artifacts/checkpoint/model.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stages, Prepared]]:
    scratch = tmp_path_factory.mktemp("reliability")
    with Stages(scratch / "stages") as stages:
        yield stages, Prepared(stages, scratch)


@pytest.mark.parametrize("stage", ["download", "curate", "tokenize", "verify", "train"])
def test_a_faulted_stage_ends_clean_and_the_same_command_completes_it(
    prepared: tuple[Stages, Prepared], stage: str
) -> None:
    stages, projects = prepared
    points = CommitPoints(stages, stage, projects.before(stage), projects.work)
    most = 1 if stage == "train" else 2
    for fault in FAULTS:
        result = points.test(fault, most)
        assert (result.lost, result.unexplained) == ([], [])
        assert result.points == result.survived == most


def test_the_harness_sees_a_lost_file(
    prepared: tuple[Stages, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that does nothing must be reported."""
    stages, projects = prepared
    points = CommitPoints(stages, "verify", projects.before("verify"), projects.work)
    (last,) = points.sample(KILL, 1000)[-1:]
    run = stages.run

    def once(stage: str, folder: Path, mode: int = 0, at: int = 0) -> Any:
        return run(stage, folder, mode, at) if mode else (0, "", [])

    monkeypatch.setattr(stages, "run", once)
    monkeypatch.setattr(points, "sample", lambda *_: [0, last])
    assert len(points.test("SIGKILL before the call").lost) > 0


@pytest.mark.soak  # a minute for evaluate, export and report
def test_damaged_files_are_repaired(prepared: tuple[Stages, Prepared]) -> None:
    stages, projects = prepared
    finished = project.copy(projects.after_all(), projects.work.with_name("finished"))
    tested, kinds = Damages(stages, finished, projects.work), damage.kinds(finished)
    for kind in DAMAGED:
        outcome = tested.test(kind, kinds[kind], "flipped bit")
        assert (outcome.what, outcome.problems) == (REPAIRED, []), kind
