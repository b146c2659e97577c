"""`python -m train.evaluate`: metrics and text samples of the trained model.

On several GPUs it starts torchrun with one process per GPU (or `processes` of machine.yaml). The
metrics depend neither on that nor on `micro_batch`: token losses are summed in float64, and results
are rounded to digits that are certain.
"""

from __future__ import annotations

from pipeline.runtime import command

if __name__ == "__main__":
    command.die_with_parent()  # before torch is imported, which takes seconds

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPT
from model.checkpoint import STATE, WEIGHTS
from model.errors import FormatError
from model.files import read_json
from pipeline import TokenStream
from pipeline.format import tokenizer
from pipeline.format.shards import ShardError, open_shard
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine, find_file
from pipeline.runtime.params_file import load_section
from pipeline.store import atomic
from train import numerics
from train.data.loader import Tokens
from train.data.shard_check import ShardCheck
from train.distributed.devices import device_type, processes_here
from train.distributed.group import read_group, under_torchrun
from train.distributed.rendezvous import process_group
from train.distributed.torchrun import run_torchrun
from train.distributed.world import World
from train.evals import hellaswag, lambada, reference_curve
from train.evals.held_out import HeldOut
from train.evals.likelihood import BATCH_TOKENS, Request, score_requests
from train.evals.task_files import are_clean, with_clean
from train.params import EvaluateParams
from train.run import CHECKPOINT, CURVES, TOKENS, compared
from train.samples import as_markdown, before_and_after, sample
from train.validation import check_val_tokens, mean_loss, windows

RESULTS = Path("artifacts/evaluation.json")
METRICS = Path("metrics/eval.json")
# Those results by which models are compared.
COMPARED = (
    "val_loss",
    "val_shards_loss",
    "perplexity",
    "bits_per_byte",
    "held_out_bits_per_byte",
    "hellaswag_acc_norm",
    "lambada_acc",
)
PUBLISHED = Path("metrics/reference.csv")
SAMPLES = Path("artifacts/samples.md")
VALIDATIONS = CURVES / "plots/metrics/val/loss.tsv"

BLOCK = 2**24  # tokens counted at a time
ENTROPY_BLOCKS = 64  # a billion tokens
DIGITS = 6  # significant digits of each metric


@dataclass(frozen=True)
class Tasks:
    """Benchmark tasks; None for a benchmark that is not in the parameters."""

    hellaswag: list[hellaswag.Task] | None
    lambada: list[Request] | None
    hellaswag_clean: list[bool] | None = None
    """Whether each task shares no words with the text; None: `curate` did not look for them."""
    lambada_clean: list[bool] | None = None

    @classmethod
    def read(cls, params: EvaluateParams) -> Tasks:
        """Read the tasks named in the parameters."""
        a, b = params.hellaswag, params.lambada
        choices = hellaswag.read("evaluate.hellaswag", a) if a else None
        words = lambada.read("evaluate.lambada", b) if b else None
        return cls(choices, words, are_clean(a, len(choices or ())), are_clean(b, len(words or ())))


