"""What the stage `curate` finds, and what it costs: `python -m tests.benchmarks.curate PART...`.

- *copies*: near duplicates of known similarity; see `curate_copies`.
- *datatrove*: decisions and clusters beside datatrove's (``--datatrove PYTHON``, an interpreter
  with datatrove 0.10 and spaCy); see `curate_datatrove`.
- *tasks*: real texts that share words with tasks of HellaSwag.
- *speed*: MB of text per second on one core: the stages `tokenize` and `curate` without Ray, each
  in a process of its own, and the parts of `curate`, in turn. Ratios are medians over the rounds.
  With ``--datatrove`` its filters and signatures run in the same rounds, on a part of the texts.
- *scale*: a million short documents through the stages, on Ray, and the computed costs of more.

``--write`` puts what was measured into docs/curate.md, between the markers of the part. *speed* and
*scale* need an idle machine.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curate import decontaminate, heuristics, measure_chunk, signatures
from pipeline.curate import stage as curate_stage
from pipeline.curate.words import Texts, as_texts
from pipeline.format.manifest import RawManifest
from pipeline.format.parquet import read_batches
from pipeline.params import CurateParams, TokenizeParams, VerifyParams
from pipeline.runtime.machine import Machine
from pipeline.tokenize import from_text
from pipeline.tokenize import stage as tokenize_stage
from pipeline.verify.stage import verify
from tests.benchmarks import curate_datatrove
from tests.benchmarks.curate_copies import copies_part
from tests.benchmarks.tokenize import make_corpus, text_bytes
from tests.support.pages import replace_between
from tests.support.repo import REPO
from tests.support.small_data import describe, no_cluster, run_here, write_manifest

PAGE = REPO / "docs" / "curate.md"
SHARED = REPO.parent / "shared" / "data"
WEB = [SHARED / name for name in ("us_gov_web", "c4_en", "fineweb_edu")]
BOOKS = SHARED / "pd_books"
TASKS = SHARED / "hellaswag" / "hellaswag_val_first200.jsonl"
SPLIT = TokenizeParams(shard_tokens=5_000_000, val_per_10k=100)
RULES: dict[str, Any] = {
    "filters": {"gopher_repetition": {}, "gopher_quality": {}, "c4": {}, "fineweb": {}},
    "exact_duplicates": True,
    "near_duplicates": True,
}
STAGES = ("tokenize", "curate, all rules")
FILTERS = {
    "gopher_quality": ["gopher_quality"],
    "fineweb": ["fineweb"],
    "gopher_quality and fineweb": ["gopher_quality", "fineweb"],
    "c4": ["c4"],
    "gopher_repetition": ["gopher_repetition"],
}
GOALS = {"signatures": 50, "gopher_quality and fineweb": 40, "gopher_repetition": 8}
"""MB/s."""
DATATROVE_MB = 3
DOCUMENT = 4500
"""Bytes of a document of FineWeb, for the computed costs."""


# -- speed ---------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def stages(raw: Path, tasks: Path) -> dict[str, Callable[[Path], Any]]:
    """Return the stages: functions of an empty folder, which run in this process."""
    for module in (curate_stage, tokenize_stage):
        module.cluster = no_cluster  # type: ignore[attr-defined]
    for user in (curate_stage, from_text):
        user.run_tasks = run_here  # type: ignore[attr-defined]
    rules = CurateParams.model_validate({**RULES, "decontaminate": [str(tasks)]})

    def run_curate(folder: Path) -> None:
        curate_stage.curate(raw, folder / "out", rules, SPLIT, Machine(work_dir=folder / "work"))

    def run_tokenize(folder: Path) -> None:
        machine = Machine(work_dir=folder / "work")
        tokenize_stage.tokenize(raw, folder / "out", SPLIT, machine, "benchmark")

    return {STAGES[0]: run_tokenize, STAGES[1]: run_curate}


def on_one_core() -> None:
    """Bind this process, and those that it starts, to one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure_stage(name: str, raw: Path, small: Path, tasks: Path) -> tuple[float, float]:
    """Return MB/s of a stage in this process, and the peak memory of the process in MB."""
    on_one_core()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        stages(small, tasks)[name](Path(first))  # imports, and what the first call builds
        seconds = timed(lambda: stages(raw, tasks)[name](Path(second)))
    size = sum(map(text_bytes, raw.glob("*.parquet"))) / 1e6
    return size / seconds, peak_memory() / 1e6


def measure_parts(raw: Path, tasks: Path) -> dict[str, float]:
    """Return MB/s of each computation on texts that are in memory."""
    on_one_core()
    source = RawManifest.load(raw)
    read = [
        as_texts(texts)
        for file in source.files
        for _, texts in read_batches(raw / file.path, source.column(file), 0, file.rows)
    ]
    index = decontaminate.index(decontaminate.read_items("hellaswag", tasks))
    compute: dict[str, Callable[[Texts], Any]] = {
        "signatures": signatures.sign,
        **{name: partial(heuristics.measure, sets=sets) for name, sets in FILTERS.items()},
        "decontamination": partial(decontaminate.find, index=index),
    }
    size, found = sum(len(texts.data) for texts in read) / 1e6, {}
    for name, function in compute.items():
        function(read[0])
        found[name] = size / timed(lambda: [function(texts) for texts in read])  # noqa: B023
    return found


