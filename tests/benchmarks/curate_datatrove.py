"""The stage `curate` beside datatrove (0.10.1), which another Python runs.

*Filters*: decisions with datatrove's own words, and with ours given to it: then both compute the
same numbers, and must decide alike, by the same rule. *Clusters*: datatrove's signatures go through
our bands, buckets and `components`, and must give its clusters. *Speed*: the same texts in turn.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curate import heuristics, near_duplicates, words
from pipeline.curate.hashing import mix64
from tests.benchmarks.curate_copies import FAR, batch, plant, read_texts

FILTERS = ("gopher_repetition", "gopher_quality", "fineweb")

SCRIPT = """
import json, sys, time
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.filters import fineweb_quality_filter as fineweb
from datatrove.pipeline.filters import gopher_quality_filter as quality
from datatrove.pipeline.filters import gopher_repetition_filter as repetition

part, folder = sys.argv[1], Path(sys.argv[2])
table = pq.read_table(folder / "texts.parquet")
texts = table["text"].to_pylist()
filters = {
    "gopher_repetition": repetition.GopherRepetitionFilter(),
    "gopher_quality": quality.GopherQualityFilter(),
    "fineweb": fineweb.FineWebQualityFilter(),
}

def signer(out, config):
    step = minhash.MinhashDedupSignature(out, config=config)
    step._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())  # for xxhash from 4 on
    return step

def verdicts(name):
    found = []
    for number, text in enumerate(texts):
        kept = filters[name].filter(Document(text=text, id=str(number)))
        found.append("" if kept is True else kept[1])
    return found

def cluster():
    out = {name: str(folder / name) for name in ("signatures", "pairs", "clusters")}
    config = minhash.MinhashConfig()
    documents = (Document(text=text, id=str(i)) for i, text in enumerate(texts))
    signer(out["signatures"], config).run(documents, 0, 1)
    for rank in range(14):
        step = minhash.MinhashDedupBuckets(out["signatures"], out["pairs"], config=config)
        step.run(None, rank, 14)
    step = minhash.MinhashDedupCluster(out["pairs"], out["clusters"], config, save_cluster_id=True)
    step.run(None, 0, 1)

def timed(function, *args):
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began

def sign():
    step = signer(str(folder / "signatures"), minhash.MinhashConfig())
    for text in texts:
        shingles = step.get_shingles(text)
        if shingles.size:
            step.get_signature(shingles)

if part == "filters":
    result = {"own": {name: verdicts(name) for name in filters}}
    given = dict(zip(texts, table["words"].to_pylist()))
    for module in (repetition, quality, fineweb):
        module.split_into_words = lambda text, language=None: given[text]
    result["ours"] = {name: verdicts(name) for name in filters}
elif part == "clusters":
    cluster()
    result = None
else:
    filters["fineweb"].filter(Document(text=texts[0], id="0"))  # loads spaCy
    result = {name: timed(verdicts, name) for name in filters} | {"signatures": timed(sign)}
(folder / "result.json").write_text(json.dumps(result))
"""


def run(
    python: str, part: str, folder: Path, texts: Sequence[str], **columns: Sequence[Any]
) -> Any:
    """Run a part of the script on texts; return its result."""
    pq.write_table(pa.table({"text": texts, **columns}), folder / "texts.parquet")
    command = [python, "-I", "-c", SCRIPT, part, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def mangled(text: str, number: int) -> str:
    """Return a text that some filter may drop: one of eight kinds of damage."""
    lines, spaced = text.split("\n"), text.split(" ")
    if number % 8 == 0:
        return "\n".join(line for line in lines for _ in range(1 + (len(line) % 3 == 0)))
    if number % 8 == 1:
        return "\n\n".join([*spaced[:20], *[" ".join(spaced[20:60])] * 3])
    if number % 8 == 2:
        return " ".join(spaced[: 30 + number % 40])
    if number % 8 == 3:
        return "\n".join(f"{'-•'[number % 16 // 8]} {line}..." for line in lines)
    if number % 8 == 4:
        return " ".join(word if i % (3 + number % 5) else "42 #" for i, word in enumerate(spaced))
    if number % 8 == 5:
        return "\n".join(" ".join(spaced[i : i + 4]) for i in range(0, len(spaced), 4))
    if number % 8 == 6:
        return " ".join(spaced[i // 12 * 9 + i % 12 % 9] for i in range(len(spaced)))
    return text.replace(" the ", " ").replace(" and ", " … ").replace(" of ", "  ")


def surface_words(texts: Sequence[str]) -> list[list[str]]:
    """Return our words of each text."""
    taken = batch(texts)
    found, data = words.surface_words(taken), taken.data.tobytes()
    flat = [data[a:b].decode() for a, b in zip(found.starts, found.ends, strict=True)]
    return [flat[a:b] for a, b in zip(found.firsts, found.firsts[1:], strict=False)]


def first_rules(texts: Sequence[str], name: str) -> np.ndarray:
    """Return the first rule of a set that drops each text, by its number: (d,) int64; -1: none."""
    counts = heuristics.measure(batch(texts), {name})
    drops = [heuristics.dropped(counts, rule) for rule in heuristics.SETS[name]]
    first: np.ndarray = np.where(np.any(drops, axis=0), np.argmax(drops, axis=0), -1)
    return first


REASONS = {
    "gopher_repetition": (
        "dup_para_frac", "dup_para_char_frac", "dup_line_frac", "dup_line_char_frac",
        *(f"top_{n}_gram" for n in (2, 3, 4)),
        *(f"duplicated_{n}_n_grams" for n in range(5, 11)),
    ),
    "gopher_quality": (
        "gopher_short_doc", "gopher_long_doc",
        "gopher_below_avg_threshold", "gopher_above_avg_threshold",
        "gopher_too_many_hashes", "gopher_too_many_ellipsis",
        "gopher_too_many_bullets", "gopher_too_many_end_ellipsis",
        "gopher_below_alpha_threshold", "gopher_enough_stop_words",
    ),
    "fineweb": ("empty", "line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio"),
}  # fmt: skip
"""datatrove's names of our rules, in the order of `heuristics.SETS`."""


