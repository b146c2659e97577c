"""Of train.hellaswag, lambada and benchmarks: what is asked, how, and whence the questions come.

That the harness gives the same answers, task for task, is shown by tests/benchmarks/harness.py,
which needs lm_eval.
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
from tests.support.repo import SHARED
from train.evals import hellaswag, lambada
from train.evals.hellaswag import Answers, Task
from train.evals.likelihood import Row, scores
from train.evals.task_files import read_tasks

TASKS = SHARED / "data/hellaswag/hellaswag_val_first200.jsonl"

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


def text(row: Row) -> tuple[str, str]:
    return decode(row.context), decode(row.continuation)


def test_the_harness_sees_cleaned_text_and_a_capital() -> None:
    asked = Task.of(ROW).harness()
    # " [title]" ends a sentence; other markup goes, and one of two spaces where two are left.
    query = "Baking a cake: How to bake. Mix the flour. The cook then"
    assert [text(row) for row, _ in asked] == [
        (query, " eats it raw"),
        (query, " bakes it."),
        (query, " sings – naïvely"),
        (query, " sits"),
    ]
    assert [length for _, length in asked] == [11, 9, 15, 4]  # characters, not bytes


def test_a_query_that_ends_in_markup_leaves_its_space_to_the_ending() -> None:
    row, length = Task.of({**ROW, "ctx_b": "the cook [step]"}).harness()[1]
    assert text(row) == ("Baking a cake: How to bake. Mix the flour. The cook", "  bakes it.")
    assert length == 9


def test_a_completion_is_the_text_as_it_stands() -> None:
    asked = Task.of(ROW).completion()
    assert [text(row) for row in asked] == [(ROW["ctx"], f" {e}") for e in ROW["endings"]]


def test_rows_without_the_two_parts_have_one_context() -> None:
    row = {key: value for key, value in ROW.items() if key not in ("ctx_a", "ctx_b")}
    query = "Baking a cake: How to bake. Mix the flour. the Cook then"
    assert text(Task.of(row).harness()[0][0])[0] == query


def test_answers_are_by_likelihood_by_character_and_by_token(gpt: GPT) -> None:
    tasks = [Task.of(ROW), Task.of({**ROW, "endings": ["a", "a b c d e f g", "b", "c a"]})]
    for task, answer in zip(tasks, hellaswag.answer(gpt, tasks), strict=True):
        harness = scores(gpt, [row for row, _ in task.harness()])
        likely = [score.log_likelihood for score in harness]
        assert answer.acc == likely.index(max(likely))
        a_character = [p / n for p, (_, n) in zip(likely, task.harness(), strict=True)]
        assert answer.acc_norm == a_character.index(max(a_character))
        completion = scores(gpt, task.completion())
        means = [-score.log_likelihood / score.tokens for score in completion]
        assert answer.acc_completion == means.index(min(means))
        assert answer.label == 1
    assert len({answer.acc for answer in hellaswag.answer(gpt, tasks)}) == 2  # not one for all


def test_measures_are_the_parts_answered_right() -> None:
    answers = [Answers(0, 1, 2, label=0), Answers(1, 1, 2, label=1), Answers(2, 3, 2, label=2)]
    assert hellaswag.measures(answers) == {
        "hellaswag_tasks": 3,
        "hellaswag_acc": 1.0,
        "hellaswag_acc_norm": pytest.approx(1 / 3),
        "hellaswag_acc_completion": pytest.approx(1 / 3),
    }


@pytest.mark.skipif(not TASKS.exists(), reason="no shared data here")
def test_real_tasks_are_answered_alike_in_any_batch(gpt: GPT) -> None:
    tasks = read_tasks("evaluate.hellaswag", str(TASKS), hellaswag.HUB, Task.of)
    assert len(tasks) == 200
    some = tasks[::20]
    one = hellaswag.answer(gpt, some, size=1)
    assert one == hellaswag.answer(gpt, some, size=16) == hellaswag.answer(gpt, some)
    assert len({answer.acc for answer in one}) > 1


def test_lambada_asks_for_the_last_word(gpt: GPT) -> None:
    row = lambada.task({"text": "Under the wide sky he saw a nightingale"})
    assert text(row) == ("Under the wide sky he saw a", " nightingale")
    right = Row(row.context, (int(gpt(torch.tensor([row.context]))[0, -1].argmax()),))
    found = lambada.measure(gpt, [row, right])
    assert found["lambada_tasks"] == 2
    assert found["lambada_acc"] == 0.5
    likely = sum(score.log_likelihood for score in scores(gpt, [row, right]))
    assert found["lambada_perplexity"] == pytest.approx(math.exp(-likely / 2))
    with pytest.raises(ValueError, match="last word"):
        lambada.task({"text": "nightingale"})


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_path_may_be_of_the_main_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "own.jsonl", [ROW])
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # as in an experiment's workspace
    assert len(read_tasks("evaluate.hellaswag", "own.jsonl", hellaswag.HUB, Task.of)) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROW, {**ROW, "label": "4"}], "row 2 is no task.*label 4"),
        ([{**ROW, "label": ""}], "row 1 is no task"),
        ([{key: value for key, value in ROW.items() if key != "ctx"}], "row 1 .*no 'ctx'"),
        ([{**ROW, "endings": ["a", "[b]"]}], "row 1 is no task"),
        ([], "holds no tasks"),
        ([3], "not JSON lines"),
    ],
)
def test_what_is_no_task_is_named(tmp_path: Path, rows: list[Any], said: str) -> None:
    path = write_lines(tmp_path / "tasks.jsonl", rows)
    with pytest.raises(UserError, match=rf"evaluate\.hellaswag: .*tasks\.jsonl: {said}"):
        read_tasks("evaluate.hellaswag", path, hellaswag.HUB, Task.of)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.lambada: nowhere\.jsonl: No such file.*hub"):
        read_tasks("evaluate.lambada", "nowhere.jsonl", lambada.HUB, lambada.task)


def test_an_unreachable_hub_is_named_with_a_way_round(tmp_path: Path) -> None:
    code = (
        "from pipeline import stage\n"
        "from train import hellaswag\n"
        "stage.run(lambda: hellaswag.read('evaluate.hellaswag', 'hub'))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: params.yaml: evaluate.hellaswag: hub: Rowan/hellaswag cannot")
    assert "jsonl" in last
