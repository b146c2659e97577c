"""Wait for a condition."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], seconds: float = 60, every: float = 0.05) -> float:
    """Wait until ``condition()`` is true; return the seconds it took.

    Raises:
        AssertionError: It was not true within ``seconds``.
    """
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"timeout after {seconds} s"
        time.sleep(every)
    return time.monotonic() - begin
