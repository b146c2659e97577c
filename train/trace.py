"""`python -m train.trace --step N [--rank R]`: the documents that a step was trained on.

Nothing was written down while the run trained: the order of the data is a function of the seed, so
the samples of a step, their windows and the documents in those are computed anew. Steps are counted
as the log counts them: step 1 is the first, step N ends where the line "step N" was printed.
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

from model.checkpoint import STATE, read_json
from model.errors import FormatError
from pipeline import TokenStream
from pipeline.provenance import FIELDS, Documents, Piece, RawRows, decoded
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.params_file import load_section, validate
from train.data.order import DataOrder
from train.data.split import Split
from train.params import ModelParams, TrainParams
from train.run import CHECKPOINT, TOKENS

RAW = Path("data/raw")
SHOWN = 4  # windows, where nobody says how many
AROUND = 300  # characters of a document shown before and after its part in a window


@dataclass(frozen=True)
class Share:
    """What one rank computes of each batch."""

    split: Split
    rank: int


@dataclass(frozen=True)
class Window:
    """A sample of a step: the tokens [first, end) of the train split, and their documents."""

    sample: int
    number: int
    first: int
    end: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Trace:
    """A run's data: the train split, and who sees which part of it when."""

    stream: TokenStream
    order: DataOrder
    params: TrainParams

    @classmethod
    def of(cls, block_size: int, params: TrainParams, tokens: Path = TOKENS) -> Trace:
        """The data of a run with these parameters.

        Raises:
            UserError: The tokens are not there, or too few for one window.
        """
        stream = TokenStream(tokens, "train")
        try:
            order = DataOrder(
                n_tokens=len(stream), block_size=block_size, seed=params.seed, order=params.order
            )
        except ValueError as error:
            raise UserError(f"{tokens}: {error}") from None
        return cls(stream, order, params)

    def span(self, step: int) -> tuple[int, int]:
        """First sample of a step, and their number.

        Raises:
            UserError: The run has no such step.
        """
        if not 1 <= step <= self.params.steps:
            raise UserError(f"--step {step}: the run has steps 1 to {self.params.steps}")
        return self.params.batches(self.order.block_size)(step - 1)

    def windows(self, step: int, share: Share | None = None) -> Iterator[Window]:
        """The windows of a step, or of one rank's share of it, in the order of computation.

        Raises:
            UserError: The run has no such step, or its batch cannot be shared so.
        """
        start, count = self.span(step)
        samples = np.arange(start, start + count)
        if share is not None:
            world, micro_batch = share.split.world, share.split.micro_batch
            if count % (world * micro_batch):
                raise UserError(
                    f"--world {world} --micro-batch {micro_batch}: cannot share the {count} "
                    "samples of this step; take those of the run"
                )
            samples = share.split.share(samples, share.rank).ravel()
        numbers = self.order.samples(start, count)[samples - start]
        documents, size = Documents(self.stream), self.order.block_size
        for sample, number in zip(samples.tolist(), numbers.tolist(), strict=True):
            first, end = number * size, number * size + size + 1
            yield Window(sample, number, first, end, documents.between(first, end))


def marked(piece: Piece, tokens: np.ndarray, text: bytes | None = None) -> tuple[str, str, str]:
    """A document's text before its part in the window, that part, and the text after it.

    Args:
        piece: The document.
        tokens: Of the whole document.
        text: What they were made from, where it is at hand; else they are decoded.
    """
    before, within, after = (
        decoded(tokens[a - piece.start : b - piece.start])
        for a, b in ((piece.start, piece.first), (piece.first, piece.end), (piece.end, piece.stop))
    )
    if text is not None:  # the same bytes, but for their source
        a, b = len(before), len(before) + len(within)
        before, within, after = text[:a], text[a:b], text[b:]
    # A token may begin or end within a character.
    shown = [part.decode("utf-8", errors="replace") for part in (before, within, after)]
    return shown[0], shown[1], shown[2]


def describe(piece: Piece, documents: Documents, rows: RawRows) -> dict[str, Any]:
    """All that is known of a document: where it came from, and its text in three parts."""
    tokens, raw = documents.tokens(piece), rows.get(piece)
    text = None if raw is None else str(raw.pop("text")).encode()
    if text is not None and text != decoded(tokens):
        raise UserError(
            f"{RAW / str(piece.path)}, row {piece.row}: is not what {piece.shard} was made from; "
            "run python -m pipeline.verify"
        )
    before, within, after = marked(piece, tokens, text)
    return {**asdict(piece), **(raw or {}), "before": before, "window": within, "after": after}


