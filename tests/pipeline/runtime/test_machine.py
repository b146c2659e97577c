"""Tests for pipeline.runtime.machine: machine.yaml and GPT2_* variables."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, private_folder


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_without_a_file_or_variables() -> None:
    assert Machine.load() == Machine()
    assert Machine().worker_count >= 1


def test_environment_overrides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("machine.yaml").write_text("workers: 3\nmicro_batch: 4\n")
    assert Machine.load().workers == 3
    assert Machine.load().worker_count == 3
    monkeypatch.setenv("GPT2_WORKERS", "5")
    monkeypatch.setenv("GPT2_FRESH", "1")
    machine = Machine.load()
    assert (machine.workers, machine.micro_batch, machine.fresh) == (5, 4, True)
    monkeypatch.setenv("GPT2_WORKERS", "")  # empty: not set
    assert Machine.load().workers == 3


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("GPT2_WORKER", "2", r"GPT2_WORKERS\?"),
        ("GPT2_ZZZ", "2", "GPT2_DEVICE"),
        ("GPT2_WORKERS", "many", "'many'"),
        ("GPT2_WORKERS", "0", "'0'"),
        ("GPT2_DEVICE", "gpu", "'cpu' or 'cuda'.*'gpu'"),
    ],
)
def test_invalid_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hint: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^{variable}: .*{hint}"):
        Machine.load()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("wrokers: 2\n", r"wrokers: .*workers\?"),
        ("workers: -1\n", "workers: .*-1"),
        ("- workers\n", "key: value"),
        ("workers: [\n", "line 2"),
    ],
)
def test_invalid_key_of_the_file_is_named(text: str, match: str) -> None:
    Path("machine.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"machine\.yaml.*{match}"):
        Machine.load()


def test_private_folder_is_not_one_that_others_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"gpt2-{os.getuid()}"
    assert private_folder() == private_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match=folder.name):
        private_folder()
    folder.rmdir()
    (tmp_path / "theirs").mkdir()
    folder.symlink_to("theirs")
    with pytest.raises(UserError, match=folder.name):
        private_folder()
    folder.unlink()
    folder.touch()
    with pytest.raises(UserError, match=folder.name):
        private_folder()
