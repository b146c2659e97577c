"""The verdict on a segment: equal, differs, or cannot judge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline import TokenStream
from pipeline.runtime.machine import usable_cores
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from train.audit.replay import LOGGED_STEP, Job, Replayed, prepare, replay
from train.audit.run_folder import Audited
from train.audit.segments import Segment
from train.checkpoint.chain import shards_hash
from train.monitor.history import SOURCE_LOSS
from train.numerics import environment

Answer = Literal["equal", "differs", "cannot judge"]
Parts = list[tuple[int, int, dict[str, Any]]]

MOST_PER_CORE = 8  # processes of a replay: more would only exhaust the memory


@dataclass(frozen=True)
class Verdict:
    """The answer for a segment, and what it rests on."""

    segment: Segment
    answer: Answer
    why: str = ""


class Judge:
    """Runs segments again on this machine.

    Args:
        run: A run whose chain has been checked.
        work: Folder for temporary stores.
        processes: Number of processes for runs whose bits do not depend on it.
    """

    def __init__(self, run: Audited, work: Path, processes: int = 1) -> None:
        self.run, self._work, self._processes = run, work, processes
        data = TokenStream("data/tokens", "train")
        self._shards = shards_hash(data.manifest.shards)
        self._dataset_key = data.manifest.dataset_key
        self._most_val_tokens = len(TokenStream("data/tokens", "val")) - 1
        self._damaged = next(_damaged_shards(data), None)
        self._code = code_key("train")

    def __call__(self, segment: Segment) -> Verdict:
        """Judge one segment."""
        parts = self.run.conditions(segment.first, segment.stop)
        if obstacles := list(dict.fromkeys(self._obstacles(segment, parts))):
            return Verdict(segment, "cannot judge", "; ".join(obstacles))
        for _, _, conditions in parts:
            # A function of the shards: `pipeline.verify` has checked that of this machine.
            if conditions["identity"]["dataset_key"] != self._dataset_key:
                return Verdict(segment, "differs", "dataset_key: not that of the run's shards")
        try:
            wrong = self._wrong(segment, parts)
        except (Exception, SystemExit) as error:
            # Whoever made the folder may have caused it, or this machine: no verdict.
            return Verdict(segment, "cannot judge", f"running it again failed: {error!r}")
        return Verdict(segment, "differs", wrong) if wrong else Verdict(segment, "equal")

    def _wrong(self, segment: Segment, parts: Parts) -> str | None:
        """Run the parts of a segment; name the first number or file that differs."""
        begin, files = segment.begin, segment.before["files"] if segment.before else {}
        with tempfile.TemporaryDirectory(prefix="audit-", dir=self._work) as folder:
            for number, (first, stop, conditions) in enumerate(parts):
                work = Path(folder, str(number))
                work.mkdir()
                job = Job(
                    first=first,
                    stop=stop,
                    conditions=conditions,
                    validations=self.run.validations(first, stop),
                    work_dir=str(work.absolute()),
                )
                store = prepare(job, begin, files)
                found = replay(job, self._world_size(conditions))
                if wrong := self._wrong_number(first, stop, found):
                    return wrong
                begin, files = store / f"step-{stop:08d}", found.files
        if found.samples != segment.link["samples"]:
            return f"samples after step {segment.stop}"
        for name, digest in segment.link["files"].items():
            if files[name] != digest:
                return f"{name} after step {segment.stop}"
        return None

    def _world_size(self, conditions: dict[str, Any]) -> int:
        """Number of processes that compute the bits of a part."""
        if conditions["identity"]["train"].get("invariant"):
            return self._processes
        return int(conditions["arithmetic"]["world_size"])

    def _obstacles(self, segment: Segment, parts: Parts) -> Iterator[str]:
        """Yield why this machine cannot compute the segment's bits."""
        if self._damaged:
            yield f"data/tokens/{self._damaged}: damaged here"
        if segment.missing:
            yield f"checkpoint missing: step {segment.first}"
        for first, stop, conditions in parts:
            if segment.before is None:
                yield from _start_obstacles(first, conditions["identity"])
            yield from self._condition_obstacles(conditions)
            if any(n > self._most_val_tokens for _, n in self.run.validations(first, stop)):
                yield f"val_tokens: more than the {self._most_val_tokens} of data/tokens"

    def _condition_obstacles(self, conditions: dict[str, Any]) -> Iterator[str]:
        identity, arithmetic = conditions["identity"], conditions["arithmetic"]
        kind, is_invariant = arithmetic["device"], bool(identity["train"].get("invariant"))
        if kind == "cuda" and not torch.cuda.is_available():
            yield "device: cuda in the run, none here"
            return
        if conditions["shards"] != self._shards:
            yield "data/tokens: other shards than in the run"
        if identity["code_key"] != self._code:
            yield f"code: {identity['code_key'][:12]} in the run, {self._code[:12]} here"
        then = conditions["environment"]
        now = environment(torch.device(kind), compiled=arithmetic["compile"])
        for name in sorted({**then, **now}):
            if then.get(name) != now.get(name):
                yield f"{name}: {then.get(name)} in the run, {now.get(name)} here"
        if identity["train"].get("dtype") == "float16":
            yield "train.dtype: float16: the scale of the loss is not in the chain"
        if kind == "cuda" and not is_invariant:
            yield "train.invariant: null: on CUDA, autotuning and NCCL decide the rounding as well"
        if not is_invariant and arithmetic.get("world_size") is None:
            yield "world_size: not in the chain"
            return
        n = self._world_size(conditions)
        most = torch.cuda.device_count() if kind == "cuda" else MOST_PER_CORE * usable_cores()
        if n > most:
            yield f"processes: {n}, this machine takes {most}"

    def _wrong_number(self, first: int, stop: int, found: Replayed) -> str | None:
        """Name the first number of the log that differs; bit for bit."""
        records = [record for record in self.run.records if first < record["step"] <= stop]
        for record in records:
            step = record["step"]
            now: dict[str, Any] = dict(zip(LOGGED_STEP, found.steps[step], strict=True))
            if "val/loss" in record:
                now |= found.validations[step, record["val_tokens"]]
            for name, value in record.items():
                is_compared = name in now or name.startswith(SOURCE_LOSS)
                if is_compared and value != now.get(name):
                    return f"{name} of step {step}: {value} in the log, {now.get(name)} here"
        skipped = {record["step"] for record in records if "skipped" in record}
        if differs := skipped ^ {step for step, row in found.steps.items() if None in row}:
            step = min(differs)
            return f"step {step}: skipped {'in the log' if step in skipped else 'here'} only"
        return None


def _start_obstacles(first: int, identity: dict[str, Any]) -> Iterator[str]:
    """Yield why this machine lacks the weights that a run starts from.

    No folder that the run names is read: whoever made the run chooses the name.
    """
    if identity["train"].get("init") != "scratch" or identity["starts_from"] is not None:
        yield "train.init: the first weights are not drawn from the seed"
    elif first:
        yield f"steps 1 to {first}: not in the chain"


def _damaged_shards(data: TokenStream) -> Iterator[str]:
    """Yield the shards whose content is not that of the manifest."""
    for shard in data.manifest.shards:
        if atomic.sha256_file(data.folder / shard.name) != shard.sha256:
            yield shard.name
