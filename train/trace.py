"""`python -m train.trace --step N [--rank R]`: show the documents that a step was trained on.

Training records nothing for this. The sampling order is a function of the seed, so the samples of a
step, their windows and the documents in those are computed again. Steps are numbered as in the log:
the first is step 1, and step N ends where the log prints "step N".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint import STATE
from model.errors import FormatError
from model.files import read_json
from pipeline import TokenStream
from pipeline.provenance import FIELDS, Documents, DocumentSpan, RawRows, decoded
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import load_section, validate
from train.data.mixed_order import MixedOrder, sampling_order
from train.data.order import DataOrder
from train.data.split import Split
from train.params import ModelParams, TrainParams
from train.run import CHECKPOINT, TOKENS

RAW = Path("data/raw")
DEFAULT_LIMIT = 4  # windows
CONTEXT = 300  # characters of a document shown before and after its part in the window


@dataclass(frozen=True)
class Share:
    """Share of one rank in each batch."""

    split: Split
    rank: int


@dataclass(frozen=True)
class Window:
    """Sample of a step: tokens [first, end) of the train split, and the documents in them.

    Attributes:
        number: Of the window, in the split; with `train.mixture` in its source.
        epoch: Of the split, or of the source.
        source: Name of the source of the first token.
    """

    sample: int
    number: int
    epoch: int
    source: str
    first: int
    end: int
    spans: list[DocumentSpan]


@dataclass(frozen=True)
class Trace:
    """Train split of a run and its sampling order."""

    stream: TokenStream
    order: DataOrder | MixedOrder
    params: TrainParams

    @classmethod
    def of(cls, block_size: int, params: TrainParams, tokens: Path = TOKENS) -> Trace:
        """Open the data of a run with these parameters.

        Raises:
            UserError: There are no tokens, or too few for one window.
        """
        stream = TokenStream(tokens, "train")
        try:
            order = sampling_order(params, stream, block_size)
        except ValueError as error:
            raise UserError(f"{tokens}: {error}") from None
        return cls(stream, order, params)

    def samples(self, step: int) -> tuple[int, int]:
        """Return the first sample of a step and the number of samples.

        Raises:
            UserError: The run has no such step.
        """
        if not 1 <= step <= self.params.steps:
            raise UserError(f"--step {step}: not a step of the run; use 1 to {self.params.steps}")
        return self.params.batches(self.order.block_size)(step - 1)

    def windows(self, step: int, share: Share | None = None) -> Iterator[Window]:
        """Yield the windows of a step, or of one rank's share of it, in the order of computation.

        Raises:
            UserError: The run has no such step, or its batch cannot be shared like this.
        """
        start, count = self.samples(step)
        samples = np.arange(start, start + count)
        if share is not None:
            world, micro_batch = share.split.world, share.split.micro_batch
            if count % (micro_batch * (1 if share.split.contiguous else world)):
                raise UserError(
                    f"--world {world} --micro-batch {micro_batch}: do not divide the {count} "
                    "samples of this step; use the values of the run"
                )
            samples = share.split.share(samples, share.rank).ravel()
        chosen, size, documents = samples - start, self.order.block_size, Documents(self.stream)
        starts = self.order.starts(start, count)
        numbers, epochs = self._numbers(start, count)
        for sample, first, number, epoch in zip(
            samples.tolist(), *(a[chosen].tolist() for a in (starts, numbers, epochs)), strict=True
        ):
            shard = int(np.searchsorted(self.stream.starts, first, side="right")) - 1
            source, end = self.stream.shards[shard].source, first + size + 1
            spans = documents.between(first, end)
            yield Window(sample, number, epoch, source, first, end, spans)

    def _numbers(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return number and epoch of the windows of some samples."""
        if isinstance(self.order, MixedOrder):
            return self.order.locate(start, count)[1:]
        epochs = np.arange(start, start + count) // self.order.n_windows
        return self.order.samples(start, count), epochs


def split_text(
    span: DocumentSpan, tokens: np.ndarray, text: bytes | None = None
) -> tuple[str, str, str]:
    """Split the source text of a document into the parts before, in and after the window.

    Without ``text``, all ``tokens`` of the document are decoded.
    """
    before, within, after = (
        decoded(tokens[a - span.start : b - span.start])
        for a, b in ((span.start, span.first), (span.first, span.end), (span.end, span.stop))
    )
    if text is not None:  # the same bytes, from the source
        a, b = len(before), len(before) + len(within)
        before, within, after = text[:a], text[a:b], text[b:]
    # A token can begin or end within a character.
    parts = [part.decode("utf-8", errors="replace") for part in (before, within, after)]
    return parts[0], parts[1], parts[2]


def describe(span: DocumentSpan, documents: Documents, rows: RawRows) -> dict[str, Any]:
    """Return the source of a document and its text before, in and after the window.

    Raises:
        UserError: The source file has another text in this row.
    """
    tokens, raw = documents.tokens(span), rows.get(span)
    text = None if raw is None else str(raw.pop("text")).encode()
    document = decoded(tokens)
    if text is not None and documents.may_be_cut(span) and document in text:
        text = document
    if text is not None and text != document:
        raise UserError(
            f"{RAW / str(span.path)}, row {span.row}: differs from the text in {span.shard}; run "
            "python -m pipeline.verify"
        )
    before, within, after = split_text(span, tokens, text)
    return {**asdict(span), **(raw or {}), "before": before, "window": within, "after": after}


