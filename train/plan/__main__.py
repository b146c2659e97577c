"""`python -m train.plan`: will it fit, how long, what does it cost? Computed; nothing is run.

From `params.yaml`, or a preset laid over it, and the name of some hardware. docs/plan.md says how
far the figures lie from what was measured, and from published runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

from model.command import Parser, count, positive
from pipeline.runtime import command
from train.plan.accelerators import NAMES
from train.plan.estimate import Options, Plan, make_plan
from train.preset import load

Row = tuple[str, str, str]  # what, how much, and a remark

PARTS = {
    "weights": "float32",
    "gradients": "float32, in DDP's buckets",
    "optimizer": "its moments, float32",
    "copies": "of the blocks' weights, bfloat16",
    "activations": "kept for the backward pass",
    "work": "head and loss, or a block's gradients",
    "reserve": "CUDA, cuBLAS, NCCL: assumed",
}


def main(argv: Sequence[str] = ()) -> None:
    """Prints the plan of `params.yaml` on the hardware that the arguments name."""
    args = vars(_parser().parse_args(argv))
    preset, as_json = args.pop("preset"), args.pop("json")
    plan = make_plan(load(preset), Options(**args))
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        print(table(plan, preset))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m train.plan",
        description="Memory, time, price and disk of the run in params.yaml, computed.",
    )
    add = parser.add_argument
    add("--preset", metavar="NAME", help="lay this preset over params.yaml, which stays as it is")
    add("--hardware", default="a100-80", metavar="NAME", help=f"{', '.join(NAMES)} (this machine)")
    add("--nodes", type=count, default=1, metavar="N")
    add("--gpus", type=count, default=8, metavar="N", help="of a node; processes, on a CPU")
    add("--interconnect", choices=("nvlink", "pcie"), help="within a node; default: the best")
    add("--network", type=positive, metavar="GBIT", help="between nodes, Gbit/s of each")
    add(
        "--mfu",
        type=_part,
        metavar="X",
        help="of forward and backward, as python -m train.bench measures it",
    )
    add("--rate", type=positive, metavar="DOLLARS", help="for an hour of one GPU")
    add("--micro-batch", type=count, metavar="N", help="default: as training chooses")
    add("--checkpoint-activations", action="store_true", help="as in machine.yaml")
    add("--overlap", action="store_true", help="as in machine.yaml")
    add("--loss-chunk", type=count, metavar="N", help="as in machine.yaml")
    add("--json", action="store_true", help="for machines: bytes, seconds, FLOPs")
    return parser


def _part(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: not a part of the peak, above 0 and up to 1")
    return value


def table(plan: Plan, preset: str | None = None) -> str:
    """The plan for people."""
    options = plan.options
    nodes = f"{options.nodes} x " if options.nodes > 1 else ""
    head = f"{f'preset {preset}' if preset else 'params.yaml'} on {nodes}{options.gpus} x "
    sections = {
        "model": _model(plan),
        f"memory of one {'process' if options.hardware == 'cpu' else 'GPU'}": _memory(plan),
        "time": _time(plan),
        "data and disk": _data(plan),
    }
    lines = [head + options.hardware]
    for title, rows in sections.items():
        lines += [
            "",
            title,
            *(f"  {name:<22} {value:>14}  {note}".rstrip() for name, value, note in rows),
        ]
    lines += [""] + [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines).rstrip()


def _model(plan: Plan) -> list[Row]:
    return [
        ("parameters", f"{plan.parameters:,}", ""),
        (
            "FLOPs a token",
            f"{plan.flops_per_token:,}",
            "forward and backward, full attention square",
        ),
    ]


def _memory(plan: Plan) -> list[Row]:
    sizes = asdict(plan.memory)
    rows: list[Row] = [
        (part, _gib(sizes[part]), note) for part, note in PARTS.items() if sizes[part]
    ]
    fits = "fits" if plan.fits else "DOES NOT FIT"
    most = plan.largest_micro_batch
    return [
        *rows,
        (
            "together",
            _gib(plan.memory.total),
            f"of {_gib(plan.available)} that can be used: {fits}",
        ),
        ("micro-batch", str(plan.micro_batch), f"sequences; {plan.micro_steps} micro-steps a step"),
        ("largest micro-batch", str(most or "none"), "that fits and divides the batch"),
    ]


def _time(plan: Plan) -> list[Row]:
    step = plan.step
    whole = f"MFU {plan.step_mfu:.0%}"
    peak = f"of {plan.peak / 1e12:,.1f} TFLOP/s"
    rows: list[Row] = [
        ("MFU", f"{plan.mfu:.0%}", f"{peak}; {plan.mfu_source}"),
        ("forward and backward", _ms(step.compute), ""),
    ]
    if plan.world > 1:
        sent = f"{plan.all_reduce_bytes / 1e9:.2f} GB a device, {_ms(step.all_reduce)}"
        rows.append(("all-reduce, not hidden", _ms(step.exposed), f"of {sent}"))
    rows += [
        ("optimizer", _ms(step.optimizer), ""),
        ("a step", _ms(step.total), f"{plan.tokens_per_second:,.0f} tokens/s a device, {whole}"),
        ("all steps", _hours(plan.training_seconds), f"{plan.steps:,}"),
        ("evaluation", _hours(plan.evaluation_seconds), "validations, and HellaSwag"),
        ("train stage", _hours(plan.seconds), ""),
    ]
    if plan.dollars is not None:
        rows.append(
            ("price", f"${plan.dollars:,.2f}", f"{plan.world} x ${plan.options.rate:g} an hour")
        )
    return rows


def _data(plan: Plan) -> list[Row]:
    seen = f"{plan.epochs:.2f} epochs" if plan.epochs is not None else ""
    rows: list[Row] = [("tokens trained on", f"{plan.tokens:,}", seen)]
    if corpus := plan.corpus:
        rows += [
            (
                "parquet",
                _gb(corpus.raw_bytes),
                f"{corpus.files} files, {corpus.documents:,.0f} documents",
            ),
            (
                "token shards",
                _gb(corpus.token_bytes),
                f"{corpus.shards:,} shards, "
                f"{corpus.train_tokens:,.0f} tokens, {corpus.val_tokens:,.0f} held out",
            ),
        ]
    else:
        rows.append(("text", "unknown", "until download has looked"))
    return [
        *rows,
        ("a checkpoint", _gb(plan.checkpoint_bytes), "weights and optimizer"),
        ("disk", _gb(plan.disk_bytes), "together, with the checkpoints that are kept"),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
