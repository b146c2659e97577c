"""Of pipeline.atomic: whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.store import atomic


def test_write_bytes_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.json"
    atomic.write_bytes(path, b"one")
    atomic.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_write_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    atomic.write_bytes(path, b"one")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_bytes(path, b"two")
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_hard_linked_file_is_replaced_and_not_written_into(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "cached"
    atomic.write_bytes(path, b"one")
    os.link(path, link)
    atomic.write_bytes(path, b"two")
    assert link.read_bytes() == b"one"


def test_json_is_written_one_way() -> None:
    assert atomic.json_bytes({"b": 1, "a": ["é"]}) == (
        '{\n  "a": [\n    "é"\n  ],\n  "b": 1\n}\n'.encode()
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.json_bytes({"a": float("nan")})


def test_hashes(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert atomic.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert atomic.sha256_json({"a": 1, "b": [2]}) == atomic.sha256_json({"b": [2], "a": 1})
    assert atomic.sha256_json({"a": 1}) != atomic.sha256_json({"a": "1"})
