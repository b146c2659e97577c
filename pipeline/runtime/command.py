"""Exit statuses and signals of all commands."""

import argparse
import contextlib
import ctypes
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from pipeline.runtime.errors import StageFailed, Stopped, UserError, printable

DONE, FAULT, USER_ERROR, STOPPED = 0, 1, 2, 3

_PR_SET_PDEATHSIG = 1


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong flag in one line, `error: ...`, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Override argparse, which also prints the usage."""
        self.exit(USER_ERROR, f"error: {message} (see --help)\n")


def die_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent dies.

    DVC does not forward SIGTERM, so its stage would be orphaned. The setting survives `exec`. It is
    made under DVC and torchrun only: a command started by hand under `nohup` outlives its shell.
    """
    supervised = "DVC_STAGE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if supervised and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals, other than SIGINT, that stop this command.

    SIGUSR1 is the usual warning of Slurm. SIGHUP means that the terminal is gone: a command
    under `nohup` ignores it, a torchrun worker does not, because torchrun forwards it on purpose.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    if ignored and "TORCHELASTIC_RUN_ID" not in os.environ:
        return signal.SIGTERM, signal.SIGUSR1
    return signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


def _raise_stopped(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(signum).name)


def run(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit.

    Status 0: done. 1: a fault, with its traceback. 2: a mistake of the user, one line on stderr.
    3: stopped by a signal; the same command resumes.
    """
    die_with_parent()
    for number in stop_signals():
        signal.signal(number, _raise_stopped)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: text in any encoding
    try:
        main()
    except (UserError, StageFailed) as error:
        for line in str(error).splitlines():  # several for several files
            print(f"error: {printable(line)}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR if isinstance(error, UserError) else FAULT)
    except KeyboardInterrupt:  # also Stopped
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # the launcher reports for all workers
            fresh = " without GPT2_FRESH" if os.environ.get("GPT2_FRESH") else ""
            message = f"stopped; run the same command{fresh} to resume"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(message, file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    sys.exit(DONE)
