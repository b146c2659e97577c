"""Page about one run, `artifacts/report.html`, from its results, log, samples and checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model import GPT, GPTConfig
from model.errors import FormatError
from model.size import flops_per_token
from pipeline import Manifest, TokenStream
from pipeline.format import tokenizer
from pipeline.format.manifest import NAME, SelectionManifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import PARAMS, load_section
from pipeline.store import atomic
from pipeline.store.store import mark_damaged
from train.data.phases import phases_of
from train.params import EvaluateParams
from train.report import html, model_probe, run_charts
from train.report.run_log import Log, sample_texts

OUT = Path("artifacts/report.html")
DATA = Path("data/statistics.json")
TRAINING = Path("artifacts/training.json")
EVALUATION = Path("artifacts/evaluation.json")
CHECKPOINT = Path("artifacts/checkpoint")
STATE = CHECKPOINT / "state.json"
LOG = Path("artifacts/log.jsonl")
SAMPLES = Path("artifacts/samples.md")
TOKENS = Path("data/tokens")
METRICS = run_charts.METRICS
SELECTION = Path("data/selection")

MADE_BY = {
    DATA: "pipeline.verify",
    TRAINING: "train.launch",
    STATE: "train.launch",
    EVALUATION: "train.evaluate",
    SAMPLES: "train.evaluate",
    **{
        METRICS / f"{name}.csv": "pipeline.verify"
        for name in ("document_lengths", "hosts", "dumps")
    },
    METRICS / "reference.csv": "train.evaluate",
}

ACTIVATION_TOKENS = 2048  # of the validation split, to measure activations
PROMPTS = 2  # of evaluate.prompts, shown token by token

EVALUATION_METRICS = {
    "val_loss": ("validation loss", "nats per token, mean over {val_tokens} tokens"),
    "val_shards_loss": ("loss on the published split", "nats per token, on evaluate.val_shards"),
    "perplexity": ("perplexity", "exp(validation loss)"),
    "bits_per_byte": ("bits per byte", "of text; independent of the tokenizer"),
    "unigram_entropy": ("unigram entropy", "nats per token; best loss of a model without context"),
    "below_unigram": ("below the unigram entropy", "nats per token gained from context"),
    "above_reference": ("above the published run", "nats per token, at the last published step"),
    "hellaswag_acc": ("HellaSwag acc", "ending of the highest likelihood; chance: 0.25"),
    "hellaswag_acc_norm": ("HellaSwag acc_norm", "per byte; published GPT-2 124M: 0.311"),
    "hellaswag_acc_completion": ("HellaSwag, completion", "per token; GPT-2 124M: 0.2955"),
    "hellaswag_clean_acc_norm": ("HellaSwag acc_norm, clean", "of tasks that are not in the text"),
    "lambada_acc": ("LAMBADA accuracy", "last word of a passage, greedy"),
    "lambada_perplexity": ("LAMBADA perplexity", "of the last word"),
    "lambada_clean_acc": ("LAMBADA accuracy, clean", "of tasks that are not in the text"),
}
"""Name and description of each key of `artifacts/evaluation.json` that is shown."""

DATA_METRICS = {
    "documents": "documents",
    "tokens": "tokens",
    "train_tokens": "training tokens",
    "val_tokens": "validation tokens",
    "text_bytes": "bytes of text",
    "bytes_per_token": "bytes per token",
    "tokens_per_document": "tokens per document, mean",
    "shortest_document": "tokens of the shortest document",
    "longest_document": "tokens of the longest document",
    "duplicates": "duplicate documents",
    "val_documents_in_train": "validation documents that are also trained on",
    "skipped": "skipped documents",
    "shards": "shards",
    "gigatoken_share": "text encoded by gigatoken",
    "tiktoken_share": "text encoded by tiktoken",
    "engine_differences": "documents that the two encode differently",
    "token_count_agreement": "token counts equal to the source's",
}
"""Name of each key of `data/statistics.json` that is shown."""


def render() -> str:
    """Return the page about the run in the working directory.

    Raises:
        UserError: A file of the run is missing.
    """
    data, train, evaluation = map(_read_json, (DATA, TRAINING, EVALUATION))
    _check_tables(data, evaluation)
    state, log = _read_json(STATE), Log.parse(_read(LOG), str(LOG))
    chain = state.get("chain")  # of later code than some runs
    manifest, params = Manifest.load(TOKENS), load_section("evaluate", EvaluateParams)
    try:
        gpt = GPT.from_checkpoint(CHECKPOINT)
    except FormatError as error:
        raise UserError(f"{error}; run `python -m train.launch`") from None
    text = probe_tokens(gpt.config.block_size)
    return html.render(
        "report.html",
        state=state,
        variants=gpt.config.variants,
        zero_init=gpt.config.zero_init,
        train=train,
        evaluation=evaluation,
        evaluate=params.model_dump(),
        manifest=manifest,
        hardware=hardware(train),
        tiles=tiles(train, evaluation),
        reference=reference(evaluation),
        loss_charts=[run_charts.loss_chart(log, evaluation, wide=wide) for wide in (True, False)],
        source_charts=[
            *filter(None, (run_charts.source_chart(log, wide=w) for w in (True, False)))
        ],
        source_rows=source_rows(train, state),
        training_charts=run_charts.training_charts(log),
        incidents=log.incidents(),
        evaluation_rows=evaluation_rows(evaluation),
        training_samples=training_samples(log),
        samples=parse_samples(samples(evaluation)),
        data_rows=data_rows(data),
        data_charts=run_charts.data_charts(),
        selection=selection(),
        layer_charts=run_charts.layer_charts(gpt, text),
        activation_tokens=text.size,
        predictions=predictions(gpt, params.prompts),
        time_rows=time_rows(train, state),
        compute_rows=compute_rows(train, state, gpt.config),
        identity=[
            ("commit", train.get("commit") or "not recorded"),
            ("run", state["run_key"]),
            ("data", manifest.dataset_key),
            ("training code", state["code_key"]),
            *([("head of the chain", chain["links"][-1]["link"])] if chain else []),
            *(
                (f"source {name}", f"{source.repo} at {source.revision}")
                for name, source in manifest.source.sources.items()
            ),
        ],
        machine=[
            *((name.replace("_", " "), value) for name, value in state["arithmetic"].items()),
            *([("device name", train["device"])] if train["device"] != "cpu" else []),
            ("dtype of matrix products", train["dtype"]),
        ],
        versions=sorted(state["versions"].items()),
        params=_text(PARAMS),
    )


def hardware(train: Mapping[str, Any]) -> str:
    """Describe the hardware of the run, as the end of a sentence."""
    n, device = train["world_size"], train["device"]
    if device != "cpu":
        return f"on {n} × {device}"
    return f"by {n} processes on a CPU" if n > 1 else "on a CPU"


def tiles(train: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (value, label) of the most important figures."""
    below = evaluation["below_unigram"]
    if "hellaswag_acc_norm" in evaluation:
        quality = (f"{evaluation['hellaswag_acc_norm']:.4f}", "HellaSwag acc_norm")
    else:
        side = "below" if below >= 0 else "above"
        quality = (html.number(abs(below)), f"nats per token {side} the unigram entropy")
    return [
        (f"{evaluation['val_loss']:.4f}", "validation loss, nats per token"),
        (html.number(evaluation["perplexity"]), "perplexity"),
        (f"{evaluation['bits_per_byte']:.3f}", "bits per byte"),
        quality,
        (html.number(train["tokens_per_second"]), "tokens per second"),
        (html.duration(train["seconds"]), "training time"),
    ]


