"""`python -m train.evaluate`: what the trained model is worth, in numbers and in text.

Where there are several GPUs, a process for each shares the work (`processes` of machine.yaml says
otherwise); torchrun is started here. What is measured does not depend on it, nor on `micro_batch`:
losses of single tokens are summed in float64, and rounded to the digits that this leaves certain.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPT
from model.checkpoint import STATE, read_json
from model.errors import FormatError
from pipeline import TokenStream
from pipeline.format import tokenizer
from pipeline.format.shards import ShardError, open_shard
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store import atomic
from train import numerics
from train.data.loader import Tokens
from train.distributed.devices import device_type, processes_here
from train.distributed.rendezvous import process_group
from train.distributed.torchrun import run_torchrun
from train.distributed.world import World
from train.evals import hellaswag, lambada, reference_curve
from train.evals.likelihood import BATCH_TOKENS, Row
from train.evals.task_files import located, read_tasks
from train.params import EvaluateParams
from train.run import CHECKPOINT, CURVES, TOKENS
from train.validation import check_split, mean_loss

METRICS = Path("metrics/eval.json")
PUBLISHED = Path("metrics/reference.csv")
SAMPLES = Path("artifacts/samples.md")
VALIDATIONS = CURVES / "plots/metrics/val/loss.tsv"

BLOCK = 2**24  # tokens counted at a time
ENTROPY_BLOCKS = 64  # a billion tokens
DIGITS = 6  # of each measure


@dataclass(frozen=True)
class Tasks:
    """What is asked of the model beside the validation text; None where the parameters do not."""

    hellaswag: list[hellaswag.Task] | None
    lambada: list[Row] | None

    @classmethod
    def read(cls, params: EvaluateParams) -> Tasks:
        """The tasks that the parameters name."""
        a, b = params.hellaswag, params.lambada
        return cls(
            hellaswag.read("evaluate.hellaswag", a) if a else None,
            read_tasks("evaluate.lambada", b, lambada.HUB, lambada.task) if b else None,
        )


def main() -> None:
    """Measures `artifacts/checkpoint` on the validation split and samples from it."""
    params, machine = load_section("evaluate", EvaluateParams), Machine.load()
    # What can be refused is refused before any process is started.
    train_data, val_data = TokenStream(TOKENS, "train"), TokenStream(TOKENS, "val")
    check_split("evaluate.val_tokens", val_data, params.val_tokens)
    external = open_external(params) if params.val_shards else None
    try:
        state = read_json(CHECKPOINT / STATE, "run python -m train.launch")
    except FormatError as error:
        raise UserError(str(error)) from None
    rank = int(os.environ.get("RANK", 0))
    tasks = Tasks.read(params) if rank == 0 else None
    processes = _processes(machine)
    if "RANK" not in os.environ and processes > 1:
        run_torchrun(processes, module="train.evaluate")
        return
    streams: dict[str, Tokens] = {"val_loss": val_data}
    if external is not None:
        streams["val_shards_loss"] = external
    with process_group(machine.device, machine.timeout) as world:
        tasks = world.broadcast(tasks)
        assert tasks is not None
        try:
            gpt = GPT.from_checkpoint(CHECKPOINT).to(world.device)
        except FormatError as error:
            raise UserError(f"{error}; run python -m train.launch") from None
        # As it was validated while it trained.
        dtype, size = state["train"]["dtype"], machine.micro_batch
        metrics = measure(gpt, streams, params.val_tokens, dtype, tasks, world, size)
        if not world.first:
            return
    n_bytes = target_bytes(val_data, params.val_tokens)
    metrics |= describe(metrics["val_loss"], n_bytes, unigram_entropy(train_data))
    metrics |= compare(metrics, state, train_data)
    metrics = {
        name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
        for name, value in metrics.items()
    }
    atomic.write_json(METRICS, metrics)
    page = as_markdown(sample(gpt, params), metrics, params)
    atomic.write_bytes(SAMPLES, page.encode())
    print(summary(metrics))


def _processes(machine: Machine) -> int:
    """As set, or one a GPU; on a CPU one, whose threads share the cores better than processes."""
    kind = device_type(machine.device)
    return processes_here(machine, kind) if kind == "cuda" else machine.processes or 1


def open_external(params: EvaluateParams) -> Tokens:
    """The tokens of `val_shards`.

    Raises:
        UserError: There is no such file, or it is none of llm.c's, or too short.
    """
    name = f"params.yaml: evaluate.val_shards: {params.val_shards}"
    try:
        tokens = open_shard(located(str(params.val_shards)))
    except (ShardError, OSError):
        raise UserError(f"{name}: no token file in llm.c's format; name one, or null") from None
    if len(tokens) < params.val_tokens + 1:
        raise UserError(
            f"{name}: holds {len(tokens)} tokens; set evaluate.val_tokens to at most "
            f"{max(0, len(tokens) - 1)}, or val_shards to null"
        )
    return tokens


def measure(
    gpt: GPT,
    streams: Mapping[str, Tokens],
    n: int,
    dtype: numerics.Dtype,
    tasks: Tasks,
    world: World,
    size: int | None = None,
) -> dict[str, Any]:
    """What needs the model, shared by all ranks; the same on each.

    Args:
        gpt: The model.
        streams: Text to measure the loss on, by the name of the measure.
        n: Targets of each, the first so many.
        dtype: Of the matrix products in these losses.
        tasks: Of the benchmarks, which are computed in full float32, as others measure them.
        world: The processes that share the work.
        size: Windows and rows computed at a time; None chooses.
    """
    numerics.configure(world.device, deterministic=False)
    metrics: dict[str, Any] = {"val_tokens": n}
    for name, stream in streams.items():
        metrics[name] = mean_loss(
            partial(_summed, gpt),
            stream,
            n,
            block_size=gpt.config.block_size,
            rows=size or max(1, BATCH_TOKENS // gpt.config.block_size),
            dtype=dtype,
            device=world.device,
            world=world,
        )
    torch.set_float32_matmul_precision("highest")
    if tasks.hellaswag is not None:
        metrics |= hellaswag.measures(hellaswag.answer(gpt, tasks.hellaswag, world, size))
    if tasks.lambada is not None:
        metrics |= lambada.measure(gpt, tasks.lambada, world, size)
    return metrics


def _summed(gpt: GPT, inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The summed loss of a batch, in float64: no batch's size shows in it."""
    assert reduction == "sum"
    return gpt(inputs, targets, reduction="none").double().sum()


