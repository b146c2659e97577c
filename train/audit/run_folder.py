"""A run's folder that somebody else has made: its chain, its log and its checkpoints, read once.

Nothing in it is trusted. The types of the chain are checked here, what it says in checks.py, and
the files of a checkpoint where they are used. No other path of the folder is followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import AttentionKernel
from pipeline.runtime.params_file import first_error
from pipeline.store import atomic
from train.checkpoint import directory
from train.checkpoint.chain import Chain, Link
from train.monitor.history import Record, parse

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=0, lt=2**53)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class _Part(BaseModel):
    """A part of the chain: no other keys, no other types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class _Link(_Part):
    first: Number
    step: Number
    samples: Number
    log: Hash
    conditions: Hash
    stopped: Literal[True] = True
    files: dict[Literal["model.safetensors", "optimizer.safetensors"], Hash] = Field(min_length=2)
    link: Hash


class _Identity(_Part):
    model: dict[str, Any]  # checked where they are used: other code has other keys
    train: dict[str, Any]
    dataset_key: str
    code_key: str
    starts_from: str | None


class _Arithmetic(_Part):
    world_size: Count | None = None
    micro_batch: Count
    device: Literal["cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=4096)]
    loss_chunk: Count | None
    attention: AttentionKernel | Literal["flex"] | None
    compile: bool
    overlap: bool


class _Conditions(_Part):
    since: Number
    identity: _Identity
    shards: Hash
    arithmetic: _Arithmetic
    environment: dict[str, str]


class _Chain(_Part):
    start: Number
    links: list[_Link] = Field(min_length=1)
    conditions: list[_Conditions] = Field(min_length=1)


class _State(BaseModel):
    """Of `state.json` the chain only."""

    chain: _Chain


@dataclass(frozen=True)
class Audited:
    """A run's folder, read once; the chain has its types, but need not be true.

    Attributes:
        chain: Of the newest checkpoint.
        kept: Checkpoints by step.
        records: The log; damaged lines are left out, and so missed by the chain.
    """

    folder: Path
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
            log = parse(atomic.read_bytes(folder / "log.jsonl"))
        except (directory.BrokenCheckpoint, OSError) as error:
            raise UserError(f"{folder}: cannot be read ({error}); restore the run") from None
        if not isinstance(state.get("chain", {}), dict) or not state.get("chain", {}).get("links"):
            raise UserError(f"{newest / directory.STATE}: no chain; earlier code wrote this run")
        try:
            _State.model_validate(state)
        except ValidationError as error:
            where = first_error(error, str(newest / directory.STATE), _Chain)
            raise UserError(f"{where}; this is no chain of this code") from None
        for record in log:
            n = record.get("val_tokens")
            if "val/loss" in record and not (type(n) is int and n >= 1):
                raise UserError(
                    f"{folder / 'log.jsonl'}: val_tokens of step {record['step']}: not a positive "
                    "number; restore the log"
                )
        return cls(folder, Chain.of(state), kept, log)

    @property
    def links(self) -> list[Link]:
        """Links of the chain, oldest first."""
        return self.chain.links

    @property
    def identity(self) -> dict[str, Any]:
        """What the run says it is, at its head."""
        found: dict[str, Any] = self.chain.conditions[-1]["identity"]
        return found

    @property
    def uncovered(self) -> int:
        """Steps before the chain that it says nothing about: earlier code trained them."""
        train = self.identity["train"]
        is_branch = train.get("init_with") == "all" and self.identity["starts_from"] is not None
        return 0 if is_branch else self.chain.start

    def conditions(self, first: int, stop: int) -> list[tuple[int, int, dict[str, Any]]]:
        """Parts (first, stop, conditions) of some steps, in each of which the conditions held."""
        entries = self.chain.conditions
        ends = [part["since"] for part in entries[1:]] + [stop]
        spans = [
            (max(first, part["since"]), min(stop, end), part)
            for part, end in zip(entries, ends, strict=True)
        ]
        return [(a, b, part) for a, b, part in spans if a < b]

    def changes(self) -> Iterator[tuple[int, str]]:
        """Yield each step at which the conditions changed, and how."""
        for before, after in pairwise(self.chain.conditions):
            was, now = _flat(before), _flat(after)
            names = sorted(name for name in {**was, **now} if was.get(name) != now.get(name))
            changes = (f"{name} {was.get(name)} -> {now.get(name)}" for name in names)
            yield after["since"], ", ".join(changes)

    def validations(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Step and `val_tokens` of the validations after some steps; each once."""
        found = {
            (record["step"], record["val_tokens"])
            for record in self.records
            if "val/loss" in record and first < record["step"] <= stop
        }
        return sorted(found)


def _flat(conditions: dict[str, Any]) -> dict[str, Any]:
    """Conditions by names such as arithmetic.threads, without the step since which they hold."""
    found: dict[str, Any] = {}
    for name, value in conditions.items():
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{part}".rstrip("."): inner for part, inner in parts.items()}
    del found["since"]
    return found
