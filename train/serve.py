"""Serve a page to browsers on this machine: the playground, and the live page of a run.

The server is reachable from this machine only. Other web sites could still send requests to it
through the user's browser, or rebind a DNS name of their own to 127.0.0.1, so requests with another
host name or origin, and those that another site causes, are refused. A malformed request gets a
status of 4xx, and no line in the log.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import http_exceptions, web

from pipeline.runtime.errors import UserError, printable

HOST = "127.0.0.1"
HOST_HEADER = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)

PORT, PORTS = 8000, 20  # the first port that is tried where none is given, and their number
PORT_HELP = f"default: the first free port from {PORT} on; 0: any"


@web.middleware
async def _only_this_machine(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse other host names, other origins, and all but a link to the page from other sites."""
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or not HOST_HEADER.fullmatch(hosts[0]):
        raise web.HTTPForbidden(text=f"host {printable(', '.join(hosts))} is refused; use {HOST}")
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{hosts[0]}":
        raise web.HTTPForbidden(text=f"origin {printable(origin)} is refused")
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and request.path != "/":
        raise web.HTTPForbidden(text="Sec-Fetch-Site: a request of another site is refused")
    return await handler(request)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(
        {
            "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
    )


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether a record of aiohttp's is about this server, and not about a malformed request."""
    malformed = (http_exceptions.HttpProcessingError, web.RequestPayloadError)
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (*malformed, ConnectionError))


@asynccontextmanager
async def serve(app: web.Application, port: int | None) -> AsyncIterator[str]:
    """Serve an application and yield its address.

    Args:
        app: The application; gets the rules of this module.
        port: The port; 0: any that is free; None: the first free one from `PORT` on.

    Raises:
        UserError: The port is not available.
    """
    app.middlewares.append(_only_this_machine)
    app.on_response_prepare.append(_add_headers)
    logger = logging.getLogger("train.serve")
    logger.addFilter(_is_fault)
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=1, logger=logger
    )
    await runner.setup()
    try:
        await _listen(runner, [port] if port is not None else range(PORT, PORT + PORTS))
        yield f"http://{HOST}:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, ports: Sequence[int]) -> None:
    for port in ports:
        try:
            await web.TCPSite(runner, HOST, port).start()
            return
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            if not taken or port == ports[-1]:
                raise UserError(f"--port {port}: {error}; use another, or 0 for any") from None


def run(app: web.Application, port: int | None, name: str, what: str) -> None:
    """Serve an application until Ctrl-C, and print its address.

    Args:
        name: Of the command, which begins each line.
        what: The page, for the line.
    """

    async def forever() -> None:
        async with serve(app, port) as address:
            print(f"{name}: {what} at {address}; Ctrl-C to stop", flush=True)
            await asyncio.Event().wait()

    try:
        asyncio.run(forever())
    except KeyboardInterrupt:
        print(f"{name}: stopped")
