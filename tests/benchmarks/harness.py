"""Comparison with EleutherAI's lm-evaluation-harness, task by task, offline.

    python -m tests.benchmarks.harness --tasks hellaswag.jsonl \\
        --python /path/to/a/venv/with/lm_eval/bin/python [--checkpoint artifacts/checkpoint]

The checkpoint is exported and scored by `lm_eval --model hf` in float32, with the harness's own
`process_docs` if the tasks have `ctx_a` and `ctx_b`; and by train.evals with several batch sizes.
Without a checkpoint, a model is trained that knows half of the right texts by heart. LAMBADA is
compared on the right texts of the HellaSwag tasks. The exit status is 1 if an answer differs.
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
from numpy.typing import NDArray

from model import GPT, checkpoint
from tests.support.memorised import memorise
from train.evals import hellaswag, lambada
from train.evals.likelihood import Request, score_requests

HELLASWAG = """\
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
# the keys of lm_eval/tasks/lambada/lambada_openai.yaml
LAMBADA = """\
task: lambada_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
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

Floats = NDArray[np.float64]


def run_harness(
    python: str, exported: Path, hellaswag: Path, lambada: Path, folder: Path
) -> tuple[Floats, Floats]:
    """Score with the harness.

    Returns:
        HellaSwag: (tasks, 6), the log-likelihoods of the 4 endings, acc and acc_norm.
        LAMBADA: (tasks, 2), the log-likelihood, and whether it is the greedy continuation.
    """
    (folder / "hellaswag.yaml").write_text(HELLASWAG.format(tasks=hellaswag.absolute()))
    (folder / "lambada.yaml").write_text(LAMBADA.format(tasks=lambada.absolute()))
    (folder / "here.py").write_text(PROCESS)
    command = [
        *(python, "-m", "lm_eval", "--model", "hf", "--tasks", "hellaswag_here,lambada_here"),
        *("--model_args", f"pretrained={exported},dtype=float32", "--device", "cpu"),
        *("--include_path", str(folder), "--batch_size", "8"),
        *("--log_samples", "--output_path", str(folder / "out")),
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)

    def samples(task: str) -> list[dict[str, object]]:
        (path,) = (folder / "out").rglob(f"samples_{task}*.jsonl")
        rows = map(json.loads, path.read_text().splitlines())
        return sorted(rows, key=lambda row: int(row["doc_id"]))

    def answers(row: dict[str, object]) -> list[list[float | str | bool]]:
        return [answer[0] for answer in row["resps"]]  # type: ignore[attr-defined]

    choices = [
        [*(float(ll) for ll, _ in answers(row)), row["acc"], row["acc_norm"]]
        for row in samples("hellaswag_here")
    ]
    words = [answers(row)[0] for row in samples("lambada_here")]
    greedy = [[float(ll), str(greedy) == "True"] for ll, greedy in words]
    return np.array(choices, dtype=float), np.array(greedy, dtype=float)


def main() -> None:
    """Compare, print, and exit with status 0 if all answers are equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.harness")
    parser.add_argument("--checkpoint", type=Path, help="default: a model trained on the tasks")
    parser.add_argument("--tasks", type=Path, required=True, help="a .jsonl file of HellaSwag")
    parser.add_argument("--python", required=True, help="interpreter with lm_eval installed")
    args = parser.parse_args()
    tasks = hellaswag.read("evaluate.hellaswag", str(args.tasks))
    passages = [f"{task.context} {task.endings[task.label]}" for task in tasks]
    words = [lambada.request({"text": passage}) for passage in passages]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.checkpoint is None:
            args.checkpoint = folder / "checkpoint"
            gpt = memorise(passages[::2])
            checkpoint.write(args.checkpoint, gpt.config, gpt.state_dict(), {})
        gpt = GPT.from_checkpoint(args.checkpoint)
        export = ("--checkpoint", str(args.checkpoint), "--out", str(folder / "hf"))
        subprocess.run([sys.executable, "-m", "model.export", *export], check=True)
        lines = [json.dumps({"text": passage}) + "\n" for passage in passages]
        (folder / "lambada.jsonl").write_text("".join(lines))
        start = time.perf_counter()
        theirs, their_words = run_harness(
            args.python, folder / "hf", args.tasks, folder / "lambada.jsonl", folder
        )
        print(f"harness: {time.perf_counter() - start:.0f} s, including startup", flush=True)
    sizes = (1, 16, None)
    same = [compare_hellaswag(gpt, tasks, theirs, size) for size in sizes]
    same += [compare_lambada(gpt, words, their_words, size) for size in sizes]
    sys.exit(0 if all(same) else 1)


def compare_hellaswag(
    gpt: GPT, tasks: list[hellaswag.Task], theirs: Floats, size: int | None
) -> bool:
    """Return whether all answers are those of the harness, and print how many are."""
    n, expected = len(theirs), theirs[:, :4]
    start = time.perf_counter()
    predictions = hellaswag.predict(gpt, tasks, batch_size=size)
    seconds = time.perf_counter() - start
    requests = [request for task in tasks for request, _ in task.harness_requests()]
    ours = np.array([s.log_likelihood for s in score_requests(gpt, requests, batch_size=size)])
    answers = np.array([p.acc for p in predictions])
    acc = np.array([p.acc == p.label for p in predictions])
    acc_norm = np.array([p.acc_norm == p.label for p in predictions])
    same = [
        int((answers == expected.argmax(1)).sum()),
        int((acc == theirs[:, 4]).sum()),
        int((acc_norm == theirs[:, 5]).sum()),
    ]
    print(
        f"batch size {size or 'chosen'}: {seconds:.1f} s; of {n} tasks, {same[0]} have the "
        f"same answer, {same[1]} the same acc, {same[2]} the same acc_norm; "
        f"log-likelihoods differ by at most {np.abs(ours.reshape(n, 4) - expected).max():.1e}; "
        + ", ".join(f"{k} {v:.4g}" for k, v in hellaswag.metrics(predictions).items()),
        flush=True,
    )
    return same == [n, n, n]


def compare_lambada(gpt: GPT, words: list[Request], theirs: Floats, size: int | None) -> bool:
    """Return whether all answers are those of the harness, and print how many are."""
    scores = score_requests(gpt, words, batch_size=size)
    greedy = np.array([score.greedy for score in scores])
    ours = np.array([score.log_likelihood for score in scores])
    same = int((greedy == theirs[:, 1]).sum())
    print(
        f"batch size {size or 'chosen'}: of {len(words)} last words, {same} have the same answer, "
        f"{greedy.sum()} are right; log-likelihoods differ by at most "
        f"{np.abs(ours - theirs[:, 0]).max():.1e}",
        flush=True,
    )
    return same == len(words)


if __name__ == "__main__":
    main()
