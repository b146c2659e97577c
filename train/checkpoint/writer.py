"""Asynchronous saving: a thread writes checkpoints from a copy while training continues.

    loop:    ... step n | copy | step n + 1 | step n + 2 | ...
    thread:                    | write, hash, fsync, rename |

The loop only waits for the copy, into host memory that is allocated once (pinned if the model is on
a GPU). The thread has a lower priority than training. Checkpoints are written one at a time. An
error in the thread is raised in the loop, so no run continues without saving.
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


def lower_priority() -> None:
    """Lower the priority of this thread (on Linux, where threads have one)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Writer:
    """Saves the checkpoints of a run; a context manager, which waits for the last one on exit."""

    def __init__(self, run: Path, keep: Keep) -> None:
        self._run, self._keep = run, keep
        self._host: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=lower_priority)
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()  # also after an error: the checkpoint being written is good
        if kind is None:
            self.wait()

    def save(
        self, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Start writing a checkpoint; the tensors may change as soon as this returns.

        For the arguments see ``directory.save``; the tensors may be on any device.

        Raises:
            UserError: The previous checkpoint could not be written.
        """
        self.wait()
        tensors = {"model": model, "optimizer": optimizer}
        copies = {kind: self._copy(kind, part) for kind, part in tensors.items()}
        copied = None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        self._writing = self._pool.submit(self._write, copies, state, copied)

    def check(self) -> None:
        """Raise the error of ``wait`` if the write has ended; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint being written is on disk.

        Raises:
            UserError: It could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._run}: cannot write a checkpoint ({error}); fix that, or set work_dir "
                "(machine.yaml) to another disk; the last complete one is kept"
            ) from error

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to host memory; from a GPU the copy is queued behind the step."""
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
