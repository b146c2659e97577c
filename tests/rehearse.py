"""A dry run of the real run on this machine: `make rehearse` (`python -m tests.rehearse`).

It applies the preset `fineweb-10b` in a fresh clone in a temporary folder, then `one-gpu`, and
reduces the sizes in `SIZES`. All else, stages, code and parameters, is that of the real run. A
server on loopback (tests/support/hub.py) takes the hub's place and serves files in FineWeb's
layout.

    data       download, tokenize and verify on Ray: 15 files, one with too large row groups
    full       GPT-2 124M in 4 processes: killed (SIGKILL) after a checkpoint, resumed, evaluated,
               exported, reported
    shallow    two layers in 8 processes: the same; the weights equal those of a run never stopped
    compiled   GPT-2 124M in one compiled process: the losses of the 4 processes
    one-gpu    the preset `one-gpu`, two layers in one process, with its own data: killed, resumed,
               the weights equal those of a run never stopped

It takes 25 minutes on 2 cores, 16 GB of free memory and 20 GB of disk; `--quick` has smaller sizes
and takes four minutes. The log and the report of each part are written to `rehearsal/`. Exit
status 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support import fineweb
from tests.support.clone import Clone, make_clone, stages_run
from tests.support.hub import Hub
from tests.support.repo import REPO
from tests.support.watched import run_watched
from train.preset import merge
from train.run_summary import commit

PRESET, ONE_GPU, ONE_HOUR = "fineweb-10b", "one-gpu", "one-hour"
DATA_STAGES = {"download", "curate", "tokenize", "verify"}
LATER_STAGES = {"evaluate", "export", "report"}

Overlay = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """The sizes of a rehearsal."""

    sizes: dict[str, Overlay]
    """Part -> parameters that differ from the preset; those of `every` are for all parts."""
    ranks: dict[str, int]
    """Part -> processes."""
    files: int
    """Files of FineWeb."""
    documents: int | None
    """Documents in all files, approximately; None: all that are available."""
    coarse: bool
    """Whether the last file has too large row groups."""
    tasks: int = 20
    """Tasks per benchmark."""


# The checks of each part count tasks, also of a preset that scores none.
TASKS = {"hellaswag": "hub", "lambada": "hub"}
SIZES: dict[str, Overlay] = {
    "every": {
        "train": {
            "steps": 6, "batch_tokens": 4096, "warmup_steps": 3, "val_every": 3, "val_tokens": 8192,
            "hellaswag": "hub", "hellaswag_every": 6, "checkpoint_every": 2, "log_every": 1,
            "sample_tokens": 16,
        },
        "evaluate": {**TASKS, "val_tokens": 8192, "samples": 1, "sample_tokens": 24},
    },
    "shallow": {
        "model": {"size": None, "n_layer": 2, "n_head": 12, "n_embd": 768},
        "train": {"steps": 4, "batch_tokens": 8192},
    },
    "compiled": {"train": {"steps": 4}},
    ONE_GPU: {
        "sources": {"main": {"files": 2}},
        "model": {"size": None, "n_layer": 2, "n_head": 12, "n_embd": 768},
        "train": {"steps": 4},
    },
    ONE_HOUR: {"train": {"steps": 4}},
}  # fmt: skip
RANKS = {"compiled": 1, ONE_GPU: 1, ONE_HOUR: 1}
FULL = Scale(SIZES, {"full": 4, "shallow": 8, **RANKS}, 15, None, coarse=True)

QUICK_SIZES: dict[str, Overlay] = {
    "every": {
        "model": {"size": None, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64},
        "train": {
            "steps": 40, "batch_tokens": 256, "warmup_steps": 3, "val_every": 20,
            "val_tokens": 1024, "hellaswag": "hub", "hellaswag_every": 20, "checkpoint_every": 2,
            "log_every": 1, "sample_tokens": 16,
        },
        "evaluate": {**TASKS, "val_tokens": 1024, "samples": 1, "sample_tokens": 24},
    },
    "shallow": {"model": {"n_layer": 1}},
    "compiled": {"train": {"steps": 4}},
    ONE_GPU: {"sources": {"main": {"files": 2}}},
}  # fmt: skip
QUICK = Scale(QUICK_SIZES, {"full": 2, "shallow": 4, **RANKS}, 3, 5_000, coarse=False)


class Rehearsal:
    """Run and check the parts in a clone; write the log and the reports to ``out``."""

    def __init__(self, clone: Clone, out: Path, scale: Scale) -> None:
        self.clone, self.out, self.scale = clone, out, scale
        self.failures = 0
        self.table = [f"{'part':10} {'seconds':>8} {'peak memory':>12}"]
        self._file = open(out / "log.txt", "w", encoding="utf-8")
        self._peak = 0
        self.params = clone.folder / "params.yaml"
        self.log(f"commit {commit()}, in {clone.folder}")
        self.apply(PRESET)

    def apply(self, preset: str) -> None:
        """Apply a preset, with the sizes of `every`."""
        self.log(f"preset {preset}")
        self.clone.run(sys.executable, "-m", "train.preset", preset)
        self._preset = self.params.read_text()
        self._base = self._resized(self._preset, "every")

    def log(self, line: str) -> None:
        """Print a line and write it to the log."""
        print(line, flush=True)
        print(line, file=self._file, flush=True)

    def check(self, claim: str, holds: bool) -> None:
        """Log whether a claim holds; count it as a failure if not."""
        self.failures += not holds
        self.log(f"  {'ok    ' if holds else 'FAILED'} {claim}")

    def part(self, name: str, run: Callable[[], object]) -> None:
        """Run a part with its sizes; record its time and peak memory, and keep its report."""
        self.log(f"\n{name}")
        self.params.write_text(self._resized(self._base, name))
        self._peak, begin = 0, time.monotonic()
        run()
        seconds = time.monotonic() - begin
        self.table.append(f"{name:10} {seconds:8.0f} {self._peak / 1e9:9.1f} GB")
        if (report := self.clone.folder / "artifacts/report.html").exists():
            shutil.copyfile(report, self.out / f"{name}.html")

    def _resized(self, params: str, part: str) -> str:
        """Merge the sizes of a part into the text of params.yaml, and log them."""
        preset = YAML(typ="safe", pure=True).load(self._preset)
        overlay = self.scale.sizes.get(part, {})
        for section, values in overlay.items():
            for key, value in values.items():
                self.log(f"  size   {section}.{key}: {preset[section][key]} -> {value}")
        return merge(params, overlay)

    def run(
        self, *command: str, env: dict[str, str], until: Callable[[], bool] | None = None
    ) -> str:
        """Run a command in the clone and return its output; kill it when ``until`` is true."""
        self.log(f"  run    {' '.join([*(f'{k}={v}' for k, v in env.items()), *command])}")
        result = run_watched(command, self.clone.folder, self.clone.env | env, until)
        print(result.output, file=self._file, flush=True)
        self._peak = max(self._peak, result.peak)
        if until is not None:
            self.check("killed before its end", result.killed)
        elif result.status != 0:
            self.check(f"exit status 0, not {result.status}: {result.output[-2000:]}", False)
            sys.exit(1)
        return result.output

    def json(self, path: str) -> dict[str, Any]:
        """Read a JSON file of the clone."""
        value: dict[str, Any] = json.loads((self.clone.folder / path).read_text())
        return value

    def losses(self) -> dict[int, float]:
        """Return step -> training loss from the finished run's log; check it has each step once."""
        records = records_of(self.clone.folder / "artifacts/log.jsonl")
        scored = [record["step"] for record in records if "val/hellaswag" in record]
        self.check(f"HellaSwag was scored during training, after steps {scored}", bool(scored))
        records = [record for record in records if "train/loss" in record]
        steps = [record["step"] for record in records]
        once = steps == list(range(1, len(steps) + 1))
        self.check(f"the log has each of the {len(steps)} steps once", once)
        return {record["step"]: record["train/loss"] for record in records}

    def data(self, hub: Hub, n_bytes: int) -> None:
        """Run the data stages on ``n_bytes`` of source files."""
        done = stages_run(self.run("dvc", "repro", "verify", env={}))
        self.check("download, curate, tokenize and verify ran", done == DATA_STAGES)
        raw, tokens = self.json("data/raw/manifest.json"), self.json("data/tokens/manifest.json")
        files = raw["files"]
        self.check(f"{len(files)} files were downloaded", len(files) == self.scale.files)
        cut = [file["path"] for file in files if file["origin"]]
        self.check(f"rewritten with smaller row groups: {cut}", len(cut) == self.scale.coarse)
        sent = sum(hub.sent().values())
        self.check(f"each byte was sent once: {sent:,}", sent == n_bytes)
        requests = {route: len(hub.asked(route)) for route in ("info", "tree", "resolve", "cdn")}
        totals = {split: facts["tokens"] for split, facts in tokens["totals"].items()}
        self.log(f"  facts  requests {requests}; tokens {totals} in {len(tokens['chunks'])} chunks")

    def kill_and_resume(self, part: str, uninterrupted: bool = False) -> dict[int, float]:
        """Train, kill, resume, evaluate, export, report; return step -> training loss.

        If ``uninterrupted``, train again without a kill and compare the bytes of the weights.
        """
        runs, env = self.clone.folder / ".work/runs", self._processes(part)
        before = set(runs.glob("*"))

        def saved() -> bool:
            return any(path for run in set(runs.glob("*")) - before for path in run.glob("step-*"))

        self.run("dvc", "repro", env=env, until=saved)
        (run,) = set(runs.glob("*")) - before
        last = max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))
        logged = records_of(run / "log.jsonl")
        output = self.run("dvc", "repro", env=env)
        self.check(f"resumes after step {last}", f"resumes after step {last}" in output)
        stages = stages_run(output)
        self.check(f"only {sorted(stages)} ran", stages == {"train", *LATER_STAGES})
        losses = self.losses()
        kept = {
            r["step"]: r["train/loss"] for r in logged if "train/loss" in r and r["step"] <= last
        }
        unchanged = kept.items() <= losses.items() and len(kept) == last
        self.check(f"the {last} losses logged up to that step are unchanged", unchanged)
        self._check_later_stages(losses)
        if uninterrupted:
            weights = self.clone.hashes("artifacts/checkpoint")["model.safetensors"]
            self.run("dvc", "repro", "-fs", "train", env=env | {"GPT2_FRESH": "1"})
            again = self.clone.hashes("artifacts/checkpoint")["model.safetensors"]
            self.check("the weights are the bytes of a run never stopped", weights == again)
        return losses

    def compiled(self, others: dict[int, float]) -> None:
        """Run one compiled process; compare its losses with those of more processes."""
        env = self._processes("compiled") | {"GPT2_COMPILE": "1"}
        self.check("the model is compiled", "compile on" in self.run("dvc", "repro", env=env))
        losses = self.losses()
        # The schedules are the same up to the end of the warm-up.
        warmup = self.scale.sizes["every"]["train"]["warmup_steps"]
        apart = max(abs(losses[step] - others[step]) for step in range(1, warmup + 1))
        self.check(f"losses of the warm-up differ by {apart:.4f} at most", apart < 0.01)
        self._check_later_stages(losses)

    def _check_later_stages(self, losses: dict[int, float]) -> None:
        """Check the outs of the stages after training."""
        trained, measured = (self.json(f"artifacts/{n}.json") for n in ("training", "evaluation"))
        path = " ".join(f"{loss:.4f}" for loss in [*losses.values()][:6])
        self.log(f"  facts  losses {path} ...; {trained['tokens_per_second']:,.0f} tokens/s")
        apart = abs(trained["val_loss"] - measured["val_loss"])
        self.check(f"evaluation and training losses differ by {apart:.5f}", apart < 2e-3)
        tasks = (measured.get("hellaswag_tasks"), measured.get("lambada_tasks"))
        self.check(f"HellaSwag and LAMBADA tasks scored: {tasks}", tasks == (self.scale.tasks,) * 2)
        exported = {path.name for path in (self.clone.folder / "artifacts/hf").iterdir()}
        self.check("the export has its files", {"config.json", "model.safetensors"} <= exported)

    def _processes(self, part: str) -> dict[str, str]:
        return {"GPT2_PROCESSES": str(self.scale.ranks[part])}


