"""`python -m pipeline.store`: list the store, or prune unused pieces."""

import contextlib
import time
from pathlib import Path
from typing import Any

from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, project_root
from pipeline.store import atomic
from pipeline.store.store import Store, merged_key


def _pieces_of_outs(root: Path, store: Store) -> set[tuple[str, str]]:
    """Return (kind, key) of the pieces that the outs in the workspace consist of.

    Raises:
        OSError: A file cannot be read.
        ValueError, LookupError, TypeError: A file is damaged.
    """

    def load(path: Path) -> dict[str, Any]:
        value: dict[str, Any] = atomic.parse_json(atomic.read_bytes(path)) if path.exists() else {}
        return value

    used = {("files", f["sha256"]) for f in load(root / "data/raw/manifest.json").get("files", [])}
    for origin in (store.root / "origins").glob("*/origin.json"):
        if ("files", load(origin)["sha256"]) in used:
            used.add(("origins", origin.parent.name))
    selection = load(root / "data/selection/manifest.json")
    used |= set(map(tuple, selection.get("pieces", [])))
    if key := selection.get("selection_key"):
        measured = load(store.path("measured", key) / "pieces.json").get("pieces", [])
        used |= {("measured", key), *map(tuple, measured)}
    for path in (root / "data/tokens/chunks").glob("*.json"):
        record = load(path)
        used |= {("chunks", record[key]) for key in ("chunk_key", "cut_from") if key in record}
    for shard in load(root / "data/tokens/manifest.json").get("shards", []):
        used.add(("merged", merged_key([part["chunk_key"] for part in shard["parts"]])))
    if run := load(root / "artifacts/checkpoint/state.json").get("run_key"):
        used.add(("runs", run))
    return used


def main(argv: list[str] | None = None) -> None:
    """List the pieces in the store; with --prune, remove the unused ones."""
    parser = command.Parser(prog="python -m pipeline.store", description=main.__doc__)
    parser.add_argument(
        "--prune", action="store_true", help="remove pieces that no out in the workspace uses"
    )
    parser.add_argument(
        "--older-than",
        type=float,
        metavar="DAYS",
        help="with --prune (required): only pieces that were not used for this many days",
    )
    args = parser.parse_args(argv)
    if args.prune != (args.older_than is not None):
        parser.error("--prune and --older-than DAYS must be given together")
    store = Store.open(Machine.load())
    try:
        used = _pieces_of_outs(project_root(), store)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"data/, artifacts/: a manifest or record is damaged ({error!r}); run `dvc repro`, "
            "then this command"
        ) from None
    print(store.root)
    kinds = (p for p in store.root.iterdir() if p.name not in ("locks", "tmp") and p.is_dir())
    for kind in sorted(kinds):
        pieces, size, pruned = 0, 0, 0
        for folder in sorted(kind.iterdir()):
            files = [path for path in folder.rglob("*") if path.is_file()]
            newest = max(path.lstat().st_mtime for path in (*files, folder))
            stale = args.prune and time.time() - newest > args.older_than * 86400
            if stale and (kind.name, folder.name) not in used:
                # A locked piece is in use: keep it.
                with (
                    contextlib.suppress(UserError),
                    store.lock(kind.name, folder.name, wait=False),
                ):
                    atomic.remove(folder)
                    pruned += 1
                    continue
            pieces += 1
            size += sum(path.stat().st_size for path in files)
        note = f", {pruned} pruned" if args.prune else ""
        print(f"  {kind.name:8} {pieces:6} pieces {size / 1e6:12.1f} MB{note}")


if __name__ == "__main__":
    command.run(main)
