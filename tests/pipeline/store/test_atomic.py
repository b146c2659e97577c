"""Tests for pipeline.store.atomic: atomic writes, JSON and hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import pytest

from pipeline.store import atomic


def test_write_replaces_the_file_but_not_its_hard_links_or_neighbours(tmp_path: Path) -> None:
    path, link = tmp_path / "folder/x.json", tmp_path / "cached"
    atomic.write_bytes(path, b"one")
    os.link(path, link)
    atomic.write_bytes(path, b"two")
    assert (path.read_bytes(), link.read_bytes()) == (b"two", b"one")
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    atomic.write_bytes(path, b"one")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_bytes(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_write_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    path, node = tmp_path / "x.json", platform.node()
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f".x.json.{node}.{pid}.tmp" for pid in (dead.pid, "?", os.getppid())]
    names.append(f".x.json.other-{node}.{dead.pid}.tmp")  # its process may live there
    for name in names:
        (tmp_path / name).write_text("half")
    atomic.write_bytes(path, b"one")
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", *names[2:]}


def test_json_has_one_encoding_and_no_nan() -> None:
    assert atomic.json_bytes({"b": 1, "a": ["é"]}) == (
        '{\n  "a": [\n    "é"\n  ],\n  "b": 1\n}\n'.encode()
    )
    with pytest.raises(ValueError, match="JSON"):
        atomic.json_bytes({"a": float("nan")})


def test_sha256_of_files_and_json(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert atomic.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert atomic.sha256_json({"a": 1, "b": [2]}) == atomic.sha256_json({"b": [2], "a": 1})
    assert atomic.sha256_json({"a": 1}) != atomic.sha256_json({"a": "1"})


def test_what_is_no_file_is_not_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would block
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=path.name):
            atomic.sha256_file(path)
