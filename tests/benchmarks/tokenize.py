"""How fast text becomes verified shards, beside others: `python -m tests.benchmarks.tokenize`.

The contenders, each with 1 and 2 workers, one after another in each round:

- *stage*: `pipeline.tokenize` and `pipeline.verify`, from parquet to verified shards;
- *stage-tiktoken*: the same with ``engine: tiktoken``;
- *gigatoken*: a plain multiprocessing loop over row groups: parquet in, uint16 out; no guard, no
  check, no hashes, no Ray. What it gains from 1 to 2 workers is what the machine's cores give;
- *tiktoken*: the same loop around tiktoken;
- *tokenizers*: the same loop around Hugging Face `tokenizers`, one thread a process;
- *datatrove*: its `ParquetReader` and `DocumentTokenizer`, unshuffled, one thread a process.

Start-up (Python, Ray, imports in every worker, a first small run) is over before the clock starts,
and is reported apart. The text is real, repeated under salts: each document has a line of its own
in front. The slow contenders take a part of the same files, for MB/s is what is compared. datatrove
is looked for in the environment of ``--peers PYTHON``; one that is not installed is left out, and
that is said.

*Workers busy* is the part of their time that `tokenize`'s workers spend in tasks; the rest is Ray's
and the driver's, and the end of the run. ``--results FILE`` gathers the rounds of several calls;
the table is of all that it holds.
``--phases`` shows where the time of the stage goes, in one process.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
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

REPO = Path(__file__).parents[2]
TEXT = REPO.parent / "shared" / "data" / "pd_books"
CONTENDERS = ("stage", "gigatoken", "stage-tiktoken", "tiktoken", "tokenizers", "datatrove")
FAST = ("stage", "gigatoken")
SHARD_TOKENS = 5_000_000
GROUP_ROWS = 1_000
EOT = 50256
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


def make_corpus(source: Path, folder: Path, megabytes: int, file_mb: int = 20) -> None:
    """A `data/raw` of so much text: the source's documents, again and again under new salts."""
    from pipeline.format.manifest import NAME, RawManifest, Source, SourceFile
    from pipeline.store import atomic

    folder.mkdir(parents=True)
    texts = pa.concat_arrays(
        [chunk for path in sorted(source.rglob("*.parquet"))
         for chunk in pq.read_table(path, columns=["text"])["text"].chunks]
    )  # fmt: skip
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
        pq.write_table(table, path, row_group_size=GROUP_ROWS, compression="zstd")
        files.append(
            SourceFile(
                path=path.name, bytes=path.stat().st_size, rows=len(table),
                sha256=atomic.sha256_file(path),
            )
        )  # fmt: skip
        done += size
    manifest = RawManifest(source=Source(kind="test", repo="test", revision="1"), files=files)
    atomic.write_json(folder / NAME, manifest.model_dump())


