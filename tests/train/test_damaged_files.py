"""Tests for damaged files of a run: named, repaired where possible, and no result changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runtime.errors import StageFailed, UserError
from tests.support.small_data import flip
from tests.support.training import Project, records, train_here
from train import evaluate
from train.checkpoint import directory
from train.run import Run


def flip_bit(path: Path, text: bytes, bit: int) -> None:
    """Flip a bit of the byte after the first occurrence of a text, as a bad disk does."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[data.index(text) + len(text)] ^= bit
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def start_again() -> None:
    """Do what the stage does: publish a finished run, else train it from its last checkpoint."""
    if not Run.open().publish_finished():
        train_here()


def results(project: Project) -> dict[str, object]:
    """Return the results that depend on no clock."""
    names = ("step", "tokens", "loss", "val_loss", "best_val_loss")
    return {name: project.results()[name] for name in names}


def test_damaged_files_of_a_finished_run_are_named_and_change_no_result(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    weights, before, expected = project.weights(), results(project), records(run, "train/loss")
    last = run.folder / directory.folder_name(12)
    # file, text, bit, whether the run trains from the checkpoint before
    damages = [
        (last / "state.json", b'"step": 1', 0x04, True),  # step 16
        (last / "state.json", b'"val_loss": ', 0x01, True),
        (last / "optimizer.safetensors", b"}", 0x01, True),
        (run.folder / "final.json", b'"val_loss": ', 0x01, False),
        (run.folder / "final.json", b"{", 0x80, False),
    ]
    for path, text, bit, trains in damages:
        flip_bit(path, text, bit)
        capsys.readouterr()
        start_again()
        captured = capsys.readouterr()
        assert str(path) in captured.err or f"{path.parent}:" in captured.err
        assert ("resumes after step 8" in captured.out) == trains
        assert project.weights() == weights
        assert results(project) == before
        assert records(run, "train/loss") == expected


def test_damaged_line_of_the_log_is_named_and_costs_its_points_only(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    before, lines = results(project), run.history.records
    log = run.folder / "log.jsonl"
    good = log.read_bytes()
    damages = [(b'"s', 0x80), (b'"s', 0x01), (b"\n", 0x20), (b'"train/loss": ', 0x01)]
    for number, (text, bit) in enumerate(damages):
        log.write_bytes(good)
        flip_bit(log, text, bit)
        if number == 0:  # a run that is not finished
            (run.folder / "final.json").unlink()
        capsys.readouterr()
        start_again()
        assert f"{log}: " in capsys.readouterr().err
        assert len(Run.open().history.records) == len(lines) - 1
        published = (project.folder / "artifacts/log.jsonl").read_bytes().splitlines()
        assert len(published) == len(lines) - 1
        assert results(project) | {"loss": 0} == before | {"loss": 0}
    log.write_bytes(good[: good.index(b'"step": 4')])
    capsys.readouterr()
    start_again()
    assert f"{log}: ends at step " in capsys.readouterr().err


def test_damaged_record_of_a_run_is_written_again(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    path = run.folder / "run.json"
    good = path.read_bytes()
    for bad in (good[:50], good.replace(b'"adopted": []', b'"adopted": 7'), b"[" * 10**5, b"3"):
        path.write_bytes(bad)
        assert run.record()["adopted"] == []
        assert f"{path}: damaged" in capsys.readouterr().err
        assert path.read_bytes() == good
    (run.folder / "failed.json").write_text("{")
    run.check_not_failed()
    assert "failed.json: damaged" in capsys.readouterr().err


@pytest.mark.timeout(60)  # reading a pipe would wait for ever
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_the_place_of_one_of_a_run_is_replaced(
    project: Project, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    run = Run.open()
    names = ("log.jsonl", "starts.jsonl", "failed.json", "final.json")
    for name in names:
        make(run.folder / name)
    assert run.summary() is None
    run.forget_failure()
    run.note_start({"step": 12})
    run.finish({"step": 12})
    with run.history as log:
        log.begin(12)
    err = capsys.readouterr().err
    assert all(f"warning: {run.folder / name}: " in err for name in names if name != "failed.json")
    assert run.summary() == {"step": 12}
    assert [(run.folder / name).is_file() for name in names] == [True, True, False, True]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["params.yaml", "data/tokens/manifest.json", "data/verified.json"])
def test_pipe_in_the_place_of_an_input_is_named(project: Project, name: str) -> None:
    path = project.folder / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=name):
        Run.open()


@pytest.mark.timeout(60)
def test_checkpoint_whose_state_is_a_pipe_is_skipped(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_here()
    weights, state = project.weights(), run.folder / directory.folder_name(12) / directory.STATE
    state.unlink()
    os.mkfifo(state)
    start_again()
    assert f"{state.parent}: " in capsys.readouterr().err
    assert project.weights() == weights
    assert state.is_file()


def test_log_is_read_once_and_again_after_the_run_is_cleared(project: Project) -> None:
    run = Run.open()
    (run.folder / "log.jsonl").write_text('{"lr": 0.5, "step": 1}\n')
    assert run.history.records == [{"lr": 0.5, "step": 1}]
    assert run.history is run.history  # not read and checked again at each checkpoint
    run.clear()
    assert run.history.records == []


def test_byte_that_rots_in_a_shard_is_found_by_training_and_evaluation(project: Project) -> None:
    """Its size and time are those that `verify` has seen, and no checkpoint learns from it."""
    train_here()
    val, train = (project.folder / "data/tokens" / f"{x}.bin" for x in ("val-00000", "train-00001"))
    flip(val, 1024 + 21, keep_mtime=True)  # a token outside the vocabulary
    with pytest.raises(StageFailed, match=f"{val.name}: .*pipeline.verify"):
        evaluate.main()
    flip(val, 1024 + 21, keep_mtime=True)
    flip(train, 1024 + 20, keep_mtime=True)
    project.write(train={"seed": 2})
    with pytest.raises(StageFailed, match=f"{train.name}: .*pipeline.verify"):
        train_here()
    assert directory.checkpoints(Run.open().folder) == []


def test_half_removed_checkpoint_is_removed_by_the_next_start(project: Project) -> None:
    run = train_here()
    (run.folder / ".step-00000004.old").mkdir()
    train_here()
    assert not (run.folder / ".step-00000004.old").exists()