def main(argv: Sequence[str]) -> None:
    """Print the documents that a step was trained on."""
    args = _parser().parse_args(argv)
    state = _state(args.checkpoint)
    trace = _trace(state if args.checkpoint else None)
    share = _share(args, state, trace.params.invariant)
    windows = list(trace.windows(args.step, share))
    limit = args.limit if args.limit is not None else len(windows) if args.json else DEFAULT_LIMIT
    documents, rows = Documents(trace.stream), RawRows(RAW, trace.stream.manifest.source)
    if not args.json:
        print(_summary(trace, args.step, share, len(windows)))
    has_names = len(trace.stream.manifest.source.sources) > 1
    for window in windows[:limit]:
        named = f"source {window.source}, epoch {window.epoch}, " if has_names else ""
        if not args.json:
            print(
                f"\nsample {window.sample:,}: {named}window {window.number:,}, tokens "
                f"{window.first:,} to {window.end - 1:,}, {len(window.spans)} documents"
            )
        for span in window.spans:
            found = describe(span, documents, rows)
            if args.json:
                of = {"step": args.step, "sample": window.sample, "source": window.source}
                print(json.dumps({**of, **found}))
            else:
                print(_as_text(span, found))
    if not args.json and limit < len(windows):
        print(f"\n{len(windows) - limit:,} more windows: --limit {len(windows)} shows all")


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="python -m train.trace",
        description="Show the documents that a step of the run in params.yaml was trained on.",
    )
    add = parser.add_argument
    add("--step", type=int, required=True, metavar="N", help="step as in the log, from 1")
    add("--rank", type=int, metavar="R", help="only the windows of this rank")
    add("--world", type=int, metavar="N", help="processes, for --rank; default: the checkpoint's")
    add("--micro-batch", type=int, metavar="N", help="for --rank; default: the checkpoint's")
    add(
        "--limit",
        type=int,
        metavar="N",
        help=f"windows to show; default {DEFAULT_LIMIT}, --json: all",
    )
    add("--json", action="store_true", help="print one line of JSON per document")
    add("--checkpoint", type=Path, metavar="DIR", help="parameters of this run, not of params.yaml")
    return parser


def _summary(trace: Trace, step: int, share: Share | None, windows: int) -> str:
    start, count = trace.samples(step)
    epochs = ""
    if isinstance(trace.order, DataOrder):
        ends = sorted({sample // trace.order.n_windows for sample in (start, start + count - 1)})
        epochs = f", epoch {' to '.join(map(str, ends))}"
    of_rank = "" if share is None else f"; rank {share.rank} of {share.split.world}: {windows}"
    return (
        f"step {step}: samples {start:,} to {start + count - 1:,}, {count:,} windows of "
        f"{trace.order.block_size:,} tokens{epochs}{of_rank}"
    )


def _state(checkpoint: Path | None) -> dict[str, Any] | None:
    """Read the state of a checkpoint; by default of the published one, None if there is none."""
    folder = checkpoint or CHECKPOINT
    if checkpoint is None and not folder.exists():
        return None
    try:
        return read_json(folder / STATE, "name a checkpoint of this project")
    except FormatError as error:
        raise UserError(f"--checkpoint: {error}") from None


def _trace(state: dict[str, Any] | None) -> Trace:
    """Open the data of the run in `params.yaml`, or of a checkpoint."""
    if state is None:
        model, params = load_section("model", ModelParams), load_section("train", TrainParams)
        return Trace.of(model.block_size, params)
    params = validate(TrainParams, state["train"], "the checkpoint's train")
    trace = Trace.of(int(state["model"]["block_size"]), params)
    key = trace.stream.manifest.dataset_key
    if key != state["dataset_key"]:
        raise UserError(
            f"--checkpoint: trained on dataset {state['dataset_key'][:12]}, but {TOKENS} has "
            f"{key[:12]}; restore the dataset of the checkpoint"
        )
    return trace


def _share(
    args: argparse.Namespace, state: dict[str, Any] | None, leaf: int | None
) -> Share | None:
    """Return the share that the flags select; by default split as in the checkpoint's run.

    ``leaf`` is `train.invariant`, with which each rank has consecutive samples.
    """
    if args.rank is None:
        return None
    arithmetic = (state or {}).get("arithmetic", {})
    world = args.world or arithmetic.get("world_size")
    micro_batch = args.micro_batch or leaf or arithmetic.get("micro_batch")
    if not (world and micro_batch):
        raise UserError(
            "--rank: unknown split, as there is no checkpoint; set --world and --micro-batch"
        )
    if not (0 <= args.rank < world and micro_batch > 0):
        raise UserError(f"--rank {args.rank}: not one of {world} processes; use 0 to {world - 1}")
    split = Split(world=world, micro_batch=micro_batch, contiguous=leaf is not None)
    return Share(split, args.rank)


def _as_text(span: DocumentSpan, found: dict[str, Any]) -> str:
    """Format a document for people, with its part in the window in brackets."""
    first, last = span.first - span.start + 1, span.end - span.start
    where = span.path or "unknown"
    if span.row is not None:
        where += f", row {span.row:,}"
    number = "before the first document" if span.number is None else f"document {span.number:,}"
    lines = [
        f"  {span.shard}, {number}: tokens {first:,} to {last:,} of {span.stop - span.start:,}",
        f"    source  {where}",
    ]
    lines += [f"    {name:7} {found[name]}" for name in FIELDS if found.get(name)]
    before, after = found["before"], found["after"]
    before = ("…" if len(before) > CONTEXT else "") + before[-CONTEXT:]
    after = after[:CONTEXT] + ("…" if len(after) > CONTEXT else "")
    text = f"{before}⟦{found['window']}⟧{after}"
    return "\n".join([*lines, *(f"    | {line}" for line in text.splitlines())])


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
