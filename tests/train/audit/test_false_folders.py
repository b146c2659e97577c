"""Tests for train.audit with folders made to deceive it, or to break it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from model.files import save_tensors
from pipeline.runtime import command
from pipeline.runtime.errors import Stopped, UserError
from pipeline.store import atomic
from tests.support.forge import TRAIN, match_again
from tests.support.training import Project, make_project, train_here
from train.audit import __main__ as audit
from train.audit.judge import Judge
from train.audit.run_folder import Audited
from train.audit.segments import segments
from train.checkpoint import directory
from train.checkpoint.chain import Chain, complete, log_hash
from train.invariant import InvariantTrainer
from train.monitor import history
from train.run import FINAL, RECORD

SHORT = {**TRAIN, "steps": 4, "val_every": 2}
EQUAL, REFUSED = command.DONE, command.USER_ERROR
Edit = Callable[[Chain, Path], object]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    """A project, and the folder of its finished run of two segments; do not change it."""
    project = make_project(tmp_path_factory.mktemp("audit"))
    project.write(train=SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        patch.setenv("GPT2_DEVICE", "cpu")
        return project, train_here().folder


@pytest.fixture
def project(trained: tuple[Project, Path], monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project, which is also the working directory."""
    monkeypatch.chdir(trained[0].folder)
    monkeypatch.setenv("GPT2_DEVICE", "cpu")
    return trained[0]


@pytest.fixture
def honest(project: Project, trained: tuple[Project, Path]) -> Path:
    """The folder of the run."""
    return trained[1]


def status(folder: Path, *flags: str) -> int:
    """Exit status of the command."""
    try:
        audit.main([str(folder), *flags])
    except UserError:
        return REFUSED
    except SystemExit as ended:
        return int(ended.code or 0)
    return EQUAL


def audit_all(folder: Path, drawn: int = 0) -> int:
    """Exit status of an audit of all segments, or some, with the head that the run has."""
    try:
        run = Audited.open(folder)
    except UserError:
        return REFUSED
    flags = ("--segments", str(drawn or len(run.links)), "--seed", "any")
    return status(folder, *flags, "--head", str(run.chain.head))


def copy_of(honest: Path) -> Path:
    """A copy of a run's folder, under the same name."""
    copy = honest.parents[2] / "copy" / honest.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(honest, copy)
    return copy


def reseal(path: Path, **changes: Any) -> None:
    """Change keys of a sealed JSON file."""
    atomic.write_json(path, atomic.sealed({**atomic.read_sealed(path), **changes}))


def newest(folder: Path) -> Path:
    """The newest checkpoint."""
    return directory.checkpoints(folder)[-1]


def edited(honest: Path, edit: Edit) -> Path:
    """A copy with an edit of its chain or files, in which all else is made to match."""
    copy = copy_of(honest)
    found = Audited.open(copy).chain
    edit(found, copy)
    match_again(copy, found)
    identity = found.conditions[-1]["identity"]
    for path in directory.checkpoints(copy):
        reseal(path / directory.STATE, dataset_key=identity["dataset_key"])
    reseal(copy / RECORD, **identity)
    if (copy / FINAL).is_file():
        reseal(copy / FINAL, chain=found.head)
    return copy.rename(copy.with_name(atomic.sha256_json(identity)))


