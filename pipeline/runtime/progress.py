"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import os
import sys
import time

from tqdm import tqdm

_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
)
_BESIDE_BAR = len(": 100%|| 1.20M/2.40M  [1:00:00<1:00:00, ]")
_BAR_WIDTH = 10  # columns of a terminal, at least


class Progress:
    """Count and show finished work.

    Args:
        name: Name of the work, at the start of each line.
        total: Units to do.
        unit: Name of the unit, e.g. "tokens".
        every: Seconds between lines without a terminal.
    """

    def __init__(self, name: str, total: int, unit: str, every: float = 5.0) -> None:
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.done = 0
        self.task_counts = ""
        """Tasks running, waiting and done, at the end of each line; `run_tasks` sets it."""
        self._note = ""
        self._started = self._printed = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                desc=name,
                unit=unit,
                unit_scale=True,
                bar_format=_BAR,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int, note: str = "") -> None:
        """Count ``units`` more as done; ``note``, unless empty, replaces the text after them."""
        self.done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes_beside_bar(), refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._printed >= self.every or (
            units and self.done >= self.total  # the last units
        ):
            self._print()

    def refresh(self) -> None:
        """Show the current state although no unit was done, if a line is due."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes_beside_bar())
        else:
            self.advance(0)

    def log(self, line: str) -> None:
        """Print a separate line without breaking the bar."""
        tqdm.write(f"{self.name}: {line}", file=sys.stdout)
        sys.stdout.flush()

    def _notes(self) -> str:
        return ", ".join(filter(None, (self._note, self.task_counts)))

    def _notes_beside_bar(self) -> str:
        """Return as many of the notes as leave room for the bar."""
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        room = columns - len(self.name) - len(self.unit) - _BESIDE_BAR - _BAR_WIDTH
        notes = self._notes().split(", ")
        while notes and len(", ".join(notes)) > room:
            notes.pop()
        return ", ".join(notes)

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = self.done / max(self._printed - self._started, 1e-9)
        left = f"{max(self.total - self.done, 0) / rate:.0f}" if rate else "?"
        share = 100 * self.done / max(self.total, 1)
        notes = self._notes()
        print(
            f"{self.name}: {share:3.0f} %, {self.done:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f}/s, ETA {left} s{', ' + notes if notes else ''}",
            flush=True,
        )