def part_of(corpus: Path, folder: Path, megabytes: int) -> Path:
    """The first files of a corpus, about so much text, in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for path in sorted(corpus.glob("*.parquet")):
        if done >= megabytes * 10**6:
            break
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
        done += text_bytes(path)
    from pipeline.format.manifest import NAME, RawManifest
    from pipeline.store import atomic

    whole = RawManifest.load(corpus)
    files = [file for file in whole.files if (folder / file.path).exists()]
    atomic.write_json(folder / NAME, whole.model_copy(update={"files": files}).model_dump())
    return folder


def text_bytes(path: Path) -> int:
    """Bytes of text in a file, as its footer says them."""
    metadata = pq.read_metadata(path)
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return sum(group.column(0).total_uncompressed_size - 4 * group.num_rows for group in groups)


# --- what is measured, each in a process of its own -----------------------------------------------


def measure_stage(corpus: Path, small: Path, scratch: Path, workers: int, engine: Any) -> Any:
    began = time.time()
    import ray

    from pipeline.cluster.join import cluster
    from pipeline.params import TokenizeParams, VerifyParams
    from pipeline.runtime.machine import Machine
    from pipeline.tokenize import stage as tokenize
    from pipeline.verify import stage as verify

    machine = Machine(workers=workers, work_dir=scratch / "work", engine=engine)
    params = TokenizeParams(shard_tokens=SHARD_TOKENS, val_per_10k=20)
    with cluster(machine) as cpus:

        def running(*_: object, **__: object) -> contextlib.AbstractContextManager[int]:
            return contextlib.nullcontext(cpus)

        tokenize.cluster = verify.cluster = running  # type: ignore
        tokenize.encode_chunk = _timed_chunk  # type: ignore
        start: Any = ray.remote(num_cpus=1)(_start_worker)
        ray.get([start.remote() for _ in range(cpus)])
        tokenize.tokenize(small, scratch / "small", params, machine, "benchmark")
        verify.verify(small, scratch / "small", VerifyParams(), machine)
        (scratch / "work" / BUSY).unlink()
        ready = time.time()
        manifest = tokenize.tokenize(corpus, scratch / "tokens", params, machine, "benchmark")
        made = time.time()
        verify.verify(corpus, scratch / "tokens", VerifyParams(), machine)
        done = time.time()
    totals = manifest.totals.values()
    busy = sum(map(float, (scratch / "work" / BUSY).read_text().split()))
    return {
        "busy": busy / cpus / (made - ready),
        "startup": ready - began,
        "seconds": done - ready,
        "tokenize": made - ready,
        "bytes": sum(t.text_bytes for t in totals),
        "tokens": sum(t.tokens for t in totals),
    }


def _timed_chunk(*task: Any) -> Any:
    """A chunk, its seconds noted beside the store: the rest of a worker's time is Ray's."""
    from pipeline.tokenize import encode_chunk

    began = time.perf_counter()
    record = encode_chunk.encode_chunk(*task)
    with open(task[5].root / BUSY, "a") as file:
        file.write(f"{time.perf_counter() - began}\n")
    return record


def _start_worker() -> None:
    """In a worker: what it does once in its life, and so long that each worker has to do it."""
    from pipeline.tokenize import encode_chunk, engines
    from pipeline.verify import checks

    assert checks
    assert encode_chunk
    engines.fast()
    time.sleep(2)


_encode: Callable[[list[str]], list[list[int]]]
_fast: Any = None


def _start(kind: str, file: str) -> None:
    global _encode, _fast
    if kind == "gigatoken":
        from pipeline.tokenize import engines

        _fast = engines.fast()
    elif kind == "tiktoken":
        from pipeline.format import tokenizer

        encoding = tokenizer.encoding()
        _encode = lambda texts: [encoding.encode_ordinary(text) for text in texts]  # noqa: E731
    else:
        import tokenizers

        found = tokenizers.Tokenizer.from_file(file)
        _encode = lambda texts: [e.ids for e in found.encode_batch(texts)]  # noqa: E731


def _group(task: tuple[Path, int, Path]) -> tuple[int, int]:
    path, index, out = task
    column = pq.ParquetFile(path).read_row_group(index, columns=["text"])["text"]
    if _fast is not None:
        texts = column.combine_chunks().cast(pa.large_binary())
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[: len(texts) + 1]
        flat, counts = _fast.encode(np.frombuffer(texts.buffers()[2], np.uint8), offsets)
        tokens = np.insert(flat.astype(np.uint16), np.cumsum([0, *counts[:-1]]), EOT)
        size = int(offsets[-1])
    else:
        strings = column.to_pylist()
        tokens = np.concatenate([np.array([EOT, *ids], np.uint16) for ids in _encode(strings)])
        size = sum(len(text.encode()) for text in strings)
    tokens.tofile(out / f"{path.stem}-{index}.bin")
    return size, len(tokens)


def measure_loop(corpus: Path, small: Path, scratch: Path, workers: int, kind: str) -> Any:
    began = time.time()
    file = tokenizer_json(scratch) if kind == "tokenizers" else ""

    def tasks(folder: Path) -> list[tuple[Path, int, Path]]:
        files = sorted(folder.glob("*.parquet"))
        return [(f, i, scratch) for f in files for i in range(pq.read_metadata(f).num_row_groups)]

    with multiprocessing.get_context("spawn").Pool(workers, _start, (kind, file)) as pool:
        pool.map(_group, tasks(small), chunksize=1)
        ready = time.time()
        counts = list(pool.imap_unordered(_group, tasks(corpus)))
        done = time.time()
    sizes, tokens = np.sum(counts, axis=0).tolist()
    return {"startup": ready - began, "seconds": done - ready, "bytes": sizes, "tokens": tokens}


def measure_datatrove(corpus: Path, small: Path, scratch: Path, workers: int, peers: str) -> Any:
    """Each of its runs starts its processes anew: what counts is the difference of two runs."""
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
    """GPT-2's tokenizer.json, made of the ranks."""
    import tokenizers

    from model.tokenizer_files import write_tokenizer
    from pipeline.format import tokenizer

    write_tokenizer(folder, tokenizer.ranks(), 1024)
    names = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizers.ByteLevelBPETokenizer.from_file(*names).save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


