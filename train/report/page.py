"""`python -m train.report`: one self-contained page of a run, `artifacts/report.html`.

With `--compare REV...` a page that holds several experiments beside each other (compare.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model import GPT, GPTConfig
from model.errors import FormatError
from model.size import flops_per_token
from pipeline import Manifest, TokenStream
from pipeline.format import tokenizer
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import PARAMS, read_yaml
from train.report import html, model_probe, run_charts
from train.report.run_charts import METRICS
from train.report.run_log import Log

OUT = Path("artifacts/report.html")
CHECKPOINT = Path("artifacts/checkpoint")
LOG = Path("artifacts/log.jsonl")
SAMPLES = Path("artifacts/samples.md")
TOKENS = Path("data/tokens")

ACTIVATION_TOKENS = 2048  # of the validation split, looked at inside the model
PROMPTS = 2  # of the evaluation's, read token by token
SAMPLE_PROMPT = 16  # tokens of a sample in the log that were given (trainer.py)

MEASURES = {
    "val_loss": ("validation loss", "nats a token, mean over the first {val_tokens} tokens"),
    "val_shards_loss": ("loss on the published split", "nats a token, on evaluate.val_shards"),
    "perplexity": ("perplexity", "e to the loss: as unsure as among so many equal tokens"),
    "bits_per_byte": ("bits a byte", "of text: independent of the tokenizer"),
    "unigram_entropy": ("unigram entropy", "nats a token: the loss of a model without context"),
    "below_unigram": ("below the unigram entropy", "nats a token that context is worth"),
    "above_reference": ("above the published run", "nats a token, at the last step it has"),
    "hellaswag_acc": ("HellaSwag acc", "ending of the highest likelihood; chance: 0.25"),
    "hellaswag_acc_norm": ("HellaSwag acc_norm", "per byte; GPT-2 124M as published: 0.311"),
    "hellaswag_acc_completion": ("HellaSwag, completion", "per token; GPT-2 124M: 0.2955"),
    "lambada_acc": ("LAMBADA accuracy", "last word of a passage, greedily"),
    "lambada_perplexity": ("LAMBADA perplexity", "of that word"),
}
"""Name and meaning of what `metrics/eval.json` may hold."""

DATA = {
    "documents": "documents",
    "tokens": "tokens",
    "train_tokens": "of them to train on",
    "val_tokens": "of them held out",
    "text_bytes": "bytes of text",
    "bytes_per_token": "bytes a token",
    "tokens_per_document": "tokens a document, on average",
    "shortest_document": "tokens of the shortest document",
    "longest_document": "tokens of the longest",
    "duplicate_documents": "documents that repeat another",
    "val_documents_in_train": "held-out documents that are trained on",
    "skipped": "documents left out",
    "shards": "shards",
    "gigatoken_share": "share of the text encoded by gigatoken",
    "tiktoken_share": "share encoded by tiktoken",
    "engine_differences": "documents on which the two differ",
    "token_count_agreement": "agreement with the source's own counts",
}
"""Names of what `metrics/data.json` may hold."""


def render() -> str:
    """The page of the run whose metrics, log, samples and checkpoint lie here.

    Raises:
        UserError: one of them is missing.
    """
    data, train, evaluation = (_json(METRICS / f"{n}.json") for n in ("data", "train", "eval"))
    state, log = _json(CHECKPOINT / "state.json"), Log.parse(_read(LOG))
    manifest, params = Manifest.load(TOKENS), read_yaml(PARAMS)
    try:
        gpt = GPT.from_checkpoint(CHECKPOINT)
    except FormatError as error:
        raise UserError(f"{error}; `dvc repro` makes it") from None
    text = some_text(gpt.config.block_size)
    return html.page(
        "report.html",
        state=state,
        train=train,
        evaluation=evaluation,
        evaluate=params["evaluate"],
        manifest=manifest,
        where=where(train),
        tiles=tiles(train, evaluation),
        verdict=verdict(evaluation),
        loss_charts=[run_charts.loss_chart(log, evaluation, wide=wide) for wide in (True, False)],
        training_charts=run_charts.training_charts(log),
        incidents=log.incidents(),
        measures=measures(evaluation),
        progress=progress(log),
        samples=read_samples(_read(SAMPLES)),
        data_facts=data_facts(data),
        data_charts=run_charts.data_charts(),
        inside_charts=run_charts.inside_charts(gpt, text),
        activation_tokens=text.size,
        readings=readings(gpt, params["evaluate"]["prompts"]),
        time=time_facts(train, state),
        cost=cost_facts(train, state, gpt.config),
        identity=[
            ("commit", train.get("commit") or "not recorded"),
            ("run", state["run_key"]),
            ("data", manifest.dataset_key),
            ("code of the training", state["code_key"]),
            ("source", f"{manifest.source.source.repo} at {manifest.source.source.revision}"),
        ],
        machine=[
            *((name.replace("_", " "), value) for name, value in state["arithmetic"].items()),
            *([("device name", train["device"])] if train["device"] != "cpu" else []),
            ("dtype of the products", train["dtype"]),
        ],
        versions=sorted(state["versions"].items()),
        params=_read(PARAMS),
    )


def where(train: Mapping[str, Any]) -> str:
    """What the run ran on, to read."""
    n, device = train["world_size"], train["device"]
    if device != "cpu":
        return f"on {n} × {device}"
    return f"by {n} processes on a CPU" if n > 1 else "on a CPU"


def tiles(train: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, what it is) of the figures that one looks for first."""
    below = evaluation["below_unigram"]
    if "hellaswag_acc_norm" in evaluation:
        third = (f"{evaluation['hellaswag_acc_norm']:.4f}", "HellaSwag, acc_norm")
    else:
        side = "below" if below >= 0 else "above"
        third = (html.figure(abs(below)), f"nats {side} the unigram entropy")
    return [
        (f"{evaluation['val_loss']:.4f}", "validation loss, nats a token"),
        (html.figure(evaluation["perplexity"]), "perplexity"),
        (f"{evaluation['bits_per_byte']:.3f}", "bits a byte"),
        third,
        (html.figure(train["tokens_per_second"]), "tokens a second"),
        (html.duration(train["seconds"]), "of training"),
    ]


