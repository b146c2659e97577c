"""Runs with a segment that was forged before the head was pinned, so that the chain is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pipeline.store import atomic
from tests.support.training import Project, train_here
from train.checkpoint import chain, directory
from train.data.loader import Batches, MicroBatch
from train.invariant import InvariantTrainer
from train.monitor import history

KINDS = ("weight bit", "document", "rate", "skipped step", "swapped checkpoint", "edited loss")
EDITS = (
    "log", "record", "summary", "link", "condition", "order", "weights", "swap", "shorten"
)  # fmt: skip
SEGMENT = 2  # steps
TRAIN: dict[str, Any] = {
    "invariant": 2, "batch_tokens": 8 * 16, "steps": 8, "checkpoint_every": SEGMENT,
    "keep_every": SEGMENT, "val_every": 4, "log_every": 1, "sample_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Forgery:
    """What is forged, in which segment, and a seed for the place within it."""

    kind: str
    segment: int
    seed: int

    @property
    def found_in(self) -> set[int]:
        """Segments that differ: a swapped checkpoint also begins the next one."""
        both = self.kind == "swapped checkpoint" and self.end < TRAIN["steps"]
        return {self.segment, self.segment + both}

    @property
    def end(self) -> int:
        """Step after which the segment ends."""
        return (self.segment + 1) * SEGMENT


class _OtherDocument:
    """Batches in which one window is another."""

    def __init__(self, batches: Batches, shift: int) -> None:
        self._batches, self._shift, self._first = batches, shift, True

    def __next__(self) -> MicroBatch:
        batch = next(self._batches)
        if self._first:
            self._first = False
            batch.inputs[0] = (batch.inputs[0] + self._shift) % 200
        return batch


@contextmanager
def forging(forgery: Forgery) -> Iterator[None]:
    """Have the trainer forge."""
    rng, original = Random(forgery.seed), InvariantTrainer.step
    at = forgery.end - SEGMENT + rng.randrange(SEGMENT)  # the step, from 0
    save = InvariantTrainer.save

    def step(self: InvariantTrainer, number: int, batches: Any, interrupt: Any) -> Any:
        if number != at or forgery.kind in ("weight bit", "swapped checkpoint"):
            return original(self, number, batches, interrupt)
        if forgery.kind == "document":
            batches = _OtherDocument(batches, rng.randrange(1, 200))
        if forgery.kind == "rate":
            honest = self.schedule
            vars(self)["schedule"] = lambda step: 1.01 * honest(step)
            _, numbers = original(self, number, batches, interrupt)
            self.schedule = honest
            return honest(number), numbers  # the log has the rate that it should have
        if forgery.kind == "skipped step":
            before = {name: tensor.clone() for name, tensor in self.gpt.state_dict().items()}
            found = original(self, number, batches, interrupt)
            self.gpt.load_state_dict(before)
            return found
        rate, numbers = original(self, number, batches, interrupt)
        if forgery.kind == "edited loss":
            numbers[0] = torch.nextafter(numbers[0], torch.tensor(0.0))
        return rate, numbers

    def save_forged(self: InvariantTrainer, step: int) -> None:
        if step != forgery.end or forgery.kind not in ("weight bit", "swapped checkpoint"):
            save(self, step)
            return
        honest = {name: tensor.clone() for name, tensor in self.gpt.state_dict().items()}
        name = rng.choice(sorted(honest))
        if forgery.kind == "weight bit":
            bits = self.gpt.state_dict()[name].view(torch.int32).view(-1)
            bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(20)
            save(self, step)  # and training continues from it
            return
        for tensor in self.gpt.state_dict().values():
            tensor.mul_(0.999)
        save(self, step)
        self.writer.wait()
        self.gpt.load_state_dict(honest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InvariantTrainer, "step", step)
        patch.setattr(InvariantTrainer, "save", save_forged)
        yield


def forge(project: Project, honest: Path, forgery: Forgery) -> Path:
    """Continue an honest run from before the forged segment; return the folder of the result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_WORK_DIR", "forged")
        shutil.rmtree(project.folder / "forged", ignore_errors=True)
        folder = project.folder / "forged/runs" / honest.name
        shutil.copytree(honest, folder)
        (folder / "final.json").unlink()
        for path in directory.checkpoints(folder):
            if directory.step_of(path) > forgery.end - SEGMENT:
                shutil.rmtree(path)
        with forging(forgery):
            train_here()
    return folder


