"""Checkpoints written beside the training: from a copy, by a thread, one at a time.

    loop:    ... step n | copy | step n + 1 | step n + 2 | ...
    thread:                    | write, hash, fsync, rename |

The copy lies in host memory that is allocated once (pinned where the model is on a GPU), so that
the loop waits for a memory copy and for nothing of the disk; and the thread yields the processor to
the training. The next checkpoint waits for the one before it. What goes wrong in the thread is
raised in the loop: no run trains on without saving.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.runtime.errors import UserError
from train.checkpoint import directory
from train.checkpoint.directory import Keep


def _give_way() -> None:
    """Has this thread use what the others leave (on Linux, where a thread has a priority)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Writer:
    """Saves the checkpoints of a run; a context manager, at whose end the last one is written.

    Args:
        run: The run's folder.
        keep: Which checkpoints stay.
    """

    def __init__(self, run: Path, keep: Keep) -> None:
        self._run, self._keep = run, keep
        self._host: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=_give_way)
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()  # also where the run fails: what is being written is good
        if kind is None:
            self.wait()

    def save(
        self, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Begins to write a checkpoint; the tensors may change as soon as this returns.

        Args:
            model: State dict of the plain model, on any device.
            optimizer: Flat optimizer state, on any device.
            state: JSON values; needs "step".

        Raises:
            UserError: The disk would not take the one before.
        """
        self.wait()
        copies = {
            "model": self._copy("model", model),
            "optimizer": self._copy("optimizer", optimizer),
        }
        copied = None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        self._writing = self._pool.submit(self._write, copies, state, copied)

    def check(self) -> None:
        """Raises what went wrong in the thread, if it has ended; does not wait.

        Raises:
            UserError: The disk would not take a checkpoint.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on the disk.

        Raises:
            UserError: The disk would not take it.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._run}: a checkpoint could not be written ({error}); mend that, or set "
                "work_dir in machine.yaml to another disk; the last whole one is kept"
            ) from error

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies into the host's memory; from a GPU this is queued behind the step."""
        host = self._host[kind]
        if host.keys() != tensors.keys():  # the first time
            host = self._host[kind] = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                for name, tensor in tensors.items()
            }
        for name, tensor in tensors.items():
            host[name].copy_(tensor, non_blocking=True)
        return host

    def _write(
        self,
        copies: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        copied: torch.cuda.Event | None,
    ) -> Path:
        if copied is not None:
            copied.synchronize()
        return directory.save(self._run, **copies, state=state, keep=self._keep)
