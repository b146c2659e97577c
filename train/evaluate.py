"""`python -m train.evaluate`: what the trained model is worth, in numbers and in text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from model import GPT
from model.errors import FormatError
from pipeline import TokenStream, atomic, stage, tokenizer
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.params import Section, load_section
from train import arithmetic
from train.distributed import device_type
from train.run import CHECKPOINT, TOKENS
from train.validation import check_split, mean_loss

METRICS = Path("metrics/eval.json")
SAMPLES = Path("artifacts/samples.md")

BATCH_TOKENS = 8192  # computed at a time
BLOCK = 2**24  # tokens counted at a time


class EvaluateParams(Section):
    """`evaluate`: how a trained model is measured and shown."""

    val_tokens: int = Field(ge=1)
    """Tokens measured: the first so many of the validation split."""

    prompts: tuple[str, ...] = Field(default=("",), strict=False)  # YAML has lists only
    """Text to continue; the empty text is the beginning of a document."""

    samples: int = Field(default=2, ge=0)
    """Samples a prompt (0 or more)."""

    sample_tokens: int = Field(default=128, ge=1)
    """New tokens a sample (at least 1)."""

    temperature: float = Field(default=0.8, ge=0)
    """0: always the likeliest token; 1: the model's own distribution; above: flatter."""

    top_k: int | None = Field(default=50, ge=1)
    """Sample among the so many likeliest tokens (at least 1); null: among all."""

    seed: int = Field(default=1337, ge=0, lt=2**32)
    """Of the samples (0 to 2^32 - 1)."""


def main() -> None:
    """Measures `artifacts/checkpoint` on the validation split and samples from it."""
    params = load_section("evaluate", EvaluateParams)
    device = torch.device(device_type(Machine.load().device))
    train_data, val_data = TokenStream(TOKENS, "train"), TokenStream(TOKENS, "val")
    check_split("evaluate.val_tokens", val_data, params.val_tokens)
    try:
        gpt = GPT.from_checkpoint(CHECKPOINT).to(device)
    except FormatError as error:
        raise UserError(f"{error}; run python -m train.launch") from None

    arithmetic.configure(device, deterministic=False)
    state = json.loads((CHECKPOINT / "state.json").read_bytes())
    block_size = gpt.config.block_size
    loss = mean_loss(
        gpt,
        val_data,
        params.val_tokens,
        block_size=block_size,
        rows=max(1, BATCH_TOKENS // block_size),
        dtype=state["train"]["dtype"],  # as it was validated while it trained
        device=device,
    )
    metrics = {
        "val_tokens": params.val_tokens,
        **describe(loss, target_bytes(val_data, params.val_tokens), unigram_entropy(train_data)),
    }
    texts = sample(gpt, params)
    atomic.write_json(METRICS, metrics)
    atomic.write_bytes(SAMPLES, as_markdown(texts, metrics, params).encode())
    print(
        f"val loss {metrics['val_loss']:.4f} nats a token over {params.val_tokens:,} tokens, "
        f"perplexity {metrics['perplexity']:.2f}, {metrics['bits_per_byte']:.4f} bits a byte, "
        f"{metrics['below_unigram']:.4f} below the unigram entropy of "
        f"{metrics['unigram_entropy']:.4f}; {METRICS}, {SAMPLES}"
    )


def describe(loss: float, n_bytes: float, entropy: float) -> dict[str, float]:
    """The measures that follow from a loss.

    Args:
        loss: Mean over the targets, nats.
        n_bytes: Bytes of text a target stands for, on average.
        entropy: Unigram entropy of the training tokens, nats.
    """
    return {
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / n_bytes,
        "unigram_entropy": entropy,
        "below_unigram": entropy - loss,
    }


def target_bytes(stream: TokenStream, n_targets: int) -> float:
    """Mean length in bytes of the targets 1 ... n of a split; `<|endoftext|>` has none."""
    lengths = tokenizer.token_bytes()
    total = sum(int(lengths[block].sum()) for block in blocks(stream, 1, n_targets + 1))
    return total / n_targets


def unigram_entropy(stream: TokenStream) -> float:
    """Entropy of single tokens, nats: what a model that sees no context could reach."""
    counts = np.zeros(tokenizer.N_VOCAB, dtype=np.int64)
    for block in blocks(stream, 0, len(stream)):
        counts += np.bincount(block, minlength=len(counts))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def blocks(stream: TokenStream, start: int, stop: int) -> Any:
    """The tokens [start, stop) in pieces that fit in memory."""
    for first in range(start, stop, BLOCK):
        yield stream[first : min(first + BLOCK, stop)]


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
    texts: list[tuple[str, str]], metrics: dict[str, Any], params: EvaluateParams
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


if __name__ == "__main__":
    stage.run(main)
