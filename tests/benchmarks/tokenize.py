"""Tokenization speed compared with other tools: `python -m tests.benchmarks.tokenize`.

The contenders run with 1 and 2 workers, one after another in each round:

- *stage*: `pipeline.tokenize` and `pipeline.verify`, from parquet to verified shards;
- *stage-tiktoken*: the same with ``engine: tiktoken``;
- *gigatoken*: a plain multiprocessing loop over row groups: parquet in, uint16 out; no guard, no
  check, no hashes, no Ray. Its gain from a second worker is the gain of the machine's second core;
- *tiktoken*: the same loop with tiktoken;
- *tokenizers*: the same loop with Hugging Face `tokenizers`, one thread per process;
- *datatrove*: its `ParquetReader` and `DocumentTokenizer`, unshuffled, one thread per process.

Start-up (Python, Ray, imports in every worker, a first small run) is not timed, and is reported
separately. The text is real, repeated under salts: each document starts with a line of its own. The
slow contenders process a part of the same files, since MB/s is compared. datatrove is run by the
Python of ``--peers PYTHON``; contenders that are not installed are skipped, with a message.

``--format jsonl`` or ``jsonl.zst`` measures the same text in such files: the stage's time then
includes `pipeline.download`, and the loops parse the lines with `json`.

*Workers busy* is the fraction of their time that `tokenize`'s workers spend in tasks; the rest is
Ray, the driver, and the end of the run. ``--results FILE`` collects the rounds of several calls;
the table covers all of them. ``--phases`` prints the stage's time by phase, in one process.
"""

import argparse
import contextlib
import inspect
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from pipeline.cluster.join import cluster
from pipeline.download import stage as download
from pipeline.format import shards, tokenizer
from pipeline.format.manifest import NAME, RawManifest, SourceFile
from pipeline.params import SourceParams, TokenizeParams, VerifyParams
from pipeline.runtime.machine import Machine
from pipeline.store import atomic
from pipeline.store.store import Store
from pipeline.tokenize import encode_batch, encode_chunk, engines, from_text
from pipeline.tokenize import stage as tokenize
from pipeline.tokenize.chunk_plan import plan_chunks
from pipeline.verify import stage as verify

REPO = Path(__file__).parents[2]
TEXT = REPO.parent / "shared" / "data" / "pd_books"
FORMATS = ("parquet", "jsonl", "jsonl.zst")
CONTENDERS = ("stage", "gigatoken", "stage-tiktoken", "tiktoken", "tokenizers", "datatrove")
FAST = ("stage", "gigatoken")
PARAMS = TokenizeParams(shard_tokens=5_000_000, val_per_10k=20)
BUSY = "seconds.txt"

DATATROVE = """
import sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer

def run(source, out, workers):
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(source, glob_pattern="*.parquet", text_key="text", read_metadata=False),
            DocumentTokenizer(out, tokenizer_name_or_path=sys.argv[5], eos_token="<|endoftext|>",
                              batch_size=1000, shuffle_documents=False),
        ],
        tasks=workers, workers=workers, logging_dir=out + "-logs",
    ).run()

if __name__ == "__main__":
    source, small, out, workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    began = time.time()
    run(small, out + "-small", workers)
    startup = time.time() - began
    began = time.time()
    run(source, out, workers)
    print("MEASURED", startup, time.time() - began)
"""


def make_corpus(source: Path, folder: Path, megabytes: int, file_mb: int = 20) -> Path:
    """Write a `data/raw` of this size: the source's documents, repeated under new salts."""
    from tests.support.small_data import describe, write_manifest

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    tables = [pq.read_table(path, columns=["text"]) for path in sorted(source.rglob("*.parquet"))]
    texts = pa.concat_tables(tables)["text"].combine_chunks()
    files: list[SourceFile] = []
    done, at, salt = 0, 0, 0
    while done < megabytes * 10**6:
        rows: list[pa.Array] = []
        size = 0
        while size < min(file_mb, megabytes) * 10**6:
            part = texts.slice(at, 100)
            at, salt = (at + 100, salt) if at + 100 < len(texts) else (0, salt + 1)
            rows.append(pc.binary_join_element_wise(f"salt {salt}, document", part, "\n"))
            size += rows[-1].nbytes
        path = folder / f"{len(files):03d}.parquet"
        table = pa.table({"text": pa.concat_arrays(rows)})
        pq.write_table(table, path, row_group_size=1_000, compression="zstd")
        files.append(describe(path, len(table)))
        done += size
    write_manifest(folder, files)
    return folder