def main(argv: Sequence[str] = ()) -> None:
    """Evaluate `artifacts/checkpoint` and sample from it."""
    command.Parser(prog="python -m train.evaluate", description=main.__doc__).parse_args(argv)
    params, machine = load_section("evaluate", EvaluateParams), Machine.load()
    # check all inputs before any process starts
    train_data, val_data = TokenStream(TOKENS, "train"), TokenStream(TOKENS, "val")
    check_val_tokens("evaluate.val_tokens", val_data, params.val_tokens)
    external = open_val_shards(params) if params.val_shards else None
    held_out = HeldOut.read(params.held_out) if params.held_out else None
    try:
        state = read_json(CHECKPOINT / STATE, "run python -m train.launch")
    except FormatError as error:
        raise UserError(str(error)) from None
    tasks = Tasks.read(params) if read_group().rank == 0 else None
    processes = processes_here(machine, device_type(machine.device))
    if not under_torchrun() and processes > 1:
        run_torchrun(processes, module="train.evaluate")
        return
    streams: dict[str, Tokens] = {"val_loss": val_data}
    if external is not None:
        streams["val_shards_loss"] = external
    if held_out is not None:
        streams["held_out_loss"] = held_out.tokens
    with (
        process_group(machine.device, machine.timeout) as world,
        ShardCheck(world, train_data) as shards,
        world.roll_call(),
    ):
        tasks = world.broadcast(tasks)
        assert tasks is not None
        try:
            gpt = GPT.from_checkpoint(CHECKPOINT).to(world.device)
        except FormatError as error:
            raise UserError(f"{error}; run python -m train.launch") from None
        trained = state["train"]  # the loss is measured as in validation during training
        if masking := trained.get("document_masking", False):
            streams["val_loss_unmasked"] = val_data
        metrics = measure(
            gpt,
            streams,
            params.val_tokens,
            trained["dtype"],
            tasks,
            world,
            machine.micro_batch,
            document_masking=masking,
        )
        while not shards.complete(seconds=1.0):  # no rank waits for longer in the collective
            pass
        if not world.first:
            return
    n_bytes = bytes_per_target(val_data, params.val_tokens, gpt.config.block_size)
    metrics |= loss_metrics(metrics["val_loss"], n_bytes, unigram_entropy(train_data))
    if held_out is not None:
        metrics |= held_out.metrics(metrics["held_out_loss"])
    metrics |= compare_with_reference(metrics, state, train_data)
    metrics = {
        name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
        for name, value in metrics.items()
    }
    both = before_and_after(gpt, trained, params)
    page = as_markdown(sample(gpt, params), both, metrics["val_loss"], params).encode()
    atomic.write_bytes(SAMPLES, page)
    hashes = {
        "weights_sha256": state["sha256"][WEIGHTS],
        "samples_sha256": atomic.sha256_file(SAMPLES),
        "reference_sha256": atomic.sha256_file(PUBLISHED),
    }
    atomic.write_json(RESULTS, atomic.sealed({**metrics, **hashes}))
    atomic.write_json(METRICS, compared(metrics, COMPARED))
    print(summary(metrics))


def open_val_shards(params: EvaluateParams) -> Tokens:
    """Open the token file of `val_shards`.

    Raises:
        UserError: The file is missing, not in llm.c's format, too short, or of another tokenizer.
    """
    name = f"params.yaml: evaluate.val_shards: {params.val_shards}"
    try:
        tokens = open_shard(find_file(str(params.val_shards)))
    except (ShardError, OSError, ValueError):  # ValueError: a NUL character
        raise UserError(f"{name}: not a token file in llm.c's format; name one, or null") from None
    if len(tokens) < params.val_tokens + 1:
        raise UserError(
            f"{name}: has {len(tokens)} tokens; set evaluate.val_tokens to at most "
            f"{max(0, len(tokens) - 1)}, or val_shards to null"
        )
    tokens = tokens[: params.val_tokens + 1]  # published losses are over the first tokens
    if (highest := tokens.max()) >= tokenizer.N_VOCAB:
        raise UserError(
            f"{name}: holds token {highest}, but GPT-2 has {tokenizer.N_VOCAB}; name a file of its "
            "tokenizer, or null"
        )
    return tokens