def main(argv: Sequence[str]) -> None:
    """Print the documents behind a step."""
    args = parser().parse_args(argv)
    state = _state(args.checkpoint)
    trace = _trace(state if args.checkpoint else None)
    share = _share(args, state)
    start, count = trace.span(args.step)
    epochs = sorted({sample // trace.order.n_windows for sample in (start, start + count - 1)})
    windows = list(trace.windows(args.step, share))
    limit = args.limit if args.limit is not None else len(windows) if args.json else SHOWN
    documents, rows = Documents(trace.stream), RawRows(RAW, trace.stream.manifest.source)
    if not args.json:
        of_rank = (
            "" if share is None else f"; rank {share.rank} of {share.split.world}: {len(windows)}"
        )
        print(
            f"step {args.step}: samples {start:,} to {start + count - 1:,} of the data's order, "
            f"{count:,} windows of {trace.order.block_size:,} tokens, "
            f"epoch {' to '.join(map(str, epochs))}{of_rank}"
        )
    for window in windows[:limit]:
        if not args.json:
            print(
                f"\nsample {window.sample:,}: window {window.number:,}, tokens {window.first:,} to "
                f"{window.end - 1:,}, {len(window.pieces)} documents"
            )
        for piece in window.pieces:
            found = describe(piece, documents, rows)
            if args.json:
                print(json.dumps({"step": args.step, "sample": window.sample, **found}))
            else:
                print(_as_text(piece, found))
    if not args.json and limit < len(windows):
        print(f"\nand {len(windows) - limit:,} windows more: --limit {len(windows)} shows them")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m train.trace",
        description="The documents that a step of the run of params.yaml was trained on.",
    )
    flags.add_argument("--step", type=int, required=True, help="as in the log, from 1")
    flags.add_argument("--rank", type=int, help="only what this process computed")
    flags.add_argument("--world", type=int, help="with --rank: processes; else the checkpoint's")
    flags.add_argument("--micro-batch", type=int, help="with --rank: likewise, their micro-batch")
    flags.add_argument("--limit", type=int, help=f"windows to show; {SHOWN}, or with --json all")
    flags.add_argument("--json", action="store_true", help="a line of JSON for each document")
    flags.add_argument(
        "--checkpoint", type=Path, help="take the run's parameters from here, not params.yaml"
    )
    return flags


def _state(checkpoint: Path | None) -> dict[str, Any] | None:
    """The state of the checkpoint that is named, or else of the one that is published."""
    folder = checkpoint or CHECKPOINT
    if checkpoint is None and not folder.exists():
        return None
    try:
        return read_json(folder / STATE, "name a checkpoint of this project")
    except FormatError as error:
        raise UserError(f"--checkpoint: {error}") from None


def _trace(state: dict[str, Any] | None) -> Trace:
    """The run of `params.yaml`, or of a checkpoint."""
    if state is None:
        model, params = load_section("model", ModelParams), load_section("train", TrainParams)
        return Trace.of(model.block_size, params)
    params = validate(TrainParams, state["train"], "the checkpoint's train")
    trace = Trace.of(int(state["model"]["block_size"]), params)
    key = trace.stream.manifest.dataset_key
    if key != state["dataset_key"]:
        raise UserError(
            f"--checkpoint: was trained on other data ({state['dataset_key'][:12]}) than {TOKENS} "
            f"holds ({key[:12]}); bring that back"
        )
    return trace


def _share(args: argparse.Namespace, state: dict[str, Any] | None) -> Share | None:
    """The share that the flags ask for; what they leave open is as the checkpoint's run ended."""
    if args.rank is None:
        return None
    how = (state or {}).get("arithmetic", {})
    world = args.world or how.get("world_size")
    micro_batch = args.micro_batch or how.get("micro_batch")
    if not (world and micro_batch):
        raise UserError("--rank: say of how many: --world N --micro-batch N")
    if not (0 <= args.rank < world and micro_batch > 0):
        raise UserError(f"--rank {args.rank}: of {world} processes; take 0 to {world - 1}")
    return Share(Split(world=world, micro_batch=micro_batch), args.rank)


def _as_text(piece: Piece, found: dict[str, Any]) -> str:
    """A document as a person reads it, its part in the window between two marks."""
    first, last = piece.first - piece.start + 1, piece.end - piece.start
    where = piece.path or "unknown"
    if piece.row is not None:
        where += f", row {piece.row:,}"
    number = "before the first document" if piece.number is None else f"document {piece.number:,}"
    lines = [
        f"  {piece.shard}, {number}: tokens {first:,} to {last:,} of {piece.stop - piece.start:,}",
        f"    source  {where}",
    ]
    lines += [f"    {name:7} {found[name]}" for name in FIELDS if found.get(name)]
    before, after = found["before"], found["after"]
    before = ("…" if len(before) > AROUND else "") + before[-AROUND:]
    after = after[:AROUND] + ("…" if len(after) > AROUND else "")
    text = f"{before}⟦{found['window']}⟧{after}"
    return "\n".join([*lines, *(f"    | {line}" for line in text.splitlines())])


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