def as_lines(corpus: Path, suffix: str) -> Path:
    """Write the corpus as JSON lines, one file per parquet file; return their folder."""
    folder = corpus.with_name(f"{corpus.name}.{suffix}")
    if suffix == "parquet" or folder.exists():
        return corpus if suffix == "parquet" else folder
    folder.mkdir()
    for path in sorted(corpus.glob("*.parquet")):
        texts = pq.read_table(path)["text"].to_pylist()
        rows = ({"id": f"{path.stem}-{i}", "text": text} for i, text in enumerate(texts))
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if suffix.endswith(".zst"):
            data = zstandard.compress(data)
        (folder / f"{path.stem}.{suffix}").write_bytes(data)
    return folder


def text_bytes(path: Path) -> int:
    """Return the bytes of text in a file, from its footer."""
    metadata = pq.read_metadata(path)
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return sum(group.column(0).total_uncompressed_size - 4 * group.num_rows for group in groups)


# --- the contenders, each in a process of its own -------------------------------------------------


def measure_stage(corpus: Path, small: Path, scratch: Path, workers: int, engine: Any) -> Any:
    machine = Machine(workers=workers, work_dir=scratch / "work", engine=engine)
    with cluster(machine) as cpus:
        import ray  # reads its environment, which `cluster` sets

        def running(*_: object, **__: object) -> contextlib.AbstractContextManager[int]:
            return contextlib.nullcontext(cpus)

        download.cluster = tokenize.cluster = verify.cluster = running  # type: ignore
        from_text.encode_chunk = _timed_chunk  # type: ignore
        start: Any = ray.remote(num_cpus=1)(_start_worker)
        ray.get([start.remote() for _ in range(cpus)])
        raw = as_parquet(small, scratch / "small-raw", machine)
        tokenize.tokenize(raw, scratch / "small", PARAMS, machine, "benchmark")
        verify.verify(raw, scratch / "small", VerifyParams(), machine)
        (scratch / "work" / BUSY).unlink()
        ready = time.time()
        raw = as_parquet(corpus, scratch / "raw", machine)
        fetched = time.time()
        manifest = tokenize.tokenize(raw, scratch / "tokens", PARAMS, machine, "benchmark")
        made = time.time()
        verify.verify(raw, scratch / "tokens", VerifyParams(), machine)
        done = time.time()
    totals = manifest.totals.values()
    busy = sum(map(float, (scratch / "work" / BUSY).read_text().split()))
    return {
        "busy": busy / cpus / (made - fetched),
        "startup": ready - psutil.Process().create_time(),
        "seconds": done - ready,
        "download": fetched - ready,
        "tokenize": made - fetched,
        "bytes": sum(t.text_bytes for t in totals),
        "tokens": sum(t.tokens for t in totals),
    }


def as_parquet(corpus: Path, raw: Path, machine: Machine) -> Path:
    """Return the `data/raw` of a corpus, downloading files that are not parquet."""
    if (corpus / NAME).exists():
        return corpus
    params = SourceParams(kind="files", paths=[str(corpus)])
    download.download({"main": params}, Store.open(machine), raw, machine)
    return raw


def _timed_chunk(*task: Any) -> Any:
    """Encode a chunk, and append its seconds to a file beside the store."""
    began = time.perf_counter()
    record = encode_chunk.encode_chunk(*task)
    with open(task[5].root / BUSY, "a") as file:
        file.write(f"{time.perf_counter() - began}\n")
    return record