def reference(evaluation: Mapping[str, Any]) -> str | None:
    """Return the comparison with the published loss curve; None if it does not apply."""
    verdict = str(evaluation.get("reference", ""))
    return verdict if verdict and not verdict.startswith("does not apply") else None


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Return (name, value, description) of each metric of the evaluation."""
    numbers = {key: html.number(value) for key, value in evaluation.items()}
    return [
        (name, evaluation[key], description.format_map(numbers))
        for key, (name, description) in EVALUATION_METRICS.items()
        if key in evaluation
    ]


def data_rows(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, value) of each metric of the data."""
    fractions = ("_share", "_agreement")
    return [
        (name, html.percent(data[key]) if key.endswith(fractions) else data[key])
        for key, name in DATA_METRICS.items()
        if key in data
    ]


def selection() -> dict[str, Any] | None:
    """Return what each rule of `curate` took from the data, with examples; None without rules."""
    if not (SELECTION / NAME).exists():
        return None
    manifest = SelectionManifest.load(SELECTION)
    if not manifest.dropped and not manifest.found:
        return None
    rows = sum(file.rows for file in manifest.files)
    return {
        "rows": rows,
        "kept": sum(file.kept for file in manifest.files),
        "rules": [
            (rule, n, html.percent(n / max(rows, 1))) for rule, n in manifest.dropped.items()
        ],
        "found": [(name.replace("_", " "), value) for name, value in manifest.found.items()],
        "examples": manifest.examples,
    }


def source_rows(
    train: Mapping[str, Any], state: Mapping[str, Any]
) -> list[tuple[str, str, str, Any, Any, Any]]:
    """Return name, weights, share, tokens, epochs and last validation loss of each source."""
    mixture = state["train"].get("mixture")
    phases = phases_of(mixture) if mixture is not None else []
    rows = []
    for name, facts in train.get("sources", {}).items():
        weights = ", then ".join(f"{of_phase[name]:g}" for _, of_phase in phases)
        share = f"{100 * facts['share']:.1f} %" if "share" in facts else ""
        seen = (facts.get(key, "") for key in ("tokens", "epochs", "val_loss"))
        rows.append((name, weights, share, *seen))
    return rows


