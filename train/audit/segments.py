"""The segments of a run, one per link of its chain, and which of them are drawn.

The head binds the links, not the checkpoints that are kept. So the draw is over the links: nobody
can change what is drawn by deleting checkpoints. A segment whose first checkpoint is missing cannot
be judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from train.audit.run_folder import Audited
from train.checkpoint.chain import Link


@dataclass(frozen=True)
class Segment:
    """The steps of a link: from the end of the link before, or from the start of the run.

    Attributes:
        link: Link in which it ends.
        before: Link in which it begins; None: the start of the run, whatever is in the folder.
        begin: Checkpoint of ``before``; None: missing, or the start.
    """

    link: Link
    before: Link | None
    begin: Path | None

    @property
    def first(self) -> int:
        """Complete steps before the segment."""
        return int(self.link["first"])

    @property
    def stop(self) -> int:
        """Complete steps after the segment."""
        return int(self.link["step"])

    @property
    def missing(self) -> bool:
        """Whether there is nothing to begin with."""
        return self.before is not None and self.begin is None


def segments(run: Audited) -> list[Segment]:
    """The segments of a run whose chain has been checked, oldest first."""
    befores = [None, *run.links[:-1]]
    return [
        Segment(link, before, run.kept.get(before["step"]) if before else None)
        for before, link in zip(befores, run.links, strict=True)
    ]


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


def chances(segments: int, drawn: int, judged: int) -> Sequence[tuple[int, float]]:
    """`chance` for one forged segment, and for a tenth of those that can be judged, if more."""
    counts = sorted({1, judged // 10} - {0}) if judged else []
    return [(forged, chance(segments, forged, drawn)) for forged in counts]
