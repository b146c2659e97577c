"""LAMBADA (Paperno et al. 2016): which word ends a passage?

Asked as EleutherAI's lm-evaluation-harness does (lm_eval/tasks/lambada): the text up to its last
space is the context; right is a last word each of whose tokens is the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model import GPT
from train.distributed.world import World
from train.evals.likelihood import Row, scores

HUB = ("EleutherAI/lambada_openai", "default", "test")


def task(row: Mapping[str, Any]) -> Row:
    """The passage without its last word, and that word.

    Raises:
        KeyError, ValueError: The row has no ``text`` of several words.
    """
    context, space, word = str(row["text"]).rpartition(" ")
    if not (context.strip() and word):
        raise ValueError(f"text {row['text']!r} has no last word")
    return Row.of(context, space + word)


def measure(
    gpt: GPT, tasks: list[Row], world: World | None = None, size: int | None = None
) -> dict[str, float]:
    """Accuracy, and the perplexity of the last word; arguments as of ``likelihood.scores``."""
    results = scores(gpt, tasks, world, size)
    n = len(results)
    return {
        "lambada_tasks": n,
        "lambada_acc": sum(score.greedy for score in results) / n,
        "lambada_perplexity": math.exp(-sum(score.log_likelihood for score in results) / n),
    }
