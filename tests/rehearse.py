"""The real run, whole, in small, on this machine: `make rehearse` (`python -m tests.rehearse`).

The preset `fineweb-10b` is applied in a fresh clone, in a temporary folder; then what `SIZES` lists
is made smaller, and nothing else: the stages, their code and their parameters are those of the real
run. The hub is one on loopback (tests/support/hub.py) that serves files in FineWeb's layout.

    data       download, tokenize and verify, by Ray: 15 files, one of which is to be cut anew
    full       GPT-2 124M by 4 processes: SIGKILL to all after a checkpoint, resumed, evaluated,
               exported, reported
    shallow    two layers by 8 processes: the same, and the same bytes as of a run never stopped
    compiled   GPT-2 124M by one process, compiled: the losses of the 4

It takes 20 minutes on 2 cores, 16 GB of free memory and 20 GB of disk; `--quick` takes small sizes
and three minutes. The log, and the report of each part, are left in `rehearsal/`; status 1 where
something is not as it must be.
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
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support import fineweb
from tests.support.clone import Clone, make_clone, ran
from tests.support.hub import Hub
from tests.support.repo import REPO
from tests.support.watched import watch
from train.preset import merge
from train.run_summary import commit

PRESET = "fineweb-10b"
DATA_STAGES = {"download", "tokenize", "verify"}
LATER_STAGES = {"evaluate", "export", "report"}

Overlay = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """How much smaller than the real run a rehearsal is.

    Attributes:
        sizes: All that differs from the preset. A part has those of `every` and its own.
        ranks: Processes of each part.
        files: Of FineWeb; with more than 3, the last is coarse (tests/support/fineweb.py).
        documents: In them, about; None: all that are at hand.
        tasks: Of each benchmark.
    """

    sizes: dict[str, Overlay]
    ranks: dict[str, int]
    files: int
    documents: int | None
    tasks: int = 20


SIZES: dict[str, Overlay] = {
    "every": {
        "train": {
            "steps": 6, "batch_tokens": 4096, "warmup_steps": 3, "val_every": 3, "val_tokens": 8192,
            "hellaswag_every": 6, "checkpoint_every": 2, "log_every": 1, "sample_tokens": 16,
        },
        "evaluate": {"val_tokens": 8192, "samples": 1, "sample_tokens": 24},
    },
    "shallow": {
        "model": {"size": None, "n_layer": 2, "n_head": 12, "n_embd": 768},
        "train": {"steps": 4, "batch_tokens": 8192},
    },
    "compiled": {"train": {"steps": 4}},
}  # fmt: skip
WHOLE = Scale(SIZES, {"full": 4, "shallow": 8, "compiled": 1}, files=15, documents=None)

QUICK_SIZES: dict[str, Overlay] = {
    "every": {
        "model": {"size": None, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64},
        "train": {
            "steps": 40, "batch_tokens": 256, "warmup_steps": 3, "val_every": 20,
            "val_tokens": 1024, "hellaswag_every": 20, "checkpoint_every": 2, "log_every": 1,
            "sample_tokens": 16,
        },
        "evaluate": {"val_tokens": 1024, "samples": 1, "sample_tokens": 24},
    },
    "shallow": {"model": {"n_layer": 1}},
    "compiled": {"train": {"steps": 4}},
}  # fmt: skip
QUICK = Scale(QUICK_SIZES, {"full": 2, "shallow": 4, "compiled": 1}, files=3, documents=5_000)


class Rehearsal:
    """The clone, what runs in it, and what was found.

    Args:
        clone: With the preset applied.
        out: Folder of the log and the reports.
        scale: Of the parts.
    """

    def __init__(self, clone: Clone, out: Path, scale: Scale) -> None:
        self.clone, self.out, self.scale = clone, out, scale
        self.failures = 0
        self.table = [f"{'part':10} {'seconds':>8} {'peak memory':>12}"]
        self._log = open(out / "log.txt", "w", encoding="utf-8")
        self._peak = 0
        self.params = clone.folder / "params.yaml"
        self._preset = self.params.read_text()
        self.say(f"preset {PRESET}, commit {commit()}, in {clone.folder}")
        self._everywhere = merge(self._preset, self._told(scale.sizes["every"]))

    def say(self, line: str) -> None:
        """Print a line, and log it."""
        print(line, flush=True)
        print(line, file=self._log, flush=True)

    def check(self, claim: str, holds: bool) -> None:
        """Say whether something is as it must be."""
        self.failures += not holds
        self.say(f"  {'ok    ' if holds else 'FAILED'} {claim}")

    def part(self, name: str, play: Callable[[], object]) -> None:
        """Play a part with its sizes; note its time, its memory, and its report."""
        self.say(f"\n{name}")
        self.params.write_text(merge(self._everywhere, self._told(self.scale.sizes.get(name, {}))))
        self._peak, began = 0, time.monotonic()
        play()
        seconds = time.monotonic() - began
        self.table.append(f"{name:10} {seconds:8.0f} {self._peak / 1e9:9.1f} GB")
        if (report := self.clone.folder / "artifacts/report.html").exists():
            shutil.copyfile(report, self.out / f"{name}.html")

    def _told(self, overlay: Overlay) -> Overlay:
        """The overlay, after saying what it makes smaller."""
        preset = YAML(typ="safe", pure=True).load(self._preset)
        for section, values in overlay.items():
            for key, value in values.items():
                self.say(f"  size   {section}.{key}: {preset[section][key]} -> {value}")
        return overlay

    def run(
        self, *command: str, env: dict[str, str], until: Callable[[], bool] | None = None
    ) -> str:
        """Run a command in the clone; what it said.

        Args:
            until: When this comes true, SIGKILL meets the command and all that it has started.
        """
        self.say(f"  run    {' '.join([*(f'{k}={v}' for k, v in env.items()), *command])}")
        seen = watch(command, self.clone.folder, self.clone.env | env, until)
        print(seen.output, file=self._log, flush=True)
        self._peak = max(self._peak, seen.peak)
        if until is not None:
            self.check("was killed before it ended", seen.killed)
        elif seen.status != 0:
            self.check(f"ends with status 0, not {seen.status}: {seen.output[-2000:]}", False)
            sys.exit(1)
        return seen.output

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file of the clone."""
        value: dict[str, Any] = json.loads((self.clone.folder / path).read_text())
        return value

    def losses(self) -> dict[int, float]:
        """Step: training loss, as the finished run's log has them; a step logged twice shows."""
        lines = (self.clone.folder / "artifacts/log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        asked = [record["step"] for record in records if "val/hellaswag" in record]
        self.check(f"HellaSwag was asked while it trained, after steps {asked}", bool(asked))
        records = [record for record in records if "train/loss" in record]
        steps = [record["step"] for record in records]
        once = steps == list(range(1, len(steps) + 1))
        self.check(f"the log has each of {len(steps)} steps once", once)
        return {record["step"]: record["train/loss"] for record in records}


def data(show: Rehearsal, hub: Hub, n_bytes: int) -> None:
    """The data stages."""
    done = ran(show.run("dvc", "repro", "verify", env={}))
    show.check("download, tokenize and verify ran", done == DATA_STAGES)
    raw, tokens = show.json("data/raw/manifest.json"), show.json("data/tokens/manifest.json")
    show.check(f"{len(raw['files'])} files came", len(raw["files"]) == show.scale.files)
    cut = [file["path"] for file in raw["files"] if file["origin"]]
    show.check(f"cut into small row groups: {cut}", len(cut) == _has_coarse(show.scale))
    sent = sum(hub.sent().values())
    show.check(f"each byte was sent once: {sent:,}", sent == n_bytes)
    asked = {route: len(hub.asked(route)) for route in ("info", "tree", "resolve", "cdn")}
    totals = {split: facts["tokens"] for split, facts in tokens["totals"].items()}
    show.say(f"  facts  requests {asked}; tokens {totals} in {len(tokens['chunks'])} chunks")


def killed_and_resumed(show: Rehearsal, name: str, twin: bool = False) -> dict[int, float]:
    """Train, kill, resume, evaluate, export, report; the losses.

    Args:
        twin: Train once more, never stopped: the weights must be the same bytes.
    """
    runs, env = show.clone.folder / ".work/runs", {"GPT2_PROCESSES": str(show.scale.ranks[name])}
    before = set(runs.glob("*"))

    def saved() -> bool:
        return any(path for run in set(runs.glob("*")) - before for path in run.glob("step-*"))

    show.run("dvc", "repro", env=env, until=saved)
    (run,) = set(runs.glob("*")) - before
    last = max(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    output = show.run("dvc", "repro", env=env)
    show.check(f"resumes after step {last}", f"resumes after step {last}" in output)
    stages = ran(output)
    show.check(f"{', '.join(sorted(stages))} ran, no other", stages == {"train", *LATER_STAGES})
    losses = show.losses()
    kept = {r["step"]: r["train/loss"] for r in logged if "train/loss" in r and r["step"] <= last}
    stand = kept.items() <= losses.items() and len(kept) == last
    show.check(f"the {last} losses logged up to that step stand", stand)
    _results(show, losses)
    if twin:
        weights = show.clone.hashes("artifacts/checkpoint")["model.safetensors"]
        show.run("dvc", "repro", "-fs", "train", env=env | {"GPT2_FRESH": "1"})
        again = show.clone.hashes("artifacts/checkpoint")["model.safetensors"]
        show.check("the weights are those of a run never stopped, to the byte", weights == again)
    return losses


def compiled(show: Rehearsal, others: dict[int, float]) -> None:
    """One process, compiled, on the data of a part with more processes."""
    env = {"GPT2_PROCESSES": str(show.scale.ranks["compiled"]), "GPT2_COMPILE": "1"}
    show.check("it is compiled", "compile on" in show.run("dvc", "repro", env=env))
    losses = show.losses()
    same = range(1, show.scale.sizes["every"]["train"]["warmup_steps"] + 1)  # one schedule so far
    apart = max(abs(losses[step] - others[step]) for step in same)
    show.check(f"losses of the warm-up within {apart:.4f} of the other processes'", apart < 0.01)
    _results(show, losses)


def _results(show: Rehearsal, losses: dict[int, float]) -> None:
    """What the stages after training left."""
    trained, measured = show.json("metrics/train.json"), show.json("metrics/eval.json")
    path = " ".join(f"{loss:.4f}" for loss in [*losses.values()][:6])
    show.say(f"  facts  losses {path} ...; {trained['tokens_per_second']:,.0f} tokens/s")
    apart = abs(trained["val_loss"] - measured["val_loss"])
    show.check(f"evaluation measures training's loss, within {apart:.5f}", apart < 2e-3)
    tasks = (measured.get("hellaswag_tasks"), measured.get("lambada_tasks"))
    show.check(f"and at its end, with LAMBADA: {tasks}", tasks == (show.scale.tasks,) * 2)
    exported = {path.name for path in (show.clone.folder / "artifacts/hf").iterdir()}
    show.check("an export and a report", {"config.json", "model.safetensors"} <= exported)


def _has_coarse(scale: Scale) -> bool:
    return scale.files > 3


def rehearse(folder: Path, out: Path, scale: Scale) -> int:
    """All parts, in a clone below ``folder``; the number of failed checks."""
    out.mkdir(parents=True, exist_ok=True)
    with Hub() as hub:
        n_bytes = fineweb.serve(
            hub, scale.files, scale.documents, coarse=_has_coarse(scale), tasks=scale.tasks
        )
        clone = make_clone(folder / "clone", PRESET)
        clone.env |= {"HF_ENDPOINT": hub.endpoint, "GPT2_DEVICE": "cpu"}
        show = Rehearsal(clone, out, scale)
        show.say(f"  size   {scale.files} files of {n_bytes / 1e6:.0f} MB, {scale.tasks} tasks")
        show.part("data", lambda: data(show, hub, n_bytes))
        losses: dict[int, float] = {}
        show.part("full", lambda: losses.update(killed_and_resumed(show, "full")))
        show.part("shallow", lambda: killed_and_resumed(show, "shallow", twin=True))
        show.part("compiled", lambda: compiled(show, losses))
        show.say("\n" + "\n".join(show.table))
        show.say(f"{show.failures} checks failed" if show.failures else "all as it must be")
    return show.failures


def main(argv: Sequence[str] | None = None) -> None:
    """Rehearse in a temporary folder; status 1 where a check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearse", description="The real run, whole, in small."
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: three minutes")
    parser.add_argument("--out", type=Path, default=REPO / "rehearsal", help="log and reports")
    args = parser.parse_args(argv)
    for name in list(os.environ):  # what decides something here must decide nothing there
        if name.startswith(("GPT2_", "DVC_", "RAY_", "HF_")):
            del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        failures = rehearse(Path(folder), args.out.absolute(), QUICK if args.quick else WHOLE)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
