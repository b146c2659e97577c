"""Stage `verify`: check every byte of the data against the manifests, and describe the data."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.join import cluster
from pipeline.cluster.tasks import run_tasks
from pipeline.format.foreign_tokens import is_token_file
from pipeline.format.manifest import (
    NAME,
    SPLITS,
    Manifest,
    RawManifest,
    SelectionManifest,
    Shard,
    Split,
)
from pipeline.format.selection import SELECTION, Selection
from pipeline.format.shards import HEADER_BYTES, TOKEN_DTYPE
from pipeline.params import VerifyParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.progress import Progress
from pipeline.store.store import Store, merged_key, unlink_damaged
from pipeline.tokenize.chunk_record import Record, dataset_key
from pipeline.tokenize.split_by_position import val_size
from pipeline.verify import checks
from pipeline.verify.checks import Fault, Findings
from pipeline.verify.data_report import DataReport
from pipeline.verify.selection_checks import check_selected_file, check_selection

RAW = Path("data/raw")
TOKENS = Path("data/tokens")
VERIFIED = Path("data/verified.json")
STATISTICS = Path("data/statistics.json")
METRICS = Path("metrics/data.json")


class DataFault(Exception):
    """Files that do not match their manifests, one per line."""


def verify(
    raw: Path,
    tokens: Path,
    params: VerifyParams,
    machine: Machine,
    selection: Path | None = None,
) -> tuple[Manifest, DataReport]:
    """Check the data against their manifests, and collect statistics.

    Damaged files are removed from the workspace and the store, so that the next `dvc repro`
    rebuilds exactly these.

    Args:
        selection: The folder that says which rows are kept; None: all are.

    Raises:
        UserError: A manifest is missing.
        DataFault: Files differ; the message names each of them.
    """
    raw_manifest, manifest = RawManifest.load(raw), Manifest.load(tokens)
    faults, records = _check_folder(raw, tokens, raw_manifest, manifest)
    selected = Selection.load(selection, raw_manifest) if selection else None
    if selection and selected:
        wrong = check_selection(selection, selected)
        if not wrong and manifest.selection_key != selected.key:
            wrong = [Fault(tokens / NAME, f"was not made with the rows that {SELECTION} keeps")]
        faults += wrong
        selection = selection.absolute()
    elif manifest.selection_key is not None:
        raise UserError(f"{SELECTION}: missing; run `dvc repro curate` to create it")
    tasks = _tasks(
        raw.absolute(), tokens.absolute(), raw_manifest, manifest, records, params, selection
    )
    dropped: Counter[str] = Counter()
    report = DataReport()
    total = sum(task.size for task in tasks)
    files = [raw / file.path for file in raw_manifest.files]
    files += [tokens / shard.name for shard in manifest.shards]
    with cluster(machine, files), Progress("verify", total, "bytes") as progress:
        work = [(task.check, *task.arguments) for task in tasks]
        labels = [task.label for task in tasks]
        for nth, found in run_tasks(_run, work, None, "verify", labels=labels, progress=progress):
            faults += found.faults
            if found.shard is not None:
                report.add_shard(found.shard)
            if found.source is not None:
                report.add_source(found.source)
            if found.dropped is not None:
                dropped += found.dropped
            progress.advance(tasks[nth].size, f"{len(faults)} faults" if faults else "no fault")
    if selected is not None and not faults and dropped != Counter(selected.manifest.dropped):
        faults.append(Fault(SELECTION / NAME, "its counts of dropped rows are not the ledgers'"))
    if faults:
        message = "\n".join(sorted(map(str, faults)))
        try:
            store = Store.open(machine)
            _remove_bad(faults, raw, tokens, manifest, records, store)
            if selected is not None:
                _remove_selection(faults, selected, store)
        except (OSError, UserError) as error:
            message += f"\ncannot be removed: {error}"
        for folder in (raw, tokens, SELECTION):  # tasks have absolute paths
            message = message.replace(str(folder.absolute()), str(folder))
        raise DataFault(message)
    print(f"verify: {len(tasks)} checks over {total / 1e6:.1f} MB, no fault", flush=True)
    return manifest, report


@dataclass(frozen=True)
class _Task:
    check: Callable[..., Findings]
    arguments: tuple[Any, ...]
    size: int
    """Bytes to read, about."""
    label: str
    """The task's name in messages and on Ray's dashboard."""


def _run(check: Callable[..., Findings], *arguments: Any) -> Findings:
    return check(*arguments)


def _tasks(
    raw: Path,
    tokens: Path,
    raw_manifest: RawManifest,
    manifest: Manifest,
    records: dict[str, Record],
    params: VerifyParams,
    selection: Path | None,
) -> list[_Task]:
    """Return a task per source file, per shard, and per chunk to encode again; largest first."""
    has_text = {f.path: raw_manifest.sources[f.source].has_text for f in raw_manifest.files}
    columns = {file.path: raw_manifest.column(file) for file in raw_manifest.files}
    file_indices = manifest.source.numbers()
    of_file: dict[str, list[checks.PartSpan]] = {file.path: [] for file in raw_manifest.files}
    of_chunk: dict[str, list[checks.PartSpan]] = {}
    tasks, linked, bits = [], set(), {}
    selected = SelectionManifest.load(selection).files if selection else []
    for index, entry in enumerate(selected):
        if selection and entry.bits is not None:
            bits[entry.path] = (selection, entry)
            label = f"selection of {entry.path}"
            tasks.append(_Task(check_selected_file, (selection, index), 0, label))
    for shard in manifest.shards:
        for span in checks.part_spans(shard):
            if span.part.path in of_file:
                of_file[span.part.path].append(span)
                of_chunk.setdefault(span.part.chunk_key, []).append(span)
        keys = [part.chunk_key for part in shard.parts]
        contents = {
            key: records[key]["splits"][shard.split]["content"] for key in keys if key in records
        }
        indices = {part.path: file_indices.get(part.path, 0) for part in shard.parts}
        linked_raw = _linked_raw(raw, tokens, shard)
        if linked_raw is not None:
            linked.add(linked_raw)
        shard_arguments = (tokens, shard, manifest.tokenizer, indices, contents, linked_raw)
        size = HEADER_BYTES + shard.tokens * TOKEN_DTYPE.itemsize
        tasks.append(_Task(checks.check_shard, shard_arguments, size, shard.name))
    for file in raw_manifest.files:
        if raw / file.path not in linked:
            of_selection = bits.get(file.path)
            arguments = (raw, file, tokens, of_file[file.path], has_text[file.path], of_selection)
            tasks.append(_Task(checks.check_source, arguments, file.bytes, file.path))
    if params.retokenize:
        val_per_10k = _hashed_per_10k(manifest)
        for spans in of_chunk.values():
            path, (start, stop) = spans[0].part.path, spans[0].part.rows
            if not has_text[path]:
                continue
            text_arguments = (raw, columns[path], tokens, spans, params.retokenize, val_per_10k)
            label = f"{path}[{start}:{stop}]"
            tasks.append(_Task(checks.check_texts, text_arguments, 0, label))
    return sorted(tasks, key=lambda task: -task.size)


def _hashed_per_10k(manifest: Manifest) -> int | None:
    """Return the documents per 10,000 in validation by their hash; None if split by position."""
    if manifest.params.get("val_split") == "position":
        return None
    return int(manifest.params.get("val_per_10k", 0))


def _linked_raw(raw: Path, tokens: Path, shard: Shard) -> Path | None:
    """Return the token file of `data/raw` that a shard is a hard link to, or None."""
    path = raw / shard.parts[0].path
    if len(shard.parts) > 1 or not is_token_file(path.name):
        return None
    try:
        return path if path.samefile(tokens / shard.name) else None
    except OSError:
        return None


def _check_folder(
    raw: Path, tokens: Path, raw_manifest: RawManifest, manifest: Manifest
) -> tuple[list[Fault], dict[str, Record]]:
    """Check all that needs no reading of shards: file names, totals, records and the source.

    Returns:
        The faults, and the valid records by chunk key.
    """
    faults = []
    if manifest.source != raw_manifest:
        faults.append(Fault(tokens / NAME, f"its source differs from {raw / NAME}"))
    known = {NAME, *(name for shard in manifest.shards for name in (shard.name, shard.docs_name))}
    known |= {chunk.name for chunk in manifest.chunks}
    for path in sorted(tokens.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and path.relative_to(tokens).as_posix() not in known:
            faults.append(Fault(path, "not in the manifest"))
    for split, totals in manifest.totals.items():
        of_split = [shard for shard in manifest.shards if shard.split == split]
        for key in ("tokens", "docs", "text_bytes"):
            if sum(getattr(shard, key) for shard in of_split) != getattr(totals, key):
                faults.append(
                    Fault(tokens / NAME, f"totals.{split}.{key} is not the sum of the shards")
                )
    records: dict[str, Record] = {}
    for chunk in manifest.chunks:
        if isinstance(found := checks.check_record(tokens / chunk.name, chunk), Fault):
            faults.append(found)
        else:
            records[chunk.chunk_key] = found
    return [*faults, *_check_records(tokens, manifest, records)], records


def _check_records(tokens: Path, manifest: Manifest, records: dict[str, Record]) -> list[Fault]:
    """Check the chunks' records against the manifest's parts and its `dataset_key`."""
    parts: dict[str, list[tuple[str, int, int]]] = {}
    faults, files = [], {file.path: file.source for file in manifest.source.files}
    for shard in manifest.shards:
        for part in shard.parts:
            parts.setdefault(part.chunk_key, []).append((shard.split, part.tokens, part.docs))
        if other := {part.path for part in shard.parts if files.get(part.path) != shard.source}:
            problem = f"its source {shard.source} has no file {min(other)}"
            faults.append(Fault(tokens / NAME, problem))
    keys = [chunk.chunk_key for chunk in manifest.chunks]
    if len(set(keys)) < len(keys) or parts.keys() - set(keys):
        faults.append(Fault(tokens / NAME, "its chunks do not match its shards"))
    for chunk in manifest.chunks:
        if (record := records.get(chunk.chunk_key)) is None:
            continue
        found = sorted((split, f["tokens"], f["docs"]) for split, f in record["splits"].items())
        is_other = record["source"].get("source") != chunk.source
        if is_other or found != sorted(parts.get(chunk.chunk_key, [])):
            faults.append(Fault(tokens / chunk.name, "does not match the manifest"))
    if manifest.params.get("val_split") == "position":
        problems = (_check_cut(manifest, name) for name in manifest.source.sources)
        faults += [Fault(tokens / NAME, problem) for problem in problems if problem]
    if len(records) == len(keys):
        if dataset_key(list(records.values())) != manifest.dataset_key:
            faults.append(
                Fault(tokens / NAME, "its dataset_key does not match the chunks' records")
            )
        skipped: Counter[str] = Counter()
        for left_out in (*records.values(), *manifest.source.model_dump()["files"]):
            skipped.update(left_out.get("skipped", {}))
        if manifest.skipped != skipped:
            faults.append(Fault(tokens / NAME, "its skipped does not match the chunks' records"))
    return faults


def _check_cut(manifest: Manifest, source: str) -> str | None:
    """Return how a source's split by position differs from what the parameters ask for."""
    order = {chunk.chunk_key: number for number, chunk in enumerate(manifest.chunks)}
    numbers: dict[Split, list[int]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for shard in manifest.shards:
        if shard.source == source:
            numbers[shard.split] += [order.get(part.chunk_key, 0) for part in shard.parts]
            sizes[shard.split] += shard.tokens
    if max(numbers["train"], default=0) > min(numbers["val"], default=len(order)):
        return "its validation split is not the last part of the tokens"
    train, val = sizes["train"], sizes["val"]
    size, tolerance = val_size(train + val, int(manifest.params.get("val_per_10k", 0)))
    # Documents of a few tokens may move the cut by two, and the second half gains an EOT.
    if abs(val - size) > max(tolerance, 2) + 1:
        return f"its validation split has {val} tokens, expected about {size}"
    return None


def _remove_bad(
    faults: Sequence[Fault],
    raw: Path,
    tokens: Path,
    manifest: Manifest,
    records: dict[str, Record],
    store: Store,
) -> None:
    """Remove the damaged files, the pieces of the store that share their bytes, and suspects.

    A source file may have been damaged before it was tokenized, which its shards do not show: they
    are removed as well.
    """
    bad = {fault.path.absolute() for fault in faults}
    suspects = [file for file in manifest.source.files if (raw / file.path).absolute() in bad]
    paths = {file.path for file in suspects}
    pieces = {("files", file.sha256) for file in suspects}
    for chunk in manifest.chunks:
        if (tokens / chunk.name).absolute() in bad:
            pieces.add(("chunks", chunk.chunk_key))
    for shard in manifest.shards:
        keys = [part.chunk_key for part in shard.parts]
        if suspect := {part.chunk_key for part in shard.parts if part.path in paths}:
            cut_from = {records[key].get("cut_from", key) for key in suspect & records.keys()}
            pieces |= {("chunks", key) for key in suspect | cut_from}
            bad.add((tokens / shard.name).absolute())
        if bad & {(tokens / name).absolute() for name in (shard.name, shard.docs_name)}:
            is_val = shard.split == "val"
            pieces.add(("merged", merged_key(keys)) if is_val else ("chunks", keys[0]))
    for kind, key in pieces:
        _discard(store, kind, key)
    for path in {_outermost_link(path, (raw, tokens, SELECTION)) or path for path in bad}:
        if os.path.lexists(path):
            unlink_damaged(path)


def _remove_selection(faults: Sequence[Fault], selection: Selection, store: Store) -> None:
    """Discard the pieces of a damaged selection, whose files `_remove_bad` has removed."""
    folder = selection.folder.absolute()
    if any(fault.path.absolute().is_relative_to(folder) for fault in faults):
        for kind, key in selection.manifest.pieces:
            _discard(store, kind, key)


def _outermost_link(path: Path, folders: Sequence[Path]) -> Path | None:
    """Return the folder on the way to ``path`` that is a link: what is beyond is not the data's."""
    tops = [folder.absolute() for folder in folders]
    inside = [p for p in path.parents if any(top in p.parents for top in tops)]
    return next((p for p in reversed(inside) if p.is_symlink()), None)


def _discard(store: Store, kind: str, key: str) -> None:
    with store.lock(kind, key):
        store.discard(kind, key)