def verdict(evaluation: Mapping[str, Any]) -> str | None:
    """What the published curve says of the run; None where it says nothing (reference.py)."""
    said = str(evaluation.get("reference", ""))
    return said if said and not said.startswith("does not apply") else None


def measures(evaluation: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, value, meaning) of what was measured."""
    known = {key: html.figure(value) for key, value in evaluation.items()}
    return [
        (name, evaluation[key], meaning.format_map(known))
        for key, (name, meaning) in MEASURES.items()
        if key in evaluation
    ]


def data_facts(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, value) of what is known of the data."""
    shares = ("_share", "_agreement")
    return [
        (name, html.percent(data[key]) if key.endswith(shares) else data[key])
        for key, name in DATA.items()
        if key in data
    ]


def time_facts(train: Mapping[str, Any], state: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """How long it took."""
    worker = "GPU" if state["arithmetic"]["device"] == "cuda" else "process"
    return [
        ("steps", state["step"]),
        ("training, without validation and saving", html.duration(train["seconds"])),
        ("seconds a step", train["seconds"] / state["step"]),
        ("tokens a second", train["tokens_per_second"]),
        (f"{worker}-hours", train["seconds"] * train["world_size"] / 3600),
    ]


def cost_facts(
    train: Mapping[str, Any], state: Mapping[str, Any], config: GPTConfig
) -> list[tuple[str, Any]]:
    """What it took."""
    flops = flops_per_token(config, config.block_size) * state["tokens"]
    facts = [
        ("operations", html.size(flops, "FLOP")),
        ("operations a second", html.size(flops / train["seconds"], "FLOP/s")),
        ("most memory of the first process", html.size(train["peak_memory_bytes"])),
        ("weights", html.size((CHECKPOINT / "model.safetensors").stat().st_size)),
    ]
    if "mfu" in train:
        facts.insert(2, ("of what the devices can do (MFU)", html.percent(train["mfu"])))
    return facts


def progress(log: Log) -> list[tuple[int, str, str]]:
    """(step, prompt, continuation) of up to 8 samples, the first and the last among them."""
    samples = log.samples()
    most = min(8, len(samples))
    chosen = sorted({round(i * (len(samples) - 1) / max(1, most - 1)) for i in range(most)})
    return [
        (step, _text(tokens[:SAMPLE_PROMPT]), _text(tokens[SAMPLE_PROMPT:]))
        for step, tokens in (samples[i] for i in chosen)
    ]


def _text(tokens: list[int]) -> str:
    return tokenizer.decode([token for token in tokens if token != tokenizer.EOT])


def read_samples(text: str) -> list[tuple[str, str]]:
    """(prompt, continuation) of the quoted texts of the samples' page."""
    quoted: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("## "):
            quoted.append([])
        elif line.startswith(">") and quoted:
            quoted[-1].append(line[2:])
    samples = []
    for body in map("\n".join, quoted):
        prompt, _, rest = body[2:].partition("**") if body.startswith("**") else ("", "", body)
        samples.append((prompt, rest))
    return samples


def some_text(block_size: int) -> np.ndarray:
    """(B, T) tokens of the validation split, to look inside the model with."""
    tokens = TokenStream(TOKENS, "val")[: max(ACTIVATION_TOKENS, block_size)]
    rows = max(1, len(tokens) // block_size)
    return tokens[: rows * block_size].reshape(rows, -1)


def readings(gpt: GPT, prompts: list[str]) -> list[tuple[list[dict[str, Any]], Any]]:
    """The first prompts token by token, with what is expected after them."""
    if gpt.config.vocab_size != tokenizer.N_VOCAB:
        return []  # its tokens are no text of ours
    read = []
    for prompt in [prompt for prompt in prompts if prompt][:PROMPTS] or [""]:
        tokens, likeliest = model_probe.read_text(gpt, prompt)
        shaded = [
            {
                "text": token.text,
                "probability": token.probability,
                "likeliest": token.likeliest,
                "shade": round(70 * token.probability**0.5),
            }
            for token in tokens
        ]
        read.append((shaded, likeliest))
    return read


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `dvc repro` makes it") from None


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_read(path))
    return value
