"""A run's chain and files, checked against each other, and the segments between its checkpoints.

    chain in the newest state.json      links recomputed; head against the pinned one
    log.jsonl                           its numbers against the hash in each link
    step-*/                             files against the hashes in the links, chains against it
    run.json, the folder's name         against the run's identity in the chain

Nothing is executed. A segment lies between two checkpoints that are kept, or the start and the
first: `train.keep_every` decides how many there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from train.checkpoint import directory
from train.checkpoint.chain import HASH, Chain, Link, conditions_hash, link_hash, log_hash
from train.monitor.history import Record, parse
from train.run import FINAL, RECORD


@dataclass(frozen=True)
class Segment:
    """Steps first + 1 to ``stop`` of a run; ``begin`` is the checkpoint, None: the start."""

    first: int
    stop: int
    begin: Path | None
    end: Path


@dataclass(frozen=True)
class Audited:
    """A run's folder, read once.

    Attributes:
        state: Of the newest checkpoint.
        kept: Checkpoints by step.
        records: The log; damaged lines are left out, and so missed by the chain.
    """

    folder: Path
    state: dict[str, Any]
    chain: Chain
    kept: dict[int, Path]
    records: list[Record]

    @classmethod
    def open(cls, folder: Path) -> Audited:
        """Read a run.

        Raises:
            UserError: It has no checkpoint with a chain that can be read.
        """
        kept = {directory.step_of(path): path for path in directory.checkpoints(folder)}
        if not kept:
            raise UserError(f"{folder}: has no checkpoint; name a run's folder, .work/runs/KEY")
        newest = kept[max(kept)]
        try:
            state = directory.read_state(newest)
            log = atomic.read_bytes(folder / "log.jsonl")
        except (directory.BrokenCheckpoint, OSError) as error:
            raise UserError(f"{newest}: cannot be read ({error}); restore the run") from None
        chain = Chain.of(state)
        if not chain.links:
            raise UserError(f"{newest / directory.STATE}: no chain; earlier code wrote this run")
        return cls(folder, state, chain, kept, parse(log))

    def segments(self) -> list[Segment]:
        """The segments, oldest first."""
        steps = [step for step in sorted(self.kept) if step in {k["step"] for k in self.links}]
        start = [self.chain.start] if self.chain.start not in steps else []
        ends = [*start, *steps]
        return [Segment(a, b, self.kept.get(a), self.kept[b]) for a, b in pairwise(ends)]

    @property
    def links(self) -> list[Link]:
        """Links of the chain, oldest first."""
        return self.chain.links

    def link(self, step: int) -> Link:
        """The link of a checkpoint."""
        return next(link for link in self.links if link["step"] == step)

    def conditions(self, first: int, stop: int) -> list[tuple[int, int, dict[str, Any]]]:
        """Parts (first, stop, conditions) of some steps, in each of which the conditions held."""
        entries = self.chain.conditions
        ends = [part["since"] for part in entries[1:]] + [stop]
        spans = [
            (max(first, part["since"]), min(stop, end), part)
            for part, end in zip(entries, ends, strict=True)
        ]
        return [(a, b, part) for a, b, part in spans if a < b]


def problems(run: Audited, head: str | None) -> list[str]:
    """Check a run without executing anything; return what is wrong, in words."""
    try:
        return [*_chain_problems(run, head), *_file_problems(run)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"{run.folder}: the chain is no chain of this program ({error!r})"]


def _chain_problems(run: Audited, head: str | None) -> Iterator[str]:
    chain, before, first = run.chain, None, run.chain.start
    for link in chain.links:
        name = f"link of step {link['step']}"
        if link[HASH] != link_hash(link, before):
            yield f"{name}: its hash does not match its content"
        if link["first"] != first:
            yield f"{name}: begins after step {link['first']}, the one before ends at {first}"
        if link["conditions"] != conditions_hash(chain.conditions, link["step"]):
            yield f"{name}: made under other conditions than state.json has"
        if link["log"] != log_hash(run.records, link["first"], link["step"]):
            yield f"{name}: log.jsonl has other numbers in its steps"
        before, first = link[HASH], link["step"]
    if head is not None and chain.head != head:
        yield f"head: {chain.head}, but --head is {head}"
    final = run.folder / FINAL
    if final.exists() and atomic.read_sealed(final).get("chain", chain.head) != chain.head:
        yield f"{FINAL}: another head than in the newest checkpoint"
    identity = chain.conditions[-1]["identity"]
    if atomic.sha256_json(identity) != run.folder.name:
        yield f"{run.folder.name}: is not the key of the run in the chain"
    try:
        record = atomic.read_sealed(run.folder / RECORD)
        if {name: record.get(name) for name in identity} != identity:
            yield f"{RECORD}: another run than in the chain"
    except (OSError, ValueError) as error:
        yield f"{RECORD}: {error}"


def _file_problems(run: Audited) -> Iterator[str]:
    by_step = {link["step"]: number for number, link in enumerate(run.links)}
    validated = {r["step"]: r["val/loss"] for r in run.records if "val/loss" in r}
    for step, folder in run.kept.items():
        if step not in by_step:
            continue  # caused by a signal: no link builds on it
        try:
            state = directory.verify(folder)
        except directory.BrokenCheckpoint as error:
            yield str(error)
            continue
        links = run.links[: by_step[step] + 1]
        if state["chain"]["links"] != links:
            yield f"{folder.name}: its chain is not the beginning of the newest one"
        if state["sha256"] != links[-1]["files"]:
            yield f"{folder.name}: its weights or optimizer state are not those of its link"
        if (state["step"], state["samples"]) != (step, links[-1]["samples"]):
            yield f"{folder.name}: its step or samples are not those of its link"
        if state.get("val_loss") not in (None, validated.get(step)):
            yield f"{folder.name}: its validation loss is not that of the log"


def draw(count: int, wanted: int, seed: str) -> list[int]:
    """Draw ``wanted`` of ``count`` segments, in order.

    They are those with the smallest sha256 of "seed:number", which anyone can recompute.
    """

    def place(number: int) -> str:
        return hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()

    return sorted(sorted(range(count), key=place)[:wanted])


def chance(segments: int, forged: int, drawn: int) -> float:
    """Probability that at least one of the forged segments is drawn."""
    return 1 - comb(segments - forged, drawn) / comb(segments, drawn)


def chances(segments: int, drawn: int) -> Sequence[tuple[int, float]]:
    """`chance` for one forged segment, and for a tenth of all, if that is more."""
    counts = sorted({1, max(1, segments // 10)})
    return [(forged, chance(segments, forged, drawn)) for forged in counts]
