"""Tests for pipeline.store: pieces, locks, published folders, and `python -m pipeline.store`."""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import TokenizeParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.__main__ import main
from pipeline.store.store import INDEX, Store, publish, require_space, unlink_damaged
from tests.support.damage import FEW, damaged
from tests.support.repo import REPO
from tests.support.small_data import flip, tokenize_here


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "work")


def make(store: Store, content: bytes = b"twelve bytes", key: str = "abc") -> Path:
    with store.make("chunks", key) as folder:
        (folder / "a.bin").write_bytes(content)
        (folder / "b.bin").write_bytes(b"b")
    return store.root / "chunks" / key


def test_intact_piece_is_found_and_a_new_mtime_recorded(store: Store) -> None:
    assert store.find("chunks", "abc") is None
    folder = make(store)
    assert store.find("chunks", "abc") == folder
    assert (folder / "a.bin").read_bytes() == b"twelve bytes"
    assert list((store.root / "tmp").iterdir()) == []
    os.utime(folder / "a.bin", ns=(5, 5))
    assert store.find("chunks", "abc") == folder
    assert json.loads((folder / INDEX).read_text())["a.bin"]["mtime_ns"] == 5


def test_file_with_recorded_size_and_mtime_is_not_hashed(store: Store) -> None:
    """By design: `verify` is the stage that hashes every byte. Small files are always hashed."""
    folder = make(store, bytes(10_000))
    flip(folder / "a.bin", 3, keep_mtime=True)
    assert store.find("chunks", "abc") == folder
    flip(folder / "b.bin", 0, keep_mtime=True)
    assert store.find("chunks", "abc") is None


def flip_a(folder: Path) -> None:
    flip(folder / "a.bin", 3)


def truncate_a(folder: Path) -> None:
    """The size alone differs: the mtime is kept."""
    status = (folder / "a.bin").stat()
    os.truncate(folder / "a.bin", 4)
    os.utime(folder / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))


def remove_b(folder: Path) -> None:
    (folder / "b.bin").unlink()


def flip_recorded_hash(folder: Path) -> None:
    index = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(index.replace(b'"sha256": "', b'"sha256": "0', 1))