def filters_table(python: str, folder: Path, texts: Sequence[str]) -> list[str]:
    """Compare the filters' decisions on real and on damaged texts; return a Markdown table."""
    damaged = [mangled(text, number) for number, text in enumerate(texts)]
    every = [text for text in (*texts, *damaged) if text.strip()]
    found = run(python, "filters", folder, every, words=surface_words(every))
    n, lines = len(texts), [
        "| filter, alone | texts | datatrove drops | the same decision | by the same rule |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for title, given, some in (
        ("our words", "ours", slice(None)),
        ("its own words", "own", slice(n)),
        ("its own words", "own", slice(n, None)),
    ):
        kind = {None: "real and damaged", n: "real"}[some.stop] if some.start is None else "damaged"
        for name in FILTERS:
            numbers = {reason: i for i, reason in enumerate(REASONS[name])} | {"": -1}
            theirs = np.array([numbers[reason] for reason in found[given][name][some]])
            ours = first_rules(every[some], name)
            same, alike = (theirs < 0) == (ours < 0), theirs == ours
            lines.append(
                f"| {name}, {title} | {len(ours):,} {kind} | {(theirs >= 0).sum():,} | "
                f"{same.sum():,}, {same.mean():.2%} | {alike.mean():.2%} |"
            )
    return lines


def clusters_line(python: str, folder: Path, texts: Sequence[str]) -> str:
    """Cluster documents and copies with datatrove's signatures, in both; return a sentence."""
    planted, copies = plant(texts)
    _, second = plant(copies[FAR.name], seed=2)  # copies of copies, which only a chain connects
    made = [copy for kind in copies.values() for copy in kind] + second[FAR.name]
    rows = [*planted, *made, "too short a text"]
    run(python, "clusters", folder, rows)
    record = np.dtype([("hashes", "<u8", 8), ("row", "<u4")])
    signed = np.zeros((len(rows), 112), np.uint16)
    for band in range(14):
        path = folder / "signatures" / f"bucket_{band:03d}" / "00000.minhash.sig"
        entries = np.fromfile(path, record)
        short = (mix64(entries["hashes"]) >> np.uint64(48)).astype(np.uint16)
        signed[entries["row"], 8 * band : 8 * band + 8] = short
    keys = near_duplicates.band_keys(signed, 14, 8)
    buckets = near_duplicates.shared_buckets(keys, np.ones(len(rows), bool))
    twins = near_duplicates.components(buckets, len(rows))
    ours: dict[int, set[int]] = {}
    for row in np.flatnonzero(twins >= 0).tolist():
        ours.setdefault(int(twins[row]), {int(twins[row])}).add(row)
    theirs: dict[int, set[int]] = {}
    pairs = np.fromfile(folder / "clusters" / "000000.clusters", "<u4").reshape(-1, 2)
    for row, cluster in pairs.tolist():
        theirs.setdefault(cluster, set()).add(row)
    same = {frozenset(c) for c in ours.values()} == {frozenset(c) for c in theirs.values()}
    return (
        f"{len(rows):,} rows with datatrove's signatures: {len(theirs):,} clusters of "
        f"{sum(map(len, theirs.values())):,} rows in datatrove, the largest of "
        f"{max(map(len, theirs.values()), default=0)}; "
        f"ours are {'the same' if same else f'OTHERS: {len(ours):,}'}."
    )


def datatrove_part(python: str, folders: Sequence[Path], documents: int) -> str:
    """Return the comparison of filters and clusters."""
    texts = read_texts(folders, documents)
    with tempfile.TemporaryDirectory() as scratch:
        lines = filters_table(python, Path(scratch), texts)
    with tempfile.TemporaryDirectory() as scratch:
        lines += ["", clusters_line(python, Path(scratch), texts[::4])]
    return "\n".join(lines)


def speeds(python: str, texts: Sequence[str]) -> dict[str, float]:
    """Return MB/s of datatrove's filters and signatures, without its start."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        seconds = run(python, "speed", Path(scratch), texts)
    return {name: size / spent for name, spent in seconds.items()}
