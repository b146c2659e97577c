"""Tests for train.distributed.group: what the environment may say, and where the store listens."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest

from pipeline.runtime import command
from pipeline.runtime.errors import Stopped, UserError
from tests.support.ports import listeners
from train import __main__ as worker
from train.distributed.group import LOOPBACK, Group, open_store, read_group
from train.launch.stage import launch

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29400",
}
SECOND = timedelta(seconds=1)


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def _torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_variables_count_only_beside_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    group = read_group()
    assert (group.rank, group.size, group.address, group.port) == (1, 4, "node-1", 29400)
    assert not group.one_node
    with pytest.raises(UserError, match="TORCHELASTIC_RUN_ID"):
        launch()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert read_group() == Group()
    assert read_group().one_node
    with pytest.raises(UserError, match="WORLD_SIZE: 4"):
        worker.main()


@pytest.mark.parametrize("name", sorted({*TORCHRUN} - {"TORCHELASTIC_RUN_ID"}))
@pytest.mark.parametrize("value", [None, "", "-1", "x", "99999", "0.0.0.0"])
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    fine = {("WORLD_SIZE", "99999"), *(("MASTER_ADDR", text) for text in ("-1", "x", "99999"))}
    if (name, value) in fine:
        assert read_group()
        return
    with pytest.raises(UserError, match=rf"^{name}: "):
        read_group()


def test_rank_0_serves_the_store_of_one_node_on_loopback_and_others_reach_it() -> None:
    group = Group(size=2, local_size=2, port=free_port())
    before = listeners(os.getpid())
    first = open_store(group, SECOND)
    first.set("key", "value")
    new = {
        name: loopback for name, loopback in listeners(os.getpid()).items() if name not in before
    }
    assert list(new.values()) == [True]
    other = open_store(Group(rank=1, size=2, local_size=2, port=group.port), SECOND)
    assert other.get("key") == b"value"


@pytest.mark.parametrize("hosted", [True, False])
def test_a_store_that_does_not_answer_is_named_and_a_signal_ends_the_wait(hosted: bool) -> None:
    group = Group(rank=1, size=2, local_size=2, port=free_port(), hosted=hosted)
    with pytest.raises(UserError, match=f"MASTER_PORT: .*:{group.port}"):
        open_store(group, 0.3 * SECOND)
    previous = signal.signal(signal.SIGUSR1, command._raise_stopped)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    begin = time.monotonic()
    try:
        with pytest.raises(Stopped):
            open_store(group, 60 * SECOND)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert time.monotonic() - begin < 10
