"""Tests for train.data.shard_check."""

from __future__ import annotations

from typing import cast
from unittest.mock import MagicMock

import pytest
from torch.distributed import DistError

from pipeline import TokenStream
from pipeline.runtime.errors import StageFailed
from tests.support.small_data import flip
from tests.support.training import Project
from train import evaluate
from train.data import shard_check
from train.data.shard_check import ShardCheck
from train.distributed.group import Group
from train.distributed.world import World
from train.run import TOKENS


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_reads_a_damaged_shard_names_it_whoever_hashes_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    group = Group(rank=rank, size=2, local_rank=rank, local_size=2)
    monkeypatch.setattr(shard_check, "read_group", lambda: group)
    flip(project.folder / "data/tokens/train-00001.bin", 1024 + 21, keep_mtime=True)
    data = TokenStream(TOKENS, "train")
    with (
        pytest.raises(StageFailed, match=r"train-00001\.bin: .*pipeline\.verify"),
        ShardCheck(cast(World, None), data),
    ):
        raise IndexError("index out of range in self")


def test_evaluation_waits_for_the_hashes_in_short_turns_and_not_after_a_lost_rank(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that hashes for longer than another waits in a collective would be reported dead."""
    turns: list[float] = []
    left: list[object] = []

    def complete(self: ShardCheck, seconds: float) -> bool:
        turns.append(seconds)
        if len(turns) > 2:
            raise DistError("a rank is lost")
        return False

    def missing(self: World) -> set[int]:
        self.store.set("rank-1", "rank 1")
        return {1}

    monkeypatch.setattr(evaluate, "read_json", lambda *_: {"train": {"dtype": "float32"}})
    monkeypatch.setattr(evaluate, "GPT", MagicMock())
    monkeypatch.setattr(evaluate, "measure", MagicMock())
    monkeypatch.setattr(ShardCheck, "complete", complete)
    monkeypatch.setattr(ShardCheck, "__exit__", lambda self, kind, *_: left.append(kind))
    monkeypatch.setattr(World, "_missing_ranks", missing)
    with pytest.raises(SystemExit):
        evaluate.main()
    assert max(turns) <= 1
    assert left == [SystemExit]  # which does not wait for the hashes
    assert "rank 1" in capsys.readouterr().err
