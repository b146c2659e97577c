"""HellaSwag (Zellers et al. 2019): which of four endings follows a text?

Two ways to ask are in use, and their figures differ by points; both are here.

    harness      "Activity: Context" + " " + ending, the markup of WikiHow removed; the ending with
                 the highest likelihood is the answer (`acc`), or the highest per character
                 (`acc_norm`). So EleutherAI's lm-evaluation-harness, lm_eval/tasks/hellaswag
    completion   context + " " + ending as they stand; the ending with the lowest mean loss per
                 token (`acc_completion`). So karpathy/build-nanogpt, hellaswag.py, and llm.c

GPT-2 124M as OpenAI published it comes to 0.289, 0.311 and 0.296 of the 10,042 validation tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model import GPT
from pipeline.format import tokenizer
from train.distributed.world import World
from train.evals.likelihood import Row, Score, scores
from train.evals.task_files import read_tasks
from train.numerics import Dtype

HUB = ("Rowan/hellaswag", None, "validation")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text and its endings.

    Attributes:
        activity: What it is about.
        context: The text.
        context_harness: The same as the harness has it, its last, unfinished sentence capitalised.
        endings: Of which one is right.
        label: The number of the right one.
    """

    activity: str
    context: str
    context_harness: str
    endings: tuple[str, ...]
    label: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Task:
        """A task from a row of the data set.

        A row may lack ``ctx_a`` and ``ctx_b``, its text in two parts; the harness then has ``ctx``.

        Raises:
            KeyError, TypeError, ValueError: The row is none of HellaSwag.
        """
        context, harness = str(row["ctx"]), str(row["ctx"])
        if "ctx_a" in row and "ctx_b" in row:
            harness = f"{row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        endings, label = tuple(map(str, row["endings"])), int(row["label"])
        if not (all(map(_cleaned, endings)) and 0 <= label < len(endings)):
            raise ValueError(f"{len(endings)} endings, label {label}")
        return cls(
            activity=str(row["activity_label"]),
            context=context,
            context_harness=harness,
            endings=endings,
            label=label,
        )

    def harness(self) -> list[tuple[Row, int]]:
        """Each ending's row as the harness asks, and the ending's length in characters."""
        query = _cleaned(f"{self.activity}: {self.context_harness}")
        choices = [_cleaned(ending) for ending in self.endings]
        return [(Row.of(query, f" {choice}"), len(choice)) for choice in choices]

    def completion(self) -> list[Row]:
        """Each ending's row as a plain continuation: the two are encoded apart."""
        context = tuple(tokenizer.encode(self.context))
        return [Row(context, tuple(tokenizer.encode(f" {ending}"))) for ending in self.endings]


def _cleaned(text: str) -> str:
    """The harness's text without the markup of WikiHow, step by step as it goes there."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read(name: str, source: str) -> list[Task]:
    """The tasks of a source, `hub` or a .jsonl file.

    Args:
        name: Of the parameter that asks, for messages.
        source: As in ``benchmarks.read_tasks``.

    Raises:
        UserError: They cannot be had, or are none.
    """
    return read_tasks(name, source, HUB, Task.of)


@dataclass(frozen=True)
class Answers:
    """What a model answered to one task, by each way of asking, and the right answer."""

    acc: int
    acc_norm: int
    acc_completion: int
    label: int


def answer(
    gpt: GPT, tasks: list[Task], world: World | None = None, size: int | None = None
) -> list[Answers]:
    """A model's answers, task by task; the arguments are those of ``likelihood.scores``."""
    harness = [task.harness() for task in tasks]
    completion = [task.completion() for task in tasks]
    rows = [row for choices in harness for row, _ in choices]
    rows += [row for choices in completion for row in choices]
    results = iter(scores(gpt, rows, world, size))

    def take(choices: list[Any]) -> list[Score]:
        return [next(results) for _ in choices]

    likely = [[score.log_likelihood for score in take(choices)] for choices in harness]
    means = [[s.log_likelihood / s.tokens for s in take(choices)] for choices in completion]
    return [
        Answers(
            acc=int(np.argmax(totals)),
            acc_norm=int(np.argmax(np.array(totals) / [length for _, length in choices])),
            acc_completion=int(np.argmax(mean)),
            label=task.label,
        )
        for task, choices, totals, mean in zip(tasks, harness, likely, means, strict=True)
    ]


def measures(answers: list[Answers]) -> dict[str, float]:
    """The parts of the tasks that were answered right."""
    n = len(answers)
    return {
        "hellaswag_tasks": n,
        "hellaswag_acc": sum(a.acc == a.label for a in answers) / n,
        "hellaswag_acc_norm": sum(a.acc_norm == a.label for a in answers) / n,
        "hellaswag_acc_completion": sum(a.acc_completion == a.label for a in answers) / n,
    }


def completion_accuracy(
    gpt: GPT,
    tasks: list[Task],
    world: World | None = None,
    size: int | None = None,
    *,
    dtype: Dtype,
    check: Callable[[], None] = lambda: None,
) -> float:
    """`acc_completion` alone, for a look during training; arguments as of ``likelihood.scores``.

    In bfloat16 it may differ by some tasks from what float32 gives.
    """
    choices = [task.completion() for task in tasks]
    rows = [row for choice in choices for row in choice]
    results = iter(scores(gpt, rows, world, size, dtype=dtype, check=check))
    right = 0
    for task, choice in zip(tasks, choices, strict=True):
        means = [s.log_likelihood / s.tokens for s in (next(results) for _ in choice)]
        right += int(np.argmax(means)) == task.label
    return right / len(tasks)
