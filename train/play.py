"""`python -m train.play`: a local page in which a model goes on with what one writes.

It is served to this machine alone. A browser also lets other sites send requests here, and names
that an attacker owns can come to mean 127.0.0.1: so requests under any other name, or from any
other origin, are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from pydantic import Field
from torch import Tensor

from model import GPT
from model.errors import FormatError
from model.generate import load
from model.generation import stream
from model.size import parameter_count
from pipeline.format import tokenizer
from pipeline.runtime import command
from pipeline.runtime.errors import UserError
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import Section, validate
from train.distributed.devices import device_type
from train.report import html
from train.report.model_probe import shown, top

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")

MOST_CHARACTERS = 8000
MOST_TOKENS = 1000
MOST_WAITING = 4
LIKELIEST = 8  # tokens named beside each one that was chosen


class Wish(Section):
    """What the page asks for."""

    prompt: str = Field(default="", max_length=MOST_CHARACTERS)
    """Text to go on from; the empty text is the beginning of a document."""

    tokens: int = Field(default=200, ge=1, le=MOST_TOKENS)
    """New tokens at most."""

    temperature: float = Field(default=0.8, ge=0, le=5)
    """0: always the likeliest token; 1: the model's own distribution; above: flatter."""

    top_k: int | None = Field(default=None, ge=1)
    """Sample among the so many likeliest tokens; null: among all."""

    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the fewest that have this much probability together; null: among all."""

    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Makes the text repeatable; null: another one each time."""


def steps(gpt: GPT, wish: Wish) -> Iterator[dict[str, Any]]:
    """The new tokens, one after the other, as the page gets them.

    The text is that of ``model.generate`` with the same settings. Probabilities are the model's
    own, before temperature, top-k and top-p.

    Yields:
        "text" (of an unfinished character empty: the last of its tokens has it), "token", its
        "probability", and the "likeliest" tokens in its place; at the end, what remains of a
        character that was never finished.
    """
    logits: list[Tensor] = []
    prompt = [tokenizer.EOT, *tokenizer.encode(wish.prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    news = stream(
        gpt, [prompt], wish.tokens, wish.temperature, wish.top_k, wish.top_p, wish.seed,
        watch=logits.append,
    )  # fmt: skip
    for (token,) in news:
        assert token is not None
        probabilities = logits.pop()[0].softmax(0)  # (V,)
        data = b"" if token == tokenizer.EOT else tokenizer.decode_bytes([token])
        yield {
            "text": decoder.decode(data),
            "token": shown(token),
            "probability": float(probabilities[token]),
            "likeliest": top(probabilities, LIKELIEST),
        }
    if rest := decoder.decode(b"", final=True):
        yield {"text": rest}


class Playground:
    """One model, its page, and one generation at a time.

    Args:
        gpt: The model.
        name: What the page calls it.
        say: Told when a generation ends.
    """

    def __init__(self, gpt: GPT, name: str, say: Callable[[str], None] = print) -> None:
        self.gpt, self.name, self.say = gpt, name, say
        self._turn = asyncio.Lock()
        self._here = 0  # generations that run or wait

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(middlewares=[_only_this_machine], client_max_size=2**16)
        app.router.add_get("/", self._page)
        app.router.add_post("/generate", self._generate)
        return app

    async def _page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        config = self.gpt.config
        text = html.page(
            "play.html",
            nonce=nonce,
            name=self.name,
            config=config,
            parameters=parameter_count(config),
            most_tokens=MOST_TOKENS,
            most_characters=MOST_CHARACTERS,
        )
        return web.Response(text=text, content_type="text/html")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="send application/json")
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise UserError("request: an object is needed")
            wish = validate(Wish, body, "request")
        except UserError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        except ValueError:
            raise web.HTTPBadRequest(text="request: no JSON") from None
        if self._here > MOST_WAITING:
            raise web.HTTPServiceUnavailable(text="too many are waiting; try again in a moment")
        response = web.StreamResponse()
        response.content_type = "application/x-ndjson"
        self._here += 1
        try:
            await response.prepare(request)
            if self._turn.locked():
                await _send(response, {"waiting": self._here - 1})
            async with self._turn:
                await self._run(wish, response)
        finally:
            self._here -= 1
        return response

    async def _run(self, wish: Wish, response: web.StreamResponse) -> None:
        begin, count, end = time.perf_counter(), 0, "stopped by the page"
        tokens = steps(self.gpt, wish)
        try:
            # A step is taken in a thread, so that the page is served meanwhile. Between two steps
            # a page that has gone cancels this.
            while (event := await asyncio.to_thread(next, tokens, None)) is not None:
                await _send(response, event)
                count += 1
            end = "done"
            await _send(response, {"end": True, "seconds": time.perf_counter() - begin})
        except ConnectionError:
            pass
        finally:
            self.say(f"{count} tokens in {time.perf_counter() - begin:.1f} s: {end}")


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


@web.middleware
async def _only_this_machine(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuses other names of this address, and other origins."""
    if request.url.host not in NAMES:
        raise web.HTTPForbidden(text=f"not served under the name {request.host}")
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{request.host}":
        raise web.HTTPForbidden(text=f"not served to {origin}")
    return await handler(request)


async def _secure(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(
        {
            "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
    )


@asynccontextmanager
async def served(playground: Playground, port: int) -> AsyncIterator[str]:
    """The playground's address, for as long as it is served.

    Raises:
        UserError: The port is taken.
    """
    app = playground.app()
    app.on_response_prepare.append(_secure)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error}; name another, or 0 for any") from None
        yield f"http://{HOST}:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def read_model(folder: Path) -> GPT:
    """The model of a checkpoint, on this machine's device.

    Raises:
        UserError: There is none, or its tokens are no text of GPT-2's.
    """
    try:
        gpt = load(folder)
    except FormatError as error:
        raise UserError(f"{error}; `dvc repro` makes artifacts/checkpoint") from None
    if gpt.config.vocab_size != tokenizer.N_VOCAB:
        raise UserError(f"--checkpoint {folder}: {gpt.config.vocab_size} tokens are not GPT-2's")
    tokenizer.encode("")  # it takes a moment the first time
    return gpt.to(torch.device(device_type(Machine.load().device)))


async def _serve(playground: Playground, port: int) -> None:
    async with served(playground, port) as address:
        print(f"play: {address} serves {playground.name}; Ctrl-C ends it", flush=True)
        await asyncio.Event().wait()


def main(argv: list[str] | None = None) -> None:
    """Serve the page until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m train.play", description="Try a model in the browser, on this machine."
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("artifacts/checkpoint"), metavar="DIR",
        help="a checkpoint, or a folder in the Hugging Face layout (default artifacts/checkpoint)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="0: any (default 8000)")
    args = parser.parse_args(argv)
    playground = Playground(
        read_model(args.checkpoint), str(args.checkpoint), lambda line: print(line, flush=True)
    )
    try:
        asyncio.run(_serve(playground, args.port))
    except KeyboardInterrupt:
        print("play: closed")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
