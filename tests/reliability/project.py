"""The smallest project in which every stage has something to do, and what two projects share.

Its dvc.yaml has stub dependencies: a folder needs no copy of the code, and the code keys are the
same whatever is edited while the harness runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.repo import REPO
from tests.support.small_data import some_texts, write_parquet
from tests.support.training import MODEL

HF = "artifacts/hf"
EXPORT = ["--checkpoint", "artifacts/checkpoint", "--out", HF, "--project", "."]

SECTIONS: dict[str, dict[str, Any]] = {
    "sources": {"main": {"kind": "files", "paths": ["source/*"]}},
    "curate": {"exact_duplicates": True, "near_duplicates": True, "compare": "text"},
    "tokenize": {"shard_tokens": 4000, "val_per_10k": 2000},
    "verify": {"retokenize": 1},
    "model": {**MODEL, "n_layer": 1, "n_embd": 4},
    "train": {
        "seed": 1, "steps": 4, "batch_tokens": 64, "learning_rate": 1e-2, "dtype": "float32",
        "val_every": 2, "val_tokens": 64, "checkpoint_every": 2, "keep_checkpoints": 1,
        "log_every": 1, "sample_tokens": 4,
    },
    "evaluate": {"val_tokens": 64, "prompts": ["", "The"], "samples": 1, "sample_tokens": 4,
                 "temperature": 0.8, "top_k": 50},
}  # fmt: skip

# Outs of DVC stages, which DVC removes before it runs the stage.
OUTS = {
    "download": ["data/raw"],
    "download from a hub": ["data/raw"],
    "curate": ["data/selection"],
    "tokenize": ["data/tokens"],
    "verify": ["data/statistics.json", "data/verified.json"],
    "train": ["artifacts", "metrics/live"],
    "publish": ["artifacts", "metrics/live"],
    "evaluate": ["artifacts/evaluation.json", "artifacts/samples.md", "metrics/reference.csv"],
    "export": [HF],
    "report": ["artifacts/report.html"],
}

# Keys whose values differ between two runs that nothing disturbed: times, and places on the disk.
_VARIES = {
    "mtime_ns", "inode", "ctime_ns", "seconds", "tokens_per_second", "step_seconds", "data_wait",
    "memory_gb", "mfu", "peak_memory_bytes", "time", "json_sha256", "crc32",
}  # fmt: skip
# Files that differ altogether: locks, starts (one more line per start), and curves of such keys.
_VARYING_FILES = ("starts.jsonl", *(f"{name}.tsv" for name in sorted(_VARIES)))
# What the report shows of times: tiles, rows of tables, and charts.
_TIMES_IN_REPORT = re.compile(
    r'<div class="tile"><b>[^<]*</b><span>(tokens per second|training time)</span></div>'
    r"|<tr><th>(training, without [^<]*|seconds per step|tokens per second|process-hours"
    r"|operations per second|fraction of the devices[^<]*|peak memory of rank 0)</th>"
    r"<td[^>]*>[^<]*</td></tr>"
    r"|<figcaption>(Throughput|MFU|Data wait|Memory)\b.*?</figure>",
    re.DOTALL,
)
_TIME_IN_CARD = re.compile(rb"\| training time \|.*")
_NOT_RESULTS = (".work/locks/", ".dvc/tmp/", "home/", ".git/")


def make_project(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """Write a project with two source files; one must be converted, and repeats a row."""
    texts = some_texts(16)
    write_parquet(folder / "source/a.parquet", texts[:8])
    lines = [json.dumps({"text": text}) for text in [*texts[8:], texts[0]]]
    (folder / "source/b.jsonl").write_text("\n".join(lines) + "\n")
    sections = {name: {**values, **changes.get(name, {})} for name, values in SECTIONS.items()}
    (folder / "params.yaml").write_text(json.dumps(sections))  # JSON is YAML
    (folder / "stage_code.py").write_text("")
    stub = {"cmd": "none", "deps": ["stage_code.py"]}
    stages = dict.fromkeys(("download", "tokenize", "verify", "train", "evaluate"), stub)
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    return folder


def make_dvc_project(folder: Path, environment: Mapping[str, str]) -> Path:
    """Make a DVC project of three trivial stages, run it, and change its input."""
    folder.mkdir()
    (folder / "input.txt").write_text("one")
    stages = {
        "folder": {
            "cmd": "mkdir -p out && cp input.txt out/a && cp input.txt out/b",
            "deps": ["input.txt"],
            "outs": ["out"],
        },
        "file": {"cmd": "cp out/a result.txt", "deps": ["out"], "outs": ["result.txt"]},
        "metrics": {
            "cmd": "wc -c < result.txt > metrics.json",
            "deps": ["result.txt"],
            "metrics": [{"metrics.json": {"cache": False}}],
        },
    }
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (folder / ".dvc").mkdir()
    shutil.copy(REPO / ".dvc/config", folder / ".dvc/config")
    for command in (["git", "init", "-q"], ["dvc", "repro", "-q"]):
        environ = {k: v for k, v in environment.items() if k != "LD_PRELOAD"}
        subprocess.run(command, cwd=folder, env=environ, check=True)
    (folder / "input.txt").write_text("two")
    return folder


def copy(source: Path, target: Path) -> Path:
    """Copy a project with its times and the hard links among its files."""
    subprocess.run(["rm", "-rf", target], check=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def remove_outs(folder: Path, stage: str) -> None:
    """Remove a stage's outs, as DVC does before the stage."""
    for out in OUTS.get(stage, []):
        subprocess.run(["rm", "-rf", folder / out], check=True)