def rewrite_log(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change all records of a log; the checksums of the lines match."""
    path = folder / "log.jsonl"
    records = history.parse(path.read_bytes())
    for record in records:
        change(record)
    path.write_text("".join(map(history._line, records)))


def other_rate_in_the_middle(found: Chain, folder: Path) -> None:
    later = {**deepcopy(found.conditions[0]), "since": 2}
    later["identity"]["train"]["learning_rate"] *= 3
    found.conditions.append(later)


def other_code_in_the_middle(found: Chain, folder: Path) -> None:
    found.conditions.append({**deepcopy(found.conditions[0]), "since": 2})
    found.conditions[0]["identity"]["code_key"] = "0" * 64


def adopted_in_the_middle(found: Chain, folder: Path) -> None:
    other_code_in_the_middle(found, folder)
    key = atomic.sha256_json(found.conditions[0]["identity"])
    reseal(folder / RECORD, adopted=[{"run_key": key, "code_key": "0" * 64, "step": 2}])


def begins_after_step_2(found: Chain, folder: Path) -> None:
    del found.links[0]
    found.start = found.conditions[0]["since"] = 2


def identity(**changes: Any) -> Edit:
    """Change the identity of the run."""
    return lambda found, folder: found.conditions[0]["identity"].update(changes)


def train(**changes: Any) -> Edit:
    """Change parameters in the identity of the run."""
    return lambda found, folder: found.conditions[0]["identity"]["train"].update(changes)


def arithmetic(**changes: Any) -> Edit:
    """Change the arithmetic in the conditions."""
    return lambda found, folder: found.conditions[0]["arithmetic"].update(changes)


def many_processes(found: Chain, folder: Path) -> None:
    del found.conditions[0]["identity"]["train"]["invariant"]
    found.conditions[0]["arithmetic"]["world_size"] = 10**6


def pipes_in_checkpoints(found: Chain, folder: Path) -> None:
    for path in directory.checkpoints(folder):
        os.mkfifo(path / "pipe")


def links_for_weights(found: Chain, folder: Path) -> None:
    for path in directory.checkpoints(folder):
        (path / directory.MODEL).rename(folder / f"{path.name}.safetensors")
        (path / directory.MODEL).symlink_to(folder / f"{path.name}.safetensors")


def large_validations(found: Chain, folder: Path) -> None:
    rewrite_log(folder, lambda r: r.update(val_tokens=10**6) if "val_tokens" in r else None)


def test_chains_that_are_right_in_themselves_are_not_all_equal(
    project: Project, honest: Path
) -> None:
    """Every hash matches, and the head is pinned."""
    assert audit_all(edited(honest, pipes_in_checkpoints)) == EQUAL
    for edit, expected in (
        (other_rate_in_the_middle, audit.DIFFERS),
        (other_code_in_the_middle, audit.DIFFERS),
        (adopted_in_the_middle, audit.CANNOT_JUDGE),
        (begins_after_step_2, audit.CANNOT_JUDGE),
        (identity(dataset_key="f" * 64), audit.DIFFERS),
        (train(unknown=1), audit.CANNOT_JUDGE),
        (train(init="checkpoint /etc"), audit.CANNOT_JUDGE),
        (train(dtype="float16"), audit.CANNOT_JUDGE),
        (arithmetic(threads=-1), REFUSED),
        (arithmetic(device="tpu"), REFUSED),
        (arithmetic(device="cuda"), audit.CANNOT_JUDGE),
        (arithmetic(compile="x"), REFUSED),
        (many_processes, audit.CANNOT_JUDGE),
        (lambda found, folder: found.conditions[0].update(since=10**9), audit.DIFFERS),
        (large_validations, audit.CANNOT_JUDGE),
        (links_for_weights, audit.CANNOT_JUDGE),
    ):
        assert audit_all(edited(honest, edit)) == expected, edit


def test_malformed_folders_end_in_one_line(honest: Path) -> None:
    def state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            found = atomic.read_sealed(newest(folder) / directory.STATE)
            change(found)
            reseal(newest(folder) / directory.STATE, **found)

        return edit

    def replace(name: str) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            (folder / name).unlink()
            (folder / name).mkdir()

        return edit

    for edit, expected in (
        (state(lambda found: found.update(chain=[1])), REFUSED),
        (state(lambda found: found["chain"].update(start=None)), REFUSED),
        (state(lambda found: found["chain"].update(links=5)), REFUSED),
        (state(lambda found: found["chain"].update(links="ab")), REFUSED),
        (state(lambda found: found["chain"].update(conditions=[])), REFUSED),
        (state(lambda found: found["chain"]["links"][-1].update(step="8")), REFUSED),
        (state(lambda found: found["chain"]["links"][-1].update(first=6.0)), REFUSED),
        (state(lambda found: found["chain"]["links"][-1].update(first=True)), REFUSED),
        (state(lambda found: found["chain"]["links"][-1]["files"].popitem()), REFUSED),
        (lambda folder: rewrite_log(folder, lambda r: r.pop("val_tokens", None)), REFUSED),
        (replace("log.jsonl"), REFUSED),
        (replace(FINAL), audit.DIFFERS),
        (replace(RECORD), audit.DIFFERS),
        (lambda folder: (folder / RECORD).write_text("[1]"), audit.DIFFERS),
    ):
        copy = copy_of(honest)
        edit(copy)
        assert status(copy, "--chain") == expected, edit


def test_a_second_link_for_a_step_is_found(honest: Path) -> None:
    copy = copy_of(honest)
    last = newest(copy)
    weights, _ = directory.load_tensors(last)
    (last / directory.MODEL).unlink()
    save_tensors(last / directory.MODEL, {name: value * 0.5 for name, value in weights.items()})
    hashes = {n: atomic.sha256_file(last / n) for n in (directory.MODEL, directory.OPTIMIZER)}
    chain = Audited.open(copy).chain
    again = {**chain.links[-1], "first": 4, "log": log_hash([], 4, 4)}
    chain.links.append({k: v for k, v in again.items() if k != "link"})
    complete(chain.links, hashes)
    reseal(last / directory.STATE, chain=chain.as_json(), sha256=hashes)
    reseal(copy / FINAL, chain=chain.head)
    assert audit_all(copy) == audit.DIFFERS


def test_a_checkpoint_before_the_first_step_is_not_used(
    project: Project, honest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(train=SHORT)
    monkeypatch.setenv("GPT2_WORK_DIR", "stolen")
    planted = project.folder / "stolen/runs" / honest.name / "step-00000000"
    shutil.copytree(newest(honest), planted)
    state = atomic.read_sealed(planted / directory.STATE)
    del state["chain"]
    atomic.write_json(
        planted / directory.STATE, atomic.sealed({**state, "step": 0, "samples": 0, "tokens": 0})
    )
    shutil.copytree(planted, "kept")
    folder = train_here().folder
    shutil.copytree("kept", planted, dirs_exist_ok=True)
    assert len(Audited.open(folder).links) == 2
    assert audit_all(folder) == audit.DIFFERS


def test_figures_outside_of_the_links_are_compared(honest: Path) -> None:
    def append(record: dict[str, Any]) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            with open(folder / "log.jsonl", "a") as log:
                log.write(history._line(record))

        return edit

    for edit in (
        append({"step": 5, "val/loss": 0.5, "val_tokens": 200}),
        append({"step": 0, "train/loss": 9.0}),
        append({"step": 4, "train/loss": 0.5}),
        lambda folder: reseal(folder / FINAL, val_loss=0.5),
        lambda folder: reseal(folder / FINAL, loss=0.5),
    ):
        copy = copy_of(honest)
        edit(copy)
        assert status(copy, "--chain") == audit.DIFFERS
    head = str(Audited.open(honest).chain.head)
    shutil.rmtree("artifacts/checkpoint")
    shutil.copytree(newest(honest), "artifacts/checkpoint")
    assert status(honest, "--chain", "--head", head) == EQUAL
    shutil.copy(directory.checkpoints(honest)[0] / directory.MODEL, "artifacts/checkpoint")
    assert status(honest, "--chain", "--head", head) == audit.DIFFERS
    shutil.rmtree("artifacts/checkpoint")


def test_deleting_checkpoints_does_not_change_what_is_drawn(
    project: Project, honest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_of(honest)
    shutil.rmtree(copy / "step-00000002")
    run = Audited.open(copy)
    judge = Judge(run, project.folder)
    assert [judge(part).answer for part in segments(run)] == ["equal", "cannot judge"]
    assert audit_all(copy) == audit.CANNOT_JUDGE

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("train.audit.judge.replay", fail)
    assert audit_all(honest, 1) == audit.CANNOT_JUDGE  # and no fault of the run


def test_on_cuda_only_invariant_runs_are_judged(
    project: Project, honest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = Audited.open(honest)
    conditions = deepcopy(run.chain.conditions[0])
    monkeypatch.setattr("train.audit.judge.environment", lambda *_, **__: conditions["environment"])
    conditions["arithmetic"]["device"] = "cuda"
    judge = Judge(run, project.folder, 2)
    assert not [*judge._condition_obstacles(conditions)]
    assert [*Judge(run, project.folder, 3)._condition_obstacles(conditions)]
    del conditions["identity"]["train"]["invariant"]
    conditions["arithmetic"]["world_size"] = 2
    assert [*judge._condition_obstacles(conditions)]


def test_honest_runs_with_a_skipped_step_or_other_val_tokens_are_equal(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, optimize, current = InvariantTrainer.step, InvariantTrainer.optimize, [0]
    stops = iter([True])  # once, after the validation

    def note(self: InvariantTrainer, number: int, *rest: Any) -> Any:
        current[0] = number
        if number == 2 and next(stops, None):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *rest)

    def poison(self: InvariantTrainer, loss: torch.Tensor) -> torch.Tensor:
        return optimize(self, loss * float("nan") if current[0] == 1 else loss)

    monkeypatch.setenv("GPT2_WORK_DIR", "skips")
    project.write(train={**SHORT, "non_finite": "skip"})
    with monkeypatch.context() as patch:
        patch.setattr(InvariantTrainer, "step", note)
        patch.setattr(InvariantTrainer, "optimize", poison)
        with pytest.raises(Stopped):
            train_here()
        project.write(train={**SHORT, "non_finite": "skip", "val_tokens": 160})
        folder = train_here().folder
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in log if "skipped" in r] == [2]
        assert [r["val_tokens"] for r in log if "val/loss" in r] == [200, 160, 160]
        assert audit_all(folder) == EQUAL
    # Here the step is finite.
    assert audit_all(folder) == audit.DIFFERS
