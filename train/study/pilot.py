"""The time of a step of each variant on this machine, for a budget of seconds.

A pilot is a short run of the variant, without validation, samples, tasks, and a growing batch. It
is compiled if a run as long as the budget is, and long enough for its time to be known.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from train.monitor import history
from train.study.definition import Study, path_of
from train.study.results import Results
from train.study.workspace import Diverged, Workspace

SECONDS = 2.0  # of steps that are measured, at least
FIRST_STEPS = 20
_MOST_STEPS = 20_000
_ATTEMPTS = 8
# Prints what `measured` needs of the run in the workspace; the argument is the budget.
_READ = "import sys; from train.study.pilot import describe; describe(float(sys.argv[1]))"


@dataclasses.dataclass(frozen=True)
class Pilot:
    """A short run."""

    seconds: float
    """Of the steps that were measured."""
    seconds_per_step: float
    compiled: bool
    compile: bool
    """Whether a run as long as the budget is compiled."""


def describe(budget: float) -> None:
    """Print the times of the run in the current directory, and whether it is compiled, as JSON."""
    from model.size import flops_per_token
    from train.distributed import compiler
    from train.distributed.devices import device_type
    from train.run import LOG, Run

    run, device = Run.open(), device_type(Run.open().machine.device)
    records = [r for r in history.parse(Path(LOG).read_bytes()) if "tokens_per_second" in r]
    # The first record has the time of compilation. The speed has more digits than the step's time.
    speeds = [record["tokens_per_second"] for record in records[1:]]
    speed = statistics.median(speeds)
    per_token = flops_per_token(run.model.config(), run.model.block_size)
    pilot = Pilot(
        seconds=records[-1]["seconds"] - records[0]["seconds"],
        seconds_per_step=run.params.batch_tokens / speed,
        compiled=run.compiles(device),
        compile=compiler.why_eager(run.machine.compile, device, per_token * speed * budget) is None,
    )
    print(json.dumps(dataclasses.asdict(pilot)))


def measure(study: Study, results: Results, space: Workspace, variant: str) -> None:
    """Measure the time of a variant's step, once per machine.

    Raises:
        UserError: The variant diverges.
    """
    key = study.speed_key(variant, results.speed_settings)
    if results.read("speed", key) is not None:
        return
    compile_, steps = results.machine.compile, FIRST_STEPS
    # A seed of its own: DVC may have a pilot of another machine.
    params = _quiet(study, variant, seed=int(atomic.sha256_json(results.speed_settings)[:7], 16))
    for _ in range(_ATTEMPTS):
        params["train"] |= {
            **dict.fromkeys(("steps", "val_every", "checkpoint_every"), steps),
            "log_every": max(1, steps // 10),
        }
        pilot = _run(study, space, variant, params, compile_)
        enough = pilot.seconds >= SECONDS or steps >= _MOST_STEPS
        if enough and pilot.compiled == pilot.compile:
            break
        compile_ = pilot.compile
        longer = steps * 1.3 * SECONDS / max(pilot.seconds, SECONDS / 10)
        # One that is repeated has another number of steps, or DVC would return the first.
        steps = steps + 1 if enough else min(_MOST_STEPS, max(steps + 1, math.ceil(longer)))
    record = {"steps": steps, **dataclasses.asdict(pilot), **results.speed_settings}
    results.write("speed", key, record)
    print(
        f"{variant}: {pilot.seconds_per_step:.3g} s per step, measured over {steps} steps"
        f"{', compiled' if pilot.compiled else ''}",
        flush=True,
    )


def _quiet(study: Study, variant: str, seed: int) -> dict[str, dict[str, Any]]:
    """Return the parameters of a run of steps alone."""
    params = study.variants[variant]
    quiet = {"warmup_steps": 0, "batch_doublings": 0, "batch_ramp_steps": 0, "sample_tokens": 0}
    tasks = {"val_tokens": 1, "keep_every": None, "hellaswag": None, "hellaswag_every": None}
    return {**params, "train": {**params["train"], **quiet, **tasks, "seed": seed}}


def _run(
    study: Study,
    space: Workspace,
    variant: str,
    params: dict[str, dict[str, Any]],
    compile_: bool | None,
) -> Pilot:
    setting = compile_setting(compile_)
    try:
        space.reproduce(params, "train", f"variant {variant}", setting)
    except Diverged as error:
        raise UserError(f"{path_of(study.name)}: variants.{variant}: {error}; change it") from None
    output = space.python(_READ, str(study.file.budget.seconds), environment=setting)
    return Pilot(**json.loads(output.splitlines()[-1]))


def compile_setting(compile_: bool | None) -> dict[str, str]:
    """Return the environment of a run that is compiled, is not, or decides itself (None)."""
    return {} if compile_ is None else {"GPT2_COMPILE": str(compile_).lower()}
