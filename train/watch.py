"""`python -m train.watch`: the page of a running run, live, in a browser on this machine.

The page asks every few seconds; charts are drawn again only if the log has changed. This process
has a low priority, and takes nothing from a run that it watches but a core for half a second. On
another machine, forward the port: `ssh -L 8000:127.0.0.1:8000 HOST`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import zlib

from aiohttp import web

from pipeline.runtime import command
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from train import serve
from train.report import html, live

INTERVAL = 3000  # milliseconds between two questions of the page


class Watch:
    """Server of the page of the runs in a store; draws one page at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = asyncio.Lock()
        self._drawn = ("", "")  # what the newest page shows, and its content

    def app(self) -> web.Application:
        """Build the web application."""
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_get("/run", self._run)
        return app

    async def _page(self, request: web.Request) -> web.Response:
        text = html.render(
            "watch.html",
            title="Runs",
            nonce=secrets.token_urlsafe(16),
            body="",
            interval=INTERVAL,
        )
        return web.Response(text=text, content_type="text/html")

    async def _run(self, request: web.Request) -> web.Response:
        async with self._lock:
            try:
                runs = live.find_runs(self.store)
                run = live.choose(runs, request.query.get("run") or None)
            except UserError as error:
                raise web.HTTPNotFound(text=printable(str(error))) from None
            states = [(other.key, other.state) for other in runs]
            shows = f"{zlib.crc32(repr((run, states)).encode()):08x}"
            if request.query.get("seen") == shows:
                return web.Response(status=204)
            if self._drawn[0] != shows:
                self._drawn = shows, await asyncio.to_thread(live.render_body, run, runs)
            headers = {"ETag": shows}
            return web.Response(text=self._drawn[1], content_type="text/html", headers=headers)


def main(argv: list[str] | None = None) -> None:
    """Serve the page of the running run until Ctrl-C."""
    parser = command.Parser(prog="python -m train.watch", description=main.__doc__)
    parser.add_argument("--port", type=int, help=serve.PORT_HELP)
    args = parser.parse_args(argv)
    store = Store.open(Machine.load())
    os.nice(10)
    serve.run(Watch(store).app(), args.port, "watch", str(store.root / "runs"))


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