# --- where the time goes --------------------------------------------------------------------------


class Clock:
    """Seconds by phase; those of an inner phase do not count for the outer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Have ``owner.name`` counted as a phase; of a generator, each step."""
        inner = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            with self.phase(phase):
                return inner(*args, **options)

        def steps(*args: Any, **options: Any) -> Iterator[Any]:
            iterator = inner(*args, **options)
            while True:
                with self.phase(phase):
                    item = next(iterator, None)
                if item is None:
                    return
                yield item

        setattr(owner, name, steps if phase == "parquet" else counted)


def phases(corpus: Path, scratch: Path) -> dict[str, float]:
    """Seconds by phase of all chunks, one after another in this process."""
    from pipeline.format import shards
    from pipeline.format.manifest import RawManifest
    from pipeline.params import TokenizeParams
    from pipeline.store import atomic
    from pipeline.store.store import Store
    from pipeline.tokenize import encode_batch, encode_chunk, engines
    from pipeline.tokenize.chunk_plan import plan_chunks

    params = TokenizeParams(shard_tokens=SHARD_TOKENS, val_per_10k=20)
    files = RawManifest.load(corpus).files
    chunks = plan_chunks(corpus, files, "text", SHARD_TOKENS)
    engine = engines.fast()
    clock = Clock()
    clock.wrap(encode_chunk, "read_batches", "parquet")
    clock.wrap(encode_batch, "_with_text", "guard")
    clock.wrap(encode_batch, "left_to_reference", "guard")
    clock.wrap(engines.Fast, "encode", "encode, gigatoken")
    clock.wrap(encode_batch, "reference", "encode and check, tiktoken")
    clock.wrap(encode_batch, "_hashes", "hashes of documents")
    clock.wrap(encode_chunk, "content_sum", "hashes of documents")
    clock.wrap(encode_chunk, "encode_batch", "EOT, uint16, split")
    clock.wrap(encode_chunk._Split, "add", "EOT, uint16, split")
    clock.wrap(shards.ShardWriter, "append", "write")
    clock.wrap(shards.ShardWriter, "close", "write")
    clock.wrap(atomic, "sha256_file", "sha256")
    clock.wrap(atomic, "fsync_file", "fsync")
    clock.wrap(atomic, "write_json", "fsync")
    clock.wrap(atomic, "fsync_folder", "fsync")
    store = Store(scratch / "work")
    for index, chunk in enumerate(chunks[:2]):  # the first words, and the tokenizer's own start
        encode_chunk.encode_chunk(chunk, f"first {index}", corpus, "text", params, store)
    clock.seconds.clear()
    for index, chunk in enumerate(chunks):
        with clock.phase("else"):
            encode_chunk.encode_chunk(chunk, str(index), corpus, "text", params, store)
    assert engine is not None
    return clock.seconds


