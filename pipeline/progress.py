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
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
            return
        now = time.monotonic()
        if now - self._printed < self.every and self.done < self.total:
            return
        self._printed = now
        rate = self.done / max(now - self._started, 1e-9)
        left = f"{max(self.total - self.done, 0) / rate:.0f}" if rate else "?"
        share = 100 * self.done / max(self.total, 1)
        print(
            f"{self.what}: {share:3.0f} %, {self.done:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f}/s, ETA {left} s{', ' + note if note else ''}",
            flush=True,
        )
