"""HellaSwag (Zellers et al. 2019): choose the right one of four endings of a text.

Two scoring styles are in use, whose results differ by percentage points; both are here.

    harness      "Activity: Context" + " " + ending, without WikiHow markup; takes the ending of
                 highest likelihood (`acc`), or of highest likelihood per character (`acc_norm`)
                 [EleutherAI/lm-evaluation-harness, lm_eval/tasks/hellaswag]
    completion   context + " " + ending, unchanged; takes the ending of lowest mean loss per token
                 (`acc_completion`) [karpathy/build-nanogpt, hellaswag.py; karpathy/llm.c]

OpenAI's GPT-2 124M scores 0.289, 0.311 and 0.296 on the 10,042 validation tasks.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model import GPT
from pipeline.format import tokenizer
from train.distributed.world import World
from train.evals.likelihood import Request, Score, score_requests
from train.evals.task_files import read_tasks, text
from train.numerics import Dtype

HUB = ("Rowan/hellaswag", None, "validation")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text and its possible endings.

    Attributes:
        activity: Topic of the text.
        context_harness: The text as the harness builds it, with its unfinished last sentence
            capitalised.
        label: Index of the right ending.
    """

    activity: str
    context: str
    context_harness: str
    endings: tuple[str, ...]
    label: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Task:
        """Build a task from a row of the data set.

        The harness joins ``ctx_a`` and ``ctx_b``, the two parts of the text; for rows without them,
        ``ctx`` is used.

        Raises:
            KeyError, TypeError, ValueError: The row is not from HellaSwag.
        """
        context = harness = text(row, "ctx")
        if "ctx_a" in row and "ctx_b" in row:
            harness = f"{text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
        if not context:
            raise ValueError("ctx is empty")
        endings, label = row["endings"], row["label"]
        texts = isinstance(endings, list) and all(isinstance(ending, str) for ending in endings)
        if not (texts and all(map(_clean, endings))):
            raise ValueError(f"endings {reprlib.repr(endings)}")
        if not (isinstance(label, (str, int)) and 0 <= int(label) < len(endings)):
            raise ValueError(f"{len(endings)} endings, label {reprlib.repr(label)}")
        return cls(
            activity=text(row, "activity_label"),
            context=context,
            context_harness=harness,
            endings=tuple(endings),
            label=int(label),
        )

    def harness_requests(self) -> list[tuple[Request, int]]:
        """Return a request per ending in harness style, and the ending's length in characters."""
        query = _clean(f"{self.activity}: {self.context_harness}")
        choices = [_clean(ending) for ending in self.endings]
        return [(Request.from_text(query, f" {choice}"), len(choice)) for choice in choices]

    def completion_requests(self) -> list[Request]:
        """Return a request per ending in completion style: context and ending encoded apart."""
        context = tuple(tokenizer.encode(self.context))
        return [Request(context, tuple(tokenizer.encode(f" {e}"))) for e in self.endings]


def _clean(text: str) -> str:
    """Remove the markup of WikiHow with the steps of the harness, in its order."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read(name: str, source: str) -> list[Task]:
    """Read the tasks of a source; for arguments and errors see ``task_files.read_tasks``."""
    return read_tasks(name, source, HUB, Task.from_row)


@dataclass(frozen=True)
class Prediction:
    """Index of the ending chosen by each metric, and that of the right ending."""

    acc: int
    acc_norm: int
    acc_completion: int
    label: int


def predict(
    gpt: GPT, tasks: list[Task], world: World | None = None, batch_size: int | None = None
) -> list[Prediction]:
    """Return a prediction per task; for the arguments see ``likelihood.score_requests``."""
    harness = [task.harness_requests() for task in tasks]
    completion = [task.completion_requests() for task in tasks]
    requests = [request for choices in harness for request, _ in choices]
    requests += [request for choices in completion for request in choices]
    results = iter(score_requests(gpt, requests, world, batch_size))

    def take(choices: list[Any]) -> list[Score]:
        return [next(results) for _ in choices]

    totals = [[score.log_likelihood for score in take(choices)] for choices in harness]
    completed = [_lowest_loss(take(choices)) for choices in completion]
    return [
        Prediction(
            acc=int(np.argmax(total)),
            acc_norm=int(np.argmax(np.array(total) / [length for _, length in choices])),
            acc_completion=index,
            label=task.label,
        )
        for task, choices, total, index in zip(tasks, harness, totals, completed, strict=True)
    ]


def _lowest_loss(scores: list[Score]) -> int:
    """Return the index of the lowest mean loss per token."""
    return int(np.argmax([score.log_likelihood / score.tokens for score in scores]))


def metrics(predictions: list[Prediction]) -> dict[str, float]:
    """Return the number of tasks and the accuracies."""
    n = len(predictions)
    return {
        "hellaswag_tasks": n,
        "hellaswag_acc": sum(p.acc == p.label for p in predictions) / n,
        "hellaswag_acc_norm": sum(p.acc_norm == p.label for p in predictions) / n,
        "hellaswag_acc_completion": sum(p.acc_completion == p.label for p in predictions) / n,
    }


def completion_accuracy(
    gpt: GPT,
    tasks: list[Task],
    world: World | None = None,
    batch_size: int | None = None,
    *,
    dtype: Dtype,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Return `acc_completion` alone, for use during training.

    In bfloat16 a few tasks may be answered differently than in float32. For the arguments see
    ``likelihood.score_requests``.
    """
    choices = [task.completion_requests() for task in tasks]
    requests = [request for choice in choices for request in choice]
    results = iter(score_requests(gpt, requests, world, batch_size, dtype=dtype, check=check))
    answers = [_lowest_loss([next(results) for _ in choice]) for choice in choices]
    right = sum(answer == task.label for answer, task in zip(answers, tasks, strict=True))
    return right / len(tasks)
