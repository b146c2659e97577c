"""Of pipeline.machine: machine.yaml and GPT2_* variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_file_or_variables() -> None:
    machine = Machine.load()
    assert machine == Machine()
    assert machine.workers is None
    assert machine.worker_count >= 1
    assert not machine.fresh


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("machine.yaml").write_text("workers: 3\nmicro_batch: 4\n")
    assert Machine.load().workers == 3
    assert Machine.load().worker_count == 3
    monkeypatch.setenv("GPT2_WORKERS", "5")
    monkeypatch.setenv("GPT2_FRESH", "1")
    machine = Machine.load()
    assert (machine.workers, machine.micro_batch, machine.fresh) == (5, 4, True)
    monkeypatch.setenv("GPT2_WORKERS", "")  # empty: not set
    assert Machine.load().workers == 3


def test_the_file_is_that_of_the_main_checkout(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "machine.yaml").write_text("workers: 3\n")
    (folder / "workspace").mkdir()
    monkeypatch.chdir(folder / "workspace")
    assert Machine.load().workers is None
    monkeypatch.setenv("DVC_ROOT", str(folder))
    assert Machine.load().workers == 3


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GPT2_WORKER", "2", r"GPT2_WORKER: unknown variable; did you mean GPT2_WORKERS\?"),
        ("GPT2_ZZZ", "2", r"GPT2_ZZZ: unknown variable; .*GPT2_"),
        ("GPT2_WORKERS", "many", r"^GPT2_WORKERS: .*integer.*'many'"),
        ("GPT2_WORKERS", "0", r"^GPT2_WORKERS: .*greater.*'0'"),
        ("GPT2_WORKERS", "-1", r"^GPT2_WORKERS: .*greater.*'-1'"),
        ("GPT2_DEVICE", "gpu", r"^GPT2_DEVICE: .*'cpu' or 'cuda'.*'gpu'"),
    ],
)
def test_mistakes_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        Machine.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrokers: 2\n", r"machine\.yaml.*wrokers: unknown key; did you mean workers\?"),
        ("workers: -1\n", r"machine\.yaml.*workers: .*greater.*-1"),
        ("workers: many\n", r"machine\.yaml.*workers: .*'many'"),
        ("- workers\n", r"machine\.yaml: expected"),
        ("workers: [\n", r"machine\.yaml: not readable as YAML"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str) -> None:
    Path("machine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        Machine.load()
