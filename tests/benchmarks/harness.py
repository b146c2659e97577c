"""Are our HellaSwag answers those of EleutherAI's lm-evaluation-harness? Task for task, no network.

    python -m tests.benchmarks.harness --checkpoint artifacts/checkpoint --tasks hellaswag.jsonl \\
        --python /path/to/a/venv/with/lm_eval/bin/python

The checkpoint is exported and measured by `lm_eval --model hf` in float32, with the harness's own
`process_docs` where the tasks have `ctx_a` and `ctx_b`; and by train.hellaswag, in several batches.
Ends with status 1 where an answer differs.
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
from train.evals.likelihood import scores
from train.evals.task_files import read_tasks

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


def of_the_harness(python: str, exported: Path, tasks: Path, folder: Path) -> np.ndarray:
    """The harness's log-likelihoods (tasks, 4), and whether it counts acc and acc_norm: (n, 6)."""
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
    """Compare, print, and say by the status whether all is equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.harness")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True, help="a .jsonl file of HellaSwag")
    parser.add_argument("--python", required=True, help="of an environment that has lm_eval")
    args = parser.parse_args()
    gpt = GPT.from_checkpoint(args.checkpoint)
    tasks = read_tasks("evaluate.hellaswag", str(args.tasks), hellaswag.HUB, hellaswag.Task.of)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export = ("--checkpoint", str(args.checkpoint), "--out", str(folder / "hf"))
        subprocess.run([sys.executable, "-m", "model.export", *export], check=True)
        start = time.perf_counter()
        theirs = of_the_harness(args.python, folder / "hf", args.tasks, folder)
        n = len(theirs)
        print(f"harness: {time.perf_counter() - start:.0f} s with its start", flush=True)
    likely, good = theirs[:, :4], True
    for size in (1, 16, None):
        start = time.perf_counter()
        answers = hellaswag.answer(gpt, tasks, size=size)
        seconds = time.perf_counter() - start
        rows = [row for task in tasks for row, _ in task.harness()]
        ours = np.array([score.log_likelihood for score in scores(gpt, rows, size=size)])
        same = [
            sum(a.acc == choice for a, choice in zip(answers, likely.argmax(1), strict=True)),
            sum((a.acc == a.label) == bool(t) for a, t in zip(answers, theirs[:, 4], strict=True)),
            sum(
                (a.acc_norm == a.label) == bool(t)
                for a, t in zip(answers, theirs[:, 5], strict=True)
            ),
        ]
        good = good and same == [n, n, n]
        print(
            f"batch {size or 'chosen'}: {seconds:.1f} s; of {n} tasks the same answer in "
            f"{same[0]}, the same acc in {same[1]}, the same acc_norm in {same[2]}; "
            f"log-likelihoods differ by "
            f"{np.abs(ours.reshape(likely.shape) - likely).max():.1e} at most; "
            + ", ".join(f"{k} {v:.4g}" for k, v in hellaswag.measures(answers).items()),
            flush=True,
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