def time_rows(train: Mapping[str, Any], state: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, value) of the times of the run."""
    worker = "GPU" if state["arithmetic"]["device"] == "cuda" else "process"
    return [
        ("steps", state["step"]),
        ("training, without validation and checkpoints", html.duration(train["seconds"])),
        ("seconds per step", train["seconds"] / state["step"]),
        ("tokens per second", train["tokens_per_second"]),
        (f"{worker}-hours", train["seconds"] * train["world_size"] / 3600),
    ]


def compute_rows(
    train: Mapping[str, Any], state: Mapping[str, Any], config: GPTConfig
) -> list[tuple[str, Any]]:
    """Return (name, value) of the operations and the memory of the run."""
    flops = flops_per_token(config, config.block_size) * state["tokens"]
    rows = [
        ("operations", html.quantity(flops, "FLOP")),
        ("operations per second", html.quantity(flops / train["seconds"], "FLOP/s")),
        ("peak memory of rank 0", html.quantity(train["peak_memory_bytes"], "B")),
        ("weights", html.quantity((CHECKPOINT / "model.safetensors").stat().st_size, "B")),
    ]
    if "mfu" in train:
        rows.insert(2, ("fraction of the devices' peak (MFU)", html.percent(train["mfu"])))
    return rows


def training_samples(log: Log) -> list[tuple[int, str, str]]:
    """Return (step, prompt, continuation) of up to 8 samples, the first and the last included."""
    samples = log.samples()
    most = min(8, len(samples))
    chosen = sorted({round(i * (len(samples) - 1) / max(1, most - 1)) for i in range(most)})
    return [(step, *sample_texts(tokens)) for step, tokens in (samples[i] for i in chosen)]


def samples(evaluation: Mapping[str, Any]) -> str:
    """Return the text of `artifacts/samples.md`, whose hash is among the results of evaluation."""
    data = _read(SAMPLES)
    if evaluation.get("samples_sha256") not in (None, hashlib.sha256(data).hexdigest()):
        raise _damaged(SAMPLES, f"its sha256 is not that in {EVALUATION}")
    return data.decode()


def _check_tables(data: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
    """Compare the tables that are drawn with their hashes; earlier versions recorded none."""
    hashes = dict(data.get("tables_sha256", {}))
    if "reference_sha256" in evaluation:
        hashes["reference.csv"] = evaluation["reference_sha256"]
    for name, expected in hashes.items():
        if hashlib.sha256(_read(METRICS / name)).hexdigest() != expected:
            raise _damaged(METRICS / name, "its sha256 is another")


def parse_samples(text: str) -> list[tuple[str, str]]:
    """Return (prompt, continuation) of the numbered samples in a file written by train.evaluate."""
    quoted: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("## "):
            if not line[3:].isdigit():  # before and after training: the log has more of them
                break
            quoted.append([])
        elif line.startswith(">") and quoted:
            quoted[-1].append(line[2:])
    samples = []
    for body in map("\n".join, quoted):
        prompt, _, rest = body[2:].partition("**") if body.startswith("**") else ("", "", body)
        samples.append((prompt, rest))
    return samples


def probe_tokens(block_size: int) -> np.ndarray:
    """Return validation tokens to measure activations on, (B, T)."""
    tokens = TokenStream(TOKENS, "val")[: max(ACTIVATION_TOKENS, block_size)]
    rows = max(1, len(tokens) // block_size)
    return tokens[: rows * block_size].reshape(rows, -1)


def predictions(gpt: GPT, prompts: Sequence[str]) -> list[tuple[list[dict[str, Any]], Any]]:
    """Return the tokens of the first prompts, and the most likely tokens after each prompt."""
    if gpt.config.vocab_size != tokenizer.N_VOCAB:
        return []  # not GPT-2's tokens
    found = []
    for prompt in [prompt for prompt in prompts if prompt][:PROMPTS] or [""]:
        tokens, likeliest = model_probe.predict_text(gpt, prompt)
        shaded = [
            {**asdict(token), "shade": round(70 * token.probability**0.5)} for token in tokens
        ]
        found.append((shaded, likeliest))
    return found


def _read(path: Path) -> bytes:
    try:
        return atomic.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run `dvc repro`") from None


def _text(path: Path) -> str:
    return _read(path).decode(errors="backslashreplace")


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; one that has its own hash is checked."""
    try:
        return atomic.read_sealed(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run `dvc repro`") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> UserError:
    mark_damaged(path)
    return UserError(
        f"{path}: damaged ({reason}); run `python -m {MADE_BY[path]}` to write it again"
    )
