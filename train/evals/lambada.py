"""LAMBADA (Paperno et al. 2016): predict the last word of a passage.

Scored as in EleutherAI's lm-evaluation-harness (lm_eval/tasks/lambada): the text before its last
space is the context, and the last word is right if each of its tokens is the most likely one.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from model import GPT
from train.distributed.world import World
from train.evals.likelihood import Request, Score, score_requests
from train.evals.task_files import read_tasks, text

HUB = ("EleutherAI/lambada_openai", "default", "test")


def request(row: Mapping[str, Any]) -> Request:
    """Build a request for the last word of a row's ``text``.

    Raises:
        KeyError, TypeError, ValueError: The row has no ``text`` of several words.
    """
    context, space, word = text(row, "text").rpartition(" ")
    if not (context.strip() and word):
        raise ValueError(f"text {reprlib.repr(row['text'])} has no last word")
    return Request.from_text(context, space + word)


def read(name: str, source: str) -> list[Request]:
    """Read the tasks of a source; for arguments and errors see ``task_files.read_tasks``."""
    return read_tasks(name, source, HUB, request)


def evaluate(
    gpt: GPT,
    tasks: list[Request],
    world: World | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Score the tasks and return their `metrics`; for the arguments see ``score_requests``."""
    return metrics(score_requests(gpt, tasks, world, batch_size))


def metrics(scores: list[Score]) -> dict[str, float]:
    """Return the number of tasks, accuracy and last-word perplexity."""
    n = len(scores)
    return {
        "lambada_tasks": n,
        "lambada_acc": sum(score.greedy for score in scores) / n,
        "lambada_perplexity": math.exp(-sum(score.log_likelihood for score in scores) / n),
    }
