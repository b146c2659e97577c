"""Tests for the benchmarks HellaSwag and LAMBADA: requests, metrics, and sources of tasks.

tests/benchmarks/harness.py compares the answers with lm_eval, task by task.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from pipeline.format.tokenizer import decode
from pipeline.runtime.errors import UserError
from train.evals import hellaswag, lambada
from train.evals.hellaswag import Prediction, Task
from train.evals.likelihood import Request, score_requests

ROW: dict[str, Any] = {
    "activity_label": "Baking a cake",
    "ctx_a": "[header] How to bake [title] Mix the flour.",
    "ctx_b": "the Cook then",
    "ctx": "[header] How to bake [title] Mix the flour. the Cook then",
    "endings": ["eats  it [step] raw", "bakes it.", "sings – naïvely", "sits"],
    "label": "1",
}


@pytest.fixture(scope="module")
def gpt() -> GPT:
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64), seed=1)
    with torch.no_grad():
        gpt.wte.weight.mul_(20)
    return gpt


def text(request: Request) -> tuple[str, str]:
    return decode(request.context), decode(request.continuation)


def test_harness_requests_have_no_markup_and_a_capital() -> None:
    requests = Task.from_row(ROW).harness_requests()
    # " [title]" ends a sentence; other markup is removed, then double spaces become single
    query = "Baking a cake: How to bake. Mix the flour. The cook then"
    assert [text(request) for request, _ in requests] == [
        (query, " eats it raw"),
        (query, " bakes it."),
        (query, " sings – naïvely"),
        (query, " sits"),
    ]
    assert [length for _, length in requests] == [11, 9, 15, 4]  # characters, not bytes
    row = {key: value for key, value in ROW.items() if key not in ("ctx_a", "ctx_b")}
    query = query.replace("The cook", "the Cook")  # without the parts, `ctx` is used as it is
    assert text(Task.from_row(row).harness_requests()[0][0])[0] == query


def test_the_space_before_removed_markup_goes_to_the_ending() -> None:
    request, length = Task.from_row({**ROW, "ctx_b": "the cook [step]"}).harness_requests()[1]
    assert text(request) == ("Baking a cake: How to bake. Mix the flour. The cook", "  bakes it.")
    assert length == 9


def test_completion_requests_have_the_unchanged_text() -> None:
    requests = Task.from_row(ROW).completion_requests()
    assert [text(request) for request in requests] == [
        (ROW["ctx"], f" {e}") for e in ROW["endings"]
    ]


def test_predictions_use_likelihood_in_total_per_character_and_per_token(gpt: GPT) -> None:
    rows = [ROW, {**ROW, "endings": ["a", "a b c d e f g", "b", "c a"]}]
    tasks = [Task.from_row(row) for row in rows]
    predictions = hellaswag.predict(gpt, tasks)
    for task, prediction in zip(tasks, predictions, strict=True):
        requests = task.harness_requests()
        scores = score_requests(gpt, [request for request, _ in requests])
        totals = [score.log_likelihood for score in scores]
        assert prediction.acc == totals.index(max(totals))
        per_character = [p / n for p, (_, n) in zip(totals, requests, strict=True)]
        assert prediction.acc_norm == per_character.index(max(per_character))
        scores = score_requests(gpt, task.completion_requests())
        losses = [-score.log_likelihood / score.tokens for score in scores]
        assert prediction.acc_completion == losses.index(min(losses))
        assert prediction.label == 1
    assert len({prediction.acc for prediction in predictions}) == 2  # not the same index always


def test_metrics_are_fractions_of_right_predictions() -> None:
    predictions = [Prediction(0, 1, 2, 0), Prediction(1, 1, 2, 1), Prediction(2, 3, 2, 2)]
    assert hellaswag.metrics(predictions) == {
        "hellaswag_tasks": 3,
        "hellaswag_acc": 1.0,
        "hellaswag_acc_norm": pytest.approx(1 / 3),
        "hellaswag_acc_completion": pytest.approx(1 / 3),
    }


def test_lambada_scores_the_last_word(gpt: GPT) -> None:
    wrong = lambada.request({"text": "Under the wide sky he saw a nightingale"})
    assert text(wrong) == ("Under the wide sky he saw a", " nightingale")
    greedy = int(gpt(torch.tensor([wrong.context]))[0, -1].argmax())
    right = Request(wrong.context, (greedy,))
    metrics = lambada.evaluate(gpt, [wrong, right])
    assert metrics["lambada_tasks"] == 2
    assert metrics["lambada_acc"] == 0.5
    total = sum(score.log_likelihood for score in score_requests(gpt, [wrong, right]))
    assert metrics["lambada_perplexity"] == pytest.approx(math.exp(-total / 2))
    with pytest.raises(ValueError, match="nightingale"):
        lambada.request({"text": "nightingale"})
    with pytest.raises(TypeError, match="text"):
        lambada.request({"text": ["Under the wide sky"]})


def test_a_path_may_be_relative_to_the_main_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps(ROW))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # as in the workspace of an experiment
    assert len(hellaswag.read("evaluate.hellaswag", "own.jsonl")) == 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([ROW, {**ROW, "label": "4"}], "row 2.*label '4'"),
        ([{**ROW, "label": ""}], "row 1"),
        ([{key: value for key, value in ROW.items() if key != "ctx"}], "row 1.*'ctx'"),
        ([{**ROW, "endings": ["a", "[b]"]}], "row 1.*endings"),
        ([{**ROW, "endings": "abcd"}], "row 1.*endings"),
        ([{**ROW, "endings": [1, 2]}], "row 1.*endings"),
        ([{**ROW, "ctx": ""}], "row 1.*ctx"),  # its first ending would have no token to score
        ([{**ROW, "ctx_b": None}], "row 1.*ctx_b"),
        ([{**ROW, "label": 1.7}], r"row 1.*label 1\.7"),
        ([{**ROW, "label": math.inf}], "row 1.*label inf"),
        ([], ""),
        ([3], "3"),
    ],
)
def test_an_invalid_row_is_named(tmp_path: Path, rows: list[Any], named: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=rf"evaluate\.hellaswag: .*tasks\.jsonl: .*{named}"):
        hellaswag.read("evaluate.hellaswag", str(path))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)  # without the check: "no tasks", not a hang
    os.write(writer, b"3\n")
    try:
        for name in ("nowhere.jsonl", str(tmp_path), str(tmp_path / "pipe")):
            with pytest.raises(UserError, match=rf"evaluate\.lambada: {name}: (?!not JSON)"):
                lambada.read("evaluate.lambada", name)
    finally:
        os.close(writer)


def test_an_unreachable_hub_is_named(tmp_path: Path) -> None:
    code = (
        "from pipeline.runtime import command\n"
        "from train.evals import hellaswag\n"
        "command.run(lambda: hellaswag.read('evaluate.hellaswag', 'hub'))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: params.yaml: evaluate.hellaswag: hub: Rowan/hellaswag")