# --- one run beside another -----------------------------------------------------------------------


class Memory(threading.Thread):
    """The largest resident bytes of all processes whose environment holds a mark."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark = mark
        self.all, self.one = 0, 0
        self._others: set[int] = set()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.5):
            together = 0
            for process in psutil.process_iter():
                if process.pid in self._others:
                    continue
                try:
                    if process.environ().get("BENCHMARK") != self.mark:
                        if time.time() - process.create_time() > 1:
                            self._others.add(process.pid)
                        continue
                    resident = process.memory_info().rss
                except psutil.Error:
                    continue
                together += resident
                self.one = max(self.one, resident)
            self.all = max(self.all, together)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def run_apart(name: str, corpus: Path, small: Path, workers: int, peers: str) -> dict[str, Any]:
    """One measurement in a process of its own, its memory watched."""
    mark = f"{name}-{workers}-{os.getpid()}"
    memory = Memory(mark)
    memory.start()
    with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
        command = [sys.executable, "-m", "tests.benchmarks.tokenize", "--measure", name]
        places = [str(corpus), str(small), scratch, str(workers), peers]
        result = subprocess.run(
            [*command, *places], capture_output=True, text=True, cwd=REPO,
            env={**os.environ, "BENCHMARK": mark, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
    memory.stop()
    if result.returncode:
        sys.exit(f"{name}: {result.stdout[-2000:]}{result.stderr[-4000:]}")
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return {**measured, "name": name, "workers": workers, "all": memory.all, "one": memory.one}


def measure(name: str, *places: str) -> None:
    corpus, small, scratch = map(Path, places[:3])
    workers, peers = int(places[3]), places[4]
    if name.startswith("stage"):
        engine = "tiktoken" if name.endswith("tiktoken") else "gigatoken"
        found = measure_stage(corpus, small, scratch, workers, engine)
    elif name == "datatrove":
        found = measure_datatrove(corpus, small, scratch, workers, peers)
    else:
        found = measure_loop(corpus, small, scratch, workers, name)
    print(json.dumps(found))


def table(rows: list[dict[str, Any]]) -> str:
    """Medians of the rounds, as a table in Markdown."""
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
    parser.add_argument("--corpus", type=Path, help="where the salted text is kept between calls")
    parser.add_argument("--mb", type=int, default=1500, help="text for the stage")
    parser.add_argument(
        "--slow-mb", type=int, default=80, help="text for those of 20 MB/s and less"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--results", type=Path, help="JSON lines; the table is of all in it")
    parser.add_argument("--phases", action="store_true", help="where the stage's time goes")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory() as top:
        corpus: Path = (args.corpus or Path(top)).absolute() / f"{args.mb}"
        small = corpus.parent / "small"
        if not corpus.exists():
            make_corpus(args.text, corpus, args.mb)
        if not small.exists():
            make_corpus(args.text, small, 8, file_mb=1)
        if args.phases:
            with tempfile.TemporaryDirectory(dir=corpus.parent) as scratch:
                seconds = phases(corpus, Path(scratch))
            size = sum(map(text_bytes, corpus.glob("*.parquet"))) / 1e6
            total = sum(seconds.values())
            print("| phase | ms a MB of text | share |\n|---|---|---|")
            print(f"| all | {1e3 * total / size:.2f} | {size / total:.0f} MB/s |")
            for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
                print(f"| {name} | {1e3 * spent / size:.2f} | {100 * spent / total:.1f} % |")
            return
        slow = part_of(corpus, corpus.parent / f"{args.mb}-{args.slow_mb}", args.slow_mb)
        rows: list[dict[str, Any]] = []
        if args.results and args.results.exists():
            rows = [json.loads(line) for line in args.results.read_text().splitlines()]
        for _ in range(args.rounds):
            for name in args.only:
                home = args.peers if name == "datatrove" else sys.executable
                if name in ("datatrove", "tokenizers") and not has(home, name):
                    print(f"{name} is not installed for {home}: left out", flush=True)
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