def _start_worker() -> None:
    """Import and load what a worker needs; takes so long that every worker runs it once."""
    assert encode_chunk
    assert verify
    engines.fast()
    time.sleep(2)


_encode: Callable[[list[str]], list[list[int]]]
_fast: Any = None


def _start(kind: str, file: str) -> None:
    global _encode, _fast
    if kind == "gigatoken":
        _fast = engines.fast()
    elif kind == "tiktoken":
        encoding = tokenizer.encoding()
        _encode = lambda texts: [encoding.encode_ordinary(text) for text in texts]  # noqa: E731
    else:
        import tokenizers

        found = tokenizers.Tokenizer.from_file(file)
        _encode = lambda texts: [e.ids for e in found.encode_batch(texts)]  # noqa: E731


def _read_group(path: Path, index: int) -> pa.ChunkedArray | list[str]:
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).read_row_group(index, columns=["text"])["text"]
    with zstandard.open(path, "rb") if path.suffix == ".zst" else open(path, "rb") as file:
        return [json.loads(line)["text"] for line in io.BufferedReader(file)]


def _group(task: tuple[Path, int, Path]) -> tuple[int, int]:
    path, index, out = task
    column = _read_group(path, index)
    if _fast is not None:
        if isinstance(column, list):
            column = pa.chunked_array([column])
        texts = column.combine_chunks().cast(pa.large_binary())
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[: len(texts) + 1]
        flat, counts = _fast.encode(np.frombuffer(texts.buffers()[2], np.uint8), offsets)
        tokens = np.insert(flat.astype(np.uint16), np.cumsum([0, *counts[:-1]]), tokenizer.EOT)
        size = int(offsets[-1])
    else:
        strings = column if isinstance(column, list) else column.to_pylist()
        found = ([tokenizer.EOT, *ids] for ids in _encode(strings))
        tokens = np.concatenate([np.array(ids, np.uint16) for ids in found])
        size = sum(len(text.encode()) for text in strings)
    tokens.tofile(out / f"{path.stem}-{index}.bin")
    return size, len(tokens)


def measure_loop(corpus: Path, small: Path, scratch: Path, workers: int, kind: str) -> Any:
    file = tokenizer_json(scratch) if kind == "tokenizers" else ""

    def tasks(folder: Path) -> list[tuple[Path, int, Path]]:
        found = []
        for path in sorted(p for p in folder.iterdir() if p.name != NAME):
            is_parquet = path.suffix == ".parquet"
            groups = pq.read_metadata(path).num_row_groups if is_parquet else 1
            found += [(path, index, scratch) for index in range(groups)]
        return found

    with multiprocessing.get_context("spawn").Pool(workers, _start, (kind, file)) as pool:
        pool.map(_group, tasks(small), chunksize=1)
        ready = time.time()
        counts = list(pool.imap_unordered(_group, tasks(corpus)))
        done = time.time()
    sizes, tokens = np.sum(counts, axis=0).tolist()
    startup = ready - psutil.Process().create_time()
    return {"startup": startup, "seconds": done - ready, "bytes": sizes, "tokens": tokens}


