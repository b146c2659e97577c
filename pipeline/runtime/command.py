"""Exit statuses and signals of all commands."""

import argparse
import contextlib
import ctypes
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from pipeline.runtime.errors import StageFailed, Stopped, UserError, printable

DONE, FAULT, USER_ERROR, STOPPED = 0, 1, 2, 3

PARENT = "PIPELINE_PARENT"
"""Variable in which a launcher gives its process id to the processes that it starts."""
_PR_SET_PDEATHSIG = 1
# Of the disk, not of the code: reported without a traceback.
_DISK_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable for you"),
    errno.EIO: "check the disk",
}


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong flag in one line, `error: ...`, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Override argparse, which also prints the usage."""
        self.exit(USER_ERROR, f"error: {message} (see --help)\n")


def die_with_parent() -> None:
    """End if the parent process is dead, and have Linux send SIGTERM when it dies.

    DVC does not forward SIGTERM, so its stage would be orphaned. The setting survives `exec`. It is
    made under DVC and torchrun only: a command started by hand under `nohup` outlives its shell.
    """
    if "DVC_STAGE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if _is_orphan():  # since before the line above
            sys.exit(STOPPED)


def _is_orphan() -> bool:
    """Return whether another process than the one that started this one is its parent now.

    A launcher gives its process id. DVC does not, but a process begins in the session of its
    parent, and the init process that adopts orphans is in another one.
    """
    parent, session = os.getppid(), os.getsid(0)
    if started_by := os.environ.get(PARENT):
        return str(parent) != started_by
    if session == os.getpid():  # started in a session of its own
        return False
    try:
        return os.getsid(parent) != session
    except OSError:
        return False


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

    Status 0: done. 1: a fault, with its traceback, or one line for an error of the disk. 2: a
    mistake of the user, one line on stderr. 3: stopped by a signal; the same command resumes.
    """
    die_with_parent()
    for number in stop_signals():
        signal.signal(number, _raise_stopped)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: text in any encoding
    try:
        main()
        if "DVC_STAGE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:  # no worker
            from pipeline.runtime.params_file import check_unchanged

            check_unchanged()
    except (UserError, StageFailed) as error:
        for line in str(error).splitlines():  # several for several files
            print(f"error: {printable(line)}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR if isinstance(error, UserError) else FAULT)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        # A failed `write` or `fsync` names no file.
        where = printable(os.fsdecode(error.filename)) if error.filename else "project or work_dir"
        message = f"error: {where}: {error.strerror}; {_DISK_ERRORS[error.errno]}"
        print(f"{message}, and run the same command again to resume", file=sys.stderr, flush=True)
        sys.exit(FAULT)
    except KeyboardInterrupt:  # also Stopped
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # the launcher reports for all workers
            fresh = " without GPT2_FRESH" if os.environ.get("GPT2_FRESH") else ""
            message = f"stopped; run the same command{fresh} to resume"
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(message, file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    sys.exit(DONE)


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` as `run` does, and end the process at once, without the interpreter's clean-up.

    For processes of a group: freeing it joins threads, one of which may wait for the interpreter
    lock that this thread holds (seen with gloo, once in some 30 errors).
    """
    try:
        run(main)
    except SystemExit as ended:  # not after this block, where its frames are freed
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else FAULT)
