"""Texts sampled from the trained model and its initial weights, for `artifacts/samples.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from model import GPT
from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError, printable
from train.checkpoint import init_from
from train.checkpoint.start import Start
from train.params import EvaluateParams


def sample(gpt: GPT, params: EvaluateParams) -> list[tuple[str, str]]:
    """Return pairs of a prompt and its sampled continuation, `samples` per prompt."""
    return continue_texts(
        gpt, [prompt for prompt in params.prompts for _ in range(params.samples)], params
    )


def before_and_after(
    gpt: GPT, trained: Mapping[str, Any], params: EvaluateParams
) -> dict[str, tuple[str, str]]:
    """Continue the last prompt by the initial and by the trained weights, at the same random draws.

    Args:
        gpt: The trained model.
        trained: Section `train` of the run: where it started from.

    Returns:
        Heading -> (prompt, continuation); empty if there are no samples, or no initial weights
        any more.
    """
    if not params.prompts or not params.samples:
        return {}
    start = Start.parse(trained.get("init", "scratch"), trained.get("init_with", "weights"))
    initial = GPT.initialised(gpt.config, seed=trained["seed"], device=gpt.wte.weight.device)
    try:
        if start:
            initial.load_state_dict(init_from.load(start, gpt.config)[0])
    except UserError as error:
        print(f"note: no sample from before training: {error}")
        return {}
    models = {"Before training": initial, "After training": gpt}
    prompt = params.prompts[-1:]
    return {name: continue_texts(model, prompt, params)[0] for name, model in models.items()}


@torch.no_grad()
def continue_texts(
    gpt: GPT, prompts: Sequence[str], params: EvaluateParams
) -> list[tuple[str, str]]:
    """Return pairs of a prompt and its continuation, sampled as the parameters say."""
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
    texts: list[tuple[str, str]],
    both: Mapping[str, tuple[str, str]],
    val_loss: float,
    params: EvaluateParams,
) -> str:
    """Format the samples as a Markdown page, with control characters escaped.

    Args:
        texts: Prompts and continuations.
        both: Those of `before_and_after`, by heading.
        val_loss: Of the trained model, nats.
    """
    lines = [
        "# Samples",
        "",
        f"Validation loss {val_loss:.4f} nats per token. "
        f"Temperature {params.temperature}, top-k {params.top_k}, "
        f"up to {params.sample_tokens} tokens. "
        "The prompt is in bold; without one, the sample starts a document.",
    ]
    numbered = {str(number): text for number, text in enumerate(texts, 1)}
    for heading, (prompt, text) in {**numbered, **both}.items():
        lines += ["", f"## {heading}", ""]
        body = (f"**{prompt.strip()}**" if prompt.strip() else "") + text
        lines += [f"> {printable(line)}".rstrip() for line in body.strip().split("\n")]
    return "\n".join(lines) + "\n"
