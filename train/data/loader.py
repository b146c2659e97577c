"""Load micro-batches in the sampling order, ahead of the step that trains on them.

    BatchSchedule   step -> samples [start, start + count)      which samples
         |
    Order           sample -> first token of its window         in which order
         |
    Split           (micro-step, rank, row) -> sample           on which rank
         |
    read_windows    first tokens -> inputs, targets (B, T) int64     from the memory-mapped shards
         |
    queue           at most `AHEAD` micro-batches, filled by a thread
         |
    Batches         yields MicroBatch(step, inputs, targets)

Each stage is a function of the step number, so a loader has no state to save: a run that resumes
at step n asks for the spans from n on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline import TokenStream
from train.data.split import Split

AHEAD = 4  # micro-batches in the queue: enough to ride out a slow read, little memory


class Tokens(Protocol):
    """A stream of tokens, such as ``pipeline.TokenStream``."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Order(Protocol):
    """An order of the training data: `DataOrder`, or `MixedOrder` of several sources."""

    @property
    def block_size(self) -> int:
        """Inputs per window."""

    def starts(self, start: int, count: int) -> np.ndarray:
        """Return the first tokens of the samples [start, start + count), int64."""


class MicroBatch(NamedTuple):
    """What one process computes at a time.

    Attributes:
        step: The optimizer step that it belongs to, from 0.
        inputs: (micro_batch, block_size) int64.
        targets: The same windows one token later, (micro_batch, block_size) int64.
    """

    step: int
    inputs: Tensor
    targets: Tensor


def read_windows(stream: TokenStream, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """Read windows of a stream, from their first tokens, (n,) int64.

    Returns:
        Inputs and targets, each (n, block_size) int64 and contiguous: torch.compile
        would compile again for other strides.
    """
    rows = stream.gather(starts, block_size + 1)
    return (
        torch.from_numpy(rows[:, :-1].astype(np.int64)),
        torch.from_numpy(rows[:, 1:].astype(np.int64)),
    )


class Batches(Iterator[MicroBatch]):
    """The micro-batches of one rank, in order; a context manager, which runs the thread.

    An error in the thread is raised by ``next``.

    Args:
        stream: The train split.
        spans: (step, first global sample, number of samples) per step; see `BatchSchedule.spans`.
        device: Device of the tensors; on CUDA through pinned memory and an asynchronous copy.

    Attributes:
        waited: Seconds spent in ``next`` so far: the time that data cost the training.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: Order,
        split: Split,
        *,
        rank: int,
        spans: Iterable[tuple[int, int, int]],
        device: torch.device,
    ) -> None:
        self._stream, self._order, self._split, self._rank = stream, order, split, rank
        self._spans, self._device = spans, device
        self.waited = 0.0
        self._queue: queue.Queue[MicroBatch | BaseException | None] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fetch, name="batches", daemon=True)

    def __enter__(self) -> Batches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def __next__(self) -> MicroBatch:
        """Return the next micro-batch, on the device."""
        before = time.perf_counter()
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        inputs, targets = (part.to(self._device, non_blocking=True) for part in item[1:])
        self.waited += time.perf_counter() - before
        return MicroBatch(item.step, inputs, targets)

    def _fetch(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread starts on the first GPU
            for step, start, count in self._spans:
                starts = self._order.starts(start, count)
                for part in self._split.share(starts, self._rank):
                    batch = read_windows(self._stream, part, self._order.block_size)
                    if self._device.type == "cuda":
                        batch = batch[0].pin_memory(), batch[1].pin_memory()
                    if not self._put(MicroBatch(step, *batch)):
                        return
            self._put(None)  # the end
        except BaseException as error:  # `next` raises it, with the thread's traceback
            self._put(error)

    def _put(self, item: MicroBatch | BaseException | None) -> bool:
        """Queue an item; return False once the loader is closing."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