def compare(
    metrics: Mapping[str, Any], state: Mapping[str, Any], train_data: TokenStream
) -> dict[str, Any]:
    """The run beside the published curve: the verdict, and the last point's distance from it.

    Writes the published losses up to the run's end, for the plots; none where they say nothing.
    """
    why = reference_curve.why_not(state["model"], state["train"], train_data.manifest.source)
    if why is not None:
        atomic.write_bytes(PUBLISHED, reference_curve.as_csv([]).encode())
        return {"reference": f"does not apply: {why}"}
    step = int(state["step"])
    validations = reference_curve.read_validations(VALIDATIONS) | {step: metrics["val_loss"]}
    external = metrics.get("val_shards_loss")
    points = reference_curve.points(validations, {} if external is None else {step: external})
    steps = sorted({*(s for s in reference_curve.CURVE if s <= step), step})
    atomic.write_bytes(PUBLISHED, reference_curve.as_csv(steps).encode())
    found: dict[str, Any] = {"reference": reference_curve.verdict(points)}
    if points:
        found["above_reference"] = points[-1].difference
    return found


def summary(metrics: Mapping[str, Any]) -> str:
    """What was measured, to print."""
    parts = [
        f"val loss {metrics['val_loss']:.4f} nats a token over {metrics['val_tokens']:,} tokens, "
        f"perplexity {metrics['perplexity']:.2f}, {metrics['bits_per_byte']:.4f} bits a byte, "
        f"{metrics['below_unigram']:.4f} below the unigram entropy of "
        f"{metrics['unigram_entropy']:.4f}"
    ]
    if "hellaswag_tasks" in metrics:
        parts.append(
            f"HellaSwag ({metrics['hellaswag_tasks']:,} tasks) acc {metrics['hellaswag_acc']:.4f}, "
            f"acc_norm {metrics['hellaswag_acc_norm']:.4f}, "
            f"completion {metrics['hellaswag_acc_completion']:.4f}"
        )
    if "lambada_tasks" in metrics:
        parts.append(
            f"LAMBADA ({metrics['lambada_tasks']:,} tasks) acc {metrics['lambada_acc']:.4f}, "
            f"perplexity {metrics['lambada_perplexity']:.2f}"
        )
    parts.append(f"published curve: {metrics['reference']}")
    return "\n".join([*parts, f"{METRICS}, {SAMPLES}"])


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
    """Entropy of single tokens, nats: what a model that sees no context could reach.

    Of `ENTROPY_BLOCKS` blocks at most, evenly spread: a trillion tokens are not read for this.
    """
    counts = np.zeros(tokenizer.N_VOCAB, dtype=np.int64)
    stride = BLOCK * max(1, math.ceil(len(stream) / (BLOCK * ENTROPY_BLOCKS)))
    for first in range(0, len(stream), stride):
        counts += np.bincount(stream[first : first + BLOCK], minlength=len(counts))
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


if __name__ == "__main__":
    command.run(main)
