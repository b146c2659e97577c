"""Tests for `pipeline.download.restore`: `data/raw` completed from the store or the source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.download.restore import restore
from pipeline.download.stage import download
from pipeline.params import SourceParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from tests.support.downloads import hub_variables
from tests.support.hub import FINEWEB, Hub
from tests.support.small_data import flip, hashes, no_cluster, run_here, some_texts, write_parquet

RAW, SOURCE = Path("data/raw"), Path("source")
PARAMS = SourceParams(kind="files", paths=["source/*.parquet"])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Enter a project folder whose `data/raw` was downloaded from `source/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.download.stage.cluster", no_cluster)
    monkeypatch.setattr("pipeline.download.stage.run_tasks", run_here)
    use(monkeypatch, PARAMS)
    write_source("first", "second")
    machine = Machine()
    download({"main": PARAMS}, Store.open(machine), RAW, machine)
    return machine


def write_source(*salts: str) -> None:
    SOURCE.mkdir(exist_ok=True)
    for number, salt in enumerate(salts):
        write_parquet(SOURCE / f"part-{number}.parquet", some_texts(5, salt))


def use(monkeypatch: pytest.MonkeyPatch, params: SourceParams) -> None:
    monkeypatch.setattr("pipeline.download.restore.load_sources", lambda: {"main": params})


def remove() -> None:
    """Leave what `dvc pull` brings, the manifest."""
    for path in RAW.glob("*.parquet"):
        path.unlink()


def damage() -> None:
    """Damage the stored file as well: they are hard links."""
    (RAW / "part-0.parquet").chmod(0o644)
    flip(RAW / "part-0.parquet", 50)


def replace() -> None:
    """Put a file of another source in its place."""
    (RAW / "part-0.parquet").unlink()
    (RAW / "part-0.parquet").write_bytes((RAW / "part-1.parquet").read_bytes())


def add() -> None:
    """Leave files of another source."""
    shutil.copytree(SOURCE, RAW / "another source")


def nothing() -> None:
    """Change nothing."""


@pytest.mark.parametrize("has_store", [True, False])
@pytest.mark.parametrize("change", [remove, damage, replace, add, nothing])
def test_raw_is_restored_from_the_store_or_the_source(
    change: Callable[[], None], has_store: bool, machine: Machine
) -> None:
    before = hashes(RAW)
    change()
    if not has_store:
        shutil.rmtree(".work")
    restore(RAW, machine)
    assert hashes(RAW) == before
    inodes = {path: path.stat().st_ino for path in RAW.iterdir()}
    shutil.rmtree(SOURCE)
    restore(RAW, machine)  # nothing to do
    assert {path: path.stat().st_ino for path in RAW.iterdir()} == inodes


@pytest.mark.parametrize("kind", ["changed", "gone", "other"])
def test_a_source_without_the_recorded_bytes_is_refused(
    kind: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(".work")
    (RAW / "part-1.parquet").unlink()
    before = hashes(RAW)
    if kind == "changed":
        write_source("first", "third")
    elif kind == "gone":
        shutil.rmtree(SOURCE)
    else:
        use(monkeypatch, SourceParams(kind="sample"))
    named = {"changed": r"^data/raw/part-1\.parquet: ", "gone": "source", "other": "sources.main: "}
    with pytest.raises(UserError, match=named[kind]):
        restore(RAW, machine)
    assert hashes(RAW) == before


def test_files_of_the_hub_come_from_the_recorded_commit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"data/{path.name}": path.read_bytes() for path in SOURCE.glob("*.parquet")}
    params = SourceParams(kind="hub", config=None)
    use(monkeypatch, params)
    with Hub() as hub:
        for name, value in hub_variables(hub).items():
            monkeypatch.setenv(name, value)
        hub.repo(FINEWEB).commit({"README.md": b"no metadata", **files})
        download({"main": params}, Store.open(machine), RAW, machine)
        before = hashes(RAW)
        hub.repo(FINEWEB).commit(dict.fromkeys(files, files["data/part-0.parquet"]))
        (RAW / "data/part-1.parquet").unlink()
        shutil.rmtree(".work")
        hub.clear_requests()
        restore(RAW, machine)
        assert hashes(RAW) == before
        assert not hub.asked("resolve", "*part-0.parquet")  # it was there
        assert hub.asked("resolve", "*part-1.parquet")
