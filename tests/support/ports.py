"""The ports on which a command and its descendants listen."""

from __future__ import annotations

import contextlib
import ipaddress

import psutil  # type: ignore[import-untyped]


def listeners(pid: int) -> dict[str, bool]:
    """Return "process address:port" of each listening socket, and whether it is on loopback."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        host, port = connection.laddr
                        address = ipaddress.ip_address(host)
                        mapped = getattr(address, "ipv4_mapped", None) or address
                        found[f"{process.name()} {host}:{port}"] = mapped.is_loopback
    return found