def measure(
    gpt: GPT,
    streams: Mapping[str, Tokens],
    n: int,
    dtype: numerics.Dtype,
    tasks: Tasks,
    world: World,
    batch_size: int | None = None,
    *,
    document_masking: bool = False,
) -> dict[str, Any]:
    """Compute the metrics that need the model; ranks share the work and return the same.

    Args:
        streams: Token streams to compute the loss on, by metric name.
        n: Number of targets, spread over each stream; of a held-out text all count.
        dtype: Of the matrix products in these losses.
        tasks: Benchmark tasks; scored in full float32, like published results.
        batch_size: Windows or requests per batch; None chooses.
        document_masking: Whether `val_loss` and `held_out_loss` are measured on each document
            alone; other losses and the tasks are those of a model without masks, as published.
    """
    numerics.configure(world.device, deterministic=False)
    metrics: dict[str, Any] = {"val_tokens": n}
    for name, stream in streams.items():
        gpt.document_masking = document_masking and name in ("val_loss", "held_out_loss")
        metrics[name] = mean_loss(
            partial(_summed_loss, gpt),
            stream,
            len(stream) - 1 if name == "held_out_loss" else n,
            block_size=gpt.config.block_size,
            rows=batch_size or max(1, BATCH_TOKENS // gpt.config.block_size),
            dtype=dtype,
            device=world.device,
            world=world,
        )
    gpt.document_masking = False
    torch.set_float32_matmul_precision("highest")
    if tasks.hellaswag is not None:
        predictions = hellaswag.predict(gpt, tasks.hellaswag, world, batch_size)
        metrics |= with_clean(hellaswag.metrics, predictions, tasks.hellaswag_clean)
    if tasks.lambada is not None:
        scores = score_requests(gpt, tasks.lambada, world, batch_size)
        metrics |= with_clean(lambada.metrics, scores, tasks.lambada_clean)
    return metrics


def _summed_loss(gpt: GPT, inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Sum the loss of a batch in float64, so that the batch size does not change the total."""
    assert reduction == "sum"
    losses: Tensor = gpt(inputs, targets, reduction="none")
    return losses.double().sum()


def compare_with_reference(
    metrics: Mapping[str, Any], state: Mapping[str, Any], train_data: TokenStream
) -> dict[str, Any]:
    """Compare the run with the published curve: verdict, and difference at the last step.

    Writes the published losses up to the last step for the plots; none if the curve does not apply.
    """
    mismatch = reference_curve.recipe_mismatch(
        state["model"], state["train"], train_data.manifest.source
    )
    if mismatch is not None:
        atomic.write_bytes(PUBLISHED, reference_curve.as_csv([]).encode())
        return {"reference": f"does not apply: {mismatch}"}
    step = int(state["step"])
    validations = reference_curve.read_validations(VALIDATIONS) | {step: metrics["val_loss"]}
    external = metrics.get("val_shards_loss")
    exact = {} if external is None else {step: external}
    points = reference_curve.comparable_points(validations, exact)
    steps = sorted({*(s for s in reference_curve.CURVE if s <= step), step})
    atomic.write_bytes(PUBLISHED, reference_curve.as_csv(steps).encode())
    other = reference_curve.other_recipe(state["model"], state["train"])
    result: dict[str, Any] = {"reference": reference_curve.verdict(points, other)}
    if points:
        result["above_reference"] = points[-1].difference
    return result


def summary(metrics: Mapping[str, Any]) -> str:
    """Format the metrics for the terminal."""
    parts = [
        f"val loss {metrics['val_loss']:.4f} nats per token over {metrics['val_tokens']:,} tokens, "
        f"perplexity {metrics['perplexity']:.2f}, {metrics['bits_per_byte']:.4f} bits per byte, "
        f"{metrics['below_unigram']:.4f} below the unigram entropy of "
        f"{metrics['unigram_entropy']:.4f}"
    ]
    if "held_out_loss" in metrics:
        parts.append(
            f"held-out text ({metrics['held_out_bytes']:,} bytes): "
            f"{metrics['held_out_bits_per_byte']:.4f} bits per byte"
        )
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
    if "hellaswag_clean_tasks" in metrics:
        parts.append(
            f"HellaSwag without the tasks in the text ({metrics['hellaswag_clean_tasks']:,} tasks) "
            f"acc {metrics['hellaswag_clean_acc']:.4f}, "
            f"acc_norm {metrics['hellaswag_clean_acc_norm']:.4f}"
        )
    if "lambada_clean_tasks" in metrics:
        parts.append(
            f"LAMBADA without the tasks in the text ({metrics['lambada_clean_tasks']:,} tasks) "
            f"acc {metrics['lambada_clean_acc']:.4f}"
        )
    parts.append(f"published curve: {metrics['reference']}")
    return "\n".join([*parts, f"{RESULTS}, {SAMPLES}"])


def loss_metrics(loss: float, n_bytes: float, entropy: float) -> dict[str, float]:
    """Return the metrics derived from a loss.

    Args:
        loss: Mean over the targets, in nats.
        n_bytes: Mean bytes of text per target.
        entropy: Unigram entropy of the training tokens, in nats.
    """
    return {
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / n_bytes,
        "unigram_entropy": entropy,
        "below_unigram": entropy - loss,
    }


def bytes_per_target(stream: TokenStream, n_targets: int, block_size: int) -> float:
    """Return the mean length in bytes of the measured targets; `<|endoftext|>` has none."""
    lengths = tokenizer.token_bytes()
    measured = windows(len(stream), n_targets, block_size)
    return sum(int(lengths[stream[s + 1 : s + 1 + n]].sum()) for s, n in measured) / n_targets


def unigram_entropy(stream: TokenStream) -> float:
    """Return the entropy of single tokens in nats, the best loss of a model without context.

    It is computed from at most `ENTROPY_BLOCKS` evenly spread blocks.
    """
    counts = np.zeros(tokenizer.N_VOCAB, dtype=np.int64)
    stride = BLOCK * max(1, math.ceil(len(stream) / (BLOCK * ENTROPY_BLOCKS)))
    for first in range(0, len(stream), stride):
        counts += np.bincount(stream[first : first + BLOCK], minlength=len(counts))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


if __name__ == "__main__":
    command.run_and_leave(lambda: main(sys.argv[1:]))
