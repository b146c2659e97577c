"""Text that a model writes: prompts continued, and a page of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from model import GPT
from pipeline import tokenizer

if TYPE_CHECKING:
    from train.evaluate import EvaluateParams


@torch.no_grad()
def sample(gpt: GPT, params: EvaluateParams) -> list[tuple[str, str]]:
    """(prompt, what the model added to it), as many as the parameters ask for."""
    prompts = [prompt for prompt in params.prompts for _ in range(params.samples)]
    rows = [[tokenizer.EOT, *tokenizer.encode(prompt)] for prompt in prompts]
    if not rows:
        return []
    texts = gpt.generate(
        rows,
        params.sample_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        seed=params.seed,
    )
    return [
        (prompt, tokenizer.decode([token for token in text[len(row) :] if token != tokenizer.EOT]))
        for prompt, row, text in zip(prompts, rows, texts, strict=True)
    ]


def as_markdown(
    texts: list[tuple[str, str]], metrics: Mapping[str, Any], params: EvaluateParams
) -> str:
    """The samples as a page to read."""
    lines = [
        "# Samples",
        "",
        f"Validation loss {metrics['val_loss']:.4f} nats a token. "
        f"Temperature {params.temperature}, top-k {params.top_k}, "
        f"up to {params.sample_tokens} tokens. "
        "The prompt is in bold; without one, a document begins.",
    ]
    for number, (prompt, text) in enumerate(texts, 1):
        lines += ["", f"## {number}", ""]
        body = (f"**{prompt.strip()}**" if prompt.strip() else "") + text
        lines += [f"> {line}".rstrip() for line in body.strip().splitlines()]
    return "\n".join(lines) + "\n"
