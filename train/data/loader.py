"""Batches of the data order, split over ranks and micro-steps, fetched ahead by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline import TokenStream
from train.data.order import DataOrder
from train.data.split import Split

AHEAD = 4  # micro-batches waiting: enough to ride out a slow read, little memory


class Tokens(Protocol):
    """One stream of tokens, such as ``pipeline.TokenStream``."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


_Item = tuple[Tensor, Tensor] | BaseException | None  # None: there are no more


def read_windows(
    stream: TokenStream, windows: np.ndarray, block_size: int
) -> tuple[Tensor, Tensor]:
    """Reads windows of a stream.

    Returns:
        Inputs and targets, the latter one token on, each (len(windows), block_size) int64 and
        contiguous: other strides would be compiled anew.
    """
    rows = stream.gather(windows * block_size, block_size + 1)
    return (
        torch.from_numpy(rows[:, :-1].astype(np.int64)),
        torch.from_numpy(rows[:, 1:].astype(np.int64)),
    )


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """The micro-batches of one rank, in order.

    A context manager: a thread reads ahead between enter and exit. An error in the thread is
    raised again where the batch is asked for. What is read depends on ``spans`` alone, so a loader
    has no state to save.

    Args:
        stream: The train split.
        order: Its order.
        split: How a global batch is shared.
        rank: Of this process.
        spans: For each step, the first global sample and their number (a ``BatchSchedule``'s).
        device: Where the tensors go; pinned memory and an asynchronous copy on CUDA.

    Attributes:
        waited: Seconds that ``next`` has taken so far: what data cost the training.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: DataOrder,
        split: Split,
        *,
        rank: int,
        spans: Iterable[tuple[int, int]],
        device: torch.device,
    ) -> None:
        self._stream, self._order, self._split, self._rank = stream, order, split, rank
        self._spans, self._device = spans, device
        self.waited = 0.0
        self._queue: queue.Queue[_Item] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fetch, name="batches", daemon=True)

    def __enter__(self) -> Batches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next micro-batch: inputs and targets, each (micro_batch, block_size) int64."""
        before = time.perf_counter()
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        inputs, targets = (part.to(self._device, non_blocking=True) for part in item)
        self.waited += time.perf_counter() - before
        return inputs, targets

    def _fetch(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread's is the first GPU
            for start, count in self._spans:
                windows = self._order.samples(start, count)
                for part in self._split.share(windows, self._rank):
                    batch = read_windows(self._stream, part, self._order.block_size)
                    if self._device.type == "cuda":
                        batch = batch[0].pin_memory(), batch[1].pin_memory()
                    if not self._put(batch):
                        return
            self._put(None)
        except BaseException as error:  # the loop raises it, with the thread's traceback
            self._put(error)

    def _put(self, item: _Item) -> bool:
        """Queues an item; False where nobody wants it any more."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
