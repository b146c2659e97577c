"""Signals that ask a run to stop, agreed on by all ranks before any of them acts."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from pipeline.runtime import command
from train.distributed.world import World


class Interrupted(Exception):
    """All ranks have agreed to stop here; raised on each at the same micro-step."""


class Interrupt:
    """Turns signals into a question that the ranks ask each other.

    A signal may reach one rank and not another, or reach them in different steps. Between enter
    and exit it only sets a flag; ``check`` reduces the flag, so that every rank leaves at the same
    place and none waits in a collective for one that has gone.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        numbers = (signal.SIGINT, *command.stop_signals())
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def check(self) -> None:
        """Stops every rank if one was asked to; a collective, so called by all alike.

        Raises:
            Interrupted: On all ranks, or on none.
        """
        if self._world.any(self._asked):
            raise Interrupted
