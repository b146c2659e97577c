"""HellaSwag and LAMBADA as EleutherAI's lm-evaluation-harness scores them, task by task.

The judge is transcribed from lm_eval 0.4.13 (`TemplateLM._encode_pair`,
`HFLM._loglikelihood_tokens`, `ConfigurableTask.process_results`, tasks/hellaswag, tasks/lambada),
and computes with `transformers` on the exported model and its exported tokenizer, one request at a
time. The model has learnt the right texts by heart: it answers many tasks right, and not by chance.

tests/benchmarks/harness.py runs the harness itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, checkpoint, export
from tests.support.memorised import memorise
from tests.support.repo import SHARED
from train.evals import hellaswag, lambada
from train.evals.likelihood import score_requests

TASKS = SHARED / "data/hellaswag/hellaswag_val_first200.jsonl"

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not TASKS.exists(), reason=f"needs {TASKS}"),
]
transformers = pytest.importorskip("transformers", reason="needs transformers as the judge")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TASKS.read_text().splitlines()]


@pytest.fixture(scope="module")
def passages(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Passages in LAMBADA's form, from the right texts."""
    return [{"text": f"{row['ctx']} {row['endings'][int(row['label'])]}"} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gpt(rows: list[dict[str, Any]], passages: list[dict[str, str]]) -> GPT:
    right = [f"{row['activity_label']}: {p['text']}" for row, p in zip(rows, passages, strict=True)]
    # half of the texts only: a part of the answers is wrong
    return memorise([*right[::2], *(passage["text"] for passage in passages[::2])])


class Judge:
    """The harness's `HFLM` on an exported model."""

    def __init__(self, folder: Path, max_length: int) -> None:
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.max_length = max_length
        self.cut = 0

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return the log-likelihood, and whether greedy decoding gives the continuation."""
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        whole_enc = self.tokenizer.encode(context + continuation)
        context_enc = self.tokenizer.encode(context)
        continuation_enc = whole_enc[len(context_enc) :]
        assert 0 < len(continuation_enc) <= self.max_length
        inp = (context_enc + continuation_enc)[-(self.max_length + 1) :][:-1]
        self.cut += len(context_enc + continuation_enc) > self.max_length + 1
        with torch.no_grad():
            hidden = self.model.transformer(torch.tensor([inp])).last_hidden_state[0]
            logits = self.model.lm_head(hidden[-len(continuation_enc) :])
        log_p = torch.log_softmax(logits, dim=-1)
        target = torch.tensor(continuation_enc)
        total = log_p.gather(1, target[:, None]).sum()
        return float(total), bool((log_p.argmax(1) == target).all())


@pytest.fixture(scope="module")
def judge(gpt: GPT, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("judge")
    checkpoint.write(folder / "checkpoint", gpt.config, gpt.state_dict(), {})
    export.main(["--checkpoint", str(folder / "checkpoint"), "--out", str(folder / "hf")])
    return Judge(folder / "hf", gpt.config.block_size)


def preprocess(text: str) -> str:
    """lm_eval/tasks/hellaswag/utils.py."""
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    text = text.replace("  ", " ")
    return text


def test_all_hellaswag_answers_are_those_of_the_harness(
    gpt: GPT, judge: Judge, rows: list[dict[str, Any]]
) -> None:
    tasks = hellaswag.read("evaluate.hellaswag", str(TASKS))
    predictions = hellaswag.predict(gpt, tasks)
    some = [request for task in tasks[::10] for request, _ in task.harness_requests()]
    ours = dict(zip(some, score_requests(gpt, some), strict=True))
    assert len(rows) == 200
    right = normalised = 0
    for row, task, prediction in zip(rows, tasks, predictions, strict=True):
        query = preprocess(row["activity_label"] + ": " + row["ctx"])
        choices = [preprocess(ending) for ending in row["endings"]]
        lls = [judge.loglikelihood(query, f" {choice}")[0] for choice in choices]
        per_character = [ll / len(choice) for ll, choice in zip(lls, choices, strict=True)]
        for (request, _), ll in zip(task.harness_requests(), lls, strict=True):
            assert request not in ours or abs(ours[request].log_likelihood - ll) < 1e-3
        assert prediction.acc == lls.index(max(lls)), row["ind"]
        assert prediction.acc_norm == per_character.index(max(per_character)), row["ind"]
        right += prediction.acc == int(row["label"])
        normalised += prediction.acc_norm == int(row["label"])
    metrics = hellaswag.metrics(predictions)
    assert metrics["hellaswag_acc"] == right / 200
    assert metrics["hellaswag_acc_norm"] == normalised / 200
    assert 75 <= right < 190  # chance: 50, standard deviation 6
    assert sum(p.acc != p.acc_norm for p in predictions) > 5  # the two differ
    assert judge.cut > 0


def test_all_lambada_answers_are_those_of_the_harness(
    gpt: GPT, judge: Judge, passages: list[dict[str, str]]
) -> None:
    requests = [lambada.request(passage) for passage in passages]
    scores = score_requests(gpt, requests)
    totals, hits = [], 0
    for passage, score in zip(passages, scores, strict=True):
        words = passage["text"].split(" ")  # tasks/lambada/lambada_openai.yaml
        total, greedy = judge.loglikelihood(" ".join(words[:-1]), " " + words[-1])
        assert score.log_likelihood == pytest.approx(total, abs=1e-3)
        assert score.greedy == greedy
        totals.append(total)
        hits += greedy
    metrics = lambada.evaluate(gpt, requests)
    assert metrics["lambada_acc"] == hits / 200
    assert metrics["lambada_perplexity"] == pytest.approx(math.exp(-sum(totals) / 200), rel=1e-4)
    assert 10 <= hits <= 190
