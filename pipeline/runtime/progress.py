"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts finished work.

    Args:
        what: the work's name, which begins each line.
        total: units to do.
        unit: the unit's name, e.g. "tokens".
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, what: str, total: int, unit: str, every: float = 5.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done = 0
        self.tasks = ""
        """How the tasks stand, shown at the end of each line; `run_tasks` says it."""
        self._note = ""
        self._started = self._printed = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=what, unit=unit, unit_scale=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int, note: str = "") -> None:
        """Count ``units`` more as done; ``note`` is shown behind them."""
        self.done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes(), refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._printed >= self.every or (
            units and self.done >= self.total  # the last of them
        ):
            self._print()

    def look(self) -> None:
        """Show how things stand, if it is time to, where nothing was done lately."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes())
        else:
            self.advance(0)

    def say(self, line: str) -> None:
        """Print a line of its own, beside the bar where there is one."""
        tqdm.write(f"{self.what}: {line}", file=sys.stdout)
        sys.stdout.flush()

    def _notes(self) -> str:
        return ", ".join(filter(None, (self._note, self.tasks)))

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = self.done / max(self._printed - self._started, 1e-9)
        left = f"{max(self.total - self.done, 0) / rate:.0f}" if rate else "?"
        share = 100 * self.done / max(self.total, 1)
        notes = self._notes()
        print(
            f"{self.what}: {share:3.0f} %, {self.done:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f}/s, ETA {left} s{', ' + notes if notes else ''}",
            flush=True,
        )
