"""Stage `verify`: every byte of the data against its manifest, and what the data is like."""

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline import atomic, checks, stage
from pipeline.cluster import cluster, run_tasks
from pipeline.encode import dataset_key
from pipeline.machine import Machine
from pipeline.manifest import NAME, Manifest, RawManifest
from pipeline.params import VerifyParams, load_section
from pipeline.progress import Progress
from pipeline.shards import HEADER_BYTES, TOKEN_DTYPE
from pipeline.store import Store, merged_key, unlink_bad

RAW = Path("data/raw")
TOKENS = Path("data/tokens")
VERIFIED = Path("data/verified.json")
METRICS = Path("metrics/data.json")
LENGTHS = Path("metrics/document_lengths.csv")


class DataFault(Exception):
    """The data on disk is not what its manifests say."""


def verify(raw: Path, tokens: Path, params: VerifyParams, machine: Machine) -> Manifest:
    """Check `data/raw` and `data/tokens` against their manifests.

    Damaged files are named, and removed from the workspace and the store, so that the next
    `dvc repro` makes exactly them anew.

    Raises:
        UserError: there is no manifest to check against.
        DataFault: naming each file that differs.
    """
    raw_manifest, manifest = RawManifest.load(raw), Manifest.load(tokens)
    tasks: list[tuple[Any, ...]] = [
        (checks.check_source, raw.absolute(), file) for file in raw_manifest.files
    ]
    column = raw_manifest.text_column
    for shard in manifest.shards:
        tasks.append((checks.check_shard, tokens.absolute(), shard, manifest.tokenizer))
        if params.retokenize:
            tasks.append(
                (
                    checks.check_tokens,
                    raw.absolute(),
                    column,
                    tokens.absolute(),
                    shard,
                    params.retokenize,
                )
            )
    faults = _check_folder(raw, tokens, raw_manifest, manifest)
    total = sum(f.bytes for f in raw_manifest.files) + sum(map(_shard_bytes, manifest.shards))
    with cluster(machine) as cpus, Progress("verify", len(tasks), "checks") as progress:
        for _, found in run_tasks(_check, tasks, 2 * cpus, "verify"):
            faults += found
            progress.advance(1, f"{len(faults)} faults")
    if faults:
        _remove_bad(faults, raw, tokens, manifest, Store.open(machine))
        raise DataFault("\n".join(faults))
    print(f"verify: {len(tasks)} checks over {total / 1e6:.1f} MB, no fault", flush=True)
    return manifest


def _check(check: Any, *args: Any) -> list[str]:
    found: list[str] = check(*args)
    return found


def _shard_bytes(shard: Any) -> int:
    size: int = HEADER_BYTES + shard.tokens * TOKEN_DTYPE.itemsize
    return size


def _check_folder(
    raw: Path, tokens: Path, raw_manifest: RawManifest, manifest: Manifest
) -> list[str]:
    """What is checked without reading a shard: names, records, totals, and where it came from."""
    faults = []
    if manifest.source != raw_manifest:
        faults.append(f"{tokens / NAME}: was made from another {raw / NAME}")
    known = {NAME, *(s.name for s in manifest.shards), *(s.docs_name for s in manifest.shards)}
    records = sorted((tokens / "chunks").glob("*.json"))
    known |= {f"chunks/{path.name}" for path in records}
    for path in sorted(tokens.rglob("*")):
        if path.is_file() and path.relative_to(tokens).as_posix() not in known:
            faults.append(f"{path}: belongs to no shard of the manifest")
    parts: dict[str, list[tuple[str, int, int]]] = {}
    for shard in manifest.shards:
        for part in shard.parts:
            parts.setdefault(part.chunk_key, []).append((shard.split, part.tokens, part.docs))
    faults += _check_records(records, parts, tokens, manifest)
    for split, totals in manifest.totals.items():
        of_split = [shard for shard in manifest.shards if shard.split == split]
        for key in ("tokens", "docs", "text_bytes"):
            if sum(getattr(shard, key) for shard in of_split) != getattr(totals, key):
                faults.append(f"{tokens / NAME}: totals.{split}.{key} is not the shards' sum")
    return faults


