"""Of pipeline.probe: what a node says of itself. On real nodes: test_hosts.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.cluster import probe
from pipeline.runtime.errors import UserError
from pipeline.store.store import Store


def test_the_drivers_own_machine_is_fit(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_text("text")
    store = Store(tmp_path / "store")
    with probe.probing(store, files) as asked:
        assert asked.versions["python"].startswith("3.")
        assert probe.decode(probe.encode(asked)) == asked
        assert probe.complaints(asked, "node-1") == ([], [])
        assert (asked.folder / "node-1").exists()
        Store(tmp_path / "store").sweep()  # another run's, at the same time
        assert asked.folder.exists()
    assert not asked.folder.exists()
    assert list((store.root / "locks").iterdir()) == []


def test_what_differs_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    with probe.probing(Store(tmp_path / "store"), [tmp_path / "a"]) as asked:
        other = asked.versions | {"tiktoken": "0.0.1", "this project's code": "0123"}
        wrong, _ = probe.complaints(dataclasses.replace(asked, versions=other))
        assert [line.split()[0] for line in wrong] == ["tiktoken", "this"]
        assert "where the driver has 0.0.1" in wrong[0]
        (tmp_path / "a").write_text("another text")
        assert probe.complaints(asked)[0] == [f"another {tmp_path / 'a'} (12 bytes, not 4)"]
        (tmp_path / "a").unlink()
        assert probe.complaints(asked)[0] == [f"no {tmp_path / 'a'} (No such file or directory)"]
        (asked.folder / "driver").write_text("of another driver, that has this path too")
        assert probe.complaints(asked)[0] == [f"no share in {asked.store} (it is another)"]


def test_locks_that_do_not_reach_are_doubtful(tmp_path: Path) -> None:
    with probe.probing(Store(tmp_path), []) as asked:
        lock = tmp_path / "locks" / asked.folder.name
        lock.unlink()  # the same name, and another file: as on a mount without locks
        lock.touch()
        wrong, doubtful = probe.complaints(asked)
        assert wrong == []
        assert doubtful[0].startswith("locks do not reach it")


def test_a_worker_of_a_late_node_looks_before_its_first_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.look_here.cache_clear()
    with probe.probing(Store(tmp_path), []) as asked:
        monkeypatch.setenv(probe.VARIABLE, probe.encode(asked))
        assert probe.guarded(len)([1, 2]) == 2
    probe.look_here.cache_clear()
    with pytest.raises(UserError, match=r"^the cluster's nodes do not fit: .* has no share in "):
        probe.guarded(len)([])
    probe.look_here.cache_clear()
