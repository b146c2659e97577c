"""Of pipeline.store: what counts as a finished piece, and what becomes of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.store.__main__ import main
from pipeline.store.store import INDEX, Store, publish, require_space, unlink_bad
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


def test_an_intact_piece_is_found(store: Store) -> None:
    assert store.find("chunks", "abc") is None
    folder = make(store)
    assert store.find("chunks", "abc") == folder
    assert (folder / "a.bin").read_bytes() == b"twelve bytes"
    assert list((store.root / "tmp").iterdir()) == []


def test_a_touched_piece_is_hashed_once_and_kept(store: Store) -> None:
    folder = make(store)
    os.utime(folder / "a.bin", ns=(5, 5))
    assert store.find("chunks", "abc") == folder
    assert json.loads((folder / INDEX).read_text())["a.bin"]["mtime_ns"] == 5


def test_a_found_piece_is_not_hashed_again(store: Store) -> None:
    """By design the index is believed while size and mtime agree; `verify` hashes always."""
    folder = make(store)
    flip(folder / "a.bin", 3, keep_mtime=True)
    assert store.find("chunks", "abc") == folder


def flip_a(folder: Path) -> None:
    flip(folder / "a.bin", 3)


def truncate_a(folder: Path) -> None:
    os.truncate(folder / "a.bin", 4)


def truncate_a_and_keep_its_mtime(folder: Path) -> None:
    status = (folder / "a.bin").stat()
    os.truncate(folder / "a.bin", 4)
    os.utime(folder / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))


def remove_b(folder: Path) -> None:
    (folder / "b.bin").unlink()


def index_of(content: str):
    def damage(folder: Path) -> None:
        (folder / INDEX).write_text(content)

    damage.__name__ = f"index {content[:12]!r}"
    return damage


DAMAGES = [
    flip_a, truncate_a, truncate_a_and_keep_its_mtime, remove_b, index_of(""), index_of("{"),
    index_of("[]"), index_of("null"), index_of('{"a.bin": {}}'), index_of('{"a.bin": 3}'),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_piece_is_not_found_and_can_be_made_anew(
    store: Store, damage, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(store)
    damage(folder)
    assert store.find("chunks", "abc") is None
    assert "chunks/abc/" in capsys.readouterr().out
    make(store)
    assert store.find("chunks", "abc") == folder


def test_a_failed_make_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyError), store.make("chunks", "abc") as folder:  # noqa: PT012
        (folder / "a.bin").write_bytes(b"half")
        raise KeyError
    assert store.find("chunks", "abc") is None
    assert list((store.root / "tmp").iterdir()) == []


def test_a_failed_make_keeps_the_piece_that_stood_there(store: Store) -> None:
    folder = make(store)
    with pytest.raises(KeyError), store.make("chunks", "abc"):
        raise KeyError
    assert store.find("chunks", "abc") == folder


def test_make_removes_what_a_dead_process_left_of_the_piece(store: Store) -> None:
    dead = store.root / "tmp" / "chunks-abc"
    dead.mkdir(parents=True)
    (dead / "c.bin").write_bytes(b"half")
    assert not (make(store) / "c.bin").exists()
    assert list((store.root / "tmp").iterdir()) == []


def test_what_dead_processes_left_is_swept_and_what_lives_is_not(store: Store) -> None:
    for name in ("chunks-dead", "chunks-alive"):
        (store.root / "tmp" / name).mkdir(parents=True)
    with store.lock("chunks", "alive"):
        store.sweep()
        assert [path.name for path in (store.root / "tmp").iterdir()] == ["chunks-alive"]


def test_make_replaces_the_remains_of_a_killed_discard(store: Store) -> None:
    folder = make(store)
    (folder / INDEX).unlink()
    assert store.find("chunks", "abc") is None
    make(store, b"new")
    assert (folder / "a.bin").read_bytes() == b"new"


def test_a_discarded_file_is_writable_where_it_is_linked(store: Store, tmp_path: Path) -> None:
    """DVC trusts a read-only object in its cache: mode 0644 has it hash and replace the object."""
    folder = make(store)
    cached = tmp_path / "cached"
    os.link(folder / "a.bin", cached)
    cached.chmod(0o444)
    store.discard("chunks", "abc")
    assert cached.stat().st_mode & 0o777 == 0o644
    assert not folder.exists()
    store.discard("chunks", "abc")  # nothing there: nothing done
    unlink_bad(cached)
    assert not cached.exists()


def test_publish_leaves_exactly_the_files(tmp_path: Path) -> None:
    source = tmp_path / "piece.bin"
    source.write_bytes(b"piece")
    out = tmp_path / "data" / "tokens"
    (out / "chunks").mkdir(parents=True)
    (out / "chunks" / "stale.json").write_text("old")
    (out / "stale.bin").write_text("old")
    crashed = out.with_name(".tokens.new")
    crashed.mkdir()
    (crashed / "half.bin").write_text("of a killed run")
    publish({"train-0.bin": source, "chunks/0.json": source, "manifest.json": b"{}"}, out)
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == ["chunks/0.json", "manifest.json", "train-0.bin"]
    assert (out / "train-0.bin").samefile(source)  # a hard link: no second copy on disk
    assert [p.name for p in out.parent.iterdir()] == ["tokens"]


def test_publish_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    out = tmp_path / "out"
    out.symlink_to(elsewhere)
    publish({"manifest.json": b"{}"}, out)
    assert not out.is_symlink()
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    assert (elsewhere / "precious").read_text() == "keep"


def test_publish_copies_to_another_file_system(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    source = tmp_path / "piece.bin"
    source.write_bytes(b"piece")
    out = memory / f"gpt2-test-{os.getpid()}"
    try:
        publish({"train.bin": source}, out)
        assert (out / "train.bin").read_bytes() == b"piece"
        assert (out / "train.bin").stat().st_mtime_ns == source.stat().st_mtime_ns
        (out / "train.bin").write_bytes(b"other")
        assert source.read_bytes() == b"piece"
    finally:
        publish({}, out)
        out.rmdir()


HOLD = """\
import sys, time
from pathlib import Path
from pipeline.store import Store
with Store(Path(sys.argv[1])).lock("chunks", "abc"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_holds_off_a_second_process_until_the_first_dies(store: Store) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process works on chunks/abc"):  # noqa: SIM117
            with store.lock("chunks", "abc", wait=False):
                pass
        with store.lock("chunks", "another", wait=False):
            pass
    finally:
        holder.kill()
        holder.wait()
    with store.lock("chunks", "abc", wait=False):
        pass


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a test")
    with pytest.raises(UserError, match=r"a test needs 1000000000\.0 GB .* work_dir"):
        require_space(tmp_path, 10**18, "a test")


def test_the_store_lies_in_the_project_wherever_dvc_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment in a workspace of its own shares the store of the main checkout."""
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


def test_a_work_dir_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="work_dir: cannot use"):
        Store.open(Machine(work_dir=tmp_path / "file"))


@pytest.fixture
def filled(
    tmp_path: Path, small_raw: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Store, set[Path]]:
    """A project whose tokens are published, and a store that also holds what nothing names."""
    from pipeline.params import TokenizeParams

    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    machine = Machine(workers=1)
    params = TokenizeParams(shard_tokens=3000, val_per_10k=1500)
    tokenize_here(small_raw, tmp_path / "data" / "tokens", params, machine)
    store = Store.open(machine)
    named = {*(store.root / "chunks").iterdir(), *(store.root / "merged").iterdir()}
    make(store, key="unnamed")
    store.folder("runs", "unnamed")
    return store, named


def pieces(store: Store) -> set[Path]:
    return {p for kind in ("chunks", "merged", "runs") for p in (store.root / kind).iterdir()}


def test_prune_keeps_what_the_outs_are_made_of(
    filled: tuple[Store, set[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    store, named = filled
    everything = pieces(store)
    assert len(everything) == len(named) + 2
    main([])
    assert pieces(store) == everything
    assert f"chunks   {len([p for p in named if p.parent.name == 'chunks']) + 1:6} pieces" in (
        capsys.readouterr().out
    )
    main(["--prune", "--older-than", "1"])
    assert pieces(store) == everything  # all of it is younger
    old = time.time() - 3 * 86400
    for path in (*store.root.glob("*/*/*"), *store.root.glob("*/*")):
        os.utime(path, (old, old))
    main(["--prune", "--older-than", "4"])
    assert pieces(store) == everything
    main(["--prune", "--older-than", "2"])
    assert pieces(store) == named


def test_prune_wants_an_age(filled: tuple[Store, set[Path]]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--prune"])
    assert stopped.value.code == 2