def edit(folder: Path, rng: Random) -> str:
    """Edit a finished run after its head was pinned, with every hash made to match again.

    Returns:
        What was edited.
    """
    checkpoints = directory.checkpoints(folder)
    what = rng.choice(EDITS)
    newest = checkpoints[-1] / directory.STATE
    state = atomic.read_sealed(newest)
    found = chain.Chain.of(state)
    if what == "log":
        path = folder / "log.jsonl"
        records = history.parse(path.read_bytes())
        numbers = ("train/loss", "grad_norm", "lr", "val/loss")
        record, name = rng.choice([(r, n) for r in records for n in numbers if n in r])
        record[name] *= 1 + 1e-7
        path.write_text("".join(history._line(record) for record in records))
    elif what == "record":
        path = folder / "log.jsonl"
        records = history.parse(path.read_bytes())
        if rng.random() < 0.5:
            del records[rng.randrange(len(records))]
        else:
            records.append({"step": rng.randrange(12), "train/loss": rng.random()})
        path.write_text("".join(history._line(record) for record in records))
    elif what == "summary":
        summary = atomic.read_sealed(folder / "final.json")
        summary[rng.choice(["loss", "val_loss", "best_val_loss"])] *= 1 - 1e-7
        atomic.write_json(folder / "final.json", atomic.sealed(summary))
    elif what in ("link", "condition", "order"):
        if what == "link":
            link = rng.choice(found.links)
            link[rng.choice(["samples", "step", "first"])] += 1
        elif what == "condition":
            identity = found.conditions[0]["identity"]
            identity["train"]["learning_rate"] *= 1.01
        else:
            del found.links[rng.randrange(len(found.links))]
    elif what == "weights":
        _flip(rng.choice(checkpoints) / directory.MODEL, rng)
    elif what == "swap":
        a, b = rng.sample(checkpoints, 2)
        a.rename(folder / "other")
        b.rename(a)
        (folder / "other").rename(b)
    else:
        shutil.rmtree(checkpoints[-1])
    if what in ("log", "record", "link", "condition", "order", "weights") and rng.random() < 0.5:
        match_again(folder, found)
        what += ", all hashes made to match"
    elif what in ("link", "condition", "order"):
        state["chain"] = found.as_json()
        atomic.write_json(newest, atomic.sealed(state))
    return what


def _flip(path: Path, rng: Random) -> None:
    data = bytearray(path.read_bytes())
    data[-1 - rng.randrange(1000)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def match_again(folder: Path, found: chain.Chain) -> None:
    """Recompute all hashes of a run: only the head gives it away."""
    records, before = history.parse((folder / "log.jsonl").read_bytes()), None
    by_step = {directory.step_of(path): path for path in directory.checkpoints(folder)}
    for number, link in enumerate(found.links):
        link["log"] = chain.log_hash(records, link["first"], link["step"])
        link["conditions"] = chain.conditions_hash(found.conditions, link["step"])
        path = by_step.get(link["step"])
        if link is found.links[-1]:
            path = by_step[max(by_step)]
        if path is not None:
            names = (directory.MODEL, directory.OPTIMIZER)
            link["files"] = {name: atomic.sha256_file(path / name) for name in names}
        link[chain.HASH] = chain.link_hash(link, before)
        before = link[chain.HASH]
        if path is not None:
            state = json.loads((path / directory.STATE).read_text())
            state.pop("json_sha256")
            state["sha256"] = link["files"]
            state["chain"] = {**found.as_json(), "links": found.links[: number + 1]}
            atomic.write_json(path / directory.STATE, atomic.sealed(state))