def records_of(log: Path) -> list[dict[str, Any]]:
    """Read the lines of a training log."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def rehearse(folder: Path, out: Path, scale: Scale) -> int:
    """Run all parts in a clone in ``folder``; return the number of failed checks."""
    out.mkdir(parents=True, exist_ok=True)
    with Hub() as hub:
        n_bytes = fineweb.serve(
            hub, scale.files, scale.documents, coarse=scale.coarse, tasks=scale.tasks
        )
        clone = make_clone(folder / "clone", PRESET)
        clone.env |= {"HF_ENDPOINT": hub.endpoint, "GPT2_DEVICE": "cpu", "GPT2_COMPILE": "0"}
        rehearsal = Rehearsal(clone, out, scale)
        rehearsal.log(f"  size   {scale.files} files of {n_bytes / 1e6:.0f} MB")
        rehearsal.part("data", lambda: rehearsal.data(hub, n_bytes))
        losses: dict[int, float] = {}
        rehearsal.part("full", lambda: losses.update(rehearsal.kill_and_resume("full")))
        rehearsal.part("shallow", lambda: rehearsal.kill_and_resume("shallow", uninterrupted=True))
        rehearsal.part("compiled", lambda: rehearsal.compiled(losses))
        for preset in (ONE_GPU, ONE_HOUR):
            rehearsal.apply(preset)
            rehearsal.part(preset, partial(rehearsal.kill_and_resume, preset, uninterrupted=True))
        failures = rehearsal.failures
        rehearsal.log("\n" + "\n".join(rehearsal.table))
        rehearsal.log(f"{failures} checks failed" if failures else "all checks passed")
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    """Do a dry run of the real run in small sizes."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearse", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes: four minutes")
    parser.add_argument(
        "--out", type=Path, default=REPO / "rehearsal", help="folder of the log and the reports"
    )
    args = parser.parse_args(argv)
    for name in list(os.environ):  # this machine's settings must not apply
        if name.startswith(("GPT2_", "DVC_", "RAY_", "HF_")):
            del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        failures = rehearse(Path(folder), args.out.absolute(), QUICK if args.quick else FULL)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
