"""Tests for train.distributed: the process group, and ranks that fail to meet."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch

from pipeline.runtime.errors import StageFailed
from train.distributed.rendezvous import _agree_on_prefix, process_group


def test_a_world_of_one_needs_no_torchrun() -> None:
    with process_group("cpu") as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.sum(torch.tensor(2.0)).item() == 2.0
        assert world.any(True)
        assert not world.any(False)
        assert world.broadcast({"a": 1}) == {"a": 1}
        world.barrier()


def test_waiting_for_the_gpu_ends_after_the_timeout() -> None:
    class Never:
        def query(self) -> bool:
            return False

    with process_group("cpu", timeout=0.3) as world:
        with pytest.raises(torch.distributed.DistError, match=r"0\.3 s"):
            world.wait_for_gpu(Never())  # type: ignore[arg-type]
        events = iter([False, False, True])
        Never.query = lambda self: next(events)  # type: ignore[method-assign]
        world.wait_for_gpu(Never())  # type: ignore[arg-type]
    assert next(events, None) is None


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1"), (1, "rank 0")])
def test_a_rank_that_does_not_return_after_a_restart_is_named(rank: int, missing: str) -> None:
    """The store still has the keys of the start before, so no read of it times out."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    store.set("here-1", "old")
    store.set("start", json.dumps({"name": "old", "here": {"1": "old"}}))
    with pytest.raises(StageFailed, match=rf"rank {rank} .*{missing}"):
        _agree_on_prefix(store, rank, 2, timedelta(seconds=0.3))