def measure_datatrove(corpus: Path, small: Path, scratch: Path, workers: int, peers: str) -> Any:
    """Each run starts new processes, so the speed is the difference between two runs."""
    script = scratch / "with_datatrove.py"
    script.write_text(DATATROVE)
    out = scratch / "out"
    result = subprocess.run(
        [peers, script, corpus, small, out, str(workers), tokenizer_json(scratch)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(x for x in result.stdout.splitlines() if x.startswith("MEASURED"))
    first, seconds = map(float, line.split()[1:])
    sizes = [sum(map(text_bytes, folder.glob("*.parquet"))) for folder in (small, corpus)]
    outs = [scratch / "out-small", out]
    tokens = [sum(path.stat().st_size for path in folder.glob("*.ds")) // 2 for folder in outs]
    speed = (sizes[1] - sizes[0]) / (seconds - first)
    return {
        "startup": first - sizes[0] / speed,
        "seconds": seconds - first,
        "bytes": sizes[1] - sizes[0],
        "tokens": tokens[1] - tokens[0],
    }


def tokenizer_json(folder: Path) -> str:
    """Write GPT-2's tokenizer.json from the ranks; return its path."""
    from model.tokenizer_files import write_tokenizer

    write_tokenizer(folder, tokenizer.ranks(), 1024)
    return str(folder / "tokenizer.json")


# --- time by phase --------------------------------------------------------------------------------


class Clock:
    """Seconds by phase; the time of an inner phase does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began, counted = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - counted
            self.seconds[name] += time.perf_counter() - began - inner

    def wrap(self, phase: str, owner: Any, name: str) -> None:
        """Count calls of ``owner.name`` as a phase; of a generator, each step."""
        function = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            with self.phase(phase):
                return function(*args, **options)

        def steps(*args: Any, **options: Any) -> Iterator[Any]:
            iterator = function(*args, **options)
            while True:
                with self.phase(phase):
                    item = next(iterator, None)
                if item is None:
                    return
                yield item

        setattr(owner, name, steps if inspect.isgeneratorfunction(function) else counted)


def phases(corpus: Path, scratch: Path) -> dict[str, float]:
    """Return seconds by phase for all chunks, one after another in this process."""
    chunks = plan_chunks(corpus, RawManifest.load(corpus), PARAMS.shard_tokens)
    assert engines.fast() is not None
    clock, store = Clock(), Store(scratch / "work")
    for phase, owner, names in (
        ("parquet", encode_chunk, ["read_batches"]),
        ("guard", encode_batch, ["_with_text", "needs_reference"]),
        ("encode, gigatoken", engines.FastEngine, ["encode"]),
        ("encode and check, tiktoken", encode_batch, ["reference"]),
        ("hashes of documents", encode_batch, ["_hashes"]),
        ("hashes of documents", encode_chunk, ["content_sum"]),
        ("EOT, uint16, split", encode_chunk, ["encode_batch"]),
        ("EOT, uint16, split", encode_chunk._SplitWriter, ["add"]),
        ("write", shards.ShardWriter, ["append", "close"]),
        ("sha256", atomic, ["sha256_file"]),
        ("fsync", atomic, ["fsync_file", "write_json", "fsync_folder"]),
    ):
        for name in names:
            clock.wrap(phase, owner, name)
    for index, chunk in enumerate(chunks[:2]):  # warm-up: the word cache and the tokenizer's start
        encode_chunk.encode_chunk(chunk, f"first {index}", corpus, "text", PARAMS, store)
    clock.seconds.clear()
    for index, chunk in enumerate(chunks):
        with clock.phase("other"):
            encode_chunk.encode_chunk(chunk, str(index), corpus, "text", PARAMS, store)
    return clock.seconds


# --- runs and the table ---------------------------------------------------------------------------


def run_apart(name: str, corpus: Path, small: Path, workers: int, peers: str) -> dict[str, Any]:
    """Run one measurement in a process of its own; add the peak resident bytes of its processes."""
    largest = together = 0
    with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
        places = [str(corpus), str(small), scratch, str(workers), peers]
        with open(Path(scratch) / "log", "w+") as log:
            process = psutil.Popen(
                [sys.executable, "-m", "tests.benchmarks.tokenize", "--measure", name, *places],
                cwd=REPO,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                stdout=log,
                stderr=log,
            )
            while process.poll() is None:
                sizes = resident_bytes(process)
                largest, together = max(largest, *sizes), max(together, sum(sizes))
                time.sleep(0.5)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{name}: {log.read()[-4000:]}")
        measured: dict[str, Any] = json.loads((Path(scratch) / "measured.json").read_text())
    return {**measured, "name": name, "workers": workers, "all": together, "one": largest}


def resident_bytes(process: psutil.Process) -> list[int]:
    """Return the resident bytes of a process and of all its descendants."""
    sizes = [0]
    with contextlib.suppress(psutil.Error):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                sizes.append(each.memory_info().rss)
    return sizes


def measure(name: str, *places: str) -> None:
    """Measure a contender in this process; write the result to its scratch folder."""
    corpus, small, scratch = map(Path, places[:3])
    workers, peers = int(places[3]), places[4]
    if name.startswith("stage"):
        engine = "tiktoken" if name.endswith("tiktoken") else "gigatoken"
        found = measure_stage(corpus, small, scratch, workers, engine)
    elif name == "datatrove":
        found = measure_datatrove(corpus, small, scratch, workers, peers)
    else:
        found = measure_loop(corpus, small, scratch, workers, name)
    (scratch / "measured.json").write_text(json.dumps(found))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians of the rounds as a Markdown table."""
    lines = [
        "| contender | workers | text MB | MB/s | from - to | M tokens/s | workers busy | start-up s | largest process MB | all MB |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        for workers in (1, 2):
            found = [r for r in rows if (r["name"], r["workers"]) == (name, workers)]
            if not found:
                continue
            speeds = [r["bytes"] / r["seconds"] / 1e6 for r in found]
            middle = {k: statistics.median(r[k] for r in found) for k in ("startup", "one", "all")}
            tokens = statistics.median(r["tokens"] / r["seconds"] / 1e6 for r in found)
            busy = [r["busy"] for r in found if "busy" in r]
            lines.append(
                f"| {name} | {workers} | {found[0]['bytes'] / 1e6:.0f} | "
                f"{statistics.median(speeds):.1f} | {min(speeds):.1f} - {max(speeds):.1f} | "
                f"{tokens:.2f} | {f'{statistics.median(busy):.0%}' if busy else '-'} | "
                f"{middle['startup']:.1f} | {middle['one'] / 1e6:.0f} | "
                f"{middle['all'] / 1e6:.0f} |"
            )
    return "\n".join(lines)


def has(peers: str, module: str) -> bool:
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([peers, "-c", check], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tokenize")
    parser.add_argument("--text", type=Path, default=TEXT, help="a folder of parquet files")
    parser.add_argument("--corpus", type=Path, help="folder to keep the salted text in")
    parser.add_argument("--mb", type=int, default=1500, help="MB of text for the stage")
    parser.add_argument("--slow-mb", type=int, default=80, help="MB for contenders below 20 MB/s")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--results", type=Path, help="JSON lines file to append to")
    parser.add_argument("--phases", action="store_true", help="print the stage's time by phase")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory() as top:
        home: Path = (args.corpus or Path(top)).absolute()
        corpus = make_corpus(args.text, home / f"{args.mb}", args.mb)
        small = make_corpus(args.text, home / "small", 8, file_mb=1)
        if args.phases:
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                seconds = phases(corpus, Path(scratch))
            size = sum(map(text_bytes, corpus.glob("*.parquet"))) / 1e6
            total = sum(seconds.values())
            print("| phase | ms per MB of text | share |\n|---|---|---|")
            print(f"| all | {1e3 * total / size:.2f} | {size / total:.0f} MB/s |")
            for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
                print(f"| {name} | {1e3 * spent / size:.2f} | {100 * spent / total:.1f} % |")
            return
        slow = make_corpus(args.text, home / f"{args.slow_mb}", args.slow_mb)
        corpus, small, slow = (as_lines(folder, args.format) for folder in (corpus, small, slow))
        rows: list[dict[str, Any]] = []
        if args.results and args.results.exists():
            rows = [json.loads(line) for line in args.results.read_text().splitlines()]
        for _ in range(args.rounds):
            for name in args.only:
                python = args.peers if name == "datatrove" else sys.executable
                if name in ("datatrove", "tokenizers") and not has(python, name):
                    print(f"{name} is not installed for {python}: skipped", flush=True)
                    continue
                for workers in (1, 2):
                    text = corpus if name in FAST else slow
                    rows.append(run_apart(name, text, small, workers, args.peers))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                    if args.results:
                        with open(args.results, "a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
