"""Tests for train.audit: honest runs are equal, forged ones differ, edited ones are found."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from pipeline.runtime.errors import UserError
from tests.support.forge import KINDS, TRAIN, Forgery, edit, forge
from tests.support.training import Project, stop_in, train_here
from train.audit import __main__ as audit
from train.audit.checks import problems
from train.audit.judge import Judge
from train.audit.run_folder import Audited
from train.audit.segments import chance, draw, segments
from train.checkpoint import directory


@pytest.fixture
def honest(project: Project) -> Path:
    """The folder of a finished run of four segments."""
    project.write(train=TRAIN)
    return train_here().folder


def status(*flags: str) -> int:
    """Exit status of the command."""
    try:
        audit.main(flags)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_an_honest_run_is_equal_and_another_processor_cannot_judge(
    project: Project, honest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = str(Audited.open(honest).chain.head)
    assert f'"chain": "{head}"' in Path("artifacts/training.json").read_text()
    assert status(str(honest), "--chain", "--head", head) == 0
    assert status(str(honest), "--chain", "--head", "0" * 64) == audit.DIFFERS
    assert status(str(honest), "--segments", "4", "--seed", "any") == 0
    assert capsys.readouterr().out.count(": equal") == 4
    other = project.run(
        "train.audit", str(honest), "--segments", "2", "--seed", "1", ATEN_CPU_CAPABILITY="avx2"
    )
    assert (other.returncode, other.stdout.count("cannot judge")) == (audit.CANNOT_JUDGE, 2)


def test_forgeries_are_found_where_they_are(project: Project, honest: Path) -> None:
    """Of every other kind; 200 of all are planted by tests.soak.audit."""
    for seed, kind in enumerate(KINDS[::2]):
        forgery = Forgery(kind, 3, seed)  # the last segment: the fewest steps to train
        run = Audited.open(forge(project, honest, forgery))
        assert not problems(run, run.chain.head)
        found = Judge(run, project.folder)(segments(run)[forgery.segment])
        assert found.answer == "differs", forgery


def test_edits_are_found_without_running_anything(project: Project, honest: Path) -> None:
    run = Audited.open(honest)
    assert not problems(run, run.chain.head)
    for seed in range(12):
        copy = project.folder / "edited" / honest.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(honest, copy)
        what = edit(copy, Random(seed))
        assert problems(Audited.open(copy), run.chain.head), (seed, what)


def test_a_stopped_run_ends_with_the_chain_of_one_that_was_not(
    project: Project, honest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2_WORK_DIR", "stopped")
    stop_in(monkeypatch, "optimize", 5)  # between two checkpoints
    run = Audited.open(train_here().folder)
    assert run.links == Audited.open(honest).links
    assert not problems(run, None)


def test_a_run_that_is_not_invariant_is_audited_with_its_own_number_of_processes(
    project: Project,
) -> None:
    project.write(train={**TRAIN, "invariant": None})
    run = Audited.open(train_here().folder)
    assert {part["arithmetic"]["world_size"] for part in run.chain.conditions} == {1}
    judge = Judge(run, project.folder, processes=3)
    assert [judge(segment).answer for segment in segments(run)[:2]] == ["equal"] * 2


def test_segments_are_drawn_evenly_and_found_with_the_stated_probability() -> None:
    n, wanted, forged = 20, 5, 2
    drawn = [draw(n, wanted, str(seed)) for seed in range(2000)]
    assert all(len(set(numbers)) == wanted for numbers in drawn)
    found = sum(bool({3, 11} & set(numbers)) for numbers in drawn) / len(drawn)
    assert found == pytest.approx(chance(n, forged, wanted), abs=0.04)


def test_a_run_without_checkpoints_or_a_wrong_number_is_refused(
    honest: Path, tmp_path: Path
) -> None:
    for flags, named in (
        ([str(tmp_path / "none")], "none"),
        ([str(honest), "--segments", "5", "--seed", "1"], "--segments"),
        ([str(honest), "--segments", "2"], "--seed"),
    ):
        with pytest.raises(UserError, match=named):
            audit.main(flags)
    assert len(directory.checkpoints(honest)) == 4
