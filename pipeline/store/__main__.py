"""`python -m pipeline.store`: what the store holds, and `--prune` of what nothing names."""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, project_root
from pipeline.store.store import Store, merged_key


def _named_by_outs(root: Path, store: Store) -> set[tuple[str, str]]:
    """The pieces that the outs in the workspace are made of, as (kind, key)."""

    def load(path: Path) -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    named = {("files", f["sha256"]) for f in load(root / "data/raw/manifest.json").get("files", [])}
    for note in (store.root / "origins").glob("*/origin.json"):
        if ("files", load(note)["sha256"]) in named:
            named.add(("origins", note.parent.name))
    for record in (root / "data/tokens/chunks").glob("*.json"):
        named.add(("chunks", load(record)["chunk_key"]))
    for shard in load(root / "data/tokens/manifest.json").get("shards", []):
        named.add(("merged", merged_key([part["chunk_key"] for part in shard["parts"]])))
    if run := load(root / "artifacts/checkpoint/state.json").get("run_key"):
        named.add(("runs", run))
    return named


def main(argv: list[str] | None = None) -> None:
    """`python -m pipeline.store`: what the store holds, and `--prune` of what nothing names."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.store", description=main.__doc__)
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove pieces that no out in the workspace is made of",
    )
    parser.add_argument(
        "--older-than",
        type=float,
        default=None,
        metavar="DAYS",
        help="with --prune: only pieces untouched for so many days (required)",
    )
    args = parser.parse_args(argv)
    if args.prune != (args.older_than is not None):
        parser.error("--prune and --older-than DAYS go together")
    store = Store.open(Machine.load())
    named = _named_by_outs(project_root(), store)
    print(f"{store.root}")
    for kind_folder in sorted(p for p in store.root.iterdir() if p.name not in ("locks", "tmp")):
        pieces, size, pruned = 0, 0, 0
        for folder in sorted(kind_folder.iterdir()):
            files = [path for path in folder.rglob("*") if path.is_file()]
            newest = max((path.stat().st_mtime for path in (*files, folder)), default=0.0)
            stale = args.prune and time.time() - newest > args.older_than * 86400
            if stale and (kind_folder.name, folder.name) not in named:
                # One that somebody works on is not stale.
                with (
                    contextlib.suppress(UserError),
                    store.lock(kind_folder.name, folder.name, wait=False),
                ):
                    shutil.rmtree(folder)
                    pruned += 1
                    continue
            pieces += 1
            size += sum(path.stat().st_size for path in files)
        note = f", {pruned} pruned" if args.prune else ""
        print(f"  {kind_folder.name:8} {pieces:6} pieces {size / 1e6:12.1f} MB{note}")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
