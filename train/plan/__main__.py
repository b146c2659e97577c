"""`python -m train.plan`: compute whether a run fits, how long it takes, and what it costs.

The plan follows from `params.yaml`, or a preset merged into it, and the name of some hardware,
which is this machine by default; nothing is run. docs/plan.md compares the figures with
measurements and published runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from model.command import count, positive
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from train.distributed.devices import device_type, processes_here
from train.plan.accelerators import NAMES, identify
from train.plan.estimate import Options, Plan, make_plan
from train.preset import load

Row = tuple[str, str, str]  # name, value, note

PARTS = {
    "weights": "float32",
    "gradients": "float32, in DDP's buckets",
    "optimizer": "moments, float32",
    "copies": "the blocks' weights in 16 bits",
    "activations": "kept for the backward pass",
    "work": "head and loss, or the gradients of a block",
    "reserve": "CUDA, cuBLAS, NCCL: assumed",
}


def main(argv: Sequence[str] = ()) -> None:
    """Print the plan of `params.yaml` on the hardware named by the flags."""
    args = vars(_parser().parse_args(argv))
    preset, as_json = args.pop("preset"), args.pop("json")
    options = {name: value for name, value in args.items() if value is not None}
    if options.get("hardware", "cpu") == "cpu":
        options = _this_machine(options.get("hardware")) | options
    plan = make_plan(load(preset), Options(**options))
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        print(table(plan, preset))


def _this_machine(hardware: str | None) -> dict[str, Any]:
    """Return the options of a plan for this machine, as `train.launch` would use it.

    Raises:
        UserError: Its GPU is not in the table of `accelerators`.
    """
    machine = Machine.load()
    kind = "cpu" if hardware == "cpu" else device_type(machine.device)
    if kind == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        hardware = identify(gpu.name, gpu.total_memory)
        if hardware is None:
            raise UserError(
                f"--hardware: this machine's {gpu.name} is not in the table; name the nearest of "
                f"{', '.join(NAMES)}, and measure its MFU with python -m train.bench (--mfu)"
            )
    return {
        "hardware": hardware or "cpu",
        "gpus": processes_here(machine, kind),
        "micro_batch": machine.micro_batch,
        "checkpoint_activations": machine.checkpoint_activations,
        "overlap": machine.overlap,
        "loss_chunk": machine.loss_chunk,
    }


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m train.plan",
        description="Compute memory, time, price and disk of the run in params.yaml; run nothing.",
    )
    add = parser.add_argument
    add("--preset", metavar="NAME", help="merge this preset; params.yaml itself stays unchanged")
    known = f"{', '.join(NAMES)}; default: this machine, with the settings of machine.yaml"
    add("--hardware", metavar="NAME", help=known)
    add("--nodes", type=count, metavar="N", help="number of nodes (default 1)")
    add(
        "--gpus",
        type=count,
        metavar="N",
        help="per node, processes on a CPU; default 8, on this machine as train.launch starts",
    )
    add("--interconnect", choices=("nvlink", "pcie"), help="link within a node; default: fastest")
    add("--network", type=positive, metavar="GBIT", help="bandwidth between nodes, Gbit/s per node")
    add(
        "--mfu",
        type=_fraction,
        metavar="X",
        help="of forward and backward, as python -m train.bench measures it",
    )
    add("--rate", type=positive, metavar="DOLLARS", help="price per GPU-hour; default: typical")
    add("--micro-batch", type=count, metavar="N", help="sequences; default: as training chooses")
    add("--checkpoint-activations", action="store_const", const=True, help="as in machine.yaml")
    add("--overlap", action="store_const", const=True, help="as in machine.yaml")
    add("--loss-chunk", type=count, metavar="N", help="tokens, as set in machine.yaml")
    add("--json", action="store_true", help="print JSON: bytes, seconds, FLOPs")
    return parser


def _fraction(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: not a fraction of the peak; use 0 to 1")
    return value


def table(plan: Plan, preset: str | None = None) -> str:
    """Return the plan as text."""
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
            "FLOPs per token",
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
    return [
        *rows,
        ("total", _gib(plan.memory.total), f"of {_gib(plan.available)} usable: {fits}"),
        (
            "micro-batch",
            str(plan.micro_batch),
            f"sequences; {plan.micro_steps} micro-steps per step",
        ),
        (
            "largest micro-batch",
            str(plan.largest_micro_batch or "none"),
            "that fits and divides the batch",
        ),
        ("loss chunks", str(plan.loss_chunks), f"per micro-step, of {plan.loss_chunk:,} tokens"),
    ]


def _time(plan: Plan) -> list[Row]:
    step = plan.step
    changed = f"{'of which ' if step.traffic > 0 else 'after saving '}{_ms(abs(step.traffic))}"
    traffic = f"{changed} by micro-batch and loss chunks" if step.traffic else ""
    peak = f"of {plan.peak / 1e12:,.3g} TFLOP/s"
    rows: list[Row] = [
        ("MFU", f"{plan.mfu:.0%}", f"{peak}; {plan.mfu_source}"),
        ("forward and backward", _ms(step.compute), traffic),
    ]
    if plan.world > 1:
        sent = f"{plan.all_reduce_bytes / 1e9:.2f} GB per device"
        rows.append(("exposed all-reduce", _ms(step.exposed), f"of {_ms(step.all_reduce)}; {sent}"))
    speed = f"{plan.tokens_per_second:,.0f} tokens/s per device, MFU {plan.step_mfu:.0%}"
    rows += [
        ("optimizer", _ms(step.optimizer), ""),
        ("step", _ms(step.total), speed),
        ("all steps", _hours(plan.training_seconds), f"{plan.steps:,}"),
        ("evaluation", _hours(plan.evaluation_seconds), "validation and HellaSwag"),
        ("train stage", _hours(plan.seconds), ""),
    ]
    if plan.dollars is not None:
        rate = f"{plan.world} x ${plan.rate:,.2f} per hour; {plan.rate_source}"
        rows.append(("price", f"${plan.dollars:,.2f}", rate))
    return rows


def _data(plan: Plan) -> list[Row]:
    epochs = f"{plan.epochs:.2f} epochs" if plan.epochs is not None else ""
    rows: list[Row] = [("training tokens", f"{plan.tokens:,}", epochs)]
    for name, share in plan.source_shares.items():
        found = plan.source_epochs[name]
        note = f"{found:.2f} epochs" if found is not None else "epochs unknown before download"
        rows.append((f"  {name}", f"{share:.1%}", note))
    if corpus := plan.corpus:
        files = f"{corpus.files} files, {corpus.documents:,.0f} documents"
        splits = f"{corpus.train_tokens:,.0f} training, {corpus.val_tokens:,.0f} validation tokens"
        rows += [
            ("parquet", _gb(corpus.raw_bytes), files),
            ("token shards", _gb(corpus.token_bytes), f"{corpus.shards:,} shards; {splits}"),
        ]
    else:
        rows.append(("text", "unknown", "before download"))
    return [
        *rows,
        ("checkpoint", _gb(plan.checkpoint_bytes), "weights and optimizer"),
        ("disk", _gb(plan.disk_bytes), "total, with all checkpoints that are kept"),
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
