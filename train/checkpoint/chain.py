"""The chain of a run's checkpoints: each link commits to all that came before it.

    link = sha256( link before, step, samples, hashes of weights and optimizer state,
                   hash of the log since the link before, hash of the conditions so far )

    start ──► step 250 ──► step 500 ──► step 750     state.json of step 750 holds all three links

Conditions are what decided the bits of the steps: the identity of the run (parameters, dataset_key,
code_key), the hash of its shards, the split among processes, processor and versions; they are
stored in full, with the step since which they held. Whoever knows the head, the newest link, can
check the files without running anything, and each segment between two links by running it again
(train/audit/).

A checkpoint that a signal caused has a link, too, but the next one does not build on it: a stopped
run ends with the chain of one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.format.manifest import Shard
from pipeline.store import atomic
from train.monitor.history import SOURCE_LOSS

LOGGED = ("tokens", "train/loss", "lr", "grad_norm", "val/loss", "val_tokens", "skipped")
"""Numbers of the log that the chain commits to, with the losses of single sources: those that
follow from weights and data."""

HASH = "link"  # key of a link's own hash
STOPPED = "stopped"  # key of a link on which no other builds

Link = dict[str, Any]


def log_hash(records: Iterable[Mapping[str, Any]], first: int, step: int) -> str:
    """Hash what the log says of steps first + 1 to ``step``."""
    chosen = (
        {name: value for name, value in record.items() if name == "step" or _is_logged(name)}
        for record in records
        if first < record["step"] <= step
    )
    return atomic.sha256_json([record for record in chosen if len(record) > 1])


def _is_logged(name: str) -> bool:
    return name in LOGGED or name.startswith(SOURCE_LOSS)


def conditions_hash(conditions: Iterable[Mapping[str, Any]], step: int) -> str:
    """Hash the conditions of the steps up to ``step``."""
    return atomic.sha256_json([part for part in conditions if part["since"] < step])


def shards_hash(shards: Iterable[Shard]) -> str:
    """Hash the names, sources and hashes of all shards of the data, in their order."""
    return atomic.sha256_json([[shard.name, shard.source, shard.sha256] for shard in shards])


def link_hash(link: Mapping[str, Any], before: str | None) -> str:
    """Hash a link and, through the hash of the one before, all earlier ones."""
    return atomic.sha256_json([before, {k: v for k, v in link.items() if k != HASH}])


def complete(links: Sequence[Link], hashes: Mapping[str, str]) -> None:
    """Add the hashes of a checkpoint's files to the newest link, then its own."""
    own = links[-1]
    own["files"] = dict(hashes)
    own[HASH] = link_hash(own, links[-2][HASH] if len(links) > 1 else None)


@dataclass
class Chain:
    """Links and conditions of a run so far, as in `state.json`.

    Attributes:
        start: Complete steps before the first link; 0 unless the run began in another.
        links: Oldest first.
        conditions: Oldest first; each holds since the step in its "since".
    """

    start: int = 0
    links: list[Link] = field(default_factory=list)
    conditions: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Chain:
        """The chain of a checkpoint; of earlier code, which had none, one that begins there."""
        found = state.get("chain")
        if found is None:
            return cls(start=state["step"])
        return cls(found["start"], list(found["links"]), list(found["conditions"]))

    @property
    def head(self) -> str | None:
        """Hash of the newest link; None if there is none."""
        return self.links[-1][HASH] if self.links else None

    def as_json(self) -> dict[str, Any]:
        """The chain for `state.json`; the lists are copied, the newest link is not."""
        return {
            "start": self.start,
            "links": list(self.links),
            "conditions": list(self.conditions),
        }

    def begin(self, step: int, conditions: Mapping[str, Any]) -> Chain:
        """Note the conditions from ``step`` on, if they are others than before; return self."""
        if not self.conditions:
            self.start = step
        last = {k: v for k, v in (self.conditions or [{}])[-1].items() if k != "since"}
        if atomic.sha256_json(last) != atomic.sha256_json(conditions):
            self.conditions.append({"since": step, **conditions})
        return self

    def extend(
        self, step: int, samples: int, records: Iterable[Mapping[str, Any]], *, stopped: bool
    ) -> None:
        """Add the link of a checkpoint; `complete` adds the hashes when its files are written.

        Replaces the link of an earlier save of the same step.

        Args:
            records: The log.
            stopped: Whether only a signal caused the checkpoint.
        """
        while self.links and (STOPPED in self.links[-1] or self.links[-1]["step"] >= step):
            self.links.pop()
        first = self.links[-1]["step"] if self.links else self.start
        self.links.append(
            {
                "first": first,
                "step": step,
                "samples": samples,
                "log": log_hash(records, first, step),
                "conditions": conditions_hash(self.conditions, step),
                **({STOPPED: True} if stopped else {}),
            }
        )