def folder_for_a(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()
    (folder / "a.bin" / "foreign").touch()


def loop_for_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to(INDEX)


def loop_for_a(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("a.bin")


def file_for_piece(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


OTHER = (flip_recorded_hash, folder_for_a, loop_for_index, loop_for_a, file_for_piece)
INDICES = ("", "[", "[]", "{}", '{"a.bin": {}}', '{"a.bin": 3}', 50_000 * "[")


@pytest.mark.parametrize("damage", [flip_a, truncate_a, remove_b, *OTHER, *INDICES])
def test_damaged_piece_is_not_found_and_can_be_rebuilt(
    store: Store, damage: str | Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(store)
    if isinstance(damage, str):
        (folder / INDEX).write_text(damage)
    else:
        damage(folder)
    assert store.find("chunks", "abc") is None
    assert "chunks/abc/" in capsys.readouterr().out
    make(store)
    assert store.find("chunks", "abc") == folder


def test_index_of_earlier_code_is_checked_and_written_again(store: Store) -> None:
    folder = make(store, bytes(10_000))
    sealed = (folder / INDEX).read_bytes()
    atomic.write_json(folder / INDEX, atomic.read_sealed(folder / INDEX))
    assert store.find("chunks", "abc") == folder
    assert (folder / INDEX).read_bytes() == sealed
    atomic.write_json(folder / INDEX, atomic.read_sealed(folder / INDEX))
    flip(folder / "a.bin", 3, keep_mtime=True)
    assert store.find("chunks", "abc") is None


@FEW
@given(data=st.data())
def test_any_bytes_are_an_index_or_damage(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store(tmp_path_factory.mktemp("work"))
    index = make(store) / INDEX
    index.write_bytes(data.draw(damaged(index.read_bytes())))
    if (folder := store.find("chunks", "abc")) is not None:
        assert (
            store.sha256("chunks", "abc").items()
            <= {
                "a.bin": atomic.sha256_file(folder / "a.bin"),
                "b.bin": atomic.sha256_file(folder / "b.bin"),
            }.items()
        )
    store.discard("chunks", "abc")
    assert store.find("chunks", "abc") is None


def test_removing_follows_no_link(store: Store, tmp_path: Path) -> None:
    """A private file beside the pieces keeps its mode and its content."""
    private, outside = tmp_path / "private", tmp_path / "outside"
    private.write_text("key")
    private.chmod(0o400)
    outside.mkdir()
    (outside / "file").touch()
    folder = make(store)
    (folder / "link").symlink_to(private)
    (folder / "folder").symlink_to(outside)
    store.discard("chunks", "abc")
    (store.root / "chunks" / "abc").symlink_to(outside)  # the piece itself
    (store.root / "tmp" / "chunks-abc").symlink_to(outside)
    make(store)
    out = tmp_path / "out"
    out.with_name(".out.new").symlink_to(outside)
    publish({"manifest.json": b"{}"}, out)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert private.stat().st_mode & 0o777 == 0o400
    cached = tmp_path / "files/md5/0a" / (30 * "b")  # linked by DVC, where it can make no hard link
    cached.parent.mkdir(parents=True)
    cached.touch(0o444)
    (tmp_path / "shard.bin").symlink_to(cached)
    unlink_damaged(tmp_path / "shard.bin")
    assert cached.stat().st_mode & 0o777 == 0o644


def test_store_that_cannot_be_written_is_named_and_can_be_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(store)
    old_index = atomic.read_sealed(folder / INDEX)
    atomic.write_json(folder / INDEX, old_index)  # `find` would seal it

    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for module, name in ((os, "utime"), (os, "replace"), (os, "mkdir"), (builtins, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            if name != "open":
                assert store.find("chunks", "abc") == folder
            if name in ("mkdir", "open"):
                with pytest.raises(UserError, match="work_dir"), store.lock("chunks", "abc"):
                    pass
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="work_dir"), store.make("chunks", "new"):
        pass
    assert (folder / "a.bin").exists()


def test_failed_make_leaves_nothing_and_keeps_the_existing_piece(store: Store) -> None:
    for key, existing in (("abc", make(store)), ("new", None)):
        with pytest.raises(KeyError), store.make("chunks", key) as folder:  # noqa: PT012
            (folder / "a.bin").write_bytes(b"half")
            raise KeyError
        assert store.find("chunks", key) == existing
        assert list((store.root / "tmp").iterdir()) == []


def test_make_removes_files_left_by_a_dead_process(store: Store) -> None:
    dead = store.root / "tmp" / "chunks-abc"
    dead.mkdir(parents=True)
    (dead / "c.bin").write_bytes(b"half")
    assert not (make(store) / "c.bin").exists()
    assert list((store.root / "tmp").iterdir()) == []


def test_sweep_removes_only_pieces_whose_lock_is_free(store: Store) -> None:
    for name in ("chunks-dead", "chunks-alive", "chunks-pipe"):
        (store.root / "tmp" / name).mkdir(parents=True)
    with store.lock("chunks", "alive"):
        os.mkfifo(store.root / "locks/chunks-pipe")  # opening it would block
        store.sweep()
        kept = {path.name for path in (store.root / "tmp").iterdir()}
        assert kept == {"chunks-alive", "chunks-pipe"}


def test_make_replaces_a_partly_discarded_piece(store: Store) -> None:
    folder = make(store)
    (folder / INDEX).unlink()
    assert store.find("chunks", "abc") is None
    make(store, b"new")
    assert (folder / "a.bin").read_bytes() == b"new"


def test_discarded_file_is_marked_in_the_dvc_cache(store: Store, tmp_path: Path) -> None:
    """DVC trusts objects in its cache that are read-only, or have the time that it knows."""
    folder = make(store)
    cached = tmp_path / "cached"
    os.link(folder / "a.bin", cached)
    cached.chmod(0o444)
    os.utime(cached, (0, 0))
    store.discard("chunks", "abc")
    assert cached.stat().st_mode & 0o777 == 0o644
    assert cached.stat().st_mtime > 0
    assert not folder.exists()
    store.discard("chunks", "abc")  # no such piece: no error
    unlink_damaged(cached)
    assert not cached.exists()


def test_published_folder_has_exactly_the_given_files(tmp_path: Path) -> None:
    source = tmp_path / "piece.bin"
    source.write_bytes(b"piece")
    out = tmp_path / "data" / "tokens"
    (out / "chunks").mkdir(parents=True)
    (out / "chunks" / "stale.json").write_text("old")
    (out / "stale.bin").write_text("old")
    crashed = out.with_name(".tokens.new")
    crashed.mkdir()
    (crashed / "half.bin").write_text("left by a killed run")
    publish({"train-0.bin": source, "chunks/0.json": source, "manifest.json": b"{}"}, out)
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == ["chunks/0.json", "manifest.json", "train-0.bin"]
    assert (out / "train-0.bin").samefile(source)  # a hard link: no second copy on disk
    assert [p.name for p in out.parent.iterdir()] == ["tokens"]


def test_publish_replaces_a_symbolic_link_but_not_its_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("keep")
    out = tmp_path / "out"
    out.symlink_to(target)
    publish({"manifest.json": b"{}"}, out)
    assert not out.is_symlink()
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    assert (target / "file").read_text() == "keep"


def test_publish_copies_to_another_file_system(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    (tmp_path / "piece.bin").write_bytes(b"piece")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        publish({"train.bin": tmp_path / "piece.bin"}, Path(folder, "out"))
        assert Path(folder, "out/train.bin").read_bytes() == b"piece"


HOLD = """\
import sys, time
from pathlib import Path
from pipeline.store.store import Store
with Store(Path(sys.argv[1])).lock("chunks", "abc"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_excludes_other_processes_until_its_holder_dies(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="chunks/abc"):  # noqa: SIM117
            with store.lock("chunks", "abc", wait=False):
                pass
        with store.lock("chunks", "another", wait=False):
            pass
        assert store.is_locked("chunks", "abc")
    finally:
        holder.kill()
        holder.wait()
    assert not store.is_locked("chunks", "abc")
    with store.lock("chunks", "abc", wait=False):
        pass


def test_looking_at_a_lock_does_not_make_it_busy(store: Store) -> None:
    with store.lock("chunks", "abc"):
        pass
    with open(store.root / "locks/chunks-abc") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.03, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with store.lock("chunks", "abc", wait=False):
            pass


def test_lack_of_space_is_an_error_that_names_work_dir(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a test")
    with pytest.raises(UserError, match=r"1000000000\.0 GB.* work_dir"):
        require_space(tmp_path, 10**18, "a test")


def test_experiments_in_a_temporary_workspace_use_the_store_of_the_main_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    monkeypatch.chdir(workspace)
    assert Store.open(Machine()).root == workspace / ".work"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert Store.open(Machine()).root == tmp_path / ".work"
    (tmp_path / "machine.yaml").write_text("work_dir: big/disk\n")
    assert Store.open(Machine()).root == tmp_path / "big" / "disk"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.open(Machine(work_dir=Path("~/work"))).root == tmp_path / "home" / "work"


def test_unusable_work_dir_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("~no-such-user/work")):
        with pytest.raises(UserError, match="work_dir"):
            Store.open(Machine(work_dir=folder))


def pieces(store: Store) -> set[Path]:
    return {p for kind in ("chunks", "merged", "runs") for p in (store.root / kind).iterdir()}


def test_prune_keeps_the_pieces_of_the_outs_and_young_pieces(
    tmp_path: Path,
    small_raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    params = TokenizeParams(shard_tokens=3000, val_per_10k=1500)
    tokenize_here(small_raw, Path("data/tokens"), params, Machine(workers=1))
    store = Store.open(Machine())
    used = {*(store.root / "chunks").iterdir(), *(store.root / "merged").iterdir()}
    make(store, key="unused")
    store.folder("runs", "unused")
    everything = pieces(store)
    main([])
    assert pieces(store) == everything
    chunks = len([p for p in everything if p.parent.name == "chunks"])
    assert re.search(rf"^ +chunks +{chunks} ", capsys.readouterr().out, re.MULTILINE)
    old = time.time() - 3 * 86400
    for path in (*store.root.glob("*/*/*"), *store.root.glob("*/*")):
        os.utime(path, (old, old))
    main(["--prune", "--older-than", "4"])
    assert pieces(store) == everything
    main(["--prune", "--older-than", "2"])
    assert pieces(store) == used


def test_prune_without_an_age_exits_with_status_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--prune"])
    assert stopped.value.code == 2