def contents(folder: Path) -> dict[str, str]:
    """Return what must be the same in two runs: path -> hash, without times and locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(_NOT_RESULTS) or path.is_dir():
            continue
        found[name] = hashlib.sha256(_comparable(path)).hexdigest()
    return found


def read(path: Path) -> bytes:
    """Return the content of a file, or a word for what is none."""
    return path.read_bytes() if path.is_file() else b"not a regular file"


def _comparable(path: Path) -> bytes:
    if path.name in _VARYING_FILES:
        return b""
    data = read(path)
    if path.suffix == ".html":
        return _TIMES_IN_REPORT.sub("", data.decode(errors="surrogateescape")).encode(
            errors="surrogateescape"
        )
    if path.name == "README.md":
        return _TIME_IN_CARD.sub(b"", data)
    if len(data) > 1 << 17:  # vocabularies and tensors, without times
        return data
    try:
        if path.suffix == ".json":
            return json.dumps(_without_times(json.loads(data)), sort_keys=True).encode()
        if path.suffix == ".jsonl":
            return json.dumps([_without_times(json.loads(x)) for x in data.splitlines()]).encode()
        if path.suffix == ".tsv":  # DVCLive's columns: timestamp, step, value
            return b"\n".join(line.partition(b"\t")[2] for line in data.splitlines())
    except ValueError:
        return data
    return data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _VARIES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Describe how the contents of a folder differ from those of an undisturbed run."""
    return [
        *(f"stray {name}" for name in sorted(found.keys() - expected.keys())),
        *(f"missing {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"other {name}" for name, what in expected.items() if found.get(name, what) != what),
    ]


def differing_lines(folder: Path, other: Path, found: list[str]) -> list[str]:
    """Return the lines in which the small text files among `differences` differ."""
    lines = []
    for name in (line.removeprefix("other ") for line in found if line.startswith("other ")):
        a, b = (read(root / name).decode(errors="replace").splitlines() for root in (other, folder))
        if max(len(a), len(b)) <= 1000:
            changes = difflib.ndiff(a, b)
            lines += [f"{name}: {line}" for line in changes if line.startswith(("- ", "+ "))]
    return lines