def _check_records(
    paths: list[Path],
    parts: dict[str, list[tuple[str, int, int]]],
    tokens: Path,
    manifest: Manifest,
) -> list[str]:
    """The chunks' commit records: each readable, one a chunk, and together the dataset's key."""
    if faults := [fault for path in paths for fault in checks.check_record(path, parts)]:
        return faults
    by_key: dict[str, Path] = {}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if (first := by_key.setdefault(record["chunk_key"], path)) is not path:
            faults.append(f"{path}: the same chunk as {first.name}")
    if missing := parts.keys() - by_key.keys():
        faults.append(f"{tokens / 'chunks'}: {len(missing)} records are missing")
    if not faults and dataset_key(records) != manifest.dataset_key:
        faults.append(f"{tokens / NAME}: its dataset_key is not that of the chunks' records")
    return faults


def _remove_bad(
    faults: list[str], raw: Path, tokens: Path, manifest: Manifest, store: Store
) -> None:
    """Remove the damaged files and the pieces of the store that share their bytes."""
    bad = {Path(fault.split(": ")[0]).absolute() for fault in faults}
    for path in bad:
        if path.is_file():
            unlink_bad(path)
    # A chunk whose record is bad is one that no good record names.
    named = {part.chunk_key for shard in manifest.shards for part in shard.parts}
    for key in named - {key for path in (tokens / "chunks").glob("*.json") if (key := _key(path))}:
        _discard(store, "chunks", key)
    for file in manifest.source.files:
        if (raw / file.path).absolute() in bad:
            _discard(store, "files", file.sha256)
    for shard in manifest.shards:
        if bad & {(tokens / name).absolute() for name in (shard.name, shard.docs_name)}:
            keys = [part.chunk_key for part in shard.parts]
            if shard.split == "val":
                _discard(store, "merged", merged_key(keys))
            else:
                _discard(store, "chunks", keys[0])


def _discard(store: Store, kind: str, key: str) -> None:
    with store.lock(kind, key):
        store.discard(kind, key)


def _key(record: Path) -> str | None:
    """The chunk key that a record names, of those that are still there."""
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["chunk_key"])
    except (ValueError, KeyError, TypeError):
        return None


def data_metrics(tokens: Path, manifest: Manifest) -> tuple[dict[str, Any], str]:
    """What the data is like: the metrics, and the documents' lengths as CSV."""
    lengths: Counter[int] = Counter()
    for path in (tokens / "chunks").glob("*.json"):
        for facts in json.loads(path.read_text(encoding="utf-8"))["splits"].values():
            lengths.update({int(size): count for size, count in facts["lengths"].items()})
    train, val = manifest.totals["train"], manifest.totals["val"]
    n_tokens, n_docs = train.tokens + val.tokens, train.docs + val.docs
    metrics = {
        "documents": n_docs,
        "tokens": n_tokens,
        "train_tokens": train.tokens,
        "val_tokens": val.tokens,
        "text_bytes": train.text_bytes + val.text_bytes,
        "bytes_per_token": round(
            (train.text_bytes + val.text_bytes) / max(n_tokens - n_docs, 1), 4
        ),
        "tokens_per_document": round(n_tokens / max(n_docs, 1), 1),
        "shards": train.shards + val.shards,
        "skipped": sum(manifest.skipped.values()),
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["tokens", "documents"])
    for size in sorted(lengths):
        writer.writerow([f"{size:,} to {2 * size - 1:,}", lengths[size]])
    return metrics, table.getvalue()


def main() -> None:
    """Read the parameters, verify, write the metrics, print one summary."""
    params = load_section("verify", VerifyParams)
    try:
        manifest = verify(RAW, TOKENS, params, Machine.load())
    except DataFault as fault:
        print(f"verify: the data is damaged; `dvc repro` makes these anew:\n{fault}", flush=True)
        raise SystemExit(stage.FAULT) from None
    metrics, lengths = data_metrics(TOKENS, manifest)
    atomic.write_json(METRICS, metrics)
    atomic.write_bytes(LENGTHS, lengths.encode())
    atomic.write_json(VERIFIED, {"manifest_sha256": atomic.sha256_file(TOKENS / NAME)})
    print("verify: " + ", ".join(f"{key} {value:,}" for key, value in metrics.items()))


if __name__ == "__main__":
    stage.run(main)
