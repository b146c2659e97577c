"""The group of a run's processes, as the environment describes it, and the store where they meet.

torchrun and `train.launch` describe the group in RANK, WORLD_SIZE, MASTER_ADDR, ... Other programs
leave the same names in a pod or a shell, so they count only beside torchrun's TORCHELASTIC_RUN_ID.
The processes of one node talk through its loopback interface only: neither PyTorch's store nor
gloo and NCCL authenticate those who connect.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline.runtime.errors import UserError

LOOPBACK = "127.0.0.1"
RUN_KEY = "PIPELINE_RUN_KEY"
"""Variable in which `train.launch` gives the key of the run that it has checked to its workers."""
_LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
_WILDCARDS = ("0.0.0.0", "::", "*")
_AGENT_STORE_SECONDS = 60.0  # torchrun's agent opens its store before it starts the processes


@dataclass(frozen=True, kw_only=True)
class Group:
    """The place of this process in its group.

    Attributes:
        size: Processes on all nodes.
        local_size: Processes on this node.
        address: Host of the store.
        port: Port of the store.
        hosted: Whether the program that started the processes serves the store; else rank 0 does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = LOOPBACK
    port: int = 0
    hosted: bool = False

    @property
    def one_node(self) -> bool:
        """Whether all processes are on this node."""
        return self.size == self.local_size


def under_torchrun() -> bool:
    """Whether torchrun or `train.launch` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def read_group() -> Group:
    """Read the group from the environment; a group of one unless torchrun describes another.

    Raises:
        UserError: A variable is missing, no number, or contradicts another; or the store would be
            at a wildcard address.
    """
    if not under_torchrun():
        return Group()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    rank, size, local_rank, local_size, port = map(_read_count, names)
    address = os.environ.get("MASTER_ADDR", "")
    for name, value, stop in (
        ("RANK", rank, size),
        ("LOCAL_RANK", local_rank, local_size),
        ("LOCAL_WORLD_SIZE", local_size, size + 1),
        ("MASTER_PORT", port, 2**16),
    ):
        if value >= stop:
            raise UserError(f"{name}: {value} is not below {stop}; {_HOW_TO_START}")
    if address in _WILDCARDS or not address:
        raise UserError(
            f"MASTER_ADDR: {address or 'empty'}: name one address of the first node, in a private "
            "network (torchrun --master-addr or --rdzv-endpoint)"
        )
    return Group(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=address,
        port=port,
        hosted=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


_HOW_TO_START = (
    "start the processes with train.launch or torchrun, or unset TORCHELASTIC_RUN_ID if a shell "
    "has left it"
)


def _read_count(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}: {text or 'empty'}: not a number; {_HOW_TO_START}")
    return int(text)


def stay_on_this_machine() -> None:
    """Have gloo and NCCL listen on the loopback interface only, whatever the environment says."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = _LOOPBACK_INTERFACE


def loopback_store(timeout: timedelta, port: int = 0) -> TCPStore:
    """Serve a store on this machine's loopback address; by itself it would listen on all.

    Args:
        port: Port; 0: any free one.
    """
    listener = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def open_store(group: Group, timeout: timedelta) -> TCPStore:
    """Open the group's store; rank 0 serves it unless the agent does.

    Raises:
        UserError: No store answers in ``timeout``, or within a minute where it should be there
            already.
    """
    serves = group.rank == 0 and not group.hosted
    if serves and group.address == LOOPBACK:
        return loopback_store(timeout, group.port)
    if not serves:
        _wait_for_port(group, timeout.total_seconds())
    return TCPStore(
        group.address, group.port, is_master=serves, wait_for_workers=False, timeout=timeout
    )


def _wait_for_port(group: Group, seconds: float) -> None:
    """Wait here, where a signal ends the wait, and not in TCPStore, which takes none."""
    if group.hosted:
        seconds = min(seconds, _AGENT_STORE_SECONDS)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((group.address, group.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"MASTER_ADDR, MASTER_PORT: nothing answers at {group.address}:{group.port} "
                    f"({error}); {_HOW_TO_START}"
                ) from None
        time.sleep(0.1)
