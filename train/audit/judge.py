"""The verdict on a segment: equal, differs, or cannot judge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline import TokenStream
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from pipeline.store.code_key import code_key
from train.audit.replay import Job, prepare, replay
from train.audit.segments import Audited, Segment
from train.checkpoint import init_from
from train.checkpoint.chain import shards_hash
from train.numerics import environment
from train.params import ObservingParams, TrainParams

Answer = Literal["equal", "differs", "cannot judge"]

LOGGED_STEP = ("lr", "train/loss", "grad_norm")  # of a replayed step, in its order


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
        self._data = {"shards": shards_hash(data.manifest.shards)}
        self._damaged = next(_damaged_shards(data), None)
        self._code = code_key("train")

    def __call__(self, segment: Segment) -> Verdict:
        """Judge one segment."""
        parts = self.run.conditions(segment.first, segment.stop)
        if obstacles := list(dict.fromkeys(self._obstacles(segment, parts))):
            return Verdict(segment, "cannot judge", "; ".join(obstacles))
        begin = segment.begin
        with tempfile.TemporaryDirectory(prefix="audit-", dir=self._work) as folder:
            for number, (first, stop, conditions) in enumerate(parts):
                job = self._job(first, stop, conditions, Path(folder, str(number)))
                store = prepare(job, begin)
                world = conditions["arithmetic"].get("world_size", self._processes)
                found = replay(job, world)
                if wrong := self._wrong_number(first, stop, found):
                    return Verdict(segment, "differs", wrong)
                begin = store / f"step-{stop:08d}"
        for name, digest in self.run.link(segment.stop)["files"].items():
            if found["files"][name] != digest:
                return Verdict(segment, "differs", f"{name} after step {segment.stop}")
        return Verdict(segment, "equal")

    def _job(self, first: int, stop: int, conditions: dict[str, Any], work: Path) -> Job:
        work.mkdir()
        observed = self.run.state["train"]
        return Job(
            first=first,
            stop=stop,
            conditions=conditions,
            observed={n: observed[n] for n in ObservingParams.model_fields if n in observed},
            validations={
                record["step"]: record["val_tokens"]
                for record in self.run.records
                if "val/loss" in record and first < record["step"] <= stop
            },
            work_dir=str(work.absolute()),
        )

    def _obstacles(
        self, segment: Segment, parts: list[tuple[int, int, dict[str, Any]]]
    ) -> Iterator[str]:
        """Yield why this machine cannot compute the segment's bits."""
        if self._damaged:
            yield f"data/tokens/{self._damaged}: damaged here"
        for _, _, conditions in parts:
            kind = conditions["arithmetic"]["device"]
            if kind == "cuda" and not torch.cuda.is_available():
                yield "device: cuda in the run, none here"
                return
            device = torch.device(kind)
            if conditions["shards"] != self._data["shards"]:
                yield "data/tokens: other shards than in the run"
            if conditions["identity"]["code_key"] != self._code:
                yield f"code: {conditions['identity']['code_key'][:12]} in the run, " + (
                    f"{self._code[:12]} here"
                )
            then, now = conditions["environment"], environment(device)
            for name in sorted({**then, **now}):
                if then.get(name) != now.get(name):
                    yield f"{name}: {then.get(name)} in the run, {now.get(name)} here"
        if segment.begin is None:
            yield from _start_obstacles(parts[0][2]["identity"])

    def _wrong_number(self, first: int, stop: int, found: dict[str, Any]) -> str | None:
        """Name the first number of the log that is another; bit for bit."""
        for record in self.run.records:
            step = record["step"]
            if not first < step <= stop:
                continue
            now = dict(zip(LOGGED_STEP, found["steps"][str(step)], strict=True))
            if "val/loss" in record:
                now["val/loss"] = found["validations"][str(step)]
            for name, value in now.items():
                if name in record and record[name] != value:
                    return f"{name} of step {step}: {record[name]} in the log, {value} here"
        return None


def _start_obstacles(identity: dict[str, Any]) -> Iterator[str]:
    """Yield why this machine lacks the weights that a run starts from."""
    try:
        start = TrainParams.model_validate({"val_tokens": 1, **identity["train"]}).start()
        found = init_from.content_key(start) if start else None
    except UserError as error:
        yield str(error)
        return
    if found != identity["starts_from"]:
        yield f"train.init: {identity['train']['init']} holds something else than in the run"


def _damaged_shards(data: TokenStream) -> Iterator[str]:
    """Yield the shards whose content is not that of the manifest."""
    for shard in data.manifest.shards:
        if atomic.sha256_file(data.folder / shard.name) != shard.sha256:
            yield shard.name
