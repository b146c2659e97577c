"""Comparison of HellaSwag answers with EleutherAI's lm-evaluation-harness, task by task, offline.

    python -m tests.benchmarks.harness --checkpoint artifacts/checkpoint --tasks hellaswag.jsonl \\
        --python /path/to/a/venv/with/lm_eval/bin/python

The checkpoint is exported and scored by `lm_eval --model hf` in float32, with the harness's own
`process_docs` if the tasks have `ctx_a` and `ctx_b`; and by train.evals.hellaswag with several
batch sizes. The exit status is 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from model import GPT
from train.evals import hellaswag
from train.evals.likelihood import score_requests

TASK = """\
task: hellaswag_here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tasks}}}}}
validation_split: validation
output_type: multiple_choice
process_docs: !function here.process
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PROCESS = """\
from lm_eval.tasks.hellaswag.utils import preprocess, process_docs

def process(dataset):
    if "ctx_a" in dataset.column_names:
        return process_docs(dataset)
    return dataset.map(lambda doc: {
        "query": preprocess(doc["activity_label"] + ": " + doc["ctx"]),
        "choices": [preprocess(ending) for ending in doc["endings"]],
    })
"""


def run_harness(python: str, exported: Path, tasks: Path, folder: Path) -> np.ndarray:
    """Return (tasks, 6): the log-likelihoods of the 4 endings, acc and acc_norm, by the harness."""
    (folder / "task.yaml").write_text(TASK.format(tasks=tasks.absolute()))
    (folder / "here.py").write_text(PROCESS)
    command = [
        *(python, "-m", "lm_eval", "--model", "hf", "--tasks", "hellaswag_here"),
        *("--model_args", f"pretrained={exported},dtype=float32", "--device", "cpu"),
        *("--include_path", str(folder), "--batch_size", "8"),
        *("--log_samples", "--output_path", str(folder / "out")),
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    subprocess.run(command, env=env, check=True, capture_output=True)
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda r: r["doc_id"])
    return np.array(
        [
            [*(float(answer[0][0]) for answer in row["resps"]), row["acc"], row["acc_norm"]]
            for row in rows
        ]
    )


def main() -> None:
    """Compare, print, and exit with status 0 if all answers are equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.harness")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True, help="a .jsonl file of HellaSwag")
    parser.add_argument("--python", required=True, help="interpreter with lm_eval installed")
    args = parser.parse_args()
    gpt = GPT.from_checkpoint(args.checkpoint)
    tasks = hellaswag.read("evaluate.hellaswag", str(args.tasks))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export = ("--checkpoint", str(args.checkpoint), "--out", str(folder / "hf"))
        subprocess.run([sys.executable, "-m", "model.export", *export], check=True)
        start = time.perf_counter()
        theirs = run_harness(args.python, folder / "hf", args.tasks, folder)
        n = len(theirs)
        print(f"harness: {time.perf_counter() - start:.0f} s, including startup", flush=True)
    expected, good = theirs[:, :4], True
    for size in (1, 16, None):
        start = time.perf_counter()
        predictions = hellaswag.predict(gpt, tasks, batch_size=size)
        seconds = time.perf_counter() - start
        requests = [request for task in tasks for request, _ in task.harness_requests()]
        scores = score_requests(gpt, requests, batch_size=size)
        ours = np.array([score.log_likelihood for score in scores])
        answers = np.array([p.acc for p in predictions])
        acc = np.array([p.acc == p.label for p in predictions])
        acc_norm = np.array([p.acc_norm == p.label for p in predictions])
        same = [
            int((answers == expected.argmax(1)).sum()),
            int((acc == theirs[:, 4]).sum()),
            int((acc_norm == theirs[:, 5]).sum()),
        ]
        good = good and same == [n, n, n]
        print(
            f"batch size {size or 'chosen'}: {seconds:.1f} s; of {n} tasks, {same[0]} have the "
            f"same answer, {same[1]} the same acc, {same[2]} the same acc_norm; "
            f"log-likelihoods differ by at most "
            f"{np.abs(ours.reshape(expected.shape) - expected).max():.1e}; "
            + ", ".join(f"{k} {v:.4g}" for k, v in hellaswag.metrics(predictions).items()),
            flush=True,
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
