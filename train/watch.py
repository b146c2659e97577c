"""`python -m train.watch`: the page of a running run, live, in a browser on this machine.

The browser asks every few seconds. The page of a run is drawn again if its log has changed, at a
low priority, and for at most a fifth of the time of one core, however long the log is; of the log
only what is new is read. On another machine, forward the port: `ssh -L 8000:127.0.0.1:8000 HOST`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aiohttp import web

from pipeline.runtime import command
from pipeline.runtime.errors import UserError, printable
from pipeline.runtime.machine import Machine
from pipeline.store.store import Store
from train import serve
from train.report import html, live
from train.report.run_log import LogReader

INTERVAL = 3000  # milliseconds between two questions of the page
REST = 4  # a page is served for so many times as long as it took to draw


@dataclass(frozen=True)
class Drawn:
    """A page: what it shows as a hash, its content, and the time until which it is served.

    Attributes:
        reader: Reads the log for the next drawing.
    """

    shows: str
    body: str
    until: float
    reader: LogReader


class Watch:
    """Server of the pages of the runs in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pages: dict[str, Drawn] = {}  # by the run's key
        # One thread: a page is drawn alone, and to its end even if the browser has left.
        self._worker = ThreadPoolExecutor(1)

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
        key = request.query.get("run") or None
        try:
            page = await asyncio.get_running_loop().run_in_executor(self._worker, self._draw, key)
        except (UserError, OSError) as error:
            raise web.HTTPNotFound(text=printable(str(error))) from None
        if request.query.get("seen") == page.shows:
            return web.Response(status=204)
        return web.Response(text=page.body, content_type="text/html", headers={"ETag": page.shows})

    def _draw(self, key: str | None) -> Drawn:
        """Return the page of a run, drawn again if it shows what is no longer so."""
        runs = live.find_runs(self.store)
        run = live.choose(runs, key)
        states = [(other.key, other.state) for other in runs]
        shows = f"{zlib.crc32(repr((run, states)).encode()):08x}"
        for removed in self._pages.keys() - {other.key for other in runs}:
            del self._pages[removed]
        page, now = self._pages.get(run.key), time.monotonic()
        if page is None or (page.shows != shows and now >= page.until):
            reader = page.reader if page else LogReader(run.folder / "log.jsonl")
            body = live.render_body(run, runs, reader)
            ended = time.monotonic()
            page = Drawn(shows, body, ended + REST * (ended - now), reader)
            self._pages[run.key] = page
        return page


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
