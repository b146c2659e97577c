"""How a command ends: exit statuses, signals, and no orphans."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from pipeline.runtime.errors import StageFailed, Stopped, UserError

DONE, FAULT, USER_ERROR, STOPPED = 0, 1, 2, 3

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have Linux send this process SIGTERM when the process that started it dies.

    DVC does not forward SIGTERM: without this, its stage would go on as an orphan. The setting
    survives `exec`. Done only under DVC or torchrun, whose children have no life of their own; a
    command started by hand under `nohup` outlives its shell.
    """
    supervised = "DVC_STAGE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if supervised and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks this command to stop, besides Ctrl-C.

    SIGUSR1 is Slurm's warning, by custom. SIGHUP says that the terminal or the connection is gone,
    which a command under `nohup` outlives; but a worker of torchrun obeys, for it has no terminal,
    and is only sent what torchrun passes on.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    outlives = ignored and "TORCHELASTIC_RUN_ID" not in os.environ
    return (signal.SIGTERM, signal.SIGUSR1, *(() if outlives else (signal.SIGHUP,)))


def _raise_stopped(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(signum).name)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's ``main`` and exit with the status that its end deserves.

    0: done; 1: a fault, with its traceback; 2: the user's mistake, one line on stderr;
    3: stopped by a signal, the same command resumes.
    """
    die_with_parent()
    for number in stop_signals():
        signal.signal(number, _raise_stopped)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except StageFailed as failed:
        print(f"error: {failed}", file=sys.stderr, flush=True)
        sys.exit(FAULT)
    except KeyboardInterrupt:  # also Stopped
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # of many workers, the one above them speaks
            fresh = " without GPT2_FRESH" if os.environ.get("GPT2_FRESH") else ""
            said = f"stopped; the same command{fresh} goes on from here"
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                print(said, file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    sys.exit(DONE)
