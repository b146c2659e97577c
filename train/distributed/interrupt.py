"""Signals that ask a run to stop; all ranks agree before any of them acts."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from pipeline.runtime import command
from train.distributed.world import World


class Interrupted(Exception):
    """All ranks have agreed to stop; raised on each at the same micro-step."""


class Interrupt:
    """Collects stop signals and lets all ranks act on them at the same place.

    A signal may reach one rank and not another, or reach them in different steps. Between enter
    and exit it only sets a flag. ``check`` reduces the flag over all ranks, so that no rank waits
    in a collective for one that has already exited.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._signalled = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        numbers = (signal.SIGINT, *command.stop_signals())
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True

    def check(self) -> None:
        """Stop every rank if any got a signal. A collective: all ranks must call it alike.

        Raises:
            Interrupted: On all ranks, or on none.
        """
        if self._world.any(self._signalled):
            raise Interrupted