def measure_datatrove(python: str, raw: Path) -> dict[str, float]:
    """Return MB/s of datatrove's filters and signatures on the first texts."""
    on_one_core()
    texts = pq.read_table(next(raw.glob("*.parquet")), columns=["text"])["text"].to_pylist()
    sizes = np.cumsum([len(text.encode()) for text in texts])
    return curate_datatrove.speeds(python, texts[: int((sizes < DATATROVE_MB * 1e6).sum())])


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a new process; return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def speed_part(text: Path, tasks: Path, megabytes: int, rounds: int, python: str | None) -> str:
    """Measure the contenders in turn; return the medians as a Markdown table."""
    ours, theirs = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    peaks = defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        raw = make_corpus(text, Path(folder) / "raw", megabytes)
        small = make_corpus(text, Path(folder) / "small", 4)
        for turn in range(rounds):
            for name in STAGES:
                speed, peak = apart(measure_stage, name, raw, small, tasks)
                ours[name].append(speed)
                peaks[name].append(peak)
            for name, speed in apart(measure_parts, raw, tasks).items():
                ours[name].append(speed)
            if python is not None:
                for name, speed in apart(measure_datatrove, python, raw).items():
                    theirs[name].append(speed)
            print(f"round {turn + 1} of {rounds}", flush=True)
    lines = [
        f"{megabytes} MB of {text.name}, one core, medians of {rounds} rounds (least to most):",
        "",
        "| | MB/s | goal | part of `tokenize`'s speed | datatrove, MB/s | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, speeds in ours.items():
        ratios = [speed / other for speed, other in zip(speeds, ours[STAGES[0]], strict=True)]
        other = f"{statistics.median(theirs[name]):.2f}" if name in theirs else ""
        peak = f"{max(peaks[name]):.0f} MB" if name in peaks else ""
        lines.append(
            f"| {name} | {statistics.median(speeds):.1f} ({min(speeds):.1f} to "
            f"{max(speeds):.1f}) | {GOALS.get(name, '')} | {statistics.median(ratios):.3f} | "
            f"{other} | {peak} |"
        )
    return "\n".join(lines)


# -- scale ---------------------------------------------------------------------------------------


def write_made_text(raw: Path, rows: int, files: int = 10) -> Path:
    """Write short documents of made words; a tenth repeat another, half of these nearly."""
    raw.mkdir()
    rng = np.random.default_rng(1)
    vocabulary = np.array(
        ["the", "of", "and", "to"] + [f"w{number:x}" for number in range(20_000)], dtype=object
    )
    described = []
    for number in range(files):
        count = rows // files
        draws = np.minimum(rng.zipf(1.2, (count, 40)) - 1, len(vocabulary) - 1)
        draws = np.where(rng.random(draws.shape) < 0.5, draws, rng.integers(4, 20_000, draws.shape))
        again = np.flatnonzero(rng.random(count) < 0.1)
        draws[again] = draws[rng.integers(0, count // 2, len(again))]
        draws[again[::2], 20] = rng.integers(4, 20_000, len(again[::2]))
        texts = [" ".join(words) + "." for words in vocabulary[draws]]
        path = raw / f"{number:03d}.parquet"
        pq.write_table(pa.table({"text": texts}), path, compression="zstd", row_group_size=10_000)
        described.append(describe(path, count))
    write_manifest(raw, described)
    return raw


def run_scale(folder: Path, raw: Path) -> dict[str, float]:
    """Run the stages; return seconds, and sizes in bytes, by name."""
    machine = Machine(work_dir=folder / "work")
    filters = {"gopher_repetition": {}, "gopher_quality": {"min_words": 20}, "fineweb": {}}
    params = CurateParams.model_validate({**RULES, "filters": filters})
    out, tokens = folder / "selection", folder / "tokens"
    before, used = peak_memory(), time.process_time()
    found: dict[str, float] = {"text": sum(map(text_bytes, raw.glob("*.parquet")))}
    found["curate"] = timed(lambda: curate_stage.curate(raw, out, params, SPLIT, machine))
    found["CPU time of the process that decides"] = time.process_time() - used
    found["memory"] = peak_memory() - before
    kinds = [folder / "work" / kind for kind in measure_chunk.MODULES]
    found["pieces"] = sum(
        path.stat().st_size for kind in kinds for path in kind.rglob("*") if path.is_file()
    )
    other = params.model_copy(update={"similarity": 0.8})
    found["curate, another similarity"] = timed(
        lambda: curate_stage.curate(raw, out, other, SPLIT, machine)
    )
    found["tokenize"] = timed(
        lambda: tokenize_stage.tokenize(raw, tokens, SPLIT, machine, "benchmark", out)
    )
    found["verify"] = timed(lambda: verify(raw, tokens, VerifyParams(), machine, out))
    selected = json.loads((out / "manifest.json").read_text())
    found["dropped"] = sum(selected["dropped"].values())
    return found


def scale_part(rows: int) -> str:
    """Run a source of short documents, and compute the costs of larger ones."""
    with tempfile.TemporaryDirectory() as name:
        raw = apart(write_made_text, Path(name) / "raw", rows)  # its memory is not of interest
        found: dict[str, float] = apart(run_scale, Path(name), raw)
    pieces, memory = found["pieces"] / rows, found["memory"] / rows
    decides = found["CPU time of the process that decides"]
    seconds = ", ".join(
        f"`{key}` {found[key]:.0f} s"
        for key in ("curate", "curate, another similarity", "tokenize", "verify")
    )
    chunk = measure_chunk.CHUNK_TOKENS * 4.5
    lines = [
        f"{rows:,} documents of 40 made words ({found['text'] / 1e6:.0f} MB of text) on "
        f"{os.cpu_count()} cores, {found['dropped']:,.0f} of them dropped: {seconds}. The process "
        f"that decides took {decides:.0f} s of CPU time and {found['memory'] / 1e6:.0f} MB of "
        f"memory, {memory:.0f} bytes per row; the store {pieces:.0f} bytes per row.",
        "",
        "Computed from these, for documents of 4.5 KB as in FineWeb:",
        "",
        "| | 15 million rows | 15 billion rows: 100 projects of 150 million |",
        "|---|---|---|",
    ]
    sizes = (15e6, 15e9)
    for title, cells in (
        ("tasks of 135 MB of text", [f"{DOCUMENT * n / chunk:,.0f}" for n in sizes]),
        ("pieces in the store", [f"{pieces * n / 1e9:,.0f} GB" for n in sizes]),
        (
            "memory of the process that decides",
            [f"{memory * 15e6 / 1e9:.1f} GB", f"{memory * 150e6 / 1e9:.0f} GB per project"],
        ),
        (
            "its CPU time",
            [f"{decides / rows * n / 60:,.0f} minutes{end}"
             for n, end in ((15e6, ""), (150e6, " per project"))],
        ),
    ):  # fmt: skip
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- tasks ---------------------------------------------------------------------------------------


def tasks_part(folders: list[Path], tasks: Path) -> str:
    """Count the documents that have words in common with tasks."""
    items = decontaminate.read_items("hellaswag", tasks)
    indices = [decontaminate.index(items, words) for words in (decontaminate.NGRAM, 8)]
    lines = [
        f"{len(items)} tasks of HellaSwag, {len(indices[0].short)} too short to check:",
        "",
        "| text | documents | with 13 words of a task | with 8 words |",
        "|---|---|---|---|",
    ]
    for folder in folders:
        rows, found, names = 0, [0, 0], [set[str](), set[str]()]
        for path in sorted(folder.rglob("*.parquet")):
            for _, texts in read_batches(path, "text", 0, pq.read_metadata(path).num_rows):
                rows += len(texts)
                for i, index in enumerate(indices):
                    shared = decontaminate.find(as_texts(texts), index)
                    found[i] += len(np.unique(shared.rows))
                    names[i].update(index.items[item] for item in shared.items.tolist())
        cells = [
            f"{count:,} ({', '.join(sorted(some)[:5])})" if some else "0"
            for count, some in zip(found, names, strict=True)
        ]
        lines.append(f"| {folder.name} | {rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.curate")
    known = ("copies", "datatrove", "tasks", "speed", "scale")
    parser.add_argument("parts", nargs="+", choices=known)
    parser.add_argument("--text", type=Path, nargs="+", default=[*WEB, BOOKS], metavar="FOLDER")
    parser.add_argument("--tasks", type=Path, default=TASKS, help="a .jsonl file of HellaSwag")
    parser.add_argument("--datatrove", metavar="PYTHON")
    parser.add_argument("--documents", type=int, help="default: copies 6000, datatrove 2000")
    parser.add_argument("--seeds", type=int, default=3, help="of the hash functions (copies)")
    parser.add_argument("--mb", type=int, default=40, help="MB of text (speed)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000, help="documents (scale)")
    parser.add_argument("--write", action="store_true", help="fill docs/curate.md")
    args = parser.parse_args()
    for part in args.parts:
        if part == "copies":
            text = copies_part(args.text, args.documents or 6000, args.seeds)
        elif part == "datatrove":
            if args.datatrove is None:
                print("datatrove: skipped; name a Python that has it with --datatrove")
                continue
            text = curate_datatrove.datatrove_part(args.datatrove, WEB, args.documents or 2000)
        elif part == "tasks":
            text = tasks_part(args.text, args.tasks)
        elif part == "speed":
            text = speed_part(BOOKS, args.tasks, args.mb, args.rounds, args.datatrove)
        else:
            text = scale_part(args.rows)
        print(text, flush=True)
        if args.write:
            page = PAGE.read_text(encoding="utf-8")
            page = replace_between(page, f"<!-- {part} -->", f"<!-- end of {part} -->", text)
            PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
