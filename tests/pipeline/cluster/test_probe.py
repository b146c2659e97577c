"""Tests for pipeline.cluster.probe on this machine. On several hosts: test_hosts.py."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from pipeline.cluster import probe
from pipeline.runtime.errors import UserError
from pipeline.store.store import Store
from tests.support.repo import REPO


def test_driver_passes_its_own_probe(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_text("text")
    store = Store(tmp_path / "store")
    with probe.open_probe(store, files) as opened:
        assert opened.versions["python"].startswith("3.")
        assert probe.decode(probe.encode(opened)) == opened
        assert probe.compare(opened, "node-1") == ([], [])
        assert (opened.folder / "node-1").exists()
        Store(tmp_path / "store").sweep()  # of another pipeline that starts now
        assert opened.folder.exists()
    assert not opened.folder.exists()
    assert list((store.root / "locks").iterdir()) == []


@pytest.mark.parametrize("module", ["params.py", "tokenize/encode_chunk.py", "format/shards.py"])
def test_code_of_every_room_is_compared(tmp_path: Path, module: str) -> None:
    package = tmp_path / "pipeline"
    shutil.copytree(REPO / "pipeline", package, ignore=shutil.ignore_patterns("__pycache__"))
    assert probe.versions(package) == probe.versions()
    with open(package / module, "a") as file:
        file.write("# changed\n")
    changed = probe.versions(package)
    differs = {name for name, found in probe.versions().items() if changed[name] != found}
    assert differs == {"this project's code"}


def test_every_difference_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("text")
    with probe.open_probe(Store(tmp_path / "store"), [path]) as opened:
        other = opened.versions | {"tiktoken": "0.0.1", "this project's code": "0123"}
        errors, _ = probe.compare(dataclasses.replace(opened, versions=other))
        assert [line.split()[0] for line in errors] == ["tiktoken:", "this"]
        assert "0.0.1" in errors[0]
        path.write_text("another text")
        (error,) = probe.compare(opened)[0]
        assert error.startswith(f"{path}: 12 bytes ")
        path.unlink()
        (error,) = probe.compare(opened)[0]
        assert error.startswith(f"{path}: ")
        (opened.folder / "driver").write_text("another driver with the same path")
        (error,) = probe.compare(opened)[0]
        assert error.startswith(f"{opened.store}: ")


def test_locks_that_do_not_reach_a_node_are_only_a_warning(tmp_path: Path) -> None:
    with probe.open_probe(Store(tmp_path), []) as opened:
        lock = tmp_path / "locks" / opened.folder.name
        lock.unlink()  # a new file of the same name has no lock, as on a mount without locks
        lock.touch()
        errors, warnings = probe.compare(opened)
        assert (errors, len(warnings)) == ([], 1)


def test_worker_of_a_node_added_later_checks_it_before_its_first_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.check_this_node.cache_clear()
    with probe.open_probe(Store(tmp_path), []) as opened:
        monkeypatch.setenv(probe.VARIABLE, probe.encode(opened))
        assert probe.with_node_check(len)([1, 2]) == 2
    probe.check_this_node.cache_clear()
    with pytest.raises(UserError, match=str(tmp_path)):
        probe.with_node_check(len)([])
    probe.check_this_node.cache_clear()
